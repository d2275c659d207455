"""One call from a trained model to the fastest form of it that was verified: :func:`deploy`.

deployed = sf.deploy(model, images, batches=loader)
print(deployed.report.table())
logits = deployed(images)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from slabformer._defaults import DEPLOY_BUDGET, Precision
from slabformer._files import write_json
from slabformer.deployment.artifact import save_artifact
from slabformer.deployment.kinds import KINDS, kind_of
from slabformer.deployment.steps import STEPS, Form, Fuse, Inputs, Job, Step, call, place
from slabformer.deployment.targeted import NotHere, Plan, TargetForm, target_forms
from slabformer.export.signature import AsWritten, Axes, in_order
from slabformer.measure import allocator
from slabformer.measure.timing import Machine, quantile, ratio, time_interleaved
from slabformer.nn.device import Device
from slabformer.settings import ClassNames, Seconds, checked
from slabformer.surgery.normal import need_unsharded, need_values
from slabformer.surgery.recalibrate import recalibrate_
from slabformer.surgery.verify import VerifyResult

#: a form is taken unless the one that it was built on is faster by more than measuring is uncertain
UNCERTAINTY = 0.02
#: of the model as given to itself
EQUAL = VerifyResult(0.0, 0.0, 1.0)


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
        eager: The fused module behind it.
        report: What was done.
    """

    def __init__(self, form: Form, job: Job, report: DeployReport) -> None:
        super().__init__()
        self.eager, self.run, self.report = form.eager, form.run, report
        self._form, self._job = form, job
        self.train(False)

    @torch.no_grad()
    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The model's outputs."""
        given: Inputs = named or inputs
        return call(self.run, place(given, self._job.device, self._form.dtype))

    @checked
    def save(
        self,
        path: str | Path,
        *,
        preprocessing: Mapping[str, Any] | None = None,
        class_names: ClassNames = (),  # type: ignore[assignment]
        overwrite: bool = False,
    ) -> Path:
        """Write a folder that another process loads: with :func:`slabformer.load_deployed`, or with its ``run.py``.

        A form of this process alone, such as a compiled one, is written for the target "torch".

        Args:
            path: The folder.
            preprocessing: How images become inputs, to be kept beside the program.
            class_names: By label, to be kept too.
            overwrite: Replace the deployed model that is there.

        Returns:
            ``path``.

        Raises:
            FileExistsError: If ``path`` is a file, holds files of others, or is not empty without ``overwrite``.
            UnsupportedError: If torch.export does not take the model.
        """
        form = self._form
        if not isinstance(form, TargetForm):
            plan = Plan(target="torch", dtype=_name_of(form.dtype), budget=0)
            (form,) = target_forms(plan, Form("fused", "", self.eager.float(), self.eager.float()), self._job)
        assert form.folder is not None
        assert form.manifest is not None
        manifest = replace(form.manifest, preprocessing=dict(preprocessing or {}), class_names=list(class_names))
        outputs = AsWritten(self._job.reference, manifest.signature)
        with torch.no_grad():
            expected = in_order(call(outputs, self._job.inputs))
        return save_artifact(
            Path(path),
            form.folder.path,
            manifest,
            self.report.to_dict(),
            in_order(self._job.inputs),
            expected,
            overwrite=overwrite,
        )


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
    target: str | None = None,
    calibration: Iterable[Any] = (),
    budget: Seconds = DEPLOY_BUDGET,
    axes: Axes | None = None,
) -> Deployed:
    """The fastest verified form of ``model``, on a copy: fused, in half precision where asked, laid out, compiled.

    On a CPU with a C++ compiler, linear attention runs in C++ (:func:`slabformer.deployment.native.use_native_`).

    Steps run one after the other, each on the fastest form so far. What a step makes is held against the model as
    given, then timed in turns with that form in one process; a step that makes the model slower is reported and left.

    With ``target``, the fused model is instead written for other runtimes on the CPU, each held against the model, all
    timed in turns with torch's number of threads; the fastest is taken, and :meth:`Deployed.save` writes its folder.

    Args:
        model: In eval mode, gamma 0.
        example_inputs: A batch as in deployment, a tuple of positional arguments or a mapping of keyword arguments;
            shapes and batch size matter to compilers and clocks.
        batches: Training data to recalibrate statistics on first, as for :func:`slabformer.recalibrate_`.
        device: Where it shall run; where the model is by default.
        dtype: ``torch.bfloat16`` or ``torch.float16`` for half precision; the model's own by default. With a target,
            ``torch.int8`` too.
        compile: Whether to go through ``torch.compile``: weights frozen into the program on a CPU, graphs on a GPU.
        fixed_size: As for :func:`slabformer.fuse`: folds more where windows would be padded at other sizes.
        keep_memory: On a CPU, let the C library keep freed memory for the next forward: faster where activations are
            large. It changes the whole process and for good, so it is off unless asked for; see
            :func:`slabformer.measure.allocator.keep_memory`.
        seconds: Of measuring in all; 0 takes every step unmeasured.
        steps: What is tried, in this order; add a step of your own to :data:`slabformer.deployment.steps.STEPS`.
        target: What it shall run on: "onnxruntime", "openvino", "torch", "executorch", "aoti", one of your own, or
            "auto" for the fastest of those that are installed.
        calibration: Batches of inputs that show the ranges of activations; for ``torch.int8``.
        budget: Seconds after which "auto" builds no further target.
        axes: Axes of any length in a target's program, by the input's name: ``{"input_ids": {0: "batch", 1:
            "tokens"}}``; axes of one name have one length. By default the first axis of every input that has it in
            common with the first one.

    Raises:
        ValueError: If the model is in train mode, or what :func:`slabformer.fuse` and
            :func:`slabformer.recalibrate_` refuse; ``dtype`` is no floating point type, or the target does not have it.
        ImportError: If the target's package is missing; names the extra.
        UnsupportedError: If the target does not take the model; names the operator or the line of code.
        VerificationError: If a form computes something else.
    """
    if model.training:
        raise ValueError("deploy needs eval mode, got a model in train mode; call model.eval() first")
    need_unsharded(model)
    need_values(model)
    if dtype is not None and not dtype.is_floating_point and (target is None or dtype != torch.int8):
        raise ValueError(
            f"dtype must be a floating point type, got {dtype}; quantise what deploy returns, or for a target"
        )
    inputs = _as_inputs(example_inputs)
    device = torch.device(device) if device is not None else in_order(inputs)[0].device
    if target is not None and device.type != "cpu":
        raise ValueError(f"targets are for the CPU, got device {device}; leave target out, or give device='cpu'")
    reference = copy.deepcopy(model).to(device)
    job = Job(reference, place(inputs, device, None), device, None if target else dtype, compile, fixed_size, axes)
    if batches is not None:
        job.notes.append(f"recalibrated on {recalibrate_(reference, batches)} batches")
    if keep_memory and device.type == "cpu" and allocator.keep_memory():
        job.notes.append("the C library keeps freed memory for the next forward")
    with torch.no_grad():
        if target is None:
            taken, told = _take_steps(job, steps, seconds)
        else:
            plan = Plan(target=target, dtype=_name_of(dtype), calibration=list(calibration), budget=budget)
            taken, told = _take_target(job, plan, seconds)
    report = DeployReport(steps=told, taken=taken.name, notes=tuple(job.notes), machine=Machine.here(device))
    return Deployed(taken, job, report)


