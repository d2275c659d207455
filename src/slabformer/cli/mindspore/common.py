"""What the verbs of `slab mindspore` share: a model in torch, its weights perhaps from a .ckpt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import Namespace

from slabformer.cli.common import MODEL_HELP, add_weight_options, load, load_with_weights
from slabformer.cli.parser import Parser
from slabformer.settings import NonEmptyStr

if TYPE_CHECKING:
    from torch import nn

    from slabformer.tasks.saved_model import ModelInfo

CKPT = ".ckpt"


def add_model_options(parser: Parser) -> None:
    """``MODEL``, and where its weights come from."""
    parser.add_argument("model", type=NonEmptyStr, help=MODEL_HELP)
    add_weight_options(
        parser,
        checkpoint="weights of MODEL: a .ckpt, with torch's names or in the layout that was published for MindSpore; "
        "or published weights (.pth) for a model given by name",
    )


def load_torch_model(config: Namespace) -> tuple[nn.Module, ModelInfo]:
    """The torch model that the options describe, with weights, in eval mode, and what it is.

    Raises:
        ValueError: If the checkpoint is another model's, or there is none for a model given by name.
        FileNotFoundError: If a file is missing.
    """
    if config.checkpoint is None or config.checkpoint.suffix != CKPT:
        return load_with_weights(config)
    if config.pretrained:
        raise ValueError("--checkpoint and --pretrained exclude each other; give one")
    from slabformer.mindspore.zoo import load_into_torch

    without = Namespace(**vars(config))
    without.checkpoint = None
    model, info = load(without)
    load_into_torch(model, config.checkpoint)
    return model.eval(), info
