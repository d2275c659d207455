"""`slab lm fuse`: fold every norm of a language model into its neighbours, verify, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import RenderableType

from slabformer.cli.fuse import add_keep_option, fuse_table
from slabformer.cli.lm.common import add_model_options, folder_to_write, load_model, quiet_transformers
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FolderToWrite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slabformer.surgery.fuse import FuseReport


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
    made.add_argument(
        "--stream",
        action="store_true",
        help="read and write weights layer by layer, in the dtype that they are stored in, for models that do not fit "
        "into memory; takes twice the model's size on the output's disk while it runs",
    )
    made.add_argument("--overwrite", action="store_true", help="replace the model that is there")
    return made


def run(config: Namespace) -> Outcome:
    """Fuse, verify, save; nothing is saved that differs."""
    from slabformer.tasks.language.folders import save_model_folder
    from slabformer.tasks.language.fusing import check_finished
    from slabformer.tasks.language.tokens import tokenizer_beside

    folder_to_write(config.output, config.overwrite)
    model = _load_mapped(config) if config.stream else load_model(config)
    check_finished(model, config.model)
    tokenizer = tokenizer_beside(config.model, model.config.vocab_size)
    if config.stream:
        return _streamed(model, tokenizer, config)
    fused, data, shown = fuse_verified(model, untie=config.untie, keep=config.keep)
    save_model_folder(fused, tokenizer, config.output)
    return Outcome(data=data, shown=shown, files=[config.output])


def _load_mapped(config: Namespace) -> PreTrainedModel:
    from slabformer.tasks.language.folders import load_mapped

    if config.bf16:
        raise ValueError("--stream keeps the dtype that the weights are stored in; leave out --bf16")
    if config.device not in ("auto", "cpu"):
        raise ValueError(f"--stream runs on the CPU, whose memory maps files; leave out --device {config.device}")
    quiet_transformers()
    return load_mapped(config.model)


def _streamed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: Namespace) -> Outcome:
    """As :func:`run`, on two models whose weights lie in files: no more than a layer is held in memory."""
    from slabformer._files import errors_of, workspace
    from slabformer.tasks.language.folders import load_mapped, save_model_folder
    from slabformer.tasks.language.fusing import fuse_language_model_

    config.output.mkdir(parents=True, exist_ok=True)
    with errors_of(config.output), workspace(config.output) as place:
        fused = load_mapped(config.model)
        report = fuse_language_model_(fused, place, keep=config.keep, untie=config.untie)
        data, shown = _verified(model, fused, report)
        save_model_folder(fused, tokenizer, config.output)
    return Outcome(data=data, shown=shown, files=[config.output])


def fuse_verified(
    model: PreTrainedModel, *, untie: bool, keep: Sequence[str] = ()
) -> tuple[PreTrainedModel, dict[str, Any], list[RenderableType]]:
    """``model`` without norms, held against it, and where they went, as data and for people."""
    from slabformer.tasks.language.fusing import fuse_language_model

    fused, report = fuse_language_model(model, keep=keep, untie=untie)
    return fused, *_verified(model, fused, report)


def _verified(
    model: PreTrainedModel, fused: PreTrainedModel, report: FuseReport
) -> tuple[dict[str, Any], list[RenderableType]]:
    from slabformer.surgery.verify import verify
    from slabformer.tasks.language.fusing import LogitsOf, tokens_for, what_stays

    cases = [(tokens_for(model, 2, length, seed),) for seed, length in ((1, 16), (2, 7))]
    result = verify(LogitsOf(model), LogitsOf(fused), cases)
    shown: list[RenderableType] = [fuse_table(report), f"{report.summary()}\n{result}"]
    if stays := what_stays(model, report):
        shown.append(stays)
    return {**report.to_dict(), "verify": asdict(result)}, shown
