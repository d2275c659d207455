"""Dynamic Tanh: what stands in a norm's place without computing statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slabformer.nn.device import Device
from slabformer.settings import ChannelDim, PositiveFloat, PositiveInt, checked


class DyT(nn.Module):
    """``weight * tanh(alpha * x) + bias`` (Zhu et al. 2025, arXiv 2503.10622, Dynamic Tanh).

    It needs no statistics, but it is not linear either: :func:`slabformer.fuse` leaves it.

    Args:
        dim: Channels ``C``.
        alpha: Initial ``alpha``, one scalar for all channels; 0.5 in the paper's vision models.
        channel_dim: Axis of the channels: -1 for tokens, 1 for maps.

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same shape and dtype.
    """

    @checked
    def __init__(
        self,
        dim: PositiveInt,
        *,
        alpha: PositiveFloat = 0.5,
        channel_dim: ChannelDim = -1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape, self.channel_dim, self.initial_alpha = (dim,), channel_dim, float(alpha)
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As a new module has them."""
        nn.init.constant_(self.alpha, self.initial_alpha)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise; the parameters' dtype or the input's counts, whichever is wider."""
        shape = [-1] + [1] * (x.ndim - 2) if self.channel_dim == 1 else [-1]
        y = torch.addcmul(self.bias.view(shape), torch.tanh(self.alpha * x), self.weight.view(shape))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Channels and settings."""
        return f"{self.normalized_shape[0]}, alpha={self.initial_alpha}, channel_dim={self.channel_dim}"
