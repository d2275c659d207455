"""What a module computes: LayerNorm or RMSNorm over one axis of channels, something that looks like it, or neither."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._process import alone, no_warnings
from slabformer._torch import HOOKS, buffer_slots, parameter_slots
from slabformer.nn.norms import NormType, norm_types, rows, type_of
from slabformer.surgery.one_input import arguments
from slabformer.surgery.outputs import first_line
from slabformer.surgery.reasons import Reason, Why

#: size of inputs beside which no eps counts, and how far float32 inside a module may take it from float64
LARGE, TOLERANCE = 1e3, 1e-4
#: of copies that are run, the first in which they do
DTYPES = (torch.float64, torch.float32)
#: a module with more below it is no norm
MAX_DESCENDANTS = 4
#: largest product that what does not call itself a norm may form of a tensor with several axes, if it is a matrix
MAX_PRODUCT = 2**18
#: signs, codes and the like do not change with the scale of their input either, but have few values
MAX_LEVELS = 8
#: torch's own modules that may be norms; all others are known not to be
_TORCH_NORMS = ("torch.nn.modules.normalization", "torch.nn.modules.instancenorm", "torch.nn.modules.batchnorm")

_OF_EVERY_MODULE = vars(nn.Module()).keys()

SEVERAL_AXES = Why.of(Reason.SEVERAL_AXES, "it normalises over several axes, and RepBN over one axis of channels")
PER_HEAD = Why.of(Reason.PER_HEAD, "its gain or offset differs from head to head, and RepBN has one per channel")
UNIT_LENGTH = Why.of(Reason.UNIT_LENGTH, "it scales to unit length (L2 normalisation), not to unit variance")
MIXES = Why.of(
    Reason.MIXES_POSITIONS,
    "its statistics run over several positions or samples, as those of GroupNorm, InstanceNorm and BatchNorm do",
)
ANY_WIDTH = Why.of(
    Reason.UNKNOWN_WIDTH,
    "it works at any width and does not say its own; give it an attribute normalized_shape = (channels,)",
)
TWO_LAYOUTS = Why.of(
    Reason.TWO_LAYOUTS, "it normalises the last axis of tokens and the first of maps; use one module for each"
)
NEITHER = Why.of(Reason.NOT_A_NORM, "it computes neither LayerNorm nor RMSNorm over one axis of channels")
IN_TRAINING = Why.of(Reason.DIFFERS_IN_TRAINING, "it computes something else in training mode")
LARGE_ONLY = Why.of(Reason.LARGE_INPUTS_ONLY, "it normalises large inputs alone")
HOLDS_LAYERS = Why.of(Reason.HOLDS_LAYERS, "it holds layers of its own")


@dataclass(frozen=True)
class NormForm:
    """A norm over one axis of channels, ``normalised(x) * gain + offset``, as it was found by running a copy.

    Attributes:
        kind: Name of its row in the table of norms, :mod:`slabformer.nn.norms`.
        num_channels: ``C``.
        channel_dim: Axis of the channels, -1 or 1.
        gains: Names of the tensors that the gain depends on.
        offsets: Names of the tensors that the offset depends on.
        gain: Factor and summand by which the only one of ``gains`` becomes the gain, ``factor * (summand + tensor)``:
            the summand is 1 where the gain is stored minus 1. None for any other rule.
        offset_is_stored: Whether the only one of ``offsets`` is the offset.
        eps: Added to the variance, or what comes nearest to it.
    """

    kind: str
    num_channels: int
    channel_dim: int
    gains: tuple[str, ...]
    offsets: tuple[str, ...]
    gain: tuple[float, float] | None
    offset_is_stored: bool
    eps: float

    def gain_and_offset(self, norm: nn.Module) -> tuple[Tensor | float, Tensor | float]:
        """Those of ``norm``, a scalar or ``(C,)``; 1 and 0 for what another rule makes of tensors without values."""
        tensors = _tensors(norm)
        gain: Tensor | float | None = None
        offset: Tensor | float | None = None
        if self.gain is not None:
            factor, summand = self.gain
            gain = factor * (summand + tensors[self.gains[0]].detach().flatten()) if self.gains else factor
        if self.offset_is_stored:
            offset = tensors[self.offsets[0]].detach().flatten() if self.offsets else 0.0
        if gain is None or offset is None:
            measured = self._measured(norm)
            gain, offset = measured[0] if gain is None else gain, measured[1] if offset is None else offset
        return gain, offset

    def _measured(self, norm: nn.Module) -> tuple[Tensor | float, Tensor | float]:
        if any(tensor.is_meta for tensor in _tensors(norm).values()):
            return 1.0, 0.0
        with _alone():
            for dtype, layout in itertools.product(DTYPES, _layouts(self.num_channels)):
                if layout.channel_dim == self.channel_dim:
                    try:
                        probe = _Probe(norm, dtype)
                        probe.load(_tensors(norm))
                        line = probe.line(layout, self.kind)
                    except _CannotRunError:
                        continue
                    return line.slope, line.offset
        raise AssertionError("a norm runs on the layout that it was recognised on")


@dataclass(frozen=True)
class Lookalike:
    """A module that looks like a norm, by its name or its outputs, but cannot be replaced.

    Attributes:
        why: Why not; its words are a clause.
    """

    why: Why


Verdict = NormForm | Lookalike | None


def recognise(module: nn.Module, known: dict[Any, Verdict] | None = None) -> Verdict:
    """The norm that ``module`` computes, or why it only looks like one; None if it does not.

    A copy with random tensors, on the CPU in float64, is run on random tokens and maps, and its outputs are compared
    with each kind of norm; in float32 if no copy in float64 runs, as where the norm itself casts its input. Neither
    names of classes nor of parameters count; ``module`` itself is not run.

    Args:
        module: Any.
        known: Verdicts on earlier modules, which this call reads and adds to: modules that differ in nothing but the
            values of their tensors are run once.
    """
    row = type_of(module)
    if row is not None and row.gain_and_offset is not None:
        return _as_the_row_says(row, module)
    if _is_known(module):
        return None
    named = _named_norm(module)
    if not _stands_alone(module):
        return Lookalike(HOLDS_LAYERS) if _called_norm(module) else None
    required = [argument for argument in arguments(module) if argument.default is inspect.Parameter.empty]
    if len(required) > 1:
        names = ", ".join(argument.name for argument in required)
        return (
            Lookalike(Why.of(Reason.FURTHER_INPUTS, f"its forward needs {len(required)} inputs ({names})"))
            if named
            else None
        )
    known = {} if known is None else known
    try:
        key = tuple((name, type(part), *_traits(part)) for name, part in module.named_modules())
        if key not in known:
            with _alone():
                known[key] = _probed_in_any_dtype(module, named)
        return known[key]
    except _CannotRunError as error:
        known[key] = _cannot_run(str(error)) if named else None
        return known[key]
    except Exception as error:  # attributes of foreign code, parameters that have no shape yet
        return _cannot_run(first_line(error)) if named else None


def _cannot_run(said: str) -> Lookalike:
    return Lookalike(Why.of(Reason.CANNOT_RUN, f"it cannot be run on its own: {said}"))


def _as_the_row_says(row: NormType, module: nn.Module) -> NormForm:
    """A norm that its class tells: what it computes is no line through a function of its input alone."""
    assert row.gain_and_offset is not None
    gain, offset = row.gain_and_offset
    return NormForm(
        kind=row.name,
        num_channels=row.num_channels(module),
        channel_dim=row.channel_dim(module),
        gains=(gain,),
        offsets=(offset,),
        gain=(1.0, 0.0),
        offset_is_stored=True,
        eps=getattr(module, "eps", 0.0),
    )


def _normalised(kind: str, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``x`` as the norm in that row of the table makes it, before gain and offset."""
    normalise = norm_types()[kind].normalise
    assert normalise is not None
    return normalise(x, axes)


