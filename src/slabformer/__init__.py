"""Transformers without LayerNorm: convert, train, recalibrate, fuse, verify, deploy. Needs torch alone."""

from slabformer.nn import Affine, PRepBN, RepBN

__version__ = "0.1.0"
__all__ = ["Affine", "PRepBN", "RepBN"]
