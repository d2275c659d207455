"""The published implementation's reference outputs and state dicts, from `golden/`."""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

_spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
assert _spec is not None
assert _spec.loader is not None
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)


def description(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def published_state(name: str) -> dict[str, Tensor]:
    """State dict of a published model, filled from its names, counters at zero; the caller's to change."""
    return {key: value.clone() for key, value in _filled(name).items()}


@lru_cache(maxsize=2)  # drawing tens of millions of numbers takes seconds
def _filled(name: str) -> dict[str, Tensor]:
    state = {}
    for key, (shape, dtype) in description(name)["state_dict"].items():
        floating = dtype == "float32"
        state[key] = torch.from_numpy(fill.values(key, shape)).float() if floating else torch.zeros(shape).long()
    return state


def reference(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}
