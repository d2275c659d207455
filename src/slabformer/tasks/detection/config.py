"""The recipe of a detector's training as data. Defaults are the embedded run; recipes hold the published ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from slabformer._detector import DetectorConfig
from slabformer._moved import RENAMED, current_name
from slabformer._norm_names import NormName, OutputNormName
from slabformer.settings import (
    Arguments,
    Epochs,
    Eta,
    Fraction,
    NonEmptyStr,
    NonNegativeInt,
    NotEmpty,
    Pixels,
    PositiveFloat,
    PositiveInt,
    Settings,
    ShareOrCount,
    Threads,
    Workers,
)
from slabformer.tasks.engine.config import (
    HARMLESS,
    FadeConfig,
    OptimizerConfig,
    RecalibrateConfig,
    RunConfig,
    refuse_two_norms,
)

Split = Literal["train", "validation"]
#: of the embedded data set
NUM_IMAGES = {"train": 500, "validation": 100}
#: of the data set, which may have moved when a run goes on
HARMLESS_DATA = tuple(
    f"data.{name}"
    for name in ("path", "train_images", "train_annotations", "val_images", "val_annotations", "max_unreadable")
)
#: a backbone of 1.4 M parameters, for images of 128 pixels
SMALL_BACKBONE = {
    "img_size": 128,
    "embed_dim": 32,
    "depths": [1, 1, 2, 1],
    "num_heads": [2, 4, 8, 16],
    "window_size": 8,
}
#: heads of 1.3 M parameters, for objects of 24 to 56 pixels
SMALL_DETECTOR: dict[str, Any] = {
    "fpn_channels": 64,
    "anchor_scale": 4.0,
    "rpn_num_samples": 64,
    "rpn_candidates_train": 400,
    "rpn_candidates_test": 400,
    "rpn_proposals_train": 200,
    "rpn_proposals_test": 100,
    "roi_num_samples": 64,
    "roi_finest_scale": 28.0,
    "roi_sampling_ratio": 2,
    "box_fc_dim": 256,
    "mask_num_convs": 2,
    "mask_channels": 64,
    "max_detections": 20,
}


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """Which backbone the detector uses, and what it starts from."""

    backbone: NonEmptyStr = "slab_swin_tiny"
    """A model of this library, or any in timm that supports `features_only`."""
    args: Arguments = field(default_factory=lambda: dict(SMALL_BACKBONE))
    """Further arguments of the backbone, e.g. `drop_path_rate`."""
    norm: NormName | None = None
    """Norm of the backbone; by default its own, `layernorm` for its baseline. Models of this library are built with it;
    in timm's, and with `convert_norms`, every LayerNorm and RMSNorm is converted to it."""
    eta: Eta | None = None
    """Initial skip weight of the backbone's PRepBN and RepBN, a number or `published` (1); 0 by default."""
    output_norm: OutputNormName | None = None
    """Norm of the backbone's outputs to the pyramid; by default as published. With `prepbn` no LayerNorm is left."""
    published: bool = False
    """Run Swin's linear attention in windows of constant size, padded and shifted, as published, instead of over the
    whole map."""
    convert_norms: bool = False
    """Before training, convert every LayerNorm of the backbone to `norm`, by default PRepBN."""
    pretrained: bool = False
    """Start from the backbone's released weights: the published ones, or for timm's models timm's."""
    backbone_weights: NonEmptyStr | None = None
    """Start the backbone from a classifier: a published `.pth` file or a `model.safetensors` that `slab train`
    wrote."""
    weights: NonEmptyStr | None = None
    """Start from a whole detector that `slab detect train` wrote; it determines the backbone and all sizes."""
    new_predictors: bool = False
    """Initialise the layers of `weights` that predict classes anew, for data with other classes."""
    freeze_norms: Literal["auto", "always", "never"] = "auto"
    """Freeze the running statistics of the backbone's norms; `auto` does if they were loaded."""
    freeze_backbone: bool = False
    """Train only the pyramid and the heads."""
    checkpoint_activations: bool = False
    """Recompute the backbone's activations in the backward pass instead of keeping them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "pretrained" in self.args:
            raise ValueError(
                "model.args.pretrained would fetch weights whenever the detector is loaded; say model.pretrained"
            )
        refuse_two_norms(self.norm, self.eta, self.args)
        if (self.weights is not None) + (self.backbone_weights is not None) + self.pretrained > 1:
            raise ValueError("give one of model.weights, model.backbone_weights and model.pretrained")
        if self.new_predictors and self.weights is None:
            raise ValueError("model.new_predictors is for a detector to start from; give model.weights")
        if self.freeze_backbone and not self.starts_trained:
            raise ValueError("model.freeze_backbone needs a trained one; give model.backbone_weights or model.weights")

    @property
    def starts_trained(self) -> bool:
        """Whether the backbone's weights come from somewhere."""
        return self.pretrained or self.weights is not None or self.backbone_weights is not None


