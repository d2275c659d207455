"""Text and language models that are small enough to train in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, PreTrainedModel

import slabformer as sf
from slabformer.models.llama import SlabLlamaConfig, SlabLlamaForCausalLM
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.engine.config import RecalibrateConfig
from slabformer.tasks.language.config import AdamWConfig, ModelConfig, TokenizerConfig, TrainConfig
from slabformer.tasks.language.corpus import DataConfig
from slabformer.tasks.language.tokens import train_tokenizer
from slabformer.testing import randomize_norms_

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["the", "norm", "of", "a", "layer", "fades", "while", "its", "model", "learns", "what", "text", "is", "made"]


def sentences(count: int, seed: int = 0, length: int = 12) -> list[str]:
    """Documents of random words."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count, length), generator=generator).tolist()
    return [" ".join(WORDS[index] for index in row) for row in picks]


def write_lines(path: Path, count: int = 120, seed: int = 0) -> Path:
    """:func:`sentences` in a text file, one a line."""
    path.write_text("\n".join(sentences(count, seed)) + "\n")
    return path


def tiny_config(output: Path, **changes: Any) -> TrainConfig:
    """A run of a second on a text file beside its output folder."""
    text = output.parent / "text.txt"
    if not text.exists():
        write_lines(text)
    settings: dict[str, Any] = {
        "model": ModelConfig(**SIZES, context=16),
        "data": DataConfig(path=str(text), document="line"),
        "tokenizer": TokenizerConfig(vocab_size=300),
        "optimizer": AdamWConfig(lr=1e-2, warmup_steps=2),
        "steps": 10,
        "batch_size": 4,
        "output": str(output),
        "device": "cpu",
        "log_every": 5,
        "eval_every": 5,
        "save_every": 5,
    }
    return TrainConfig(**settings | changes)


def streamed(output: Path, **changes: Any) -> TrainConfig:
    """:func:`tiny_config`, whose text is read as a stream."""
    return tiny_config(
        output,
        data=DataConfig(path=str(output.parent / "text.txt"), document="line", stream=True, validation=10),
        tokenizer=TokenizerConfig(vocab_size=300, documents=50),
        recalibrate=RecalibrateConfig(batches=2),
        **changes,
    )


def trained_looking(norm: str = "prepbn", seed: int = 0, **changes: Any) -> SlabLlamaForCausalLM:
    """A small LLaMA in eval mode, gamma 0, every norm redrawn."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "vocab_size": 300, "max_position_embeddings": 64, "tie_word_embeddings": False}
    model = SlabLlamaForCausalLM(SlabLlamaConfig(norm=norm, **sizes | changes)).eval()
    sf.testing.randomize_norms_(model, seed)
    for module in prepbn_modules(model).values():
        module.set_gamma(0.0)
    return model


def talkative(**changes: Any) -> SlabLlamaForCausalLM:
    """:func:`trained_looking`, which writes one token after the other and not the same one for ever."""
    model = trained_looking(**changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
        model.get_input_embeddings().weight.mul_(20)
    return model


def somebody_elses(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small model of transformers' own class, converted, in eval mode, gamma 0, every norm redrawn."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 64}
    others = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}
    config = AutoConfig.for_model(architecture, **sizes | others | changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    sf.convert_norms_(model, eps=1e-3)
    sf.testing.randomize_norms_(model, seed)
    for module in prepbn_modules(model).values():
        module.set_gamma(0.0)
    return model


def tokens(batch_size: int = 2, length: int = 12, seed: int = 0, vocab_size: int = 300) -> Tensor:
    """Random tokens ``(B, N)``."""
    return torch.randint(2, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def save_encoder(folder: Path) -> Path:
    """A BERT with its tokenizer in ``folder``, norms drawn anew."""
    tokenizer = train_tokenizer(sentences(50), TokenizerConfig(vocab_size=300), 32)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    made = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes))
    randomize_norms_(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
