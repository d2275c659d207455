"""What a deployment target is: it writes a model into a folder, and loads it from there in any process."""

from __future__ import annotations

import copy
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from slabformer._defaults import Precision
from slabformer._extras import check_installed
from slabformer.export.program import Run
from slabformer.export.signature import FlatCall, Signature

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be written.

    Attributes:
        flat: The fused model as a function of tensors in order, in eval mode, on a CPU, in float32.
        signature: Of its call.
        inputs: Example inputs in order.
        dtype: Of weights and arithmetic: inputs and outputs keep theirs.
        calibration: Batches, each its inputs in order, that show the ranges of activations; for int8.
    """

    flat: FlatCall
    signature: Signature
    inputs: Sequence[Tensor]
    dtype: Precision = "float32"
    calibration: Sequence[Sequence[Tensor]] = ()

    def in_half(self) -> FlatCall:
        """The call with weights and arithmetic in half precision where that was asked for; else as it is."""
        if self.dtype not in ("bfloat16", "float16"):
            return self.flat
        return FlatCall(HalfInside(self.flat, DTYPES[self.dtype]))


class HalfInside(nn.Module):
    """A call in half precision whose inputs and outputs are as before: arrays have no bfloat16.

    Args:
        flat: Its model is copied.
        dtype: Of weights and arithmetic.
    """

    def __init__(self, flat: FlatCall, dtype: torch.dtype) -> None:
        super().__init__()
        self.flat, self.dtype = copy.deepcopy(flat).to(dtype), dtype
        self.train(False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in float32."""
        half = [x.to(self.dtype) if x.is_floating_point() else x for x in inputs]
        return tuple(y.float() if y.is_floating_point() else y for y in self.flat(*half))


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a target wrote.

    Attributes:
        did: In words, for the report.
        instructions: Of the processor, without which the files do not run.
    """

    did: str
    instructions: tuple[str, ...] = ()


class Target(ABC):
    """A runtime.

    Attributes:
        name: Of ``--target``, and in the report.
        packages: That loading imports, the runtime first, as they are imported.
        writers: That writing imports besides.
        extra: Of slabformer, which brings both.
        dtypes: That it can compute in.
        any_batch: Whether files take batches of any size, not that of the example alone.
        same_version: Whether files hold for one minor version of the runtime alone, not for later ones too.
        in_auto: Whether "auto" tries it.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    writers: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    dtypes: Sequence[Precision] = ("float32",)
    any_batch: ClassVar[bool] = True
    same_version: ClassVar[bool] = False
    in_auto: ClassVar[bool] = True

    def runs_here(self) -> bool:
        """Whether what it writes runs on this system: else it is neither held against the model nor timed."""
        return True

    def check_installed(self, to_write: bool = True) -> None:
        """Refuse to go on where a package is missing.

        Raises:
            ImportError: Names the extra that brings it.
        """
        for package in (*self.packages, *(self.writers if to_write else ())):
            check_installed(package, self.extra)

    def check_dtype(self, dtype: str) -> None:
        """Refuse what this target, or this processor, has no arithmetic for.

        Raises:
            ValueError: Says which there are.
        """
        if dtype not in self.dtypes:
            others = ", ".join(self.dtypes)
            raise ValueError(f"{self.name} has no {dtype} here; it has {others}")

    @abstractmethod
    def write(self, request: Request, folder: Path) -> Written:
        """Write the program into ``folder``, which is empty.

        Raises:
            UnsupportedError: If the model cannot be expressed; names the operator or the line.
        """

    @abstractmethod
    def load(self, folder: Path, dtype: Precision, threads: int | None = None) -> Run:
        """What :meth:`write` wrote, ready to run.

        Args:
            folder: It.
            dtype: That it was written for.
            threads: To compute with; the runtime's choice when None. Targets of torch take torch's.

        Raises:
            UnsupportedError: If the runtime does not take it.
        """

    @abstractmethod
    def opening(self, dtype: Precision) -> str:
        """The first lines of run.py: they define ``run``, from arrays by name to arrays in order, without slabformer.

        They import json, pathlib, sys and numpy, too, for the lines behind them (:mod:`slabformer.deployment.kinds`).
        """

    def versions(self) -> dict[str, str]:
        """Of the packages that loading imports."""
        return {package: importlib.metadata.version(package) for package in self.packages}


def arrays_of(calibration: Sequence[Sequence[Tensor]], names: Sequence[str]) -> list[dict[str, object]]:
    """Batches as runtimes take them: arrays by name."""
    return [
        {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        for tensors in calibration
    ]