@dataclass(kw_only=True)
class DetectionData(Settings):
    """Which images and annotations."""

    path: NonEmptyStr = "digits"
    """A folder with `train2017`, `val2017` and `annotations/instances_{train,val}2017.json`, or `digits`: 600 images
    made from scikit-learn's digits."""
    train_images: NonEmptyStr | None = None
    """Folder of the images to train on, if not the usual one."""
    train_annotations: NonEmptyStr | None = None
    """COCO file of the images to train on, if not the usual one."""
    val_images: NonEmptyStr | None = None
    """Folder of the images to evaluate on, if not the usual one."""
    val_annotations: NonEmptyStr | None = None
    """COCO file of the images to evaluate on, if not the usual one."""
    orientation: Literal["exif", "stored"] = "exif"
    """Orientation that the annotations refer to: `exif`, images rotated by their EXIF data, as viewers show them;
    `stored`, the pixels as they are in the file, as tools without EXIF support show them."""
    masks: bool = True
    """Objects have masks; switch off for boxes alone."""
    max_unreadable: ShareOrCount = 0.01
    """Missing or unreadable images to tolerate: below 1 a share of all images, from 1 on a count, 0 for none."""

    @property
    def embedded(self) -> bool:
        """Whether the images are the digits; paths given by name are files in any case."""
        given = (self.train_images, self.train_annotations, self.val_images, self.val_annotations)
        return self.path == "digits" and not any(given)

    @property
    def upright(self) -> bool:
        """Whether pictures are turned as their EXIF data says."""
        return self.orientation == "exif"


@dataclass(kw_only=True)
class DetectionAugment(Settings):
    """How images become the detector's input. Defaults are the published pipeline of the Swin detectors."""

    policy: Literal["multiscale", "single", "none"] = "multiscale"
    """`multiscale`: a flip and one of many sizes, half the time after a random crop. `single`: a flip and one size, as
    published for PVT. `none`: as for validation."""
    size: Pixels = 800
    """Shorter side in pixels, in evaluation, and for `single` and `none` in training too."""
    max_size: Pixels = 1333
    """Limit of the longer side in pixels; the shorter side shrinks with it."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip (`multiscale`, `single`)."""
    sizes: Annotated[tuple[Pixels, ...], NotEmpty()] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Shorter sides to choose from at random (`multiscale`)."""
    crop_sizes: Annotated[tuple[Pixels, ...], NotEmpty()] = (400, 500, 600)
    """Shorter sides before a crop, to choose from at random (`multiscale`)."""
    crop_range: tuple[Pixels, Pixels] = (384, 600)
    """Smallest and largest height and width of a crop (`multiscale`); smaller images are not cropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_range[0] > self.crop_range[1]:
            raise ValueError(f"crop_range must be the least side and the largest, got {self.crop_range}")


