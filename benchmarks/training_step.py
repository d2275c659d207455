"""What a PRepBN training step costs against a LayerNorm step: forward and backward, while fading and after.

    python benchmarks/training_step.py                              # eager and compiled, deit_tiny, batch 8, one thread
    python benchmarks/training_step.py --model vit_small_patch16_224 --batch-size 32 --threads 4

The three forms take turns in one process; a ratio is the median over rounds. Writes
benchmarks/results/training_step.json.
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
from slabformer.measure.timing import Machine, num_threads, quantile, ratio, time_interleaved

RESULTS = Path(__file__).parent / "results" / "training_step.json"
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
    base = timm.create_model(name).to(device)
    size = base.default_cfg["input_size"]
    images = torch.randn(batch_size, *size, device=device)
    labels = torch.randint(0, base.num_classes, (batch_size,), device=device)
    calls = {}
    for form, gamma in FORMS.items():
        model = with_norms(base, gamma)
        calls[form] = partial(step, model, torch.compile(model) if compiled else model, images, labels)
    turns = time_interleaved(calls, seconds=seconds, device=device)
    return [
        {
            "form": form,
            "mode": "compiled" if compiled else "eager",
            "p50_ms": round(1e3 * quantile(turns[form], 0.5), 2),
            "over_layernorm": round(ratio(turns[form], turns["LayerNorm"]), 3),
            "rounds": len(turns[form]),
        }
        for form in calls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="any timm model with LayerNorm")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, for each mode")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with num_threads(arguments.threads):
        rows = [
            row
            for compiled in (False, True)
            for row in measure(arguments.model, arguments.batch_size, compiled, arguments.seconds, device)
        ]
        machine = asdict(Machine.here(device))
    for row in rows:
        print(*row.values())
    settings = {"model": arguments.model, "batch_size": arguments.batch_size}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**settings, "rows": rows, "machine": machine}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
