"""``.ckpt`` files: read and written whole or not at all, and loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slabformer._files import check_readable, replaced
from slabformer.mindspore.layouts import State, check_fit
from slabformer.mindspore.runtime import require

Cell = Any


def read_checkpoint(path: str | Path) -> State:
    """Names and tensors in a ``.ckpt``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If MindSpore did not write it.
    """
    mindspore = require()
    check_readable(path, "checkpoint")
    try:
        found = mindspore.load_checkpoint(str(path))
    except Exception as error:  # bytes that are no checkpoint raise whatever they look like
        raise ValueError(f"cannot read {path} as a checkpoint of MindSpore: it is truncated, or no .ckpt") from error
    return {name: torch.from_numpy(stored.asnumpy().copy()) for name, stored in found.items()}


def write_checkpoint(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors to a ``.ckpt``, all of them or nothing."""
    mindspore = require()
    rows = [{"name": name, "data": to_mindspore(tensor)} for name, tensor in state.items()]
    with replaced(Path(path)) as temporary:
        partial = temporary.with_name("partial.ckpt")  # MindSpore adds the suffix where it is missing
        mindspore.save_checkpoint(rows, str(partial))
        partial.chmod(0o600)
        partial.replace(temporary)


def to_mindspore(tensor: Tensor) -> Any:
    """A tensor of torch as one of MindSpore."""
    mindspore = require()
    if tensor.dtype == torch.bfloat16:
        return mindspore.Tensor(tensor.float().numpy()).astype(mindspore.bfloat16)
    return mindspore.Tensor(tensor.detach().cpu().contiguous().numpy())


def state_of(cell: Cell, *, constants: bool = False) -> State:
    """Tensors of a cell by their names; those that are in no state dict of torch only if asked for."""
    return {
        stored.name: torch.from_numpy(stored.asnumpy().copy())
        for _, stored in cell.parameters_and_names()
        if constants or not is_constant(stored)
    }


def is_constant(stored: Any) -> bool:
    """Whether a parameter follows from the architecture and is in no state dict of torch."""
    return getattr(stored, "is_constant", False)


def load(cell: Cell, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load a ``.ckpt``, or tensors by name, into a cell: all of them or nothing.

    Constants that the cell has already may be missing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or names or shapes differ.
    """
    state = source if isinstance(source, Mapping) else read_checkpoint(source)
    held = {stored.name: stored for _, stored in cell.parameters_and_names()}
    known = {name for name, stored in held.items() if getattr(stored, "is_set", False)}
    own = {name: tuple(stored.shape) for name, stored in held.items()}
    check_fit(own, {name: tuple(value.shape) for name, value in state.items()}, type(cell).__name__, known)
    mindspore = require()
    for name, value in state.items():
        stored = held[name]
        stored.set_data(to_mindspore(value).astype(stored.dtype))
        if is_constant(stored):
            stored.is_set = True
    del mindspore
