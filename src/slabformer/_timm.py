"""Every private name of timm that this package uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

from slabformer._private import private

CHECKED_WITH = ("1.0.31", "1.0.31")


def take_indices(num_stages: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """Which of ``num_stages`` are asked for, and the last of them; an integer asks for that many, from the end."""
    taken: tuple[list[int], int] = private("timm.models._features.feature_take_indices", CHECKED_WITH)(
        num_stages, indices
    )
    return taken


def is_feature_getter(module: nn.Module) -> TypeGuard[Any]:
    """Whether ``features_only=True`` wrapped a model that gives its features itself."""
    getter: Any = private("timm.models._features.FeatureGetterNet", CHECKED_WITH)
    return isinstance(module, getter)


class EmbedsPositions:
    """Base beside timm's ``VisionTransformer``: its private method under a public name."""

    def embed_positions(self, x: Tensor) -> Tensor:
        """Patches ``(B, H, W, C)`` with positions and class tokens, ``(B, N, C)``."""
        return self._pos_embed(x)

    if TYPE_CHECKING:  # TorchScript takes `# type:` behind a call for a comment of its own

        def _pos_embed(self, x: Tensor) -> Tensor: ...
