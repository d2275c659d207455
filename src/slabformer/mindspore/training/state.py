"""The parts of a training, and its state as tensors and plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slabformer.mindspore.files import is_constant, load, state_of, to_mindspore
from slabformer.mindspore.training.step import TrainStep
from slabformer.nn.controls import prepbn_modules
from slabformer.progressive import ProgressiveSchedule
from slabformer.tasks.engine.parts import Position

State = dict[str, Tensor]


@dataclass(kw_only=True, eq=False)
class Parts:
    """What is trained, and what says how."""

    cell: Any
    """The model in MindSpore."""
    step: TrainStep
    """Trains it."""
    model: nn.Module
    """The same in torch: where it came from, and what it is saved as."""
    optimizer: Optimizer
    """Torch's, of that model: its groups hold the rates. It moves nothing."""
    lr_schedule: Any
    """Writes them."""
    gamma_schedule: ProgressiveSchedule | None
    """Of the torch model's norms, whose gamma the cells are given; None if none fades."""
    fingerprint: dict[str, Any]
    """Plain values; a checkpoint with others is not gone on from."""
    position: Position = field(default_factory=Position)
    """Steps and batches done."""
    best: float = float("-inf")
    """Highest top-1 so far of an epoch with gamma 0."""
    loss_sum: float = 0.0
    """Of the losses of the epoch's steps so far."""

    @property
    def gamma(self) -> float:
        """Share of LayerNorm in the step to come; 0 where nothing fades."""
        return 0.0 if self.gamma_schedule is None else self.gamma_schedule.gamma

    @property
    def rate(self) -> float:
        """Learning rate of the step to come."""
        return float(self.optimizer.param_groups[-1]["lr"])


def capture(parts: Parts) -> dict[str, Any]:
    """Everything that the rest of training depends on."""
    optimizer, average = parts.step.optimizer, parts.step.average
    return {
        "model": state_of(parts.cell),
        "optimizer": {
            "exp_avg": _by_name(optimizer.weights, optimizer.exp_avg),
            "exp_avg_sq": _by_name(optimizer.weights, optimizer.exp_avg_sq),
            "steps_done": _tensor(optimizer.steps_done),
            "loss_scale": _tensor(parts.step.loss_scale),
        },
        "ema": None if average is None else _by_name(average.stored, average.average),
        "gamma_schedule": None if parts.gamma_schedule is None else parts.gamma_schedule.state_dict(),
        "position": asdict(parts.position),
        "best": parts.best,
        "loss_sum": parts.loss_sum,
        "fingerprint": parts.fingerprint,
    }


def restore(parts: Parts, state: Mapping[str, Any]) -> None:
    """Put training where :func:`capture` found it.

    Raises:
        ValueError: If the state is of another model.
    """
    load(parts.cell, state["model"])
    parts.model.load_state_dict(state["model"])
    optimizer, average = parts.step.optimizer, parts.step.average
    _write(optimizer.weights, optimizer.exp_avg, state["optimizer"]["exp_avg"])
    _write(optimizer.weights, optimizer.exp_avg_sq, state["optimizer"]["exp_avg_sq"])
    optimizer.steps_done.set_data(to_mindspore(state["optimizer"]["steps_done"]))
    parts.step.loss_scale.set_data(to_mindspore(state["optimizer"]["loss_scale"]))
    if average is not None:
        _write(average.stored, average.average, state["ema"])
    if parts.gamma_schedule is not None:
        parts.gamma_schedule.load_state_dict(state["gamma_schedule"])
    parts.position = Position(**state["position"])
    parts.best, parts.loss_sum = state["best"], state["loss_sum"]
    if parts.position.step:
        parts.lr_schedule.step_update(parts.position.step)


def averaged_state(parts: Parts) -> State:
    """The model's state with the averages of its tensors; gamma and counters are the model's."""
    average = parts.step.average
    assert average is not None
    return state_of(parts.cell) | _by_name(average.stored, average.average)


@contextmanager
def holding(cell: Any, state: Mapping[str, Tensor]) -> Iterator[None]:
    """In this block the cell has these tensors."""
    own = state_of(cell)
    load(cell, state)
    try:
        yield
    finally:
        load(cell, own)


def copy_statistics(parts: Parts) -> None:
    """Give the torch model the running statistics of the cells."""
    held = {stored.name: stored for _, stored in parts.cell.parameters_and_names()}
    with torch.no_grad():
        for name, norm in prepbn_modules(parts.model).items():
            for what in ("running_mean", "running_var"):
                getattr(norm.rep, what).copy_(_tensor(held[f"{name}.rep.{what}"]))


def averaged_parameters(cell: Any) -> list[Any]:
    """What an average is taken of: every floating tensor of torch's state dict but gamma."""
    stored = [one for _, one in cell.parameters_and_names() if not is_constant(one)]
    return [one for one in stored if one.dtype.is_floating_point and not one.name.endswith("gamma")]


def _tensor(stored: Any) -> Tensor:
    return torch.from_numpy(stored.asnumpy().copy())


def _by_name(named: Any, stored: Any) -> State:
    return {one.name: _tensor(other) for one, other in zip(named, stored, strict=True)}


def _write(named: Any, stored: Any, values: Mapping[str, Tensor]) -> None:
    for one, other in zip(named, stored, strict=True):
        other.set_data(to_mindspore(values[one.name]))
