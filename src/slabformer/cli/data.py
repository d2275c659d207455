"""What the verbs that read images share: which data, and where it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slabformer.cli.common import load_with_weights
from slabformer.cli.parser import Parser
from slabformer.settings import DeviceOrAuto, NonEmptyStr, PositiveFraction, PositiveInt, ShareOrCount, Workers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from slabformer.tasks.classification.config import DataConfig
    from slabformer.tasks.classification.sources import Split
    from slabformer.tasks.engine.order import OrderedLoader
    from slabformer.tasks.saved_model import ModelInfo

MOST_WORKERS = 4
Result = TypeVar("Result")


def add_data_options(parser: Parser, required: bool = True, what_for: str = "") -> None:
    """Which images, and in what portions; ``what_for`` says what they bring where they are not ``required``."""
    kinds = "a folder, hfds/NAME, torch/NAME, wds/FOLDER, or digits"
    if required:
        parser.add_argument("--data", type=NonEmptyStr, required=True, help=kinds)
    else:
        parser.add_argument("--data", type=NonEmptyStr | None, help=f"{what_for}: {kinds}")
    parser.add_argument("--root", type=NonEmptyStr | None, help="folder that a named data set is in")
    parser.add_argument("--download", action="store_true", help="let torchvision download a torch/ data set")
    parser.add_argument(
        "--split",
        type=NonEmptyStr | None,
        help="subfolder, split or shard pattern; by default whichever of the usual names is found",
    )
    parser.add_argument(
        "--validation-fraction",
        type=PositiveFraction,
        default=0.2,
        help="share of the images to hold out if a folder has classes but no splits; 1 for all",
    )
    parser.add_argument(
        "--max-unreadable",
        type=ShareOrCount,
        default=0.01,
        help="unreadable images to tolerate: below 1 a share, from 1 on a count",
    )
    parser.add_argument("--batch-size", type=PositiveInt, default=128, help="images per batch")
    parser.add_argument(
        "--num-workers",
        type=Workers,
        default=min(MOST_WORKERS, os.cpu_count() or 1),
        help="processes that decode images",
    )


def add_device_option(parser: Parser) -> None:
    """Where to run."""
    parser.add_argument("--device", type=DeviceOrAuto, default="auto", metavar="DEVICE", help="device to run on")


def data_of(config: Namespace, info: ModelInfo, split: Split) -> DataConfig:
    """The images that :func:`add_data_options` describes, prepared for the model of ``info``."""
    from slabformer.tasks.classification.predict import data_config

    return data_config(
        info,
        path=config.data,
        root=config.root,
        download=config.download,
        train_split=config.split if split == "train" else None,
        validation_split=config.split if split == "validation" else None,
        validation_fraction=config.validation_fraction,
        max_unreadable=config.max_unreadable,
    )


def load_trained(config: Namespace) -> tuple[nn.Module, ModelInfo]:
    """:func:`slabformer.cli.common.load_with_weights`, on the device that was asked for.

    Raises:
        ValueError: If the model is unknown, or would have random weights.
    """
    model, info = load_with_weights(config)
    return model.to(device_called(config.device)), info


@contextmanager
def launched_accelerator(config: Namespace) -> Iterator[Any]:
    """accelerate's, where torchrun started several processes, which then run on its devices; else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    if config.device not in ("auto", "cpu"):
        raise ValueError(f"several processes take a device each; use --device auto or cpu, not {config.device!r}")
    import torch.distributed as dist

    from slabformer.tasks.engine.devices import create_accelerator

    accelerator = create_accelerator(device=config.device)
    config.device = str(accelerator.device)
    try:
        yield accelerator
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def device_called(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator where there is one.

    Raises:
        ValueError: If there is none.
    """
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here ({str(error).splitlines()[0]}); use auto or cpu") from error


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on standard error, where that is a terminal; call what it yields with the number done (1 by default)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done=1: progress.advance(task, done)


def each_form(
    model: nn.Module, form: str, loader: OrderedLoader, measure: Callable[..., Result]
) -> Iterator[tuple[str, Result]]:
    """What ``measure(progress=...)`` makes of ``model``, called ``form``, and of the blend while gamma is above 0."""
    import slabformer as sf
    from slabformer.nn.controls import prepbn_modules

    total = -(-loader.order.count // loader.order.world_size)
    with progress_bar("evaluate", total) as advance:
        yield form, measure(progress=advance)
    norms = list(prepbn_modules(model).values())
    if any(norm.phase != "done" for norm in norms):
        gamma = max(float(norm.gamma) for norm in norms)
        with sf.blended(model), progress_bar("blend", total) as advance:
            yield f"blend, gamma {gamma:.2f}", measure(progress=advance)
