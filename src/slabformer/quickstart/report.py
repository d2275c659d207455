"""The quickstart as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import torch
from PIL import Image
from torch import Tensor

import slabformer as sf
from slabformer._files import write_text
from slabformer.figures.plots import curves, gamma_over_time, norm_map, to_svg
from slabformer.measure.rows import Measurement
from slabformer.quickstart.result import QuickstartResult

MOST_MISTAKES = 24
#: of a benchmark's table: up to the share of the ceiling, without memory and size
SPEED_COLUMNS = 9


def write_report(result: QuickstartResult, path: Path) -> None:
    """Write the page: figures inline, no script, no link to anything outside but the sources."""
    template = Template(files("slabformer.quickstart").joinpath("report.html.in").read_text(encoding="utf-8"))
    write_text(path, template.substitute(_values(result)))


def _values(result: QuickstartResult) -> dict[str, str]:
    summary = result.summary()
    total = len(result.labels)
    best = _headline_speed(result)
    names = {"SLAB (fading to RepBN)": result.slab, "LayerNorm baseline": result.baseline}
    histories = {name: run.history for name, run in names.items()}
    panels = {
        "training loss": {name: _series(rows, "train_loss") for name, rows in histories.items()},
        "test accuracy": {name: _series(rows, "top1") for name, rows in histories.items()},
    }
    blend = [row for row in result.slab.history if "blend_top1" in row]
    if blend:
        panels["test accuracy"]["SLAB, blend with LayerNorm"] = _series(blend, "blend_top1")
    epochs, gamma = _series(result.slab.history, "gamma")
    return {
        "version": sf.__version__,
        "slab_accuracy": f"{summary['slab_accuracy']:.1%}",
        "slab_mistakes": f"{_mistakes(result.fused_predictions, result.labels)} of {total} wrong",
        "baseline_accuracy": f"{summary['baseline_accuracy']:.1%}",
        "baseline_mistakes": f"{_mistakes(result.baseline_predictions, result.labels)} of {total} wrong",
        "norms_folded": f"{summary['norms_folded']} of {summary['norms_total']}",
        "fused_difference": f"{summary['fused_difference']:.1e}",
        "top1_agreement": f"{result.equality.top1_agreement:.1%}",
        "speedup": f"{best.over_baseline:.2f} x" if best.over_baseline else "-",
        "speedup_where": f"{best.mode}, batch {best.batch_size}, {best.of_ceiling or 0:.0%} of the ceiling",
        "minutes": f"{result.seconds / 60:.1f}",
        "curves": to_svg(curves(panels)),
        "gamma": to_svg(gamma_over_time([0, *epochs], [1.0, *gamma], xlabel="epoch")),
        "norm_map": to_svg(norm_map(result.fuse_report)),
        "norm_rows": "\n".join(
            _row(o.name, o.action, ", ".join(_listed(o.into)), o.reason or "") for o in result.fuse_report
        ),
        "speed": to_svg(result.bench.picture()),
        "speed_rows": "\n".join(_row(*row.cells()[:SPEED_COLUMNS]) for row in result.bench),
        "gallery": _gallery(result),
        "machine": escape(str(result.bench.machine)),
        "epochs": str(result.config.epochs),
        "test_images": str(total),
    }


def _series(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    kept = [row for row in rows if key in row]
    return [row["epoch"] for row in kept], [row[key] for row in kept]


def _headline_speed(result: QuickstartResult) -> Measurement:
    """The fused model where it is used most: compiled if that was measured, at the larger batch."""
    fused = [row for row in result.bench if row.variant == "fused"]
    return max(fused, key=lambda row: (row.mode == "compiled", row.batch_size))


def _mistakes(predictions: Tensor, labels: Tensor) -> int:
    return int((predictions != labels).sum())


def _listed(into: object) -> list[str]:
    return [into] if isinstance(into, str) else [str(name) for name in into or ()]  # type: ignore[attr-defined]


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _gallery(result: QuickstartResult) -> str:
    """Every test image that either model got wrong, with what each said."""
    wrong = (result.fused_predictions != result.labels) | (result.baseline_predictions != result.labels)
    indices = wrong.nonzero().flatten().tolist()
    figures = [_mistake(result, index) for index in indices[:MOST_MISTAKES]]
    more = f"<p>and {len(indices) - MOST_MISTAKES} more</p>" if len(indices) > MOST_MISTAKES else ""
    return "\n".join(figures) + more if figures else "<p>None: both models got every test image right.</p>"


def _mistake(result: QuickstartResult, index: int) -> str:
    label = int(result.labels[index])
    answers = {"SLAB": int(result.fused_predictions[index]), "baseline": int(result.baseline_predictions[index])}
    said = "<br>".join(
        f'<span class="{"right" if answer == label else "wrong"}">{name} {answer}</span>'
        for name, answer in answers.items()
    )
    picture = f'<img src="{_data_uri(result.images[index])}" alt="a {label}">'
    return f"<figure>{picture}<figcaption>is {label}<br>{said}</figcaption></figure>"


def _data_uri(image: Tensor) -> str:
    """A normalised ``(3, H, W)`` image, its own darkest and brightest pixel stretched to black and white, as a PNG."""
    grey = image.mean(0)
    grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1e-6)
    buffer = io.BytesIO()
    Image.fromarray((255 - grey * 255).round().to(torch.uint8).numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
