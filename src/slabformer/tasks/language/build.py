"""The model of a recipe."""

from __future__ import annotations

from typing import Any

from slabformer.models.llama import SlabLlamaConfig
from slabformer.tasks.language.config import ModelConfig

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm", "norm_start")


def config_of_model(model: ModelConfig, vocab_size: int, **settings: Any) -> SlabLlamaConfig:
    """transformers' configuration of the LLaMA that a recipe describes.

    Args:
        model: The recipe's part.
        vocab_size: Where the recipe leaves it to the tokenizer.
        settings: Further arguments, which override the recipe's.

    Raises:
        ValueError: If its sizes do not go together.
    """
    own = {name: getattr(model, name) for name in SIZES}
    own |= {"vocab_size": model.vocab_size or vocab_size, "max_position_embeddings": model.context}
    if model.hidden_size % (2 * model.num_attention_heads):
        heads = model.num_attention_heads
        raise ValueError(
            f"model.hidden_size must be a multiple of twice the {heads} heads, since rotary positions come in pairs, "
            f"got {model.hidden_size}"
        )
    return SlabLlamaConfig(**{**own, "tie_word_embeddings": False, **model.args, **settings})
