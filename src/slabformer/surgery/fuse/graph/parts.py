"""Weights and biases as a forward puts them together from parameters: whole, in rows, or side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from slabformer.surgery.fuse.consumers import Site
from slabformer.surgery.fuse.graph.flow import upstream
from slabformer.surgery.fuse.graph.rules import FOLLOW, Call, Labels, along, channel_labels, chosen, moved, same
from slabformer.surgery.fuse.graph.trace import Trace, located
from slabformer.surgery.fuse.tree.plan import Part
from slabformer.surgery.fuse.tree.sharing import display
from slabformer.surgery.reasons import Reason, RefusalError

#: rules of operations that only move elements, so that a parameter can be changed in their stead
_MOVES = {moved, chosen, same}


def weight_part(site: Site, trace: Trace) -> Part:
    """The parameter that is the weight or table of ``site``, or rows of it.

    Raises:
        RefusalError: If it is computed, or made of several.
    """
    kind = "table" if site.input is None else "weight"
    words = f"the {kind} of {located(site.node)} is computed in the forward (parametrized?)"
    refusal = RefusalError(Reason.COMPUTED_WEIGHT, words)
    if not isinstance(site.weight, Node):
        raise refusal
    if site.transposed and site.groups > 1:
        if site.weight not in trace.parameters:
            raise refusal
        channels = torch.arange(site.num_out)
        return Part(trace.parameters[site.weight], 1, channels, channels, site.groups)
    parts = _parts(site.weight, int(site.transposed), trace.parameters)
    if len(parts) != 1 or _is_parametrized(parts[0]) or len(parts[0].rows) != site.num_out:
        raise refusal
    if site.input is None:  # what is looked up has no channels
        return parts[0]
    columns = _parts(site.weight, int(not site.transposed), trace.parameters, own_axes=(1 - parts[0].axis,))
    size = site.weight.meta["val"].shape[int(not site.transposed)]
    if len(columns) != 1 or not torch.equal(columns[0].rows, torch.arange(size)):
        raise refusal
    return parts[0]


def _is_parametrized(part: Part) -> bool:
    return ".parametrizations." in f".{part.name}"


def name_of(site: Site, trace: Trace) -> str:
    """The module of ``site``; which rows of its weight, where it is not all of them."""
    weight = weight_part(site, trace)
    num_rows = trace.sources(weight.name)[0].meta["val"].shape[weight.axis] * weight.groups
    whole = len(weight.rows) == num_rows
    rows = "" if whole else f"[{int(weight.rows.min())}:{int(weight.rows.max()) + 1}]"
    return display(weight.name) + rows


def bias_parts(site: Site, trace: Trace, name: str) -> tuple[Part, ...]:
    """The parameters and buffers that are the bias of ``site``, which is called ``name``, beside each other.

    Raises:
        RefusalError: If it is computed.
    """
    parts = _parts(site.bias, 0, trace.names)
    if sum(len(part.rows) for part in parts) != site.num_out:
        raise RefusalError(Reason.COMPUTED_WEIGHT, f"the bias of {name} is computed in the forward")
    return tuple(parts)


def _parts(node: Node, axis: int, names: Mapping[Node, str], own_axes: tuple[int, ...] = (0, 1)) -> list[Part]:
    """The named tensors whose elements, moved only, become ``node`` along ``axis``; [] where there is more to it."""
    ancestors = _ancestors(node, names)
    parts = []
    for leaf in ancestors:
        part = _part(ancestors, leaf, node, axis, names[leaf], own_axes) if leaf in names else None
        if part is not None:
            parts.append(part)
    return parts


def _ancestors(node: Node, names: Mapping[Node, str]) -> list[Node]:
    """What ``node`` is made of, in order; [] if anything but moves has a part in it."""

    def sources_of(current: Node) -> list[Node] | None:
        is_move = current not in names and FOLLOW.get(current.target) in _MOVES
        return current.all_input_nodes if is_move else None

    starts, passed = upstream(node, sources_of)
    return sorted([*starts, *passed]) if all(start in names for start in starts) else []


def _part(
    ancestors: list[Node], leaf: Node, node: Node, axis: int, name: str, own_axes: tuple[int, ...]
) -> Part | None:
    for own_axis in (own for own in own_axes if own < leaf.meta["val"].ndim):
        labels: dict[Node, Labels] = {leaf: channel_labels(leaf, own_axis)}
        try:
            for current in ancestors:
                if current not in labels and any(source in labels for source in current.all_input_nodes):
                    labels[current] = FOLLOW[current.target](Call(current, labels, fixed_size=True))
            index = along(labels[node], axis, node.meta["val"].shape[axis], "parameter")  # type: ignore[arg-type]
        except RefusalError:
            continue
        channels = (index >= 0).nonzero().flatten()
        rows = index[channels]
        if len(rows) and len(rows.unique()) == len(rows):
            return Part(name, own_axis, rows, channels)
    return None
