"""What a checkpoint holds: everything that the rest of training depends on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from slabformer.tasks.engine.devices import gather
from slabformer.tasks.engine.parts import Position
from slabformer.tasks.engine.seeds import random_state, set_random_state
from slabformer.tasks.engine.training import Training


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
    """Put training where :func:`capture` found it."""
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
