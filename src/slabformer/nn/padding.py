"""Maps padded to a multiple of something, in a way that a folded norm survives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PadTokens(nn.Module):
    """Pad a map on the right and at the bottom: with zeros, or once a norm in front is folded with what became of them.

    A norm ``x * scale + shift`` that :func:`slabformer.fuse` folds into what follows no longer stands between the map
    and its padding, so a zero would be shifted too. Padding with ``-shift / scale`` instead is exact at every size.

    Args:
        dim: Channels ``C``.
        device: Of the fill.
        dtype: The same.

    Attributes:
        value: Fill ``(C,)``; None for zeros, and then not in the state dict.

    Shape:
        ``(B, H, W, C)`` to ``(B, H + pad_h, W + pad_w, C)``.

    Raises:
        ValueError: If the input is no map of ``dim`` channels.
    """

    if TYPE_CHECKING:  # TorchScript would read them
        value: Tensor | None
        _place: Tensor

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("value", None)
        self.register_buffer("_place", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def forward(self, x: Tensor, pad_h: int, pad_w: int) -> Tensor:
        """``x`` with ``pad_h`` more rows and ``pad_w`` more columns; ``x`` itself where both are 0."""
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"PadTokens takes maps (B, H, W, {self.dim}), got {list(x.shape)}")
        if pad_h == 0 and pad_w == 0:
            return x
        if self.value is None:
            return F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        B, H, W, C = x.shape
        value = self.value.to(x.dtype)
        x = torch.cat([x, value.expand(B, H, pad_w, C)], 2)
        return torch.cat([x, value.expand(B, pad_h, W + pad_w, C)], 1)

    def pad_with(self, value: Tensor) -> None:
        """Pad with ``value`` ``(C,)`` from now on, kept in the module's dtype and on its device."""
        self.value = value.to(self._place)

    def extra_repr(self) -> str:
        """Channels, and what they are padded with."""
        return f"{self.dim}, fill={'0' if self.value is None else 'value'}"
