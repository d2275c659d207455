"""A language model as a function of tensors of one shape: prefill and decode with a static cache, and how it writes.

decoder = StaticDecoder(model, context=512)
inputs = decoder.inputs(prompt)                       # an empty cache, and the first tokens
tokens = write_tokens(decoder, inputs, count=20)      # greedy, as generate(do_sample=False) does
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from slabformer.models.cache import cache_argument
from slabformer.settings import PositiveInt, checked

#: of axes of any length, for :func:`slabformer.deploy`
AXES: Mapping[str, Mapping[int, str]] = {
    "input_ids": {0: "batch", 1: "tokens"},
    "keys": {1: "batch"},
    "values": {1: "batch"},
}


class StaticDecoder(nn.Module):
    """A causal language model whose cache has its full length from the start, and is kept by whoever calls.

    Only what is new comes out, so that nothing of the cache's size is copied; the caller writes it to ``position``.
    One program reads a prompt (prefill, many tokens) and writes (decode, one token a call).

    Args:
        model: LLaMA-like, in eval mode.
        context: Tokens that the cache holds, ``S``; the model's longest text by default.

    Shape:
        ``input_ids`` ``(B, N)``, ``position`` ``(1,)``: how many tokens are in the cache, ``keys`` and ``values``
        ``(L, B, H, S, D)`` of all layers. To "logits" ``(B, V)`` behind the last token, "new_keys" and "new_values"
        ``(L, B, H, N, D)``.

    Raises:
        ValueError: If ``context`` is longer than the model's longest text.
    """

    #: see :mod:`slabformer.deployment.kinds`
    deployed_as = "decoder"

    @checked
    def __init__(self, model: PreTrainedModel, context: PositiveInt | None = None) -> None:
        super().__init__()
        longest = model.config.max_position_embeddings
        if context is not None and context > longest:
            raise ValueError(f"context must be at most {longest}, the model's longest text, got {context}")
        self.model, self.context = model, context or longest
        self.cache_argument = cache_argument(model)
        self.train(False)

    def forward(self, input_ids: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """See the class."""
        cache = DynamicCache()
        for layer in range(keys.shape[0]):
            cache.update(keys[layer], values[layer], layer)
        context, steps = keys.shape[3], torch.arange(input_ids.shape[1], device=input_ids.device)
        read = (torch.arange(context, device=steps.device) < position).expand(steps.shape[0], -1)
        # given as a whole: transformers' own mask knows no cache with empty places
        mask = torch.cat([read, steps <= steps[:, None]], 1)[None, None].expand(input_ids.shape[0], 1, -1, -1)
        logits = self.model(
            input_ids=input_ids,
            position_ids=(position + steps)[None],
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_argument: cache},
        ).logits
        layers: list[Any] = cache.layers
        return {
            "logits": logits[:, -1],
            "new_keys": torch.stack([layer.keys[:, :, context:] for layer in layers]),
            "new_values": torch.stack([layer.values[:, :, context:] for layer in layers]),
        }

    def inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """A prompt ``(B, N)`` and an empty cache, as the forward takes them."""
        config: Any = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (config.num_hidden_layers, len(input_ids), heads, self.context, width)
        # two of them: a program may not be handed one memory twice
        keys, values = (torch.zeros(shape, dtype=torch.float32) for _ in range(2))
        return {"input_ids": input_ids, "position": torch.zeros(1, dtype=torch.long), "keys": keys, "values": values}


@torch.no_grad()
def write_tokens(run: Callable[..., Mapping[str, Tensor]], inputs: Mapping[str, Tensor], count: int) -> Tensor:
    """``count`` tokens ``(B, count)``, the likeliest each time.

    Args:
        run: A :class:`StaticDecoder`, or what it was deployed as.
        inputs: As :meth:`StaticDecoder.inputs` returns them; the cache is copied.
        count: How many; prompt and tokens must fit the cache.

    Raises:
        ValueError: If they do not fit.
    """
    state = {name: tensor.clone() for name, tensor in inputs.items()}
    context, length = state["keys"].shape[3], state["input_ids"].shape[1]
    if length + count > context + 1:
        raise ValueError(f"{length} tokens and {count} new ones do not fit a cache of {context}")
    written = []
    for _ in range(count):
        state = following(run(**state), state)
        written.append(state["input_ids"])
    return torch.cat(written, 1)


def following(outputs: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The next call's inputs: the likeliest token, and the cache of ``state``, to which what is new is written."""
    begin = int(state["position"])
    end = begin + state["input_ids"].shape[1]
    for name in ("keys", "values"):
        state[name][..., begin:end, :] = outputs[f"new_{name}"]
    return dict(state, input_ids=outputs["logits"].argmax(-1)[:, None], position=torch.tensor([end]))
