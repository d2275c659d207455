"""CoreML: a package ``model.mlpackage.zip`` for Apple's systems, converted anywhere and run on macOS alone."""

from __future__ import annotations

import functools
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slabformer._defaults import Precision
from slabformer._extras import require
from slabformer._process import no_logs
from slabformer.deployment.targets.base import Request, Target, Written
from slabformer.export.exporter import quiet_exporter
from slabformer.export.norms_left import norms_in_words
from slabformer.export.onnx_file import program_of
from slabformer.export.program import Run
from slabformer.export.refusals import UnsupportedError, unsupported

EXTRA, PACKAGE, FILE = "coreml", "model.mlpackage", "model.mlpackage.zip"
#: what CoreML's intermediate language calls operators that normalise
NORMS = ("batch_norm", "instance_norm", "l2_norm", "layer_norm", "local_response_norm")
_require = functools.partial(require, extra=EXTRA)


class CoreMl(Target):
    """See :class:`Target`. A package is a folder, which is kept in an archive as CoreML's tools take it apart.

    Not run here: on other systems than macOS it is converted, its operators are looked through, and nothing more.
    """

    name = "coreml"
    packages = ("coremltools",)
    extra = EXTRA
    dtypes: Sequence[Precision] = ("float32", "float16")
    any_batch = False
    in_auto = False

    def runs_here(self) -> bool:
        """See :class:`Target`."""
        return sys.platform == "darwin"

    def write(self, request: Request, folder: Path) -> Written:
        """See :class:`Target`."""
        with no_logs("coremltools", below=logging.ERROR):
            tools = _require("coremltools")
            program = program_of(request.flat, request.signature, request.inputs)
            with quiet_exporter():
                try:
                    model = _converted(tools, program, request.dtype)
                except Exception as error:  # whatever a conversion raises
                    raise unsupported("CoreML", error, program) from error
            with tempfile.TemporaryDirectory() as place:
                model.save(str(Path(place) / PACKAGE))
                shutil.make_archive(str(folder / PACKAGE), "zip", place, PACKAGE)
        kinds = list(_operators(model.get_spec()))
        left = {kind: kinds.count(kind) for kind in NORMS if kind in kinds}
        return Written(did=f"a CoreML program, {norms_in_words(left)}")

    def load(self, folder: Path, dtype: Precision, threads: int | None = None) -> Run:
        """See :class:`Target`."""
        if not self.runs_here():
            raise UnsupportedError("CoreML's programs run on macOS alone; copy the folder there")
        tools = _require("coremltools")
        with tempfile.TemporaryDirectory() as place:
            shutil.unpack_archive(folder / FILE, place)
            model = tools.models.MLModel(str(Path(place) / PACKAGE))
        spec = model.get_spec().description
        names, outputs = [port.name for port in spec.input], [port.name for port in spec.output]

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            found = model.predict(dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True)))
            return [torch.from_numpy(found[name]) for name in outputs]

        return run

    def opening(self, dtype: Precision) -> str:
        """See :class:`Target`."""
        return """\
import json, pathlib, shutil, sys, tempfile, numpy, coremltools
place = tempfile.mkdtemp(); shutil.unpack_archive(pathlib.Path(__file__).with_name("model.mlpackage.zip"), place)
model = coremltools.models.MLModel(place + "/model.mlpackage")
names = [port.name for port in model.get_spec().description.input]
run = lambda arrays: list(model.predict(dict(zip(names, arrays.values()))).values())
"""


def _converted(tools: Any, program: torch.export.ExportedProgram, dtype: Precision) -> Any:
    core = program.run_decompositions({})
    for node in list(core.graph.nodes):
        if node.target is torch.ops.aten.alias.default:  # the same tensor, which coremltools does not know
            node.replace_all_uses_with(node.args[0])
            core.graph.erase_node(node)
    core.graph_module.recompile()
    return tools.convert(
        core,
        convert_to="mlprogram",
        minimum_deployment_target=tools.target.iOS17,
        compute_precision=tools.precision.FLOAT16 if dtype == "float16" else tools.precision.FLOAT32,
        skip_model_load=True,
    )


def _operators(spec: Any) -> Iterator[str]:
    """Kinds of operators in a program."""
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from (operation.type for operation in block.operations)
