"""Settings of transformers' ``generate``, checked."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def sampling(
    temperature: float = 0.8, top_k: int = 0, top_p: float = 0.95, repetition_penalty: float = 1.0
) -> dict[str, Any]:
    """Arguments for ``generate``; temperature 0 takes the likeliest token each time, and needs no other setting.

    Raises:
        ValueError: If one is out of range.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty must be above 0, got {repetition_penalty}")
    if temperature == 0:
        return {"do_sample": False, "repetition_penalty": repetition_penalty}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }


def check_prompt(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a text that would outgrow the model's context.

    Raises:
        ValueError: If it would, or there is nothing to generate.
    """
    if new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {new_tokens}")
    context = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > context:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones do not fit the context of {context}; "
            "shorten the prompt, or lower max_new_tokens"
        )
