"""`slab lm export`: a language model as ONNX with cache inputs, checked against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from jsonargparse import Namespace

from slabformer.cli.lm.common import MODEL_HELP, quiet_transformers
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import NonEmptyStr, OutputFile, Tolerance


def parser() -> Parser:
    """Options of `slab lm export`."""
    from slabformer._defaults import RUNTIME_RTOL

    made = Parser(
        "slab lm export",
        "Write a language model for onnxruntime, its cache as inputs and outputs (past.I.key and .value, present.I.key "
        "and .value), any batch and length, checked against PyTorch. Above 2 GB the weights lie in a second file, "
        "model.onnx.data.",
        ["slab lm export fused --output model.onnx", "slab lm export runs/books --fused --output model.onnx"],
    )
    made.add_argument("model", type=NonEmptyStr, help=MODEL_HELP)
    made.add_argument("--output", type=Annotated[Path, OutputFile(".onnx")], required=True, help="the file, model.onnx")
    made.add_argument("--fused", action="store_true", help="fold the norms first")
    made.add_argument(
        "--rtol", type=Tolerance, default=RUNTIME_RTOL, help="largest difference, relative to outputs' scale"
    )
    return made


def run(config: Namespace) -> Outcome:
    """Export and check; the file appears when it has passed."""
    from slabformer.export.decoder import export_decoder
    from slabformer.tasks.language.folders import load_model_folder
    from slabformer.tasks.language.fusing import fuse_language_model

    quiet_transformers()
    output = config.output
    model = load_model_folder(config.model)
    if config.fused:
        model, _ = fuse_language_model(model)
    result = export_decoder(model, output, rtol=config.rtol, metadata={"slabformer": model.config.to_json_string()})
    files = [output] if result.weights is None else [output, result.weights]
    size = sum(file.stat().st_size for file in files)
    told = f"{size / 1e6:.1f} MB, within {result.max_rel:.1e} of PyTorch's scale, reading and writing"
    data = {"bytes": size, "max_rel": result.max_rel}
    return Outcome(data=data, shown=[f"{' and '.join(map(str, files))}: {told}"], files=files)
