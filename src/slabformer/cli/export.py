"""`slab export`: write ONNX or torch.export files, checked against PyTorch."""

from __future__ import annotations

import sys
from typing import get_args

from jsonargparse import ArgumentParser, Namespace

from slabformer._defaults import RUNTIME_RTOL, Format
from slabformer._files import replaced
from slabformer.cli.common import add_model_options, example_images, load
from slabformer.settings import FileToWrite, PositiveInt, Tolerance


def parser() -> ArgumentParser:
    """Options of `slab export`."""

    made = ArgumentParser(
        prog="slab export", description="Write a model for other runtimes, any batch size, checked against PyTorch."
    )
    add_model_options(made)
    made.add_argument("--output", type=FileToWrite, required=True, help="the file: model.onnx, or model.pt2")
    made.add_argument("--format", type=Format | None, help="onnx or pt2 (torch.export); by default the file's suffix")
    made.add_argument("--batch-sizes", type=PositiveInt, nargs="+", default=[1, 2, 7], help="compared with PyTorch")
    made.add_argument(
        "--rtol", type=Tolerance, default=RUNTIME_RTOL, help="largest difference, relative to outputs' scale"
    )
    return made


def run(config: Namespace) -> None:
    """Export and check; the file appears when it has passed."""
    from slabformer.export.model import export

    format = config.format or config.output.suffix.removeprefix(".")
    if format not in get_args(Format):
        raise ValueError(f"cannot tell a format from {config.output}; name it .onnx or .pt2, or give --format")
    model, info = load(config)
    metadata = {"slabformer": info.to_json()}
    with replaced(config.output) as temporary:
        result = export(
            model,
            example_images(info, batch_size=1),
            temporary,
            format=format,
            batch_sizes=config.batch_sizes,
            rtol=config.rtol,
            metadata=metadata,
        )
    batches = ", ".join(map(str, result.batch_sizes))
    sys.stdout.write(
        f"{config.output}: {config.output.stat().st_size / 1e6:.1f} MB, within {result.max_rel:.1e} of PyTorch's scale "
        f"at batch sizes {batches}\n"
    )
