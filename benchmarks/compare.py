"""Is it really faster? Each SLAB model as published, fused, deployed, beside its LayerNorm baseline and its ceiling.

    python benchmarks/compare.py                                     # all models at batch 1 and 8, one CPU thread
    python benchmarks/compare.py --models slab_deit_tiny --sizes 224 512 1024 --batch-sizes 1
    python benchmarks/compare.py --device cuda --batch-sizes 1 128 512 --dtype bfloat16

One process a model, all forms in turns, and no speed before equality: published style against ours, fused against
unfused, compiled against eager. Models that are measured already are left out. Writes compare.csv, compare.md and
compare.png into benchmarks/results/compare (or below it, for a GPU or half precision; or --output), with machine,
versions and command.
"""

from __future__ import annotations

import argparse
import csv
import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from compare_table import Row, draw, markdown
from published_style import published_style
from torch import Tensor, nn

import slabformer as sf
from slabformer._defaults import RUNTIME_RTOL
from slabformer.bench.ceiling import ceiling_of
from slabformer.deployment.compiled import Compiled
from slabformer.deployment.native import natively
from slabformer.measure.allocator import keep_memory
from slabformer.measure.roofline import Ceilings, measure_ceilings, work_of
from slabformer.measure.timing import (
    Machine,
    mebibytes_of,
    num_threads,
    quantile,
    ratio,
    time_interleaved,
)
from slabformer.models.registry import baseline_of
from slabformer.nn.controls import prepbn_modules
from slabformer.surgery.verify import verify

RESULTS = Path(__file__).parent / "results" / "compare"
MODELS = ("slab_deit_tiny", "slab_deit_small", "slab_pvt_tiny", "slab_swin_tiny", "slab_swin_small", "slab_cswin_tiny")
#: published style against ours: einsums sum in another order
STYLE_RTOL = 1e-4


def trained_looking(name: str, size: int) -> nn.Module:
    """Random weights, norms as training leaves them, gamma 0."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size).eval()
    sf.testing.randomize_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    return model


def baseline(name: str, size: int) -> nn.Module:
    """The LayerNorm model that ``name`` replaces, with fused attention."""
    found = baseline_of(name)
    assert found is not None, f"{name} has no baseline"
    return timm.create_model(found, img_size=size).eval()


def forms_of(name: str, size: int, images: Tensor, dtype: torch.dtype) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Every form: what runs, and its eager module. Equalities are in float32, speeds in ``dtype``."""
    model = trained_looking(name, size).to(images.device)
    published, (fused, _) = published_style(model), sf.fuse(model, images[:1])
    verify(model, published, images[:1], rtol=STYLE_RTOL)
    verify(model, fused, images[:1])
    eager = {
        "published style": published,
        "fused": fused,
        "LayerNorm baseline": baseline(name, size).to(images.device),
        "ceiling": ceiling_of(fused),
    }
    eager = {form: module.to(dtype) for form, module in eager.items()}
    forms = {form: (module, module) for form, module in eager.items() if form != "ceiling"}
    for form, name_compiled in {
        "fused": "deployed",
        "LayerNorm baseline": "baseline compiled",
        "ceiling": "ceiling",
    }.items():
        program = Compiled(natively(eager[form], images.device)[0], images.device)
        tolerance = RUNTIME_RTOL if dtype == torch.float32 else 64 * torch.finfo(dtype).eps
        verify(eager[form], program, images.to(dtype), rtol=tolerance)
        forms[name_compiled] = program, eager[form]
    return forms


@torch.no_grad()
def measure(name: str, size: int, batch_size: int, options: argparse.Namespace) -> list[Row]:
    """One row a form, all timed in turns."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    images = torch.randn(batch_size, 3, size, size, device=device)
    forms = forms_of(name, size, images, dtype)
    calls: dict[str, Callable[[], object]] = {form: partial(run, images.to(dtype)) for form, (run, _) in forms.items()}
    before = measure_ceilings(device, dtype)
    turns = time_interleaved(calls, seconds=options.seconds, device=device)
    ceilings = before.or_better(measure_ceilings(device, dtype))
    return [
        Row(
            model=name,
            size=size,
            batch_size=batch_size,
            form=form,
            p50_ms=1e3 * quantile(turns[form], 0.5),
            p90_ms=1e3 * quantile(turns[form], 0.9),
            images_per_s=batch_size / quantile(turns[form], 0.5),
            memory_mib=mebibytes_of(calls[form], device, times=3),
            over_baseline=ratio(turns["baseline compiled"], turns[form]),
            over_published=ratio(turns["published style"], turns[form]),
            of_ceiling=ratio(turns["ceiling"], turns[form]),
            of_floor=_floor(forms[form][1], images.to(dtype), ceilings) / quantile(turns[form], 0.5),
        )
        for form in forms
    ]


def _floor(eager: nn.Module, images: Tensor, ceilings: Ceilings) -> float:
    return work_of(eager, images).floor(ceilings)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224], help="height and width of the images")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each model, size and batch size")
    parser.add_argument("--output", type=Path, help="by default a folder for each device and dtype")
    options = parser.parse_args()
    if options.output is None:
        apart = (options.device, options.dtype) != ("cpu", "float32")
        options.output = RESULTS / f"{options.device}_{options.dtype}" if apart else RESULTS
    return options


def main() -> None:
    options = parse()
    keep_memory()  # for all forms alike: else pages of large activations are faulted in anew in every forward
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "compare.csv"
    with num_threads(options.threads if options.device == "cpu" else None):
        machine = Machine.here(torch.device(options.device))
        here = {key: str(value) for key, value in {**machine.columns(), "dtype": options.dtype}.items()}
        rows = read(path)
        for name, size, batch_size in (
            (n, s, b) for n in options.models for s in options.sizes for b in options.batch_sizes
        ):
            subject = {"model": name, "size": str(size), "batch_size": str(batch_size), "dtype": options.dtype}
            subject |= {"device": here["device"], "threads": here["threads"]}
            if any(subject.items() <= row.items() for row in rows):
                continue
            found = measure(name, size, batch_size, options)
            rows += [
                {key: "" if value is None else str(value) for key, value in (asdict(row) | here).items()}
                for row in found
            ]
            for row in found:
                print(row)
            write(path, rows)
            torch._dynamo.reset()
            gc.collect()
    (options.output / "compare.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, options.output)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


if __name__ == "__main__":
    main()
