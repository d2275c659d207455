"""`slab export`: write ONNX or torch.export files, checked against PyTorch."""

from __future__ import annotations

from typing import get_args

from jsonargparse import Namespace

from slabformer.cli.common import add_model_options, example_images, load
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FileToWrite, IrVersion, Opset, PositiveInt, Tolerance


def parser() -> Parser:
    """Options of `slab export`."""
    from slabformer._defaults import RUNTIME_RTOL, Format

    made = Parser(
        "slab export",
        "Write a model for other runtimes, any batch size, checked against PyTorch.",
        [
            "slab export fused.safetensors --output model.onnx",
            "slab export slab_deit_tiny --pretrained --output model.pt2 --batch-sizes 1 8",
        ],
    )
    add_model_options(made, both_sides=True)
    made.add_argument("--output", type=FileToWrite, required=True, help="the file: model.onnx, or model.pt2")
    made.add_argument("--format", type=Format | None, help="onnx or pt2 (torch.export); by default the file's suffix")
    made.add_argument("--batch-sizes", type=PositiveInt, nargs="+", default=[1, 2, 7], help="compared with PyTorch")
    made.add_argument("--opset", type=Opset | None, help="version of ONNX's operators; by default PyTorch's choice")
    made.add_argument(
        "--ir-version", type=IrVersion | None, help="version of the ONNX format, for runtimes older than the exporter"
    )
    made.add_argument(
        "--rtol", type=Tolerance, default=RUNTIME_RTOL, help="largest difference, relative to outputs' scale"
    )
    return made


def run(config: Namespace) -> Outcome:
    """Export and check; the file appears when it has passed."""
    from slabformer._defaults import Format
    from slabformer.export.model import export
    from slabformer.export.norms_left import norms_in_words

    format = config.format or config.output.suffix.removeprefix(".")
    if format not in get_args(Format):
        raise ValueError(f"cannot tell a format from {config.output}; name it .onnx or .pt2, or give --format")
    output = config.output
    model, info = load(config)
    metadata = {"slabformer": info.to_json()}
    result = export(
        model,
        example_images(info, batch_size=1),
        output,
        format=format,
        batch_sizes=config.batch_sizes,
        rtol=config.rtol,
        metadata=metadata,
        opset=config.opset,
        ir_version=config.ir_version,
    )
    batches = ", ".join(map(str, result.batch_sizes))
    size = output.stat().st_size
    told = f"{size / 1e6:.1f} MB, within {result.max_rel:.1e} of PyTorch's scale at batch sizes {batches}"
    if format == "onnx":
        told += f", {norms_in_words(result.norms)}"
    data = {**vars(result), "bytes": size}
    return Outcome(data=data, shown=[f"{output}: {told}"])