def _is_known(module: nn.Module) -> bool:
    """Whether it runs code of torch's own that is no norm, or none."""
    forward = type(module).forward
    if "forward" in vars(module):
        return False
    if forward is nn.Module.forward:
        return True
    origin = getattr(forward, "__module__", "")
    return origin.startswith("torch.") and origin not in _TORCH_NORMS


def _named_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or "norm" in type(module).__name__.lower()


def _called_norm(module: nn.Module) -> bool:
    """Whether its name says that it is a norm, rather than that it holds one as a ConvNormAct does."""
    name = type(module).__name__.lower().rstrip("0123456789d_")
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or name.endswith("norm")


def _stands_alone(module: nn.Module) -> bool:
    descendants = list(itertools.islice(module.modules(), 1, MAX_DESCENDANTS + 2))
    return len(descendants) <= MAX_DESCENDANTS and not any(parameter_slots(part) for part in descendants)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    return {name: tensor for name, tensor in named if tensor.dtype.is_floating_point}


def _traits(module: nn.Module) -> Iterator[Any]:
    """All that decides what a module computes, but for the values of its tensors."""
    for name, tensor in itertools.chain(parameter_slots(module).items(), buffer_slots(module).items()):
        yield name, tensor is not None and (tensor.shape, tensor.dtype.is_floating_point)
    plain = (int, float, str, bool, type(None), torch.dtype, torch.Size)
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE:
            is_plain = isinstance(value, plain) or (
                isinstance(value, tuple) and all(isinstance(v, plain) for v in value)
            )
            yield name, repr(value) if is_plain else id(value)


