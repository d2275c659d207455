"""What `attention.py` found, as Markdown and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slabformer.figures.plots import BLUE, GREEN, GREY, LIGHT, ORANGE, save, styled_figure

COLOURS = {
    "softmax": GREY,
    "linear": GREEN,
    "linear, compiled": BLUE,
    "linear, composed": ORANGE,
    "linear, C++": ORANGE,  # on a CPU, where nothing else is composed
    "flash_bla": "#CC79A7",
    "copy": LIGHT,
}
#: what linear forms are held against: softmax, and a plain copy of as many bytes as they must move
NOT_LINEAR = ("softmax", "copy")
#: tokens from which on the slope is taken: below it, what a call costs by itself counts
LONG = 4096


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form at one length: latency, memory beyond the inputs for each token, share of the machine's floor."""

    form: str
    backend: str
    backward: bool
    num_tokens: int
    batch_size: int
    num_heads: int
    head_dim: int
    p50_ms: float
    p90_ms: float
    bytes_per_token: float | None
    of_floor: float | None

    def __str__(self) -> str:
        return f"{self.num_tokens:6} tokens  {' | '.join([f'{self.form:<16}', *self.cells()])}"

    def cells(self) -> list[str]:
        """Figures of the table."""
        memory = "-" if self.bytes_per_token is None else f"{self.bytes_per_token:,.0f}"
        floor = "-" if self.of_floor is None else f"{self.of_floor:.0%}"
        return [self.backend, f"{self.p50_ms:.3f}", f"{self.p90_ms:.3f}", memory, floor]


def slope(rows: Sequence[Row], form: str) -> float | None:
    """Of the logarithm of the time against that of the tokens, least squares; None where too few are long."""
    long = [row for row in rows if row.form == form and row.num_tokens >= LONG]
    if len(long) < 2:
        return None
    x, y = [math.log(row.num_tokens) for row in long], [math.log(row.p50_ms) for row in long]
    return statistics.linear_regression(x, y).slope


def crossover(rows: Sequence[Row], form: str) -> float | None:
    """Tokens from which on ``form`` is faster than softmax, between two lengths on straight lines of logarithms.

    None where it is not at the longest length that both were timed at.
    """
    times = {(row.form, row.num_tokens): row.p50_ms for row in rows}
    both = sorted(N for name, N in times if name == form and ("softmax", N) in times)
    gains = [math.log(times["softmax", N] / times[form, N]) for N in both]
    if not gains or gains[-1] <= 0:
        return None
    last_loss = max((i for i, gain in enumerate(gains) if gain <= 0), default=None)
    if last_loss is None:
        return both[0]
    before, after = gains[last_loss], gains[last_loss + 1]
    share = before / (before - after)
    return math.exp((1 - share) * math.log(both[last_loss]) + share * math.log(both[last_loss + 1]))


def findings(rows: Sequence[Row]) -> list[str]:
    """One sentence a linear form: crossover and slope; and how a copy grows, which no form can undercut."""
    sentences = []
    for form in dict.fromkeys(row.form for row in rows if row.form not in NOT_LINEAR):
        beyond, steepness = crossover(rows, form), slope(rows, form)
        where = "not faster than softmax at any length"
        if beyond is not None:
            where = f"faster than softmax from {beyond:,.0f} tokens on"
        grows = f"no slope below {LONG:,} tokens" if steepness is None else f"time grows as N^{steepness:.2f}"
        sentences.append(f"{form}: {where}; {grows}")
    of_copy = slope(rows, "copy")
    return sentences if of_copy is None else [*sentences, f"a copy of as many bytes: time grows as N^{of_copy:.2f}"]


def markdown(rows: Sequence[Row], where: str) -> str:
    """One line a form and length; above what follows from them, below where it was measured."""
    head = ("tokens", "form", "backend", "ms (p50)", "ms (p90)", "bytes a token", "of floor")
    lines = [f"| {' | '.join(head)} |", "|---:|---|---|" + "---:|" * (len(head) - 3)]
    lines += [f"| {' | '.join([f'{row.num_tokens:,}', row.form, *row.cells()])} |" for row in rows]
    first = rows[0]
    shape = f"batch {first.batch_size}, {first.num_heads} heads of {first.head_dim}"
    what = "forward and gradients" if first.backward else "forward"
    title = f"# Attention alone, {what}: {shape}"
    return "\n".join([title, "", *(f"- {text}" for text in findings(rows)), "", *lines, "", f"Measured on {where}", ""])


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time, and memory for each token, against the number of tokens."""
    with styled_figure(width=9.2, height=3.6) as figure:
        panels = [("p50_ms", "ms a call"), ("bytes_per_token", "bytes beyond the inputs, a token")]
        for number, (quantity, label) in enumerate(panels, start=1):
            axes = figure.add_subplot(1, 2, number)
            for form in [form for form in COLOURS if any(row.form == form for row in rows)]:
                points = [(row.num_tokens, getattr(row, quantity)) for row in rows if row.form == form]
                shown = [(N, value) for N, value in points if value]
                if shown:
                    axes.plot(*zip(*shown, strict=True), marker="o", markersize=3.5, color=COLOURS[form], label=form)
            axes.set(xscale="log", xlabel="tokens", ylabel=label)
            axes.grid(which="major")
        figure.axes[0].set_yscale("log")
        figure.axes[0].legend()
        figure.axes[1].set_ylim(bottom=0)
        first = rows[0]
        what = "forward and gradients" if first.backward else "forward"
        figure.suptitle(
            f"attention alone, {what}: {title}, batch {first.batch_size}, {first.num_heads} heads of {first.head_dim}",
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )
    save(figure, path)
