"""Forms of a model that other runtimes hold: each written, loaded as it will be, and held against the model."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from slabformer._defaults import RUNTIME_RTOL, Precision
from slabformer.deployment.artifact import Manifest
from slabformer.deployment.kinds import KINDS, KindName, kind_of
from slabformer.deployment.steps import HALF_EPSILONS, Form, Job
from slabformer.deployment.targets.base import DTYPES, Request, Target, Written
from slabformer.deployment.targets.table import AUTO, usable
from slabformer.export.program import Program
from slabformer.export.refusals import UnsupportedError
from slabformer.export.signature import AsWritten, flatten, in_order
from slabformer.measure.processor import architecture
from slabformer.surgery.verify import VerificationError, VerifyResult

#: largest difference in integers, of the outputs' scale: a wrong graph differs by more, accuracy is for data to tell
INTEGER_RTOL = 0.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be written.

    Attributes:
        target: A name in the table of targets, or "auto" for all that are installed.
        dtype: Of weights and arithmetic.
        calibration: Batches that show the ranges of activations; for int8.
        budget: Seconds after which "auto" builds no further target.
    """

    target: str
    dtype: Precision = "float32"
    calibration: Sequence[Any] = ()
    budget: float


#: of a form that does not run here
UNKNOWN = VerifyResult(math.nan, math.nan, math.nan)


class NotHere(nn.Module):
    """Stands for a program that does not run on this system.

    Args:
        target: That wrote it.
    """

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.train(False)

    def forward(self, *inputs: Tensor, **named: Tensor) -> NoReturn:
        """Refuse.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(f"what was written for {self.target} does not run on this system; save it, and copy it")


class Scratch:
    """A temporary folder that is gone with this object, or with the process.

    Attributes:
        path: It.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="slabformer-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class TargetForm(Form):
    """A form that a file holds.

    Attributes:
        folder: Where the target wrote it.
        manifest: What ``artifact.json`` will say of it.
        check: How far it is from the model.
    """

    folder: Scratch | None = None
    manifest: Manifest | None = None
    check: VerifyResult | None = None


def rtol_of(dtype: str) -> float:
    """Largest difference of a form in ``dtype`` to the model, relative to its outputs' scale."""
    if dtype == "int8":
        return INTEGER_RTOL
    half = 0.0 if dtype == "float32" else HALF_EPSILONS * torch.finfo(DTYPES[dtype]).eps
    return max(RUNTIME_RTOL, half)


def target_forms(plan: Plan, fused: Form, job: Job) -> list[TargetForm]:
    """``fused`` for every target of ``plan``; what "auto" cannot build is a note in ``job``.

    Raises:
        ImportError: If the target's package is missing; names the extra.
        ValueError: If there is no such target, or it has not the dtype; int8 without calibration.
        UnsupportedError: If the one target that was named does not take the model.
        VerificationError: If it computes something else.
    """
    if plan.dtype == "int8" and not plan.calibration:
        raise ValueError("int8 needs batches that show the ranges of activations; give calibration=")
    targets, notes = usable(plan.target, plan.dtype)
    job.notes += notes
    kind = KINDS[kind_of(job.reference)]
    began, forms = time.monotonic(), list[TargetForm]()
    for target in targets:
        spent = time.monotonic() - began
        if forms and spent > plan.budget:
            job.notes.append(f"{target.name} not tried: building took {spent:.0f} s of a budget of {plan.budget:g}")
            continue
        try:
            kind.check_target(target.name)
            forms.append(_form_of(target, _request(target, plan, fused, job), fused, job))
        except (UnsupportedError, VerificationError, ValueError) as error:
            if plan.target != AUTO:
                raise
            job.notes.append(f"not for {target.name}: {' '.join(str(error).split())}")
    if not forms:
        raise UnsupportedError("; ".join(job.notes))
    spent = time.monotonic() - began
    if plan.target == AUTO and spent > plan.budget:
        last = forms[-1].name
        job.notes.append(
            f"building took {spent:.0f} s, beyond the budget of {plan.budget:g}: {last} was begun within it"
        )
    return forms


def _request(target: Target, plan: Plan, fused: Form, job: Job) -> Request:
    signature, flat = flatten(fused.eager, job.inputs, target.any_batch, job.axes)
    return Request(
        flat=flat,
        signature=signature,
        inputs=in_order(job.inputs),
        dtype=plan.dtype,
        calibration=[in_order(batch) for batch in plan.calibration],
    )


def _form_of(target: Target, request: Request, fused: Form, job: Job) -> TargetForm:
    folder = Scratch()
    written = target.write(request, folder.path)
    name = kind_of(job.reference)
    manifest = _manifest_of(target, request, written, name)
    if not target.runs_here():
        did = f"{written.did}; does not run on this system: neither compared nor timed"
        absent = NotHere(target.name)
        return TargetForm(target.name, did, absent, fused.eager, folder=folder, manifest=manifest, check=UNKNOWN)
    run = target.load(folder.path, request.dtype, torch.get_num_threads())
    program = Program(request.signature, run)
    reference = AsWritten(job.reference, request.signature)
    cases = KINDS[name].cases(reference, job.inputs)
    check = KINDS[name].compare(reference, program, cases, rtol_of(request.dtype))
    return TargetForm(
        target.name,
        written.did,
        program,
        fused.eager,
        None,
        folder=folder,
        manifest=manifest,
        check=check,
    )


def _manifest_of(target: Target, request: Request, written: Written, kind: KindName) -> Manifest:
    return Manifest(
        kind=kind,
        target=target.name,
        dtype=request.dtype,
        signature=request.signature,
        versions=target.versions(),
        architecture=architecture() if written.instructions else "",
        instructions=list(written.instructions),
        rtol=rtol_of(request.dtype),
    )
