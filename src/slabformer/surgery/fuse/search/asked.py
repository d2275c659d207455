"""What a caller asks to stay: the outputs of modules by name, and other outputs than the forward's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from slabformer.surgery.fuse.tree.copies import Example, Output, quiet
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.fuse.tree.watch import Watched
from slabformer.surgery.outputs import first_line, tensors_of

#: a method's name, or a function of the model and the example inputs
OutputLike = str | Callable[..., Any]


def check_keep(model: nn.Module, norms: Sequence[Norm], keep: str | Iterable[str]) -> dict[str, list[str]]:
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


def watched_outputs(kept: Mapping[str, Iterable[str]]) -> list[Watched]:
    """The outputs of the modules that were found for each pattern."""
    names = dict.fromkeys(name for found in kept.values() for name in found)
    return [Watched(name, "outputs", f"the output of {name} (keep)") for name in names]


def check_outputs(model: nn.Module, outputs: OutputLike | Iterable[OutputLike]) -> list[Output]:
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


def rehearse(model: nn.Module, examples: Sequence[Example], kept: Mapping[str, Sequence[str]]) -> None:
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
