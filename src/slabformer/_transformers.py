"""Every private name of transformers that this package uses: hooks of its models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

CHECKED_WITH = ("5.14", "5.24")


class ModelHooks:
    """Base to put in front of a ``PreTrainedModel``: its private hooks under public names.

    Attributes:
        float32_modules: Parameters and buffers that stay in float32, whatever ``dtype`` a model is loaded in.
    """

    float32_modules: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._keep_in_fp32_modules_strict = list(cls.float32_modules)  # type: ignore[attr-defined]

    def initialize(self, module: nn.Module) -> None:
        """Give ``module`` its first values, after those of transformers; it may be any module of the model."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        self.initialize(module)
