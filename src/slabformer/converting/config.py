"""The recipe of a conversion as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from slabformer._loss_weights import LossWeights
from slabformer.settings import (
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Seed,
    Workers,
)
from slabformer.tasks.engine.config import HARMLESS, FadeConfig, RunConfig

Attention = Literal["none", "all", "plan"]


@dataclass(kw_only=True)
class ConvertConfig(RunConfig):
    """How a trained model loses its norms, distilled from itself on data that needs no labels."""

    model: NonEmptyStr
    """A `.safetensors` file that slab wrote, a name in timm, whose released weights are fetched, or a folder of
    transformers."""
    data: NonEmptyStr
    """What it is run on. For images a folder, `hfds/NAME`, `torch/NAME` or `digits`; for text a file, folder or pattern
    of .txt, .jsonl or .parquet files, or `hf:NAME`. Labels are not looked at."""
    steps: PositiveInt = 1000
    """Optimizer steps of the distillation."""
    lr: PositiveFloat | None = None
    """Highest learning rate; by default 3e-4, and less from 100 million parameters on, with the square root of the
    size."""
    weight_decay: NonNegativeFloat = 0.01
    """Of matrices; norms and biases are not decayed."""
    clip_norm: PositiveFloat | None = 1.0
    """Clip the gradient to this norm; null does not clip."""
    gamma: FadeConfig = field(default_factory=lambda: FadeConfig(fade=0.05))
    """How the norms fade."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Of the losses against the teacher."""
    plan: NonEmptyStr | None = None
    """A file that `slab audit --plan` wrote: which norms go; the others stay. By default all go."""
    budget: PositiveFraction | None = None
    """What losing norms may take from the cosine of the model's outputs, before training: as many go as fit, the
    cheapest first; the others stay. By default all go."""
    attention: Attention = "none"
    """Which softmax attentions become linear, beside the norms: none, all, or those that an audit plans."""
    attention_budget: PositiveFraction | None = None
    """For a plan: what linear attention may take from the cosine of the model's outputs, before training; by default
    those are converted that take at most 0.1 each."""
    align_steps: NonNegativeInt | None = None
    """Batches that each linear attention is aligned on by itself before all else; by default a tenth of `steps`, 10 at
    least."""
    fit_batches: PositiveInt = 16
    """Batches that the start is fitted to."""
    recalibrate_batches: PositiveInt = 64
    """Batches that the statistics are taken from at the end."""
    evaluations: PositiveInt = 10
    """How often the deployed form is held against the teacher on the way."""
    held_out: PositiveInt = 256
    """Samples for that, which are not trained on."""
    image_size: PositiveInt | None = None
    """Height and width of the images; by default what the model was trained with."""
    max_length: PositiveInt = 128
    """Most tokens of a text; longer ones are cut."""
    split_seed: Seed = 0
    """Picks the held-out images."""
    batch_size: PositiveInt = 32
    """Samples per batch in each process."""
    output: NonEmptyStr = field(default="runs/convert", metadata=HARMLESS)
    """Folder of this run; a run that was stopped resumes if its folder is given again."""
    log_every: PositiveInt = field(default=10, metadata=HARMLESS)
    """Optimizer steps between log entries."""
    tensorboard: bool = field(default=False, metadata=HARMLESS)
    """Write TensorBoard events."""
    num_workers: Workers = field(default=0, metadata=HARMLESS)
    """Processes that decode images; no effect on the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan is not None and self.budget is not None:
            raise ValueError("plan and budget both say which norms go; give one of them")
        if self.attention_budget is not None and self.attention != "plan":
            raise ValueError(f"attention_budget has no effect with attention {self.attention!r}; set attention to plan")
        if self.align_steps is not None and self.attention == "none":
            raise ValueError("align_steps has no effect with attention 'none'; set attention to all or plan")
