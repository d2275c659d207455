"""Modules: the norms, which `norms` lists in one table, and the attention."""

from slabformer.nn.affine import Affine, Folded
from slabformer.nn.attention import SimplifiedLinearAttention
from slabformer.nn.dyt import DyT
from slabformer.nn.padding import PadTokens
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.repbn import RepBN
from slabformer.nn.token_batch_norm import TokenBatchNorm

__all__ = ["Affine", "DyT", "Folded", "PRepBN", "PadTokens", "RepBN", "SimplifiedLinearAttention", "TokenBatchNorm"]
