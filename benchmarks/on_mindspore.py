"""Write models for MindSpore, and say how near their outputs are to torch's and how long they take to compile there.

python benchmarks/on_mindspore.py slab_deit_tiny slab_swin_tiny    # in an environment with slabformer[mindspore]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import timm
import torch

import slabformer as sf
from slabformer.mindspore.convert import build, runtime_of, write_model
from slabformer.mindspore.files import load
from slabformer.mindspore.runtime import graph_mode
from slabformer.nn.controls import prepbn_modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="names in timm")
    parser.add_argument("--form", choices=("unfused", "fused", "both"), default="both", help="which forms")
    options = parser.parse_args()
    print("| model | form | classes | difference | writing | compiling and first run |\n|---|---|---|---|---|---|")
    for name in options.models:
        for form in ("unfused", "fused"):
            if options.form in (form, "both"):
                print(row(name, form), flush=True)


def row(name: str, form: str) -> str:
    """One model: difference over the outputs' root mean square, seconds."""
    torch.manual_seed(0)
    model = sf.testing.randomize_norms_(timm.create_model(name)).eval()
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    if form == "fused":
        model, _ = sf.fuse(model, images)
    begun = time.perf_counter()
    written = write_model(model, images, name)
    traced = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.py"
        path.write_text(written.source, encoding="utf-8")
        cell = build(path)
        load(cell, written.tensors)
        loaded = time.perf_counter()
        with graph_mode():
            actual = runtime_of(cell)(images)
        compiled = time.perf_counter() - loaded
    with torch.no_grad():
        expected = model(images)
    difference = (actual - expected).abs().max() / expected.square().mean().sqrt()
    classes = written.source.count("\nclass ")
    return f"| {name} | {form} | {classes} | {difference:.1e} | {traced - begun:.0f} s | {compiled:.0f} s |"


if __name__ == "__main__":
    main()
