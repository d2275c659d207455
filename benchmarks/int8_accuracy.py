"""What 8-bit integers cost in accuracy: trained models, fused, in ONNX Runtime and OpenVINO beside their floats.

    python benchmarks/int8_accuracy.py                                  # every subject, three seeds
    python benchmarks/int8_accuracy.py --subjects digits --seeds 0

Subjects: `digits` is the quickstart's model (360 test images); `fashion_slab` is slab_deit_micro and `fashion_vit` a
ViT of 12 layers with softmax attention, both trained on Fashion-MNIST (10,000 test images; see from_scratch.py) for one
epoch. `digits_qat` is `digits` trained on with `qat.enabled` for eight epochs; its floats are those of `digits`. Each
is written by `sf.deploy(target=..., dtype=torch.int8, calibration=...)` with 300 training images.
Trained models are kept in runs/int8 (or --runs). Results go into benchmarks/results/int8: accuracy.csv and accuracy.md.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import timm
import torch
from from_scratch import Run, new_model, scaled
from from_scratch import train as train_on_fashion
from subjects import fashion_mnist
from torch import Tensor, nn

import slabformer as sf
from slabformer.measure.timing import Machine, num_threads
from slabformer.quickstart.config import QuickstartConfig
from slabformer.quickstart.job import SLAB, recipe
from slabformer.tasks.classification.config import AugmentConfig, ModelConfig, QatConfig
from slabformer.tasks.classification.data import create_loader
from slabformer.tasks.classification.train import train
from slabformer.tasks.saved_model import load_model

RESULTS = Path(__file__).parent / "results" / "int8"
TARGETS = ("onnxruntime", "openvino")
CALIBRATE = 300
#: in one call; test images come in whole batches, so that nothing is compiled twice
BATCH = 60
#: one epoch
FASHION_STEPS = 60_000 // 128


@dataclass(frozen=True)
class Subject:
    """A trained model in eval mode with its data."""

    model: nn.Module
    calibration: list[Tensor]
    images: list[Tensor]
    labels: Tensor
    trained_on: nn.Module | None = None
    """What is rounded in place of the model."""


@dataclass(frozen=True)
class Row:
    """One model in one engine; accuracies and ``same_top1`` in percent, ``points_lost`` in points."""

    subject: str
    seed: int
    engine: str
    float_top1: float
    int8_top1: float
    points_lost: float
    same_top1: float
    error: float


def digits(seed: int, runs: Path) -> Subject:
    """The quickstart's model."""
    config = replace(
        recipe(SLAB, QuickstartConfig(seed=seed)),
        output=str(runs / f"digits-{seed}"),
        overwrite=False,
        tensorboard=False,
    )
    train(config)
    model, _ = load_model(Path(config.output) / "model.safetensors")
    found = {}
    for split in ("train", "validation"):
        loader = create_loader(
            config.data, AugmentConfig(policy="none"), split, batch_size=BATCH, seed=0, drop_last=False
        )
        found[split] = list(loader)
    calibration = [images for images, _ in found["train"]][: CALIBRATE // BATCH]
    images, labels = zip(*found["validation"], strict=True)
    return Subject(model, calibration, list(images), torch.cat(labels))


def digits_qat(seed: int, runs: Path) -> Subject:
    """The same, trained on for integers; the model in floating point is the one before."""
    before = digits(seed, runs)
    start = recipe(SLAB, QuickstartConfig(seed=seed, epochs=8))
    config = replace(
        start,
        model=ModelConfig(name=SLAB, weights=str(runs / f"digits-{seed}" / "model.safetensors")),
        qat=QatConfig(enabled=True),
        optimizer=replace(start.optimizer, lr=3e-4),
        lr_schedule=replace(start.lr_schedule, warmup_epochs=1),
        output=str(runs / f"qat-{seed}"),
        overwrite=False,
        tensorboard=False,
    )
    train(config)
    model, _ = load_model(Path(config.output) / "model.safetensors")
    return replace(before, trained_on=model)


def on_fashion(name: str, make: Callable[[int], nn.Module]) -> Callable[[int, Path], Subject]:
    """A model that ``make`` builds from a seed, trained on Fashion-MNIST."""

    def subject(seed: int, runs: Path) -> Subject:
        model, file = make(seed), runs / f"{name}-{seed}.pt"
        if not file.exists():
            print(name, seed, train_on_fashion(Run("prepbn", 3e-3, seed, FASHION_STEPS), model)["accuracy"], flush=True)
            runs.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file, weights_only=True))
        images, labels = fashion_mnist("test")
        chosen = torch.randperm(60_000, generator=torch.Generator().manual_seed(seed))[:CALIBRATE]
        calibration = scaled(fashion_mnist("train")[0][chosen]).split(BATCH)
        return Subject(model.eval(), list(calibration), list(scaled(images).split(200)), labels)

    return subject


def slab_on_fashion(seed: int) -> nn.Module:
    """Linear attention."""
    torch.manual_seed(seed)
    return timm.create_model(SLAB, img_size=28, in_chans=1, num_classes=10)


SUBJECTS: dict[str, Callable[[int, Path], Subject]] = {
    "digits": digits,
    "digits_qat": digits_qat,
    "fashion_slab": on_fashion("fashion_slab", slab_on_fashion),
    "fashion_vit": on_fashion("fashion_vit", lambda seed: new_model(Run("prepbn", 3e-3, seed, FASHION_STEPS))),
}


@torch.no_grad()
def measure(name: str, seed: int, subject: Subject) -> list[Row]:
    """One row for each engine."""
    floats = torch.cat([subject.model(images) for images in subject.images])
    rows = []
    for engine in TARGETS:
        deployed = sf.deploy(
            subject.trained_on or subject.model,
            subject.images[0],
            dtype=torch.int8,
            target=engine,
            seconds=0,
            calibration=subject.calibration,
        )
        integers = torch.cat([deployed(images) for images in subject.images])
        before, after = (
            100 * float((logits.argmax(1) == subject.labels).float().mean()) for logits in (floats, integers)
        )
        rows.append(
            Row(
                name,
                seed,
                engine,
                float_top1=round(before, 2),
                int8_top1=round(after, 2),
                points_lost=round(before - after, 2),
                same_top1=round(100 * float((floats.argmax(1) == integers.argmax(1)).float().mean()), 2),
                error=round(float((integers - floats).square().mean().sqrt() / floats.std()), 4),
            )
        )
        print(rows[-1], flush=True)
    return rows


def write(rows: list[Row], folder: Path, machine: str) -> None:
    """Table of every run, and worst and mean loss of each subject."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "accuracy.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    lines = [
        "# Accuracy in 8-bit integers",
        "",
        f"| {' | '.join(asdict(rows[0]))} |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join(str(value) for value in asdict(row).values())} |" for row in rows]
    lines += ["", "| subject | engine | mean loss, points | largest loss, points |", "|---|---|---:|---:|"]
    for subject, engine in dict.fromkeys((row.subject, row.engine) for row in rows):
        lost = [row.points_lost for row in rows if (row.subject, row.engine) == (subject, engine)]
        lines.append(f"| {subject} | {engine} | {math.fsum(lost) / len(lost):.2f} | {max(lost):.2f} |")
    lines += ["", machine, ""]
    (folder / "accuracy.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/int8"), help="where trained models are kept")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with num_threads(1):
        machine = str(Machine.here(torch.device("cpu")))
        rows = [
            row
            for name in options.subjects
            for seed in options.seeds
            for row in measure(name, seed, SUBJECTS[name](seed, options.runs))
        ]
    write(rows, options.output, machine)


if __name__ == "__main__":
    main()
