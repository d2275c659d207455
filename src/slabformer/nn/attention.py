"""Simplified linear attention as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer._torch import forward_hooks, forward_pre_hooks
from slabformer.nn.device import Device
from slabformer.nn.resample import Grid, resample_table, resize_tokens, resolve_grid
from slabformer.ops.depthwise import depthwise_tokens
from slabformer.ops.dispatch import has_kernel
from slabformer.ops.fused import fused_linear_attention
from slabformer.ops.linear_attention import composed_linear_attention, linear_attention, mask_tokens
from slabformer.ops.native.linear_attention import NO_BIASES, Biases
from slabformer.settings import Fraction, PositiveInt, checked


class LinearAttentionCore(nn.Module):
    """What every variant shares: the position table of the keys, the linear product, the depthwise branch.

    Subclasses set ``dwc`` last, so that state dicts keep the published order.

    Args:
        dim: Channels ``C`` of queries, keys and values.
        num_heads: Heads of ``D = C / num_heads`` channels.
        grid_size: Grid ``(H, W)`` of the keys that the position table is made for.

    Attributes:
        native: Whether inference on a CPU runs in C++ (:mod:`slabformer.ops.native`);
            :func:`slabformer.deploy` sets it.

    Raises:
        ValueError: If ``dim`` is no multiple of ``num_heads``.
    """

    if TYPE_CHECKING:  # TorchScript would read it
        dwc: nn.Conv2d
    native = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid_size: Grid,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse_uneven_heads(dim, num_heads)
        self.dim, self.num_heads, self.grid_size = dim, num_heads, (grid_size[0], grid_size[1])
        table = torch.zeros(1, grid_size[0] * grid_size[1], dim, device=device, dtype=dtype)
        self.positional_encoding = nn.Parameter(table)

    def heads(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens ``(B, N, C)`` as ``(B, num_heads, N, D)``, without a copy."""
        return tuple(self.split(t) for t in tokens)

    def split(self, x: Tensor) -> Tensor:
        """The same for one tensor."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_grid: Grid,
        mask: Tensor | None = None,
        kernels: tuple[Tensor, Tensor | None] | None = None,
        biases: Biases | None = None,
        native: bool = False,
    ) -> Tensor:
        """Linear attention of heads over keys on ``key_grid``, with the table added to them.

        Where :meth:`takes_kernel` says so, ``kernels`` of a depthwise convolution, weight ``(1 or num_heads, D, K,
        K)`` and bias, join it in one pass: the convolution of the values on the same grid is added. ``biases``,
        ``(num_heads, D)`` each, are what :meth:`project` left out. Without ``kernels``, ``native`` hands on what it
        said.
        """
        table = self.table(key_grid)
        if kernels is None:
            return linear_attention(q, k, v, table=table, mask=mask, native=native)
        weight, bias = kernels
        return fused_linear_attention(
            q, k, v, table=table, mask=mask, weight=weight, bias=bias, grid_size=key_grid, biases=biases or NO_BIASES
        )

    def project(self, x: Tensor, *layers: nn.Linear) -> tuple[list[Tensor], Biases | None]:
        """``x`` through each of ``layers``, and their biases, ``(num_heads, D)`` for q, k and v, where C++ adds those.

        A compiler would add them in a pass of its own, once for each of q, k and v. Whoever gets biases must hand them
        to :meth:`attend`, with kernels: that C++ runs is then decided.
        """
        if not (self.native and self._leaves_biases(x, layers)):
            return [layer(x) for layer in layers], None
        q, k, v = torch.cat([layer.bias for layer in layers]).view(3, self.num_heads, -1)
        return [F.linear(x, layer.weight) for layer in layers], (q, k, v)

    def _leaves_biases(self, x: Tensor, layers: Sequence[nn.Module]) -> bool:
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not all(map(_is_plain, layers)):
            return False
        (heads,) = self.heads(x)
        return self.takes_kernel(heads, heads, heads)

    def takes_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether these heads, or the tokens that they are made of, run on a kernel of our own, convolution included.

        The one for CPUs has no gradient: it runs where neither tokens nor any parameter needs one.
        """
        return has_kernel(q, k, v, self.native, self.parameters() if self.native else ())

    def placed(self, k: Tensor, key_grid: Grid) -> Tensor:
        """Keys with the position table added."""
        return k + self.table(key_grid).to(k.dtype)

    def table(self, key_grid: Grid) -> Tensor:
        """Position table ``(1, num_heads, M, D)``, resampled where the keys' grid is not its own."""
        table: Tensor = self.positional_encoding
        if key_grid != self.grid_size:
            table = resample_table(table, self.grid_size, key_grid)
        return self.split(table)

    def composed(
        self, q: Tensor, k: Tensor, v: Tensor, key_grid: Grid, grid: Grid | None, mask: Tensor | None = None
    ) -> Tensor:
        """Attention and depthwise branch of tokens ``(B, N, C)``, as TorchScript runs them: by torch's operators.

        ``grid`` is that of the queries; without it the depthwise branch is off.
        """
        values = mask_tokens(self.split(v), mask).contiguous()
        out = composed_linear_attention(self.split(q), self.split(k), values, self.table(key_grid), mask)
        if grid is not None:
            out = out + self.local(values, key_grid, grid)
        return out.transpose(1, 2).flatten(2)

    def shared_kernels(self) -> tuple[Tensor, Tensor | None]:
        """The depthwise branch's kernels as :meth:`attend` takes them, one set for all heads."""
        bias = self.dwc.bias
        return self.dwc.weight.transpose(0, 1), None if bias is None else bias[None]

    def local(self, v: Tensor, old: Grid, new: Grid) -> Tensor:
        """The depthwise branch: heads of values on the grid ``old``, through the kernels they share, on ``new``."""
        tokens = resize_tokens(v.flatten(0, 1), old, new)
        return depthwise_tokens(tokens, new, self.dwc.weight, self.dwc.bias).unflatten(0, v.shape[:2])

    @torch.no_grad()
    def set_grid_size(self, grid_size: Grid) -> None:
        """Resample the position table to a new grid for good."""
        table = resample_table(self.positional_encoding, self.grid_size, grid_size)
        self.positional_encoding = nn.Parameter(table, requires_grad=self.positional_encoding.requires_grad)
        self.grid_size = (grid_size[0], grid_size[1])

    def extra_repr(self) -> str:
        """Width, heads and the grid of the position table."""
        return f"{self.dim}, num_heads={self.num_heads}, grid_size={self.grid_size}"


