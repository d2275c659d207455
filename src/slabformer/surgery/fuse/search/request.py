"""What a caller gives: models and examples that cannot be fused are refused before anything changes; what must stay."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from slabformer._torch import is_compiled_in_place
from slabformer.nn.affine import Folded
from slabformer.nn.norms import norms_of
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.statistics import check_statistics
from slabformer.surgery.fuse.tree.copies import Example, Output, Watched, deployed_copy, hooked, quiet
from slabformer.surgery.fuse.tree.norms import Norm, find_norms
from slabformer.surgery.normal import need_unsharded, need_values
from slabformer.surgery.outputs import first_line, tensors_of

#: wrappers by class name, so that none of them need be imported, and what to pass instead
_WRAPPERS = {
    "OptimizedModule": "it is compiled; pass model._orig_mod, and compile what fuse returns",
    "FullyShardedDataParallel": "its parameters are sharded; load a full state dict into a plain model first",
    "FSDPModule": "its parameters are sharded; load a full state dict into a plain model first",
    "ScriptModule": "it is scripted; pass the Python module it was made from",
}
#: a method's name, or a function of the model and the example inputs
OutputLike = str | Callable[..., Any]


def check_model(model: nn.Module, allow_gamma: bool) -> list[Norm]:
    """The norms of ``model``.

    Raises:
        TypeError: If it is no module.
        ValueError: If it is wrapped, in train mode, without norms, still fading, holds no plain tensors, or the map of
            a norm is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse needs an nn.Module, got {type(model).__name__}")
    _check_wrappers(model)
    _check_mode(model)
    _check_parameters(model)
    norms = find_norms(model)
    if not norms and not any(isinstance(module, Folded) for module in model.modules()):
        raise ValueError(
            f"no RepBN, PRepBN, BatchNorm or Affine to fuse in {type(model).__name__}{_other_norms(model)}; "
            "call convert_norms_(model) and train it first"
        )
    if norms and "" in norms[0].names:
        raise ValueError(f"the model itself is a {type(model).__name__}; wrap it: nn.Sequential(norm)")
    if not allow_gamma:
        _check_gamma(model)
    _check_values(norms)
    return norms


def _other_norms(model: nn.Module) -> str:
    """Words about the first kind of norm that cannot be folded, if there is one."""
    staying = Counter(row for _, row in norms_of(model) if row.scale_shift is None)
    return next((f", but {count} {row.title} ({row.stays})" for row, count in staying.most_common(1)), "")


def _check_values(norms: Sequence[Norm]) -> None:
    """Refuse norms whose map in eval mode is not finite, or comes of statistics that no data has.

    Raises:
        ValueError: Naming the first one.
    """
    statistics = {norm.name: norm.statistics() for norm in norms}
    check_statistics({name: found for name, found in statistics.items() if found is not None})
    for norm in norms:
        if not all(each.isfinite().all() for each in norm.scale_shift()):
            raise ValueError(f"{norm.name}: weight, bias or eta is not finite; restore a checkpoint from before")


def _check_wrappers(model: nn.Module) -> None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(f"fuse got a model wrapped in {type(model).__name__}; pass model.module")
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                raise ValueError(f"fuse cannot edit {name or 'the model'}: {_WRAPPERS[base.__name__]}")


def check_not_compiled(model: nn.Module) -> None:
    """Refuse to edit modules that ``module.compile()`` has compiled in place; a copy of them is not compiled.

    Raises:
        ValueError: Naming the first one.
    """
    for name, module in model.named_modules():
        if is_compiled_in_place(module):
            raise ValueError(
                f"{name or 'the model'} is compiled in place; use fuse(), which copies, and compile the copy"
            )


def _check_mode(model: nn.Module) -> None:
    if model.training:
        raise ValueError("fuse needs eval mode, got a model in train mode; call model.eval() first")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"fuse needs eval mode, but {name} is in train mode; call model.eval() first")


