"""Functions on tensors. Needs torch alone and knows no module."""

from slabformer.ops.linear_attention import linear_attention

__all__ = ["linear_attention"]
