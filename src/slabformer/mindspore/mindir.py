"""MINDIR: a model as one file for MindSpore's other runtimes, for batches of any size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from slabformer._files import replaced
from slabformer.measure.equality import Runtime
from slabformer.mindspore.convert import RTOL, Cell, runtime_of
from slabformer.mindspore.runtime import graph_mode, require
from slabformer.settings import PositiveFloat, PositiveInt, checked
from slabformer.surgery.verify import VerifyResult, verify

SUFFIX = ".mindir"


@checked
def export_mindir(
    cell: Cell,
    model: nn.Module,
    example_inputs: Tensor,
    path: str | Path,
    *,
    batch_sizes: Sequence[PositiveInt] = (1, 2, 3),
    rtol: PositiveFloat = RTOL,
) -> VerifyResult:
    """Write a cell as MINDIR, whose batch size is free, load it, and hold it against torch before it is in place.

    Args:
        cell: In eval mode.
        model: The same in torch.
        example_inputs: ``(B, ...)``; all sizes but that of the batch are fixed.
        path: Ends in ".mindir".
        batch_sizes: That are compared.
        rtol: Largest difference of outputs that passes, relative to their root mean square.

    Raises:
        ValueError: If ``path`` ends otherwise.
        VerificationError: If the file computes something else.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"MINDIR files end in {SUFFIX}, got {path}")
    mindspore = require()
    inputs = mindspore.Tensor(shape=[None, *example_inputs.shape[1:]], dtype=mindspore.float32)
    cell.set_inputs(inputs)
    with graph_mode(), replaced(path) as temporary:
        written = temporary.with_name(f"written{SUFFIX}")  # MindSpore adds the suffix where it is missing
        mindspore.export(cell, inputs, file_name=str(written.with_suffix("")), file_format="MINDIR")
        written.replace(temporary)
        sizes = (torch.randn(size, *example_inputs.shape[1:]) for size in batch_sizes)
        return verify(model, load_mindir(temporary), [example_inputs, *sizes], rtol)


def load_mindir(path: str | Path) -> Runtime:
    """The model in a ``.mindir`` file, where torch wants a module: tensors of torch in and out.

    Raises:
        ValueError: If MindSpore cannot read it.
    """
    mindspore = require()
    try:
        graph = mindspore.load(str(path))
    except Exception as error:  # whatever the bytes look like
        raise ValueError(f"cannot read {path} as MINDIR: it is truncated, or no {SUFFIX} file") from error
    return runtime_of(mindspore.nn.GraphCell(graph))
