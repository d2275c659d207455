"""The project's figures: data in, a matplotlib ``Figure`` out, one style for benchmark, quickstart and documentation.

    save(gamma_over_time(steps, gamma), Path("gamma.png"))
    html = to_svg(curves({"loss": {"SLAB": (epochs, losses)}, "accuracy": {...}}))

No window is opened and no global state of matplotlib changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from slabformer._extras import require
from slabformer._files import replaced
from slabformer.measure.rows import Measurement, Variant
from slabformer.surgery.fuse.report import Action, NormOutcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: told apart by colour-blind readers too (Okabe and Ito)
BLUE, ORANGE, GREEN, GREY, LIGHT, INK = "#0072B2", "#E69F00", "#009E73", "#7A8791", "#DDE3E8", "#1F2A33"
SERIES_COLOURS = (GREEN, GREY, BLUE, ORANGE, "#CC79A7", "#56B4E9")
VARIANT_COLOURS: dict[Variant, str] = {"LayerNorm baseline": GREY, "as given": ORANGE, "fused": GREEN, "ceiling": LIGHT}
ACTION_COLOURS: dict[Action, str] = {"forward": GREEN, "backward": BLUE, "kept": ORANGE}
ACTION_LABELS: dict[Action, str] = {
    "forward": "folded into what follows",
    "backward": "folded into what precedes",
    "kept": "kept as scale and shift",
}
NORMS_PER_STRIP = 32
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: searchable, and small
}
Series = tuple[Sequence[float], Sequence[float]]


def curves(panels: Mapping[str, Mapping[str, Series]], *, xlabel: str = "epoch") -> Figure:
    """Lines of several runs over training, one panel a quantity: ``{"loss": {"SLAB": (x, y), "baseline": (x, y)}}``.

    A run has the same colour in every panel; quantities whose name holds "accuracy" are shown in per cent.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    with styled_figure(width=4.6 * len(panels), height=3.2) as figure:
        for position, (quantity, lines) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(1, len(panels), position)
            for name, (x, y) in lines.items():
                colour = SERIES_COLOURS[names.index(name) % len(SERIES_COLOURS)]
                axes.plot(x, y, color=colour, label=name, linewidth=1.8, marker="o" if len(x) < 3 else None)
            axes.set(title=quantity, xlabel=xlabel)
            axes.grid(axis="y")
            if "accuracy" in quantity:
                axes.yaxis.set_major_formatter(require("matplotlib.ticker", extra="train").PercentFormatter(1.0))
            if len(names) > 1:
                axes.legend()
    return figure


