"""The recipe of a training run as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from slabformer.settings import Arguments, Epochs, FractionBelowOne, NonEmptyStr, NonNegativeInt, Settings, Workers
from slabformer.tasks.classification.augment import AugmentConfig
from slabformer.tasks.classification.sources import DataConfig
from slabformer.tasks.engine.config import HARMLESS, FadeConfig, LrConfig, OptimizerConfig, RecalibrateConfig, RunConfig

#: of the data set, which may have moved when a run goes on
HARMLESS_DATA = ("data.path", "data.root", "data.download", "data.max_unreadable")


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """Which model is trained, and from where it starts."""

    name: NonEmptyStr = "slab_deit_micro"
    """Any classifier that timm knows; `slab list` shows ours."""
    args: Arguments = field(default_factory=dict)
    """Further arguments for `timm.create_model`, e.g. `drop_path_rate`; classes and image size follow the data."""
    pretrained: bool = False
    """Start from the released weights."""
    weights: NonEmptyStr | None = None
    """Start from a `model.safetensors` of the same model, e.g. of its LayerNorm baseline, to convert it. A PRepBN model
    that has faded before is trained on without its norms."""
    convert_norms: bool = False
    """Turn every LayerNorm and RMSNorm into PRepBN before training, their weights kept."""


@dataclass(kw_only=True)
class GammaConfig(FadeConfig):
    """How LayerNorm fades; without effect on a model without PRepBN."""

    fit_batches: NonNegativeInt = 0
    """Training batches by which RepBN is first fitted to LayerNorm's output, so that fading starts from the same
    function; 0 keeps the published start."""


@dataclass(kw_only=True)
class EmaConfig(Settings):
    """A moving average of the weights beside them."""

    decay: FractionBelowOne = 0.0
    """Weight of the past in each step, e.g. 0.9999; 0 for no average."""
    warmup: bool = False
    """Shorter memory at first, for short runs."""


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Everything about a training run. Defaults are the published ImageNet recipe where there is one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What they go through."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights move."""
    lr_schedule: LrConfig = field(default_factory=LrConfig)
    """How fast."""
    gamma: GammaConfig = field(default_factory=GammaConfig)
    """How LayerNorm fades."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Average of the weights."""
    recalibrate: RecalibrateConfig = field(default_factory=RecalibrateConfig)
    """Statistics at the end."""
    epochs: Epochs = 300
    """Passes over the training data, warm-up included, cool-down not."""
    num_workers: Workers = field(default=4, metadata=HARMLESS)
    """Processes that decode images; no effect on what is trained."""

    def harmless(self) -> set[str]:
        """Dotted keys that may differ when a run goes on."""
        return super().harmless() | set(HARMLESS_DATA)
