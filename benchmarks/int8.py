"""In integers, too? Each SLAB model, its LayerNorm baseline and its ceiling in 8 bits and in float32, by OpenVINO.

    python benchmarks/int8.py                                 # slab_deit_tiny and slab_swin_tiny, batch 8, one thread

Random weights: speeds do not hang on them, accuracies do (`slab quantize` tells those of a trained model). All forms of
a model take turns in one process. Writes int8.csv and int8.md into benchmarks/results/int8 (or --output).
"""

from __future__ import annotations

import argparse
import csv
from functools import partial
from pathlib import Path

import torch
from compare import baseline, trained_looking

import slabformer as sf
from slabformer.bench.ceiling import ceiling_of
from slabformer.measure.timing import Machine, num_threads, quantile, ratio, time_interleaved
from slabformer.quantize.openvino import quantize, to_openvino

RESULTS = Path(__file__).parent / "results" / "int8"
COLUMNS = ("model", "form", "precision", "p50_ms", "over_own_float", "over_baseline", "of_ceiling")


@torch.no_grad()
def measure(name: str, batch_size: int, seconds: float, threads: int) -> list[dict[str, object]]:
    """One row a form and precision."""
    images = torch.randn(batch_size, 3, 224, 224)
    fused, _ = sf.fuse(trained_looking(name, 224), images[:1])
    calls = {}
    for form, model in {"SLAB": fused, "LayerNorm baseline": baseline(name, 224), "ceiling": ceiling_of(fused)}.items():
        calls[form, "float32"] = partial(to_openvino(model, images, threads), images)
        calls[form, "int8"] = partial(quantize(model, [images], threads), images)
    turns = time_interleaved(calls, seconds=seconds, device=images.device)
    return [
        {
            "model": name,
            "form": form,
            "precision": precision,
            "p50_ms": round(1e3 * quantile(turns[form, precision], 0.5), 2),
            "over_own_float": round(ratio(turns[form, "float32"], turns[form, precision]), 3),
            "over_baseline": round(ratio(turns["LayerNorm baseline", precision], turns[form, precision]), 3),
            "of_ceiling": round(ratio(turns["ceiling", precision], turns[form, precision]), 3),
        }
        for form, precision in calls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["slab_deit_tiny", "slab_swin_tiny"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each model")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with num_threads(options.threads):
        machine = Machine.here(torch.device("cpu"))
        rows = [
            row
            for name in options.models
            for row in measure(name, options.batch_size, options.seconds, options.threads)
        ]
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "int8.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---:|---:|---:|---:|"]
    table += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
    lines = ["# In 8-bit integers", "", *table, "", f"Batch {options.batch_size}; {machine}", ""]
    (options.output / "int8.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
