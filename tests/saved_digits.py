"""A small classifier of digits on disk, untrained, with statistics that are not fresh."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import nn

import slabformer as sf
from slabformer.nn import PRepBN
from slabformer.tasks.saved_model import ModelInfo, save_model

INFO = ModelInfo(
    model="slab_deit_micro",
    model_args={"img_size": 16, "num_classes": 10},
    class_names=[str(digit) for digit in range(10)],
    input_size=(3, 16, 16),
    mean=(0.3, 0.3, 0.3),
    std=(0.4, 0.4, 0.4),
    crop_pct=1.0,
)


def digits_model(gamma: float = 0.0) -> nn.Module:
    """The model itself, in eval mode, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(INFO.model, **INFO.model_args).eval()
    sf.testing.randomize_norms_(model)
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.set_gamma(gamma)
    return model


def save_digits_model(path: Path, gamma: float = 0.0) -> Path:
    """Write it to ``path``."""
    save_model(digits_model(gamma), path, INFO)
    return path
