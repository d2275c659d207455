"""What a benchmark found: rows, a table for the terminal, files for everything else."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from slabformer._extras import require
from slabformer.deployment.measure import Machine
from slabformer.surgery.verify import VerifyResult

if TYPE_CHECKING:
    from rich.table import Table

Variant = Literal["as given", "fused", "LayerNorm twin", "ceiling"]
Mode = Literal["eager", "compiled"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One variant in one mode at one batch size.

    Attributes:
        p50_ms: Median latency of a batch; ``p90_ms`` the latency that nine of ten calls stay under.
        images_per_second: Batch size over the median latency.
        memory_mib: Most memory that one forward took beyond what was held before it, the least of five; on a CPU with
            what the allocator keeps aside, so that a tenth more or less means nothing. None where it is not measured.
        macs: Multiply-adds of one image in matrix products, convolutions and attention.
        over_twin: Speed over the LayerNorm twin's in the same mode: median over rounds of the two times' ratio.
        over_given: The same over the model as given.
        of_ceiling: The same over the ceiling: 1 is as fast as without norms and attention.
        of_floor: Share of the machine's own ceilings that it reaches (:mod:`slabformer.deployment.roofline`); None
            where they were not measured.
    """

    variant: Variant
    mode: Mode
    batch_size: int
    p50_ms: float
    p90_ms: float
    images_per_second: float
    memory_mib: float | None
    parameters: int
    macs: int
    over_twin: float | None
    over_given: float
    of_ceiling: float | None
    of_floor: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the table's order."""

        def times(value: float | None) -> str:
            return "-" if value is None else f"{value:.2f}"

        def share(value: float | None) -> str:
            return "-" if value is None else f"{value:.0%}"

        return (
            str(self.batch_size),
            self.mode,
            self.variant,
            f"{self.p50_ms:.2f}",
            f"{self.p90_ms:.2f}",
            f"{self.images_per_second:,.0f}",
            times(self.over_twin),
            times(self.over_given),
            share(self.of_ceiling),
            share(self.of_floor),
            "-" if self.memory_mib is None else f"{self.memory_mib:.1f}",
            f"{self.parameters / 1e6:.2f} M",
            f"{self.macs / 1e9:.3f} G",
        )


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
        wanted = (variant, mode, batch_size)
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
            "x twin",
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

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def write(self, folder: Path) -> list[Path]:
        """Write ``bench.csv``, ``bench.json`` and ``bench.png`` into ``folder``; returns their paths."""
        from slabformer.deployment.plots import save, speed_bars

        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "bench.csv", folder / "bench.json", folder / "bench.png"]
        with paths[0].open("w", newline="") as file:
            self._write_rows(file)
        paths[1].write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        save(speed_bars(self), paths[2])
        return paths

    def rows(self) -> list[dict[str, object]]:
        """The measurements as flat rows with the columns of :func:`columns`."""
        where = {"model": self.model, **self.machine.columns()}
        return [asdict(row) | where for row in self]

    def _write_rows(self, file: TextIO) -> None:
        writer = csv.DictWriter(file, fieldnames=columns())
        writer.writeheader()
        writer.writerows(self.rows())


def columns() -> list[str]:
    """Of the CSV files."""
    return [*(field.name for field in fields(Measurement)), "model", *(field.name for field in fields(Machine))]
