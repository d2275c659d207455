"""`slab bench`: speed of a model, fused and not, beside its LayerNorm twin and its ceiling."""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from rich.console import Console
from torch import nn

import slabformer as sf
from slabformer.cli.common import add_model_options, available_device, console, example_images, load, needs_weights
from slabformer.deployment.bench import compare
from slabformer.deployment.variants import twin_name
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.saved_model import ModelInfo, create_model


def parser() -> ArgumentParser:
    """Options of `slab bench`."""
    made = ArgumentParser(
        prog="slab bench",
        description="Time a model as given, fused, its LayerNorm twin and its ceiling (norms and attention deleted), "
        "in turns in one process; a model without weights gets random ones.",
    )
    add_model_options(made)
    made.add_argument("--convert", action="store_true", help="first replace the model's LayerNorms; it is its own twin")
    made.add_argument("--twin", type=str | None, help="LayerNorm model in timm; guessed for ours, 'none' for none")
    made.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    made.add_argument("--threads", type=int | None, help="torch's threads on a CPU; all cores by default")
    made.add_argument(
        "--compile", action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=True, help="also under torch.compile"
    )
    made.add_argument("--seconds", type=float, default=20.0, help="of measuring for each batch size")
    made.add_argument("--device", type=str, default="cpu", help="cpu, or a GPU: cuda, cuda:1")
    made.add_argument("--output", type=Path | None, help="folder for bench.csv, bench.json and bench.png")
    return made


def run(config: Namespace) -> None:
    """Measure, print, write."""
    device = available_device(config.device)
    model, info = load(config)
    twin = _twin(config, info)
    if config.convert:
        sf.convert_norms_(model)
    if needs_weights(config):
        _as_if_trained(model)
    with Console(stderr=True).status("loading") as status:
        report = compare(
            model.to(device).eval(),
            example_images(info, batch_size=min(8, max(config.batch_sizes))).to(device),
            twin=None if twin is None else twin.to(device).eval(),
            batch_sizes=config.batch_sizes,
            threads=config.threads,
            compiled=config.compile,
            seconds=config.seconds,
            name=info.model,
            progress=status.update,
        )
    output = console()
    output.print(report.table())
    if config.output is not None:
        output.print("wrote", *map(str, report.write(config.output)), soft_wrap=True)


def _twin(config: Namespace, info: ModelInfo) -> nn.Module | None:
    name = config.twin or (info.model if config.convert else twin_name(info.model))
    if name in (None, "none"):
        return None
    return create_model(name, **{key: value for key, value in info.model_args.items() if not key.startswith("norm_")})


@torch.no_grad()
def _as_if_trained(model: nn.Module) -> None:
    """Values that training would leave: speeds do not hang on them, the equality that stands before them does."""
    sf.testing.randomize_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