def _as_inputs(example_inputs: Tensor | Inputs) -> Inputs:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    return dict(example_inputs) if isinstance(example_inputs, Mapping) else tuple(example_inputs)


def _name_of(dtype: torch.dtype | None) -> Precision:
    """What targets call a dtype.

    Raises:
        ValueError: If none has it.
    """
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in get_args(Precision):
        raise ValueError(f"targets compute in {', '.join(get_args(Precision))}, got {dtype}")
    return cast(Precision, name)


def _take_steps(job: Job, steps: Sequence[Step], seconds: float) -> tuple[Form, tuple[DeployStep, ...]]:
    """Run ``steps``, each on the fastest form so far; what to build and what to say of it."""
    share = seconds / max(1, len(steps))
    given = taken = Form("as given", "", job.reference, job.reference)
    told = [_told(given, EQUAL, _turns([given], job, share), given, given)]
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


def _take_target(job: Job, plan: Plan, seconds: float) -> tuple[Form, tuple[DeployStep, ...]]:
    """Fuse, build every target of ``plan`` on that, time all in turns, take the fastest."""
    given = fused = Form("as given", "", job.reference, job.reference)
    checks, fuse = {given.name: EQUAL}, Fuse()
    if fuse.applies(given, job):
        fused = fuse.build(given, job)
        checks[fused.name] = KINDS[kind_of(job.reference)].compare_fused(job.reference, fused.run, job.inputs)
    forms = target_forms(plan, fused, job)
    checks |= {form.name: form.check or EQUAL for form in forms}
    before = [given] if fused is given else [given, fused]
    turns = _turns([form for form in (*before, *forms) if not isinstance(form.run, NotHere)], job, seconds)
    timed = [form for form in forms if form.name in turns]
    taken = min(timed, key=lambda form: quantile(turns[form.name], 0.5)) if timed else forms[0]
    told = [
        replace(_told(form, checks[form.name], turns, fused, given), taken=form in (*before, taken))
        for form in (*before, *forms)
    ]
    return taken, tuple(told)


def _turns(forms: Sequence[Form], job: Job, seconds: float) -> dict[str, list[list[float]]]:
    """Times of ``forms`` in turns, by name; empty where nothing is measured."""
    calls = {form.name: partial(call, form.run, place(job.inputs, job.device, form.dtype)) for form in forms}
    return time_interleaved(calls, seconds=seconds, device=job.device) if seconds else {}


def _told(
    form: Form, check: VerifyResult, turns: dict[str, list[list[float]]], before: Form, given: Form
) -> DeployStep:
    timed = form.name in turns
    gain = ratio(turns[before.name], turns[form.name]) if timed else math.nan
    return DeployStep(
        name=form.name,
        did=form.did,
        p50_ms=quantile(turns[form.name], 0.5) * 1e3 if timed else math.nan,
        gain=gain,
        speed=ratio(turns[given.name], turns[form.name]) if timed else math.nan,
        max_rel=check.max_rel,
        top1_agreement=check.top1_agreement,
        taken=not timed or gain > 1 - UNCERTAINTY,
    )
