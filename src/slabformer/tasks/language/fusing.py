"""A language model without norms: fused, and saved so that transformers reads it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

import slabformer as sf
from slabformer.models.llama import SlabLlamaForCausalLM
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.language.trainer import LAST_FILE

#: batch and length of the two texts that a fused model is traced with
SHAPES = ((2, 9), (1, 5))


def fuse_language_model(
    model: PreTrainedModel, *, untie: bool = False, allow_gamma: bool = False
) -> tuple[PreTrainedModel, sf.FuseReport]:
    """A copy of ``model`` whose norms are folded into q, k, v, gate, up and the head.

    Args:
        model: A causal language model in eval mode.
        untie: Give the head weights of its own, where it shares the embedding's: else the last norm stays, since a
            shared weight cannot take it over. Outputs are the same; the model grows by the size of the head.
        allow_gamma: Fuse PRepBNs that still hold their norm, as RepBN.

    Raises:
        ValueError: As :func:`slabformer.fuse`.
    """
    if untie:
        model = untied(model)
    examples = [(tokens_for(model, *shape),) for shape in SHAPES]
    fused, report = sf.fuse(model, examples, {"use_cache": False}, allow_gamma=allow_gamma)
    assert isinstance(fused, PreTrainedModel)
    if isinstance(fused, SlabLlamaForCausalLM) and not report.num_kept:
        fused.config.norm = "folded"  # so that from_pretrained builds it without norms
    return fused, report


def check_saveable(model: PreTrainedModel, report: sf.FuseReport) -> None:
    """Refuse what ``from_pretrained`` could not read back.

    Raises:
        ValueError: If a norm was kept, or the model is not a :class:`SlabLlamaForCausalLM`.
    """
    if not isinstance(model, SlabLlamaForCausalLM):
        raise ValueError(
            f"transformers cannot build a fused {type(model).__name__} from its configuration; "
            "use slabformer.save_fused and load_fused"
        )
    kept = [outcome for outcome in report if outcome.action == "kept"]
    if kept:
        tied = model.config.tie_word_embeddings
        advice = "pass --untie to give the head weights of its own" if tied else "nothing is saved"
        raise ValueError(f"{kept[0].name} was kept ({kept[0].reason}); {advice}")


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` whose head no longer shares the embedding's weights; ``model`` itself if it never did."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight is not embedding.weight:
        return model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    copied: Any = type(model)(config)
    copied.to(device=head.weight.device, dtype=head.weight.dtype).load_state_dict(state)
    return copied.train(model.training)


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
    """Refuse a model whose schedule has not ended, and say how far it is.

    Raises:
        ValueError: If gamma is above 0.
    """
    gamma = max((float(norm.gamma) for norm in prepbn_modules(model).values()), default=0.0)
    if not gamma:
        return
    missing = steps_missing_in(Path(folder))
    steps = "" if missing is None else f"; {missing} more steps of its run would finish its schedule"
    raise ValueError(f"{folder} still holds its RMSNorms (gamma is {gamma:.3g}){steps}; train it to the end")


def steps_missing_in(folder: Path) -> int | None:
    """Optimizer steps until gamma is 0, of a checkpoint inside a run's folder; None where that is not written down."""
    state, config = folder / LAST_FILE, folder.parent / "config.yaml"
    if not (state.is_file() and config.is_file()):
        return None
    run: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    end = round((run["gamma"]["warmup"] + run["gamma"]["fade"]) * run["steps"])
    return max(0, end - json.loads(state.read_text(encoding="utf-8"))["global_step"])
