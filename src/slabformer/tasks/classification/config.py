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
    """Which model is trained, and what it starts from."""

    name: NonEmptyStr = "slab_deit_micro"
    """Name of a classifier in timm; `slab list` shows those of this library."""
    args: Arguments = field(default_factory=dict)
    """Further arguments of `timm.create_model`, e.g. `drop_path_rate`; the number of classes and the image size follow
    from the data."""
    pretrained: bool = False
    """Start from the released weights."""
    weights: NonEmptyStr | None = None
    """Start from a `model.safetensors` file of the same model, or of its LayerNorm baseline, which is then converted.
    If LayerNorm has faded from the model in the file, training goes on without it."""
    norm: NormName | None = None
    """Norm to train with; by default the model's own. Models of this library are built with it; in all others, in those
    from `weights` and with `convert_norms`, every LayerNorm and RMSNorm is converted to it and keeps its weights."""
    eta: Eta | None = None
    """Initial skip weight of PRepBN and RepBN, a number or `published` (1); 0 by default."""
    convert_norms: bool = False
    """Before training, convert every LayerNorm and RMSNorm to `norm`, by default PRepBN; weights are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_two_norms(self.norm, self.eta, self.args)


@dataclass(kw_only=True)
class DataConfig(Settings):
    """Which images, and how they become the model's input. Defaults are ImageNet's, as published."""

    path: NonEmptyStr = "digits"
    """A folder, `hfds/NAME`, `torch/NAME`, `wds/FOLDER`, or `digits` (1,797 images that come with scikit-learn).

    A folder holds `train` and `val` (or `Training` and `Validation`, `training_set` and `test_set`, ...), each with one
    subfolder per class, or one subfolder per class directly."""
    root: NonEmptyStr | None = None
    """Folder that a named data set is in or is downloaded to; by default the cache of the library that provides it."""
    download: bool = False
    """Let torchvision download a missing `torch/` data set."""
    train_split: NonEmptyStr | None = None
    """Subfolder, split or shard pattern to train on; by default whichever of the usual names is found."""
    validation_split: NonEmptyStr | None = None
    """Subfolder, split or shard pattern to validate on; by default whichever of the usual names is found."""
    validation_fraction: Fraction = 0.2
    """Share of the images to hold out if a folder has classes but no splits; 1 validates on all images."""
    labels: bool = True
    """Read labels. Without them every image in the folder and its subfolders is used; training then needs a teacher."""
    split_seed: Seed = 0
    """Seed that selects the images that `validation_fraction` holds out."""
    image_size: Pixels = 224
    """Height and width of the model's input."""
    mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    """Mean that is subtracted from RGB values in [0, 1]."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Standard deviation that the result is divided by."""
    interpolation: Interpolation = "bicubic"
    """How images are resized."""
    crop_pct: PositiveFraction = 0.875
    """Side of the centre crop over the shorter side of the resized validation image: 0.875 crops 224 pixels from 256.
    Use 1 for small images."""
    max_unreadable: ShareOrCount = 0.01
    """Unreadable images to tolerate: below 1 a share of all images, from 1 on a count, 0 for none."""


@dataclass(kw_only=True)
class AugmentConfig(Settings):
    """Augmentation of training images. Defaults are the published ImageNet recipe."""

    policy: Literal["timm", "light", "none"] = "timm"
    """`timm`: random resized crops, flips and the settings below. `light`: small shifts and rotations of whole batches
    in memory (for `digits`). `none`: as for validation."""
    scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
    """Range of the share of an image's area that a random crop keeps (`timm`)."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Range of the aspect ratio of a random crop (`timm`)."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip (`timm`)."""
    vflip: Fraction = 0.0
    """Probability of a vertical flip (`timm`)."""
    auto_augment: Policy | None = "rand-m9-mstd0.5-inc1"
    """Name of an automatic policy in timm (`timm`)."""
    color_jitter: NonNegativeFloat = 0.4
    """Strength of brightness, contrast and saturation jitter (`timm`); no effect with RandAugment, as published."""
    re_prob: Fraction = 0.25
    """Probability of random erasing (`timm`)."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    """Fill of an erased region: zeros, one random colour, or random pixels (`timm`)."""
    re_count: PositiveInt = 1
    """Largest number of regions erased in one image (`timm`)."""
    light_shift: Fraction = 0.08
    """Largest shift, as a share of height and width (`light`)."""
    light_rotate: Annotated[float, Range(ge=0, le=180)] = 10.0
    """Largest rotation in degrees (`light`)."""
    light_scale: FractionBelowOne = 0.1
    """Largest relative change of size (`light`)."""
    mixup: NonNegativeFloat = 0.8
    """Mixup alpha; 0 for none."""
    cutmix: NonNegativeFloat = 1.0
    """CutMix alpha; 0 for none."""
    mixup_prob: Fraction = 1.0
    """Probability that a batch is mixed."""
    mixup_switch_prob: Fraction = 0.5
    """Probability of CutMix if both are on."""
    label_smoothing: FractionBelowOne = 0.1
    """Share of the target that is spread over all classes."""


@dataclass(kw_only=True)
class GammaConfig(FadeConfig):
    """How LayerNorm fades; no effect on a model without PRepBN."""

    fit_batches: NonNegativeInt = 0
    """Training batches that RepBN is first fitted to LayerNorm's output on, so that the fade starts from the same
    function; 0 keeps the published start."""


@dataclass(kw_only=True)
class EmaConfig(Settings):
    """Exponential moving average of the weights."""

    decay: FractionBelowOne = 0.0
    """Decay per step, e.g. 0.9999; 0 for no average."""
    warmup: bool = False
    """Start with a lower decay, for short runs."""


@dataclass(kw_only=True)
class DistillConfig(Settings):
    """Distillation from the teacher; no effect without `teacher`."""

    label_weight: NonNegativeFloat | None = None
    """Weight of the loss against the labels, in addition to those below; by default 1 if there are labels."""
    temperature: PositiveFloat = 1.0
    """Temperature of the student's and the teacher's logits."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Of the losses against the teacher: of a classifier, `logits` and `hidden`."""


@dataclass(kw_only=True)
class QatConfig(Settings):
    """Quantisation-aware training of a trained model; needs torchao."""

    enabled: bool = False
    """Fold the norms of the model in `model.weights`, then train it while its Linears round weights and inputs to 8
    bits. What is saved is the folded model in floating point, for `slab deploy --dtype int8`."""


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
    """Distil from a teacher: `self`, the model before training, with its norms; `baseline`, the released LayerNorm
    model that it replaces; a `.safetensors` file; or a name in timm, whose weights are downloaded. Images then need no
    labels."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """How."""
    qat: QatConfig = field(default_factory=QatConfig)
    """Training for 8-bit integers."""
    epochs: Epochs = 300
    """Passes over the training data, including warm-up but not cool-down."""
    num_workers: Workers = field(default=4, metadata=HARMLESS)
    """Processes that decode images; no effect on the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qat.enabled and not (self.model.weights or self.model.pretrained):
            raise ValueError(
                "qat.enabled trains a trained model on; give model.weights, the model.safetensors of a run"
            )
        if self.qat.enabled and self.teacher is not None:
            raise ValueError("qat.enabled takes no teacher; distil first, then train its result with qat.enabled")

    def harmless(self) -> set[str]:
        """Dotted keys that may differ when a run goes on."""
        return super().harmless() | set(HARMLESS_DATA)
