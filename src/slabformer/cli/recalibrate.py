"""`slab recalibrate`: replace running statistics by those of the training images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from slabformer.cli.common import add_model_options
from slabformer.cli.data import add_data_options, add_device_option, data_of, load_trained, progress_bar
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ModelToWrite, PositiveInt, Seed

if TYPE_CHECKING:
    from torch import nn

    from slabformer.tasks.classification.data import Loader


def parser() -> Parser:
    """Options of `slab recalibrate`."""
    made = Parser(
        "slab recalibrate",
        "Replace the running statistics of every norm by those of the training images; parameters stay.",
        [
            "slab recalibrate model.safetensors --data digits -o new.safetensors",
            "slab recalibrate m.safetensors --data PATH --num-batches 99 -o new.safetensors",
        ],
    )
    add_model_options(made)
    add_data_options(made)
    add_device_option(made)
    made.add_argument("--output", type=ModelToWrite, required=True, help="the recalibrated model, a .safetensors file")
    made.add_argument(
        "--num-batches", type=PositiveInt | None, help="stop after so many, drawn at random; all by default"
    )
    made.add_argument("--seed", type=Seed, default=0, help="picks the batches")
    made.add_argument(
        "--augment", action="store_true", help="augment images by the published recipe instead of as for evaluation"
    )
    return made


def run(config: Namespace) -> Outcome:
    """Recalibrate and save."""
    import slabformer as sf
    from slabformer.nn.controls import repbn_modules
    from slabformer.tasks.saved_model import save_model

    model, info = load_trained(config)
    if info.fused:
        raise ValueError(f"{config.model} is fused, its statistics are in the weights; recalibrate before fusing")
    loader = _loader(config, data_of(config, info, "train"))
    total = min(config.num_batches or len(loader), len(loader))
    with progress_bar("recalibrate", total) as advance:

        def forward(model: nn.Module, batch: Any) -> None:
            model(batch[0])
            advance()

        used = sf.recalibrate_(model, loader, config.num_batches, forward)
    save_model(model.cpu(), config.output, info)
    images = min(used * config.batch_size, loader.order.count)
    norms = len(repbn_modules(model))
    return Outcome(
        data={"norms": norms, "images": images},
        shown=[f"statistics of {norms} norms over {images:,} images"],
        files=[config.output],
    )


def _loader(config: Namespace, data: Any) -> Loader:
    from slabformer.tasks.classification.config import AugmentConfig
    from slabformer.tasks.classification.data import create_loader

    return create_loader(
        data,
        AugmentConfig(policy="timm" if config.augment else "none"),
        "train",
        batch_size=config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        drop_last=False,
    )
