"""The same model as engines like it in floating point: blocks on channels-last maps, their Linears as convolutions.

form = map_form(fused)
"""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from slabformer.export.gathered_windows import GatheredWindowMaps
from slabformer.export.heads_first import HeadsFirstAttention, takes_heads_first
from slabformer.export.maps import MapAttention, OnLastAxis, TokenAttention, pointwise, to_maps, to_tokens
from slabformer.export.token_form import Forms, rewritten, token_block
from slabformer.models.deit import SlabBlock
from slabformer.models.pvt_v2 import MapMlp
from slabformer.models.stages import Block
from slabformer.nn.affine import Folded
from slabformer.nn.attention import SimplifiedLinearAttention
from slabformer.nn.attention_variants import PyramidLinearAttention
from slabformer.nn.resample import Grid, resolve_grid
from slabformer.nn.shifted_windows import ShiftedWindowAttention


class MapBlock(nn.Module):
    """A pre-norm block whose maps are channels-last images inside.

    A residual is then added as a convolution writes; OpenVINO and onnxruntime add it to a Linear's output in a pass
    over memory of its own. What permutes between blocks cancels out.

    Args:
        block: In eval mode, where drop path does nothing; its parts are taken over, Linears copied.

    Shape:
        ``(B, H, W, C)`` to the same.
    """

    def __init__(self, block: Block | SlabBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(block.norm1), _norm(block.norm2)
        self.attn = block.attn if isinstance(block.attn, MapAttention) else TokenAttention(block.attn)
        self.mlp = _mlp(block.mlp)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``."""
        return self.on_maps(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def on_maps(self, x: Tensor) -> Tensor:
        """The same on ``(B, C, H, W)``."""
        x = x + self.attn.on_maps(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenMapBlock(MapBlock):
    """A DeiT's block, see :class:`MapBlock`.

    Shape:
        ``(B, N, C)`` to the same.
    """

    def __init__(self, block: SlabBlock) -> None:
        super().__init__(block)
        grid: Any = block.attn.grid_size
        self.grid_size: Grid = grid

    # a DeiT's blocks take tokens
    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid_size: Grid | None = None
    ) -> Tensor:
        """``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``; ``grid_size`` by default the table's, or a square.

        Raises:
            ValueError: If there is a mask, or tokens form no grid.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("a block written for an engine takes no mask; write the model without one")
        return to_tokens(self.on_maps(to_maps(x, resolve_grid(x.shape[1], grid_size, self.grid_size))))


def map_form(model: nn.Module, normed: bool = False) -> nn.Module:
    """A copy of ``model``, in eval mode, that computes the same; blocks of other libraries stay as they are.

    Args:
        model: In eval mode.
        normed: Whether blocks that still hold norms go too, else on tokens: onnxruntime gains by it, OpenVINO loses.
    """
    return rewritten(model, FORMS, {Block: MapBlock if normed else _bare_block, SlabBlock: _token_map_block})


def _bare_block(block: Block) -> nn.Module | None:
    return MapBlock(block) if _is_gone(block.norm1) and _is_gone(block.norm2) else token_block(block)


def _is_gone(norm: nn.Module) -> bool:
    return isinstance(norm, nn.Identity) or (isinstance(norm, Folded) and norm.then is None)


def _norm(norm: nn.Module) -> nn.Module:
    return nn.Identity() if _is_gone(norm) else OnLastAxis(norm)


def _mlp(mlp: nn.Module) -> nn.Module:
    """An MLP on the last axis as one on maps; without dropout."""
    if type(mlp) is MapMlp:
        return nn.Sequential(pointwise(mlp.fc1), mlp.relu, mlp.dwconv, mlp.act, pointwise(mlp.fc2))
    if type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity):
        return nn.Sequential(pointwise(mlp.fc1), mlp.act, pointwise(mlp.fc2))
    return OnLastAxis(mlp)


def _heads_first(attention: SimplifiedLinearAttention | PyramidLinearAttention) -> nn.Module | None:
    return HeadsFirstAttention(attention) if takes_heads_first(attention) else None


def _token_map_block(block: SlabBlock) -> nn.Module | None:
    """None for blocks that scale their branches."""
    scales = (block.ls1, block.ls2)
    linear = isinstance(block.attn, HeadsFirstAttention)
    return TokenMapBlock(block) if linear and all(isinstance(scale, nn.Identity) for scale in scales) else None


FORMS: Forms = {
    SimplifiedLinearAttention: _heads_first,
    PyramidLinearAttention: _heads_first,
    ShiftedWindowAttention: GatheredWindowMaps,
}
