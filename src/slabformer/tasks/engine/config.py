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
    """Optimizer, one of timm's; one-dimensional parameters are not decayed."""

    name: OptimizerName = "adamw"
    """Name of an optimizer in timm."""
    lr: PositiveFloat = 5e-4
    """Learning rate for a batch of `lr_base_batch`."""
    lr_base_batch: PositiveInt | None = 512
    """Total batch size that the learning rates are given for: all are multiplied by the actual total batch size over
    this one. null uses them unscaled."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; decoupled if the optimizer's is."""
    args: Arguments = field(default_factory=dict)
    """Further arguments of the optimizer, e.g. `betas`."""
    layer_decay: PositiveFraction | None = None
    """Factor by which the learning rate falls from each layer to the one before it."""
    clip_norm: PositiveFloat | None = 5.0
    """Clip the gradient to this norm; null does not clip."""


@dataclass(kw_only=True)
class LrConfig(Settings):
    """Learning rate schedule, one of timm's; updated at every optimizer step."""

    name: LrScheduleName = "cosine"
    """Name of a schedule in timm; `constant`, `wsd` and `rsqrt` need a recent timm."""
    warmup_epochs: NonNegativeFloat = 20
    """Epochs of linear warm-up."""
    warmup_lr: NonNegativeFloat = 5e-7
    """Learning rate at the start of the warm-up; scaled like `optimizer.lr`."""
    min_lr: NonNegativeFloat = 5e-6
    """Final learning rate; scaled like `optimizer.lr`."""
    cooldown_epochs: NonNegativeInt = 0
    """Epochs at the final rate, in addition to `epochs`."""


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
    """How LayerNorm or RMSNorm fades; no effect on a model without PRepBN."""

    warmup: FractionBelowOne = 0.0
    """Share of training before the fade begins."""
    fade: PositiveFraction = 0.2
    """Share of training that the fade takes; 0.08 to 0.80 in the published models."""
    shape: Literal["linear", "cosine"] = "linear"
    """Shape of gamma's fall from 1 to 0; `linear` as published."""
    warm_statistics: bool = True
    """Update RepBN's statistics from the first step on; switched off as published."""
    stagger: FractionBelowOne = 0.0
    """Share of the fade over which the norms start to fade one after another, from the first to the last; 0 fades all
    together."""
    align: NonNegativeFloat = 0.0
    """Weight of an extra loss while the fade lasts: the distance between RepBN and the norm that it replaces."""
    guard: Annotated[float, Range(gt=1)] | None = 10.0
    """Hold gamma while the norm of the gradient or of an activation exceeds this many times its running median; null
    never holds it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.warmup, self.fade)


@dataclass(kw_only=True)
class RecalibrateConfig(Settings):
    """Population statistics from the training data, computed after training."""

    enabled: bool = True
    """Compute them; no effect on a model without RepBN."""
    batches: PositiveInt | None = None
    """Training batches to use in each process; null for one epoch."""


@dataclass(kw_only=True)
class RunConfig(Settings):
    """How a training run runs and what it writes."""

    batch_size: PositiveInt = 128
    """Samples per batch in each process."""
    accumulate: PositiveInt = 1
    """Batches per optimizer step."""
    seed: Seed = 0
    """Seed of the initial weights, the order of samples and everything else that is random."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward passes; weights stay in float32."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` uses the accelerator if there is one."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    output: NonEmptyStr = field(default="runs/train", metadata=HARMLESS)
    """Folder of this run; a run that was stopped resumes if its folder is given again."""
    resume: Literal["auto", "never"] = field(default="auto", metadata=HARMLESS)
    """`auto` resumes an unfinished run in `output`; `never` refuses to."""
    overwrite: bool = field(default=False, metadata=HARMLESS)
    """Delete the run in `output` and start again."""
    log_every: PositiveInt = field(default=50, metadata=HARMLESS)
    """Optimizer steps between log entries."""
    save_every: NonNegativeInt = field(default=0, metadata=HARMLESS)
    """Optimizer steps between checkpoints, in addition to one at the end of each epoch; 0 for none."""
    eval_every: PositiveInt = field(default=1, metadata=HARMLESS)
    """Epochs between evaluations."""
    keep: PositiveInt = field(default=2, metadata=HARMLESS)
    """Number of checkpoints to keep."""
    tensorboard: bool = field(default=True, metadata=HARMLESS)
    """Write TensorBoard events."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as in a recipe."""
        return asdict(self)

    def harmless(self) -> set[str]:
        """Dotted keys that may differ when a run goes on."""
        return {f.name for f in fields(self) if f.metadata.get("harmless")}
