"""How fast is a model, and how fast could it be? :func:`compare` times it, its fused form, baseline and ceiling.

    report = compare(model, images, fused=deployed, baseline=layernorm_model, batch_sizes=(1, 8), threads=1)
    console.print(report.table())
    report.write(Path("runs/bench"))     # bench.csv, bench.json, bench.png
    report.find("fused", "compiled", 8).over_baseline

An equality comes before a speed: nothing is timed unless the fused model computes what the given one does, and each
compiled form what its eager one does. All variants of a batch size are timed in turns in one process; a speed-up is the
median over rounds of the ratio of two times from the same round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from slabformer._defaults import RUNTIME_RTOL
from slabformer._moved import takes_old_names
from slabformer._torch import compile_error
from slabformer.bench.ceiling import ceiling_of
from slabformer.bench.report import BenchReport
from slabformer.deployment.compiled import Compiled
from slabformer.deployment.native import natively
from slabformer.measure.roofline import Ceilings, measure_ceilings, work_of
from slabformer.measure.rows import Measurement, Mode, Variant
from slabformer.measure.timing import (
    Machine,
    count_parameters,
    mebibytes_of,
    num_threads,
    quantile,
    ratio,
    time_interleaved,
)
from slabformer.nn import PRepBN, RepBN
from slabformer.surgery.fuse import fuse
from slabformer.surgery.verify import VerifyResult, verify

logger = logging.getLogger(__name__)

Inputs = tuple[Tensor, ...]
Turns = dict[tuple[Variant, Mode], list[list[float]]]


@takes_old_names
def compare(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    fused: nn.Module | None = None,
    baseline: nn.Module | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    threads: int | None = None,
    compiled: bool | Collection[int] = True,
    seconds: float = 10.0,
    name: str = "model",
    roofline: bool = False,
    progress: Callable[[str], None] = logger.debug,
) -> BenchReport:
    """Time ``model`` as given, fused, its LayerNorm baseline and its ceiling, eager and compiled, at each batch size.

    Args:
        model: In eval mode, on the device to measure.
        example_inputs: A batch on the same device; it is repeated or cut to each batch size along axis 0.
        fused: The same model fused; made here when None and ``model`` holds norms to fuse.
        baseline: The model that it replaces, taking the same inputs; None leaves its column out.
        batch_sizes: Each measured by itself.
        threads: torch's threads on a CPU; None leaves them.
        compiled: Also measure under ``torch.compile``, at all batch sizes or those given: each variant takes seconds to
            compile, the first more. Left out with a note where there is no compiler.
        seconds: Length of the measurement for each batch size, after compiling.
        name: Of the model, in the report.
        roofline: Also measure what the machine reaches at best, and which share of that each variant does.
        progress: Told what is being done.

    Raises:
        VerificationError: If the fused or a compiled form computes something else: no speed is then reported.
        ValueError: If ``model`` is in train mode, cannot be fused yet, or ``baseline`` returns another shape.
    """
    if model.training:
        raise ValueError("bench needs eval mode, got a model in train mode; call model.eval() first")
    if min(batch_sizes, default=0) < 1:
        raise ValueError(f"batch_sizes must be at least 1 each, got {list(batch_sizes)}")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    device = inputs[0].device
    notes: list[str] = []
    to_compile = set(batch_sizes if compiled is True else compiled or ())
    with num_threads(threads), torch.no_grad():
        machine = Machine.here(device)
        progress("fusing and verifying")
        variants, equality = _variants(model, inputs, fused, baseline, notes)
        programs = _programs(model, variants, inputs, notes)
        measurements: list[Measurement] = []
        ceilings = measure_ceilings(device, _dtype_of(model)) if roofline else None
        if ceilings is not None:
            notes.append(str(ceilings))
        for batch_size in batch_sizes:
            batch = _cut(inputs, batch_size)
            candidates = _candidates(programs, batch, batch_size in to_compile, notes, progress)
            if batch_size in to_compile and all(mode == "eager" for _, mode in candidates):
                to_compile.clear()
            progress(f"timing {len(candidates)} variants at batch {batch_size}")
            measurements += _measure(candidates, variants, batch, seconds, device, ceilings)
        return BenchReport(
            model=name,
            machine=machine,
            measurements=measurements,
            equality=equality,
            notes=notes,
        )


def _variants(
    model: nn.Module, inputs: Inputs, fused: nn.Module | None, baseline: nn.Module | None, notes: list[str]
) -> tuple[dict[Variant, nn.Module], VerifyResult | None]:
    variants: dict[Variant, nn.Module] = {"as given": model}
    equality = None
    if fused is None and any(isinstance(module, (PRepBN, RepBN)) for module in model.modules()):
        fused, folds = fuse(model, inputs)
        notes.append(f"{folds.num_folded} of {len(folds)} norms folded")
    if fused is None:
        notes.append("nothing to fuse: the model holds no RepBN or PRepBN")
    else:
        equality = verify(model, fused, inputs)
        variants["fused"] = fused
    if baseline is not None:
        _check_baseline(model, baseline, inputs)
        variants["LayerNorm baseline"] = baseline.eval()
    try:
        variants["ceiling"] = ceiling_of(model if fused is None else fused)
    except ValueError as error:
        notes.append(str(error))
    return variants, equality


def _programs(
    model: nn.Module, variants: dict[Variant, nn.Module], inputs: Inputs, notes: list[str]
) -> dict[Variant, nn.Module]:
    """What runs: the variants, whose work is counted as it stands, the fused one with linear attention in C++."""
    if "fused" not in variants:
        return variants
    fused, count = natively(variants["fused"], inputs[0].device, notes)
    if count:
        notes.append(f"fused: {count} linear attentions in C++")
        verify(model, fused, inputs, lazy=True)
    return {**variants, "fused": fused}


def _check_baseline(model: nn.Module, baseline: nn.Module, inputs: Inputs) -> None:
    ours, theirs = model(*inputs), baseline.eval()(*inputs)
    if isinstance(ours, Tensor) and ours.shape != theirs.shape:
        raise ValueError(
            f"baseline returns shape {tuple(theirs.shape)}, the model {tuple(ours.shape)}; "
            "give it the same number of classes"
        )


def _candidates(
    variants: dict[Variant, nn.Module], batch: Inputs, compiled: bool, notes: list[str], progress: Callable[[str], None]
) -> dict[tuple[Variant, Mode], nn.Module]:
    candidates: dict[tuple[Variant, Mode], nn.Module] = {(name, "eager"): model for name, model in variants.items()}
    for name, model in variants.items() if compiled else ():
        progress(f"compiling {name} at batch {len(batch[0])}")
        program = Compiled(model, batch[0].device)
        try:
            program(*batch)
        except compile_error() as error:
            reason = str(error).strip().splitlines()[0]
            notes.append(f"compiled forms left out, torch.compile failed: {reason}")
            return {key: module for key, module in candidates.items() if key[1] == "eager"}
        verify(model, program, batch, rtol=RUNTIME_RTOL, lazy=True)
        candidates[name, "compiled"] = program
    return candidates


def _measure(
    candidates: dict[tuple[Variant, Mode], nn.Module],
    variants: dict[Variant, nn.Module],
    batch: Inputs,
    seconds: float,
    device: torch.device,
    ceilings: Ceilings | None,
) -> list[Measurement]:
    calls = {key: partial(module, *batch) for key, module in candidates.items()}
    turns = time_interleaved(calls, seconds=seconds, device=device)
    images = len(batch[0])
    rows = []
    work = {variant: work_of(model, *batch) for variant, model in variants.items()}
    for variant, mode in sorted(calls, key=lambda key: key[1] == "compiled"):
        p50 = quantile(turns[variant, mode], 0.5)
        rows.append(
            Measurement(
                variant=variant,
                mode=mode,
                batch_size=images,
                p50_ms=p50 * 1e3,
                p90_ms=quantile(turns[variant, mode], 0.9) * 1e3,
                images_per_second=images / p50,
                memory_mib=mebibytes_of(calls[variant, mode], device, times=5),
                parameters=count_parameters(variants[variant]),
                macs=work[variant].flops // 2 // images,
                over_baseline=_over(turns, "LayerNorm baseline", variant, mode),
                over_given=ratio(turns["as given", mode], turns[variant, mode]),
                of_ceiling=_over(turns, "ceiling", variant, mode),
                of_floor=None if ceilings is None else work[variant].floor(ceilings) / p50,
            )
        )
    return rows


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _over(turns: Turns, other: Variant, variant: Variant, mode: Mode) -> float | None:
    return ratio(turns[other, mode], turns[variant, mode]) if (other, mode) in turns else None


def _cut(inputs: Inputs, batch_size: int) -> Inputs:
    """``inputs`` with ``batch_size`` rows each, repeated where there are too few."""
    rows = torch.arange(batch_size, device=inputs[0].device) % len(inputs[0])
    return tuple(tensor[rows] for tensor in inputs)
