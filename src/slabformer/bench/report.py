"""What a benchmark found: rows, a table for the terminal, files for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from slabformer._extras import require
from slabformer._files import write_csv, write_json
from slabformer._moved import current_name
from slabformer.figures.plots import save, speed_bars
from slabformer.measure.rows import Measurement, Mode, Variant
from slabformer.measure.timing import Machine
from slabformer.surgery.verify import VerifyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Iterable of :class:`Measurement`, with the machine they were taken on.

    Attributes:
        model: Its name.
        equality: How far the fused model's outputs are from the given one's; None when nothing was fused.
        notes: What was left out, and why.
    """

    model: str
    machine: Machine
    measurements: list[Measurement]
    equality: VerifyResult | None = None
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    def find(self, variant: Variant, mode: Mode, batch_size: int) -> Measurement | None:
        """That row, or None."""
        wanted = (current_name(variant), mode, batch_size)
        return next((row for row in self if (row.variant, row.mode, row.batch_size) == wanted), None)

    def table(self) -> Table:
        """For a terminal (rich)."""
        table = require("rich.table", extra="cli").Table(title=f"speed of {self.model}", caption=self.caption())
        table.add_column("batch", justify="right")
        table.add_column("mode")
        table.add_column("variant")
        for heading in (
            "p50 ms",
            "p90 ms",
            "images/s",
            "x baseline",
            "x given",
            "of ceiling",
            "of floor",
            "peak MiB",
            "params",
            "MACs",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        before = None
        for row in self:
            if before not in (None, (row.batch_size, row.mode)):
                table.add_section()
            before = (row.batch_size, row.mode)
            table.add_row(*row.cells())
        return table

    def caption(self) -> str:
        """Equality, machine, versions and command: what must stand beside the figures."""
        lines = [f"fused equals given within {self.equality.max_rel:.1e} of its scale"] if self.equality else []
        return "\n".join([*lines, *self.notes, str(self.machine)])

    def picture(self) -> Figure:
        """Images per second as bars (matplotlib)."""
        return speed_bars(self.measurements, model=self.model, caption=self.caption())

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def write(self, folder: Path) -> list[Path]:
        """Write ``bench.csv``, ``bench.json`` and ``bench.png`` into ``folder``; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "bench.csv", folder / "bench.json", folder / "bench.png"]
        write_csv(paths[0], self.rows(), columns())
        write_json(paths[1], self.to_dict())
        save(self.picture(), paths[2])
        return paths

    def rows(self) -> list[dict[str, object]]:
        """The measurements as flat rows with the columns of :func:`columns`."""
        where = {"model": self.model, **self.machine.columns()}
        return [asdict(row) | where for row in self]


def columns() -> list[str]:
    """Of the CSV files."""
    return [*(field.name for field in fields(Measurement)), "model", *(field.name for field in fields(Machine))]
