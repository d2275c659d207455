"""Tokens as channels-last maps, and Linears as the 1x1 convolutions that engines fuse more into."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from slabformer.nn.resample import Grid


def to_maps(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens ``(B, N, C)`` as maps ``(B, C, H, W)``, channels last in memory, without a copy."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(maps: Tensor) -> Tensor:
    """Maps ``(B, C, H, W)`` as tokens ``(B, N, C)``."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


class OnLastAxis(nn.Module):
    """A module that takes channels as the last axis, ``(B, H, W, C)``, on maps ``(B, C, H, W)``.

    Args:
        inner: Taken over.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, maps: Tensor) -> Tensor:
        """The module's output as maps."""
        return self.inner(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def pointwise(layer: nn.Module) -> nn.Module:
    """A layer on the last axis as one on maps: a Linear is a 1x1 convolution with its weights, others are wrapped.

    Engines add a residual in the pass in which a convolution writes, and not always in that of a matrix product.
    """
    if type(layer) is not nn.Linear:
        return OnLastAxis(layer)
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None).to(layer.weight)
    maps = {"weight": layer.weight.detach()[:, :, None, None]}
    conv.load_state_dict(maps if layer.bias is None else maps | {"bias": layer.bias.detach()})
    return conv


class MapAttention(nn.Module, ABC):
    """Attention that reads and writes maps."""

    @abstractmethod
    def on_maps(self, maps: Tensor) -> Tensor:
        """Attention over all tokens of maps ``(B, C, H, W)``, to the same."""


class TokenAttention(MapAttention):
    """Attention on tokens, behind maps.

    Args:
        attention: ``(tokens (B, N, C), grid_size=(H, W)) -> (B, N, C)``; taken over.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def on_maps(self, maps: Tensor) -> Tensor:
        """See :meth:`MapAttention.on_maps`."""
        grid = (maps.shape[2], maps.shape[3])
        return to_maps(self.attention(to_tokens(maps), grid_size=grid), grid)
