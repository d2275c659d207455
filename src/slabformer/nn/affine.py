"""What is left of a norm once it is fused: an Affine, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slabformer.nn.device import Device
from slabformer.settings import ChannelDim, NonNegativeFloat, PositiveInt, checked


class Affine(nn.Module):
    """``x * weight + bias`` per channel: a norm in eval mode that could not be folded into a neighbour.

    Args:
        dim: Channels ``C``.
        channel_dim: Axis of the channels, -1 or 1.
        eps: Kept for code that reads it off a norm; not used.
        then: Run on the result: the activation inside the norm that it stands for, if there was one.

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same shape and dtype.
    """

    @checked
    def __init__(
        self,
        dim: PositiveInt,
        *,
        channel_dim: ChannelDim = -1,
        eps: NonNegativeFloat = 1e-5,
        then: nn.Module | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape, self.channel_dim, self.eps, self.then = (dim,), channel_dim, eps, then
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor, *, like: Tensor, channel_dim: int, eps: float) -> Affine:
        """An Affine with these values, ``(C,)`` each, on the device and in the dtype of ``like``."""
        affine = cls(scale.numel(), channel_dim=channel_dim, eps=eps, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            affine.weight.copy_(scale)
            affine.bias.copy_(shift)
        return affine

    def forward(self, x: Tensor) -> Tensor:
        """One multiply-add per element, in the parameters' dtype or the input's, whichever is wider."""
        shape = [-1] + [1] * (x.ndim - 2) if self.channel_dim == 1 else [-1]
        y = torch.addcmul(self.bias.view(shape), x, self.weight.view(shape)).to(x.dtype)
        return y if self.then is None else self.then(y)

    def extra_repr(self) -> str:
        """Channels and their axis."""
        return f"{self.normalized_shape[0]}, channel_dim={self.channel_dim}"


class Folded(nn.Module):
    """What a norm leaves behind when a neighbour has taken over its work: the identity, and ``then`` if given.

    Exposes ``weight``, ``bias``, ``eps`` and ``normalized_shape`` for code that reads them off a norm; none of them
    is saved.
    """

    if TYPE_CHECKING:  # TorchScript would read them
        weight: Tensor
        bias: Tensor

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        then: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.then = (dim,), eps, then
        self.register_buffer("weight", torch.ones(dim, device=device, dtype=dtype), persistent=False)
        self.register_buffer("bias", torch.zeros(dim, device=device, dtype=dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself, or its activation."""
        return x if self.then is None else self.then(x)
