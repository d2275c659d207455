"""What a benchmark of decoding found: rows, a table for the terminal, files for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slabformer._extras import require
from slabformer._files import write_csv, write_json, write_text
from slabformer._moved import HasOldNames, current_name
from slabformer.measure.rows import Mode, Variant
from slabformer.measure.timing import Machine
from slabformer.surgery.verify import VerifyResult

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = (
    *("first token ms", "prompt tokens/s", "p50 ms", "p90 ms", "tokens/s"),
    *("x baseline", "x given", "of ceiling", "peak MiB", "params"),
)


#: what a language model's variants are called, where it is not what others' are
VARIANT_NAMES: dict[str, str] = {"LayerNorm baseline": "RMSNorm baseline", "ceiling": "ceiling (norms deleted)"}


@dataclass(frozen=True, kw_only=True)
class Decoding(HasOldNames):
    """One form in one mode at one batch size.

    Attributes:
        first_token_ms: Median time to read the prompt and give the first token.
        prompt_tokens_per_second: Tokens of the prompts over that time.
        p50_ms: Median time of a step, which writes one token of each text; ``p90_ms`` what nine of ten stay under.
        tokens_per_second: Texts over ``p50_ms``.
        memory_mib: Most memory of a step beyond what was held before it; None where it is not measured.
        over_baseline: Writing speed over the RMSNorm baseline's in the same mode: median over rounds of the ratio.
        over_given: The same over the model as given.
        of_ceiling: The same over the model without norms: 1 is as fast as if they cost nothing.
    """

    variant: Variant
    mode: Mode
    batch_size: int
    first_token_ms: float
    prompt_tokens_per_second: float
    p50_ms: float
    p90_ms: float
    tokens_per_second: float
    memory_mib: float | None
    parameters: int
    over_baseline: float | None
    over_given: float | None
    of_ceiling: float | None

    def cells(self, names: Mapping[str, str]) -> tuple[str, ...]:
        """The row as text, in the table's order."""

        def times(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        return (
            str(self.batch_size),
            self.mode,
            names.get(self.variant, self.variant),
            f"{self.first_token_ms:.2f}",
            f"{self.prompt_tokens_per_second:,.0f}",
            f"{self.p50_ms:.2f}",
            f"{self.p90_ms:.2f}",
            f"{self.tokens_per_second:,.1f}",
            times(self.over_baseline),
            times(self.over_given),
            "-" if self.of_ceiling is None else f"{self.of_ceiling:.1%}",
            "-" if self.memory_mib is None else f"{self.memory_mib:.1f}",
            f"{self.parameters / 1e6:.2f} M",
        )


@dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """Rows, with the machine they were taken on.

    Attributes:
        model: Its name.
        equality: How far the fused model's logits are from the given one's; None when nothing was fused.
    """

    model: str
    machine: Machine
    prompt_tokens: int
    rows: list[Decoding]
    equality: VerifyResult | None = None

    def find(self, variant: Variant, mode: Mode, batch_size: int) -> Decoding | None:
        """That row, or None."""
        wanted = (current_name(variant), mode, batch_size)
        return next((row for row in self.rows if (row.variant, row.mode, row.batch_size) == wanted), None)

    def table(self) -> Table:
        """For a terminal (rich)."""
        title = f"writing speed of {self.model} after {self.prompt_tokens} tokens"
        table = require("rich.table", extra="cli").Table(
            "batch", "mode", "variant", title=title, caption=self.caption()
        )
        for heading in HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        before = None
        for row in self.rows:
            if before not in (None, (row.batch_size, row.mode)):
                table.add_section()
            before = (row.batch_size, row.mode)
            table.add_row(*row.cells(VARIANT_NAMES))
        return table

    def caption(self) -> str:
        """Equality, machine, versions and command: what must stand beside the figures."""
        lines = [f"fused equals given within {self.equality.max_rel:.1e} of its scale"] if self.equality else []
        return "\n".join([*lines, str(self.machine)])

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def markdown(self) -> str:
        """The table as a page, with what must stand beside the figures."""
        names = ("batch", "mode", "variant", *HEADINGS)
        rows = [names, ("---:", "---", "---", *["---:"] * len(HEADINGS))]
        rows += [row.cells(VARIANT_NAMES) for row in self.rows]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        title = f"# Writing speed of {self.model} after {self.prompt_tokens} tokens"
        notes = "\n".join(f"- {line}" for line in self.caption().splitlines())
        return f"{title}\n\n{table}\n\n{notes}\n"

    def write(self, folder: Path) -> list[Path]:
        """Write ``decode.csv``, ``decode.json`` and ``decode.md`` into ``folder``; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"decode.{suffix}" for suffix in ("csv", "json", "md")]
        rows = [{"model": self.model, "prompt_tokens": self.prompt_tokens, **asdict(row)} for row in self.rows]
        write_csv(paths[0], rows, list(rows[0]))
        write_json(paths[1], self.to_dict())
        write_text(paths[2], self.markdown())
        return paths