def _check_parameters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.", "torchao.")):
            raise ValueError(f"{name} is quantised ({type(module).__name__}); fuse first, quantise afterwards")
    need_unsharded(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise ValueError(f"{name} has no shape yet; run the model once first")
    need_values(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) not in (nn.Parameter, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; fuse needs plain tensors (fuse before quantising)")
        is_byte = tensor.element_size() == 1 and tensor.dtype != torch.bool
        if tensor.is_quantized or (isinstance(tensor, nn.Parameter) and is_byte):
            raise ValueError(f"{name} is quantised ({tensor.dtype}); fuse first, quantise afterwards")


def _check_gamma(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, PRepBN) and float(module.gamma) != 0:
            raise ValueError(
                f"{name} still holds its norm (gamma is {float(module.gamma):.3g}); finish the schedule, take the "
                "model's gamma with copy_gamma_(model, average), or pass allow_gamma=True to drop the norm as it is"
            )


def check_examples(example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> list[Example]:
    """One Example per set of inputs.

    Raises:
        TypeError: If the inputs are no tensor, tuple, or list of such, or the keyword arguments no dict of strings.
        ValueError: If there are none.
    """
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise TypeError(f"example_kwargs must be a dict of keyword arguments, got {type(example_kwargs).__name__}")
    kwargs = dict(example_kwargs or {})
    cases: Sequence[Any] = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not cases:
        raise ValueError("fuse needs at least one example input, got an empty list")
    examples = []
    for case in cases:
        if not isinstance(case, (Tensor, tuple)):
            hint = "; pass a dict as example_kwargs, with () as example_inputs" if isinstance(case, Mapping) else ""
            raise TypeError(
                f"example_inputs must be a tensor, a tuple of positional arguments, or a list of such, "
                f"got {type(case).__name__}{hint}"
            )
        examples.append(Example((case,) if isinstance(case, Tensor) else case, kwargs))
    if any(not example.tensors() for example in examples):
        raise ValueError("fuse needs example inputs, got no tensor in example_inputs and example_kwargs")
    return examples


def shapes_of(examples: Sequence[Example]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Shapes of the tensors of each example."""
    return tuple(tuple(tuple(tensor.shape) for tensor in example.tensors()) for example in examples)


# --- what must stay ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What must stay of a model.

    Attributes:
        outputs: What it is asked for, its forward first.
        watched: Tensors inside it.
        kept: The modules that each pattern of ``keep`` matches.
        model: Of which it is asked.
    """

    outputs: tuple[Output, ...]
    watched: tuple[Watched, ...]
    kept: Mapping[str, Sequence[str]]
    model: nn.Module

    @classmethod
    def of(
        cls,
        model: nn.Module,
        norms: Sequence[Norm],
        keep: str | Iterable[str],
        outputs: OutputLike | Iterable[OutputLike],
    ) -> Wanted:
        """What a caller asks for, and what hooks of the model see.

        Raises:
            TypeError: If ``keep`` or ``outputs`` are of the wrong kind.
            ValueError: If the model has no such module or method.
        """
        kept = _check_keep(model, norms, keep)
        asked = (Output(), *_check_outputs(model, outputs))
        return cls(asked, (*_watched_outputs(kept), *hooked(model)), kept, model)

    def examples(self, inputs: Sequence[Example]) -> list[Example]:
        """One for each of ``inputs`` and output."""
        return [replace(example, output=output, watched=self.watched) for example in inputs for output in self.outputs]

    def rehearse(self, examples: Sequence[Example]) -> None:
        """Run what is asked for once, if that is more than the forward.

        Raises:
            ValueError: If an output fails or holds no tensor, or nothing runs that ``keep`` matches.
        """
        if self.kept or len(self.outputs) > 1:
            _rehearse(deployed_copy(self.model), examples, self.kept)


def _check_keep(model: nn.Module, norms: Sequence[Norm], keep: str | Iterable[str]) -> dict[str, list[str]]:
    """The modules that each pattern of ``keep`` matches, shared ones by their first name.

    Raises:
        TypeError: If a pattern is no text.
        ValueError: If a pattern matches no module, naming the closest name.
    """
    inside = tuple(f"{name}." for norm in norms for name in norm.names)
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and not name.startswith(inside)
    }
    first: dict[nn.Module, str] = {}
    for name, module in modules.items():
        first.setdefault(module, name)
    found: dict[str, list[str]] = {}
    for pattern in [keep] if isinstance(keep, str) else keep:
        if not isinstance(pattern, str):
            raise TypeError(f"keep must be names of modules or patterns such as 'blocks.*', got {pattern!r}")
        names = dict.fromkeys(first[module] for name, module in modules.items() if fnmatchcase(name, pattern))
        if not names:
            close = difflib.get_close_matches(pattern, modules, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"keep={pattern!r} matches no module of {type(model).__name__}{hint}")
        found[pattern] = list(names)
    return found


def _watched_outputs(kept: Mapping[str, Iterable[str]]) -> list[Watched]:
    """The outputs of the modules that were found for each pattern."""
    names = dict.fromkeys(name for found in kept.values() for name in found)
    return [Watched(name, "outputs", f"the output of {name} (keep)") for name in names]


def _check_outputs(model: nn.Module, outputs: OutputLike | Iterable[OutputLike]) -> list[Output]:
    """What ``model`` is asked for beside its forward.

    Raises:
        TypeError: If something is neither a name nor callable.
        ValueError: If the model has no method of a name.
    """
    given = [outputs] if isinstance(outputs, str) or callable(outputs) else list(outputs)
    return [_output(model, item, f"outputs[{number}]") for number, item in enumerate(given)]


def _output(model: nn.Module, item: OutputLike, place: str) -> Output:
    if isinstance(item, str):
        method = getattr(model, item, None)
        if not callable(method) or isinstance(method, nn.Module):
            hint = f"; keep={item!r} keeps the output of a module" if isinstance(method, nn.Module) else ""
            raise ValueError(f"outputs={item!r} is no method of {type(model).__name__}{hint}")
        return method_output(item)
    if not callable(item):
        raise TypeError(f"outputs must be names of methods or functions of (model, *inputs), got {item!r}")
    name = getattr(item, "__name__", "<lambda>")
    return Output(item, f"the output of {place if name == '<lambda>' else name}")


def method_output(name: str) -> Output:
    """The method ``name`` of a model, called with the example inputs."""
    return Output(lambda model, *args, **kwargs: getattr(model, name)(*args, **kwargs), f"the output of {name}")


def _rehearse(model: nn.Module, examples: Sequence[Example], kept: Mapping[str, Sequence[str]]) -> None:
    """Run what is asked for once, as the model is.

    Raises:
        ValueError: If an output fails or holds no tensor, or no module that a pattern matches is run.
    """
    run: set[str] = set()
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: run.add(name))
        for names in kept.values()
        for name in names
    ]
    try:
        for example in examples:
            _run_once(model, example)
    finally:
        for handle in handles:
            handle.remove()
    for pattern, names in kept.items():
        if not run.intersection(names):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"keep={pattern!r} matches {names[0]}{more}, which the example inputs do not run")


def _run_once(model: nn.Module, example: Example) -> None:
    words = example.output.words.removeprefix("the output of ") or "the model"
    try:
        with quiet():
            output: Any = example.output.call(model, *example.args, **example.kwargs)
    except Exception as error:
        raise ValueError(f"{words} does not run on the example inputs: {first_line(error)}") from error
    tensors: list[Tensor] = tensors_of(output)
    if not tensors:
        raise ValueError(f"{words} returns no tensor on the example inputs, so that no fold can be held against it")
