"""What a checkpoint holds: everything that the rest of training depends on."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from slabformer.tasks.engine.devices import gather
from slabformer.tasks.engine.parts import Position
from slabformer.tasks.engine.seeds import random_state, set_random_state

if TYPE_CHECKING:
    from slabformer.tasks.engine.loop import Trainer


def capture(trainer: Trainer) -> dict[str, Any]:
    """The state of training, as tensors and plain values; every rank must call it, rank 0's answer counts."""
    optional = {name: getattr(trainer, name) for name in ("lr_schedule", "gamma_schedule", "ema")}
    scaler = trainer.accelerator.scaler
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        **{name: part.state_dict() if part is not None else None for name, part in optional.items()},
        "scaler": scaler.state_dict() if scaler is not None else None,
        "position": asdict(trainer.position),
        "meter": trainer.meter.state_dict(trainer.accelerator),
        "random": gather(random_state()),
        "best": trainer.best,
        "fingerprint": trainer.fingerprint,
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put training where :func:`capture` found it."""
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    for part, key in (
        (trainer.lr_schedule, "lr_schedule"),
        (trainer.gamma_schedule, "gamma_schedule"),
        (trainer.accelerator.scaler, "scaler"),
    ):
        if part is not None:
            part.load_state_dict(state[key])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(state["ema"], trainer.model)
    trainer.position = Position(**state["position"])
    trainer.meter.load_state_dict(state["meter"], trainer.accelerator)
    trainer.best = state["best"]
    rank = trainer.accelerator.process_index
    if rank < len(state["random"]):
        set_random_state(state["random"][rank])
