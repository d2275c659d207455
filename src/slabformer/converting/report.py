"""A conversion as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import slabformer as sf
from slabformer._files import write_text
from slabformer.converting.result import PARTS
from slabformer.figures.plots import curves, gamma_over_time, norm_map, to_svg
from slabformer.surgery.fuse import FuseReport

Rows = Sequence[Mapping[str, float]]
#: key of the summary -> what the page calls that step
STAGES = {
    "start": "after the start",
    "trained": "after training",
    "recalibrated": "after recalibration",
    "fused": "fused",
}
NAMES = {"cosine": "cosine to the teacher", "agreement": "agreement with the teacher (accuracy)"}


def write_report(
    path: Path, title: str, summary: Mapping[str, Any], history: Rows, steps: Rows, report: FuseReport
) -> None:
    """Write the page: figures inline, no script, no link to anything outside.

    Args:
        path: Of the page.
        title: What the model is called.
        summary: What ``result.json`` holds.
        history: Rows of ``metrics.csv``, the start among them.
        steps: Rows of ``steps.csv``.
        report: What became of each norm.
    """
    measures = [name for name in NAMES if name in summary["fused"]]
    nearness = {
        NAMES[name]: {"deployed": _series(history, name), "with its fading norms": _series(history, f"blend_{name}")}
        for name in measures
    }
    training = {
        "loss": {"sum": _series(steps, "loss")}
        | {part: found for part in PARTS[:-1] if (found := _series(steps, part))[0]},
        "gradient norm, before clipping": {"gradient": _series(steps, "grad_norm")},
    }
    template = Template(files("slabformer.converting").joinpath("report.html.in").read_text(encoding="utf-8"))
    values = {
        "title": escape(title),
        "version": sf.__version__,
        "headers": "".join(f"<th>{escape(NAMES[name])}</th>" for name in measures),
        "stages": "\n".join(
            _row(words, *(f"{summary[key][name]:.4f}" for name in measures)) for key, words in STAGES.items()
        ),
        "norms": f"{summary['norms_folded']} of {summary['norms_folded'] + summary['norms_kept']}",
        "left": f", <b>{summary['norms_left']}</b> stay as planned" if summary.get("norms_left") else "",
        "difference": f"{summary['difference']:.1e}",
        "attentions": _attentions(summary),
        "nearness": to_svg(curves(nearness, xlabel="optimizer step")),
        "training": to_svg(curves(training, xlabel="optimizer step")),
        "gamma": to_svg(gamma_over_time([0, *_series(steps, "gamma")[0]], [1.0, *_series(steps, "gamma")[1]])),
        "norm_map": to_svg(norm_map(report)),
        "norm_rows": "\n".join(
            _row(outcome.name, outcome.action, ", ".join(outcome.into) or outcome.reason) for outcome in report
        ),
    }
    write_text(path, template.substitute(values))


def _attentions(summary: Mapping[str, Any]) -> str:
    """How many are linear and how near each came before training; nothing where the run left them alone."""
    if "attentions_linear" not in summary:
        return ""
    linear, kept = summary["attentions_linear"], summary["attentions_kept"]
    rows = "\n".join(_row(name, f"{error:.3f}") for name, error in summary["attention_errors"].items())
    words = (
        f"<b>{linear} of {linear + kept}</b> softmax attentions became linear. Each was aligned by itself first; its "
        "error is the squared error of its output over the variance of the teacher's."
    )
    table = f"<table><tr><th>attention</th><th>error</th></tr>\n{rows}\n</table>"
    return f"<section>\n<h2>Linear attention</h2>\n<p>{words}</p>\n{table}\n</section>"


def _series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    kept = [row for row in rows if key in row]
    return [row["step"] for row in kept], [row[key] for row in kept]


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
