"""The model of a recipe."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from slabformer.models.llama import SlabLlamaConfig
from slabformer.tasks.language.config import ModelConfig

#: arguments that transformers still takes, and turns into others
OLDER = ("rope_theta", "rope_scaling")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm", "norm_start")


def config_of_model(model: ModelConfig, vocab_size: int, **settings: Any) -> SlabLlamaConfig:
    """transformers' configuration of the LLaMA that a recipe describes.

    Args:
        model: The recipe's part.
        vocab_size: Where the recipe leaves it to the tokenizer.
        settings: Further arguments, which override the recipe's.

    Raises:
        ValueError: If its sizes do not go together, or ``model.args`` holds what the configuration does not know.
    """
    known = [*(field.name for field in fields(SlabLlamaConfig)), *OLDER]
    unknown = model.args.keys() - set(known)
    if unknown:
        near = difflib.get_close_matches(min(unknown), known, n=1)
        raise ValueError(f"unknown model.args.{min(unknown)}" + (f"; did you mean {near[0]!r}?" if near else ""))
    own = {name: getattr(model, name) for name in SIZES}
    own |= {"vocab_size": model.vocab_size or vocab_size, "max_position_embeddings": model.context}
    if model.hidden_size % (2 * model.num_attention_heads):
        heads = model.num_attention_heads
        raise ValueError(
            f"model.hidden_size must be a multiple of twice the {heads} heads, since rotary positions come in pairs, "
            f"got {model.hidden_size}"
        )
    values = {**own, "tie_word_embeddings": False, **model.args, **settings}
    groups = values.get("num_key_value_heads") or model.num_attention_heads
    if model.num_attention_heads % groups:
        raise ValueError(
            f"model.args.num_key_value_heads must divide the {model.num_attention_heads} heads, got {groups}"
        )
    try:
        return SlabLlamaConfig(**values)
    except StrictDataclassError as error:  # of a field's type, in two lines
        raise ValueError(f"model.args: {' '.join(str(error).split())}") from error