class SimplifiedLinearAttention(LinearAttentionCore):
    """``proj(relu(q) (relu(k)^T v) / normaliser + DWC(v))`` with a learned position table on k (Guo et al. 2024).

    Takes the place of timm's ``Attention``: same first arguments, same forward. Any number of tokens goes: the table is
    resampled (bicubic) when the grid is not ``grid_size``, and the depthwise branch runs on the grid it finds.

    Args:
        dim: Channels ``C``.
        num_heads: Heads of ``C / num_heads`` channels.
        grid_size: Grid ``(H, W)`` that the position table is made for.
        qkv_bias: Whether queries, keys and values have a bias.
        proj_bias: Whether the output projection has one.
        kernel_size: Of the depthwise convolution, odd.
        attn_drop: Must be 0: there is no attention matrix to drop from.
        proj_drop: Dropout after the output projection.

    Shape:
        ``(B, N, C)`` to the same; with ``context`` ``(B, M, C)``, keys and values come from that.

    Raises:
        ValueError: If tokens form no grid, or an argument asks for what linear attention cannot do.
    """

    @checked
    def __init__(
        self,
        dim: PositiveInt,
        num_heads: PositiveInt = 8,
        *,
        grid_size: tuple[PositiveInt, PositiveInt] = (14, 14),
        qkv_bias: bool = True,
        proj_bias: bool = True,
        kernel_size: PositiveInt = 5,
        attn_drop: Fraction = 0.0,
        proj_drop: Fraction = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, grid_size=grid_size, **factory)
        refuse_attn_drop(attn_drop)
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = shared_depthwise(dim // num_heads, kernel_size, **factory)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid_size: Grid | None = None,
        context_grid_size: Grid | None = None,
    ) -> Tensor:
        """Attention over ``x``, or from ``x`` to ``context``.

        Args:
            x: Tokens ``(B, N, C)``.
            context: Tokens ``(B, M, C)`` that keys and values come from; ``x`` by default.
            attn_mask: Valid keys, boolean ``(B, M)`` or the same as ``(B, 1, 1, M)``.
            is_causal: Must be false.
            grid_size: Grid of ``x``; by default the table's, or a square. With a context of another length there is no
                default: without it the depthwise branch is off.
            context_grid_size: Grid of ``context``, found alike.
        """
        if is_causal:
            raise ValueError("SimplifiedLinearAttention is not causal; mask keys with a boolean (B, N) attn_mask")
        if torch.jit.is_scripting():
            return self.scripted(x, context, attn_mask, grid_size, context_grid_size)
        tokens, biases = self._project(x, context)
        q, k, v = self.heads(*tokens)
        key_grid = resolve_grid(k.shape[2], grid_size if context is None else context_grid_size, self.grid_size)
        grid = None
        if grid_size is not None or k.shape[2] == q.shape[2]:
            grid = resolve_grid(q.shape[2], grid_size, key_grid)
        mask = key_mask(attn_mask)
        fast = biases is not None or self.takes_kernel(q, k, v)
        if fast and grid == key_grid:
            out = self.attend(q, k, v, key_grid, mask, self.shared_kernels(), biases)
        else:
            v = mask_tokens(v, mask).contiguous()  # once for both branches
            out = self.attend(q, k, v, key_grid, mask, native=fast)
            out = out if grid is None else out + self.local(v, key_grid, grid)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def scripted(
        self,
        x: Tensor,
        context: Tensor | None = None,
        attn_mask: Tensor | None = None,
        grid_size: Grid | None = None,
        context_grid_size: Grid | None = None,
    ) -> Tensor:
        """The forward in what TorchScript knows."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        given = grid_size
        if context is not None:
            _, k, v = self.qkv(context).chunk(3, dim=-1)
            given = context_grid_size
        key_grid = resolve_grid(k.shape[1], given, self.grid_size)
        grid: Grid | None = None
        if grid_size is not None or k.shape[1] == q.shape[1]:
            grid = resolve_grid(q.shape[1], grid_size, key_grid)
        return self.proj_drop(self.proj(self.composed(q, k, v, key_grid, grid, key_mask(attn_mask))))

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Sequence[Tensor], Biases | None]:
        if context is None:
            (packed,), biases = self.project(x, self.qkv)
            return packed.chunk(3, dim=-1), biases
        weight, bias = self.qkv.weight.split([self.dim, 2 * self.dim]), (None, None)
        if self.qkv.bias is not None:
            bias = self.qkv.bias.split([self.dim, 2 * self.dim])
        keys_values = F.linear(context, weight[1], bias[1])
        return [F.linear(x, weight[0], bias[0]), *keys_values.chunk(2, dim=-1)], None


def _is_plain(layer: nn.Module) -> bool:
    """Whether a Linear does nothing but multiply and add: no subclass, no adapter, no hook, no forward of its own."""
    if type(layer) is not nn.Linear or layer.bias is None or "forward" in vars(layer):
        return False
    return not (forward_hooks(layer) or forward_pre_hooks(layer))


def shared_depthwise(head_dim: int, kernel_size: int, **factory: Any) -> nn.Conv2d:
    """The depthwise convolution whose ``head_dim`` kernels all heads share.

    Raises:
        ValueError: If ``kernel_size`` is even.
    """
    check_odd(kernel_size)
    return nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim, **factory)


def check_odd(kernel_size: int) -> None:
    """Kernels have a middle.

    Raises:
        ValueError: If ``kernel_size`` is even.
    """
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")


def key_mask(attn_mask: Tensor | None) -> Tensor | None:
    """Valid keys ``(B, M)`` from a mask of that shape or ``(B, 1, 1, M)``.

    Raises:
        ValueError: If the mask is not boolean or tells queries apart, which a linear product cannot.
    """
    if attn_mask is None:
        return None
    for_all_queries = attn_mask.ndim == 4 and attn_mask.shape[1] == 1 and attn_mask.shape[2] == 1
    mask = attn_mask[:, 0, 0] if for_all_queries else attn_mask
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(
            f"linear attention masks keys alone: attn_mask must be boolean (B, M) or (B, 1, 1, M), "
            f"got {attn_mask.dtype} {list(attn_mask.shape)}"
        )
    return mask


def refuse_uneven_heads(dim: int, num_heads: int) -> None:
    """Heads are of the same width."""
    if dim % num_heads:
        raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")


def refuse_attn_drop(attn_drop: float) -> None:
    """Dropout of attention weights would be a setting without effect."""
    if attn_drop:
        raise ValueError(f"linear attention has no matrix to drop from: attn_drop must be 0, got {attn_drop}")
