"""`slab deploy`: a model as a folder for the runtime on which it is fastest, which runs without slabformer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.table import Table
from rich.text import Text

from slabformer._defaults import DEPLOY_BUDGET, Precision, TargetName
from slabformer.cli.common import add_model_options, example_images, load_with_weights
from slabformer.cli.data import add_data_options
from slabformer.cli.forms import agreement_of, calibration_of, evaluated
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FolderToWrite, PositiveInt, Seconds, Threads

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from slabformer.deployment.deploy import Deployed
    from slabformer.tasks.classification.evaluate import EvalResult
    from slabformer.tasks.saved_model import ModelInfo

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """Options of `slab deploy`."""
    made = Parser(
        "slab deploy",
        "Write a model for other runtimes on the CPU: norms folded first, each target held against the model, all "
        "timed in turns, the fastest kept as a folder with its preprocessing, class names, figures and checksums. "
        "run.py in the folder runs it with the runtime alone, and sf.load_deployed loads it.",
        [
            "slab deploy runs/digits/model.safetensors --data digits --output deployed",
            "slab deploy model.safetensors --target openvino --dtype int8 --data X -o out",
            "slab deploy slab_deit_tiny --pretrained --target onnxruntime -o deployed",
        ],
    )
    add_model_options(made)
    made.add_argument(
        "--target", type=TargetName, default="auto", help="what it shall run on; auto takes the fastest installed"
    )
    made.add_argument("--dtype", type=Precision, default="float32", help="of weights and arithmetic")
    made.add_argument("--output", type=FolderToWrite, required=True, help="folder to write the deployed model to")
    made.add_argument("--overwrite", action="store_true", help="replace the deployed model that is there")
    made.add_argument("--images", type=PositiveInt, default=1, help="images per batch in deployment, to time it with")
    made.add_argument("--threads", type=Threads | None, help="of every runtime; all cores by default")
    made.add_argument("--seconds", type=Seconds, default=10.0, help="time to measure for")
    made.add_argument(
        "--budget", type=Seconds, default=DEPLOY_BUDGET, help="seconds after which auto builds no further target"
    )
    add_data_options(made, required=False, what_for="images to compare accuracies on, and for int8 to see ranges")
    made.add_argument(
        "--calibrate", type=PositiveInt, default=300, help="training images that show the ranges of activations"
    )
    return made


def run(config: Namespace) -> Outcome:
    """Fuse, write for each target, compare, time, keep the fastest.

    Raises:
        ValueError: If int8 is asked for without data.
    """
    import torch

    import slabformer as sf
    from slabformer._files import check_replaceable
    from slabformer.deployment.artifact import PICTURE, owned_files
    from slabformer.deployment.targets.table import usable
    from slabformer.measure.timing import num_threads

    if config.dtype == "int8" and config.data is None:
        raise ValueError("int8 needs images that show the ranges of activations; give --data")
    owned = owned_files(config.output) if config.overwrite else None
    check_replaceable(config.output, owned)  # before anything is loaded
    usable(config.target, config.dtype)
    config.device = "cpu"
    model, info = load_with_weights(config)
    calibration = calibration_of(config, info) if config.dtype == "int8" else []
    with num_threads(config.threads), torch.no_grad():
        deployed = sf.deploy(
            model,
            example_images(info, batch_size=config.images),
            dtype=getattr(torch, config.dtype),
            target=config.target,
            seconds=config.seconds,
            budget=config.budget,
            calibration=calibration,
        )
        results = {} if config.data is None else _compared(config, info, model, deployed)
    deployed.save(
        config.output,
        preprocessing=_preprocessing(info),
        class_names=info.class_names,
        overwrite=config.overwrite,
    )
    files = [config.output]
    picture = config.output / PICTURE
    if _draw(config, info, deployed, picture):
        files.append(picture)
    shown: list[Any] = [Text(deployed.report.table()), *([_table(results)] if results else [])]
    return Outcome(data={**deployed.report.to_dict(), **results}, shown=shown, files=files)


def _compared(config: Namespace, info: ModelInfo, model: nn.Module, deployed: Deployed) -> dict[str, Any]:
    """Accuracy of the model and of what was deployed, and how often they agree."""
    forms = {"model": model, "deployed": deployed}
    results: dict[str, EvalResult] = dict(evaluated(config, info, forms))
    accuracies = {name: result.to_dict() for name, result in results.items()}
    return {"accuracy": accuracies, "same_top1": agreement_of(config, info, forms)}


def _preprocessing(info: ModelInfo) -> dict[str, Any]:
    """How an image becomes an input: resized, cropped, scaled to [0, 1], normalised."""
    channels, height, width = info.input_size
    return {
        "channels": channels,
        "height": height,
        "width": width,
        "mean": list(info.mean),
        "std": list(info.std),
        "interpolation": info.interpolation,
        "crop_pct": info.crop_pct,
    }


def _draw(config: Namespace, info: ModelInfo, deployed: Deployed, to: Path) -> bool:
    """The bar chart, where there is matplotlib and something was measured."""
    from slabformer.figures.plots import latency_bars, save

    steps = deployed.report.steps
    if not config.seconds:
        return False
    try:
        figure = latency_bars(
            {step.name: step.p50_ms for step in steps},
            deployed.report.taken,
            title=f"{info.model} in {config.dtype}, batch {config.images}",
            caption=str(deployed.report.machine),
        )
    except ImportError as error:
        logger.warning("no bar chart: %s", error)
        return False
    save(figure, to)
    return True


def _table(results: dict[str, Any]) -> Table:
    table = Table(caption=f"top-1 class alike on {results['same_top1']:.2%} of the images")
    table.add_column("form")
    for heading in ("top-1 %", "loss"):
        table.add_column(heading, justify="right")
    for name, result in results["accuracy"].items():
        table.add_row(name, f"{100 * result['top1']:.2f}", f"{result['loss']:.4f}")
    return table
