"""Run a model and see what it returns, and what it decides by on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._process import alone
from slabformer._torch import DispatchMode, tree_leaves
from slabformer.surgery.fuse.tree.copies import Example, quiet
from slabformer.surgery.outputs import Plain, leaves

#: round floats to floats, so that a small change is lost or becomes a large one
_STEPS = {"round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside"}
#: integers, booleans or numbers that do not depend on a float's value, or that only these operators read again
_WITHOUT_DECISION = ("new_", "_like", "max_pool", "scaled_dot_product", "sym_", "is_same_size")


@dataclass(frozen=True)
class Observation:
    """What a model computed on one example.

    Attributes:
        outputs: Tensors and texts by their place in what it returned.
        decisions: The floats that integers, booleans and numbers were made of, in order: the logits in front of an
            argmax, for example, whose labels stay the same though a wrong fold moves them.
    """

    outputs: Mapping[str, Tensor | Plain]
    decisions: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """The outputs that are tensors."""
        return {place: leaf for place, leaf in self.outputs.items() if isinstance(leaf, Tensor)}


def observe(model: nn.Module, example: Example) -> Observation:
    """What ``model`` computes on ``example``; the same random numbers at every call, the global state untouched."""
    devices = {tensor.device for tensor in example.tensors() if tensor.is_cuda}
    watch = _Decisions()
    with alone, quiet(), torch.random.fork_rng(devices), watch:
        torch.manual_seed(0)
        output = example.outputs_of(model)
    outputs = {place: leaf.clone() if isinstance(leaf, Tensor) else leaf for place, leaf in leaves(output).items()}
    return Observation(outputs, watch.found)


class _Decisions(DispatchMode):
    """Keeps the floats from which an operator makes what is no float."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if _decides(func, output):
            given = tree_leaves((args, kwargs))
            self.found += [leaf.clone() for leaf in given if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return output


def _decides(func: Any, output: Any) -> bool:
    name = func.__name__.partition(".")[0]
    if any(part in name for part in _WITHOUT_DECISION):
        return False
    made = tree_leaves(output)
    is_value = any(
        not leaf.is_floating_point() and not leaf.is_complex()
        if isinstance(leaf, Tensor)
        else isinstance(leaf, (bool, int, float))
        for leaf in made
    )
    return is_value or name in _STEPS
