"""One call from a trained model to the fastest form of it that was verified: :func:`deploy`.

deployed = sf.deploy(model, images, batches=loader)
print(deployed.report.table())
logits = deployed(images)
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.deployment import allocator
from slabformer.deployment.equality import FUSED_RTOL, RUNTIME_RTOL, verify_fused
from slabformer.deployment.measure import Machine, quantile, ratio, time_interleaved
from slabformer.deployment.native import natively
from slabformer.deployment.variants import Compiled
from slabformer.nn import PRepBN, RepBN
from slabformer.surgery.fuse import fuse
from slabformer.surgery.recalibrate import recalibrate_
from slabformer.surgery.verify import VerifyResult, verify

logger = logging.getLogger(__name__)

Inputs = tuple[Tensor, ...]
#: largest difference in half precision, in units of its epsilon: roundings add up over a deep model's layers
HALF_EPSILONS = 64
#: a later form is taken unless an earlier one is faster by more than measuring is uncertain
UNCERTAINTY = 0.02


@dataclass(frozen=True, kw_only=True)
class DeployStep:
    """One step, verified and timed.

    Attributes:
        name: "as given", "fused", "bfloat16", "channels last", "in C++", "compiled".
        did: What it did, in words.
        p50_ms: Median latency on the example inputs.
        gain: Speed over the form before it: median over rounds of the two times' ratio.
        speed: Speed over the model as given.
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

    def __str__(self) -> str:
        return (
            f"{self.name:<14}{self.p50_ms:>9.2f} ms{self.gain:>8.2f}x{self.speed:>8.2f}x{self.max_rel:>11.1e}"
            f"{self.top1_agreement:>8.1%}  {self.did}"
        )


@dataclass(frozen=True, kw_only=True)
class DeployReport:
    """Every step, in order, and which form was taken."""

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
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
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


@dataclass(frozen=True)
class _Form:
    name: str
    did: str
    run: nn.Module
    eager: nn.Module
    dtype: torch.dtype | None
    check: VerifyResult


def deploy(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    batches: Iterable[Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = True,
    fixed_size: bool = False,
    keep_memory: bool = True,
    seconds: float = 5.0,
) -> Deployed:
    """The fastest verified form of ``model``, on a copy: fused, in half precision where asked, laid out, compiled.

    On a CPU with a C++ compiler, linear attention runs in C++ (:func:`slabformer.deployment.native.use_native_`).

    Every form is held against the model as given before it is timed, and all are timed in turns in one process. A step
    that makes it slower is reported and not taken.

    Args:
        model: In eval mode, gamma 0.
        example_inputs: A batch as in deployment; shapes and batch size matter to compilers and clocks.
        batches: Training data to recalibrate statistics on first, as for :func:`slabformer.recalibrate_`.
        device: Where it shall run; where the model is by default.
        dtype: ``torch.bfloat16`` or ``torch.float16`` for half precision; the model's own by default.
        compile: Whether to go through ``torch.compile``: weights frozen into the program on a CPU, graphs on a GPU.
        fixed_size: As for :func:`slabformer.fuse`: folds more where windows would be padded at other sizes.
        keep_memory: On a CPU, let the C library keep freed memory for the next forward; holds for the whole process,
            see :func:`slabformer.deployment.allocator.keep_memory`.
        seconds: Of measuring; 0 takes the last form unmeasured.

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
    notes: list[str] = []
    if batches is not None:
        notes.append(f"recalibrated on {recalibrate_(reference, batches)} batches")
    if keep_memory and device.type == "cpu" and allocator.keep_memory():
        notes.append("the C library keeps freed memory for the next forward")
    inputs = _place(inputs, device, None)
    with torch.no_grad():
        forms = _forms(reference, inputs, dtype, compile, fixed_size, notes)
        report = _measure(forms, inputs, seconds, device, notes)
    taken = next(form for form in forms if form.name == report.taken)
    return Deployed(taken.eager, taken.run, partial(_place, device=device, dtype=taken.dtype), report)


def _forms(
    reference: nn.Module, inputs: Inputs, dtype: torch.dtype | None, compile: bool, fixed_size: bool, notes: list[str]
) -> list[_Form]:
    same = VerifyResult(0.0, 0.0, 1.0)
    forms = [_Form("as given", "", reference, reference, None, same)]
    if any(isinstance(module, (PRepBN, RepBN)) for module in reference.modules()):
        fused, folds = fuse(reference, inputs, fixed_size=fixed_size)
        check = verify_fused(reference, fused, inputs, FUSED_RTOL)
        forms.append(_Form("fused", f"{folds.num_folded} of {len(folds)} norms folded", fused, fused, None, check))
    rtol = RUNTIME_RTOL
    if dtype is not None:
        half = copy.deepcopy(forms[-1].eager).to(dtype)
        rtol = max(rtol, HALF_EPSILONS * torch.finfo(dtype).eps)
        check = verify(reference, _InDtype(half, dtype), inputs, rtol)
        forms.append(_Form(str(dtype).removeprefix("torch."), "weights and arithmetic", half, half, dtype, check))
    if any(isinstance(module, nn.Conv2d) for module in reference.modules()):
        last = copy.deepcopy(forms[-1].eager)
        last = last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        check = verify(reference, _InDtype(last, dtype), inputs, rtol)
        forms.append(_Form("channels last", "weights of convolutions", last, last, dtype, check))
    native, count = natively(forms[-1].eager, inputs[0].device, notes)
    if count:
        check = verify(reference, _InDtype(native, dtype), inputs, rtol)
        forms.append(_Form("in C++", f"{count} linear attentions", native, native, dtype, check))
    if compile:
        before = forms[-1]
        program = Compiled(before.eager, inputs[0].device)
        try:
            check = verify(reference, _InDtype(program, dtype), inputs, rtol)
        except torch._dynamo.exc.TorchDynamoException as error:
            notes.append(f"not compiled: {str(error).strip().splitlines()[0]}")
        else:
            how = "CUDA graphs" if inputs[0].is_cuda else "weights frozen into the program"
            forms.append(_Form("compiled", how, program, before.eager, dtype, check))
    return forms


def _measure(
    forms: list[_Form], inputs: Inputs, seconds: float, device: torch.device, notes: list[str]
) -> DeployReport:
    calls = {form.name: partial(form.run, *_place(inputs, device, form.dtype)) for form in forms}
    turns = time_interleaved(calls, seconds=seconds, device=device) if seconds else {}
    first, steps, taken, nan = forms[0].name, [], forms[0].name, float("nan")
    for before, form in zip([forms[0], *forms], forms, strict=False):
        if not turns or ratio(turns[taken], turns[form.name]) > 1 - UNCERTAINTY:
            taken = form.name
        steps.append(
            DeployStep(
                name=form.name,
                did=form.did,
                p50_ms=quantile(turns[form.name], 0.5) * 1e3 if turns else nan,
                gain=ratio(turns[before.name], turns[form.name]) if turns else nan,
                speed=ratio(turns[first], turns[form.name]) if turns else nan,
                max_rel=form.check.max_rel,
                top1_agreement=form.check.top1_agreement,
            )
        )
    return DeployReport(steps=tuple(steps), taken=taken, notes=tuple(notes), machine=Machine.here(device))


def _place(inputs: Inputs, device: torch.device, dtype: torch.dtype | None) -> Inputs:
    return tuple(x.to(device, dtype if x.is_floating_point() else None, non_blocking=True) for x in inputs)


class _InDtype(nn.Module):
    """``model``, given inputs of another dtype."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.train(False)

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*_place(inputs, inputs[0].device, self.dtype))
