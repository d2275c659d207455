"""What a measurement of detectors found: rows, a table for the terminal, files for everything else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slabformer._extras import require
from slabformer._files import write_csv, write_json, write_text
from slabformer.measure.detections import DetectionAgreement
from slabformer.measure.rows import Mode
from slabformer.measure.timing import Machine

if TYPE_CHECKING:
    from rich.table import Table

#: the backbone with its feature pyramid, where fusing ends; or an image to its detections, masks not pasted
Part = Literal["backbone", "detector"]
HEADINGS = ("part", "mode", "variant", "p50 ms", "p90 ms", "speed-up", "peak MiB", "params", "detections")
TEXT_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One form of a detector, one part of it, in one mode; one image at a time.

    Attributes:
        p50_ms: Median time of an image; ``p90_ms`` what nine of ten stay under.
        speed_up: Speed over the first variant's in the same part and mode: median over rounds of two times' ratio.
        memory_mib: Most memory that a call took beyond what was held before; None where it is not measured.
        parameters: Of the part.
        num_detections: In the image.
    """

    variant: str
    part: Part
    mode: Mode
    p50_ms: float
    p90_ms: float
    speed_up: float
    memory_mib: float | None
    parameters: int
    num_detections: int

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of :data:`HEADINGS`."""
        return (
            self.part,
            self.mode,
            self.variant,
            f"{self.p50_ms:.1f}",
            f"{self.p90_ms:.1f}",
            f"{self.speed_up:.3f}",
            "-" if self.memory_mib is None else f"{self.memory_mib:.0f}",
            f"{self.parameters / 1e6:.1f} M",
            str(self.num_detections),
        )


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """Rows, with the machine they were taken on.

    Attributes:
        model: Its name.
        image_size: Height and width in pixels.
        agreement: Of the fused detector's detections with the unfused one's.
        notes: What was left out, and why.
    """

    model: str
    image_size: tuple[int, int]
    machine: Machine
    rows: list[Latency]
    agreement: DetectionAgreement
    notes: list[str]

    def find(self, variant: str, part: Part, mode: Mode) -> Latency | None:
        """That row, or None."""
        wanted = (variant, part, mode)
        return next((row for row in self.rows if (row.variant, row.part, row.mode) == wanted), None)

    @property
    def title(self) -> str:
        """What was measured."""
        return f"latency of {self.model} at {self.image_size[0]}x{self.image_size[1]}"

    def caption(self) -> str:
        """Equality, machine, versions and command: what must stand beside the figures."""
        found, pixels = self.agreement.num_detections, self.agreement.max_pixels
        agreement = f"{found} detections, fused and not, agree to {pixels:.1e} pixels"
        return "\n".join([agreement, *self.notes, str(self.machine)])

    def table(self) -> Table:
        """For a terminal (rich)."""
        table = require("rich.table", extra="cli").Table(title=self.title, caption=self.caption())
        for i, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if i < TEXT_COLUMNS else "right", no_wrap=True)
        before = None
        for row in self.rows:
            if before not in (None, (row.part, row.mode)):
                table.add_section()
            before = (row.part, row.mode)
            table.add_row(*row.cells())
        return table

    def markdown(self) -> str:
        """A page with the table."""
        lines = [f"# {self.title}", "", _line(HEADINGS), _line(["---"] * TEXT_COLUMNS + ["---:"] * 6)]
        lines += [_line(row.cells()) for row in self.rows]
        return "\n".join([*lines, "", *(f"{line}  " for line in self.caption().splitlines())]) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write ``latency.csv``, ``latency.md`` and ``latency.json`` into ``folder``; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"latency.{suffix}" for suffix in ("csv", "md", "json")]
        where = {"model": self.model, "height": self.image_size[0], "width": self.image_size[1]}
        rows = [asdict(row) | where | self.machine.columns() for row in self.rows]
        write_csv(paths[0], rows, list(rows[0]))
        write_text(paths[1], self.markdown())
        write_json(paths[2], asdict(self))
        return paths


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"
