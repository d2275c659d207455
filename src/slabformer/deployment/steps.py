"""The steps of :func:`slabformer.deploy`, one class a step; a new target is one more, with an instance in ``STEPS``."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._defaults import RUNTIME_RTOL
from slabformer._torch import compile_error
from slabformer.deployment.compiled import Compiled
from slabformer.deployment.native import natively, runs_natively
from slabformer.export.signature import Axes
from slabformer.nn import PRepBN, RepBN
from slabformer.surgery.fuse import fuse
from slabformer.surgery.verify import VerifyResult, verify

#: positional arguments, or keyword arguments
Inputs = tuple[Tensor, ...] | Mapping[str, Tensor]
#: largest difference in half precision, in units of its epsilon: roundings add up over a deep model's layers
HALF_EPSILONS = 64


@dataclass(frozen=True)
class Form:
    """One form of the model.

    Attributes:
        name: In the report, one or two words.
        did: What its step did, in words.
        run: Called with inputs in ``dtype``.
        eager: The module behind it, on which the next step builds.
        dtype: Of floating point inputs; None leaves them.
    """

    name: str
    did: str
    run: nn.Module
    eager: nn.Module
    dtype: torch.dtype | None = None


@dataclass
class Job:
    """What all steps of one :func:`slabformer.deploy` share.

    Attributes:
        reference: The model as given, recalibrated where that was asked for, on ``device``.
        inputs: The example inputs, on ``device``.
        device: Where the deployed model is to run.
        dtype: Half precision, where it was asked for.
        compile: Whether ``torch.compile`` may be used.
        fixed_size: As for :func:`slabformer.fuse`.
        axes: Of any length in a program, by input; the batch's by default.
        notes: What the report says below its table: why a step could not be taken, for example.
    """

    reference: nn.Module
    inputs: Inputs
    device: torch.device
    dtype: torch.dtype | None
    compile: bool
    fixed_size: bool
    axes: Axes | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def rtol(self) -> float:
        """Largest difference of a form that rounds otherwise."""
        half = 0.0 if self.dtype is None else HALF_EPSILONS * torch.finfo(self.dtype).eps
        return max(RUNTIME_RTOL, half)


class Step(ABC):
    """One step: it makes a form of the model out of the fastest one so far."""

    @abstractmethod
    def applies(self, form: Form, job: Job) -> bool:
        """Whether there is anything to do; nothing is built yet."""

    @abstractmethod
    def build(self, form: Form, job: Job) -> Form | None:
        """The new form, on a copy: ``form`` stays as it is. None, and a note in ``job``, where it cannot be built."""

    def verify(self, form: Form, job: Job) -> VerifyResult:
        """Hold ``form`` against the model as given.

        Raises:
            VerificationError: If it computes something else.
        """
        run = _InDtype(form.run, form.dtype)
        return verify(job.reference, run, job.inputs, job.rtol, check_dtype=False, lazy=True)


class Fuse(Step):
    """Norms folded into their neighbours."""

    def applies(self, form: Form, job: Job) -> bool:
        """Where there are norms of ours."""
        return any(isinstance(module, (PRepBN, RepBN)) for module in form.eager.modules())

    def build(self, form: Form, job: Job) -> Form:
        """See :class:`Step`."""
        args, kwargs = ((), job.inputs) if isinstance(job.inputs, Mapping) else (job.inputs, None)
        fused, folds = fuse(form.eager, args, kwargs, fixed_size=job.fixed_size)
        return Form("fused", f"{folds.num_folded} of {len(folds)} norms folded", fused, fused, form.dtype)

    def verify(self, form: Form, job: Job) -> VerifyResult:
        """As strictly as :func:`slabformer.verify` does by default: fusing rounds no more than that."""
        return verify(job.reference, form.run, job.inputs)


class HalfPrecision(Step):
    """Weights and arithmetic in ``job.dtype``."""

    def applies(self, form: Form, job: Job) -> bool:
        """Where it was asked for."""
        return job.dtype is not None

    def build(self, form: Form, job: Job) -> Form:
        """See :class:`Step`."""
        half = copy.deepcopy(form.eager).to(job.dtype)
        return Form(str(job.dtype).removeprefix("torch."), "weights and arithmetic", half, half, job.dtype)


class ChannelsLast(Step):
    """Weights of convolutions laid out as their kernels like them."""

    def applies(self, form: Form, job: Job) -> bool:
        """Where there are convolutions."""
        return any(isinstance(module, nn.Conv2d) for module in form.eager.modules())

    def build(self, form: Form, job: Job) -> Form:
        """See :class:`Step`."""
        last = copy.deepcopy(form.eager)
        last = last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Form("channels last", "weights of convolutions", last, last, form.dtype)


class Native(Step):
    """Linear attention in C++."""

    def applies(self, form: Form, job: Job) -> bool:
        """On a CPU, where there is linear attention of a width that the kernel takes."""
        return runs_natively(form.eager, job.device)

    def build(self, form: Form, job: Job) -> Form | None:
        """See :class:`Step`."""
        native, count = natively(form.eager, job.device, job.notes)
        return Form("in C++", f"{count} linear attentions", native, native, form.dtype) if count else None


class Compile(Step):
    """Through ``torch.compile``."""

    def applies(self, form: Form, job: Job) -> bool:
        """Unless it was forbidden."""
        return job.compile

    def build(self, form: Form, job: Job) -> Form | None:
        """See :class:`Step`."""
        how = "CUDA graphs" if job.device.type == "cuda" else "weights frozen into the program"
        program = Compiled(form.eager, job.device)
        try:
            with torch.no_grad():
                call(program, place(job.inputs, job.device, form.dtype))
        except compile_error() as error:
            job.notes.append(f"not compiled: {str(error).strip().splitlines()[0]}")
            return None
        return Form("compiled", how, program, form.eager, form.dtype)


#: in the order in which they run, each on the fastest form so far
STEPS: Sequence[Step] = (Fuse(), HalfPrecision(), ChannelsLast(), Native(), Compile())


def place(inputs: Inputs, device: torch.device, dtype: torch.dtype | None) -> Inputs:
    """``inputs`` on ``device``, floating point ones in ``dtype``."""

    def placed(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)

    if isinstance(inputs, Mapping):
        return {name: placed(x) for name, x in inputs.items()}
    return tuple(map(placed, inputs))


def call(run: Callable[..., Any], inputs: Inputs) -> Any:
    """What ``run`` makes of ``inputs``."""
    return run(**inputs) if isinstance(inputs, Mapping) else run(*inputs)


class _InDtype(nn.Module):
    """``model``, given inputs of another dtype."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.train(False)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        given: Inputs = named or inputs
        return call(self.model, place(given, next(iter(named.values() or inputs)).device, self.dtype))
