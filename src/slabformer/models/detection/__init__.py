"""Mask R-CNN on backbones without LayerNorm; imported when asked for, since torchvision is needed only here."""
