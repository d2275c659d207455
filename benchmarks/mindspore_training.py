"""Hold a run of `slab mindspore train` against one of `slab train` with the same recipe.

slab mindspore train --config recipes/digits.yaml --output runs/digits_ms    # in an environment with MindSpore; stop it
slab mindspore train --config recipes/digits.yaml --output runs/digits_ms    # anywhere, and go on
slab train --config recipes/digits.yaml --output runs/digits
python benchmarks/mindspore_training.py runs/digits_ms runs/digits --output benchmarks/results/mindspore/digits.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from slabformer._files import as_json, write_json
from slabformer.mindspore.training.train import MindSporeFolder
from slabformer.tasks.classification.config import HARMLESS_DATA
from slabformer.tasks.classification.result import read_history
from slabformer.tasks.engine.folder import RunFolder, fingerprint, refuse_difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mindspore", type=Path, help="folder of the finished run in MindSpore")
    parser.add_argument("torch", type=Path, help="folder of the finished run in torch")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    result = compared(options.mindspore, options.torch)
    sys.stdout.write(as_json(result))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, result)


def compared(ours: Path, other: Path) -> dict[str, Any]:
    """Final figures of both, their difference in points, and the largest difference of the epochs' losses."""
    recipes = [yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) for path in (ours, other)]
    harmless = {"output", "overwrite", "resume", "log_every", "save_every", "eval_every", "keep", "tensorboard"}
    first, second = (fingerprint(recipe, harmless | {"num_workers", *HARMLESS_DATA}) for recipe in recipes)
    refuse_difference(second, first, f"{ours} and {other} are of different recipes")
    found = {
        "mindspore": MindSporeFolder(ours, recipes[0]).result(),
        "torch": RunFolder(other, recipes[1]).result(),
    }
    histories = [read_history(path) for path in (ours, other)]
    losses = [abs(a["train_loss"] - b["train_loss"]) for a, b in zip(*histories, strict=True)]
    return {
        "recipe": {"model": recipes[0]["model"]["name"], "epochs": recipes[0]["epochs"], "seed": recipes[0]["seed"]},
        **found,
        "points_apart": 100 * abs(found["mindspore"]["top1"] - found["torch"]["top1"]),
        "first_epochs_loss_apart": losses[0],
        "largest_loss_apart": max(losses),
    }


if __name__ == "__main__":
    main()
