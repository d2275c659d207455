"""`slab fuse`: fold every norm into its neighbours, verify, save."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

import slabformer as sf
from slabformer.cli.common import add_model_options, console, example_images, load, writable
from slabformer.deployment.equality import FUSED_RTOL, verify_fused
from slabformer.surgery.fuse import FuseReport
from slabformer.tasks.engine.files import write_text
from slabformer.tasks.saved_model import save_model

ACTIONS = {"forward": "[green]forward[/]", "backward": "[blue]backward[/]", "kept": "[yellow]kept[/]"}


def parser() -> ArgumentParser:
    """Options of `slab fuse`."""
    made = ArgumentParser(prog="slab fuse", description="Fold every norm into its neighbours, verify, save.")
    add_model_options(made)
    made.add_argument("--output", type=Path, required=True, help="the fused model, a .safetensors file")
    made.add_argument("--json", type=Path | None, help="also write where each norm went, as JSON")
    made.add_argument("--fixed-size", action="store_true", help="fold for this input size alone; others are refused")
    made.add_argument("--rtol", type=float, default=FUSED_RTOL, help="largest difference, relative to outputs' scale")
    return made


def run(config: Namespace) -> None:
    """Fuse, verify, print, save; nothing is saved that differs."""
    files = [writable(path) for path in (config.output, config.json) if path is not None]
    model, info = load(config)
    fused, report = sf.fuse(model, example_images(info, batch_size=2), fixed_size=config.fixed_size)
    result = verify_fused(model, fused, [example_images(info, batch_size=4, seed=seed) for seed in (1, 2)], config.rtol)
    output = console()
    output.print(fuse_table(report))
    output.print(f"{report.summary()}\noutputs within {result.max_rel:.1e} of their scale")
    save_model(fused, config.output, info)
    if config.json is not None:
        write_text(config.json, json.dumps({**report.to_dict(), "verify": asdict(result)}, indent=2) + "\n")
    output.print("saved", *map(str, files), soft_wrap=True)


def fuse_table(report: FuseReport) -> Table:
    """Where each norm went."""
    table = Table("norm", "went", "into, or why not", title="norms")
    for outcome in report:
        table.add_row(outcome.name, ACTIONS[outcome.action], ", ".join(outcome.into) or outcome.reason)
    return table
