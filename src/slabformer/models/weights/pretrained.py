"""Released weights: fetched once, remembered by checksum, fitted to another head, stem or image size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from slabformer._files import write_text
from slabformer.models.weights.download import download
from slabformer.models.weights.published import BY_MODEL
from slabformer.nn.resample import Grid, resample_table

#: of the published models: a model that has as many was not asked for other ones
NUM_CLASSES = 1000


def pretrained_source(
    model: str, pretrained_cfg: Any, overlay: dict[str, Any] | None, cache_dir: str | Path | None
) -> dict[str, Any]:
    """timm's ``pretrained_cfg_overlay`` that points it to the released file, unless the caller named another source."""
    overlay = dict(overlay or {})
    if str(overlay.get("file", "")).endswith((".pth", ".pt")):
        overlay.setdefault("custom_load", True)  # a published file, which timm would take for one of its own
    if pretrained_cfg or any(overlay.get(key) for key in ("url", "file", "state_dict", "hf_hub_id")):
        return overlay
    return overlay | {"file": str(fetch(model, cache_dir)), "custom_load": True}


def fetch(model: str, cache_dir: str | Path | None = None) -> Path:
    """Path of the released weights of ``model`` in the cache, downloaded if they are not there, resumed if cut short.

    No checksums were published: the SHA-256 of the first download is kept beside the file and checked from then on.

    Args:
        model: timm name.
        cache_dir: By default where torch.hub and timm keep checkpoints.

    Raises:
        ValueError: If no weights were released for ``model``.
        ConnectionError: If they cannot be downloaded; what has come is kept for the next call.
        OSError: If the cached file has changed since its download.
    """
    published = BY_MODEL.get(model)
    if published is None or published.url is None:
        have = ", ".join(row.model for row in BY_MODEL.values() if row.file)
        raise ValueError(f"no weights were released for {model}; there are some for {have}")
    path = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints") / str(published.file)
    if not path.exists():
        download(published.url, path)
    _check_digest(path)
    return path


def _check_digest(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = path.with_name(f"{path.name}.sha256")
    if not record.exists():
        write_text(record, f"{digest}  {path.name}\n")
    elif record.read_text().split()[0] != digest:
        raise OSError(f"{path} has changed since it was downloaded; delete it and {record.name} to download it again")


def fit_head(state: dict[str, Tensor], head: nn.Module, name: str = "head") -> None:
    """Leave a head of another size as the model has it, in place; ``num_classes`` is how timm's users ask for one.

    Raises:
        ValueError: If nobody asked: the model has the default's classes, the file others.
    """
    own = {f"{name}.{key}": value for key, value in head.state_dict().items()}
    weight = state.get(f"{name}.weight")
    if weight is None or (own and own[f"{name}.weight"].shape == weight.shape):
        return
    if own and len(own[f"{name}.weight"]) == NUM_CLASSES:
        raise ValueError(
            f"the file has {len(weight)} classes, the model {NUM_CLASSES}; pass num_classes={len(weight)} to load its "
            "head, another number for a new one"
        )
    for key in (f"{name}.weight", f"{name}.bias"):
        state.pop(key, None)
    state |= own


def fit_stem(state: dict[str, Tensor], in_chans: int, name: str = "patch_embed.proj") -> None:
    """Sum or repeat the stem's input channels to ``in_chans``, as timm does, in place."""
    weight = state.get(f"{name}.weight")
    if weight is not None and weight.shape[1] != in_chans:
        state[f"{name}.weight"] = adapt_input_conv(in_chans, weight)


def fit_tables(state: dict[str, Tensor], old: Grid, new: Grid, num_prefix_tokens: int = 0) -> None:
    """Resample a plain transformer's position tables from one grid to another, in place."""
    if old == new:
        return
    for name, table in state.items():
        if name == "pos_embed":
            state[name] = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens)
        elif name.endswith("positional_encoding"):
            state[name] = resample_table(table, old, new)
