"""`slab lm fuse`: fold every norm of a language model into its neighbours, verify, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import RenderableType

from slabformer.cli.fuse import add_keep_option, fuse_table
from slabformer.cli.lm.common import add_model_options, folder_to_write, load_model
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FolderToWrite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parser() -> Parser:
    """Options of `slab lm fuse`."""
    made = Parser(
        "slab lm fuse",
        "Fold every norm into its neighbours, verify, save. MODEL comes from slab lm train, slab lm import, or "
        "anybody's Trainer with a ProgressiveCallback. Logits stay the same; hidden states do where --keep names their "
        "layers. A language model has no other methods that could be asked to stay.",
        ["slab lm fuse runs/llama_micro_prepbn --output fused", "slab lm fuse runs/books --untie -o fused --overwrite"],
    )
    add_model_options(made)
    made.add_argument("--output", type=FolderToWrite, required=True, help="folder to write")
    add_keep_option(made, "model.layers.*")
    made.add_argument("--untie", action="store_true", help="give a head that shares the embedding weights of its own")
    made.add_argument("--overwrite", action="store_true", help="replace the model that is there")
    return made


def run(config: Namespace) -> Outcome:
    """Fuse, verify, save; nothing is saved that differs."""
    from slabformer.tasks.language.folders import save_model_folder
    from slabformer.tasks.language.fusing import check_finished
    from slabformer.tasks.language.tokens import tokenizer_beside

    folder_to_write(config.output, config.overwrite)
    model = load_model(config)
    check_finished(model, config.model)
    tokenizer = tokenizer_beside(config.model, model.config.vocab_size)
    fused, data, shown = fuse_verified(model, untie=config.untie, keep=config.keep)
    save_model_folder(fused, tokenizer, config.output)
    return Outcome(data=data, shown=shown, files=[config.output])


def fuse_verified(
    model: PreTrainedModel, *, untie: bool, keep: Sequence[str] = ()
) -> tuple[PreTrainedModel, dict[str, Any], list[RenderableType]]:
    """``model`` without norms, held against it, and where they went, as data and for people."""
    from slabformer.surgery.verify import verify
    from slabformer.tasks.language.fusing import LogitsOf, fuse_language_model, tokens_for, what_stays

    fused, report = fuse_language_model(model, keep=keep, untie=untie)
    cases = [(tokens_for(model, 2, length, seed),) for seed, length in ((1, 16), (2, 7))]
    result = verify(LogitsOf(model), LogitsOf(fused), cases)
    shown: list[RenderableType] = [fuse_table(report), f"{report.summary()}\n{result}"]
    if stays := what_stays(model, report):
        shown.append(stays)
    return fused, {**report.to_dict(), "verify": asdict(result)}, shown
