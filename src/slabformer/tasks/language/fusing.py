"""A language model without norms: fused, and saved so that transformers reads it back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import slabformer as sf
from slabformer.models.llama import SlabLlamaForCausalLM
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.tasks.engine.checkpoint import LAST_FILE
from slabformer.tasks.engine.documents import parse_json, read_mapping
from slabformer.tasks.language.callback import ProgressiveCallback
from slabformer.tasks.language.trainer import latest_checkpoint

#: batch and length of the two texts that a fused model is traced with
SHAPES = ((2, 9), (1, 5))


def fuse_language_model(
    model: PreTrainedModel, *, keep: Sequence[str] = (), untie: bool = False, allow_gamma: bool = False
) -> tuple[PreTrainedModel, sf.FuseReport]:
    """A copy of ``model`` whose norms are folded into q, k, v, gate, up and the head.

    Args:
        model: A causal language model in eval mode.
        keep: Modules whose outputs must stay, as :func:`slabformer.fuse` takes them.
        untie: Give the head weights of its own, where it shares the embedding's: else the last norm stays, since a
            shared weight cannot take it over. Outputs are the same; the model grows by the size of the head.
        allow_gamma: Fuse PRepBNs that still hold their norm, as RepBN.

    Raises:
        ValueError: As :func:`slabformer.fuse`.
    """
    options: Any = {"keep": keep, "untie": untie, "allow_gamma": allow_gamma}
    fused, report = sf.fuse(model, _examples(model), {"use_cache": False}, **options)
    assert isinstance(fused, PreTrainedModel)
    _note_fused_(fused, report)
    return fused, report


def fuse_language_model_(
    model: PreTrainedModel, place: Path, *, keep: Sequence[str] = (), untie: bool = False
) -> sf.FuseReport:
    """:func:`fuse_language_model` in place, new weights in files in the folder ``place``, which must outlive the model.

    Where ``model`` maps its own weights from files, as :func:`~slabformer.tasks.language.folders.load_mapped` does, no
    more than a layer of it is held in memory.

    Raises:
        ValueError: As :func:`slabformer.fuse`.
        OSError: If a file cannot be written.
    """
    numbers = itertools.count()

    def on_disk(value: Tensor) -> Tensor:
        path = place / f"{next(numbers)}.safetensors"
        save_file({"value": value}, path)
        return load_file(path)["value"]

    report = sf.fuse_(model, _examples(model), {"use_cache": False}, keep=keep, untie=untie, store=on_disk)
    _note_fused_(model, report)
    return report


def _examples(model: PreTrainedModel) -> list[tuple[Tensor]]:
    return [(tokens_for(model, *shape),) for shape in SHAPES]


def _note_fused_(fused: PreTrainedModel, report: sf.FuseReport) -> None:
    if isinstance(fused, SlabLlamaForCausalLM) and not report.num_kept:
        fused.config.norm = "folded"  # so that from_pretrained builds it without norms


def what_stays(model: PreTrainedModel, report: sf.FuseReport) -> str:
    """Which norm was kept and what would help, in words; empty where all are gone."""
    kept = [outcome for outcome in report if outcome.action == "kept"]
    if not kept:
        return ""
    advice = "; --untie gives the head weights of its own, and takes it too" if _tied_head(model) else ""
    return f"{kept[0].name} stays as a scale and shift ({kept[0].reason}){advice}"


def _tied_head(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


class LogitsOf(nn.Module):
    """A language model as a function from tokens ``(B, N)`` to logits ``(B, N, V)``, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def tokens_for(model: PreTrainedModel, batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens ``(B, N)`` of the model's vocabulary, on its device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch_size, length), generator=generator).to(model.device)


def check_finished(model: nn.Module, folder: str | Path) -> None:
    """Refuse a model without norms to fold, and one whose schedule has not ended, and say how far it is.

    Raises:
        ValueError: If there is no RepBN, or gamma is above 0.
    """
    if not repbn_modules(model):
        raise ValueError(
            f"{folder} holds no RepBN to fold: it is fused already, or was not converted; "
            "slabformer.convert_norms_ and training come first"
        )
    gamma = max((float(norm.gamma) for norm in prepbn_modules(model).values()), default=0.0)
    if not gamma:
        return
    missing = steps_missing_in(Path(folder))
    steps = "" if missing is None else f"; {missing} more steps of its run would finish its schedule"
    raise ValueError(f"{folder} still holds its RMSNorms (gamma is {gamma:.3g}){steps}; train it to the end")


def steps_missing_in(folder: Path) -> int | None:
    """Optimizer steps until gamma is 0, of a Trainer's checkpoint or output folder; None where it does not say."""
    checkpoint = folder if (folder / LAST_FILE).is_file() else latest_checkpoint(folder)
    if checkpoint is None:
        return None
    state = read_mapping(checkpoint / LAST_FILE, parse_json)
    try:
        schedule = state["stateful_callbacks"][ProgressiveCallback.__name__]["args"]
        end = round((schedule["warmup"] + schedule["fade"]) * state["max_steps"])
        return max(0, end - state["global_step"])
    except (KeyError, TypeError):
        return None
