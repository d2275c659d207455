"""Parts of hierarchical families: attention plans, drop path, pre-norm blocks and stages on maps ``(B, H, W, C)``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath, Mlp
from timm.models import checkpoint, register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.norms import NormLayer
from slabformer.nn.resample import Grid, resample_table

register_notrace_function(resample_table)

#: attention plans are one of these letters a stage
ATTENTION = {"S": "softmax attention", "L": "simplified linear attention"}


def check_attention(attention: str, num_stages: int) -> str:
    """An attention plan such as "LLSS", one letter a stage.

    Raises:
        ValueError: If its length or a letter is wrong.
    """
    if len(attention) != num_stages:
        raise ValueError(f"attention needs one letter for each of {num_stages} stages, got {attention!r}")
    for letter in attention:
        if letter not in ATTENTION:
            known = ", ".join(f"{key} ({what})" for key, what in ATTENTION.items())
            raise ValueError(f"unknown letter {letter!r} in attention {attention!r}; a stage is one of {known}")
    return attention


def check_heads(dims: Sequence[int], num_heads: Sequence[int]) -> None:
    """Refuse heads that do not share a stage's channels evenly.

    Raises:
        ValueError: With the first stage of which that is true.
    """
    for stage, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
        if dim % heads:
            raise ValueError(f"num_heads[{stage}] must divide the {dim} channels of its stage, got {heads}")


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of each block of each stage, rising linearly from 0 to ``rate``."""
    rates = torch.linspace(0, rate, sum(depths), device="cpu").tolist()  # models may be built on meta
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return [rates[end - depth : end] for end, depth in zip(ends, depths, strict=True)]


def grid_sizes(img_size: Grid, strides: Sequence[int], pad_to: int) -> list[Grid]:
    """Grid of each stage for images padded to a multiple of ``pad_to``."""
    height, width = (side + -side % pad_to for side in img_size)
    return [(height // stride, width // stride) for stride in strides]


class ConvEmbed(nn.Module):
    """Strided convolution, then norm: images ``(B, in_chans, H, W)`` to maps ``(B, H', W', C)``.

    Args:
        in_chans: Channels of the input.
        dim: Channels ``C`` of the maps.
        kernel_size: Of the convolution; above ``stride``, patches overlap.
        stride: Pixels from patch to patch.
        padding: Zeros around the input.
        norm_layer: Constructor of the norm.
    """

    def __init__(
        self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int, norm_layer: NormLayer
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding)
        self.norm = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images to maps."""
        # of all maps the image is the cheapest to reorder, and the convolution keeps the order
        return self.embed(x.contiguous(memory_format=torch.channels_last))

    def embed(self, x: Tensor) -> Tensor:
        """Channels-last ``(B, C, H, W)`` to maps."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvMerge(ConvEmbed):
    """:class:`ConvEmbed` between stages: from maps ``(B, H, W, in_chans)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps to fewer, wider ones."""
        return self.embed(x.permute(0, 3, 1, 2))


class Block(nn.Module):
    """Pre-norm block on maps: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``.

    Args:
        dim: Channels ``C``.
        attn: Attention ``(tokens (B, N, C), grid_size=(H, W)) -> (B, N, C)``.
        norm_layer: Constructor of the norms.
        mlp_ratio: Hidden channels of the MLP, as a multiple of ``dim``.
        drop_path: Stochastic depth rate.
        proj_drop: Dropout inside the MLP.
        mlp_layer: Constructor of the MLP, called as timm's ``Mlp``.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        norm_layer: NormLayer,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        mlp_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = mlp_layer(dim, hidden_features=int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same."""
        grid = (x.shape[1], x.shape[2])
        attended = self.attn(self.norm1(x).flatten(1, 2), grid_size=grid).unflatten(1, grid)
        x = x + self.drop_path1(attended)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@register_notrace_function  # reason: sizes are proxies
def pad_images(x: Tensor, multiple: int) -> Tensor:
    """Images ``(B, in_chans, H, W)`` with zeros to the right and at the bottom, to a multiple on either axis."""
    height, width = x.shape[2], x.shape[3]
    if not torch.jit.is_scripting():
        # as plain numbers: a compiled graph then holds one size, where symbolic maps and windows compile for minutes
        height, width = operator.index(height), operator.index(width)
    bottom, right = -height % multiple, -width % multiple
    return F.pad(x, (0, right, 0, bottom)) if bottom > 0 or right > 0 else x


class Stage(nn.Module):
    """Downsampling, then blocks: ``(B, H, W, C)`` to ``(B, H', W', C')``.

    Args:
        blocks: Modules on maps.
        downsample: Module from the former stage's maps to this one's.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps through the stage."""
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The same, for subclasses that go on: TorchScript knows no ``super``."""
        x = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting() and torch.is_grad_enabled():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x

    def embed(self, x: Tensor) -> Tensor:
        """What comes before the blocks."""
        return self.downsample(x)

    def set_grid_size(self, grid_size: Grid) -> None:
        """Resample every table of the stage to maps of another size for good."""
        for block in self.blocks:
            resample = getattr(block.attn, "set_grid_size", None)
            if resample is not None:
                resample(grid_size)


class PVTStage(Stage):
    """A stage whose tokens get a position table of their own.

    Args:
        dim: Channels ``C`` of its maps.
        grid_size: Grid ``(H, W)`` that the table is made for.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, dim: int, grid_size: Grid) -> None:
        super().__init__(blocks, downsample)
        self.grid_size = grid_size
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, x: Tensor) -> Tensor:
        """Downsampling, then positions."""
        x = self.downsample(x)
        grid = (x.shape[1], x.shape[2])
        return x + resample_table(self.pos_embed, self.grid_size, grid).unflatten(1, grid)

    @torch.no_grad()
    def set_grid_size(self, grid_size: Grid) -> None:
        """Resample every table of the stage to maps of another size for good."""
        super().set_grid_size(grid_size)
        table = resample_table(self.pos_embed, self.grid_size, grid_size)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.grid_size = grid_size
