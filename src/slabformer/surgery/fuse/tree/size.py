"""Input sizes: a model that was fused for fixed ones refuses others, one that was not is tried at another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from slabformer._torch import forward_pre_hooks
from slabformer.surgery.fuse.tree.copies import Example

#: pixels by which images differ from the examples when a fused model is tried at another size
STEP = 32
Sizes = tuple[tuple[tuple[int, ...], ...], ...]


class FixedSize:
    """Forward pre-hook: inputs must have the shapes of one of the examples, batch axis aside.

    Args:
        sizes: Shapes without batch axis of the tensors of each example.
    """

    def __init__(self, sizes: Sequence[Sequence[Sequence[int]]]) -> None:
        self.sizes: Sizes = tuple(tuple(tuple(shape) for shape in example) for example in sizes)

    @property
    def __name__(self) -> str:
        """Only TorchScript asks for it, which cannot compile this."""
        raise AttributeError(
            "a model fused with fixed_size=True checks sizes in Python; use torch.jit.trace or torch.export on it, "
            "or fuse without fixed_size"
        )

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
    for key, hook in list(forward_pre_hooks(model).items()):
        if isinstance(hook, FixedSize):
            del forward_pre_hooks(model)[key]
    model.register_forward_pre_hook(FixedSize(sizes), with_kwargs=True)


def fixed_sizes(model: nn.Module) -> Sizes | None:
    """The sizes that ``model`` is fixed to, or None."""
    return next((hook.sizes for hook in forward_pre_hooks(model).values() if isinstance(hook, FixedSize)), None)


def at_another_size(example: Example) -> Example | None:
    """``example`` with images of another size, or None where it holds none."""

    def resized(x: Tensor) -> Tensor:
        if x.ndim != 4 or not x.is_floating_point() or min(x.shape[-2:]) < STEP:
            return x
        # smaller where that leaves enough, because it is cheaper
        return F.interpolate(x, [side - STEP if side >= 3 * STEP else side + STEP for side in x.shape[-2:]])

    other = example.map(resized)
    return None if sizes_of(other) == sizes_of(example) else other


def _words(example: Sequence[Sequence[int]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in example)
