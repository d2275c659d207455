"""Which modules own which parameters, and where a bias would go."""

from __future__ import annotations

from torch import Tensor, nn

from slabformer.surgery.fuse.refusal import RefusalError


class Owners:
    """Parameters and buffers of a model by name, ties resolved.

    Attributes:
        tied: First names of those that were refused because two modules hold them.
        shared: First names of those that other calls of their module bar, where that has several names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tied: set[str] = set()
        self.shared: set[str] = set()
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._first: dict[Tensor, str] = {}
        first = self._first
        holders: dict[str, dict[tuple[nn.Module, str], str]] = {}
        parameters, buffers = (named(remove_duplicate=False) for named in (model.named_parameters, model.named_buffers))
        for name, tensor in (*parameters, *buffers):
            first.setdefault(tensor, name)
            module, leaf = self.module(name), name.rpartition(".")[2]
            holders.setdefault(first[tensor], {}).setdefault((module, leaf), name)
        self._holders = {name: list(found.values()) for name, found in holders.items()}

    def names_in(self, module: nn.Module) -> list[str]:
        """First names of all parameters inside ``module``."""
        return [self._first[parameter] for parameter in module.parameters()]

    def module(self, parameter: str) -> nn.Module:
        """The module that holds ``parameter``."""
        return self._modules[parameter.rpartition(".")[0]]

    def is_saved(self, name: str) -> bool:
        """Whether ``name`` is in the state dict: a parameter, or a buffer that is persistent."""
        return name.rpartition(".")[2] not in self.module(name)._non_persistent_buffers_set

    def need_single(self, parameter: str) -> None:
        """Refuse a parameter that two modules hold.

        Raises:
            RefusalError: Naming the other one.
        """
        holders = self._holders[parameter]
        if len(holders) > 1:
            self.tied.add(parameter)
            raise RefusalError(f"{holders[0]} is tied with {holders[1]}")

    def other_names(self, parameter: str) -> str:
        """A clause that names the other places of the module that holds ``parameter``; empty where it has none."""
        module = self.module(parameter)
        others = [name for name, other in self._modules.items() if other is module][1:]
        if not others:
            return ""
        self.shared |= {self._first[own] for own in module._parameters.values() if own is not None}
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f", one layer with {others[0]}{more},"

    def new_bias(self, weight: str) -> str:
        """Name of the bias to create beside ``weight``.

        Raises:
            RefusalError: If the module has no place for one.
        """
        prefix, dot, leaf = weight.rpartition(".")
        bias = leaf.removesuffix("weight") + "bias"
        slots = self.module(weight)._parameters
        if not leaf.endswith("weight") or bias not in slots or slots[bias] is not None:
            raise RefusalError(f"{display(weight)} has no bias to take the shift")
        return f"{prefix}{dot}{bias}"


def display(weight: str) -> str:
    """The module that ``weight`` belongs to; a weight of another name in full."""
    prefix, _, leaf = weight.rpartition(".")
    return prefix if leaf == "weight" and prefix else weight
