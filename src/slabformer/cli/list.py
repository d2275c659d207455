"""`slab list`: models, what was published about them, and whether they can be had."""

from __future__ import annotations

import fnmatch
import json
import sys
from dataclasses import dataclass

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

from slabformer._extras import require
from slabformer.cli.common import console
from slabformer.cli.main import did_you_mean
from slabformer.deployment.measure import count_parameters
from slabformer.models.published import BY_MODEL
from slabformer.tasks.saved_model import create_model


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model."""

    model: str
    """Name in timm, once slabformer is imported."""
    published: str | None = None
    """Name in the publication."""
    top1: float | None = None
    """Published ImageNet-1K accuracy in percent."""
    parameters: int | None = None
    """In training form."""
    attention: str | None = None
    """One letter a stage: S softmax, L linear."""
    fade: float | None = None
    """Share of training over which LayerNorm fades out in the published recipe."""
    weights: str | None = None
    """Where the released weights are."""
    available: bool
    """Whether this version can build it."""


def parser() -> ArgumentParser:
    """Options of `slab list`."""
    made = ArgumentParser(prog="slab list", description="Models, published accuracies and released weights.")
    made.add_argument("pattern", type=str, nargs="?", default="*", help="e.g. 'slab_*'; part of a name is enough")
    made.add_argument("--json", action="store_true", help="machine-readable")
    return made


def run(config: Namespace) -> None:
    """Print the models whose names match.

    Raises:
        ValueError: If none does.
    """
    pattern = config.pattern if any(sign in config.pattern for sign in "*?[") else f"*{config.pattern}*"
    rows = models()
    found = [row for row in rows if any(fnmatch.fnmatch(name, pattern) for name in (row.model, row.published) if name)]
    if not found:
        hint = did_you_mean(config.pattern, [row.model for row in rows])
        raise ValueError(f"no model matches {config.pattern!r}{hint or ';'} `slab list` shows all")
    if config.json:
        sys.stdout.write(json.dumps([vars(row) for row in found], indent=2) + "\n")
    else:
        console().print(table(found))


def models() -> list[Row]:
    """Every published model, then those that are ours alone."""
    timm = require("timm", extra="vision")
    registered = [
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("slabformer.")
    ]
    names = [*BY_MODEL, *(name for name in registered if name not in BY_MODEL)]
    return [_row(name, available=name in registered) for name in names]


def table(rows: list[Row]) -> Table:
    """For a terminal."""
    made = Table(
        title="models",
        caption="attention by stage: S softmax, L linear; fade: share of training until LayerNorm is gone",
    )
    for heading in ("model", "published as", "attention", "top-1 %", "params", "fade", "weights", "in this version"):
        made.add_column(heading, justify="right" if heading in ("top-1 %", "params", "fade") else "left", no_wrap=True)
    for row in rows:
        made.add_row(
            row.model,
            row.published or "-",
            row.attention or "-",
            "-" if row.top1 is None else f"{row.top1:.1f}",
            "-" if row.parameters is None else f"{row.parameters / 1e6:.2f} M",
            "-" if row.fade is None else f"{row.fade:.2f}",
            row.weights.rsplit("/", 1)[-1] if row.weights else "-",
            "yes" if row.available else "not yet",
            style=None if row.available else "dim",
        )
    return made


def _row(model: str, available: bool) -> Row:
    published = BY_MODEL.get(model)
    if published is None:
        return Row(model=model, available=available, parameters=_count_parameters(model))
    return Row(
        model=model,
        published=published.config,
        top1=published.top1,
        parameters=published.num_params,
        attention=published.attention,
        fade=published.fade,
        weights=published.url,
        available=available,
    )


def _count_parameters(model: str) -> int:
    with torch.device("meta"):
        return count_parameters(create_model(model))
