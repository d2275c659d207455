"""Models of the zoo for MindSpore, by name, and their weights from and to torch."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slabformer._extras import require as require_extra
from slabformer.mindspore.convert import Cell, from_torch
from slabformer.mindspore.files import read_checkpoint, write_checkpoint
from slabformer.mindspore.layouts import check_fit, is_published, load_published_mindspore, to_published_mindspore
from slabformer.nn.controls import prepbn_modules
from slabformer.settings import NonEmptyStr, checked
from slabformer.surgery.fuse import fuse


@checked
def create_model(
    name: NonEmptyStr,
    fused: bool = False,
    pretrained: bool = False,
    *,
    folder: str | Path | None = None,
    **model_args: Any,
) -> Cell:
    """A model that timm knows, those of this library among them, as a cell, verified against torch.

    Args:
        name: "slab_deit_tiny", for example.
        fused: With every norm folded that can be. Norms that fade count as faded.
        pretrained: Whether to load its released weights; otherwise they are random.
        folder: For its source and its ``.ckpt``; by default a temporary one, deleted with the cell.
        model_args: As for ``timm.create_model``.

    Returns:
        A ``mindspore.nn.Cell`` in eval mode, for images of the model's own size, in batches of any size.

    Raises:
        ValueError: If timm does not know the name, or there is no norm to fuse.
        ImportError: See :func:`slabformer.mindspore.from_torch`.
    """
    model = torch_model(name, pretrained, **model_args)
    images = torch.randn(2, *input_size(model, model_args))
    if fused:
        for norm in prepbn_modules(model).values():
            norm.set_gamma(0.0)
        model, _ = fuse(model, images)
    if folder is not None:
        return from_torch(model, images, folder, name=name)
    temporary = tempfile.TemporaryDirectory(prefix="slabformer-mindspore-")
    cell = from_torch(model, images, temporary.name, name=name)
    # MindSpore reads the source when it compiles, for each new batch size
    weakref.finalize(cell, temporary.cleanup)
    return cell


def torch_model(name: str, pretrained: bool = False, **model_args: Any) -> nn.Module:
    """``timm.create_model`` in eval mode, with our models and an error that names what is near."""
    timm = require_extra("timm", "vision")
    from slabformer.models.registry import check_model_name

    check_model_name(name)
    return timm.create_model(name, pretrained=pretrained, **model_args).eval()


def input_size(model: Any, model_args: dict[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of a model's images."""
    channels, height, width = model.pretrained_cfg["input_size"]
    given = model_args.get("img_size")
    if given is not None:
        height, width = (given, given) if isinstance(given, int) else given
    return model_args.get("in_chans", channels), height, width


def load_into_torch(model: nn.Module, path: str | Path) -> None:
    """Load a ``.ckpt`` into a torch model, all of it or nothing: with torch's names, or in the published layout.

    Constants that MindSpore keeps beside the weights are not read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or names or shapes differ.
    """
    state = read_checkpoint(path)
    if is_published(state):
        load_published_mindspore(model, state)
        return
    own = model.state_dict()
    constants = {name for name, _ in model.named_buffers() if name not in own}
    state = {name: value for name, value in state.items() if name not in constants}
    wanted, given = ({name: tuple(value.shape) for name, value in held.items()} for held in (own, state))
    check_fit(wanted, given, type(model).__name__)
    model.load_state_dict(state)


def save_from_torch(model: nn.Module, path: str | Path, *, published: bool = False) -> None:
    """Write the weights of a torch model as a ``.ckpt``.

    Args:
        model: Whatever holds them.
        path: To write, whole or not at all.
        published: In the layout of the published checkpoint for MindSpore instead of torch's names.

    Raises:
        ValueError: In the published layout, if gamma is above 0.
    """
    write_checkpoint(to_published_mindspore(model) if published else model.state_dict(), path)
