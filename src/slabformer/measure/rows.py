"""One row of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slabformer._moved import HasOldNames

Variant = Literal["as given", "fused", "LayerNorm baseline", "ceiling"]
Mode = Literal["eager", "compiled"]


@dataclass(frozen=True, kw_only=True)
class Measurement(HasOldNames):
    """One variant in one mode at one batch size.

    Attributes:
        p50_ms: Median latency of a batch; ``p90_ms`` the latency that nine of ten calls stay under.
        images_per_second: Batch size over the median latency.
        memory_mib: Most memory that one forward took beyond what was held before it, the least of five; on a CPU with
            what the allocator keeps aside, so that a tenth more or less means nothing. None where it is not measured.
        macs: Multiply-adds of one image in matrix products, convolutions and attention.
        over_baseline: Speed over the LayerNorm baseline's in the same mode: median over rounds of the two times' ratio.
        over_given: The same over the model as given.
        of_ceiling: The same over the ceiling: 1 is as fast as without norms and attention.
        of_floor: Share of the machine's own ceilings that it reaches (:mod:`slabformer.measure.roofline`); None
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
    over_baseline: float | None
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
            times(self.over_baseline),
            times(self.over_given),
            share(self.of_ceiling),
            share(self.of_floor),
            "-" if self.memory_mib is None else f"{self.memory_mib:.1f}",
            f"{self.parameters / 1e6:.2f} M",
            f"{self.macs / 1e9:.3f} G",
        )
