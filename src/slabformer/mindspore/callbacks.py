"""What training with ``mindspore.train.Model`` calls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from slabformer.mindspore.cells import set_gamma
from slabformer.mindspore.runtime import require
from slabformer.settings import Fraction, PositiveInt, check_fractions, checked

if TYPE_CHECKING:
    from mindspore.train import Callback
else:
    Callback = require().train.Callback


class ProgressiveCallback(Callback):
    """Writes gamma into every PRepBN before each step (Guo et al. 2024, eq. 4), in graph mode without compiling anew.

    Gamma is 1 for the first ``warmup`` of training, then falls over ``fade`` of it, and is 0 from there on.

    Args:
        total_steps: Optimizer steps of the whole training.
        warmup: Fraction of training before gamma falls.
        fade: Fraction of training over which it falls.
        shape: "linear" as published, or "cosine".

    Raises:
        ValueError: If a setting is out of range, or LayerNorm would not be gone when training ends; when training
            begins, if the model has no PRepBN, or data is sunk to the device, where nothing runs between two steps.
    """

    @checked
    def __init__(
        self,
        total_steps: PositiveInt,
        warmup: Fraction = 0.0,
        fade: Fraction = 0.2,
        shape: Literal["linear", "cosine"] = "linear",
    ) -> None:
        super().__init__()
        check_fractions(warmup, fade)
        self.shape = shape
        self.warmup_steps = min(round(warmup * total_steps), total_steps - 1)
        self.fade_steps = min(max(1, round(fade * total_steps)), total_steps - self.warmup_steps)

    def gamma_at(self, step: int) -> float:
        """Share of LayerNorm in optimizer step ``step``, counted from 0."""
        done = min(max((step - self.warmup_steps) / self.fade_steps, 0.0), 1.0)
        return 1.0 - done if self.shape == "linear" else 0.5 + 0.5 * math.cos(math.pi * done) if done < 1 else 0.0

    def on_train_begin(self, run_context: Any) -> None:
        """Refuse what would leave gamma at 1."""
        given = run_context.original_args()
        if given.get("dataset_sink_mode"):
            raise ValueError("gamma cannot be written between steps of sunk data; train with dataset_sink_mode=False")
        if not set_gamma(given.train_network, self.gamma_at(given.cur_step_num)):
            raise ValueError("the model has no PRepBN to fade")

    def on_train_step_begin(self, run_context: Any) -> None:
        """Write gamma; MindSpore counts steps from 1."""
        given = run_context.original_args()
        set_gamma(given.train_network, self.gamma_at(given.cur_step_num - 1))

    def on_train_end(self, run_context: Any) -> None:
        """Write the gamma of the step to come: 0 when all steps are done."""
        given = run_context.original_args()
        set_gamma(given.train_network, self.gamma_at(given.cur_step_num))
