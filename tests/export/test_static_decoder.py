"""A cache of its full length: the tokens that transformers' own growing cache writes."""

from __future__ import annotations

import pytest
import torch

from language_models import somebody_elses, talkative, tokens
from slabformer.export.static_decoder import StaticDecoder, write_tokens
from tolerances import FLOAT32, assert_close

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("model", [talkative(num_key_value_heads=1), somebody_elses("qwen3")], ids=["llama", "qwen3"])
@pytest.mark.parametrize("context", [None, 27])
def test_it_writes_what_generate_does(model, context):
    decoder, prompt = StaticDecoder(model, context), tokens(2, 7)
    expected = model.generate(prompt, max_new_tokens=20, **GREEDY)[:, 7:]
    assert torch.equal(write_tokens(decoder, decoder.inputs(prompt), 20), expected)


def test_the_model_writes_more_than_one_token():
    decoder = StaticDecoder(talkative())
    assert len(write_tokens(decoder, decoder.inputs(tokens(1, 7)), 20).unique()) > 5


@torch.no_grad()
def test_empty_places_of_the_cache_are_not_read():
    decoder, prompt = StaticDecoder(talkative()), tokens(2, 7)
    given = decoder.inputs(prompt)
    filled = given | {name: torch.randn_like(given[name]) for name in ("keys", "values")}
    assert_close(decoder(**filled)["logits"], decoder.model(prompt).logits[:, -1], FLOAT32)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="context must be at most 64, the model's longest text, got 65"):
        StaticDecoder(talkative(), 65)
    decoder = StaticDecoder(talkative(), 20)
    with pytest.raises(ValueError, match="7 tokens and 15 new ones do not fit a cache of 20"):
        write_tokens(decoder, decoder.inputs(tokens(1, 7)), 15)
    assert write_tokens(decoder, decoder.inputs(tokens(1, 7)), 14).shape == (1, 14)
