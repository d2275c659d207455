"""PyTorch: a program of torch.export in ``model.pt2``, run by torch alone, on any processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from slabformer._defaults import Precision
from slabformer.deployment.targets.base import Request, Target, Written
from slabformer.export.onnx_file import program_of
from slabformer.export.program import Run

FILE = "model.pt2"


class TorchExport(Target):
    """See :class:`Target`."""

    name = "torch"
    packages = ("torch",)
    dtypes: Sequence[Precision] = ("float32", "bfloat16", "float16")

    def write(self, request: Request, folder: Path) -> Written:
        """See :class:`Target`."""
        program = program_of(request.in_half(), request.signature, request.inputs)
        with (folder / FILE).open("wb") as file:
            torch.export.save(program, file)
        return Written(did="a program of torch.export")

    def load(self, folder: Path, dtype: Precision, threads: int | None = None) -> Run:
        """See :class:`Target`."""
        with (folder / FILE).open("rb") as file:
            module = torch.export.load(file).module()
        return lambda tensors: module(*tensors)

    def opening(self, dtype: Precision) -> str:
        """See :class:`Target`."""
        return """\
import json, pathlib, sys, numpy, torch
program = torch.export.load(pathlib.Path(__file__).with_name("model.pt2")).module()
run = lambda arrays: [y.detach().numpy() for y in program(*map(torch.from_numpy, arrays.values()))]
"""
