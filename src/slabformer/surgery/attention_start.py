"""Start linear attention near the softmax attention whose projections it keeps, in closed form, on its activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.converted_attention import ConvertedLinearAttention, Place
from slabformer.nn.resample import Grid
from slabformer.ops.precision import wide

#: added to the diagonal of the normal equations, relative to its mean
_RIDGE = 1e-3
#: shifted copies of values that are in memory at once
_ELEMENTS = 2**23
#: places of the keys' ReLU that the start tries, in standard deviations of the keys
_SHIFTS = (0.0, 0.5, 1.0, 2.0)


class Seen(NamedTuple):
    """What one attention of the teacher did in one forward."""

    x: Tensor
    mixed: Tensor
    place: Place


Pairs = Mapping[str, tuple[ConvertedLinearAttention, nn.Module]]


def teacher_of(teacher: nn.Module, name: str, student: ConvertedLinearAttention) -> nn.Module:
    """The attention of ``teacher`` that stands where ``student`` does.

    Raises:
        ValueError: If there is none.
    """
    try:
        found = teacher.get_submodule(name)
    except AttributeError:
        found = None
    if found is None or isinstance(found, ConvertedLinearAttention) or not hasattr(found, student._out[0]):
        raise ValueError(f"the teacher has no softmax attention {name!r}; pass the model as it was before conversion")
    return found


@torch.no_grad()
def captured(teacher: nn.Module, pairs: Pairs, call: Callable[[nn.Module, Any], Any], batch: Any) -> dict[str, Seen]:
    """Inputs and heads of the teacher's attentions on ``batch``.

    Raises:
        ValueError: If the teacher does not call one, or what one puts out is not finite.
    """
    inputs: dict[str, tuple[Tensor, Place]] = {}
    heads: dict[str, Tensor] = {}
    handles = []
    for name, (student, module) in pairs.items():

        def begin(
            _: nn.Module, args: Any, kwargs: Any, name: str = name, student: ConvertedLinearAttention = student
        ) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            inputs[name] = x.flatten(1, -2), student.place_of(x, kwargs)

        def middle(_: nn.Module, args: Any, name: str = name) -> None:
            heads[name] = args[0].flatten(1, -2)

        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.get_submodule(student._out[0]).register_forward_pre_hook(middle))
    try:
        call(teacher, batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in pairs if name not in heads]
    if missing:
        raise ValueError(f"the teacher's forward does not call {missing[0]}")
    wrong = [name for name, mixed in heads.items() if not mixed.isfinite().all()]
    if wrong:
        raise ValueError(f"outputs of the teacher's {wrong[0]} are not finite; check the data")
    return {name: Seen(inputs[name][0], heads[name], inputs[name][1]) for name in pairs}


@torch.no_grad()
def start_(student: ConvertedLinearAttention, seen: list[Seen]) -> None:
    """Give ``student`` the shift of the keys and the depthwise branch that miss least of the teacher's heads."""
    spread = torch.cat([student.projected(each.x, each.place)[1].flatten(0, 1) for each in seen]).std(0)
    sums = _DepthwiseSums(student)
    for each in seen:
        targets = torch.stack([each.mixed - _linear(student, each, shift * spread) for shift in _SHIFTS])
        sums.add(student.projected(each.x, each.place)[2], targets, each.place.grid)
    kernels, missed = sums.solve()
    best = int(missed.argmin())
    _shift_keys(student, _SHIFTS[best] * spread)
    student.dwc.weight.copy_(kernels[best, :, :-1].view_as(student.dwc.weight))
    assert student.dwc.bias is not None
    student.dwc.bias.copy_(kernels[best, :, -1])


def _shift_keys(student: ConvertedLinearAttention, shift: Tensor) -> None:
    student.positional_encoding.copy_(shift.expand_as(student.positional_encoding))
    if student.prefix_encoding is not None:
        student.prefix_encoding.copy_(shift.expand_as(student.prefix_encoding))


def _linear(student: ConvertedLinearAttention, seen: Seen, shift: Tensor) -> Tensor:
    """The linear product alone, with shifted keys: ``(B, N, C)``."""
    _shift_keys(student, shift)
    q, k, v = student.projected(seen.x, seen.place)
    return student.linear(q, k, v, seen.place.grid)


