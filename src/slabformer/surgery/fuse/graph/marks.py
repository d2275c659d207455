"""Operations that stand for norms and pads in a traced graph, whatever their classes compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from slabformer.surgery.fuse.tree.norms import Norm, tail_of
from slabformer.surgery.fuse.tree.pads import Pad


@torch.library.custom_op("slabformer::norm", mutates_args=())
def mark_norm(x: Tensor, index: int) -> Tensor:
    """Stands for norm number ``index`` while tracing; never computed."""
    return x.clone()


@mark_norm.register_fake
def _(x: Tensor, index: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("slabformer::pad_tokens", mutates_args=())
def mark_pad(x: Tensor, pad_h: int, pad_w: int, index: int) -> Tensor:
    """Stands for pad number ``index`` while tracing, also where it pads by 0; never computed."""
    return torch.nn.functional.pad(x, (0, 0, 0, pad_w, 0, pad_h))


@mark_pad.register_fake
def _(x: Tensor, pad_h: int, pad_w: int, index: int) -> Tensor:
    B, H, W, C = x.shape
    return x.new_empty(B, H + pad_h, W + pad_w, C)


NORM = torch.ops.slabformer.norm.default
PAD = torch.ops.slabformer.pad_tokens.default


def mark_(model: nn.Module, norms: Sequence[Norm], pads: Sequence[Pad]) -> None:
    """Let every norm and pad of ``model``, a twin, be one call of its mark, for good."""
    for norm in norms:
        module = model.get_submodule(norm.name)
        module.forward = _norm_call(norm.index, tail_of(module))  # type: ignore[assignment]
    for pad in pads:
        model.get_submodule(pad.name).forward = _pad_call(pad.index)  # type: ignore[assignment]


def _norm_call(index: int, tail: nn.Module | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = torch.ops.slabformer.norm(x, index)
        return y if tail is None else tail(y)

    return forward


def _pad_call(index: int) -> Callable[[Tensor, int, int], Tensor]:
    def forward(x: Tensor, pad_h: int, pad_w: int) -> Tensor:
        return torch.ops.slabformer.pad_tokens(x, pad_h, pad_w, index)

    return forward
