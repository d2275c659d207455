"""Fading for anybody's transformers Trainer.

slabformer.convert_norms_(model)
trainer = Trainer(model, args, train_dataset=blocks, callbacks=[ProgressiveCallback()])
trainer.train()
deployed, report = slabformer.fuse(model.eval(), (), {"input_ids": tokens, "use_cache": False})
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from slabformer._torch import child_slots
from slabformer.models.llama import SlabLlamaPreTrainedModel
from slabformer.nn.attention_masks import keep_padding_out_everywhere_
from slabformer.nn.controls import norm_parameters, prepbn_modules
from slabformer.progressive import Guard, ProgressiveSchedule, Shape
from slabformer.tasks.language.foreign import note_norms_

logger = logging.getLogger(__name__)


class ProgressiveCallback(TrainerCallback, ExportableState):
    """Moves gamma once an optimizer step of transformers' ``Trainer``, from 1 to 0 over a fraction of its steps.

    The Trainer knows how many steps there are and, in a run that goes on from a checkpoint, how many are done: gamma
    follows from these two. Convert the model before the Trainer is built. Importing this module keeps the norms' gain,
    offset and ``eta`` out of what a Trainer's own optimizer decays, whatever the norms are called. Gamma stands in the
    printed logs and in ``trainer.state.log_history``. Tokens that a batch's ``attention_mask`` leaves out stay out of
    the statistics, in :func:`slabformer.recalibrate_` after training too; the parts of a model that take data of their
    own (encoder and decoder, text and image) each follow their own mask. Folders that the Trainer writes say in
    ``config.json`` which norms were converted, for :func:`~slabformer.tasks.language.folders.load_model_folder` and
    ``slab lm fuse``.

    On a model that has begun to fade, gamma goes on from where it stands, see :class:`slabformer.ProgressiveSchedule`.
    With ``load_best_model_at_end`` the best model is chosen among those evaluated at gamma 0, since the others still
    hold their norms. PEFT must save the norms with its adapters:
    ``LoraConfig(..., modules_to_save=slabformer.convert_norms_(model))``.

    Args:
        warmup: Fraction of training with gamma 1 before fading starts.
        fade: Fraction of training over which gamma falls: long for language models from random weights; 0.05 suits
            trained models after :func:`slabformer.fit_norms_`.
        shape: "linear" as published, or "cosine".
        warm_statistics: As :class:`slabformer.ProgressiveSchedule` has it.
        stagger: Share of the fade over which the norms begin one after the other.
        align: Weight of the distance between RepBN and the norm that it replaces; added to the ``loss`` that the model
            returns.
        guard: Times its running median above which an activation lets gamma wait; None never waits.

    Raises:
        ValueError: Out of ``trainer.train()``, as :class:`slabformer.ProgressiveSchedule` does, or if PEFT would save
            adapters without the norms.
    """

    def __init__(
        self,
        warmup: float = 0.0,
        fade: float = 0.8,
        shape: Shape = "linear",
        warm_statistics: bool = True,
        stagger: float = 0.0,
        align: float = 0.0,
        guard: float | None = 10.0,
    ) -> None:
        self.warmup, self.fade, self.shape, self.warm_statistics = warmup, fade, shape, warm_statistics
        self.stagger, self.align, self.guard = stagger, align, guard
        self.schedule: ProgressiveSchedule | None = None
        self._aligning: RemovableHandle | None = None
        self._ended: list[Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """Settings and the schedule's state, which the Trainer writes into a checkpoint's ``trainer_state.json``."""
        names = ("warmup", "fade", "shape", "warm_statistics", "stagger", "align", "guard")
        schedule = {} if self.schedule is None else {"schedule_state": self.schedule.state_dict()}
        return {"args": {name: getattr(self, name) for name in names}, "attributes": schedule}

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
        _check_adapters(model)
        _warn_of_decay(model, optimizer)
        self.schedule = ProgressiveSchedule(
            model,
            state.max_steps,
            warmup=self.warmup,
            fade=self.fade,
            shape=self.shape,
            warm_statistics=self.warm_statistics,
            stagger=self.stagger,
            align=self.align,
            guard=None if self.guard is None else Guard(limit=self.guard),
            optimizer=optimizer,
            start=state.global_step,
        )
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__)
        schedule_state = saved["attributes"].get("schedule_state") if isinstance(saved, dict) else None
        if schedule_state is not None and schedule_state["steps_done"] == state.global_step:
            self.schedule.load_state_dict(schedule_state)
        if self.align:
            self._aligning = model.register_forward_hook(self._add_alignment)
        self._forget_best(state)
        # a run that goes on from its last step: the Trainer takes one more before it looks
        self._ended = [each.clone() for each in _tensors(model)] if state.global_step >= state.max_steps else None
        if isinstance(model, PreTrainedModel):
            note_norms_(model)
        if not isinstance(model, SlabLlamaPreTrainedModel):  # which keeps it out by itself
            keep_padding_out_everywhere_(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let no model with gamma above 0 be the best."""
        self._forget_best(state)

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Move on by one; take back a step beyond the last."""
        assert self.schedule is not None
        assert model is not None
        if self._ended is not None:
            for each, before in zip(_tensors(model), self._ended, strict=True):
                each.copy_(before)
            state.global_step -= 1
            control.should_log = control.should_evaluate = control.should_save = False
            control.should_training_stop = True
            return
        self.schedule.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add gamma to what is logged; the last log comes just before the best model is loaded."""
        self._forget_best(state)
        # the history holds a copy, made before callbacks are told
        for row in (logs, state.log_history[-1] if state.log_history else None):
            if row is not None:
                row.setdefault("gamma", self.gamma)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Warn if the old norm is still there, and how long it would have taken to be gone."""
        assert self.schedule is not None
        if self._aligning is not None:
            self._aligning.remove()
            self._aligning = None
        if not self.schedule.finished:
            logger.warning(
                "training ended with gamma %.3g: the old norm is still in use and the model cannot be fused; "
                "%d of %d steps are missing until it is gone",
                *(self.gamma, steps_missing(self.schedule), state.max_steps),
            )
        if args.load_best_model_at_end and state.best_model_checkpoint is None:
            logger.warning(
                "no checkpoint was evaluated at gamma 0, so that none could be the best: the model is the last one; "
                "lower fade, or evaluate and save more often"
            )
        held = max((float(norm.gamma) for norm in prepbn_modules(model or nn.Module()).values()), default=0.0)
        if self.schedule.finished and held:
            logger.warning(
                "training ended with gamma 0, but the model was given back gamma %.3g: weights of an earlier step were "
                "loaded into it; load those of a step at gamma 0",
                held,
            )

    def _add_alignment(self, model: nn.Module, args: Any, output: Any) -> Any:
        assert self.schedule is not None
        if model.training and isinstance(output, dict) and output.get("loss") is not None:
            output["loss"] = output["loss"] + self.schedule.alignment()
        return output

    def _forget_best(self, state: TrainerState) -> None:
        if self.gamma:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _check_adapters(model: nn.Module) -> None:
    """Refuse adapters of PEFT that would be saved without gamma, statistics and parameters of the norms."""
    if not getattr(model, "peft_config", None):
        return
    unsaved = [name for name in prepbn_modules(model) if ".modules_to_save." not in name]
    if unsaved:
        raise ValueError(
            f"PEFT would save its adapters without {len(unsaved)} norms (first: {unsaved[0]}); "
            "pass modules_to_save=slabformer.convert_norms_(model) to its configuration"
        )
    saved = [name for name, module in model.named_modules() if "modules_to_save" in child_slots(module)]
    torn = [name for name in saved if any(name.startswith(f"{outer}.") for outer in saved)]
    if torn:
        raise ValueError(
            f"PEFT's modules_to_save also reaches into {torn[0]}, since it matches the ends of names; "
            "write 'model.norm' where it says 'norm'"
        )


def steps_missing(schedule: ProgressiveSchedule) -> int:
    """Optimizer steps until gamma is 0."""
    state = schedule.state_dict()
    return max(0, math.ceil(state["warmup_steps"] + state["fade_steps"] - state["step"]))


def _warn_of_decay(model: nn.Module, optimizer: Optimizer | None) -> None:
    groups = optimizer.param_groups if optimizer is not None else []
    decayed = {id(p) for group in groups if group.get("weight_decay") for p in group["params"]}
    names = [name for name, parameter in norm_parameters(model).items() if id(parameter) in decayed]
    if names:
        logger.warning(
            "the optimizer decays %d parameters of the norms (first: %s), which pulls gain and eta to 0; leave out of "
            "its decaying groups what slabformer.norm_parameters(model) names",
            *(len(names), names[0]),
        )


def _spare_norms_from_decay(trainer_class: type[Trainer]) -> None:
    """Have ``trainer_class`` leave our norms out of the parameters that decay.

    It recognises ``nn.LayerNorm`` and names with "norm", and takes no registration of others.
    """
    decaying = trainer_class.get_decay_parameter_names

    @functools.wraps(decaying)
    def get_decay_parameter_names(self: Trainer, model: nn.Module) -> list[str]:
        spared = norm_parameters(model)
        return [name for name in decaying(self, model) if name not in spared]

    trainer_class.get_decay_parameter_names = get_decay_parameter_names  # type: ignore[method-assign]


_spare_norms_from_decay(Trainer)
