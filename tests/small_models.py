"""Trained-looking micro models for tests of deployment and the command line."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import nn

import slabformer as sf
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.saved_model import ModelInfo, save_model

IMAGES = (3, 16, 16)
MODEL_ARGS = {"img_size": 16, "num_classes": 5}


def trained_looking(name: str = "slab_deit_micro", seed: int = 0) -> nn.Module:
    """``name`` for 16x16 pixels and 5 classes in eval mode, gamma 0, every norm redrawn."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **MODEL_ARGS)
    sf.testing.randomize_norms_(model, seed)
    with torch.no_grad():
        for norm in prepbn_modules(model).values():
            norm.set_gamma(0.0)
    return model.eval()


def images(batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    """Random images ``(B, 3, 16, 16)``."""
    return torch.randn(batch_size, *IMAGES, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, name: str = "slab_deit_micro", seed: int = 0) -> Path:
    """:func:`trained_looking` in a file at ``path``."""
    info = ModelInfo(model=name, model_args=dict(MODEL_ARGS), class_names=list("abcde"), input_size=IMAGES)
    save_model(trained_looking(name, seed), path, info)
    return path
