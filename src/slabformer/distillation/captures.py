"""Outputs of modules in the middle of a model, read by name; and which modules of a model are its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from slabformer.nn import PRepBN, RepBN
from slabformer.nn.affine import Affine
from slabformer.surgery.convert import find_layer_norms
from slabformer.surgery.outputs import tensors_of


class Capture:
    """Keeps what modules return while a block runs; nothing stays on the model.

    Args:
        model: Holds the modules; wrappers around it (DistributedDataParallel, ``torch.compile``) may be what is called.
        names: Of the modules.

    Attributes:
        outputs: By name, the first tensor of what a module returned, for each of its calls.

    Raises:
        ValueError: If the model has no module of such a name.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._named = {}
        for name in names:
            if name not in modules:
                raise ValueError(f"{type(model).__name__} has no module {name!r} to compare; see named_modules()")
            self._named[name] = modules[name]
        self.outputs: dict[str, list[Tensor]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep outputs inside the block.

        Raises:
            ValueError: On leaving it, if a module was not called or returned no tensor.
        """
        self.outputs.clear()
        handles = [module.register_forward_hook(self._keeper(name)) for name, module in self._named.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        missing = sorted(self._named.keys() - self.outputs.keys())
        if missing:
            raise ValueError(
                f"{missing[0]} returned no tensor in this forward, so that it cannot be compared; "
                "leave it out of the blocks"
            )

    def take(self) -> dict[str, list[Tensor]]:
        """The outputs, which this then no longer holds."""
        outputs = dict(self.outputs)
        self.outputs.clear()
        return outputs

    def is_trained(self, name: str) -> bool:
        """Whether the module has a parameter that training moves."""
        return any(parameter.requires_grad for parameter in self._named[name].parameters())

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else tensors_of(output)
            if tensors:
                self.outputs.setdefault(name, []).append(tensors[0])

        return keep


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated parts of a model, in its order: the innermost items of lists that hold norms among others.

    ``blocks.0`` of a ViT, ``layers.2.blocks.1`` of a Swin, ``encoder.layer.3`` of a BERT: recognised by where they
    stand and what they hold, converted or not, never by name.
    """
    norms = set(find_layer_norms(model)[0])
    norms |= {name for name, module in model.named_modules() if isinstance(module, (PRepBN, RepBN, Affine))}
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not _is_inside(name, norms):
            found += [f"{name}.{item}" if name else item for item, child in module.named_children()]
    items = [item for item in found if any(norm.startswith(f"{item}.") for norm in norms)]
    return [item for item in items if not any(other.startswith(f"{item}.") for other in items)]


def _is_inside(name: str, norms: set[str]) -> bool:
    return any(name == norm or name.startswith(f"{norm}.") for norm in norms)
