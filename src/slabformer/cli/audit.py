"""`slab audit`: what would fold and what would not, before anybody trains anything."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import RenderableType

from slabformer.cli.fuse import fuse_table
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import NonEmptyStr, Pixels, PositiveInt

if TYPE_CHECKING:
    from torch import nn

    Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def parser() -> Parser:
    """Options of `slab audit`."""
    made = Parser(
        "slab audit",
        "Convert a model's norms on a copy, follow each to its neighbours, and say which would fold and why the "
        "others would not; no weights are needed.",
        ["slab audit convnext_atto", "slab audit mypackage.models:build --untie"],
        json_files=True,
    )
    made.add_argument(
        "model",
        type=NonEmptyStr,
        help="a name that timm knows, a folder with a config.json of timm or transformers, or module:factory, which "
        "returns a model and a tuple of example inputs",
    )
    made.add_argument("--input-size", type=Pixels | None, help="height and width of images, if not the model's own")
    made.add_argument("--batch-size", type=PositiveInt, default=1, help="examples that run through the model")
    made.add_argument("--fixed-size", action="store_true", help="as in slab fuse")
    made.add_argument("--untie", action="store_true", help="as in slab fuse")
    made.add_argument("--meta", action="store_true", help="allocate no weights, for models too large to build")
    made.add_argument("--time", type=bool, default=True, help="time the norms of today, eager; not with --meta")
    return made


def run(config: Namespace) -> Outcome:
    """Build and audit."""
    import torch

    from slabformer.surgery.audit import audit, time_norms

    with torch.device("meta") if config.meta else nullcontext():
        model, args, kwargs = build(config.model, config.input_size, config.batch_size)
    report = audit(model, args, kwargs, fixed_size=config.fixed_size, untie=config.untie)
    shown: list[RenderableType] = [fuse_table(report), report.summary().replace(" folded", " would fold", 1)]
    found = report.to_dict()
    if config.time and not config.meta:
        taken = time_norms(model, args, kwargs)
        found["norm_seconds"], found["forward_seconds"] = taken.norms, taken.total
        shown.append(
            f"norms take about {taken.norms * 1e3:.1f} of {taken.total * 1e3:.1f} ms today ({taken.share:.0%}), eager, "
            f"{torch.get_num_threads()} threads"
        )
    return Outcome(data=found, shown=shown)


def build(model: str, input_size: int | None, batch_size: int) -> Built:
    """A model with random weights, and example inputs.

    Raises:
        ValueError: If it is neither a known name, nor such a folder, nor a factory.
    """
    if ":" in model:
        return _from_factory(model)
    if Path(model).is_dir():
        return _from_folder(Path(model), input_size, batch_size)
    return _from_timm(model, {}, input_size, batch_size)


def _from_factory(name: str) -> Built:
    from torch import Tensor, nn

    module, _, factory = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} is no module:factory that can be called: {error}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ValueError(f"{name} must return (model, example inputs), got {type(made).__name__}")
    inputs = made[1]
    if isinstance(inputs, dict):
        return made[0].eval(), (), inputs
    return made[0].eval(), (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}


def _from_folder(folder: Path, input_size: int | None, batch_size: int) -> Built:
    from slabformer._extras import require
    from slabformer.models.arguments import check_arguments
    from slabformer.tasks.engine.documents import read_json

    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json; give a folder that timm or transformers saved")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings by name; give a folder that timm or transformers saved")
    if "architecture" in settings:
        name, arguments = settings["architecture"], settings.get("model_args", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError(f"{path}: architecture must be a name and model_args a mapping")
        check_arguments(name, arguments)
        return _from_timm(name, arguments, input_size, batch_size)
    if "model_type" not in settings:
        raise ValueError(f"{path} has neither timm's 'architecture' nor transformers' 'model_type'")
    import torch

    transformers = require("transformers", extra="lm")
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    if model.main_input_name == "pixel_values":
        size = input_size or model.config.image_size
        return model.eval(), (), {"pixel_values": torch.randn(batch_size, model.config.num_channels, size, size)}
    return model.eval(), (), {model.main_input_name: torch.zeros(batch_size, 8, dtype=torch.long)}


def _from_timm(name: str, arguments: dict[str, Any], input_size: int | None, batch_size: int) -> Built:
    import torch

    from slabformer.tasks.saved_model import create_model

    sized = arguments if input_size is None else {**arguments, "img_size": input_size}
    try:
        model = create_model(name, **sized)
    except ValueError:
        if sized == arguments:
            raise
        model = create_model(name, **arguments)  # takes images of any size
    channels, *size = model.pretrained_cfg["input_size"]  # type: ignore[index]
    size = [sized["img_size"]] * 2 if "img_size" in sized else size
    return model.eval(), (torch.randn(batch_size, channels, *size),), {}
