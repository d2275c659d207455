"""`slab mindspore convert`: weights between .safetensors and .ckpt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from jsonargparse import Namespace

from slabformer.cli.mindspore.common import CKPT, add_model_options, load_torch_model
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import OutputFile


def parser() -> Parser:
    """Options of `slab mindspore convert`."""
    made = Parser(
        "slab mindspore convert",
        "Write the weights of a model as a .ckpt of MindSpore, or those of a .ckpt as a .safetensors file that all "
        "commands take. Every tensor must fit.",
        [
            "slab mindspore convert swin_tiny_prepbn --checkpoint s.ckpt -o s.safetensors",
            "slab mindspore convert model.safetensors --output model.ckpt",
        ],
    )
    add_model_options(made)
    made.add_argument(
        "--output", type=Annotated[Path, OutputFile(CKPT, ".safetensors")], required=True, help="the file"
    )
    made.add_argument(
        "--published", action="store_true", help="write a .ckpt in the layout that was published for MindSpore"
    )
    return made


def run(config: Namespace) -> Outcome:
    """Load strictly, and write."""
    from slabformer.mindspore.runtime import require
    from slabformer.mindspore.zoo import save_from_torch
    from slabformer.tasks.saved_model import save_model

    to_ckpt = config.output.suffix == CKPT
    if config.published and not to_ckpt:
        raise ValueError(f"--published is a layout of .ckpt files, not of {config.output}; leave it out")
    require()
    model, info = load_torch_model(config)
    if to_ckpt:
        save_from_torch(model, config.output, published=config.published)
    else:
        save_model(model, config.output, info)
    count = len(model.state_dict())
    data = {"model": info.model, "tensors": count, "published": config.published}
    return Outcome(data=data, shown=[f"{info.model}: {count} tensors"], files=[config.output])
