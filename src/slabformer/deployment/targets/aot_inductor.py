"""AOTInductor: a compiled program in ``model.pt2``, run by torch alone on processors like the one that compiled it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from slabformer._defaults import Precision
from slabformer._torch import aoti_compile, aoti_load
from slabformer.deployment.native import natively
from slabformer.deployment.targets.base import Request, Target, Written
from slabformer.export.exporter import quiet_exporter
from slabformer.export.onnx_file import program_of
from slabformer.export.own_operators import bring_attention_
from slabformer.export.program import Run
from slabformer.export.refusals import unsupported
from slabformer.measure.processor import instructions
from slabformer.ops.dispatch import native_in_programs
from slabformer.ops.native.build import BuildError

FILE, LIBRARIES = "model.pt2", "*.so"


class AotInductor(Target):
    """See :class:`Target`. The program holds for one minor version of torch.

    Linear attention runs in C++, in libraries beside the program that torch loads as operators.
    """

    name = "aoti"
    packages = ("torch",)
    dtypes: Sequence[Precision] = ("float32", "bfloat16")
    same_version = True

    def write(self, request: Request, folder: Path) -> Written:
        """See :class:`Target`."""
        program, did = _program(request, folder)
        with quiet_exporter():
            try:
                aoti_compile(program, folder / FILE)
            except Exception as error:  # whatever the compiler and its subprocesses raise
                raise unsupported("AOTInductor", error, program) from error
        return Written(did=f"compiled ahead of time{did}", instructions=instructions())

    def load(self, folder: Path, dtype: Precision, threads: int | None = None) -> Run:
        """See :class:`Target`."""
        for library in sorted(folder.glob(LIBRARIES)):
            torch.ops.load_library(library)
        try:
            run = aoti_load(folder / FILE)
        except RuntimeError as error:
            raise unsupported("AOTInductor", error) from error
        return lambda tensors: run(*tensors)

    def opening(self, dtype: Precision) -> str:
        """See :class:`Target`."""
        return """\
import json, pathlib, sys, numpy, torch; here = pathlib.Path(__file__).parent
program = [*map(torch.ops.load_library, here.glob("*.so")), torch._inductor.aoti_load_package(here / "model.pt2")][-1]
run = lambda arrays: [y.numpy() for y in program(*map(torch.from_numpy, arrays.values()))]
"""


def _program(request: Request, folder: Path) -> tuple[torch.export.ExportedProgram, str]:
    """What is to be compiled, its libraries in ``folder``, and what a report adds."""
    flat, notes = request.in_half(), list[str]()
    native, count = natively(flat, torch.device("cpu"), notes)
    if count:
        with native_in_programs():
            program = program_of(native, request.signature, request.inputs)
        try:
            libraries = bring_attention_(program)
        except BuildError as error:
            notes.append(f"no linear attention in C++: {error}")
        else:
            for number, library in enumerate(libraries):
                shutil.copyfile(library, folder / f"attention_{number}.so")
            return program, f", {libraries.total()} linear attentions in C++"
    return program_of(flat, request.signature, request.inputs), "".join(f"; {note}" for note in notes)
