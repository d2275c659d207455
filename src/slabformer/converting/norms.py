"""The part of a conversion that says which norms go: all of them, those of a plan, or those that fit a budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slabformer.converting.config import ConvertConfig
from slabformer.surgery.conversion_plan import ConversionPlan, names_to_take
from slabformer.surgery.convert import find_layer_norms
from slabformer.surgery.sensitivity import norm_costs
from slabformer.tasks.engine.documents import read_json

logger = logging.getLogger(__name__)

#: which norms a run converts, in its folder
NORMS = "norms.json"


def plan_norms(model: nn.Module, held_out: Sequence[Any], config: ConvertConfig) -> ConversionPlan | None:
    """Which norms ``config`` lets go; None for all of them.

    Raises:
        OSError: If the file of the plan cannot be read.
        ValueError: If it is no plan or names norms that the model does not have, or no norm fits the budget.
    """
    if config.plan is not None:
        given, known = _read(Path(config.plan)), find_layer_norms(model)[0]
        return ConversionPlan.of_names(names_to_take(given, known), known, given.cost, given.budget)
    if config.budget is None:
        return None
    _, plan = norm_costs(model, held_out, num_batches=len(held_out), budget=config.budget)
    logger.info("%s", plan.summary())
    return plan


def plan_again(folder: Path, config: ConvertConfig) -> ConversionPlan | None:
    """The plan of a run that goes on, as it noted it when it began.

    Raises:
        ValueError: If the folder does not say which.
    """
    if config.plan is None and config.budget is None:
        return None
    try:
        return _read(folder / NORMS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / NORMS} does not say which norms the run converts ({error}); start again with --overwrite true"
        ) from error


def _read(path: Path) -> ConversionPlan:
    try:
        return ConversionPlan.from_dict(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
