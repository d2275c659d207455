"""`slab mindspore verify`: what was exported for MindSpore against the torch model that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from slabformer.cli.mindspore.common import CKPT, add_model_options, load_torch_model
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.cli.verify import add_comparison_options, comparison
from slabformer.settings import ExistingPath

if TYPE_CHECKING:
    from torch import nn


def parser() -> Parser:
    """Options of `slab mindspore verify`."""
    from slabformer._defaults import RTOL

    made = Parser(
        "slab mindspore verify",
        "Compare the outputs of a folder of `slab mindspore export` with PyTorch's; exit code 1 when they differ by "
        "more than --rtol. The source in the folder is run: give folders of your own alone.",
        [
            "slab mindspore verify model.safetensors exported",
            "slab mindspore verify model.safetensors exported/a.py --images photos/",
        ],
    )
    add_model_options(made)
    made.add_argument(
        "candidate", type=ExistingPath, help="a folder with a source and its .ckpt, that source, or a .mindir file"
    )
    add_comparison_options(made, RTOL)
    return made


def run(config: Namespace) -> Outcome:
    """The differences; a fault if they are too large."""
    from slabformer.mindspore.mindir import SUFFIX, load_mindir
    from slabformer.mindspore.runtime import graph_mode, require

    require()
    is_mindir = config.candidate.suffix == SUFFIX
    source = config.candidate if is_mindir else source_in(config.candidate)
    model, info = load_torch_model(config)
    with graph_mode():
        return comparison(config, model, load_mindir(source) if is_mindir else load_source(source), info)


def load_source(source: Path) -> nn.Module:
    """The model in a source, with the weights beside it, where torch wants a module."""
    from slabformer.mindspore.convert import build, runtime_of
    from slabformer.mindspore.files import load

    cell = build(source)
    load(cell, source.with_suffix(CKPT))
    return runtime_of(cell)


def source_in(path: Path) -> Path:
    """The source that ``path`` is or holds.

    Raises:
        ValueError: If it holds none, or several.
        FileNotFoundError: If there is no .ckpt beside it.
    """
    found = sorted(path.glob("*.py")) if path.is_dir() else [path]
    if len(found) != 1 or found[0].suffix != ".py":
        what = f"{len(found)} sources" if path.is_dir() else "no source"
        raise ValueError(f"{path} holds {what} (.py) of a model for MindSpore; give one, with its {CKPT} beside it")
    if not found[0].with_suffix(CKPT).is_file():
        raise FileNotFoundError(f"there is no {found[0].with_suffix(CKPT)}, the weights of {found[0].name}")
    return found[0]
