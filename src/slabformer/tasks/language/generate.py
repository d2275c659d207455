"""Settings of transformers' ``generate``, checked."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from slabformer.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveFraction, PositiveInt, checked


@checked
def sampling(
    temperature: NonNegativeFloat = 0.8,
    top_k: NonNegativeInt = 0,
    top_p: PositiveFraction = 0.95,
    repetition_penalty: PositiveFloat = 1.0,
) -> dict[str, Any]:
    """Arguments for ``generate``; temperature 0 takes the likeliest token each time, and needs no other setting.

    Raises:
        ValueError: If one is out of range.
    """
    if temperature == 0:
        return {"do_sample": False, "repetition_penalty": repetition_penalty}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }


@checked
def check_prompt(model: PreTrainedModel, prompt_tokens: NonNegativeInt, max_new_tokens: PositiveInt) -> None:
    """Refuse a text that would outgrow the model's context.

    Raises:
        ValueError: If it would.
    """
    context = model.config.max_position_embeddings
    if prompt_tokens + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones do not fit the context of {context}; "
            "shorten the prompt, or lower max_new_tokens"
        )
