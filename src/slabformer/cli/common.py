"""What the verbs share: how a model is named, loaded and fed."""

from __future__ import annotations

from collections.abc import Sequence
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


def add_model_options(parser: Parser, *, required: bool = True, both_sides: bool = False) -> None:
    """``MODEL`` and all that says which weights and input size it has: one number, or ``both_sides``."""
    if required:
        parser.add_argument("model", type=NonEmptyStr, help=MODEL_HELP)
    else:
        parser.add_argument("model", type=NonEmptyStr | None, nargs="?", help=MODEL_HELP)
    add_weight_options(parser, both_sides)


def add_weight_options(
    parser: Parser,
    both_sides: bool = False,
    checkpoint: str = "published weights (.pth) for a model given by name",
) -> None:
    """Which weights and input size a model has; ``checkpoint`` is the help of that option."""
    parser.add_argument("--checkpoint", type=ExistingFile | None, help=checkpoint)
    parser.add_argument(
        "--pretrained", action="store_true", help="download the released weights of a model given by name"
    )
    if both_sides:
        told = "one number for height and width of images, or both; by default the model's own"
        parser.add_argument("--input-size", type=Pixels, nargs="+", help=told)
    else:
        parser.add_argument(
            "--input-size", type=Pixels | None, help="height and width of images; by default the model's own"
        )


def load(config: Namespace) -> tuple[nn.Module, ModelInfo]:
    """The model that :func:`add_model_options` describes, in eval mode, and what it is.

    Raises:
        ValueError: If it is unknown, or options do not go together.
        FileNotFoundError: If a file is missing.
    """
    size = _size_of(config.input_size)
    if not is_file(config.model):
        return _named(config.model, config.checkpoint, config.pretrained, size)
    if config.checkpoint is not None or config.pretrained:
        raise ValueError(
            f"{config.model} holds its weights; --checkpoint and --pretrained are for a model given by name"
        )
    from slabformer.tasks.saved_model import load_model

    model, info = load_model(config.model)
    if size is not None and size != tuple(info.input_size[1:]):
        model, info = _resized(model, info, size)
    return model, info


def _size_of(given: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width."""
    if given is None:
        return None
    sides = (given,) if isinstance(given, int) else tuple(given)
    if len(sides) > 2:
        raise ValueError(f"--input-size takes one number, or height and width; got {len(sides)} numbers")
    return sides[0], sides[-1]


def _side_or_sides(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else size


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


def _named(
    name: str, checkpoint: Path | None, pretrained: bool, size: tuple[int, int] | None
) -> tuple[nn.Module, ModelInfo]:
    if checkpoint is not None and pretrained:
        raise ValueError("--checkpoint and --pretrained exclude each other; give one")
    import slabformer as sf
    from slabformer.tasks.saved_model import ModelInfo

    model, arguments = _created(name, pretrained, size)
    if checkpoint is not None:
        sf.load_published(model, checkpoint)
    settings: Any = model.pretrained_cfg
    given = settings["input_size"] if size is None else (settings["input_size"][0], *size)
    taken: dict[str, Any] = {key: settings[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return model.eval(), ModelInfo(model=name, model_args=arguments, class_names=[], input_size=given, **taken)


def _created(name: str, pretrained: bool, size: tuple[int, int] | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what it was made with; one that is made for no size takes any."""
    from slabformer.tasks.saved_model import create_model

    arguments: dict[str, Any] = {} if size is None else {"img_size": _side_or_sides(size)}
    try:
        return create_model(name, pretrained=pretrained, **arguments), arguments
    except ValueError as error:
        if not arguments or "unexpected keyword argument 'img_size'" not in str(error):
            raise
        return create_model(name, pretrained=pretrained), {}


def _resized(model: nn.Module, info: ModelInfo, size: tuple[int, int]) -> tuple[nn.Module, ModelInfo]:
    if not hasattr(model, "set_input_size"):
        own = " x ".join(map(str, dict.fromkeys(info.input_size[1:])))
        raise ValueError(f"{info.model} takes {own} pixels and cannot be resized; leave --input-size out")
    resize: Any = model.set_input_size
    resize(img_size=_side_or_sides(size))
    arguments = {**info.model_args, "img_size": _side_or_sides(size)}
    return model, replace(info, input_size=(info.input_size[0], *size), model_args=arguments)
