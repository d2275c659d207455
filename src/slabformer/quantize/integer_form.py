"""The same model as integer runtimes like it, before anything is rounded.

form = integer_form(fused)     # quantize calls it
"""

from __future__ import annotations

from torch import nn

from slabformer.export.gathered_windows import GatheredWindowAttention
from slabformer.export.token_form import Forms, token_form
from slabformer.nn.attention import SimplifiedLinearAttention
from slabformer.nn.shifted_windows import ShiftedWindowAttention
from slabformer.quantize.integer_attention import IntegerLinearAttention

FORMS: Forms = {
    SimplifiedLinearAttention: IntegerLinearAttention,
    ShiftedWindowAttention: GatheredWindowAttention,
}


def integer_form(model: nn.Module) -> nn.Module:
    """A copy of ``model``, in eval mode, that computes the same and loses least time in integers.

    Linear attention in shifted windows or with spatial reduction, and other softmax attention, stays as it is.
    """
    return token_form(model, FORMS)
