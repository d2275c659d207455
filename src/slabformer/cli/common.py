"""What the verbs share: how a model is named, loaded and fed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from slabformer.cli.parser import Parser
from slabformer.settings import ExistingFile, NonEmptyStr, Pixels

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from slabformer.tasks.saved_model import ModelInfo

MODEL_HELP = "a .safetensors file or folder that slab wrote, hf-hub:user/name, or the name of a model in timm"


def add_model_options(parser: Parser, *, required: bool = True) -> None:
    """``MODEL`` and all that says which weights and input size it has."""
    if required:
        parser.add_argument("model", type=NonEmptyStr, help=MODEL_HELP)
    else:
        parser.add_argument("model", type=NonEmptyStr | None, nargs="?", help=MODEL_HELP)
    add_weight_options(parser)


def add_weight_options(parser: Parser) -> None:
    """Which weights and input size a model has."""
    parser.add_argument(
        "--checkpoint", type=ExistingFile | None, help="published weights (.pth) for a model given by name"
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="download the released weights of a model given by name"
    )
    parser.add_argument(
        "--input-size", type=Pixels | None, help="height and width of images; by default the model's own"
    )


def load(config: Namespace) -> tuple[nn.Module, ModelInfo]:
    """The model that :func:`add_model_options` describes, in eval mode, and what it is.

    Raises:
        ValueError: If it is unknown, or options do not go together.
        FileNotFoundError: If a file is missing.
    """
    if not is_file(config.model):
        return _named(config.model, config.checkpoint, config.pretrained, config.input_size)
    if config.checkpoint is not None or config.pretrained:
        raise ValueError(
            f"{config.model} holds its weights; --checkpoint and --pretrained are for a model given by name"
        )
    from slabformer.tasks.saved_model import load_model

    model, info = load_model(config.model)
    if config.input_size is not None and config.input_size != info.input_size[-1]:
        model, info = _resized(model, info, config.input_size)
    return model, info


def load_with_weights(config: Namespace) -> tuple[nn.Module, ModelInfo]:
    """:func:`load`, of a trained model.

    Raises:
        ValueError: If the model is unknown, or would have random weights.
    """
    if needs_weights(config):
        from slabformer.models.registry import check_model_name

        check_model_name(config.model)
        raise ValueError(
            f"{config.model!r} names a model without weights; give a saved .safetensors file, "
            "--pretrained, or --checkpoint FILE.pth"
        )
    return load(config)


def is_file(model: str) -> bool:
    """Whether ``model`` means a file, a folder or a repository rather than a name in timm."""
    from slabformer.models.weights.hub import is_shared

    return (
        model.endswith(".safetensors")
        or "/" in model
        or is_shared(model)
        or any(map(Path.is_file, (Path(model), Path(model, "config.json"))))
    )


def example_images(info: ModelInfo, batch_size: int, seed: int = 0) -> Tensor:
    """Random images ``(B, C, H, W)`` of the model's size, normalised as photographs come out."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, *info.input_size, generator=generator)


def needs_weights(config: Namespace) -> bool:
    """Whether the model that the options describe is freshly initialised."""
    return not (is_file(config.model) or config.checkpoint or config.pretrained)


def available_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        ValueError: If there is none.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here ({str(error).splitlines()[0]}); use --device cpu") from error
    return torch.device(name)


def _named(name: str, checkpoint: Path | None, pretrained: bool, input_size: int | None) -> tuple[nn.Module, ModelInfo]:
    if checkpoint is not None and pretrained:
        raise ValueError("--checkpoint and --pretrained exclude each other; give one")
    import slabformer as sf
    from slabformer.tasks.saved_model import ModelInfo, create_model

    arguments: dict[str, Any] = {} if input_size is None else {"img_size": input_size}
    model = create_model(name, pretrained=pretrained, **arguments)
    if checkpoint is not None:
        sf.load_published(model, checkpoint)
    settings: Any = model.pretrained_cfg
    size = settings["input_size"] if input_size is None else (settings["input_size"][0], input_size, input_size)
    taken: dict[str, Any] = {key: settings[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return model.eval(), ModelInfo(model=name, model_args=arguments, class_names=[], input_size=size, **taken)


def _resized(model: nn.Module, info: ModelInfo, input_size: int) -> tuple[nn.Module, ModelInfo]:
    if not hasattr(model, "set_input_size"):
        raise ValueError(
            f"{info.model} takes {info.input_size[-1]} pixels and cannot be resized; leave --input-size out"
        )
    resize: Any = model.set_input_size
    resize(img_size=input_size)
    arguments = {**info.model_args, "img_size": input_size}
    return model, replace(info, input_size=(info.input_size[0], input_size, input_size), model_args=arguments)
