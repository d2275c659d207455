"""Modules: the norms and the attention."""

from slabformer.nn.affine import Affine, Folded
from slabformer.nn.attention import SimplifiedLinearAttention
from slabformer.nn.padding import PadTokens
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.repbn import RepBN

__all__ = ["Affine", "Folded", "PRepBN", "PadTokens", "RepBN", "SimplifiedLinearAttention"]
