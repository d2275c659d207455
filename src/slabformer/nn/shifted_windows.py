"""Attention inside windows that are shifted from block to block, as Swin has it, softmax and linear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.attention import SimplifiedLinearAttention, refuse_uneven_heads
from slabformer.nn.padding import PadTokens
from slabformer.nn.resample import Grid, resample_table, window_merge, window_partition

#: added to the logits of tokens that only a shift has brought into one window, as published
APART = -100.0


class Windows(NamedTuple):
    """How a map is cut: padded right and bottom to whole windows, then rolled, then cut.

    Attributes:
        grid: Map ``(H, W)``.
        window: Of ``(h, w)`` tokens.
        shift: Rows and columns that the padded map is rolled up and left by.
    """

    grid: Grid
    window: Grid
    shift: Grid

    @classmethod
    def fitted(cls, grid: Grid, window: Grid, shift: Grid) -> Windows:
        """Windows no larger than the map, and no shift along an axis that one window spans."""
        return cls(grid, *fitted_windows(grid, window, shift))

    @property
    def padded(self) -> Grid:
        """The map in whole windows."""
        return whole_windows(self.grid, self.window)

    def cut(self, x: Tensor, pad: PadTokens) -> Tensor:
        """Tokens ``(B, N, C)`` to windows ``(B * num_windows, h * w, C)``, row by row."""
        (H, W), (rows, columns) = self.grid, self.padded
        return cut_windows(pad(x.unflatten(1, self.grid), rows - H, columns - W), self.window, self.shift)

    def join(self, heads: Tensor) -> Tensor:
        """Back from :meth:`cut`, heads too: ``(*, num_heads, h * w, D)`` to ``(B, N, num_heads * D)``.

        The first two axes are images and windows, ``(B, num_windows)`` or ``(B * num_windows, 1)``.
        """
        (h, w), (rows, columns) = self.window, self.padded
        num_heads, D = heads.shape[2], heads.shape[4]
        grid = (rows // h, columns // w)
        x = heads.squeeze(1).unflatten(0, (-1, *grid)) if heads.shape[1] == 1 else heads.unflatten(1, grid)
        x = x.unflatten(-2, self.window).permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows / h, h, columns / w, w, num_heads, D)
        # strides of an attention's output differ between kernels: a view of it would not survive an export
        x = x.clone(memory_format=torch.contiguous_format).view(-1, rows, columns, num_heads * D)
        return uncut(x, self.grid, self.shift)

    def mask(self, device: torch.device | None = None) -> Tensor | None:
        """What keeps tokens apart that come from opposite borders: 0 or -100, ``(num_windows, N, N)``; None unshifted.

        Tokens of the padding are no different from others, as published.
        """
        return window_mask(self.padded, self.window, self.shift, device) if any(self.shift) else None


def fitted_windows(grid: Grid, window: Grid, shift: Grid) -> tuple[Grid, Grid]:
    """Window and shift of :meth:`Windows.fitted`."""
    (H, W), (h, w) = grid, window
    return (min(h, H), min(w, W)), (shift[0] if h < H else 0, shift[1] if w < W else 0)


def whole_windows(grid: Grid, window: Grid) -> Grid:
    """``grid`` padded to whole windows."""
    (H, W), (h, w) = grid, window
    return H + -H % h, W + -W % w


def cut_windows(maps: Tensor, window: Grid, shift: Grid) -> Tensor:
    """Padded maps ``(B, H, W, C)``, rolled, to windows ``(B * num_windows, h * w, C)``."""
    grid = (maps.shape[1], maps.shape[2])
    if shift[0] > 0 or shift[1] > 0:
        maps = maps.roll((-shift[0], -shift[1]), (1, 2))
    return window_partition(maps.flatten(1, 2), grid, window)


def uncut(maps: Tensor, grid: Grid, shift: Grid) -> Tensor:
    """Padded, rolled maps ``(B, rows, columns, C)`` to tokens ``(B, N, C)`` in their places on ``grid``."""
    if shift[0] > 0 or shift[1] > 0:
        maps = maps.roll(shift, (1, 2))
    return maps[:, : grid[0], : grid[1]].flatten(1, 2)


def window_mask(padded: Grid, window: Grid, shift: Grid, device: torch.device | None) -> Tensor:
    """:meth:`Windows.mask` of windows that are shifted."""
    below = torch.arange(padded[0], device=device) >= padded[0] - shift[0]
    beside = torch.arange(padded[1], device=device) >= padded[1] - shift[1]
    regions = (2 * below[:, None] + beside[None].long()).view(1, -1, 1)
    regions = window_partition(regions, padded, window)  # (num_windows, N, 1)
    return torch.where(regions == regions.mT, 0.0, -100.0)  # APART, which TorchScript does not see


def relative_position_index(window: Grid, table_window: Grid, device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each pair of tokens in a window: ``(N, N)``, query before key.

    Args:
        window: ``(h, w)``, on either axis at most that of the table.
        table_window: The window whose ``(2 h - 1) * (2 w - 1)`` offsets are the table's rows.
        device: Of the result.
    """
    tokens = torch.arange(window[0] * window[1], device=device)
    rows, columns = tokens // window[1], tokens % window[1]
    down, right = rows[:, None] - rows[None], columns[:, None] - columns[None]
    H, W = table_window
    return (down + H - 1) * (2 * W - 1) + right + W - 1


