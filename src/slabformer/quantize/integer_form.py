"""The same model as integer runtimes like it, before anything is rounded.

form = integer_form(fused)     # deployment.quantize calls it
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from slabformer.models.stages import Block
from slabformer.models.swin import PatchMerging
from slabformer.nn.attention import SimplifiedLinearAttention
from slabformer.nn.shifted_windows import ShiftedWindowAttention
from slabformer.quantize.integer_attention import IntegerLinearAttention
from slabformer.quantize.integer_windows import GatheredWindowAttention


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


def integer_form(model: nn.Module) -> nn.Module:
    """A copy of ``model``, in eval mode, that computes the same and loses least time in integers.

    Linear attention in shifted windows or with spatial reduction, and other softmax attention, stays as it is.
    """
    form = copy.deepcopy(model)
    for name, module in list(form.named_modules()):
        # subclasses do more
        if type(module) is SimplifiedLinearAttention:
            form.set_submodule(name, IntegerLinearAttention(module))
        elif type(module) is ShiftedWindowAttention:
            form.set_submodule(name, GatheredWindowAttention(module))
        elif type(module) is PatchMerging:
            module.reduction = TokenLinear(module.reduction)  # type: ignore[assignment]
    for name, module in list(form.named_modules()):
        if type(module) is Block:
            form.set_submodule(name, TokenBlock(module))
    return form
