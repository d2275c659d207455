"""`slab lm generate`: go on with a text."""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import Namespace

from slabformer.cli.lm.common import add_model_options, load
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import (
    ExistingFile,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Seed,
)

STDIN = "-"


def parser() -> Parser:
    """Options of `slab lm generate`."""
    made = Parser(
        "slab lm generate",
        "Go on with a text; it is written as it comes.",
        [
            'slab lm generate runs/llama_micro_prepbn "The import statement"',
            "slab lm generate fused --file prompt.txt --temperature 0",
            'echo "A class is" | slab lm generate fused -',
        ],
    )
    add_model_options(made)
    made.add_argument("prompt", type=str | None, nargs="?", help="what to go on with; - reads standard input")
    made.add_argument("--file", type=ExistingFile | None, help="a file that holds it")
    made.add_argument("--max-new-tokens", type=PositiveInt, default=100, help="longest continuation")
    made.add_argument(
        "--temperature",
        type=NonNegativeFloat,
        default=0.8,
        help="how random the draws are; 0 takes the likeliest token each time",
    )
    made.add_argument("--top-k", type=NonNegativeInt, default=0, help="draw from so many likeliest tokens; 0 from all")
    made.add_argument(
        "--top-p", type=PositiveFraction, default=0.95, help="draw from the likeliest tokens of this total share"
    )
    made.add_argument(
        "--repetition-penalty", type=PositiveFloat, default=1.0, help="above 1 avoids what was said already"
    )
    made.add_argument("--seed", type=Seed, default=0, help="seed of the draws")
    made.add_argument("--fused", action="store_true", help="fold the norms first")
    made.add_argument("--only-new", action="store_true", help="write the continuation without the prompt")
    return made


def run(config: Namespace) -> Outcome:
    """Read the prompt, write the text as it comes."""
    import torch
    from transformers import TextStreamer

    from slabformer.tasks.language.fusing import fuse_language_model
    from slabformer.tasks.language.generate import check_prompt, sampling

    options = sampling(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
    prompt = _prompt(config)
    model, tokenizer = load(config)
    if config.fused:
        model, _ = fuse_language_model(model)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    check_prompt(model, length, config.max_new_tokens)
    torch.manual_seed(config.seed)
    streamer = TextStreamer(tokenizer, skip_prompt=config.only_new, skip_special_tokens=True)
    generate: Any = model.generate
    tokens = generate(**inputs, max_new_tokens=config.max_new_tokens, streamer=streamer, **options)[0]
    text = tokenizer.decode(tokens[length:], skip_special_tokens=True)
    return Outcome(data={"prompt": prompt, "text": text, "new_tokens": len(tokens) - length})


def _prompt(config: Namespace) -> str:
    from slabformer._files import read_text

    if (config.prompt is None) == (config.file is None):
        raise ValueError("give a prompt, or --file, and only one of them; - reads standard input")
    if config.file is not None:
        return read_text(config.file).rstrip("\n")
    return sys.stdin.read().rstrip("\n") if config.prompt == STDIN else config.prompt
