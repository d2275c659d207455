"""Maps at four strides from the one map of a plain transformer, so that it can stand under a feature pyramid."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.norms import NormLayer

#: pixels to a token of the maps that a feature pyramid takes
STRIDES = (4, 8, 16, 32)


class Upsample(nn.Module):
    """Every token becomes four of half the channels: normed, projected, unfolded, then GELU.

    As expressive as the deconvolution of 2x2 pixels with stride 2 in ViTDet, but with the norm in front of its product
    instead of behind it, where :func:`slabformer.fuse` can fold it.

    Args:
        dim: Channels ``C``.
        norm_layer: Constructor of the norm.

    Shape:
        ``(B, H, W, C)`` to ``(B, 2 * H, 2 * W, C / 2)``.
    """

    def __init__(self, dim: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm = norm_layer(dim)
        self.proj = nn.Linear(dim, 4 * (dim // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps of twice the side."""
        squares = self.proj(self.norm(x)).unflatten(-1, (2, 2, -1))  # (B, H, W, 2, 2, C / 2)
        return F.gelu(squares.transpose(2, 3).flatten(3, 4).flatten(1, 2))


class TokenPyramid(nn.Module):
    """The simple feature pyramid of ViTDet (Li et al. 2022): every level from the last map alone.

    Args:
        dim: Channels ``C`` of the map.
        stride: Pixels to one of its tokens: 4, 8, 16 or 32.
        norm_layer: Constructor of the norms.

    Attributes:
        num_channels: Of the levels: halved with every doubling of the side.

    Shape:
        ``(B, H, W, C)`` to maps of strides 4, 8, 16 and 32.

    Raises:
        ValueError: If ``stride`` is none of those.
    """

    def __init__(self, dim: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        if stride not in STRIDES:
            raise ValueError(f"a pyramid of strides {STRIDES} needs a map of one of them, got a stride of {stride}")
        doublings = [max(0, (stride // level).bit_length() - 1) for level in STRIDES]
        self.pools = [max(1, level // stride) for level in STRIDES]
        self.num_channels = [dim // 2**count for count in doublings]
        self.levels = nn.ModuleList(
            nn.Sequential(*(Upsample(dim // 2**i, norm_layer) for i in range(count))) for count in doublings
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """One map to four."""
        return [level(_pooled(x, pool)) for level, pool in zip(self.levels, self.pools, strict=True)]


def _pooled(x: Tensor, size: int) -> Tensor:
    return x if size == 1 else F.max_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
