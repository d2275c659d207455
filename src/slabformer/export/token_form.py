"""The same model as engines like it: parts of it replaced by others that compute the same.

form = token_form(fused, forms)     # tokens instead of maps; attention as a table says
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from slabformer.models.stages import Block
from slabformer.models.swin import PatchMerging

#: class of a module -> what stands for it, or None for what stays
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
    """A copy of ``model``, in eval mode, that computes the same; attention as ``forms`` has it."""
    return rewritten(model, forms, {Block: token_block})


def rewritten(model: nn.Module, forms: Forms, blocks: Forms) -> nn.Module:
    """A copy of ``model``, in eval mode, whose attention is as ``forms`` has it, and then its blocks as ``blocks`` has.

    Modules of other classes, subclasses among them, which do more, stay as they are.
    """
    form = copy.deepcopy(model)
    for module in list(form.modules()):
        if type(module) is PatchMerging:
            module.reduction = TokenLinear(module.reduction)  # type: ignore[assignment]
    for table in (forms, blocks):
        for name, module in list(form.named_modules()):
            other = table[type(module)](module) if name and type(module) in table else None
            if other is not None:
                form.set_submodule(name, other)
    return form


def token_block(block: Block) -> nn.Module | None:
    """The block on tokens; None where its MLP may read maps."""
    return TokenBlock(block) if type(block.mlp) is Mlp else None