class _CannotRunError(Exception):
    """What a copy answered to an input, if not a tensor of its shape."""


@contextmanager
def _alone() -> Iterator[None]:
    """Foreign code leaves neither gradients, warnings nor another state of the random generator."""
    no_autocast = torch.autocast("cpu", enabled=False)
    with alone, no_warnings(), torch.no_grad(), torch.random.fork_rng(()), torch.device("cpu"), no_autocast:
        torch.manual_seed(0)
        yield


@dataclass(frozen=True)
class _Layout:
    """An input's shape, the axis of its channels, the axes to normalise over and how many share a gain's shape."""

    shape: tuple[int, ...]
    channel_dim: int = -1
    axes: tuple[int, ...] = (-1,)
    gain_ndim: int = 1

    def tokens(self, x: Tensor) -> Tensor:
        """``x`` as ``(N, C)``, or ``(N, *)`` where gains have several axes."""
        return x.movedim(self.channel_dim, -1).flatten(0, -self.gain_ndim - 1)


@dataclass(frozen=True)
class _Line:
    """``y = slope * normalised + offset``, ``(C,)`` each, and the largest error relative to the largest ``y``."""

    slope: Tensor
    offset: Tensor
    error: float

    @classmethod
    def through(cls, x: Tensor, y: Tensor) -> _Line:
        """Least squares over the first axis."""
        from_mean = x - x.mean(0)
        square = from_mean.square().sum(0)
        slope = (from_mean * (y - y.mean(0))).sum(0) / square.clamp(min=torch.finfo(square.dtype).tiny)
        offset = y.mean(0) - slope * x.mean(0)
        error = (y - slope * x - offset).abs().max() / y.abs().max().clamp(min=torch.finfo(y.dtype).tiny)
        return cls(slope, offset, float(error))


class _Probe:
    """A copy of a module on the CPU in ``dtype`` whose tensors take any values; inputs and outputs are in float64."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        memo: dict[int, Any] = {}
        for part in module.modules():
            memo.update({id(vars(part)[name]): type(vars(part)[name])() for name in HOOKS[:-1]})
            for tensor in (*parameter_slots(part).values(), *buffer_slots(part).values(), *vars(part).values()):
                if isinstance(tensor, Tensor):
                    memo[id(tensor)] = _blank(tensor, dtype)
        try:
            self.copy = copy.deepcopy(module, memo).eval()
        except Exception as error:
            raise _CannotRunError(f"it cannot be copied ({first_line(error)})") from error
        self.tensors = _tensors(self.copy)
        self.inputs: dict[tuple[int, ...], Tensor] = {}
        self.buffers = {
            name: self.tensors[name].clone() for name, _ in self.copy.named_buffers() if name in self.tensors
        }

    def input(self, layout: _Layout, scale: float) -> Tensor:
        """Random, its mean half its deviation; the same at every call but for ``scale``."""
        if layout.shape not in self.inputs:
            generator = torch.Generator().manual_seed(len(layout.shape))
            self.inputs[layout.shape] = torch.randn(layout.shape, generator=generator, dtype=torch.float64) + 0.5
        return scale * self.inputs[layout.shape]

    def draw(self, seed: int) -> None:
        """Values from 0.5 to 1.5; buffers too, since a fresh frozen BatchNorm is the identity."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.tensors.values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)

    def load(self, values: dict[str, Tensor]) -> None:
        """The values of the module's own tensors; those without any are left."""
        for name, value in values.items():
            if not value.is_meta:
                self.tensors[name].copy_(value)

    def run(self, x: Tensor) -> Tensor:
        """Its output.

        Raises:
            _CannotRunError: If it raises, or its output is no finite tensor of the input's shape.
        """
        if x.numel() * max(x.shape) > MAX_PRODUCT:
            self._need_shape_of(x)
        try:
            y = self.copy(x.to(self.dtype, copy=True))
        except Exception as error:  # foreign code, on an input that it may not be made for
            raise _CannotRunError(first_line(error)) from error
        if not isinstance(y, Tensor):
            raise _CannotRunError(f"it returns a {type(y).__name__}")
        if y.shape != x.shape or not y.dtype.is_floating_point or y.is_meta:
            raise _CannotRunError(f"it turns an input of shape {tuple(x.shape)} into {tuple(y.shape)}")
        return y.double()

    def _need_shape_of(self, x: Tensor) -> None:
        """Refuse what a gain ``(C,)`` makes of maps ``(N, C, 1, 1)``, C times as large, before that is computed."""
        try:
            shape = copy.deepcopy(self.copy).to("meta")(x.to("meta", self.dtype)).shape
        except Exception:  # foreign code that needs values, or makes tensors on the CPU
            return
        if shape != x.shape:
            raise _CannotRunError(f"it turns an input of shape {tuple(x.shape)} into {tuple(shape)}")

    def line(self, layout: _Layout, kind: str) -> _Line:
        """Its output as gain and offset of ``kind``, on large inputs."""
        x = self.input(layout, LARGE)
        return _Line.through(_normalised(kind, layout.tokens(x), layout.axes), layout.tokens(self.run(x)))

    def kind(self, layout: _Layout) -> str | None:
        """The kind of norm that it computes, whatever its tensors hold."""
        left = [row.name for row in rows() if row.normalise is not None]
        for seed in (1, 0):
            self.draw(seed)
            x = self.input(layout, LARGE)
            y = layout.tokens(self.run(x))
            tokens = layout.tokens(x)
            left = [kind for kind in left if _Line.through(_normalised(kind, tokens, layout.axes), y).error < TOLERANCE]
        return left[0] if left else None


