"""Pictures of attention: what a token attends to, over the image and as a matrix, several models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from torch import Tensor

from slabformer.figures.attention_maps import Layer
from slabformer.figures.plots import GREY, styled_figure
from slabformer.nn.resample import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = 2.15
HEAT, MARK = "magma", "#56B4E9"
#: brightest colour of a matrix: a few entries far above all others would leave the rest black
BRIGHTEST = 0.995
MOST_SAMPLED = 1_000_000
#: letters over a pair of panels
LONGEST_HEADING = 50
CAPTION = (
    "Left of each pair: what the marked token takes from every other, over the image. Right: the same for all tokens, "
    "rows take from columns. Softmax, or the ReLU kernel over its row's sum plus the depthwise convolutions of the "
    "values, in absolute value; every panel has its own scale, black is 0."
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One layer of one model over its image.

    Attributes:
        model: Heading of the column.
        image: As the model saw it, ``(3, H, W)`` in [0, 1].
        padded: Height and width that the layer's grids cover.
        layer: What it attends to.
    """

    model: str
    image: Tensor
    padded: Grid
    layer: Layer


def attention_figure(
    rows: Sequence[Sequence[Panel]], at: tuple[float, float] = (0.5, 0.5), heads: Sequence[int] | None = None
) -> Figure:
    """Attention of the token that holds the point ``at``: a row a layer and head, a pair of panels a model.

    Args:
        rows: For each layer wanted, its panel of every model.
        at: Right and down from the image's upper left corner, as shares of its width and height.
        heads: A row for each of them; by default one for their mean.

    Raises:
        ValueError: If a layer lacks a head, or the point lies outside.
    """
    if not all(0 <= share < 1 for share in at):
        raise ValueError(f"the point lies outside the image: shares of its width and height are in [0, 1), got {at}")
    wanted: Sequence[int | None] = heads or [None]
    lines = [(panels, head) for panels in rows for head in wanted]
    columns = 1 + 2 * len(rows[0])
    with styled_figure(width=PANEL_INCHES * columns, height=0.5 + (PANEL_INCHES + 0.4) * len(lines)) as figure:
        grid = figure.subplots(len(lines), columns, squeeze=False)
        for line, (panels, head) in enumerate(lines):
            image, *others = grid[line]
            _image(image, panels[0], at)
            if line == 0:
                image.set_title("image", fontsize=9)
            which = "mean of heads" if head is None else f"head {head}"
            for panel, overlay, matrix in zip(panels, others[::2], others[1::2], strict=True):
                weights = _weights(panel, head)
                _overlay(overlay, panel, weights, at, which)
                _matrix(matrix, weights)
                if line == 0:
                    overlay.set_title(fill(panel.model, LONGEST_HEADING), fontsize=9)
        figure.supxlabel(fill(CAPTION, int(17 * figure.get_figwidth())), x=0.01, ha="left", fontsize=6.5, color=GREY)
    return figure


def _weights(panel: Panel, head: int | None) -> Tensor:
    """Attention of one head, or the mean of all, ``(N, M)``."""
    layer = panel.layer
    if head is None:
        return layer.weights().mean(0)
    if not 0 <= head < layer.num_heads:
        raise ValueError(f"{layer.name} of {panel.model} has heads 0 to {layer.num_heads - 1}, got {head}")
    return layer.weights()[head]


def _image(axes: Axes, panel: Panel, at: tuple[float, float]) -> None:
    _, height, width = panel.image.shape
    axes.imshow(panel.image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    _mark(axes, at[0] * width, at[1] * height)


def _overlay(axes: Axes, panel: Panel, weights: Tensor, at: tuple[float, float], which: str) -> None:
    (_, height, width), (H, W), grid = panel.image.shape, panel.padded, panel.layer.query_grid
    cell_height, cell_width = H / grid[0], W / grid[1]
    row, column = int(at[1] * height / cell_height), int(at[0] * width / cell_width)
    heat = weights[row * grid[1] + column].view(panel.layer.key_grid)
    axes.imshow(panel.image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.imshow(heat.numpy(), cmap=HEAT, vmin=0, alpha=0.7, extent=(0, W, H, 0), interpolation="bilinear")
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_xlabel(f"{panel.layer.name}\n{which}, brightest {heat.max():.3f}", fontsize=7.5)
    _mark(axes, (column + 0.5) * cell_width, (row + 0.5) * cell_height)


def _matrix(axes: Axes, weights: Tensor) -> None:
    queries, keys = weights.shape
    sample = weights.flatten()[:: max(1, weights.numel() // MOST_SAMPLED)]  # torch's quantile takes no more
    axes.imshow(
        weights.numpy(), cmap=HEAT, vmin=0, vmax=float(sample.quantile(BRIGHTEST)) or 1.0, aspect=keys / queries
    )
    axes.set_xlabel(f"{queries} x {keys} tokens", fontsize=7.5)
    _without_ticks(axes)


def _mark(axes: Axes, x: float, y: float) -> None:
    axes.plot(x, y, marker="s", markersize=7, markeredgewidth=1.5, markeredgecolor=MARK, fillstyle="none")
    _without_ticks(axes)


def _without_ticks(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
