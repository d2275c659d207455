"""`slab lm fuse`: fold every norm of a language model into its neighbours, verify, save."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from slabformer.cli.common import console
from slabformer.cli.fuse import fuse_table
from slabformer.cli.lm.common import add_model_options, folder_to_write, load_model
from slabformer.settings import FolderToWrite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parser() -> ArgumentParser:
    """Options of `slab lm fuse`."""
    made = ArgumentParser(
        prog="slab lm fuse",
        description="Fold every norm into its neighbours, verify, save. MODEL comes from slab lm train, "
        "slab lm import, or anybody's Trainer with a ProgressiveCallback.",
    )
    add_model_options(made)
    made.add_argument("--output", type=FolderToWrite, required=True, help="folder to write")
    made.add_argument("--untie", action="store_true", help="give a head that shares the embedding weights of its own")
    made.add_argument("--overwrite", action="store_true", help="replace the model that is there")
    return made


def run(config: Namespace) -> None:
    """Fuse, verify, print, save; nothing is saved that differs."""
    from slabformer.tasks.language.folders import save_model_folder
    from slabformer.tasks.language.fusing import check_finished
    from slabformer.tasks.language.tokens import tokenizer_beside

    folder_to_write(config.output, config.overwrite)
    model = load_model(config)
    check_finished(model, config.model)
    tokenizer = tokenizer_beside(config.model, model.config.vocab_size)
    save_model_folder(fuse_verified(model, untie=config.untie), tokenizer, config.output)
    console().print(f"saved {config.output}", soft_wrap=True)


def fuse_verified(model: PreTrainedModel, *, untie: bool) -> PreTrainedModel:
    """``model`` without norms, held against it; prints where they went, and which had to stay."""
    from slabformer.surgery.verify import verify
    from slabformer.tasks.language.fusing import LogitsOf, fuse_language_model, tokens_for, what_stays

    fused, report = fuse_language_model(model, untie=untie)
    output = console()
    output.print(fuse_table(report))
    cases = [(tokens_for(model, 2, length, seed),) for seed, length in ((1, 16), (2, 7))]
    result = verify(LogitsOf(model), LogitsOf(fused), cases)
    output.print(f"{report.summary()}\n{result}")
    if stays := what_stays(model, report):
        output.print(stays, soft_wrap=True)
    return fused