def _blank(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    dtype = dtype if tensor.dtype.is_floating_point else tensor.dtype
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(torch.ones(tensor.shape, dtype=dtype), requires_grad=False)
    if tensor.is_meta:
        return torch.ones(tensor.shape, dtype=dtype)
    return tensor.detach().to("cpu", dtype, copy=True)


def _probed_in_any_dtype(module: nn.Module, named: bool) -> NormForm | Lookalike | None:
    """:func:`_probed` in the first dtype in which a copy runs."""
    *wide, narrowest = DTYPES
    for dtype in wide:
        try:
            return _probed(module, named, dtype)
        except _CannotRunError:
            continue
    return _probed(module, named, narrowest)


def _probed(module: nn.Module, named: bool, dtype: torch.dtype) -> NormForm | Lookalike | None:
    shapes = {_squeezed(tensor.shape) for tensor in _tensors(module).values()} - {()}
    widest = max((*shapes, _own_shape(module)), key=len)
    if len(widest) > 1:
        return _of_several_axes(module, widest, shapes, named, dtype)
    if len(shapes) > 1:
        return Lookalike(NEITHER) if named else None
    widths = shapes or {_own_shape(module)} - {()}
    width = widths.pop()[0] if widths else _only_width(module)
    probe = _Probe(module, dtype)
    ran = _run_all(probe, _layouts(width or 8))
    # a norm of tokens may run on maps too, where it computes something else
    fits = [
        dim for dim in (-1, 1) if None not in (found := {k for o, k in ran.items() if o.channel_dim == dim}) and found
    ]
    if not fits:
        return _other(probe, next(iter(ran)), named)
    if width == 1:  # over one channel every axis is the same constant
        return _form(probe, next(iter(ran)), ran) if named else None
    if len(fits) > 1:
        return Lookalike(TWO_LAYOUTS)
    form = _form(probe, next(layout for layout in ran if layout.channel_dim in fits), ran)
    return Lookalike(ANY_WIDTH) if width is None and isinstance(form, NormForm) else form


def _of_several_axes(
    module: nn.Module, shape: tuple[int, ...], shapes: set[tuple[int, ...]], named: bool, dtype: torch.dtype
) -> Lookalike | None:
    """Norms whose tensors have several axes, which are left."""
    too_large = math.prod(shape) * max(shape) > MAX_PRODUCT and not _called_norm(module)
    if too_large or shapes - {shape} - {shape[-1:]}:
        return Lookalike(NEITHER) if named else None
    probe = _Probe(module, dtype)
    every = tuple(range(-len(shape), 0))
    reasons = {
        _Layout((2, 3, *shape), gain_ndim=len(shape)): PER_HEAD,
        _Layout((6, *shape), axes=every, gain_ndim=len(shape)): SEVERAL_AXES,
    }
    ran = _run_all(probe, reasons)
    for layout, kind in ran.items():
        if kind is not None:
            return Lookalike(reasons[layout])
    return _other(probe, next(iter(ran)), named)


def _run_all(probe: _Probe, layouts: Iterable[_Layout]) -> dict[_Layout, str | None]:
    """The kind of norm on each layout that ``probe`` runs on.

    Raises:
        _CannotRunError: If there is none, with what it answered to the first.
    """
    ran: dict[_Layout, str | None] = {}
    errors: list[_CannotRunError] = []
    for layout in layouts:
        try:
            ran[layout] = probe.kind(layout)
        except _CannotRunError as error:
            errors.append(error)
    if not ran:
        raise errors[0]
    return ran


def _layouts(width: int) -> list[_Layout]:
    """Tokens, grids of tokens, maps, sequences, volumes and pooled maps, no other axis as long as the channels'."""
    a, b, c, d = [n for n in (2, 3, 4, 5, 6) if n != width][:4]
    return [
        _Layout((d, c, width)),
        _Layout((a, b, c, width)),
        _Layout((a, width, b, c), channel_dim=1),
        _Layout((d, width, c), channel_dim=1),
        _Layout((a, width, b, a, a), channel_dim=1),
        _Layout((4 * d, width, 1, 1), channel_dim=1),
    ]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _own_shape(module: nn.Module) -> tuple[int, ...]:
    """The attribute ``normalized_shape``, without axes of length 1 if it has several."""
    shape = getattr(module, "normalized_shape", ())
    shape = (shape,) if isinstance(shape, int) else shape
    if not isinstance(shape, (tuple, list)) or not all(isinstance(n, int) for n in shape):
        return ()
    return tuple(shape) if len(shape) == 1 else _squeezed(tuple(shape))


def _only_width(module: nn.Module) -> int | None:
    """The number among the attributes that can be a width, if there is one alone."""
    values = [value for name, value in vars(module).items() if not name.startswith("_")]
    flat = [v[0] if isinstance(v, (tuple, list)) and len(v) == 1 else v for v in values]
    widths = {value for value in flat if type(value) is int and value > 1}
    return widths.pop() if len(widths) == 1 else None


def _form(probe: _Probe, layout: _Layout, ran: Mapping[_Layout, str | None]) -> NormForm | Lookalike:
    """How the gain and the offset of a norm follow from its tensors, and what it adds to the variance."""
    kind = ran[layout]
    assert kind is not None
    lines, values = [], []
    for seed in (1, 0):
        probe.draw(seed)
        lines.append(probe.line(layout, kind))
        values.append({name: tensor.flatten().clone() for name, tensor in probe.tensors.items()})
    gains, offsets = _roles(probe, layout, kind)
    x = probe.input(layout, 1.0)
    y = probe.run(x)
    probe.copy.train()
    if (probe.run(x) - y).abs().max() > TOLERANCE * y.abs().max():
        return Lookalike(IN_TRAINING)
    probe.copy.eval()
    width = x.shape[layout.channel_dim]
    eps = 0.0 if width == 1 else _eps(probe, layout, kind)
    if eps is None:
        return Lookalike(LARGE_ONLY)
    if width > 2 and _is_unit_length(probe, layout, kind, gains):
        return Lookalike(UNIT_LENGTH)
    slopes = [line.slope for line in lines]
    return NormForm(
        kind=kind,
        num_channels=width,
        channel_dim=layout.channel_dim,
        gains=gains,
        offsets=offsets,
        gain=(1.0, 0.0) if width == 1 else _gain_rule(slopes, [[value[name] for name in gains] for value in values]),
        offset_is_stored=len(offsets) < 2
        and all(
            _near(line.offset, value[offsets[0]] if offsets else 0.0) for line, value in zip(lines, values, strict=True)
        ),
        eps=eps,
    )


def _near(actual: Tensor, expected: Tensor | float) -> bool:
    return bool((actual - expected).abs().max() < TOLERANCE)


def _roles(probe: _Probe, layout: _Layout, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the tensors that move the gain, and of those that move the offset."""
    before = probe.line(layout, kind)
    gains, offsets = [], []
    for name, tensor in probe.tensors.items():
        value = tensor.clone()
        tensor.add_(0.25)
        after = probe.line(layout, kind)
        tensor.copy_(value)
        if not _near(after.slope, before.slope):
            gains.append(name)
        if not _near(after.offset, before.offset):
            offsets.append(name)
    return tuple(gains), tuple(offsets)


def _gain_rule(slopes: list[Tensor], gains: list[list[Tensor]]) -> tuple[float, float] | None:
    """Factor and summand of :attr:`NormForm.gain`, from gains measured at several values of the tensors behind them."""
    if len(gains[0]) > 1:
        return None
    for summand in (0.0, 1.0) if gains[0] else (1.0,):
        factors = torch.stack([slope / (summand + sum(tensors)) for slope, tensors in zip(slopes, gains, strict=True)])
        factor = float(factors.mean())
        if _near(factors, factor):
            return (1.0 if abs(factor - 1) < TOLERANCE else factor), summand if gains[0] else 0.0
    return None


def _is_unit_length(probe: _Probe, layout: _Layout, kind: str, gains: tuple[str, ...]) -> bool:
    """Whether it scales tokens to unit length where its gain is neutral: 1, or 0 where 1 is added to it."""
    probe.load(probe.buffers)
    length = probe.input(layout, 1.0).shape[layout.channel_dim] ** 0.5
    for neutral in (1.0, 0.0):
        for name in gains:
            if name not in probe.buffers:
                probe.tensors[name].fill_(neutral)
        if _near(probe.line(layout, kind).slope * length, 1.0):
            return True
    return False


def _eps(probe: _Probe, layout: _Layout, kind: str) -> float | None:
    """What it adds to the variance (or to the deviation, or keeps that from falling below), by its small inputs.

    None if small inputs are not normalised by any of these rules.
    """
    line = probe.line(layout, kind)
    sizes, shares = [], []
    for scale in (1.0, 1e-2):
        x = probe.input(layout, scale)
        tokens = layout.tokens(x)
        normalised = _normalised(kind, tokens, layout.axes)
        full = normalised * line.slope
        actual = layout.tokens(probe.run(x)) - line.offset
        share = (actual * full).sum(-1) / full.square().sum(-1)
        if (actual - share[:, None] * full).abs().max() > TOLERANCE * 10 * full.abs().max():
            return None
        sizes.append(tokens.std(-1) / normalised.std(-1))
        shares.append(share)
    size, share = torch.cat(sizes), torch.cat(shares).clamp(min=1e-6)
    rules: list[tuple[Tensor, Callable[[Tensor], Tensor], float]] = [
        (size.square() * (share**-2 - 1), lambda eps: (size.square() / (size.square() + eps)).sqrt(), 1.0),
        (size * (1 / share - 1), lambda eps: size / (size + eps), 1.0),
        (
            torch.where(share < 1 - TOLERANCE, size / share, 0.0),
            lambda eps: (size / eps.clamp(min=1e-30)).clamp(max=1),
            1e-3,
        ),
    ]
    smallest = size < size.median()
    for each, predicted, largest in rules:
        eps = each[smallest].median().clamp(min=0)
        if eps <= largest and (predicted(eps) - share).abs().max() < TOLERANCE * 10:
            return float(eps)
    return None


def _is_elementwise(probe: _Probe, x: Tensor, y: Tensor) -> bool:
    """Whether an element of the input moves no other of the output, as with BatchNorm, whatever activation follows."""
    changed = x.clone()
    changed.view(-1)[0] += 1
    return not (probe.run(changed) - y).view(-1)[1:].any()


def _other(probe: _Probe, layout: _Layout, named: bool) -> Lookalike | None:
    """Why what is no norm over one axis of channels looks like one, if it does."""
    probe.draw(0)
    x = probe.input(layout, 1.0)
    try:
        y = probe.run(x)
        near = 10 * TOLERANCE * y.abs().max()
        invariant = all((probe.run(factor * x) - y).abs().max() < near for factor in (2.0, 1.37))
        if not (invariant and y.unique().numel() > MAX_LEVELS):
            return Lookalike(NEITHER) if named and not _is_elementwise(probe, x, y) else None
        changed = x.clone()
        first = (0,) * (x.ndim - layout.gain_ndim)
        changed.movedim(layout.channel_dim, -1)[first] += layout.tokens(x)[-1]
        moved = layout.tokens(probe.run(changed) - y).flatten(1).abs().amax(1) > near
    except _CannotRunError:
        return Lookalike(NEITHER) if named else None
    return Lookalike(MIXES if moved[1:].any() else NEITHER)
