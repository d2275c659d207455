"""An already trained LayerNorm model loses its norms: convert, fine-tune for 30 % of its budget, fuse, verify.

    python examples/convert_trained.py
    python examples/convert_trained.py --weights runs/quickstart/baseline.safetensors   # skip the first training

The loop is plain PyTorch, as it would be yours; slabformer is the lines with ``sf.``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slabformer as sf
from slabformer.tasks.classification.config import AugmentConfig, DataConfig
from slabformer.tasks.classification.data import Loader, create_loader

SHARE_OF_BUDGET = 0.3
DATA = DataConfig(path="digits", image_size=16, crop_pct=1.0, mean=(0.3,) * 3, std=(0.37,) * 3)


@dataclass(frozen=True)
class Outcome:
    """Accuracies on the 360 test digits, and how far the fused model is from the unfused."""

    before: float
    after: float
    fused_difference: float
    norms_left: int


def main(epochs: int = 60, weights: Path | None = None, seed: int = 0) -> Outcome:
    """Train or load the LayerNorm model, then take its norms away."""
    torch.manual_seed(seed)
    train_loader, test_loader = (
        create_loader(DATA, AugmentConfig(policy="light"), split, batch_size=128, seed=seed)
        for split in ("train", "validation")
    )
    model = timm.create_model("deit_micro", img_size=16, patch_size=4)
    if weights is None:
        fit(model, train_loader, epochs)
    else:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    before = accuracy(model, test_loader)

    sf.convert_norms_(model)
    sf.fit_norms_(model, train_loader, num_batches=4)
    fit(model, train_loader, round(SHARE_OF_BUDGET * epochs))
    sf.recalibrate_(model, train_loader)
    images = next(iter(test_loader))[0]
    fused, report = sf.fuse(model.eval(), images)
    difference = sf.verify(model, fused, images).max_rel
    return Outcome(before, accuracy(fused, test_loader), difference, report.num_kept)


def fit(model: nn.Module, loader: Loader, epochs: int, lr: float = 2e-3) -> None:
    """Train ``model``; if it holds PRepBNs, their LayerNorms fade over the first 20 % of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * len(loader)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    has_norms_to_fade = any(isinstance(module, sf.PRepBN) for module in model.modules())
    schedule = sf.ProgressiveSchedule(model, steps, fade=0.2, optimizer=optimizer) if has_norms_to_fade else None
    model.train()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            if schedule is not None:
                schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, loader: Loader) -> float:
    """Share of the loader's images that ``model`` in eval mode gets right."""
    model.eval()
    right: list[Tensor] = [model(images).argmax(-1) == labels for images, labels in loader]
    return torch.cat(right).double().mean().item()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--epochs", type=int, default=60, help="of the first training")
    arguments.add_argument("--weights", type=Path, help="safetensors file of a trained deit_micro (16 px, patch 4)")
    outcome = main(**vars(arguments.parse_args()))
    print(f"with LayerNorm {outcome.before:.2%}, without any norm {outcome.after:.2%}")
    print(f"fused equals unfused within {outcome.fused_difference:.1e}; {outcome.norms_left} norms left")
