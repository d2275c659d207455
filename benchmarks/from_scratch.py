"""Which norm trains a model from scratch: a pre-norm ViT of 12 layers on Fashion-MNIST, at three learning rates.

    python benchmarks/from_scratch.py                                  # three seeds, three rates, 3 epochs: 45 runs
    python benchmarks/from_scratch.py --steps 300 --seeds 0 --rates 0.01 --norms layernorm batchnorm prepbn_fade20
    python benchmarks/from_scratch.py --summarise                      # table and plot of the runs that are there

Every run is a file of its own in benchmarks/results/conversion/from_scratch; runs that are there are not run again, and
one that was interrupted goes on from its last hundred steps. Width 64, patches of 4 pixels, batches of 128, AdamW with
decay 0.05 on matrices, 5 % warm-up, then a cosine to 0, gradients clipped at 5. LayerNorm fades over the first 20 % or
80 % of the steps (prepbn_fade20, prepbn_fade80; the published start fades over 80 %). Accuracy is that of the 10,000
test images after recalibration; BatchNorm, RepBN and PRepBN in their deployed form.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
from subjects import FOLDER, fashion_mnist
from torch import Tensor, nn
from torch.nn import functional as F

import slabformer as sf
from slabformer.measure.timing import Machine

RESULTS = Path(__file__).parent / "results" / "conversion" / "from_scratch"
BATCH = 128
#: name -> what is done to timm's model
NORMS: dict[str, Callable[[nn.Module], object]] = {
    "layernorm": lambda model: None,
    "batchnorm": lambda model: sf.convert_norms_(model, norm="batchnorm"),
    "repbn": lambda model: sf.convert_norms_(model, norm="repbn"),
    "prepbn_fade20": sf.convert_norms_,
    "prepbn_fade80": sf.convert_norms_,
    "prepbn_published": lambda model: sf.convert_norms_(model, eta="published"),
}
#: share of training over which LayerNorm fades
FADES = {"prepbn_fade20": 0.2, "prepbn_fade80": 0.8, "prepbn_published": 0.8}
SAVE_EVERY = 100


@dataclass(frozen=True)
class Run:
    """What tells a run from the others."""

    norm: str
    lr: float
    seed: int
    steps: int

    @property
    def path(self) -> Path:
        """Where its result is."""
        return RESULTS / f"{self.norm}-{self.lr:g}-{self.seed}-{self.steps}.json"

    @property
    def checkpoint(self) -> Path:
        """Where it goes on from."""
        return FOLDER / "runs" / "from_scratch" / self.path.with_suffix(".pt").name


def new_model(run: Run) -> nn.Module:
    """The same initial weights for each norm."""
    torch.manual_seed(run.seed)
    sizes = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 12, "num_heads": 4}
    model = timm.models.VisionTransformer(**sizes, num_classes=10)
    NORMS[run.norm](model)
    return model


def batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            yield scaled(images[chosen]), labels[chosen]


def scaled(images: Tensor) -> Tensor:
    """Bytes to ``(N, 1, 28, 28)`` of mean 0 and deviation 1."""
    return (images.unsqueeze(1).float() / 255 - 0.286) / 0.353


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Matrices decay, vectors and norms do not."""
    spared = set(sf.norm_parameters(model))
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and name not in spared]
    others = [p for name, p in named if p.ndim <= 1 or name in spared]
    return [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


class Training:
    """One run with everything that changes on the way."""

    def __init__(self, run: Run, model: nn.Module) -> None:
        self.run, self.model = run, model.train()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=run.lr)
        warmup = max(1, run.steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / run.steps)),
        )
        self.fade: sf.ProgressiveSchedule | None = None
        if run.norm in FADES:
            self.fade = sf.ProgressiveSchedule(self.model, run.steps, fade=FADES[run.norm], optimizer=self.optimizer)
        self.losses: list[float] = []
        self.largest = self.seconds = 0.0

    def stateful(self) -> dict[str, Any]:
        """What a checkpoint holds, beside plain values."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "fade": self.fade}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self) -> None:
        """Write the checkpoint."""
        state = {name: part.state_dict() for name, part in self.stateful().items()}
        self.run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.run.checkpoint.with_suffix(".partial")
        torch.save({**state, "losses": self.losses, "largest": self.largest, "seconds": self.seconds}, partial)
        partial.replace(self.run.checkpoint)

    def load(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.run.checkpoint.exists():
            state = torch.load(self.run.checkpoint, weights_only=True)
            for name, part in self.stateful().items():
                part.load_state_dict(state[name])
            self.losses, self.largest, self.seconds = state["losses"], state["largest"], state["seconds"]

    def step(self, x: Tensor, y: Tensor) -> None:
        """One batch."""
        begun = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.largest = max(self.largest, float(nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)))
        self.optimizer.step()
        self.schedule.step()
        if self.fade is not None:
            self.fade.step()
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - begun


def train(run: Run, model: nn.Module | None = None) -> dict[str, object]:
    """One run: losses on the way, the largest gradient, accuracy at the end; it ends early where the loss is NaN.

    A ``model`` that is given is trained in place of the ViT, without checkpoints, and left in eval mode; it has the
    norm of ``run`` already.
    """
    images, labels = fashion_mnist("train")
    kept = model is None
    training = Training(run, new_model(run) if model is None else model)
    if kept:
        training.load()
    losses, model = training.losses, training.model
    for x, y in itertools.islice(batches(images, labels, run.seed), len(losses), run.steps):
        training.step(x, y)
        if not math.isfinite(losses[-1]):
            break
        if kept and len(losses) % SAVE_EVERY == 0:
            training.save()
    if run.norm != "layernorm" and math.isfinite(losses[-1]):
        sf.recalibrate_(model, (x for x, _ in batches(images, labels, 1)), 20)
    return {
        **asdict(run),
        "accuracy": accuracy(model.eval()),
        "final_loss": round(mean(losses[-20:]), 4),
        "largest_gradient": float(f"{training.largest:.3g}"),
        "losses": [round(mean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)],
        "seconds": round(training.seconds, 1),
        "machine": asdict(Machine.here(torch.device("cpu"))),
    }


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test images that are told right."""
    images, labels = fashion_mnist("test")
    right = [model(scaled(x)).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return round(float(torch.cat(right).float().mean()), 4)


def finished() -> list[dict[str, object]]:
    """Results of all runs that are there."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def summarise() -> None:
    """Write table and plot beside the runs."""
    found: dict[tuple[int, float, str], list[dict[str, object]]] = defaultdict(list)
    for each in finished():
        found[each["steps"], each["lr"], each["norm"]].append(each)
    lines = [
        "| steps | learning rate | norm | accuracy (each seed) | mean | largest gradient |",
        "|---|---|---|---|---|---|",
    ]
    for (steps, lr, norm), each in sorted(found.items()):
        rates = [float(one["accuracy"]) for one in each]
        gradient = max(float(one["largest_gradient"]) for one in each)
        cells = (
            steps,
            f"{lr:g}",
            norm,
            " ".join(f"{rate:.4f}" for rate in rates),
            f"{mean(rates):.4f}",
            f"{gradient:.3g}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(found)


def draw(found: dict[tuple[int, float, str], list[dict[str, object]]]) -> None:
    """Loss over steps, one panel for each rate and length."""
    import matplotlib.pyplot as plt

    panels = sorted({key[:2] for key in found})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for index, norm in enumerate(NORMS):
            for one in found.get((*panel, norm), []):
                label = norm if one["seed"] == found[(*panel, norm)][0]["seed"] else None
                axis.plot(
                    [10 * i for i in range(len(one["losses"]))], one["losses"], color=f"C{index}", label=label, lw=1
                )
        axis.set(title=f"{panel[0]} steps, rate {panel[1]:g}", xlabel="step", ylabel="training loss", ylim=(0.2, 2.5))
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3 * (60_000 // BATCH), help="1,404 are three epochs")
    parser.add_argument("--summarise", action="store_true", help="run nothing")
    asked = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed, lr, norm in itertools.product(asked.seeds, asked.rates, asked.norms):
        run = Run(norm, lr, seed, asked.steps)
        if not asked.summarise and not run.path.exists():
            result = train(run)
            run.path.write_text(json.dumps(result) + "\n")
            run.checkpoint.unlink(missing_ok=True)
            print({key: value for key, value in result.items() if key not in ("losses", "machine")}, flush=True)
    summarise()


if __name__ == "__main__":
    main()
