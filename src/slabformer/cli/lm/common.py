"""What the verbs for language models share: transformers, and how a model is named and loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from slabformer._extras import check_installed, require
from slabformer.cli.parser import Parser
from slabformer.settings import DeviceOrAuto, NonEmptyStr

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

check_installed("transformers", extra="lm")
MODEL_HELP = "a folder that slab lm wrote, or any causal language model of transformers, by folder or hub name"


def quiet_transformers() -> None:
    """Bars for shards of weights are not for our users."""
    require("transformers", extra="lm").utils.logging.disable_progress_bar()
    logging.getLogger("datasets").setLevel(logging.ERROR)


def available_accelerator(name: str) -> torch.device:
    """The device called ``name``; "auto" is the accelerator where there is one.

    Raises:
        ValueError: If there is none of that name.
    """
    import torch

    from slabformer.cli.common import available_device

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return available_device(name)


def add_model_options(parser: Parser) -> None:
    """``MODEL``, where it runs and in which arithmetic."""
    parser.add_argument("model", type=NonEmptyStr, help=MODEL_HELP)
    parser.add_argument("--device", type=DeviceOrAuto, default="auto", metavar="DEVICE", help="device to run on")
    parser.add_argument("--bf16", action="store_true", help="use bfloat16 for weights and arithmetic")


def load(config: Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that :func:`add_model_options` describes, in eval mode, and its tokenizer.

    Raises:
        ValueError: If either is missing or they do not go together.
    """
    from slabformer.tasks.language.tokens import check_vocabulary, load_tokenizer

    model = load_model(config)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(tokenizer, model.config.vocab_size)
    return model, tokenizer


def load_model(config: Namespace) -> PreTrainedModel:
    """The model alone, for verbs that need no text.

    Raises:
        ValueError: If there is none, or its weights do not fit.
    """
    import torch

    from slabformer.tasks.language.folders import load_model_folder

    quiet_transformers()
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    return load_model_folder(config.model, dtype, available_accelerator(config.device))


def check_no_file(path: Path) -> None:
    """Refuse a file where a folder is to be written, before the work.

    Raises:
        NotADirectoryError: If there is one.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; give a folder to write")


def folder_to_write(path: Path, overwrite: bool) -> Path:
    """``path``, which holds no model yet: asked before the work, not after it.

    Raises:
        ValueError: If it holds one, and ``overwrite`` is not given.
        NotADirectoryError: If it is a file.
    """
    from slabformer.tasks.language.folders import holds_model

    check_no_file(path)
    if not overwrite and holds_model(path):
        raise ValueError(f"{path} holds a model already; give another folder, or --overwrite")
    return path
