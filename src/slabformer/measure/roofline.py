"""The floor under a latency: fewest bytes and floating point operations, over what the machine was seen to reach.

A model's matrix products, convolutions and attentions read their operands and write their results once; everything
else could ride along with them. That takes the larger of two times: its operations at the speed of a large matrix
product, its bytes at the speed of a large copy (Williams et al. 2009, the roofline). What stays in a cache between two
of them can beat the copy, nothing beats the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slabformer._torch import DispatchMode, operator_of, tree_leaves
from slabformer.measure.flops import flop_counter, is_counted
from slabformer.measure.timing import quantile, time_interleaved

#: rows of the large matrix product, and bytes of the large copy: beyond every cache
LARGE = {"cpu": (2048, 2**28), "cuda": (8192, 2**30)}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What one device reaches in one dtype.

    Attributes:
        flops_per_s: In a large matrix product.
        bytes_per_s: In a large copy, reads and writes both counted.
    """

    flops_per_s: float
    bytes_per_s: float

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher of both: what a busy machine reaches later or earlier, it can reach."""
        return Ceilings(
            flops_per_s=max(self.flops_per_s, other.flops_per_s), bytes_per_s=max(self.bytes_per_s, other.bytes_per_s)
        )

    def __str__(self) -> str:
        product, copy = f"{self.flops_per_s / 1e9:,.0f} GFLOP/s", f"{self.bytes_per_s / 1e9:,.1f} GB/s"
        return f"a large matrix product reaches {product}, a large copy {copy}"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a call cannot do without.

    Attributes:
        flops: Floating point operations, two to a multiply-add.
        bytes: Operands and results of matrix products, convolutions and attentions, each once.
    """

    flops: int
    bytes: int

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that the call takes at least."""
        return max(self.flops / ceilings.flops_per_s, self.bytes / ceilings.bytes_per_s)


def measure_ceilings(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 2.0) -> Ceilings:
    """The ceilings of ``device`` at this moment, with torch's current threads: the fastest tenth of the calls."""
    rows, size = LARGE["cpu" if device.type == "cpu" else "cuda"]
    a = torch.randn(rows, rows, device=device).to(dtype)
    product = torch.empty_like(a)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    calls: dict[str, Callable[[], object]] = {
        "product": partial(torch.mm, a, a, out=product),
        "copy": partial(torch.empty_like(source).copy_, source),
    }
    turns = time_interleaved(calls, seconds=seconds, device=device)
    fastest = {name: quantile(turn, 0.1) for name, turn in turns.items()}
    return Ceilings(flops_per_s=2 * rows**3 / fastest["product"], bytes_per_s=2 * size / fastest["copy"])


@torch.no_grad()
def work_of(call: Callable[..., object], *inputs: Tensor) -> Work:
    """What ``call``, a function or a module in eager form, does with ``inputs``; run once."""
    with flop_counter() as flops, _Traffic() as traffic:
        call(*inputs)
    return Work(flops=flops.get_total_flops(), bytes=traffic.bytes)


class _Traffic(DispatchMode):
    """While active, adds up the bytes that operations with a FLOP formula read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_counted(operator_of(func)):
            self.bytes += _size((args, kwargs)) + _size(result)
        return result


def _size(values: Any) -> int:
    """Bytes of all tensors in ``values``; broadcast ones count what lies in memory."""
    tensors: Iterable[Tensor] = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
