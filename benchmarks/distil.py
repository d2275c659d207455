"""How near a trained model without norms comes to itself by distillation, with the defaults of ``slab convert``.

    python benchmarks/distil.py run minilm --steps 300                        # one run, which goes on where it stopped
    python benchmarks/distil.py run minilm --steps 1000 --seed 1 --lr 1e-3
    python benchmarks/distil.py run vit_small --steps 300
    python benchmarks/distil.py run vit_small --steps 300 --size 56           # a third of the time
    python benchmarks/distil.py marks                                         # all of the runs that are asked for
    python benchmarks/distil.py table                                         # distil.md and distil.png

MiniLM is trained on 50,000 glosses of WordNet, ViT-S/14 on 10,000 unlabelled images of Fashion-MNIST, at 98 pixels
unless --size says otherwise, in batches of 32; benchmarks/start.py says what is measured, on data that is in neither.
Each run is one file in benchmarks/results/conversion/. Needs onnx, onnxruntime, scipy and transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from start import RESULTS, MiniLM, ViTSmall
from subjects import FOLDER, MEAN, STD, fashion_mnist, glosses, minilm, vit_small

from slabformer.converting import lose_norms
from slabformer.figures.plots import curves, save
from slabformer.measure.timing import Machine
from slabformer.tasks.language.folders import load_model_folder

NUM_TESTED, NUM_TEXTS, NUM_IMAGES, IMAGE_SIZE = 2000, 50_000, 10_000, 98
NUM_TESTED_IMAGES = 400
RATES = (1e-4, 3e-4, 1e-3)
#: model, steps, rate (None for the default) and seed of each run that is asked for
MARKS = [
    *(("minilm", 300, rate, 0) for rate in (None, *RATES)),
    *(("minilm", 1000, None, seed) for seed in range(3)),
    ("vit_small", 300, None, 0),
]
COLUMNS = (
    "model",
    "image_size",
    "steps",
    "lr",
    "seed",
    "cosine",
    "spearman",
    "recall_at_1",
    "accuracy_10nn",
    "seconds",
)


def text_subject() -> tuple[Path, Path]:
    """Folder of MiniLM with its tokenizer, and a file of glosses that are not tested."""
    folder, text = FOLDER / "minilm_folder", FOLDER / "glosses.txt"
    if not text.exists():
        model, tokenizer = minilm()
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        chosen = glosses()[NUM_TESTED : NUM_TESTED + NUM_TEXTS]
        text.write_text("\n".join(gloss.meaning for gloss in chosen) + "\n", encoding="utf-8")
    return folder, text


def image_subject() -> tuple[Path, Path]:
    """Folder of ViT-S/14, and one of training images that are not the neighbours of the tested ones."""
    from transformers import BitImageProcessor

    folder, pictures = FOLDER / "vit_small_folder", FOLDER / "fashion_mnist_images"
    if not pictures.exists():
        vit_small().save_pretrained(folder)  # type: ignore[operator]
        BitImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
        images = fashion_mnist("train")[0]
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[5 * NUM_TESTED_IMAGES :]
        partial = pictures.with_name(f".{pictures.name}")
        partial.mkdir(exist_ok=True)
        for index in chosen[:NUM_IMAGES].tolist():
            Image.fromarray(images[index].numpy()).save(partial / f"{index}.png")
        partial.rename(pictures)
    return folder, pictures


def measured(name: str, steps: int, lr: float | None, seed: int, pixels: int) -> dict[str, Any]:
    """One run to its end, and how near the fused model is to the original."""
    folder, data = text_subject() if name == "minilm" else image_subject()
    output = FOLDER / "runs" / title(name, steps, lr, seed, pixels)
    size = {} if name == "minilm" else {"image_size": pixels}
    begun = time.perf_counter()
    result = lose_norms(folder, data, output, steps=steps, lr=lr, seed=seed, save_every=25, device="cpu", **size)
    seconds = time.perf_counter() - begun
    subject = MiniLM(NUM_TESTED, 32) if name == "minilm" else ViTSmall(NUM_TESTED_IMAGES, 32, pixels)
    metrics = subject.measure(load_model_folder(output / "fused"))
    row = {"model": name, "steps": steps, "lr": lr, "seed": seed, **size}
    row |= {key: round(value, 4) for key, value in metrics.items()} | {"original": subject.measure(subject.model)}
    history = [line for line in (output / "metrics.csv").read_text().splitlines() if line]
    return row | {"summary": result.summary, "history": history, "seconds": round(seconds, 1)}


def title(name: str, steps: int, lr: float | None, seed: int, pixels: int) -> str:
    """Of a run."""
    size = "" if name == "minilm" or pixels == IMAGE_SIZE else f"_{pixels}px"
    return f"distil_{name}{size}_{steps}_{'default' if lr is None else f'{lr:g}'}_{seed}"


def run(name: str, steps: int, lr: float | None, seed: int, pixels: int = IMAGE_SIZE) -> None:
    """Measure one run, unless that was done, and write its file."""
    path = RESULTS / f"{title(name, steps, lr, seed, pixels)}.json"
    if path.exists():
        print(f"{path.name} is there already")
        return
    row = measured(name, steps, lr, seed, pixels) | {"machine": asdict(Machine.here(torch.device("cpu")))}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1) + "\n")
    print({key: row.get(key) for key in COLUMNS}, flush=True)


def table() -> None:
    """Write ``distil.md`` and ``distil.png`` of all runs that are there; an original's accuracies are in brackets."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("distil_*.json"))]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cell(row, name) for name in COLUMNS) + " |" for row in rows]
    (RESULTS / "distil.md").write_text("\n".join(lines) + "\n")
    panels = {"cosine of the deployed form, held-out data": {_label(row): _cosines(row) for row in rows}}
    save(curves(panels, xlabel="optimizer step"), RESULTS / "distil.png")


def _cell(row: dict[str, Any], name: str) -> str:
    """A figure, of accuracies the original's behind it."""
    if row.get(name) is None:
        return ""
    original = row["original"].get(name, 1)
    return str(row[name]) if original == 1 else f"{row[name]} ({original:.4g})"


def _label(row: dict[str, Any]) -> str:
    size = f", {row['image_size']} px" if row.get("image_size") else ""
    rate = f", rate {row['lr']:g}" if row["lr"] else ""
    return f"{row['model']}{size}, {row['steps']} steps{rate}, seed {row['seed']}"


def _cosines(row: dict[str, Any]) -> tuple[list[float], list[float]]:
    header, *values = [line.split(",") for line in row["history"]]
    step, cosine = header.index("step"), header.index("cosine")
    return [float(value[step]) for value in values], [float(value[cosine]) for value in values]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run")
    one.add_argument("name", choices=["minilm", "vit_small"])
    one.add_argument("--steps", type=int, default=300)
    one.add_argument("--lr", type=float)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--size", type=int, default=IMAGE_SIZE, help="height and width of images")
    verbs.add_parser("marks")
    verbs.add_parser("table")
    asked = parser.parse_args()
    if asked.verb == "run":
        run(asked.name, asked.steps, asked.lr, asked.seed, asked.size)
    elif asked.verb == "marks":
        for mark in MARKS:
            run(*mark)
    else:
        table()


if __name__ == "__main__":
    main()
