"""The recipe of a training run as data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from slabformer._extras import require
from slabformer._loss_weights import LossWeights
from slabformer._norm_names import NormName
from slabformer.settings import (
    Arguments,
    Epochs,
    Eta,
    Fraction,
    FractionBelowOne,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    Pixels,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    Seed,
    Settings,
    ShareOrCount,
    Where,
    Workers,
)
from slabformer.tasks.engine.config import (
    HARMLESS,
    FadeConfig,
    LrConfig,
    OptimizerConfig,
    RecalibrateConfig,
    RunConfig,
    refuse_two_norms,
)

#: of the data set, which may have moved when a run goes on
HARMLESS_DATA = ("data.path", "data.root", "data.download", "data.max_unreadable")


Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos"]
#: of a policy's name, behind its first word: a letter or word with its number, or a set of RandAugment's transforms
SECTION = re.compile(r"[a-su-z][a-z]*\d+(\.\d+)?|t[a-z\d]*")


def _is_policy(name: str) -> bool:
    """Whether timm reads the whole name: it skips a section without a number, and asserts that it knows the others."""
    if not all(map(SECTION.fullmatch, name.split("-")[1:])):
        return False
    policies = require("timm.data.auto_augment", extra="vision")
    makers = {"rand": policies.rand_augment_transform, "augmix": policies.augment_and_mix_transform}
    make = next((make for prefix, make in makers.items() if name.startswith(prefix)), policies.auto_augment_transform)
    try:
        return bool(make(name, {"translate_const": 100, "img_mean": (124, 116, 104)}))
    except (AssertionError, ValueError, LookupError):
        return False


Policy = Annotated[
    str, Where("a policy of timm's, such as rand-m9-mstd0.5-inc1, augmix-m5-w4, original or v0", _is_policy)
]


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
    norm: NormName | None = None
    """Which norm; the model's own by default. A model of ours is built with it; in any other one, in `weights` and with
    `convert_norms` every LayerNorm and RMSNorm is converted to it, its weights kept."""
    eta: Eta | None = None
    """Initial skip weight of PRepBN and RepBN, a number or `published` (1); 0 by default."""
    convert_norms: bool = False
    """Turn every LayerNorm and RMSNorm into `norm`, PRepBN by default, before training, their weights kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_two_norms(self.norm, self.eta, self.args)


@dataclass(kw_only=True)
class DataConfig(Settings):
    """Which images, and how they become the model's input. Defaults are ImageNet's, as published."""

    path: NonEmptyStr = "digits"
    """A folder, `hfds/NAME`, `torch/NAME`, `wds/FOLDER`, or `digits` (1,797 images that scikit-learn brings).

    A folder holds `train` and `val` (or `Training` and `Validation`, `training_set` and `test_set` ...) with a
    sub-folder for each class, or just the classes."""
    root: NonEmptyStr | None = None
    """Where a named data set lies or is downloaded to; the libraries' own caches by default."""
    download: bool = False
    """Let torchvision download a `torch/` data set that is not there."""
    train_split: NonEmptyStr | None = None
    """Sub-folder, split or shard pattern to train on; found by its usual names by default."""
    validation_split: NonEmptyStr | None = None
    """Sub-folder, split or shard pattern to validate on; found by its usual names by default."""
    validation_fraction: Fraction = 0.2
    """Share held out when a folder holds classes but no splits; 1 validates on all of it."""
    labels: bool = True
    """False for images without classes, which a teacher makes enough: all that lie in the folder and below it."""
    split_seed: Seed = 0
    """Picks the images that `validation_fraction` holds out."""
    image_size: Pixels = 224
    """Height and width of the model's input."""
    mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    """Subtracted from RGB in [0, 1]."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Divides what is left."""
    interpolation: Interpolation = "bicubic"
    """How images are resized."""
    crop_pct: PositiveFraction = 0.875
    """Centre crop of validation images over their resized shorter side: 224 of 256. 1 for small images."""
    max_unreadable: ShareOrCount = 0.01
    """Unreadable images that are put up with: a share of all below 1, a count from 1 on, 0 for none."""


@dataclass(kw_only=True)
class AugmentConfig(Settings):
    """What training images go through. Defaults are the published ImageNet recipe."""

    policy: Literal["timm", "light", "none"] = "timm"
    """`timm`: random resized crop, flips and what the fields below say. `light`: small shifts and turns of images
    held in memory, whole batches at once (for `digits`). `none`: as for validation."""
    scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
    """Share of the image's area that a random crop keeps (`timm`)."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Aspect ratio of a random crop (`timm`)."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip (`timm`)."""
    vflip: Fraction = 0.0
    """Probability of a vertical flip (`timm`)."""
    auto_augment: Policy | None = "rand-m9-mstd0.5-inc1"
    """timm's name of an automatic policy (`timm`)."""
    color_jitter: NonNegativeFloat = 0.4
    """Strength of brightness, contrast, saturation jitter (`timm`); without effect under RandAugment, as published."""
    re_prob: Fraction = 0.25
    """Probability of random erasing (`timm`)."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    """What erases: zeros, one random colour, or random pixels (`timm`)."""
    re_count: PositiveInt = 1
    """Most regions erased in one image (`timm`)."""
    light_shift: Fraction = 0.08
    """Largest shift as a share of height and width (`light`)."""
    light_rotate: Annotated[float, Range(ge=0, le=180)] = 10.0
    """Largest turn in degrees (`light`)."""
    light_scale: FractionBelowOne = 0.1
    """Largest relative change of size (`light`)."""
    mixup: NonNegativeFloat = 0.8
    """Mixup alpha, 0 for none; applied by the trainer."""
    cutmix: NonNegativeFloat = 1.0
    """CutMix alpha, 0 for none; applied by the trainer."""
    mixup_prob: Fraction = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: Fraction = 0.5
    """Probability of CutMix where both are on."""
    label_smoothing: FractionBelowOne = 0.1
    """Share of the target spread over all classes."""


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
class DistillConfig(Settings):
    """What the teacher's word counts; without effect where there is no `teacher`."""

    label_weight: NonNegativeFloat | None = None
    """Share of the labels' own loss beside those below; by default 1 where there are labels."""
    temperature: PositiveFloat = 1.0
    """Of the logits of both."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Of the losses against the teacher: of a classifier, `logits` and `hidden`."""


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
    teacher: NonEmptyStr | None = None
    """What the model is held against: `self`, it with its norms as training finds it; `baseline`, the released
    LayerNorm model that it replaces; a `.safetensors` file, or a name in timm, whose weights are fetched. Images need
    no labels then."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """How."""
    epochs: Epochs = 300
    """Passes over the training data, warm-up included, cool-down not."""
    num_workers: Workers = field(default=4, metadata=HARMLESS)
    """Processes that decode images; no effect on what is trained."""

    def harmless(self) -> set[str]:
        """Dotted keys that may differ when a run goes on."""
        return super().harmless() | set(HARMLESS_DATA)
