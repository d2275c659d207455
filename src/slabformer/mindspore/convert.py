"""A torch model for MindSpore: source and checkpoint, loaded strictly and held against torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slabformer
from slabformer._files import replaced_with
from slabformer.measure.equality import Runtime
from slabformer.mindspore.blocks import plan
from slabformer.mindspore.graph import ConversionError, Traced, trace
from slabformer.mindspore.names import attribute, snake_case
from slabformer.mindspore.source import write_source
from slabformer.settings import NonEmptyStr, PositiveFloat, checked
from slabformer.surgery.verify import VerifyResult, verify

Cell = Any
#: largest difference of outputs over their root mean square
RTOL = 1e-5


@dataclass(frozen=True)
class Written:
    """A model as source for MindSpore.

    Attributes:
        source: The Python file.
        tensors: What its checkpoint holds: torch's state dict, and constants that are in none.
        constants: Names of those.
    """

    source: str
    tensors: dict[str, Tensor]
    constants: frozenset[str]


@dataclass(frozen=True)
class Converted:
    """A model that was written, loaded and verified.

    Attributes:
        cell: For MindSpore, in eval mode.
        source: Its file.
        checkpoint: Its weights.
        result: How far its outputs are from torch's.
    """

    cell: Cell
    source: Path
    checkpoint: Path
    result: VerifyResult


def write_model(model: nn.Module, example_inputs: Tensor | Sequence[Tensor], name: str | None = None) -> Written:
    """Source and tensors of ``model``; needs torch alone.

    Args:
        model: In eval mode, taking tensors and returning tensors.
        example_inputs: Its positional arguments; the first axis of each is the batch, whose size is free. All other
            sizes are those that the source is for.
        name: What the file's docstring calls the model; the class by default.

    Raises:
        ConversionError: If ``torch.export`` cannot take the model, or an operator has no counterpart, with the line of
            the model's code that it comes from.
        ValueError: If the model is in train mode.
    """
    inputs = _inputs(example_inputs)
    if model.training:
        raise ValueError("conversion needs eval mode, got a model in train mode; call model.eval() first")
    wrong = [name for name, value in model.named_parameters() if value.dtype != torch.float32]
    if wrong:
        raise ConversionError(f"models are written in float32, and {wrong[0]} is not; call model.float() first")
    traced = trace(model, inputs)
    source = write_source(plan(traced), _about(traced, name or type(model).__name__, inputs))
    state = {own: value.detach().cpu() for own, value in traced.model.state_dict().items()}
    constants = {own: value.detach().cpu() for own, value in traced.constants.items()}
    return Written(source, state | constants, frozenset(constants))


def _inputs(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise ValueError("example_inputs must be a tensor, or a tuple of the model's positional arguments, all tensors")
    return inputs


def _about(traced: Traced, name: str, inputs: Sequence[Tensor]) -> str:
    sizes = " and ".join("x".join(map(str, value.shape[1:])) for value in inputs)
    batch = "any batch size" if traced.batch is not None else f"batches of {inputs[0].shape[0]}"
    count = sum(parameter.numel() for parameter in traced.model.parameters())
    torch_version = torch.__version__.partition("+")[0]
    return (
        f"{name} for MindSpore, {count:,} parameters, for inputs of {sizes}, {batch}.\n\n"
        f"Written by slabformer {slabformer.__version__} from torch {torch_version}. Weights are\n"
        f"in the .ckpt beside it, under the names that they have in torch:\n\n"
        f"    model = build()\n"
        f'    slabformer.mindspore.load(model, "{snake_case(name)}.ckpt")'
    )


@checked
def convert(
    model: nn.Module,
    example_inputs: Any,
    folder: str | Path,
    *,
    name: NonEmptyStr | None = None,
    rtol: PositiveFloat = RTOL,
) -> Converted:
    """:func:`from_torch`, with the paths of the files and what the comparison gave."""
    from slabformer.mindspore.files import load, write_checkpoint

    title = name or type(model).__name__
    written = write_model(model, example_inputs, title)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, checkpoint = (folder / f"{snake_case(title)}{suffix}" for suffix in (".py", ".ckpt"))
    with replaced_with(source, checkpoint) as temporary:
        temporary.write_text(written.source, encoding="utf-8")
        write_checkpoint(written.tensors, temporary.with_name(checkpoint.name))
        cell = build(temporary)
        load(cell, temporary.with_name(checkpoint.name))
        result = verify(model, runtime_of(cell), _inputs(example_inputs), rtol)
    cell = build(source)
    load(cell, checkpoint)
    return Converted(cell, source, checkpoint, result)


def from_torch(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    folder: str | Path,
    *,
    name: NonEmptyStr | None = None,
    rtol: PositiveFloat = RTOL,
) -> Cell:
    """Write ``model`` for MindSpore: its source and its weights, ``NAME.py`` and ``NAME.ckpt`` in ``folder``.

    Both are loaded, strictly, and the outputs held against torch's before anything is in ``folder``.

    Args:
        model: In eval mode, fused or not, taking tensors and returning tensors.
        example_inputs: Its positional arguments; the first axis of each is the batch, whose size is free. All other
            sizes are those that the source is for.
        folder: Made where it is missing.
        name: Of the model and its files; by default its class's.
        rtol: Largest difference of outputs that passes, relative to their root mean square.

    Returns:
        The model as a ``mindspore.nn.Cell``, in eval mode.

    Raises:
        ConversionError: If the model cannot be written, with the operator and the line of code that it comes from.
        VerificationError: If MindSpore computes something else.
        ImportError: If MindSpore is missing, of a version that was not tried, or beside a NumPy that it cannot take.
        ValueError: If the model is in train mode.
    """
    return convert(model, example_inputs, folder, name=name, rtol=rtol).cell


def build(source: str | Path) -> Cell:
    """The model in a file that :func:`from_torch` wrote, in eval mode, its weights zeros until they are loaded.

    The file is run: build files of your own alone.
    """
    path = Path(source).resolve()
    name = f"slabformer_mindspore_{attribute(path.stem)}_{abs(hash(str(path)))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # MindSpore looks for the code of `construct` there
    spec.loader.exec_module(module)
    cell = module.build()
    cell.set_train(False)
    return cell


def runtime_of(cell: Cell) -> Runtime:
    """A cell where torch wants a module: tensors of torch in and out."""
    from slabformer.mindspore.files import to_mindspore

    def run(*inputs: Tensor) -> Any:
        outputs = cell(*map(to_mindspore, inputs))
        if isinstance(outputs, tuple):
            return tuple(torch.from_numpy(output.asnumpy()) for output in outputs)
        return torch.from_numpy(outputs.asnumpy())

    return Runtime(run)
