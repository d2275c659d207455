"""Every private name of transformers that this package uses: hooks of its models and its Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

CHECKED_WITH = ("5.18", "5.24")


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


class TrainerHooks:
    """Base to put in front of a ``Trainer``: its private hooks under public names."""

    def restore(self, checkpoint: Path) -> None:
        """Load the model and the state of the generators from ``checkpoint``."""
        self._load_from_checkpoint(str(checkpoint))  # type: ignore[attr-defined]
        self._load_rng_state(str(checkpoint))  # type: ignore[attr-defined]

    def on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """``inputs`` where the model is."""
        prepared: dict[str, Any] = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        return prepared

    def save_checkpoint(self, write: Callable[[], None]) -> None:
        """Save a checkpoint, which ``write`` does into :meth:`checkpoint_parent`."""
        write()

    def checkpoint_parent(self) -> Path | None:
        """The folder that a checkpoint's own folder is made in; None for the output folder."""
        return None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.save_checkpoint(functools.partial(super()._save_checkpoint, model, trial))  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        parent = self.checkpoint_parent()
        return super()._get_output_dir(trial) if parent is None else str(parent)  # type: ignore[misc,no-any-return]
