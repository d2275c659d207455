"""ExecuTorch: a program ``model.pte`` for phones and boards, its layers on XNNPACK."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slabformer._defaults import Precision
from slabformer._extras import check_installed, require
from slabformer.deployment.targets.base import Request, Target, Written
from slabformer.export.exporter import quiet_exporter
from slabformer.export.onnx_file import program_of
from slabformer.export.program import Run
from slabformer.export.refusals import unsupported

FILE, EXTRA = "model.pte", "executorch"
_require = functools.partial(require, extra=EXTRA)


class ExecuTorch(Target):
    """See :class:`Target`. Its runtime for Python needs torch; that of devices does not.

    What XNNPACK does not take runs on ExecuTorch's portable operators, which are slow; the report says how many.
    """

    name = "executorch"
    packages = ("executorch", "torch")
    extra = EXTRA
    dtypes: Sequence[Precision] = ("float32", "int8")
    any_batch = False  # memory is planned when the file is written

    def write(self, request: Request, folder: Path) -> Written:
        """See :class:`Target`."""
        program = program_of(request.flat, request.signature, request.inputs)
        if request.dtype == "int8":
            program = _in_integers(program, request)
        partitioner = _require("executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner()
        with quiet_exporter():
            try:
                edge = _require("executorch.exir").to_edge_transform_and_lower(program, partitioner=[partitioner])
                lowered = edge.to_executorch()
            except Exception as error:  # whatever a lowering raises
                raise unsupported("ExecuTorch", error, program) from error
        with (folder / FILE).open("wb") as file:
            lowered.write_to_file(file)
        calls = [node for node in edge.exported_program().graph.nodes if node.op == "call_function"]
        delegated = sum("executorch_call_delegate" in str(node.target) for node in calls)
        portable = sum("aten" in str(node.target) for node in calls)
        return Written(did=f"{delegated} parts on XNNPACK, {portable} portable operators between them")

    def check_dtype(self, dtype: str) -> None:
        """See :class:`Target`; integers take torchao's quantiser."""
        super().check_dtype(dtype)
        if dtype == "int8":
            check_installed("torchao", EXTRA)

    def load(self, folder: Path, dtype: Precision, threads: int | None = None) -> Run:
        """See :class:`Target`."""
        program = _require("executorch.runtime").Runtime.get().load_program(folder / FILE)
        try:
            method = program.load_method("forward")
        except RuntimeError as error:
            raise unsupported("ExecuTorch", error) from error

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [output.clone() for output in method.execute([tensor.contiguous() for tensor in tensors])]

        return run

    def opening(self, dtype: Precision) -> str:
        """See :class:`Target`."""
        return """\
import json, pathlib, sys, numpy, torch; from executorch.runtime import Runtime
method = Runtime.get().load_program(pathlib.Path(__file__).with_name("model.pte")).load_method("forward")
run = lambda arrays: [y.numpy() for y in method.execute([*map(torch.from_numpy, arrays.values())])]
"""


def _in_integers(program: torch.export.ExportedProgram, request: Request) -> torch.export.ExportedProgram:
    """``program`` as XNNPACK's quantiser rounds it: weights per channel, activations by what calibration shows.

    Raises:
        UnsupportedError: If the quantiser does not take it.
        ValueError: If no batch is as large as the example, for which the program is.
    """
    pt2e = _require("torchao.quantization.pt2e.quantize_pt2e")
    xnnpack = _require("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = xnnpack.XNNPACKQuantizer().set_global(config)
    batches = list(_in_batches_like_the_example(request))
    if not batches:
        raise ValueError(
            f"executorch calibrates on batches of {len(request.inputs[0])}, as the example's; give larger ones"
        )
    with quiet_exporter(), torch.no_grad():
        try:
            prepared = pt2e.prepare_pt2e(program.module(), quantizer)
            for batch in batches:
                prepared(*batch)
            rounded = pt2e.convert_pt2e(prepared)
            return torch.export.export(rounded, tuple(request.inputs))
        except Exception as error:  # whatever a quantiser raises
            raise unsupported("XNNPACK's quantiser", error, program) from error


def _in_batches_like_the_example(request: Request) -> Iterator[list[Tensor]]:
    """Calibration in batches of the example's size, for which the program is; a rest that fills none is left out."""
    for batch in request.calibration:
        sizes = [len(example) for example in request.inputs]
        for start in range(0, len(batch[0]) - sizes[0] + 1, sizes[0]):
            yield [tensor[start : start + size] for tensor, size in zip(batch, sizes, strict=True)]
