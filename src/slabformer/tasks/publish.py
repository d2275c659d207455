"""A saved model as timm shares models: a folder of weights, configuration and model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slabformer._extras import require
from slabformer._files import write_json, write_text
from slabformer.models.weights.hub import CARD, CONFIG, FOLDER, HUB, WEIGHTS
from slabformer.nn.norms import norms_of
from slabformer.tasks.engine.documents import read_json
from slabformer.tasks.saved_model import ModelInfo, save_model

PAPER = "https://arxiv.org/abs/2405.11582"
CITATION = """@inproceedings{guo2024slab,
  title = {SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
           Normalization},
  author = {Guo, Jialong and Chen, Xinghao and Tang, Yehui and Wang, Yunhe},
  booktitle = {International Conference on Machine Learning},
  year = {2024}
}"""
ONLY_HERE = "timm alone cannot rebuild that: load it with slabformer."
WITH_TIMM = """With timm, for training or inference:
```python
import slabformer  # registers the model
import timm

model = timm.create_model("{place}", pretrained=True)
```
"""
WITH_SLABFORMER = """With slabformer, in eval mode and with what images it expects:
```python
from slabformer.tasks.saved_model import load_model

model, info = load_model("{place}")
```
On the command line: `slab eval {place} --data /data/imagenet`, `slab predict {place} photo.jpg`.
"""


def save_folder(
    model: nn.Module,
    folder: Path,
    info: ModelInfo,
    *,
    figures: Mapping[str, str] | None = None,
    repo: str | None = None,
    license: str = "unknown",
) -> list[Path]:
    """Write ``model.safetensors``, ``config.json`` and ``README.md`` into ``folder``.

    ``load_model`` reads the folder back whatever the model; ``timm.create_model("local-dir:...")`` unless norms were
    converted or folded, which timm would not know how to rebuild: it is then told no model's name, and says so.

    Args:
        model: Whatever :func:`slabformer.tasks.saved_model.save_model` takes.
        folder: Created if it is not there.
        info: What the model is.
        figures: Further lines of the model card: accuracy, multiply-adds.
        repo: Where on the hub it will lie, for the card.
        license: Of the weights, in the hub's spelling.

    Raises:
        ValueError: If an argument of the model cannot be written as JSON.
        OSError: If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    info = save_model(model, folder / WEIGHTS, info)
    _write_config(model, folder / CONFIG, info)
    place = f"{HUB}:{repo}" if repo else f"{FOLDER}:{folder}"
    write_text(folder / CARD, model_card(model, info, place, figures or {}, license))
    return [folder / name for name in (WEIGHTS, CONFIG, CARD)]


def for_timm(info: ModelInfo) -> bool:
    """Whether timm alone can rebuild the model from its name and arguments."""
    return not (info.fused or info.converted)


def model_card(model: nn.Module, info: ModelInfo, place: str, figures: Mapping[str, str], license: str) -> str:
    """What the model is, its figures, and how to load it, with the hub's metadata above it."""
    library = "timm" if for_timm(info) else "slabformer"
    size = "x".join(map(str, info.input_size[1:]))
    details = {
        "Architecture": info.model + (f" with {info.model_args}" if info.model_args else ""),
        "Norms": _norms(model, info) or "as timm builds them",
        **({"Attention by stage": model.attention} if isinstance(getattr(model, "attention", None), str) else {}),
        "Images": f"{size} pixels, {info.interpolation}, centre crop of {info.crop_pct:g}",
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
        **figures,
        "Paper": PAPER,
    }
    usage = (WITH_TIMM if for_timm(info) else "") + WITH_SLABFORMER
    card = {
        "tags": ["image-classification", "slabformer", *(["timm"] if for_timm(info) else [])],
        "library_name": library,
        "license": license,
        "description": _description(model, info),
        "details": details,
        "usage": usage.format(place=place),
        "citation": CITATION,
    }
    return require("timm.models._hub", extra="vision").generate_readme(card, place.rpartition("/")[2])


def _description(model: nn.Module, info: ModelInfo) -> str:
    what = f"An image classifier with {len(info.class_names) or getattr(model, 'num_classes', 'other')} classes"
    if info.fused:
        return f"{what}, without LayerNorm: its norms are folded into their neighbours. {ONLY_HERE}"
    if info.converted:
        return f"{what}, whose norms were converted. {ONLY_HERE}"
    return f"{what}; `slabformer.fuse` folds its norms into their neighbours." if _norms(model, info) else f"{what}."


def _norms(model: nn.Module, info: ModelInfo) -> str:
    """Which of our norms there are; empty where there is none."""
    kinds = {row.title: row for _, row in norms_of(model) if row.build is not None and row.scale_shift is not None}
    return "folded" if info.fused else ", ".join(kinds)


def _write_config(model: nn.Module, path: Path, info: ModelInfo) -> None:
    """timm's ``config.json``."""
    preprocessing = {key: getattr(info, key) for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    settings: dict[str, Any] = {"pretrained_cfg": {**preprocessing, "custom_load": False}}
    if info.class_names:
        settings["label_names"] = info.class_names
    hub = require("timm.models._hub", extra="vision")
    hub.save_config_for_hf(model, str(path), model_config=settings, model_args=info.model_args)
    if not for_timm(info):
        config = read_json(path)
        how = "fused" if info.fused else "converted"
        config["architecture"] = f"{info.model} ({how}: load it with slabformer)"
        write_json(path, config)
