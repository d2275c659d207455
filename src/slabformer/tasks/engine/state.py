"""What a checkpoint holds: everything that the rest of training depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from slabformer.tasks.engine.devices import gather
from slabformer.tasks.engine.parts import Position
from slabformer.tasks.engine.seeds import random_state, set_random_state
from slabformer.tasks.engine.training import Training

#: keys of a checkpoint
PARTS = {
    *("model", "optimizer", "lr_schedule", "gamma_schedule", "ema", "scaler", "position", "meter", "random", "best"),
    "fingerprint",
}
#: what optimizers keep for a parameter in its own shape; torch loads other shapes without a word
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")


def capture(training: Training) -> dict[str, Any]:
    """The state of training, as tensors and plain values; every rank must call it, rank 0's answer counts."""
    optional = {name: getattr(training, name) for name in ("lr_schedule", "gamma_schedule", "ema")}
    scaler = training.accelerator.scaler
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        **{name: part.state_dict() if part is not None else None for name, part in optional.items()},
        "scaler": scaler.state_dict() if scaler is not None else None,
        "position": asdict(training.position),
        "meter": training.meter.state_dict(training.accelerator),
        "random": gather(random_state()),
        "best": training.best,
        "fingerprint": training.fingerprint,
    }


def restore(training: Training, state: dict[str, Any]) -> None:
    """Put training where :func:`capture` found it.

    Raises:
        ValueError: If the state is of another model or optimizer; the model is unchanged then.
    """
    _check_fit(training, state)
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    for part, key in (
        (training.lr_schedule, "lr_schedule"),
        (training.gamma_schedule, "gamma_schedule"),
        (training.accelerator.scaler, "scaler"),
    ):
        if part is not None:
            part.load_state_dict(state[key])
    if training.ema is not None:
        training.ema.load_state_dict(state["ema"], training.model)
    training.position = Position(**state["position"])
    training.meter.load_state_dict(state["meter"], training.accelerator)
    training.best = state["best"]
    rank = training.accelerator.process_index
    if rank < len(state["random"]):
        set_random_state(state["random"][rank])


def _check_fit(training: Training, state: Mapping[str, Any]) -> None:
    """Refuse parts that are missing, or shapes that are not the model's."""
    missing = sorted(PARTS - state.keys())
    if missing:
        raise ValueError(
            f"the checkpoint holds no {missing[0]!r}; another version wrote it, start again with --overwrite"
        )
    own = {name: tuple(tensor.shape) for name, tensor in training.model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state["model"].items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"the checkpoint is of another model: {len(wrong)} tensors differ (first: {name}, "
            f"{given.get(name, 'missing')} in the checkpoint, {own.get(name, 'missing')} in the model)"
        )
    parameters = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    for index, moments in state["optimizer"]["state"].items():
        shape = parameters[index].shape if index < len(parameters) else None
        other = [key for key in MOMENTS if isinstance(moments.get(key), Tensor) and moments[key].shape != shape]
        if other:
            raise ValueError(
                f"the checkpoint's optimizer is of another model: {other[0]} of parameter {index} is "
                f"{tuple(moments[other[0]].shape)}, the parameter {tuple(shape) if shape is not None else 'missing'}"
            )