class _DepthwiseSums:
    """Normal equations of the depthwise branch, a system for each channel, for several targets at once, in float64."""

    def __init__(self, student: ConvertedLinearAttention) -> None:
        self._student, self._side = student, student.dwc.kernel_size[0]
        self._normal: Tensor | float = 0.0
        self._wanted: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def add(self, v: Tensor, targets: Tensor, grid: Grid) -> None:
        """Take in values ``(B, N, C)`` and what is to come of them, ``(S, B, N, C)``; prefix tokens are left out."""
        prefix = self._student.num_prefix_tokens
        maps = v[:, prefix:].transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
        targets = targets[:, :, prefix:].permute(3, 1, 2, 0)  # (C, B, N, S)
        per_map = maps[0, 0].numel() * (self._side**2 + 1)
        channels = min(maps.shape[1], max(1, _ELEMENTS // per_map))
        rows = max(1, _ELEMENTS // (per_map * channels))
        parts = [self._sums(*pair, rows) for pair in zip(maps.split(channels, 1), targets.split(channels), strict=True)]
        normal, wanted, square = (torch.cat(each) for each in zip(*parts, strict=True))
        self._normal, self._wanted, self._square = self._normal + normal, self._wanted + wanted, self._square + square

    def _sums(self, maps: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of some channels: ``(c, T, T)``, ``(c, T, S)`` and ``(c, S)`` for ``T`` taps and a constant."""
        found = []
        for few, wide_targets in zip(maps.split(rows), map(wide, targets.split(rows, 1)), strict=True):
            taps = F.unfold(wide(few), self._side, padding=self._side // 2).unflatten(1, (few.shape[1], -1))
            taps = torch.cat([taps, torch.ones_like(taps[:, :, :1])], dim=2).permute(1, 2, 0, 3).flatten(2)
            flat = wide_targets.flatten(1, 2)  # (c, bN, S)
            found.append((taps @ taps.mT, taps @ flat, flat.square().sum(1)))
        normal, wanted, square = (torch.stack(each).sum(0) for each in zip(*found, strict=True))
        return normal, wanted, square

    def solve(self) -> tuple[Tensor, Tensor]:
        """Kernels ``(S, C, T)``, their constant last, and the squared error ``(S,)`` that each target is left with."""
        assert isinstance(self._normal, Tensor)
        assert isinstance(self._wanted, Tensor)
        assert isinstance(self._square, Tensor)
        ridge = _RIDGE * self._normal.diagonal(dim1=1, dim2=2).mean(1)
        eye = torch.eye(self._normal.shape[-1], dtype=self._normal.dtype, device=self._normal.device)
        kernels = torch.linalg.solve(self._normal + ridge[:, None, None] * eye, self._wanted)  # (C, T, S)
        explained = 2 * kernels * self._wanted - kernels * (self._normal @ kernels)
        return kernels.permute(2, 0, 1), (self._square - explained.sum(1)).sum(0)


@torch.no_grad()
def mean_errors(pairs: Pairs, captures: Sequence[Mapping[str, Seen]]) -> dict[str, float]:
    """Mean over the captured batches."""
    return {
        name: sum(float(relative_error(student, module, capture[name])) for capture in captures) / len(captures)
        for name, (student, module) in pairs.items()
    }


def relative_error(student: ConvertedLinearAttention, teacher: nn.Module, seen: Seen) -> Tensor:
    """Squared error of the output over the variance of the teacher's.

    Of prefix tokens and of the others each, and the mean of both where there are prefix tokens: a class token is one of
    hundreds, and may be all that a head reads.
    """
    output = student.outgoing(student.mixed(seen.x, place=seen.place))
    with torch.no_grad():
        target = seen.mixed
        for name in student._out:
            target = teacher.get_submodule(name)(target)
        target = target.float()
    prefix = student.num_prefix_tokens
    kinds = [slice(prefix), slice(prefix, None)] if prefix else [slice(None)]
    errors = [
        (output[:, kind].float() - target[:, kind]).square().mean() / target[:, kind].var(correction=0).clamp(min=1e-12)
        for kind in kinds
    ]
    return torch.stack(errors).mean()
