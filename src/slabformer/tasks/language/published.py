"""The published LLaMA's folder, as its hub repository holds it, into ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from slabformer.models.llama import SlabLlamaConfig, SlabLlamaForCausalLM
from slabformer.models.weights.official import load_published
from slabformer.settings import PositiveInt, check, shown
from slabformer.tasks.engine.documents import read_json
from slabformer.tasks.language.tokens import tokenizer_beside

WEIGHTS, CONFIG = "pytorch_model.bin", "config.json"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
#: what else is taken over; class names and code that a configuration may point to are not
OPTIONAL = (
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_theta", "rope_scaling"),
)


def import_published(folder: Path) -> tuple[SlabLlamaForCausalLM, PreTrainedTokenizerBase | None]:
    """The model of a published folder in eval mode, gamma 0, and its tokenizer if there is one.

    Only tensors are read from ``pytorch_model.bin``; whatever else is pickled beside it is left alone.

    Args:
        folder: With ``config.json`` and ``pytorch_model.bin``.

    Raises:
        FileNotFoundError: If one of the two is missing.
        ValueError: If the configuration lacks a size, or names or shapes of the weights differ from it.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {str(folder)!r}; give the folder of the published model")
    model = SlabLlamaForCausalLM(SlabLlamaConfig(**_settings(folder / CONFIG))).eval()
    load_published(model, folder / WEIGHTS)
    return model, tokenizer_beside(folder, model.config.vocab_size)


def _settings(path: Path) -> dict[str, Any]:
    given = read_json(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold a mapping, got {shown(given)}")
    missing = [name for name in SIZES if name not in given]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}; is it a LLaMA's?")
    for name in SIZES:
        check(f"{name} in {path}", given[name], PositiveInt)
    taken = {name: given[name] for name in (*SIZES, *OPTIONAL) if given.get(name) is not None}
    return {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, **taken}
