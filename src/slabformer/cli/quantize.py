"""`slab quantize`: a fused model in 8-bit integers, for CPUs, held against itself in floating point."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jsonargparse import Namespace
from rich.table import Table

from slabformer.cli.common import add_model_options, example_images
from slabformer.cli.data import add_data_options, load_trained
from slabformer.cli.forms import agreement_of, calibration_of, evaluated
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import OutputFile, PositiveInt, Seconds, Threads

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slabformer.measure.timing import Machine
    from slabformer.tasks.classification.evaluate import EvalResult


def parser() -> Parser:
    """Options of `slab quantize`."""
    made = Parser(
        "slab quantize",
        "Write a model in 8-bit integers for CPUs (OpenVINO): folded first, ranges from training images, accuracy and "
        "speed held against the same model in float32.",
        [
            "slab quantize runs/digits/model.safetensors --data digits --output int8.xml",
            "slab quantize model.safetensors --data PATH --calibrate 512 -o int8.xml",
        ],
    )
    add_model_options(made)
    add_data_options(made)
    made.add_argument(
        "--output",
        type=Annotated[Path, OutputFile(".xml")],
        required=True,
        help="the graph, an .xml file; weights go beside it (.bin)",
    )
    made.add_argument(
        "--calibrate", type=PositiveInt, default=300, help="training images that show the ranges of activations"
    )
    made.add_argument("--threads", type=Threads | None, help="to measure speed with; all cores by default")
    made.add_argument("--seconds", type=Seconds, default=5.0, help="time to measure speed for")
    return made


def run(config: Namespace) -> Outcome:
    """Fold, quantise, compare, write."""
    import torch

    import slabformer as sf
    from slabformer.nn.controls import repbn_modules
    from slabformer.quantize.openvino import quantize, to_openvino

    output = config.output
    config.device = "cpu"
    model, info = load_trained(config)
    if repbn_modules(model):
        model, _ = sf.fuse(model, example_images(info, batch_size=2))
    batches = calibration_of(config, info)
    with torch.no_grad():
        integers, floats = quantize(model, batches, config.threads), to_openvino(model, batches[0], config.threads)
        forms: dict[str, nn.Module] = {"float32": floats, "int8": integers}
        results = dict(evaluated(config, info, forms))
        agreement = agreement_of(config, info, forms)
        milliseconds, gain, machine = _speeds(forms, batches[0], config)
    data = {name: {**result.to_dict(), "milliseconds": milliseconds[name]} for name, result in results.items()}
    return Outcome(
        data={**data, "speedup": gain, "same_top1": agreement, "machine": machine.to_dict()},
        shown=[_table(info.model, results, milliseconds, gain, machine, agreement)],
        files=integers.save(output),
    )


def _speeds(forms: dict[str, nn.Module], images: Tensor, config: Namespace) -> tuple[dict[str, float], float, Machine]:
    """Median milliseconds of a batch of up to 8, how much faster integers are, and where."""
    from slabformer.measure.timing import Machine, num_threads, quantile, ratio, time_interleaved

    batch = images[:8]
    with num_threads(config.threads):
        calls = {name: (lambda form=form: form(batch)) for name, form in forms.items()}
        turns = time_interleaved(calls, seconds=config.seconds, device=batch.device)
        machine = Machine.here(batch.device)
    return {name: 1e3 * quantile(turns[name], 0.5) for name in forms}, ratio(turns["float32"], turns["int8"]), machine


def _table(
    model: str,
    results: dict[str, EvalResult],
    milliseconds: dict[str, float],
    gain: float,
    machine: Machine,
    agreement: float,
) -> Table:
    caption = (
        f"top-1 class alike on {agreement:.2%} of the images; int8 {gain:.2f} x as fast; batch of up to 8\n{machine}"
    )
    table = Table(title=f"{model} in integers", caption=caption)
    table.add_column("form")
    for heading in ("top-1 %", "loss", "ms a batch"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(name, f"{100 * result.top1:.2f}", f"{result.loss:.4f}", f"{milliseconds[name]:.2f}")
    return table
