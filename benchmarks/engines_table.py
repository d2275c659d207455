"""What `engines.py` found, as Markdown, as a picture, and as the table in README.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slabformer.figures.plots import GREEN, GREY, save, styled_figure

SLAB, BASELINE = "SLAB", "LayerNorm baseline"
Row = dict[str, str]
TITLES = {"slab_deit_tiny": "DeiT-T", "slab_swin_tiny": "Swin-T", "slab_pvt_tiny": "PVT-T"}
COLUMNS = {
    "model": "model",
    "batch_size": "batch",
    "threads": "threads",
    "form": "form",
    "engine": "engine",
    "dtype": "dtype",
    "cpu_ms_per_image": "CPU ms an image",
    "ms_per_image": "ms an image",
    "over_best_baseline": "over the baseline's best engine",
    "best_baseline": "which is",
}
BEGIN, END = "<!-- engines: written by benchmarks/engines.py -->", "<!-- end of engines -->"


def markdown(rows: Sequence[Row], missing: Sequence[str] = ()) -> str:
    """One line a program, below it where it was measured, and what was not."""
    lines = ["# Engines", "", f"| {' | '.join(COLUMNS.values())} |", "|---|---:|---:|---|---|---|---:|---:|---:|---|"]
    lines += [f"| {' | '.join(row[name] for name in COLUMNS)} |" for row in rows]
    machines = sorted({f"{row['device']}; {row['versions']}" for row in rows})
    return "\n".join([*lines, "", *machines, *(f"- not measured: {each}" for each in missing), ""])


def best(rows: Sequence[Row], form: str, threads: int = 1) -> Row | None:
    """The fastest of ``form``: by CPU time with one thread, else by the clock."""
    clock = "cpu_ms_per_image" if threads == 1 else "ms_per_image"
    return min((row for row in rows if row["form"] == form), key=lambda row: float(row[clock]), default=None)


def readme_table(rows: Sequence[Row]) -> str:
    """Our fastest engine over the baseline's fastest engine, one thread: a line for each dtype and batch size."""
    models = [name for name in TITLES if any(row["model"] == name for row in rows)]
    lines = ["| |" + "".join(f" {TITLES[name]} |" for name in models), "|---|" + "---:|" * len(models)]
    kinds = dict.fromkeys((row["dtype"], row["batch_size"]) for row in rows if row["threads"] == "1")
    for dtype, batch_size in sorted(kinds, key=lambda kind: (("float32", "bfloat16", "int8").index(kind[0]), kind[1])):
        same = [row for row in rows if (row["dtype"], row["batch_size"], row["threads"]) == (dtype, batch_size, "1")]
        cells = [_cell([row for row in same if row["model"] == name]) for name in models]
        lines.append(f"| {dtype}, batch {batch_size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row]) -> str:
    ours, theirs = best(rows, SLAB), best(rows, BASELINE)
    if ours is None or theirs is None:
        return "-"
    gain = float(theirs["cpu_ms_per_image"]) / float(ours["cpu_ms_per_image"])
    return f"{gain:.2f} ({ours['engine']} / {theirs['engine']})"


def into_readme(rows: Sequence[Row], path: Path) -> None:
    """Put the table between its two marks.

    Raises:
        ValueError: If they are not there.
    """
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no marks {BEGIN!r} and {END!r} to put the table between")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{readme_table(rows)}\n{END}{after}", encoding="utf-8")


def draw(rows: Sequence[Row], output: Path) -> Path:
    """A panel a model: every engine and dtype, SLAB beside its baseline, at the largest batch with one thread."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    with styled_figure(width=3.4 * len(models) + 1.6, height=4.2) as figure:
        for axes, name in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            own = [row for row in rows if row["model"] == name]
            threads = min(int(row["threads"]) for row in own)
            batch_size = max(int(row["batch_size"]) for row in own if int(row["threads"]) == threads)
            shown = [row for row in own if (row["threads"], row["batch_size"]) == (str(threads), str(batch_size))]
            names = list(dict.fromkeys(f"{row['engine']}\n{row['dtype']}" for row in shown))
            for place, (form, colour) in enumerate({SLAB: GREEN, BASELINE: GREY}.items()):
                of_form = [row for row in shown if row["form"] == form]
                heights = [float(row["cpu_ms_per_image"]) for row in of_form]
                places = [names.index(f"{row['engine']}\n{row['dtype']}") + 0.4 * place - 0.2 for row in of_form]
                axes.barh(places, heights, 0.38, color=colour, label=form)
            axes.set_yticks(range(len(names)), names, fontsize=7.5)
            axes.invert_yaxis()
            axes.set_title(f"{TITLES.get(name, name)}, batch {batch_size}")
            axes.set_xlabel(f"CPU ms an image, threads: {threads}")
            axes.grid(axis="x")
        axes.legend(fontsize=8)
    path = output / "engines.png"
    save(figure, path)
    return path
