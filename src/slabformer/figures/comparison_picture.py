"""The picture of a comparison: accuracy against speed, an arrow from each baseline to what replaces it."""

from __future__ import annotations

from itertools import count
from textwrap import fill
from typing import TYPE_CHECKING, Any

from slabformer._extras import require
from slabformer.figures.comparison import Comparison, Pair, Point
from slabformer.figures.plots import GREEN, GREY, INK, styled_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Annotation

MARK: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 7, "markeredgewidth": 2}


def accuracy_over_speed(comparison: Comparison) -> Figure:
    """Top-1 against images per second: an arrow from each LayerNorm baseline to the fused model that replaces it.

    A hollow mark is an accuracy as published, a full one an accuracy that was measured; the speed is measured always.
    """
    with styled_figure(width=7.6, height=4.8) as figure:
        axes = figure.add_subplot()
        for pair in comparison.pairs:
            _arrow(axes, pair)
        marks = [_mark(axes, point, colour) for point, colour in _marks(comparison)]
        labels = [_label(axes, pair.fused) for pair in comparison.pairs if pair.fused.top1 is not None]
        _name_axes(axes, comparison)
        _legend(figure, comparison)
        figure.supxlabel(fill(comparison.where, 130), x=0.01, ha="left", fontsize=6.5, color=GREY)
        _spread(figure, labels, marks)
    return figure


def _marks(comparison: Comparison) -> list[tuple[Point, str]]:
    """What is drawn, and its colour."""
    baselines = [(pair.baseline, GREY) for pair in comparison.pairs if pair.baseline is not None]
    marks = [*baselines, *((pair.fused, GREEN) for pair in comparison.pairs)]
    return [mark for mark in marks if mark[0].top1 is not None]


def _spread(figure: Figure, labels: list[Annotation], marks: list[Line2D]) -> None:
    """Move labels up or down, as little as it takes, until none lies on a mark or on another."""
    text = require("matplotlib.text", extra="train").Text
    figure.draw_without_rendering()
    taken = [mark.get_window_extent() for mark in marks]
    for label in sorted(labels, key=lambda label: -label.xy[1]):
        home = text.get_window_extent(label)  # an annotation's own method takes its arrow in
        places = (home.translated(0, up * line * home.height) for line in count() for up in (1, -1))
        box = next(place for place in places if not any(place.overlaps(other) for other in taken))
        label.set_position((label.xyann[0], label.xyann[1] + (box.y0 - home.y0) * 72 / figure.dpi))
        taken.append(box)


def _arrow(axes: Axes, pair: Pair) -> None:
    ends = [(point.images_per_second, point.top1) for point in pair.points() if point.top1 is not None]
    if len(ends) == 2:
        axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 6, "shrinkB": 6})


def _mark(axes: Axes, point: Point, colour: str) -> Line2D:
    assert point.top1 is not None
    face = "white" if point.source == "published" else colour
    return axes.plot(point.images_per_second, point.top1, color=colour, markerfacecolor=face, **MARK)[0]


def _label(axes: Axes, point: Point) -> Annotation:
    assert point.top1 is not None
    line = {"arrowstyle": "-", "color": GREY, "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4}
    return axes.annotate(
        point.model, (point.images_per_second, point.top1), (9, 0), textcoords="offset points", va="center",
        fontsize=8, arrowprops=line,
    )  # fmt: skip


def _name_axes(axes: Axes, comparison: Comparison) -> None:
    axes.set(xlabel=f"images per second ({comparison.mode}, batch {comparison.batch_size})", ylabel="top-1, %")
    axes.set_xscale("log")
    plain = require("matplotlib.ticker", extra="train").StrMethodFormatter
    axes.xaxis.set_major_formatter(plain("{x:,g}"))
    axes.xaxis.set_minor_formatter(plain("{x:,g}"))
    axes.margins(x=0.2, y=0.12)
    axes.grid()


def _legend(figure: Figure, comparison: Comparison) -> None:
    kinds = {"fused": (GREEN, GREEN), "its LayerNorm baseline, where the arrow starts": (GREY, GREY)}
    if any(point.source == "published" for point, _ in _marks(comparison)):
        kinds["hollow: top-1 as published, not measured here"] = (INK, "white")
    line = require("matplotlib.lines", extra="train").Line2D
    handles = [
        line([], [], color=edge, markerfacecolor=face, label=label, **MARK) for label, (edge, face) in kinds.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8)
