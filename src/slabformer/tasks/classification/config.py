"""The recipe of a training run as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from slabformer.tasks.classification.augment import AugmentConfig
from slabformer.tasks.classification.sources import DataConfig

#: may differ when a run goes on: nothing that is trained depends on it
HARMLESS = {"harmless": True}
#: the same of the data set, which may have moved
HARMLESS_DATA = ("data.path", "data.root", "data.download", "data.max_unreadable")


@dataclass(kw_only=True)
class ModelConfig:
    """Which model is trained, and from where it starts."""

    name: str = "slab_deit_micro"
    """Any classifier that timm knows; `slab list` shows ours."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments for `timm.create_model`, e.g. `drop_path_rate`; classes and image size follow the data."""
    pretrained: bool = False
    """Start from the released weights."""
    weights: str | None = None
    """Start from a `model.safetensors` of the same model, e.g. of its LayerNorm twin, to be converted. A PRepBN model
    that has faded before is trained on without its norms."""
    convert_norms: bool = False
    """Turn every LayerNorm and RMSNorm into PRepBN before training, their weights kept."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """timm's optimizers by name; parameters of one dimension are not decayed."""

    name: str = "adamw"
    """Any of `timm.optim.list_optimizers()`."""
    lr: float = 5e-4
    """Learning rate for a batch of `lr_base_batch`."""
    lr_base_batch: int | None = 512
    """Total batch for which the rates are given: all are scaled by total batch / this; None takes them as they are."""
    weight_decay: float = 0.05
    """Decoupled where the optimizer is."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments, e.g. `betas`."""
    layer_decay: float | None = None
    """Factor on the learning rate from layer to layer, towards the input."""
    clip_norm: float | None = 5.0
    """Largest norm of the gradient; null does not clip."""


@dataclass(kw_only=True)
class LrConfig:
    """timm's learning rate schedules by name, moved every optimizer step."""

    name: str = "cosine"
    """`cosine`, `poly`, `tanh`, `step`, `constant` ... as in timm."""
    warmup_epochs: float = 20
    """Epochs of linear warm-up."""
    warmup_lr: float = 5e-7
    """Rate it starts from; scaled like `optimizer.lr`."""
    min_lr: float = 5e-6
    """Rate it ends at; scaled like `optimizer.lr`."""
    cooldown_epochs: int = 0
    """Epochs at the lowest rate, after `epochs`."""


@dataclass(kw_only=True)
class GammaConfig:
    """How LayerNorm fades; without effect on a model without PRepBN."""

    warmup: float = 0.0
    """Share of training before it starts to fade."""
    fade: float = 0.8
    """Share of training over which it fades; the published models range from 0.08 to 0.80."""
    shape: Literal["linear", "cosine"] = "linear"
    """Of gamma's way from 1 to 0; linear as published."""
    warm_statistics: bool = True
    """Let RepBN's statistics follow the data from the first step on; false is the published rule."""
    fit_batches: int = 0
    """Training batches by which RepBN is first fitted to LayerNorm's output, so that fading starts from the same
    function; 0 keeps the published start."""


@dataclass(kw_only=True)
class EmaConfig:
    """A moving average of the weights beside them."""

    decay: float = 0.0
    """Weight of the past in each step, e.g. 0.9999; 0 for no average."""
    warmup: bool = False
    """Shorter memory at first, for short runs."""


@dataclass(kw_only=True)
class RecalibrateConfig:
    """Population statistics over the training data when training is done."""

    enabled: bool = True
    """Without effect on a model without RepBN."""
    batches: int | None = None
    """Training batches of each rank; null for an epoch."""


@dataclass(kw_only=True)
class TrainConfig:
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
    epochs: int = 300
    """Passes over the training data, warm-up included, cool-down not."""
    batch_size: int = 128
    """Images of one process in one batch."""
    accumulate: int = 1
    """Batches an optimizer step."""
    seed: int = 0
    """Of weights, order, augmentation, mixup and drop path."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; weights stay float32."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes the accelerator where there is one."""
    compile: bool = False
    """Train through `torch.compile`."""
    num_workers: int = field(default=4, metadata=HARMLESS)
    """Processes that decode images; no effect on what is trained."""
    output: str = field(default="runs/train", metadata=HARMLESS)
    """Folder of this run; given again, the run goes on where it stopped."""
    resume: Literal["auto", "never"] = field(default="auto", metadata=HARMLESS)
    """`auto` goes on with an unfinished run in `output`; `never` refuses to."""
    overwrite: bool = field(default=False, metadata=HARMLESS)
    """Delete the run that is in `output` and start again."""
    log_every: int = field(default=50, metadata=HARMLESS)
    """Optimizer steps between logged ones."""
    save_every: int = field(default=0, metadata=HARMLESS)
    """Optimizer steps between checkpoints, beside the one of every epoch; 0 for none."""
    eval_every: int = field(default=1, metadata=HARMLESS)
    """Epochs between evaluations."""
    keep: int = field(default=2, metadata=HARMLESS)
    """Checkpoints that are kept."""
    tensorboard: bool = field(default=True, metadata=HARMLESS)
    """Write TensorBoard events."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "eval_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "save_every", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as in a recipe."""
        return asdict(self)

    def harmless(self) -> set[str]:
        """Dotted keys that may differ when a run goes on."""
        return {*HARMLESS_DATA, *(f.name for f in fields(self) if f.metadata.get("harmless"))}
