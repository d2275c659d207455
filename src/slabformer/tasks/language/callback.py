"""Fading for anybody's transformers Trainer.

slabformer.convert_norms_(model)
trainer = Trainer(model, args, train_dataset=blocks, callbacks=[ProgressiveCallback()])
trainer.train()
deployed, report = slabformer.fuse(model.eval(), (), {"input_ids": tokens, "use_cache": False})
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from slabformer.models.llama import SlabLlamaPreTrainedModel, keep_padding_out
from slabformer.progressive import ProgressiveSchedule, Shape
from slabformer.tasks.language.foreign import note_norms_

logger = logging.getLogger(__name__)


class ProgressiveCallback(TrainerCallback, ExportableState):
    """Moves gamma once an optimizer step of transformers' ``Trainer``, from 1 to 0 over a fraction of its steps.

    The Trainer knows how many steps there are and, in a run that goes on from a checkpoint, how many are done: gamma
    follows from these two. Convert the model before the Trainer is built. Gamma stands in the printed logs and in
    ``trainer.state.log_history``. Tokens that a batch's ``attention_mask`` leaves out stay out of the statistics, in
    :func:`slabformer.recalibrate_` after training too. Folders that the Trainer writes say in ``config.json`` which
    norms were converted, for :func:`~slabformer.tasks.language.folders.load_model_folder` and ``slab lm fuse``.

    Args:
        warmup: Fraction of training with gamma 1 before fading starts.
        fade: Fraction of training over which gamma falls.
        shape: "linear" as published, or "cosine".
        warm_statistics: As :class:`slabformer.ProgressiveSchedule` has it.

    Raises:
        ValueError: Out of ``trainer.train()``, as :class:`slabformer.ProgressiveSchedule` does.
    """

    def __init__(
        self, warmup: float = 0.0, fade: float = 0.8, shape: Shape = "linear", warm_statistics: bool = True
    ) -> None:
        self.warmup, self.fade, self.shape, self.warm_statistics = warmup, fade, shape, warm_statistics
        self.schedule: ProgressiveSchedule | None = None

    def state(self) -> dict[str, Any]:
        """Settings, which the Trainer writes into a checkpoint's ``trainer_state.json``."""
        names = ("warmup", "fade", "shape", "warm_statistics")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}

    @property
    def gamma(self) -> float:
        """Share of the old norm in the step to come; 1 before training."""
        return 1.0 if self.schedule is None else self.schedule.gamma

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the schedule, at the step where training goes on."""
        assert model is not None
        self.schedule = ProgressiveSchedule(
            model,
            state.max_steps,
            warmup=self.warmup,
            fade=self.fade,
            shape=self.shape,
            warm_statistics=self.warm_statistics,
            optimizer=optimizer,
        )
        if isinstance(model, PreTrainedModel):
            note_norms_(model)
        ours = isinstance(model, SlabLlamaPreTrainedModel)  # which keeps it out by itself
        if not ours and keep_padding_out not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(keep_padding_out, with_kwargs=True)
        if state.global_step:
            self.schedule.load_state_dict({**self.schedule.state_dict(), "step": state.global_step})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on by one."""
        assert self.schedule is not None
        self.schedule.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add gamma to what is logged."""
        # the history holds a copy, made before callbacks are told
        for row in (logs, state.log_history[-1] if state.log_history else None):
            if row is not None:
                row.setdefault("gamma", self.gamma)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the old norm is still there, and how long it would have taken to be gone."""
        assert self.schedule is not None
        if not self.schedule.finished:
            logger.warning(
                "training ended with gamma %.3g: the old norm is still in use and the model cannot be fused; "
                "%d of %d steps are missing until it is gone",
                *(self.gamma, steps_missing(self.schedule), state.max_steps),
            )


def steps_missing(schedule: ProgressiveSchedule) -> int:
    """Optimizer steps until gamma is 0."""
    state = schedule.state_dict()
    return max(0, state["warmup_steps"] + state["fade_steps"] - state["step"])
