"""Parameters that two modules hold, such as an embedding and a head: given to each of them where a fold needs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn


def holders(model: nn.Module) -> dict[str, list[str]]:
    """First name of every parameter that several modules hold, and its name in each of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Parameter, dict[tuple[nn.Module, str], str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        prefix, _, leaf = name.rpartition(".")
        found.setdefault(parameter, {}).setdefault((modules[prefix], leaf), name)
    rows = [list(names.values()) for names in found.values()]
    return {names[0]: names for names in rows if len(names) > 1}


def untie_(model: nn.Module, tied: Collection[str]) -> dict[str, list[str]]:
    """Give every holder of the parameters called ``tied`` a copy of its own; returns their names, to tie them again."""
    rows = {first: names for first, names in holders(model).items() if first in tied}
    for names in rows.values():
        for name in names[1:]:
            _put(model, name, nn.Parameter(model.get_parameter(name).detach().clone()))
    return rows


def tie_(model: nn.Module, rows: Mapping[str, list[str]]) -> None:
    """Undo :func:`untie_`."""
    for first, names in rows.items():
        for name in names[1:]:
            _put(model, name, model.get_parameter(first))


def untie_as_in_file_(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Give holders copies of their own where a file holds a tensor for each; ``tied``: those that it leaves out."""
    untie_(model, [first for first, names in holders(model).items() if len({tied.get(n, n) for n in names}) > 1])


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    prefix, _, leaf = name.rpartition(".")
    parameter.requires_grad_(model.get_parameter(name).requires_grad)
    model.get_submodule(prefix)._parameters[leaf] = parameter
