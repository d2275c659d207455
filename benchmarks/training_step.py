"""What a PRepBN training step costs against a LayerNorm step: time and memory, while fading and after.

    python benchmarks/training_step.py                              # eager and compiled, deit_tiny, batch 8, one thread
    python benchmarks/training_step.py --model vit_small_patch16_224 --batch-size 32 --threads 4
    python benchmarks/training_step.py --model vit_of_width_64 --batch-size 64   # 12 layers, 16 tokens: small calls
    python benchmarks/training_step.py --device cuda --batch-size 128

The three forms take turns in one process; a ratio is the median over rounds. Memory is the peak of a forward and
backward beyond what the model holds, the least of three. Writes benchmarks/results/training_step.json (or --output).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slabformer as sf
from slabformer.measure.timing import Machine, mebibytes_of, num_threads, quantile, ratio, time_interleaved

RESULTS = Path(__file__).parent / "results" / "training_step.json"
#: timm's ViT of 12 layers of width 64 on 16 patches, beside its named models
SMALL = "vit_of_width_64"
SMALL_SIZES = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 64, "depth": 12, "num_heads": 4}
FORMS = {"LayerNorm": None, "PRepBN, fading": 0.5, "PRepBN, done": 0.0}


@torch.enable_grad()
def step(model: nn.Module, call: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
    """Forward and backward; the optimizer is the same for all."""
    model.zero_grad()
    F.cross_entropy(call(images), labels).backward()


def with_norms(base: nn.Module, gamma: float | None) -> nn.Module:
    """A copy of ``base``, converted unless ``gamma`` is None."""
    model = copy.deepcopy(base).train()
    if gamma is not None:
        sf.convert_norms_(model)
        for module in model.modules():
            if isinstance(module, sf.PRepBN):
                module.set_gamma(gamma)
    return model


def measure(
    name: str, batch_size: int, compiled: bool, seconds: float, device: torch.device
) -> list[dict[str, object]]:
    """One row a form."""
    torch.manual_seed(0)
    small = name == SMALL
    base = timm.models.VisionTransformer(**SMALL_SIZES, num_classes=10) if small else timm.create_model(name)
    base.to(device)
    images = torch.randn(batch_size, *((1, 28, 28) if small else base.default_cfg["input_size"]), device=device)
    labels = torch.randint(0, base.num_classes, (batch_size,), device=device)
    calls = {}
    for form, gamma in FORMS.items():
        model = with_norms(base, gamma)
        calls[form] = partial(step, model, torch.compile(model) if compiled else model, images, labels)
    turns = time_interleaved(calls, seconds=seconds, device=device)
    peaks = {form: mebibytes_of(call, device, times=3) for form, call in calls.items()}
    return [
        {
            "form": form,
            "mode": "compiled" if compiled else "eager",
            "p50_ms": round(1e3 * quantile(turns[form], 0.5), 2),
            "over_layernorm": round(ratio(turns[form], turns["LayerNorm"]), 3),
            "peak_mib": peaks[form] and round(peaks[form], 1),
            "peak_over_layernorm": peaks[form] and round(peaks[form] / peaks["LayerNorm"], 3),
            "rounds": len(turns[form]),
        }
        for form in calls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help=f"any timm model with LayerNorm, or {SMALL}")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, for each mode")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with num_threads(arguments.threads if device.type == "cpu" else None):
        rows = [
            row
            for compiled in (mode == "compiled" for mode in arguments.modes)
            for row in measure(arguments.model, arguments.batch_size, compiled, arguments.seconds, device)
        ]
        machine = asdict(Machine.here(device))
    for row in rows:
        print(*row.values())
    settings = {"model": arguments.model, "batch_size": arguments.batch_size}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({**settings, "rows": rows, "machine": machine}, indent=2, default=str) + "\n"
    )


if __name__ == "__main__":
    main()
