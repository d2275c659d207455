"""PRepBN: a LayerNorm that fades into RepBN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from slabformer.nn.affine import Affine
from slabformer.nn.repbn import RepBN
from slabformer.nn.sync import StatisticsSync
from slabformer.ops.rep_norm import keep_in_graph

Phase = Literal["warm", "fading", "done"]


class PRepBN(nn.Module):
    """``gamma * LN(x) + (1 - gamma) * RepBN(x)`` (Guo et al. 2024, PRepBN): a LayerNorm on its way out.

    ``gamma`` is a buffer that :class:`slabformer.ProgressiveSchedule` writes after an optimizer step. Branches follow
    the Python attribute ``phase``, arithmetic follows the buffer: "warm" computes the old norm alone, "fading" both,
    "done" RepBN alone. Eval mode is RepBN whatever ``gamma`` is, as published; ``with slabformer.blended(model)``
    evaluates the blend.

    Args:
        dim: Channels ``C``.
        eps: LayerNorm's, when ``norm`` is None.
        bn_eps: BatchNorm's.
        momentum: BatchNorm's.
        eta: Initial skip weight of RepBN.
        norm: The norm that fades, any module of the input's shape; ``nn.LayerNorm(dim, eps)`` by default.
        channel_dim: Axis of the channels: -1 for tokens, 1 for maps (then ``norm`` must take maps too).

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same shape and dtype.

    Raises:
        ValueError: As :class:`RepBN`; and if ``channel_dim`` is 1 and no ``norm`` is given.
    """

    if TYPE_CHECKING:  # TorchScript would read it
        gamma: Tensor
    __jit_unused_properties__ = ("normalized_shape", "eps", "weight", "bias", "phase")

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        bn_eps: float = 1e-5,
        momentum: float | None = 0.1,
        eta: float = 1.0,
        norm: nn.Module | None = None,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
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
        self.phase: Phase = "warm"
        self.blend_in_eval = False

    def forward(self, x: Tensor) -> Tensor:
        """The branches that ``phase`` calls for; see the class."""
        if torch.jit.is_scripting():
            if self.training or self.blend_in_eval:
                raise RuntimeError("norms in TorchScript are for inference; call eval() on the scripted model")
            return self.rep(x)
        if not (self.training or self.blend_in_eval):
            return self.rep(x)
        if self.phase == "done":
            return keep_in_graph(self.rep(x), *self.norm.parameters())
        if self.phase == "warm":
            if self.rep.training and self.rep.observes_while_warm:  # in eval beside a norm that trains, it is frozen
                self.rep.observe(x)
            return keep_in_graph(self.norm(x).to(x.dtype), *self.rep.parameters())
        gamma = self.gamma.to(x.dtype, copy=True)  # autograd keeps it, and the schedule or DDP may write in between
        return torch.addcmul(self.rep(x, 1 - self.gamma), self.norm(x).to(x.dtype), gamma)

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
        self.gamma.fill_(gamma)
        self.phase = phase

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.gamma.is_meta:
            self.phase = phase_of(float(self.gamma))

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
        if self.phase != "done":
            raise ValueError(
                f"PRepBN still holds its norm (gamma is {float(self.gamma):.3g}); finish the schedule, or set_gamma(0)"
            )
        return self.rep.fuse()

    def extra_repr(self) -> str:
        """The share of the norm that fades."""
        return f"gamma={float(self.gamma):.3g}, phase={self.phase}" if not self.gamma.is_meta else f"phase={self.phase}"


def phase_of(gamma: float) -> Phase:
    """Phase that a value of ``gamma`` alone implies."""
    return "done" if gamma == 0 else "warm" if gamma == 1 else "fading"
