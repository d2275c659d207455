"""What `compare.py` found, as Markdown and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slabformer.figures.plots import GREEN, GREY, LIGHT, ORANGE, save, styled_figure

#: in the order of the tables; what counts is the deployed form between the compiled baseline and the ceiling
COLOURS = {
    "published style": ORANGE,
    "fused": "#9ED9C5",
    "deployed": GREEN,
    "LayerNorm baseline": "#BFC7CE",
    "baseline compiled": GREY,
    "ceiling": LIGHT,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form of one model: latency of a batch; speed over the compiled baseline, over the published style, and as a
    share of the ceiling and of the machine's floor."""

    model: str
    size: int
    batch_size: int
    form: str
    p50_ms: float
    p90_ms: float
    images_per_s: float
    memory_mib: float | None
    over_baseline: float
    over_published: float
    of_ceiling: float
    of_floor: float

    def __str__(self) -> str:
        return (
            f"{self.model} {self.size} px, batch {self.batch_size}, {self.form:<16}{self.p50_ms:9.2f} ms  "
            f"{self.over_baseline:5.2f} x baseline  {self.over_published:5.2f} x published  "
            f"{self.of_ceiling:4.0%} of ceiling  {self.of_floor:4.0%} of floor"
        )


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """One line a form, and below where it was measured."""
    head = ("model", "px", "batch", "form", "ms (p50)", "ms (p90)", "images/s", "peak MiB")
    head += ("over compiled baseline", "over published style", "of ceiling", "of floor")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 4}{'---:|' * (len(head) - 4)}"]
    for row in rows:
        memory = f"{float(row['memory_mib']):.0f}" if row["memory_mib"] else "-"
        figures = [
            f"{float(row['p50_ms']):.1f}",
            f"{float(row['p90_ms']):.1f}",
            f"{float(row['images_per_s']):.1f}",
            memory,
        ]
        figures += [f"{float(row['over_baseline']):.2f}", f"{float(row['over_published']):.2f}"]
        figures += [f"{float(row['of_ceiling']):.0%}", f"{float(row['of_floor']):.0%}"]
        lines.append(f"| {' | '.join([row['model'], row['size'], row['batch_size'], row['form'], *figures])} |")
    places = dict.fromkeys(
        f"- {row['device']}, {row['threads']} thread(s), {row['dtype']}, load {row['load']}; {row['versions']}; "
        f"{row['date']}; `{row['command']}`"
        for row in rows
    )
    return "\n".join(["# SLAB against what it replaces", "", *lines, "", "Measured on:", "", *places, ""])


def draw(rows: Sequence[dict[str, str]], folder: Path) -> list[Path]:
    """``compare.png``, bars of every model; ``resolution.png``, latency against image size where several were."""
    batch = max(int(row["batch_size"]) for row in rows)
    paths = [folder / "compare.png"]
    save(_bars([row for row in rows if int(row["batch_size"]) == batch]), paths[0])
    swept = _swept(rows)
    if swept:
        paths.append(folder / "resolution.png")
        save(_resolutions(swept), paths[1])
    return paths


def _swept(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of a model at a batch size that was measured at several image sizes."""

    def subject(row: dict[str, str]) -> tuple[str, str]:
        return row["model"], row["batch_size"]

    return [row for row in rows if len({other["size"] for other in rows if subject(other) == subject(row)}) > 1]


def _bars(rows: Sequence[dict[str, str]]):
    subjects = list(dict.fromkeys((row["model"], row["size"], row["batch_size"]) for row in rows))
    with styled_figure(width=3.2 * min(3, len(subjects)), height=2.9 * -(-len(subjects) // 3)) as figure:
        for number, subject in enumerate(subjects):
            axes = figure.add_subplot(-(-len(subjects) // 3), min(3, len(subjects)), number + 1)
            own = {row["form"]: row for row in rows if (row["model"], row["size"], row["batch_size"]) == subject}
            forms = [form for form in COLOURS if form in own]
            speeds = [float(own[form]["images_per_s"]) for form in forms]
            axes.barh(forms, speeds, color=[COLOURS[form] for form in forms])
            for place, form in enumerate(forms):
                axes.text(speeds[place], place, f" x{float(own[form]['over_baseline']):.2f}", va="center", fontsize=8)
            axes.invert_yaxis()
            axes.margins(x=0.16)
            axes.set_title(f"{subject[0]}\n{subject[1]} px, batch {subject[2]}", fontsize=9)
            axes.set_xlabel("images/s (x compiled baseline)", fontsize=8)
    return figure


def _resolutions(rows: Sequence[dict[str, str]]):
    subjects = list(dict.fromkeys((row["model"], row["batch_size"]) for row in rows))
    with styled_figure(width=4.6 * len(subjects), height=3.4) as figure:
        for number, (model, batch_size) in enumerate(subjects):
            axes = figure.add_subplot(1, len(subjects), number + 1)
            own = [row for row in rows if (row["model"], row["batch_size"]) == (model, batch_size)]
            for form in ("baseline compiled", "published style", "deployed", "ceiling"):
                curve = sorted((int(row["size"]), float(row["p50_ms"])) for row in own if row["form"] == form)
                axes.plot(*zip(*curve, strict=True), marker="o", color=COLOURS[form], label=form)
            axes.set(xscale="log", yscale="log", title=f"{model}, batch {batch_size}", xlabel="image side (px)")
            axes.set_ylabel("ms a batch")
            sizes = sorted({int(row["size"]) for row in own})
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xticks([], minor=True)
            axes.legend()
    return figure
