"""Which operations a per-channel affine map passes through, and how its channels move: one row an operation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slabformer.surgery.fuse.graph.labels import (
    Call,
    Labels,
    averaged,
    chosen,
    dropped,
    filled,
    moved,
    padded,
    picked,
    pooled,
    resampled,
    same,
    unread,
)
from slabformer.surgery.fuse.graph.marks import PAD

aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        ops: The operations.
        follow: Labels of the output, or RefusalError with the reason.
        example: Tokens ``(2, 4, 6)`` behind a norm to something that a Linear over its last axis may follow: its test.
        refused: Such an example that must be refused, and a part of the reason.
    """

    ops: tuple[Any, ...]
    follow: Callable[[Call], Labels]
    example: Callable[[Tensor], Tensor] | None = None
    refused: tuple[Callable[[Tensor], Tensor], str] | None = None


#: a new rule is one row; its examples become its tests
RULES: tuple[Rule, ...] = (
    Rule(
        (aten.view.default, aten._unsafe_view.default, aten.reshape.default),
        moved,
        lambda x: x.view(2, 2, 2, 6).reshape(8, 6),
        (lambda x: x.reshape(2, 6, 4), "its channels are spread over several axes"),
    ),
    Rule((aten.view_as.default, aten.reshape_as.default), moved, lambda x: x.view_as(x.new_empty(4, 2, 6))),
    Rule((aten.flatten.using_ints, aten.ravel.default), moved, lambda x: x.flatten(0, 1)),
    Rule((aten.unflatten.int,), moved, lambda x: x.unflatten(-1, (3, 2)).transpose(1, 2).transpose(1, 2).flatten(2)),
    Rule(
        (aten.permute.default, aten.movedim.int, aten.movedim.intlist),
        moved,
        lambda x: x.permute(2, 0, 1).movedim(0, -1),
        (lambda x: x.permute(0, 2, 1), "a Linear mixes another axis"),
    ),
    Rule(
        (aten.transpose.int, aten.swapaxes.default, aten.t.default, aten.numpy_T.default, aten.mT.default),
        moved,
        lambda x: x.transpose(0, 1)[0].t().t(),
    ),
    Rule((aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), moved, lambda x: x[:1].squeeze(0)),
    Rule((aten.unsqueeze.default,), moved, lambda x: x.unsqueeze(1)),
    Rule((aten.expand.default, aten.expand_as.default), moved, lambda x: x[:, None].expand(2, 3, 4, 6)),
    Rule((aten.broadcast_to.default,), moved, lambda x: x.broadcast_to(3, 2, 4, 6)),
    Rule((aten.repeat.default, aten.tile.default), moved, lambda x: x.repeat(1, 2, 3)),
    Rule((aten.repeat_interleave.self_int,), moved, lambda x: x.repeat_interleave(2, -1)),
    Rule(
        (aten.select.int, aten.narrow.default),
        moved,
        lambda x: x[:, 0].narrow(0, 0, 1),
    ),
    Rule((aten.slice.Tensor,), moved, lambda x: x[:, 1::2, 2:5]),
    Rule((aten.roll.default, aten.flip.default), moved, lambda x: x.roll((1, 2), (1, 2)).flip(1)),
    Rule((aten.split.Tensor, aten.split_with_sizes.default), moved, lambda x: x.split([1, 3], 1)[1].split(2, 1)[0]),
    Rule((aten.chunk.default, aten.tensor_split.sections), moved, lambda x: x.chunk(3, -1)[2].tensor_split(2, 1)[0]),
    Rule((aten.unbind.int,), moved, lambda x: x.unflatten(-1, (2, 3)).unbind(2)[1]),
    Rule((operator.getitem,), chosen, lambda x: x.unbind(0)[1]),
    Rule(
        (aten.cat.default, aten.concat.default),
        moved,
        # patch merging, and channels of another tensor beside
        lambda x: torch.cat([x[:, 0::2], x[:, 1::2], x.new_ones(2, 2, 5)], -1),
        (lambda x: torch.cat([x, x.new_zeros(2, 1, 6)], 1), "its channels are spread over several axes"),
    ),
    Rule((aten.stack.default,), moved, lambda x: torch.stack([x, x], 1)),
    Rule((aten.pixel_shuffle.default,), moved, lambda x: F.pixel_shuffle(x.mT.reshape(2, 8, 1, 3), 2).flatten(1)),
    Rule(
        (aten.pixel_unshuffle.default,),
        moved,
        lambda x: F.pixel_unshuffle(x.permute(2, 0, 1)[..., None].expand(6, 2, 4, 2), 2).flatten(1).t(),
    ),
    Rule((aten.unfold.default,), moved, lambda x: x.unfold(1, 2, 2).flatten(2)),
    Rule(
        (aten.index.Tensor,),
        picked,
        lambda x: x[:, torch.tensor([3, 0, 0])],
        (lambda x: x[:, :, torch.tensor([5, 4, 3])], "its channels are picked by index"),
    ),
    Rule(
        (aten.index_select.default,),
        picked,
        lambda x: x.index_select(1, torch.tensor([2, 1])),
        (lambda x: x.index_select(2, torch.tensor([2, 1])), "its channels are picked by index"),
    ),
    Rule(
        (aten.gather.default,),
        picked,
        lambda x: x.gather(1, torch.ones(2, 3, 6, dtype=torch.long)),
        (lambda x: x.gather(2, torch.ones(2, 4, 6, dtype=torch.long)), "its channels are picked by index"),
    ),
    Rule(
        (aten.mean.dim, aten.mean.default),
        averaged,
        lambda x: x.mean(1),
        (lambda x: x.mean(-1, keepdim=True), "its channels are averaged"),
    ),
    Rule(
        (aten.adaptive_avg_pool1d.default,),
        resampled(1),
        lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2),
        (lambda x: F.adaptive_avg_pool1d(x, 3), "its channels are resampled"),
    ),
    Rule(
        (aten.adaptive_avg_pool2d.default,),
        resampled(2),
        lambda x: F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(-1, (2, 2)), 1).flatten(1),
    ),
    Rule(
        (aten.avg_pool2d.default,),
        pooled(2),
        lambda x: F.avg_pool2d(x.transpose(1, 2).unflatten(-1, (2, 2)), 2).flatten(1),
        (
            lambda x: F.avg_pool2d(x.transpose(1, 2).unflatten(-1, (2, 2)), 2, padding=1).mean((2, 3)),
            "padded avg_pool2d",
        ),
    ),
    Rule(
        (aten.avg_pool1d.default,),
        pooled(1),
        lambda x: F.avg_pool1d(x.mT, 2).mT,
        (lambda x: F.avg_pool1d(x.mT, 2, ceil_mode=True).mT, "padded avg_pool1d"),
    ),
    Rule(
        (aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec),
        resampled(2),
        lambda x: F.interpolate(x.transpose(1, 2).unflatten(-1, (2, 2)), size=(3, 3), mode="bilinear").mean((2, 3)),
        (lambda x: F.interpolate(x[:, None], size=(4, 3)), "its channels are resampled"),
    ),
    Rule(
        (aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec),
        resampled(2),
        lambda x: F.interpolate(
            x.mT.unflatten(-1, (2, 2)).repeat(1, 1, 3, 3), size=(4, 3), mode="bicubic", antialias=True
        ).mean((2, 3)),
    ),
    Rule((aten.upsample_linear1d.vec,), resampled(1), lambda x: F.interpolate(x.mT, size=3, mode="linear").mT),
    Rule((aten.dropout.default, aten.feature_dropout.default), dropped, lambda x: F.dropout(x, 0.5, training=False)),
    Rule(
        (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten._to_copy.default,
            aten.type_as.default,
        ),
        same,
        lambda x: x.double().type_as(x),
        (lambda x: x.int().double(), "its output is cast to torch.int32"),
    ),
    Rule((aten.contiguous.default, aten.clone.default), same, lambda x: x.clone().transpose(0, 1).contiguous()),
    Rule((aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default), same, lambda x: x.detach()),
    Rule(
        (
            *(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
            *(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
        ),
        unread,
        lambda x: torch.cat([x, x.new_ones(2, 4, 1), torch.zeros_like(x)], -1),
    ),
    Rule(
        (aten.pad.default, aten.constant_pad_nd.default),
        padded,
        refused=(lambda x: F.pad(x, (0, 0, 0, 0)), "its output is padded"),
    ),
    Rule((PAD,), filled),
)
FOLLOW: dict[Any, Callable[[Call], Labels]] = {op: rule.follow for rule in RULES for op in rule.ops}
#: products with a number, and by what they multiply: passed only where that is noted, since a shift scales with it
NUMBERS: dict[Any, Callable[[float], float]] = {
    aten.mul.Tensor: lambda number: number,
    aten.div.Tensor: lambda number: 1 / number,
}
#: checks on shape and dtype that the tracer inserts; they hold after folding as before
CHECKS = {aten._assert_tensor_metadata.default}
