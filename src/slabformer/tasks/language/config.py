"""The recipe of a language model's training as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from slabformer._norm_names import NormName
from slabformer.settings import (
    MOST,
    Arguments,
    FractionBelowOne,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Settings,
)
from slabformer.tasks.engine.config import HARMLESS, FadeConfig, RecalibrateConfig, RunConfig
from slabformer.tasks.language.corpus import DataConfig

#: all bytes, and the tokens that begin and end a text: what a byte-level vocabulary cannot do without
SMALLEST_VOCABULARY = 258


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """A LLaMA, from random weights."""

    hidden_size: PositiveInt = 128
    """Width."""
    intermediate_size: PositiveInt = 384
    """Width inside the MLP."""
    num_hidden_layers: PositiveInt = 4
    """Blocks."""
    num_attention_heads: PositiveInt = 4
    """Heads of queries."""
    context: Annotated[int, Range(ge=2, le=MOST)] = 256
    """Tokens of a training block, and the longest text it takes."""
    vocab_size: PositiveInt | None = None
    """Of its embedding; null for the tokenizer's."""
    norm: NormName = "prepbn"
    """`prepbn` fades RMSNorm out, `repbn` and `batchnorm` do without from the start, `rmsnorm` is the baseline."""
    norm_start: Literal["zeros", "ones"] = "zeros"
    """Of RepBN's gain and skip: `zeros` as published, `ones` as in the vision models."""
    args: Arguments = field(default_factory=dict)
    """Further arguments of `SlabLlamaConfig`, e.g. `num_key_value_heads`, `tie_word_embeddings`, `bn_momentum`."""


@dataclass(kw_only=True)
class TokenizerConfig(Settings):
    """How text becomes tokens."""

    path: NonEmptyStr | None = None
    """A folder or a name on the hub; null trains a byte-level BPE on the training documents."""
    vocab_size: Annotated[int, Range(ge=SMALLEST_VOCABULARY, le=MOST)] = 2048
    """Of the one that is trained."""
    documents: PositiveInt | None = None
    """Documents it is trained on; null for all, which a stream does not allow."""


@dataclass(kw_only=True)
class AdamWConfig(Settings):
    """AdamW; norms and biases are not decayed."""

    lr: PositiveFloat = 3e-3
    """Highest learning rate."""
    min_lr: NonNegativeFloat = 3e-4
    """Rate it ends at, by a cosine."""
    warmup_steps: NonNegativeInt = 50
    """Steps in which it rises from 0."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95)
    """Of the two averages."""
    eps: PositiveFloat = 1e-8
    """Beside the root of the second one."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the gradient; null does not clip."""


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Everything about a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which text."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How it becomes tokens."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    """How weights move."""
    gamma: FadeConfig = field(default_factory=lambda: FadeConfig(fade=0.8))
    """How RMSNorm fades."""
    recalibrate: RecalibrateConfig = field(default_factory=RecalibrateConfig)
    """Statistics at the end."""
    steps: PositiveInt = 600
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Blocks of one process in one batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; weights stay float32."""
    checkpoint_activations: bool = False
    """Compute activations again in backward instead of keeping them."""
    output: NonEmptyStr = field(default="runs/lm", metadata=HARMLESS)
    """Folder of this run; a run that was stopped resumes if its folder is given again."""
    log_every: PositiveInt = field(default=10, metadata=HARMLESS)
    """Steps between logged ones."""
    save_every: PositiveInt = field(default=200, metadata=HARMLESS)
    """Steps between checkpoints."""
    eval_every: PositiveInt = field(default=200, metadata=HARMLESS)
    """Steps between evaluations."""
    tensorboard: bool = field(default=False, metadata=HARMLESS)
    """Write TensorBoard events."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps must be below steps ({self.steps}), got {self.optimizer.warmup_steps}"
            )
        unbounded = {
            "recalibrate.batches": self.recalibrate.enabled and self.recalibrate.batches is None,
            "tokenizer.documents": self.tokenizer.path is None and self.tokenizer.documents is None,
        }
        missing = [name for name, absent in unbounded.items() if absent]
        if self.data.stream and missing:
            raise ValueError(f"a stream has no end to wait for; set {missing[0]}")

    def harmless(self) -> set[str]:
        """Dotted keys that may differ when a run goes on."""
        return super().harmless() | {"data.path"}