@dataclass(kw_only=True)
class DecayConfig(OptimizerConfig):
    """Optimizer, one of timm's, and which parameters it decays."""

    lr: PositiveFloat = 1e-3
    """Learning rate for a batch of `lr_base_batch`."""
    lr_base_batch: PositiveInt | None = None
    """Total batch size that the learning rate is given for: it is multiplied by the actual total batch size over this
    one. null uses it unscaled."""
    clip_norm: PositiveFloat | None = 1.0
    """Clip the gradient to this norm; null does not clip, as published."""
    no_decay: list[NonEmptyStr] = field(
        default_factory=lambda: ["norm", "relative_position_bias_table", "absolute_pos_embed"]
    )
    """Do not decay parameters whose names contain one of these; `norm` includes every RepBN and PRepBN."""
    decay_vectors: bool = False
    """Decay one-dimensional parameters too, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_decay is not None:
            raise ValueError("optimizer.layer_decay is for classifiers; leave it out")


@dataclass(kw_only=True)
class RateConfig(Settings):
    """Learning rate schedule; updated at every optimizer step."""

    name: Literal["step", "cosine"] = "step"
    """`step` multiplies the rate by `decay` after each of `milestones`, as published; `cosine` lowers it to 0 over the
    whole training."""
    milestones: list[PositiveInt] = field(default_factory=lambda: [8, 11])
    """Epochs after which the rate falls (`step`)."""
    decay: Fraction = 0.1
    """Factor at each milestone (`step`)."""
    warmup_steps: NonNegativeInt = 500
    """Optimizer steps of linear warm-up."""
    warmup_start: Fraction = 0.001
    """Rate at the start of the warm-up, as a share of the full rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"lr_schedule.milestones must be rising epochs from 1 on, got {self.milestones}")


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Everything about a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which backbone."""
    detector: DetectorConfig = field(default_factory=lambda: DetectorConfig(**SMALL_DETECTOR))
    """All of the detector but the backbone; the number of classes and whether there are masks follow the data."""
    data: DetectionData = field(default_factory=DetectionData)
    """Which images and annotations."""
    augment: DetectionAugment = field(default_factory=lambda: DetectionAugment(policy="none", size=128, max_size=128))
    """What they go through."""
    optimizer: DecayConfig = field(default_factory=DecayConfig)
    """How weights move."""
    lr_schedule: RateConfig = field(default_factory=lambda: RateConfig(name="cosine", warmup_steps=50))
    """How fast."""
    gamma: FadeConfig = field(default_factory=lambda: FadeConfig(fade=0.5))
    """How LayerNorm fades."""
    recalibrate: RecalibrateConfig = field(default_factory=RecalibrateConfig)
    """Statistics at the end, unless they stand still."""
    epochs: Epochs = 8
    """Passes over the training data."""
    batch_size: PositiveInt = 8
    """Images per batch in each process."""
    baseline: bool = field(default=False, metadata=HARMLESS)
    """Also train the LayerNorm baseline, in `output`/baseline."""
    twin: bool | None = field(default=None, metadata=HARMLESS)
    """Deprecated: the old name of `baseline`."""
    cpu_threads: Threads | None = 1
    """CPU threads of each process; null leaves the number to torch. A detector's many small operations were ten times
    slower on two threads of a busy machine (7.7 instead of 0.76 s per step)."""
    num_workers: Workers = field(default=0, metadata=HARMLESS)
    """Processes that decode images; no effect on the result."""
    output: NonEmptyStr = field(default="runs/detection_digits", metadata=HARMLESS)
    """Folder of this run; a run that was stopped resumes if its folder is given again."""
    log_every: PositiveInt = field(default=20, metadata=HARMLESS)
    """Optimizer steps between log entries."""
    eval_every: PositiveInt = field(default=4, metadata=HARMLESS)
    """Epochs between evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.twin is not None:
            current_name("twin")
            self.baseline, self.twin = self.baseline or self.twin, None

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`RunConfig.to_dict`; settings by their current names alone."""
        return {name: value for name, value in super().to_dict().items() if name not in RENAMED}

    def harmless(self) -> set[str]:
        """Dotted keys that may differ when a run goes on."""
        return super().harmless() | set(HARMLESS_DATA)
