"""`slab bench`: speed of a model, or of many, fused and not, beside LayerNorm baseline and ceiling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from slabformer._moved import current_name
from slabformer.cli.common import add_model_options, available_device, example_images, load, needs_weights
from slabformer.cli.list import chosen
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import DeviceName, FolderToWrite, NonEmptyStr, PositiveInt, Seconds, Threads

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from slabformer.bench.report import BenchReport
    from slabformer.bench.zoo import ZooTable
    from slabformer.deployment.deploy import DeployReport
    from slabformer.tasks.saved_model import ModelInfo

ZOO_FOLDER = Path("benchmarks/results/zoo")
#: what decides how a model is measured; a table's rows stand for runs with the same
SETTINGS = ("against", "convert", "batch_sizes", "compile", "seconds", "input_size")
#: arguments of our models that the models they replace do not take
OWN_ARGUMENTS = ("norm", "norm_layer", "norm_eps", "attention")


def parser() -> Parser:
    """Options of `slab bench`."""
    made = Parser(
        "slab bench",
        "Time a model as given, fused, its LayerNorm baseline and its ceiling (norms and attention deleted), in turns "
        "in one process; a model without weights gets random ones. With --models, many into one table: models that are "
        "in it, measured alike, are left out, and one that breaks is a row with its error.",
        [
            "slab bench slab_deit_tiny --threads 1 --batch-sizes 1 8 --output runs/bench",
            "slab bench vit_tiny_patch16_224 --convert --no-compile",
            "slab bench slab_swin_tiny --deploy --dtype bfloat16 --batch-sizes 8",
            "slab bench --models 'slab_*' --against baseline --threads 1 --batch-sizes 8",
        ],
    )
    add_model_options(made, required=False)
    made.add_argument("--models", type=NonEmptyStr, nargs="+", default=[], help="of ours, by name or pattern: 'slab_*'")
    made.add_argument(
        "--against",
        type=NonEmptyStr,
        default="baseline",
        help="what to compare with: baseline, none, or a LayerNorm model that timm knows",
    )
    made.add_argument(
        "--convert", action="store_true", help="first replace the model's LayerNorms; it is its own baseline"
    )
    made.add_argument("--batch-sizes", type=PositiveInt, nargs="+", default=[1, 8], help="images per batch")
    made.add_argument("--threads", type=Threads | None, help="threads of torch on a CPU; all cores by default")
    made.add_argument("--compile", type=bool, default=True, help="also under torch.compile")
    made.add_argument(
        "--roofline", action="store_true", help="also what the machine reaches at best, and each variant's share of it"
    )
    made.add_argument("--deploy", action="store_true", help="instead, each step on the way to the fastest form")
    made.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="arithmetic of --deploy"
    )
    made.add_argument("--seconds", type=Seconds, default=20.0, help="time to measure for, at each batch size")
    made.add_argument("--device", type=DeviceName, default="cpu", metavar="DEVICE", help="where to run")
    made.add_argument(
        "--output",
        type=FolderToWrite | None,
        help=f"folder for bench.csv and more; {ZOO_FOLDER} by default with --models",
    )
    return made


def run(config: Namespace) -> Outcome:
    """Measure and write.

    Raises:
        ValueError: If a model and patterns are given, or neither, or no model matches.
    """
    from slabformer.bench.zoo import to_markdown
    from slabformer.measure.allocator import keep_memory

    if (config.model is None) == (not config.models):
        raise ValueError("give one model, or several with --models 'slab_*'")
    if config.deploy and config.models:
        raise ValueError("--deploy is for one model; leave --models out")
    config.against = current_name(config.against)
    device = available_device(config.device)
    keep_memory()  # for all forms alike, as sf.deploy does
    with Console(stderr=True).status("loading") as status:
        if config.deploy:
            steps = deployment(config, device)
            written = [] if config.output is None else [steps.write(config.output)]
            return Outcome(data=steps.to_dict(), shown=[Text(steps.table())], files=written)
        if config.models:
            table = _zoo(config, device, status.update)
            shown = [Markdown(to_markdown(table.rows))]
            return Outcome(data={"rows": table.rows}, shown=shown, files=[table.path, table.markdown])
        report = measure(config, device, status.update)
        written = [] if config.output is None else report.write(config.output)
        return Outcome(data=report.to_dict(), shown=[report.table()], files=written)


def measure(config: Namespace, device: torch.device, progress: Callable[[str], None]) -> BenchReport:
    """The report of the one model that the options describe.

    Raises:
        ValueError: If the model or what it is held against is unknown.
    """
    from slabformer.bench.compare import compare

    model, images, info = _subject(config, device)
    baseline = _baseline(config, info)
    return compare(
        model,
        images,
        baseline=None if baseline is None else baseline.to(device).eval(),
        batch_sizes=config.batch_sizes,
        threads=config.threads,
        compiled=config.compile,
        seconds=config.seconds,
        name=info.model,
        roofline=config.roofline,
        progress=progress,
    )


def deployment(config: Namespace, device: torch.device) -> DeployReport:
    """What each step of :func:`slabformer.deploy` makes of the model that the options describe."""
    import torch

    import slabformer as sf
    from slabformer.measure.timing import num_threads

    model, images, _ = _subject(config, device)
    dtype = None if config.dtype == "float32" else getattr(torch, config.dtype)
    with num_threads(config.threads):
        return sf.deploy(model, images, dtype=dtype, compile=config.compile, seconds=config.seconds).report


def _subject(config: Namespace, device: torch.device) -> tuple[nn.Module, Tensor, ModelInfo]:
    """The model on ``device``, as if trained, with a batch for it, and what it is."""
    import slabformer as sf

    model, info = load(config)
    if config.convert:
        sf.convert_norms_(model)
    if needs_weights(config):
        _as_if_trained(model)
    largest = max(config.batch_sizes)
    images = example_images(info, batch_size=largest if config.deploy else min(8, largest))
    return model.to(device).eval(), images.to(device), info


def _zoo(config: Namespace, device: torch.device, progress: Callable[[str], None]) -> ZooTable:
    """The table of all models that match, those that were missing measured."""
    from slabformer.bench.zoo import ZooTable
    from slabformer.measure.timing import Machine, num_threads
    from slabformer.models.registry import check_model_name

    if config.checkpoint is not None or config.pretrained:
        raise ValueError("--checkpoint and --pretrained are for one model; speeds do not depend on weights")
    if config.against not in ("baseline", "none"):
        check_model_name(config.against)
    names = list(dict.fromkeys(name for pattern in config.models for name in chosen(pattern)))
    with num_threads(config.threads):
        machine = Machine.here(device)
    settings = " ".join(f"{name}={config[name]}".replace(" ", "") for name in SETTINGS)
    table = ZooTable(config.output or ZOO_FOLDER, machine, settings)

    def one(name: str) -> BenchReport:
        place = f"{name} ({names.index(name) + 1} of {len(names)})"
        alone = config.clone()
        alone.model = name
        return measure(alone, device, lambda what: progress(f"{place}: {what}"))

    table.measure(names, one)
    return table


def _baseline(config: Namespace, info: ModelInfo) -> nn.Module | None:
    from slabformer.models.registry import baseline_of
    from slabformer.tasks.saved_model import create_model

    guess = info.model if config.convert else baseline_of(info.model)
    name = guess if config.against == "baseline" else config.against
    if name in (None, "none"):
        return None
    arguments = {key: value for key, value in info.model_args.items() if key not in OWN_ARGUMENTS}
    return create_model(name, **arguments)


def _as_if_trained(model: nn.Module) -> None:
    """Values that training would leave: speeds do not depend on them, the equality that is checked first does."""
    import torch

    import slabformer as sf
    from slabformer.nn.controls import prepbn_modules

    with torch.no_grad():
        sf.testing.randomize_norms_(model)
        for norm in prepbn_modules(model).values():
            norm.set_gamma(0.0)
