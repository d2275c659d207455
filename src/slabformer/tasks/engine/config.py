"""What the recipes of all tasks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from slabformer._extras import require
from slabformer.settings import (
    Arguments,
    Eta,
    FractionBelowOne,
    Known,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    Seed,
    Settings,
    check_fractions,
)

#: may differ when a run goes on: nothing that is trained depends on it
HARMLESS = {"harmless": True}


def _optimizers() -> set[str]:
    names = require("timm.optim", extra="vision").list_optimizers()
    return {*names, *(f"lookahead_{name}" for name in names)}


#: moved by the step; timm's `plateau` is moved by a metric
LrScheduleName = Literal["cosine", "tanh", "poly", "step", "multistep", "constant", "wsd", "rsqrt"]
OptimizerName = Annotated[str, Known(_optimizers, "an optimizer that timm knows")]


@dataclass(kw_only=True)
class OptimizerConfig(Settings):
    """timm's optimizers by name; parameters of one dimension are not decayed."""

    name: OptimizerName = "adamw"
    """Any of timm's, by its name there."""
    lr: PositiveFloat = 5e-4
    """Learning rate for a batch of `lr_base_batch`."""
    lr_base_batch: PositiveInt | None = 512
    """Total batch for which the rates are given: all are scaled by total batch / this; None takes them as they are."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled where the optimizer is."""
    args: Arguments = field(default_factory=dict)
    """Further arguments, e.g. `betas`."""
    layer_decay: PositiveFraction | None = None
    """Factor on the learning rate from layer to layer, towards the input."""
    clip_norm: PositiveFloat | None = 5.0
    """Largest norm of the gradient; null does not clip."""


@dataclass(kw_only=True)
class LrConfig(Settings):
    """timm's learning rate schedules by name, moved every optimizer step."""

    name: LrScheduleName = "cosine"
    """As in timm; `constant`, `wsd` and `rsqrt` need a timm that has them."""
    warmup_epochs: NonNegativeFloat = 20
    """Epochs of linear warm-up."""
    warmup_lr: NonNegativeFloat = 5e-7
    """Rate it starts from; scaled like `optimizer.lr`."""
    min_lr: NonNegativeFloat = 5e-6
    """Rate it ends at; scaled like `optimizer.lr`."""
    cooldown_epochs: NonNegativeInt = 0
    """Epochs at the lowest rate, after `epochs`."""


def refuse_two_norms(norm: str | None, eta: Eta | None, arguments: Mapping[str, Any]) -> None:
    """Refuse a norm, or its skip weight, that is given as a setting of its own and among a model's ``arguments``.

    Raises:
        ValueError: With the two names.
    """
    for name, value, others in (("norm", norm, ("norm", "norm_layer")), ("eta", eta, ("eta",))):
        twice = [other for other in others if value is not None and other in arguments]
        if twice:
            raise ValueError(f"give model.{name} or model.args.{twice[0]}, not both")


@dataclass(kw_only=True)
class FadeConfig(Settings):
    """How LayerNorm or RMSNorm fades; without effect on a model without PRepBN."""

    warmup: FractionBelowOne = 0.0
    """Share of training before it starts to fade."""
    fade: PositiveFraction = 0.8
    """Share of training over which it fades; the published models range from 0.08 to 0.80."""
    shape: Literal["linear", "cosine"] = "linear"
    """Of gamma's way from 1 to 0; linear as published."""
    warm_statistics: bool = True
    """Let RepBN's statistics follow the data from the first step on; false is the published rule."""
    stagger: FractionBelowOne = 0.0
    """Share of the fade over which the norms begin one after the other, first to last; 0 fades them together."""
    align: NonNegativeFloat = 0.0
    """Weight of the distance between RepBN and the norm that it replaces, added to the loss while both are there."""
    guard: Annotated[float, Range(gt=1)] | None = 10.0
    """Times its running median above which an activation or the gradient lets gamma wait; null never waits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.warmup, self.fade)


@dataclass(kw_only=True)
class RecalibrateConfig(Settings):
    """Population statistics over the training data when training is done."""

    enabled: bool = True
    """Without effect on a model without RepBN."""
    batches: PositiveInt | None = None
    """Training batches of each rank; null for an epoch."""


@dataclass(kw_only=True)
class RunConfig(Settings):
    """How a training run runs and what it writes."""

    batch_size: PositiveInt = 128
    """Samples of one process in one batch."""
    accumulate: PositiveInt = 1
    """Batches an optimizer step."""
    seed: Seed = 0
    """Of weights, order and all that is drawn on the way."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; weights stay float32."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes the accelerator where there is one."""
    compile: bool = False
    """Train through `torch.compile`."""
    output: NonEmptyStr = field(default="runs/train", metadata=HARMLESS)
    """Folder of this run; given again, the run goes on where it stopped."""
    resume: Literal["auto", "never"] = field(default="auto", metadata=HARMLESS)
    """`auto` goes on with an unfinished run in `output`; `never` refuses to."""
    overwrite: bool = field(default=False, metadata=HARMLESS)
    """Delete the run that is in `output` and start again."""
    log_every: PositiveInt = field(default=50, metadata=HARMLESS)
    """Optimizer steps between logged ones."""
    save_every: NonNegativeInt = field(default=0, metadata=HARMLESS)
    """Optimizer steps between checkpoints, beside the one of every epoch; 0 for none."""
    eval_every: PositiveInt = field(default=1, metadata=HARMLESS)
    """Epochs between evaluations."""
    keep: PositiveInt = field(default=2, metadata=HARMLESS)
    """Checkpoints that are kept."""
    tensorboard: bool = field(default=True, metadata=HARMLESS)
    """Write TensorBoard events."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as in a recipe."""
        return asdict(self)

    def harmless(self) -> set[str]:
        """Dotted keys that may differ when a run goes on."""
        return {f.name for f in fields(self) if f.metadata.get("harmless")}
