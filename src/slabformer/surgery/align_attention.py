"""Bring linear attention near the softmax attention that it replaced, layer by layer (stage 1 of arXiv 2603.16063)."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.converted_attention import ConvertedLinearAttention
from slabformer.ops.precision import wide
from slabformer.settings import NonNegativeInt, PositiveFloat, PositiveInt, checked
from slabformer.surgery.batches import NO_BATCH, call_model, eval_mode, model_device, to_device

logger = logging.getLogger(__name__)

#: added to the diagonal of the normal equations, relative to its mean
_RIDGE = 1e-3
#: shifted copies of values that are in memory at once
_ELEMENTS = 2**23
#: places of the keys' ReLU that the start tries, in standard deviations of the keys
_SHIFTS = (0.0, 0.5, 1.0, 2.0)


@checked
def align_attention_(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    fit_batches: PositiveInt = 2,
    steps: NonNegativeInt = 100,
    lr: PositiveFloat = 3e-4,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, float]:
    """Bring every converted attention near the one that it replaced, each for itself, on the teacher's activations.

    First a start in closed form: the depthwise branch by least squares against what linear attention misses, and the
    place of the keys' ReLU by trying a few. Then ``steps`` of AdamW on each attention's own squared error. One forward
    of the teacher a batch serves all of them; no gradient leaves an attention. Memory: inputs and heads of every
    attention on the batches of the start, or on one batch of training.

    Args:
        model: Converted by :func:`convert_attention_`; edited in place.
        teacher: The model before it was converted.
        batches: As for :func:`slabformer.recalibrate_`; begun anew where they end before ``steps``, if they can be.
        fit_batches: Batches that the start uses.
        steps: Batches that are trained on after it; 0 for the start alone.
        lr: Highest rate of AdamW, which falls to 0 by a cosine.
        forward: As for :func:`slabformer.recalibrate_`.

    Returns:
        For each attention the squared error of its output over the variance of the teacher's, on the batches of the
        start; where training did not lower it, the attention keeps its start.

    Raises:
        ValueError: If the model has no converted attention, the teacher has none under such a name, or there is no
            batch.
    """
    students = {n: m for n, m in model.named_modules() if isinstance(m, ConvertedLinearAttention)}
    if not students:
        raise ValueError("the model has no converted attention; call convert_attention_(model) first")
    pairs = {name: (student, _teacher_of(teacher, name, student)) for name, student in students.items()}
    if isinstance(batches, Iterator):
        batches = list(itertools.islice(batches, fit_batches + steps))
    seen = list(itertools.islice(batches, fit_batches))
    if not seen:
        raise ValueError(NO_BATCH)
    device, call = model_device(teacher), forward or call_model
    with eval_mode(model), eval_mode(teacher):
        captures = [_captured(teacher, pairs, call, to_device(batch, device)) for batch in seen]
        for name, (student, _) in pairs.items():
            _start(student, [capture[name] for capture in captures])
        errors = _errors(pairs, captures)
        if not steps:
            return errors
        started = {name: copy.deepcopy(student.state_dict()) for name, (student, _) in pairs.items()}
        _train(pairs, teacher, call, itertools.islice(_endless(batches), steps), steps, lr, device)
        trained = _errors(pairs, captures)
        for name in [name for name, error in trained.items() if not error <= errors[name]]:
            pairs[name][0].load_state_dict(started[name])
            logger.warning("training brought %s no nearer to its teacher: it keeps its start; lower lr", name)
        return {name: min(error, errors[name]) for name, error in trained.items()}


class _Seen(NamedTuple):
    """What one attention of the teacher did in one forward."""

    x: Tensor
    mixed: Tensor


Pairs = Mapping[str, tuple[ConvertedLinearAttention, nn.Module]]


def _teacher_of(teacher: nn.Module, name: str, student: ConvertedLinearAttention) -> nn.Module:
    try:
        found = teacher.get_submodule(name)
    except AttributeError:
        found = None
    if found is None or isinstance(found, ConvertedLinearAttention) or not hasattr(found, student._out[0]):
        raise ValueError(f"the teacher has no softmax attention {name!r}; pass the model as it was before conversion")
    return found


@torch.no_grad()
def _captured(teacher: nn.Module, pairs: Pairs, call: Callable[[nn.Module, Any], Any], batch: Any) -> dict[str, _Seen]:
    """Inputs and heads of the teacher's attentions on ``batch``."""
    inputs: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    handles = []
    for name, (student, module) in pairs.items():

        def begin(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            inputs[name] = args[0] if args else kwargs["hidden_states"]

        def middle(_: nn.Module, args: Any, name: str = name) -> None:
            heads[name] = args[0]

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
    return {name: _Seen(inputs[name], heads[name]) for name in pairs}


@torch.no_grad()
def _start(student: ConvertedLinearAttention, seen: list[_Seen]) -> None:
    """Keys' shift and depthwise branch that miss least of the teacher's heads."""
    spread = torch.cat([student.projected(each.x)[1].flatten(0, 1) for each in seen]).std(0)
    sums = _DepthwiseSums(student)
    for x, mixed in seen:
        sums.add(student.projected(x)[2], torch.stack([mixed - _linear(student, x, s * spread) for s in _SHIFTS]))
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


def _linear(student: ConvertedLinearAttention, x: Tensor, shift: Tensor) -> Tensor:
    """The linear product alone, with shifted keys: ``(B, N, C)``."""
    _shift_keys(student, shift)
    q, k, v = student.projected(x)
    return student.linear(q, k, v, student.grid_of(x))


class _DepthwiseSums:
    """Normal equations of the depthwise branch, a system for each channel, for several targets at once, in float64."""

    def __init__(self, student: ConvertedLinearAttention) -> None:
        self._student, self._side = student, student.dwc.kernel_size[0]
        self._normal: Tensor | float = 0.0
        self._wanted: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def add(self, v: Tensor, targets: Tensor) -> None:
        """Take in values ``(B, N, C)`` and what is to come of them, ``(S, B, N, C)``; prefix tokens are left out."""
        prefix, grid = self._student.num_prefix_tokens, self._student.grid_of(v)
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
def _errors(pairs: Pairs, captures: Sequence[Mapping[str, _Seen]]) -> dict[str, float]:
    """Mean over the captured batches."""
    return {
        name: sum(float(_error(student, module, capture[name])) for capture in captures) / len(captures)
        for name, (student, module) in pairs.items()
    }


def _error(student: ConvertedLinearAttention, teacher: nn.Module, seen: _Seen) -> Tensor:
    """Squared error of the output over the variance of the teacher's."""
    output = student(seen.x)
    output = output[0] if isinstance(output, tuple) else output
    with torch.no_grad():
        target = seen.mixed
        for name in student._out:
            target = teacher.get_submodule(name)(target)
        target = target.float()
    return (output.float() - target).square().mean() / target.var(correction=0).clamp(min=1e-12)


def _train(
    pairs: Pairs,
    teacher: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    batches: Iterable[Any],
    steps: int,
    lr: float,
    device: torch.device,
) -> None:
    parameters = [p for student, _ in pairs.values() for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in batches:
        seen = _captured(teacher, pairs, call, to_device(batch, device))
        with torch.enable_grad():
            errors = torch.stack([_error(*pair, seen[name]) for name, pair in pairs.items()])
            gradients = torch.autograd.grad(errors.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            return