def resample_bias_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Relative position bias table ``(num_offsets, num_heads)`` of one window, bicubic for another."""
    offsets = ((2 * window[0] - 1, 2 * window[1] - 1) for window in (old, new))
    return resample_table(table[None], *offsets)[0]


class ShiftedWindowAttention(nn.Module):
    """Softmax attention inside shifted windows with a relative position bias (Liu et al. 2021, Swin).

    The map is padded, then rolled, then cut, as published (timm's Swin rolls before it pads). Index and mask follow
    from the map: those of ``grid_size`` are kept, those of other maps are made on the spot.

    Args:
        dim: Channels ``C``.
        num_heads: Heads of ``C / num_heads`` channels.
        window_size: Window ``(h, w)``.
        shift: Rows and columns that the map is rolled by.
        grid_size: Map ``(H, W)`` that index and mask are kept for.
        fixed: Pad smaller maps to a window and shift even where one window holds the map, as published for detection;
            by default windows shrink to such a map.
        qkv_bias: Whether queries, keys and values have a bias.
        attn_drop: Dropout of attention weights.
        proj_drop: Dropout after the output projection.

    Shape:
        ``(B, N, C)`` to the same.

    Raises:
        ValueError: If ``dim`` is no multiple of ``num_heads``.
    """

    if TYPE_CHECKING:  # TorchScript would read them
        index: Tensor
        mask: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Grid = (7, 7),
        shift: Grid = (0, 0),
        *,
        grid_size: Grid,
        fixed: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        refuse_uneven_heads(dim, num_heads)
        self.dim, self.num_heads, self.window_size, self.shift = dim, num_heads, window_size, shift
        self.fixed, self.attn_drop = fixed, attn_drop
        table = torch.empty((2 * window_size[0] - 1) * (2 * window_size[1] - 1), num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.pad = PadTokens(dim)
        self.set_grid_size(grid_size)

    def forward(self, x: Tensor, grid_size: Grid | None = None) -> Tensor:
        """Attention over tokens ``(B, N, C)`` on ``grid_size``; by default the one that tables are kept for."""
        if torch.jit.is_scripting():
            return self.scripted(x, self.grid_size if grid_size is None else grid_size)
        windows = self.windows if grid_size is None else self._windows(grid_size)
        q, k, v = self.qkv(windows.cut(x, self.pad)).chunk(3, -1)
        out = windows.join(self.attend(q, k, v, windows))
        # on tokens in their places: the residual is added as the projection writes
        return self.proj_drop(self.proj(out))

    def scripted(self, x: Tensor, grid: Grid) -> Tensor:
        """The forward in what TorchScript knows, which keeps neither index nor mask."""
        window, shift = self.window_size, self.shift
        if not self.fixed:
            window, shift = fitted_windows(grid, window, shift)
        padded = whole_windows(grid, window)
        maps = self.pad(x.unflatten(1, grid), padded[0] - grid[0], padded[1] - grid[1])
        q, k, v = self.qkv(cut_windows(maps, window, shift)).chunk(3, -1)
        index = relative_position_index(window, self.window_size, x.device)
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)[None]
        if shift[0] > 0 or shift[1] > 0:
            bias = bias + window_mask(padded, window, shift, x.device)[:, None]
        q, k, v = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        q, k, v = [t.unflatten(0, (-1, len(bias))).flatten(1, 2) for t in (q, k, v)]
        drop = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None].to(q.dtype), dropout_p=drop)
        out = out.unflatten(1, (len(bias), -1)).flatten(0, 1).transpose(1, 2).flatten(2)
        out = uncut(window_merge(out, padded, window).unflatten(1, padded), grid, shift)
        return self.proj_drop(self.proj(out))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
        """Three ``(B * num_windows, N, C)`` to heads ``(B, num_windows, num_heads, N, D)``.

        Without a mask, images and windows share the first axis: ``(B * num_windows, 1, num_heads, N, D)``.
        """
        bias = self._bias(windows)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        # heads of the windows that a mask tells apart share an axis, so that one bias serves every image
        q, k, v = (t.unflatten(0, (-1, len(bias))).flatten(1, 2) for t in (q, k, v))
        drop = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None].to(q.dtype), dropout_p=drop)
        return out.unflatten(1, (len(bias), -1))

    def set_grid_size(self, grid_size: Grid) -> None:
        """Keep index and mask of maps of another size; the bias table holds for every size."""
        self.grid_size = grid_size
        self.windows, device = self._windows(grid_size), self.relative_position_bias_table.device
        index = relative_position_index(self.windows.window, self.window_size, device)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("mask", self.windows.mask(device), persistent=False)

    def extra_repr(self) -> str:
        """Width, heads, window and shift."""
        return f"{self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}"

    def _windows(self, grid_size: Grid) -> Windows:
        cut = Windows if self.fixed else Windows.fitted
        return cut(grid_size, self.window_size, self.shift)

    def _bias(self, windows: Windows) -> Tensor:
        """Position bias and mask in one, ``(num_windows or 1, num_heads, N, N)``."""
        index, mask = self.index, self.mask
        if windows != self.windows:
            index = relative_position_index(windows.window, self.window_size, self.index.device)
            mask = windows.mask(self.index.device)
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)
        return bias[None] if mask is None else bias + mask[:, None]


class ShiftedWindowLinearAttention(SimplifiedLinearAttention):
    """Linear attention inside shifted windows, as published for detection.

    Windows are constants, so the position table never needs resampling: larger maps are cut into more windows, smaller
    ones padded. A linear product knows no mask: a shifted window mixes opposite borders of the map, and tokens of the
    padding count like others.

    Args:
        dim: Channels ``C``.
        num_heads: Heads of ``C / num_heads`` channels.
        window_size: Window ``(h, w)``.
        shift: Rows and columns that the map is rolled by.
        kwargs: As for :class:`SimplifiedLinearAttention`.

    Shape:
        ``(B, N, C)`` to the same.
    """

    def __init__(self, dim: int, num_heads: int, window_size: Grid, shift: Grid = (0, 0), **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size=window_size, **kwargs)
        self.shift = shift
        self.pad = PadTokens(dim)

    # its own tokens alone
    def forward(self, x: Tensor, grid_size: Grid) -> Tensor:  # type: ignore[override]
        """Attention over tokens ``(B, N, C)`` on ``grid_size``."""
        if torch.jit.is_scripting():
            padded = whole_windows(grid_size, self.grid_size)
            maps = self.pad(x.unflatten(1, grid_size), padded[0] - grid_size[0], padded[1] - grid_size[1])
            out = self.scripted(cut_windows(maps, self.grid_size, self.shift), grid_size=self.grid_size)
            return uncut(window_merge(out, padded, self.grid_size).unflatten(1, padded), grid_size, self.shift)
        windows = Windows(grid_size, self.grid_size, self.shift)
        out = super().forward(windows.cut(x, self.pad), grid_size=self.grid_size)
        return windows.join(out[:, None, None])

    def set_grid_size(self, grid_size: Grid) -> None:
        """Nothing to do: windows and their table are constants."""
