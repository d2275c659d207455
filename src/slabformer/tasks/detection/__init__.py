"""Mask R-CNN on COCO-like data: data, training, evaluation, prediction."""
