"""`slab push`: write a model as timm shares models, into a folder or to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from jsonargparse import Namespace

from slabformer.cli.common import add_model_options, example_images, is_file
from slabformer.cli.data import load_trained
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import ExistingFile, FolderToWrite, NonEmptyStr, Where

if TYPE_CHECKING:
    from torch import nn

    from slabformer.tasks.saved_model import ModelInfo

Repository = Annotated[
    str, Where("a repository of the hub, user/name", lambda name: re.fullmatch(r"[\w.\-]+/[\w.\-]+", name) is not None)
]
NOTES = (
    'Then: timm.create_model("local-dir:shared/digits", pretrained=True), or slab eval shared/digits --data digits. A '
    "fused or converted model loads with slabformer only, any other with timm too."
)


def parser() -> Parser:
    """Options of `slab push`."""
    made = Parser(
        "slab push",
        "Write weights, configuration and model card, as timm does, into a folder or to the Hugging Face hub.",
        [
            "slab push runs/digits/model.safetensors --output shared/digits",
            "slab push fused.safetensors --repo me/slab_deit_tiny_fused --eval result.json",
        ],
        notes=NOTES,
    )
    add_model_options(made)
    made.add_argument("--output", type=FolderToWrite | None, aliases=["--folder"], help="folder to write")
    made.add_argument(
        "--repo", type=Repository | None, metavar="USER/NAME", help="push it here on the Hugging Face hub, too"
    )
    made.add_argument("--private", action="store_true", help="make the repository private if it is new")
    made.add_argument("--eval", type=ExistingFile | None, help="figures for the card: what `slab eval --json` wrote")
    made.add_argument("--license", type=NonEmptyStr, default="unknown", help="of the weights, in the hub's spelling")
    return made


def run(config: Namespace) -> Outcome:
    """Write, and push where asked.

    Raises:
        ValueError: If neither folder nor repository is given, or the file with figures holds none.
    """
    from slabformer.models.weights.hub import upload
    from slabformer.tasks.publish import save_folder

    if config.output is None and config.repo is None:
        raise ValueError("nowhere to push to; give --output FOLDER, --repo user/name, or both")
    config.device = "cpu"
    model, info = load_trained(config)
    figures = _published(config) | _measured(config.eval) | _cost(model, info)
    data, shown = {"model": info.model}, []
    with TemporaryDirectory() as temporary:
        folder = config.output or Path(temporary)
        paths = save_folder(model, folder, info, figures=figures, repo=config.repo, license=config.license)
        if config.repo is not None:
            name = upload(folder, config.repo, private=config.private, message=f"Add {info.model}")
            data["url"] = f"https://huggingface.co/{name}"
            shown.append(f"pushed to {data['url']}")
    return Outcome(data=data, shown=shown, files=[] if config.output is None else paths)


def _published(config: Namespace) -> dict[str, str]:
    """Of released weights: what was published about them."""
    from slabformer.models.weights.published import BY_MODEL

    row = None if is_file(config.model) or config.checkpoint is not None else BY_MODEL.get(config.model)
    if row is None or row.top1 is None:
        return {}
    return {"Weights": f"published ({row.url})", "ImageNet-1K top-1": f"{row.top1:.1f} % (published)"}


def _measured(path: Path | None) -> dict[str, str]:
    from slabformer.tasks.engine.documents import read_json

    if path is None:
        return {}
    try:
        forms = read_json(path)
        return {
            f"Accuracy, {form}": f"top-1 {result['top1']:.2%} of {result['images']:,} images"
            for form, result in forms.items()
        }
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what `slab eval --json` writes; run `slab eval --json > {path}`") from error


def _cost(model: nn.Module, info: ModelInfo) -> dict[str, str]:
    from slabformer.measure.timing import count_macs

    return {"Multiply-adds": f"{count_macs(model, (example_images(info, batch_size=1),)) / 1e9:.3f} G"}
