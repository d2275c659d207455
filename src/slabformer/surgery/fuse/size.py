"""A model that was fused for fixed input sizes refuses others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from slabformer.surgery.fuse.twin import Example

Sizes = tuple[tuple[tuple[int, ...], ...], ...]


class FixedSize:
    """Forward pre-hook: inputs must have the shapes of one of the examples, batch axis aside.

    Args:
        sizes: Shapes without batch axis of the tensors of each example.
    """

    def __init__(self, sizes: Sequence[Sequence[Sequence[int]]]) -> None:
        self.sizes: Sizes = tuple(tuple(tuple(shape) for shape in example) for example in sizes)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError for inputs of another size."""
        given = sizes_of(Example(args, kwargs))
        if given not in self.sizes:
            allowed = " or ".join(_words(example) for example in self.sizes)
            raise ValueError(
                f"this model was fused with fixed_size=True for inputs of size {allowed}, got {_words(given)}; "
                "fuse the unfused model again at this size, or without fixed_size"
            )


def sizes_of(example: Example) -> tuple[tuple[int, ...], ...]:
    """Shapes without the batch axis."""
    return tuple(tuple(tensor.shape[1:]) for tensor in example.tensors())


def fix_size_(model: nn.Module, sizes: Sequence[Sequence[Sequence[int]]]) -> None:
    """Let ``model`` refuse inputs of other sizes; replaces an earlier such refusal."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, FixedSize):
            del model._forward_pre_hooks[key]
    model.register_forward_pre_hook(FixedSize(sizes), with_kwargs=True)


def fixed_sizes(model: nn.Module) -> Sizes | None:
    """The sizes that ``model`` is fixed to, or None."""
    return next((hook.sizes for hook in model._forward_pre_hooks.values() if isinstance(hook, FixedSize)), None)


def _words(example: Sequence[Sequence[int]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in example)
