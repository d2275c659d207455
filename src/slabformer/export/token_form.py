"""The same model as engines like it: tokens instead of maps, linear attention with its heads in front.

form = token_form(fused, FLOAT_FORMS)     # what a table says of attention; blocks and merges follow by themselves
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from slabformer.export.gathered_windows import GatheredWindowAttention
from slabformer.export.heads_first import HeadsFirstAttention, takes_heads_first
from slabformer.models.stages import Block
from slabformer.models.swin import PatchMerging
from slabformer.nn.attention import SimplifiedLinearAttention
from slabformer.nn.attention_variants import PyramidLinearAttention
from slabformer.nn.shifted_windows import ShiftedWindowAttention

#: class of an attention -> what stands for it, or None for what stays
Forms = Mapping[type[nn.Module], Callable[[Any], nn.Module | None]]


class TokenBlock(nn.Module):
    """A pre-norm block whose maps are tokens inside.

    On maps ``(B, H, W, C)`` OpenVINO adds the bias of a Linear in a pass of its own, and reorders what is added.

    Args:
        block: In eval mode, where drop path does nothing; its other parts are taken over.

    Shape:
        ``(B, H, W, C)`` to the same.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``."""
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        x = x + self.attn(self.norm1(x), grid_size=grid)
        x = x + self.mlp(self.norm2(x))
        return x.unflatten(1, grid)


class TokenLinear(nn.Module):
    """A Linear that takes maps for tokens, for the same reason.

    Args:
        linear: Taken over.

    Shape:
        ``(B, H, W, C)`` to ``(B, H, W, C')``.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """The Linear's output."""
        return self.linear(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def token_form(model: nn.Module, forms: Forms) -> nn.Module:
    """A copy of ``model``, in eval mode, that computes the same; attention as ``forms`` has it.

    Attention of other classes, subclasses among them, which do more, stays as it is.
    """
    form = copy.deepcopy(model)
    for name, module in list(form.named_modules()):
        if type(module) is PatchMerging:
            module.reduction = TokenLinear(module.reduction)  # type: ignore[assignment]
        elif name and type(module) in forms:
            other = forms[type(module)](module)
            if other is not None:
                form.set_submodule(name, other)
    for name, module in list(form.named_modules()):
        if name and type(module) is Block:
            form.set_submodule(name, TokenBlock(module))
    return form


def _heads_first(attention: SimplifiedLinearAttention | PyramidLinearAttention) -> nn.Module | None:
    return HeadsFirstAttention(attention) if takes_heads_first(attention) else None


#: in floating point
FLOAT_FORMS: Forms = {
    SimplifiedLinearAttention: _heads_first,
    PyramidLinearAttention: _heads_first,
    ShiftedWindowAttention: GatheredWindowAttention,
}
