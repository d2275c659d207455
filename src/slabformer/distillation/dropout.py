"""A student in train mode without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from slabformer._torch import NormBase
from slabformer.nn import PRepBN

#: in the names of modules and of their settings: Dropout, DropPath, attn_drop, layerdrop, StochasticDepth
_NAMES = ("drop", "stochastic")


def switch_dropout_off_(model: nn.Module) -> None:
    """Put whatever drops into eval mode, until the next ``train()`` of ``model``: dropout, drop path, attention.

    It lasts beyond the forward, since activation checkpointing computes a part of it again in the backward. Norms keep
    their mode, and so do modules that transformers checkpoints by their mode.
    """
    norms = {part for module in model.modules() if isinstance(module, PRepBN) for part in module.modules()}
    for module in model.modules():
        if module in norms or isinstance(module, NormBase) or getattr(module, "gradient_checkpointing", False):
            continue
        if _is_named(type(module).__name__) or any(_drops(name, value) for name, value in _settings(module)):
            module.training = False


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What it may read when it drops something itself: its attributes, its submodules, transformers' configuration."""
    yield from vars(module).items()
    yield from module.named_children()
    yield from getattr(module.__dict__.get("config"), "__dict__", {}).items()


def _drops(name: str, value: Any) -> bool:
    probability = getattr(value, "p", None) if isinstance(value, nn.Module) else value
    return _is_named(name) and isinstance(probability, float) and probability > 0


def _is_named(name: str) -> bool:
    return any(part in name.lower() for part in _NAMES)