def gamma_over_time(steps: Sequence[float], gamma: Sequence[float], *, xlabel: str = "optimizer step") -> Figure:
    """How much of each norm is still LayerNorm, as two areas that share the height."""
    with styled_figure(width=6.4, height=2.6) as figure:
        axes = figure.add_subplot()
        axes.fill_between(steps, gamma, color=GREY, alpha=0.45, linewidth=0, label="LayerNorm")
        axes.fill_between(steps, gamma, 1.0, color=GREEN, alpha=0.3, linewidth=0, label="RepBN")
        axes.plot(steps, gamma, color=INK, linewidth=1.8)
        axes.set(title="gamma: LayerNorm's share", xlabel=xlabel, ylim=(0, 1))
        axes.margins(x=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def norm_map(outcomes: Iterable[NormOutcome]) -> Figure:
    """Where each norm went: one cell a norm, from the model's first to its last, coloured by what became of it."""
    found = list(outcomes)
    strips = [found[start : start + NORMS_PER_STRIP] for start in range(0, len(found), NORMS_PER_STRIP)]
    columns = min(len(found), NORMS_PER_STRIP)
    label_inches = 0.07 * max(len(outcome.name) for outcome in found)
    with styled_figure(width=max(6.4, 0.27 * columns), height=0.9 + len(strips) * (0.35 + label_inches)) as figure:
        for position, strip in enumerate(strips, start=1):
            axes = figure.add_subplot(len(strips), 1, position)
            axes.bar(range(len(strip)), 1, 0.92, color=[ACTION_COLOURS[outcome.action] for outcome in strip])
            axes.set(xlim=(-0.5, columns - 0.5), ylim=(0, 1), yticks=[])
            axes.set_xticks(range(len(strip)), [outcome.name for outcome in strip], rotation=90, fontsize=7)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        _legend_of_actions(figure, Counter(outcome.action for outcome in found))
        figure.suptitle(f"where {len(found)} norms went", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _legend_of_actions(figure: Figure, count: Mapping[Action, int]) -> None:
    patch = require("matplotlib.patches", extra="train").Patch
    handles = [
        patch(color=ACTION_COLOURS[action], label=f"{count[action]} {label}")
        for action, label in ACTION_LABELS.items()
        if action in count
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8)


def speed_bars(rows: Sequence[Measurement], *, model: str, caption: str) -> Figure:
    """Images per second of each variant, with what it gains over the baseline: a row a batch size, a column a mode."""
    batch_sizes = list(dict.fromkeys(row.batch_size for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    with styled_figure(width=1.2 + 3.8 * len(modes), height=0.9 + 2.5 * len(batch_sizes)) as figure:
        panels = figure.subplots(len(batch_sizes), len(modes), squeeze=False, sharey="row")
        for batch_size, panels_of_row in zip(batch_sizes, panels, strict=True):
            for mode, axes in zip(modes, panels_of_row, strict=True):
                _speed_panel(axes, [row for row in rows if (row.mode, row.batch_size) == (mode, batch_size)])
                axes.set_title(f"{mode}, batch {batch_size}", fontsize=9.5)
        figure.suptitle(
            f"{model}: images per second, and times the baseline's", x=0.01, ha="left", fontsize=11, fontweight="bold"
        )
        footnote = "\n".join(fill(line, int(17 * figure.get_figwidth())) for line in caption.splitlines())
        figure.supxlabel(footnote, x=0.01, ha="left", fontsize=6.5, color=GREY)
    return figure


def _speed_panel(axes: Axes, rows: Sequence[Measurement]) -> None:
    axes.set_visible(bool(rows))
    ordered = sorted(rows, key=lambda row: list(VARIANT_COLOURS).index(row.variant))
    for index, row in enumerate(ordered):
        hatch, edge = ("///", GREY) if row.variant == "ceiling" else (None, VARIANT_COLOURS[row.variant])
        axes.bar(index, row.images_per_second, 0.72, color=VARIANT_COLOURS[row.variant], hatch=hatch, edgecolor=edge)
        gain = "" if row.over_baseline is None or row.variant == "LayerNorm baseline" else f"  x{row.over_baseline:.2f}"
        axes.annotate(
            f"{row.images_per_second:,.0f}{gain}", (index, row.images_per_second), (0, 3),
            textcoords="offset points", ha="center", va="bottom", fontsize=8.5,
        )  # fmt: skip
    axes.set_xticks(range(len(ordered)), [row.variant.replace(" ", "\n") for row in ordered])
    axes.margins(y=0.15)
    axes.grid(axis="y")


def latency_bars(milliseconds: Mapping[str, float], taken: str, *, title: str, caption: str) -> Figure:
    """Median latency of each form of a model, the one that was taken in colour."""
    with styled_figure(width=6.4, height=1.2 + 0.42 * len(milliseconds)) as figure:
        axes = figure.subplots()
        colours = [GREEN if name == taken else GREY for name in milliseconds]
        bars = axes.barh(range(len(milliseconds)), list(milliseconds.values()), 0.7, color=colours)
        axes.bar_label(bars, fmt="%.2f ms", padding=3, fontsize=8.5)
        axes.set_yticks(range(len(milliseconds)), list(milliseconds))
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(title)
        axes.set_xlabel("ms a batch, median")
        axes.grid(axis="x")
        figure.supxlabel(fill(caption, 110), x=0.01, ha="left", fontsize=6.5, color=GREY)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` in the format of the path's suffix."""
    with require("matplotlib", extra="train").rc_context(STYLE), replaced(path) as temporary:
        figure.savefig(temporary, dpi=150, facecolor="white")


def to_svg(figure: Figure) -> str:
    """``figure`` as an ``<svg>`` element, to stand inside an HTML page."""
    with require("matplotlib", extra="train").rc_context(STYLE), StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
    return text[text.index("<svg") :]


@contextmanager
def styled_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure in the house's style: rules are read while it is drawn on, so that is done inside the block."""
    figure_module = require("matplotlib.figure", extra="train")
    with require("matplotlib", extra="train").rc_context(STYLE):
        yield figure_module.Figure(figsize=(width, height), layout="constrained")
