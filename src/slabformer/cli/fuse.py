"""`slab fuse`: fold every norm into its neighbours, verify, save."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from slabformer.cli.common import add_model_options, example_images, load
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ModelToWrite, NonEmptyStr, Tolerance

if TYPE_CHECKING:
    from torch import nn

    from slabformer.surgery.fuse import FuseReport
    from slabformer.tasks.saved_model import ModelInfo

ACTIONS = {"forward": "[green]forward[/]", "backward": "[blue]backward[/]", "kept": "[yellow]kept[/]"}


def parser() -> Parser:
    """Options of `slab fuse`."""
    from slabformer._defaults import RTOL

    made = Parser(
        "slab fuse",
        "Fold every norm into its neighbouring layers, verify that the outputs are the same, and save the fused model.",
        [
            "slab fuse runs/train/model.safetensors --output fused.safetensors",
            "slab fuse slab_swin_tiny --pretrained -o fused.safetensors --keep 'layers.3.*'",
        ],
        json_files=True,
    )
    add_model_options(made)
    made.add_argument("--output", type=ModelToWrite, required=True, help="file to write the fused model to")
    add_keep_option(made, "blocks.*")
    made.add_argument(
        "--outputs",
        type=NonEmptyStr,
        nargs="+",
        default=[],
        help="methods to keep working besides forward, e.g. forward_features",
    )
    made.add_argument(
        "--fixed-size", action="store_true", help="fold for this input size only; the fused model refuses others"
    )
    made.add_argument("--untie", action="store_true", help="give shared layers separate copies")
    made.add_argument(
        "--plain",
        action="store_true",
        help="fail unless the weights fit timm's own model built without norms, and print how to build it",
    )
    made.add_argument(
        "--rtol", type=Tolerance, default=RTOL, help="largest difference allowed, relative to the scale of the outputs"
    )
    return made


def add_keep_option(parser: Parser, example: str) -> None:
    """``--keep``, with a pattern of names as an ``example``."""
    help = f"modules whose outputs must not change, by name or pattern, e.g. '{example}'"
    parser.add_argument("--keep", type=NonEmptyStr, nargs="+", default=[], help=help)


def run(config: Namespace) -> Outcome:
    """Fuse, verify, save; nothing is saved that differs."""
    import slabformer as sf
    from slabformer.tasks.saved_model import save_model

    output = config.output
    model, info = load(config)
    images = example_images(info, batch_size=2)
    fused, report = sf.fuse(
        model,
        images,
        keep=config.keep,
        outputs=config.outputs,
        fixed_size=config.fixed_size,
        untie=config.untie,
    )
    result = sf.verify(model, fused, [example_images(info, batch_size=4, seed=seed) for seed in (1, 2)], config.rtol)
    recipe = plain_recipe(fused, info, config.rtol) if config.plain else ""
    save_model(fused, output, info)
    shown: list[RenderableType] = [fuse_table(report), f"{report.summary()}\n{result}"]
    data = {**report.to_dict(), "verify": asdict(result)}
    if recipe:
        shown.append(f"load it without slabformer: {recipe}")
        data["plain"] = recipe
    return Outcome(data=data, shown=shown, files=[output])


def plain_recipe(fused: nn.Module, info: ModelInfo, rtol: float) -> str:
    """The expression that builds a model of timm's own for the fused weights; it was tried.

    Raises:
        ValueError: If there is none.
    """
    from torch import nn

    import slabformer as sf
    from slabformer._extras import require
    from slabformer.models.registry import baseline_of
    from slabformer.nn import Folded
    from slabformer.surgery.fuse.tree.files import plain_
    from slabformer.tasks.saved_model import create_model

    timm, refusals = require("timm", extra="vision"), []
    for name in (baseline_of(info.model), info.model):
        if name is None or not timm.model_entrypoint(name).__module__.startswith("timm."):
            continue
        # Swins read attributes off their norms while they are built, which nn.Identity lacks
        for norm_layer, words in ((nn.Identity, "torch.nn.Identity"), (Folded, "slabformer.nn.Folded")):
            try:
                stock = create_model(name, norm_layer=norm_layer, **_arguments(fused, info))
            except (AttributeError, ValueError) as error:
                refusals.append(f"{name} cannot be built with norm_layer={words} ({error})")
                continue
            try:
                sf.verify(fused, plain_(stock, fused), example_images(info, batch_size=2), rtol)
            except ValueError as error:
                refusals.append(str(error))
                continue
            arguments = "".join(f", {key}={value!r}" for key, value in _arguments(fused, info).items())
            return f"timm.create_model({name!r}, norm_layer={words}{arguments})"
    raise ValueError(refusals[0] if refusals else f"timm has no model of its own for {info.model}; leave --plain out")


def _arguments(fused: nn.Module, info: ModelInfo) -> dict[str, Any]:
    classes = getattr(fused, "num_classes", None)
    return {**info.model_args, **({} if classes is None else {"num_classes": classes})}


def fuse_table(report: FuseReport) -> Table:
    """Where each norm went."""
    table = Table("norm", "went", "into, or why not", title="norms")
    for outcome in report:
        table.add_row(outcome.name, ACTIONS[outcome.action], escape(outcome.in_words()))
    for norm in report.left:
        table.add_row(norm.name, "[red]left[/]", escape(f"{norm.kind}: {norm.reason} [{norm.code}]"))
    return table
