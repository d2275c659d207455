"""PRepBN: a LayerNorm that fades into RepBN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from slabformer._torch import assert_async, assume_constant_result, version_of
from slabformer.nn.affine import Affine
from slabformer.nn.device import Device
from slabformer.nn.float32 import KeepsFloat32
from slabformer.nn.repbn import RepBN
from slabformer.nn.sync import StatisticsSync
from slabformer.ops.rep_norm import keep_in_graph
from slabformer.settings import ChannelDim, Eta, Fraction, NonNegativeFloat, PositiveInt, checked

Phase = Literal["warm", "fading", "done"]

#: how far averaging and short dtypes may take gamma out of [0, 1]
_SLACK = 1e-2
_STALE = (
    "gamma of a PRepBN was changed in place while its training step is compiled for another phase; "
    "write it with set_gamma() or load_state_dict()"
)


class PRepBN(KeepsFloat32):
    """``gamma * LN(x) + (1 - gamma) * RepBN(x)`` (Guo et al. 2024, PRepBN): a LayerNorm on its way out.

    ``gamma`` is a buffer that :class:`slabformer.ProgressiveSchedule` writes after an optimizer step. It alone decides
    what training computes, whoever wrote it (an EMA, DistributedDataParallel, a checkpoint): the old norm alone at 1,
    RepBN alone at 0, both in between. Eval mode is RepBN whatever ``gamma`` is, as published;
    ``with slabformer.blended(model)`` evaluates the blend.

    On an accelerator ``gamma`` is read back only when its buffer has changed other than by :meth:`set_gamma`. Compiled
    code holds the branches of one phase and asserts on the device that ``gamma`` is still in it.

    Args:
        dim: Channels ``C``.
        eps: LayerNorm's, when ``norm`` is None.
        bn_eps: BatchNorm's.
        momentum: BatchNorm's.
        eta: Initial skip weight of RepBN, 0 or "published" (1) or any other.
        norm: The norm that fades, any module of the input's shape; ``nn.LayerNorm(dim, eps)`` by default.
        channel_dim: Axis of the channels: -1 for tokens, 1 for maps (then ``norm`` must take maps too).

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same shape and dtype.

    Raises:
        ValueError: As :class:`RepBN`; and if ``channel_dim`` is 1 and no ``norm`` is given.
    """

    if TYPE_CHECKING:  # TorchScript would read it
        gamma: Tensor
    float32_buffers = ("gamma",)  # steps of a long schedule are below the digits of bfloat16
    __jit_unused_properties__ = ("normalized_shape", "eps", "weight", "bias", "phase")

    @checked
    def __init__(
        self,
        dim: PositiveInt,
        *,
        eps: NonNegativeFloat = 1e-6,
        bn_eps: NonNegativeFloat = 1e-5,
        momentum: Fraction | None = 0.1,
        eta: Eta = 0.0,
        norm: nn.Module | None = None,
        channel_dim: ChannelDim = -1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm is None and channel_dim != -1:
            raise ValueError("PRepBN over maps needs the norm that fades; pass norm=, or use convert_norms_")
        self.norm = nn.LayerNorm(dim, eps, device=device, dtype=dtype) if norm is None else norm
        self.rep = RepBN(
            dim, eps=bn_eps, momentum=momentum, eta=eta, channel_dim=channel_dim, device=device, dtype=dtype
        )
        self.rep.kept_by_parent = True
        self.register_buffer("gamma", torch.ones((), dtype=torch.float32, device=device))
        self.blend_in_eval = False
        #: whether training notes how far RepBN is from the norm that fades, for :meth:`take_alignment`
        self.aligns = False
        self._alignment: Tensor | None = None
        #: phase when gamma was last written by `set_gamma` or read; compiled code is guarded by it
        self.known_phase: Phase = "warm"
        #: gamma of 1 begins the fading, which its value does not say
        self._begins = False
        #: the buffer that the phase was last read from, and its version then
        self._read_from: tuple[Tensor, int | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The branches that ``phase`` calls for; see the class."""
        if torch.jit.is_scripting():
            if self.training or self.blend_in_eval:
                raise RuntimeError("norms in TorchScript are for inference; call eval() on the scripted model")
            return self.rep(x)
        if not (self.training or self.blend_in_eval):
            return self.rep(x)
        phase = self.phase
        if phase != "fading" and torch.compiler.is_compiling():
            assert_async(self.gamma == (1 if phase == "warm" else 0), _STALE)
        if phase == "done":
            return keep_in_graph(self.rep(x), *self.norm.parameters())
        if self.aligns and self.training:
            return self._forward_aligned(x)
        if phase == "warm":
            if self.rep.training and self.rep.observes_while_warm:  # in eval beside a norm that trains, it is frozen
                self.rep.observe(x)
            return keep_in_graph(self.norm(x).to(x.dtype), *self.rep.parameters())
        gamma = self.gamma.to(x.dtype, copy=True)  # autograd keeps it, and the schedule or DDP may write in between
        return torch.addcmul(self.rep(x, 1 - self.gamma), self.norm(x).to(x.dtype), gamma)

    def _forward_aligned(self, x: Tensor) -> Tensor:
        """Both branches at their full size, so that they can be compared."""
        rep, norm = self.rep(x), self.norm(x).to(x.dtype)
        wanted, actual = norm.detach().float(), rep.float()
        mask = self.rep.mask_of(x.movedim(self.rep.channel_dim, -1))
        if mask is not None:
            counts = mask.unsqueeze(-1).movedim(-1, self.rep.channel_dim)
            wanted, actual = torch.where(counts, wanted, 0), torch.where(counts, actual, 0)
        distance = (actual - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)
        self._alignment = distance if self._alignment is None else self._alignment + distance
        return torch.lerp(rep, norm, self.gamma.to(x.dtype, copy=True))

    def take_alignment(self) -> Tensor | None:
        """Squared distance of RepBN from the norm that fades, over the norm's square, since it was last taken.

        Of all calls in train mode while ``aligns`` is set, each over its valid tokens; None without any.
        """
        alignment, self._alignment = self._alignment, None
        return alignment

    @property
    def phase(self) -> Phase:
        """What training computes at this ``gamma``: "warm" the old norm alone, "fading" both, "done" RepBN alone.

        Raises:
            ValueError: If ``gamma`` is no share, as after ``to_empty()`` without loading.
        """
        if torch.compiler.is_compiling():
            self._follow_gamma_at_compile_time()
        else:
            self._follow_gamma()
        return self.known_phase

    def set_gamma(self, gamma: float, phase: Phase | None = None) -> None:
        """Write ``gamma`` in place; the phase follows from it unless given (``gamma`` is 1 at the start of fading too).

        Raises:
            ValueError: If ``gamma`` is not in [0, 1], or ``phase`` is unknown or contradicts it.
        """
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        if phase is not None and phase not in get_args(Phase):
            raise ValueError(f"phase must be one of {get_args(Phase)}, got {phase!r}")
        phase = phase or phase_of(gamma)
        if phase != phase_of(gamma) and (gamma, phase) != (1, "fading"):
            raise ValueError(f"phase {phase!r} does not go with gamma {gamma}, which means {phase_of(gamma)!r}")
        self.keep_float32()
        self.gamma.fill_(gamma)
        self._note(phase, begins=gamma == 1 and phase == "fading")

    def reset_parameters(self) -> None:
        """``gamma`` of 1, after ``to_empty()`` as FSDP does it; the norm and RepBN reset themselves."""
        self.set_gamma(1)

    def copy_gamma_(self, source: PRepBN) -> None:
        """Take ``gamma`` of ``source``, in place; nothing is read back from a device."""
        self.gamma.copy_(source.gamma)
        self._note(source.known_phase, source._begins)
        if not source._is_read():
            self._read_from = None

    def train(self, mode: bool = True) -> PRepBN:
        """As on every module; ``gamma`` is read anew, since writes through ``.data`` leave its version alone."""
        if mode and not self.training:
            self._read_from = None
        return super().train(mode)

    def _note(self, phase: Phase, begins: bool) -> None:
        self.known_phase, self._begins = phase, begins
        self._read_from = (self.gamma, version_of(self.gamma))

    def _is_read(self) -> bool:
        """Whether the known phase is that of the buffer as it is now, as far as can be told without its value."""
        if self._read_from is None:
            return False
        buffer, version = self._read_from
        return buffer is self.gamma and version is not None and version == version_of(buffer)

    def _follow_gamma(self) -> None:
        """Bring the known phase up to the buffer, where that has a value."""
        gamma = self.gamma
        if not _reads_freely(gamma) and self._is_read():
            return
        value = _value(gamma)
        if value is None:
            return
        if not -_SLACK <= value <= 1 + _SLACK:
            raise ValueError(f"gamma of a PRepBN must be in [0, 1], got {value:.3g}; load the weights, or set_gamma(1)")
        phase = self._phase_at(value)
        if phase != self.known_phase or not _reads_freely(gamma):  # an attribute takes longer to write than to read
            self._note(phase, self._begins and value == 1)

    def _phase_at(self, gamma: float) -> Phase:
        return "fading" if self._begins and gamma == 1 else phase_of(gamma)

    @assume_constant_result
    def _follow_gamma_at_compile_time(self) -> None:
        self._follow_gamma()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        gamma = _value(self.gamma)
        if gamma is not None:
            self.known_phase, self._begins, self._read_from = phase_of(gamma), False, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read_from": None, "_alignment": None}  # a copy has a buffer of its own

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As nn.Module's, but RepBN stays where ``SyncBatchNorm.convert_sync_batchnorm`` would replace it.

        Its ranks share their statistics from then on, as after :func:`slabformer.sync_norms_`.

        Raises:
            TypeError: If anything else is to replace it.
        """
        if name != "rep" or isinstance(module, RepBN):
            super().add_module(name, module)
        elif isinstance(module, nn.SyncBatchNorm):
            self.rep.sync = StatisticsSync(module.process_group)
        else:
            raise TypeError(f"rep of a PRepBN must stay a RepBN, got {type(module).__name__}, which would lose eta")

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        """``(C,)``, as on a LayerNorm."""
        return self.rep.normalized_shape

    @property
    def eps(self) -> float:
        """The fading norm's, for code that reads it off a norm."""
        return getattr(self.norm, "eps", self.rep.eps)

    @property
    def weight(self) -> Tensor:
        """RepBN's gain, for code that reads a norm's device or dtype."""
        return self.rep.weight

    @property
    def bias(self) -> Tensor:
        """RepBN's offset."""
        return self.rep.bias

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The map of eval mode, ``x * scale + shift``, float64 ``(C,)`` each."""
        return self.rep.scale_shift()

    def fuse(self) -> Affine:
        """The deployed map as an :class:`Affine`.

        Raises:
            ValueError: While ``gamma`` is above 0, when dropping the norm would change what was trained.
        """
        if float(self.gamma) != 0:
            raise ValueError(
                f"PRepBN still holds its norm (gamma is {float(self.gamma):.3g}); finish the schedule, or set_gamma(0)"
            )
        return self.rep.fuse()

    def extra_repr(self) -> str:
        """The share of the norm that fades."""
        if self.gamma.is_meta:
            return f"phase={self.known_phase}"
        gamma = float(self.gamma)
        return f"gamma={gamma:.3g}, phase={self._phase_at(gamma)}"


def phase_of(gamma: float) -> Phase:
    """Phase that a value of ``gamma`` alone implies."""
    return "done" if gamma == 0 else "warm" if gamma == 1 else "fading"


def _reads_freely(buffer: Tensor) -> bool:
    """Whether reading a value waits for nothing, so that no write can escape, whichever way it comes."""
    return buffer.is_cpu


def _value(buffer: Tensor) -> float | None:
    """The value of a scalar, or None where it has none (meta and fake tensors)."""
    if buffer.is_cpu:
        try:
            return float(buffer.numpy())  # costs less than an operator's call
        except (RuntimeError, TypeError):  # no NumPy, or bfloat16, which it does not know
            pass
    try:
        return float(buffer)
    except RuntimeError:
        return None
