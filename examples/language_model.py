"""Somebody else's language model loses its norms in a plain transformers Trainer: convert, train, fuse, generate, save.

    python examples/language_model.py
    python examples/language_model.py --architecture mistral --steps 600

The model is any that ``AutoModelForCausalLM`` builds, here a small one with random weights that reads bytes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

import slabformer as sf
from slabformer.tasks.language.callback import ProgressiveCallback
from slabformer.tasks.language.folders import load_model_folder, save_model_folder

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONTEXT = 64
PROMPT = "The import statement "


@dataclass(frozen=True)
class Outcome:
    """Losses on the way, norms that went and that stayed, how far the fused model is from the unfused, its text."""

    losses: list[float]
    norms_folded: int
    norms_left: int
    fused_difference: float
    text: str
    text_of_saved: str


def main(architecture: str = "llama", steps: int = 300, output: Path = Path("runs/language_model")) -> Outcome:
    """Train a small model of ``architecture``, take its norms away, and write with what is left."""
    set_seed(0)
    blocks = bytes_of_documentation()
    examples = [{"input_ids": block, "labels": block} for block in blocks]
    model = small_model(architecture)

    sf.convert_norms_(model)
    trainer = Trainer(model, settings(output, steps), train_dataset=examples, callbacks=[ProgressiveCallback()])
    trainer.train()
    sf.recalibrate_(model, trainer.get_train_dataloader(), num_batches=20)
    inputs = {"input_ids": blocks[:2], "use_cache": False}
    fused, report = sf.fuse(model.eval(), (), inputs)
    difference = sf.verify(model, fused, inputs).max_rel
    save_model_folder(fused, None, output / "fused")
    saved = load_model_folder(output / "fused")

    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return Outcome(losses, report.num_folded, report.num_kept, difference, write(fused), write(saved))


def bytes_of_documentation() -> Tensor:
    """The documentation inside Python as blocks of bytes, ``(blocks, CONTEXT)``."""
    data = bytearray("\n".join(topics.values()).encode())
    return torch.frombuffer(data, dtype=torch.uint8).long()[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def small_model(architecture: str) -> PreTrainedModel:
    """A random model of transformers' own."""
    marks = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}
    config = AutoConfig.for_model(
        architecture, vocab_size=256, max_position_embeddings=256, num_key_value_heads=2, **SIZES, **marks
    )
    return AutoModelForCausalLM.from_config(config)


def settings(output: Path, steps: int) -> TrainingArguments:
    """Of the Trainer; nothing in them is about norms."""
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=10,
        save_steps=steps,
        disable_tqdm=True,
        report_to="none",
    )


def write(model: PreTrainedModel) -> str:
    """What ``model`` writes after the prompt, the likeliest byte each time."""
    prompt = torch.tensor([list(PROMPT.encode())], device=model.device)
    written = model.generate(prompt, max_new_tokens=40, do_sample=False)
    return bytes(written[0].tolist()).decode(errors="replace")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--architecture", default="llama", help="llama, mistral, qwen2 ...")
    arguments.add_argument("--steps", type=int, default=300, help="of the optimizer")
    arguments.add_argument("--output", type=Path, default=Path("runs/language_model"), help="folder to write")
    outcome = main(**vars(arguments.parse_args()))
    print(f"loss {outcome.losses[0]:.2f} to {outcome.losses[-1]:.2f}; {outcome.norms_folded} norms folded")
    print(f"fused equals unfused within {outcome.fused_difference:.1e}; {outcome.norms_left} norms left")
    print(repr(outcome.text))
