"""What `slab audit` looks at: a model and its inputs, or a trained model and its data."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from slabformer.cli.common import example_images, is_file, load, load_with_weights

if TYPE_CHECKING:
    from torch import nn

    from slabformer.converting.subjects import Subject

    Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

#: in a batch, without data and with it
EXAMPLES, EXAMPLES_OF_DATA = 1, 32


def trained(config: Namespace) -> Subject:
    """A model with its weights, and batches of data.

    Raises:
        FileNotFoundError: If there is no such model, or no data.
        ValueError: If the model would have random weights, or either cannot be read.
    """
    from slabformer._defaults import AUDIT_BATCHES
    from slabformer.converting.config import ConvertConfig
    from slabformer.converting.subjects import FolderSubject, ImageSubject

    batch_size = config.batch_size or EXAMPLES_OF_DATA
    settings = ConvertConfig(
        model=config.model,
        data=config.data,
        image_size=config.input_size,
        batch_size=batch_size,
        held_out=batch_size * (config.num_batches or AUDIT_BATCHES),
    )
    if _is_factory(config.model):
        raise ValueError(f"--data is not read for {config.model}; call slabformer.audit(model, batches=...) in Python")
    if Path(config.model).is_dir() and "architecture" not in _folder_settings(Path(config.model)):
        if config.checkpoint is not None or config.pretrained:
            raise ValueError(f"{config.model} holds its weights; leave --checkpoint and --pretrained out")
        from slabformer.cli.lm.common import quiet_transformers

        quiet_transformers()
        subject: Subject = FolderSubject(settings, 0, 1)
    else:
        subject = ImageSubject(settings, 0, 1, loaded=load_with_weights(config))
    if not subject.held_out:
        raise ValueError(f"no data in {config.data}")
    return subject


def _is_factory(model: str) -> bool:
    from slabformer.models.weights.hub import is_shared

    return ":" in model and not is_shared(model)


def build(config: Namespace) -> Built:
    """A model of any weights, and example inputs.

    Raises:
        ValueError: If it is neither a known name, nor such a file or folder, nor a factory.
    """
    name, batch_size = config.model, config.batch_size or EXAMPLES
    if _is_factory(name):
        return _from_factory(name)
    if Path(name).is_dir():
        return _from_folder(Path(name), config.input_size, batch_size)
    if is_file(name):
        model, info = load(config)
        return model, (example_images(info, batch_size),), {}
    return _from_timm(name, {}, config.input_size, batch_size)


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

    settings, path = _folder_settings(folder), folder / "config.json"
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


def _folder_settings(folder: Path) -> dict[str, Any]:
    from slabformer.tasks.engine.documents import read_json

    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json; give a folder that timm or transformers saved")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings by name; give a folder that timm or transformers saved")
    return settings


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
