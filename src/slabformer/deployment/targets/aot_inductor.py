"""AOTInductor: a compiled program in ``model.pt2``, run by torch alone on processors like the one that compiled it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slabformer._defaults import Precision
from slabformer._torch import aoti_compile, aoti_load
from slabformer.deployment.targets.base import Request, Target, Written
from slabformer.export.exporter import quiet_exporter
from slabformer.export.onnx_file import program_of
from slabformer.export.program import Run
from slabformer.export.refusals import unsupported
from slabformer.measure.processor import instructions

FILE = "model.pt2"


class AotInductor(Target):
    """See :class:`Target`. The program holds for one minor version of torch."""

    name = "aoti"
    packages = ("torch",)
    dtypes: Sequence[Precision] = ("float32", "bfloat16")
    same_version = True

    def write(self, request: Request, folder: Path) -> Written:
        """See :class:`Target`."""
        program = program_of(request.in_half(), request.signature, request.inputs)
        with quiet_exporter():
            try:
                aoti_compile(program, folder / FILE)
            except Exception as error:  # whatever the compiler and its subprocesses raise
                raise unsupported("AOTInductor", error, program) from error
        return Written(did="compiled ahead of time", instructions=instructions())

    def load(self, folder: Path, dtype: Precision, threads: int | None = None) -> Run:
        """See :class:`Target`."""
        try:
            run = aoti_load(folder / FILE)
        except RuntimeError as error:
            raise unsupported("AOTInductor", error) from error
        return lambda tensors: run(*tensors)

    def script(self, dtype: Precision) -> str:
        """See :class:`Target`."""
        return """\
import pathlib, sys, numpy, torch
program = torch._inductor.aoti_load_package(str(pathlib.Path(__file__).with_name("model.pt2")))
print(program(*(torch.from_numpy(x) for x in numpy.load(sys.argv[1]).values())))
"""
