"""`slab deploy`: a model as a folder for the runtime on which it is fastest, which runs without slabformer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.text import Text

from slabformer._defaults import DEPLOY_BUDGET, Precision, TargetName
from slabformer.cli.common import add_model_options
from slabformer.cli.data import add_data_options
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FolderToWrite, Pixels, PositiveInt, Seconds, Threads

if TYPE_CHECKING:
    from pathlib import Path

    from slabformer.deployment.deploy import Deployed

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """Options of `slab deploy`."""
    made = Parser(
        "slab deploy",
        "Write a model for other runtimes on the CPU: norms folded first, each target held against the model, all "
        "timed in turns, the fastest kept as a folder with its preprocessing, class names, figures and checksums. "
        "run.py in the folder runs it with the runtime alone, and sf.load_deployed loads it. Takes classifiers, "
        "detectors and language models.",
        [
            "slab deploy runs/digits/model.safetensors --data digits --output deployed",
            "slab deploy model.safetensors --target openvino --dtype int8 --data X -o out",
            "slab deploy slab_deit_tiny --pretrained --target onnxruntime -o deployed",
            "slab deploy runs/books --context 512 --target openvino -o writer",
            "slab deploy detector.safetensors --size 480 640 --target onnxruntime -o finder",
        ],
    )
    add_model_options(made, both_sides=True)
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
    made.add_argument(
        "--context", type=PositiveInt | None, help="tokens that a language model's cache holds; by default its longest"
    )
    made.add_argument(
        "--size",
        type=Pixels | None,
        nargs=2,
        help="largest height and width of a detector's images; by default its own",
    )
    add_data_options(made, required=False, what_for="images to compare accuracies on, and for int8 to see ranges")
    made.add_argument(
        "--calibrate", type=PositiveInt, default=300, help="training images that show the ranges of activations"
    )
    return made


def run(config: Namespace) -> Outcome:
    """Fuse, write for each target, compare, time, keep the fastest.

    Raises:
        ValueError: If int8 is asked for without data, or an option is for another kind of model.
    """
    import torch

    import slabformer as sf
    from slabformer._files import check_replaceable
    from slabformer.cli.deployed import subject_of
    from slabformer.deployment.artifact import PICTURE, owned_files
    from slabformer.deployment.targets.table import usable
    from slabformer.measure.timing import num_threads

    owned = owned_files(config.output) if config.overwrite else None
    check_replaceable(config.output, owned)  # before anything is loaded
    config.device = "cpu"
    subject = subject_of(config)
    usable(config.target, config.dtype)
    model, inputs = subject.load()
    calibration = subject.calibration() if config.dtype == "int8" else []
    with num_threads(config.threads), torch.no_grad():
        deployed = sf.deploy(
            model,
            inputs,
            dtype=getattr(torch, config.dtype),
            target=config.target,
            seconds=config.seconds,
            budget=config.budget,
            calibration=calibration,
            axes=subject.axes,
        )
        results, tables = subject.compared(model, deployed)
    deployed.save(
        config.output,
        preprocessing=subject.preprocessing(),
        class_names=subject.class_names(),
        overwrite=config.overwrite,
    )
    files = [config.output]
    picture = config.output / PICTURE
    if _draw(config, subject.title, deployed, picture):
        files.append(picture)
    shown: list[Any] = [Text(deployed.report.table()), *tables]
    return Outcome(data={**deployed.report.to_dict(), **results}, shown=shown, files=files)


def _draw(config: Namespace, title: str, deployed: Deployed, to: Path) -> bool:
    """The bar chart, where there is matplotlib and something was measured."""
    from slabformer.figures.plots import latency_bars, save

    steps = deployed.report.steps
    if not config.seconds:
        return False
    try:
        figure = latency_bars(
            {step.name: step.p50_ms for step in steps},
            deployed.report.taken,
            title=f"{title} in {config.dtype}, batch {config.images}",
            caption=str(deployed.report.machine),
        )
    except ImportError as error:
        logger.warning("no bar chart: %s", error)
        return False
    save(figure, to)
    return True
