"""The algebra of folding: a norm in eval mode as (scale, shift), and neighbours that take it over, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from slabformer.ops.precision import wide


def repbn_scale_shift(
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eta: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RepBN in eval mode as ``x * scale + shift`` (Guo et al. 2024, Lemma 4.1), float64 ``(C,)`` each."""
    gain = wide(weight) / (wide(running_var) + eps).sqrt()
    return (gain + wide(eta)).detach(), (wide(bias) - gain * wide(running_mean)).detach()


def spread(scale: Tensor, shift: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The map of each channel of a neighbour, whose channel ``i`` is the norm's ``index[i]``, or nobody's where -1."""
    one, zero = torch.ones_like(scale[:1]), torch.zeros_like(shift[:1])
    return torch.cat([scale, one])[index], torch.cat([shift, zero])[index]


def compose(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``second`` after ``first``: ``(x * s1 + t1) * s2 + t2``."""
    return first[0] * second[0], first[1] * second[0] + second[1]


def fold_into_next(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Linear or unpadded Conv that does ``W (x * scale + shift) + c`` by itself: ``W diag(scale)``, ``W shift + c``.

    Args:
        weight: ``(O, I)`` of a Linear, ``(O, I / groups, *kernel)`` of a Conv.
        bias: ``(O,)``, or None.
        scale: Of its input channels, ``(I,)``.
        shift: The same.
        groups: Of the Conv.

    Returns:
        Weight and bias, float64.
    """
    num_out, per_group = weight.shape[:2]
    shape = (num_out, per_group, *[1] * (weight.ndim - 2))
    # output channel o reads the input channels of its own group
    scale, shift = (
        wide(t).view(groups, 1, per_group).expand(-1, num_out // groups, -1).reshape(shape) for t in (scale, shift)
    )
    weight = wide(weight)
    added = (weight * shift).flatten(1).sum(1)
    return weight * scale, added if bias is None else wide(bias) + added


def fold_into_previous(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Linear or Conv that does ``(W x + c) * scale + shift`` by itself: ``diag(scale) W``, ``c * scale + shift``.

    Args:
        weight: ``(O, I)`` of a Linear, ``(O, I / groups, *kernel)`` of a Conv, padded or not.
        bias: ``(O,)``, or None.
        scale: Of its output channels, ``(O,)``.
        shift: The same.

    Returns:
        Weight and bias, float64.
    """
    scale, shift = wide(scale), wide(shift)
    folded = wide(weight) * scale.view(-1, *[1] * (weight.ndim - 1))
    return folded, shift if bias is None else wide(bias) * scale + shift
