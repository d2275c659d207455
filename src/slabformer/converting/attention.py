"""The part of a conversion that makes attention linear: which ones, near their teacher, the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

import slabformer as sf
from slabformer._files import write_json
from slabformer.converting.config import ConvertConfig
from slabformer.distillation import Teacher
from slabformer.settings import NonEmptyStr, NonNegativeFloat, NonNegativeInt, check_fields, from_mapping
from slabformer.tasks.engine.documents import read_json
from slabformer.tasks.engine.order import OrderedLoader

logger = logging.getLogger(__name__)

ATTENTION = "attention.json"
#: a tenth of the distillation's steps, but no fewer, by default
FEWEST_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class LinearAttentions:
    """What a run notes of the attentions that it made linear."""

    names: list[NonEmptyStr]
    """Of the modules."""
    errors: dict[str, NonNegativeFloat]
    """Of each after its alignment: squared error of its output over the variance of the teacher's."""
    num_kept: NonNegativeInt
    """Softmax attentions that stay, of those that could be converted."""

    def __post_init__(self) -> None:
        check_fields(self)

    def summary(self) -> dict[str, Any]:
        """For ``result.json``."""
        return {
            "attentions_linear": len(self.names),
            "attentions_kept": self.num_kept,
            "attention_errors": self.errors,
        }

    def write(self, folder: Path) -> None:
        """Into the folder of the run."""
        write_json(folder / ATTENTION, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> LinearAttentions:
        """What :meth:`write` wrote.

        Raises:
            ValueError: If it is missing or damaged.
        """
        try:
            return cls(**from_mapping(cls, read_json(folder / ATTENTION)))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder / ATTENTION} does not say which attentions the run made linear ({error}); "
                "start again with --overwrite true"
            ) from error


def make_linear_(
    model: nn.Module, teacher: Teacher, loader: OrderedLoader, held_out: Sequence[Any], config: ConvertConfig
) -> LinearAttentions:
    """Convert the attentions that ``config`` asks for, in place, and align them.

    Raises:
        ValueError: If no attention can be converted, or none within the budget.
    """
    plan = None
    if config.attention == "plan":
        plan = sf.audit_attention(model, held_out, budget=config.attention_budget).plan
        logger.info("%s", plan.summary())
    names = sf.convert_attention_(model, plan=plan)
    steps = max(FEWEST_STEPS, config.steps // 10) if config.align_steps is None else config.align_steps
    errors = sf.align_attention_(model, teacher.model, loader, steps=steps)
    if dist.is_available() and dist.is_initialized():  # every rank has aligned on data of its own
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
    return LinearAttentions(names=list(names), errors=errors, num_kept=0 if plan is None else len(plan.keep))


def linear_again_(model: nn.Module, folder: Path) -> LinearAttentions:
    """Convert the attentions that a run has made linear before it was stopped; their weights are in its checkpoint.

    Raises:
        ValueError: If the folder does not say which.
    """
    found = LinearAttentions.read(folder)
    sf.convert_attention_(model, plan=found.names)
    return found
