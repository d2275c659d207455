"""One call from a trained model to the fastest form of it that was verified: :func:`deploy`.

deployed = sf.deploy(model, images, batches=loader)
print(deployed.report.table())
logits = deployed(images)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._files import write_json
from slabformer.deployment.steps import STEPS, Form, Inputs, Job, Step, place
from slabformer.measure import allocator
from slabformer.measure.timing import Machine, quantile, ratio, time_interleaved
from slabformer.nn.device import Device
from slabformer.settings import Seconds, checked
from slabformer.surgery.recalibrate import recalibrate_
from slabformer.surgery.verify import VerifyResult

#: a form is taken unless the one that it was built on is faster by more than measuring is uncertain
UNCERTAINTY = 0.02


@dataclass(frozen=True, kw_only=True)
class DeployStep:
    """One step, verified and timed.

    Attributes:
        name: "as given", "fused", "bfloat16", "channels last", "in C++", "compiled".
        did: What it did, in words.
        p50_ms: Median latency on the example inputs.
        gain: Speed over the form that it was built on, the fastest so far: median over rounds of the two times' ratio.
        speed: Speed over the model as given.
        taken: Whether the next step was built on it; a slower form is left.
        max_rel: Largest difference from the model as given (recalibrated, where it was), over its outputs' scale.
        top1_agreement: Share of rows whose largest output is the same.
    """

    name: str
    did: str
    p50_ms: float
    gain: float
    speed: float
    max_rel: float
    top1_agreement: float
    taken: bool

    def __str__(self) -> str:
        return (
            f"{self.name:<14}{self.p50_ms:>9.2f} ms{self.gain:>8.2f}x{self.speed:>8.2f}x{self.max_rel:>11.1e}"
            f"{self.top1_agreement:>8.1%}  {self.did}{'' if self.taken else '; slower, not taken'}"
        )


@dataclass(frozen=True, kw_only=True)
class DeployReport:
    """Every step in order, each built on the last one taken, and which form was taken in the end."""

    steps: tuple[DeployStep, ...]
    taken: str
    notes: tuple[str, ...]
    machine: Machine

    def table(self) -> str:
        """One line a step, aligned, with what came of it and where it was measured."""
        head = f"{'form':<14}{'latency':>12}{'gain':>9}{'total':>9}{'difference':>11}{'top-1':>8}"
        return "\n".join([head, *map(str, self.steps), f"taken: {self.taken}", *self.notes, str(self.machine)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def write(self, folder: Path) -> Path:
        """Write ``deploy.json`` into ``folder``; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "deploy.json"
        write_json(path, self.to_dict())
        return path


class Deployed(nn.Module):
    """The form that :func:`deploy` took: inputs go to its device and, floating point ones, to its dtype.

    Attributes:
        eager: The module behind it, to save or export.
        report: What was done.
    """

    def __init__(
        self, eager: nn.Module, run: nn.Module, place: Callable[[Inputs], Inputs], report: DeployReport
    ) -> None:
        super().__init__()
        self.eager, self.run, self.place, self.report = eager, run, place, report
        self.train(False)

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        """The model's outputs."""
        return self.run(*self.place(inputs))


@checked
def deploy(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    batches: Iterable[Any] | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
    compile: bool = True,
    fixed_size: bool = False,
    keep_memory: bool = False,
    seconds: Seconds = 5.0,
    steps: Sequence[Step] = STEPS,
) -> Deployed:
    """The fastest verified form of ``model``, on a copy: fused, in half precision where asked, laid out, compiled.

    On a CPU with a C++ compiler, linear attention runs in C++ (:func:`slabformer.deployment.native.use_native_`).

    Steps run one after the other, each on the fastest form so far. What a step makes is held against the model as
    given, then timed in turns with that form in one process; a step that makes the model slower is reported and left.

    Args:
        model: In eval mode, gamma 0.
        example_inputs: A batch as in deployment; shapes and batch size matter to compilers and clocks.
        batches: Training data to recalibrate statistics on first, as for :func:`slabformer.recalibrate_`.
        device: Where it shall run; where the model is by default.
        dtype: ``torch.bfloat16`` or ``torch.float16`` for half precision; the model's own by default.
        compile: Whether to go through ``torch.compile``: weights frozen into the program on a CPU, graphs on a GPU.
        fixed_size: As for :func:`slabformer.fuse`: folds more where windows would be padded at other sizes.
        keep_memory: On a CPU, let the C library keep freed memory for the next forward: faster where activations are
            large. It changes the whole process and for good, so it is off unless asked for; see
            :func:`slabformer.measure.allocator.keep_memory`.
        seconds: Of measuring in all; 0 takes every step unmeasured.
        steps: What is tried, in this order; add a target of your own to :data:`slabformer.deployment.steps.STEPS`.

    Raises:
        ValueError: If the model is in train mode, or what :func:`slabformer.fuse` and
            :func:`slabformer.recalibrate_` refuse; ``dtype`` is no floating point type.
        VerificationError: If a form computes something else.
    """
    if model.training:
        raise ValueError("deploy needs eval mode, got a model in train mode; call model.eval() first")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type, got {dtype}; quantise what deploy returns")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    device = torch.device(device) if device is not None else inputs[0].device
    reference = copy.deepcopy(model).to(device)
    job = Job(reference, place(inputs, device, None), device, dtype, compile, fixed_size)
    if batches is not None:
        job.notes.append(f"recalibrated on {recalibrate_(reference, batches)} batches")
    if keep_memory and device.type == "cpu" and allocator.keep_memory():
        job.notes.append("the C library keeps freed memory for the next forward")
    with torch.no_grad():
        taken, told = _take_steps(job, steps, seconds)
    report = DeployReport(steps=told, taken=taken.name, notes=tuple(job.notes), machine=Machine.here(device))
    return Deployed(taken.eager, taken.run, partial(place, device=device, dtype=taken.dtype), report)


def _take_steps(job: Job, steps: Sequence[Step], seconds: float) -> tuple[Form, tuple[DeployStep, ...]]:
    """Run ``steps``, each on the fastest form so far; what to build and what to say of it."""
    share = seconds / max(1, len(steps))
    given = taken = Form("as given", "", job.reference, job.reference)
    told = [_told(given, VerifyResult(0.0, 0.0, 1.0), _turns([given], job, share), given, given)]
    for step in steps:
        form = step.build(taken, job) if step.applies(taken, job) else None
        if form is None:
            continue
        check = step.verify(form, job)
        turns = _turns([given, taken, form], job, share)
        told.append(_told(form, check, turns, taken, given))
        if told[-1].taken:
            taken = form
    return taken, tuple(told)


def _turns(forms: Sequence[Form], job: Job, seconds: float) -> dict[str, list[list[float]]]:
    """Times of ``forms`` in turns, by name; empty where nothing is measured."""
    calls = {form.name: partial(form.run, *place(job.inputs, job.device, form.dtype)) for form in forms}
    return time_interleaved(calls, seconds=seconds, device=job.device) if seconds else {}


def _told(
    form: Form, check: VerifyResult, turns: dict[str, list[list[float]]], before: Form, given: Form
) -> DeployStep:
    gain = ratio(turns[before.name], turns[form.name]) if turns else math.nan
    return DeployStep(
        name=form.name,
        did=form.did,
        p50_ms=quantile(turns[form.name], 0.5) * 1e3 if turns else math.nan,
        gain=gain,
        speed=ratio(turns[given.name], turns[form.name]) if turns else math.nan,
        max_rel=check.max_rel,
        top1_agreement=check.top1_agreement,
        taken=not turns or gain > 1 - UNCERTAINTY,
    )
