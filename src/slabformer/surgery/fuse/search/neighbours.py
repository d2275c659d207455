"""Layers, norms, pads, tables and parameters as targets of a fold: which may take a norm over, and for it alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from slabformer._torch import forward_hooks, forward_pre_hooks
from slabformer.surgery.fuse.consumers import CONSTANTS, Side, Site, readers_at, sites_of
from slabformer.surgery.fuse.graph.flow import SUMS, End, downstream, is_written
from slabformer.surgery.fuse.graph.parts import bias_parts, name_of, weight_part
from slabformer.surgery.fuse.graph.rules import along, channel_labels
from slabformer.surgery.fuse.graph.trace import LAYER, NORM, PAD, Trace, describe
from slabformer.surgery.fuse.search.wrappers import Wrappers
from slabformer.surgery.fuse.tree.copies import WATCHED
from slabformer.surgery.fuse.tree.norms import Norm, find_layers, find_pads
from slabformer.surgery.fuse.tree.plan import SCALES, Part, Role, Target
from slabformer.surgery.fuse.tree.sharing import Owners, display
from slabformer.surgery.one_input import OneInput
from slabformer.surgery.reasons import Reason, RefusalError


class Neighbours:
    """What a decision knows of a model, and how far it is.

    Attributes:
        owners: Of its parameters.
        wrappers: Which of them belong to plain layers.
        norms: Of the model.
        pads: Of the model.
        layers: Modules of the model that have a consumer of their own.
        gone: Norms that are folded: the identity to the others.
        untouchable: Norms that cannot even become an Affine.
        fixed_size: Whether the examples are the only sizes.
    """

    def __init__(self, model: nn.Module, norms: Sequence[Norm], traces: Sequence[Trace], fixed_size: bool) -> None:
        self.owners, self.norms, self.pads = Owners(model), norms, find_pads(model)
        self.layers = find_layers(model)
        self.wrappers = Wrappers(model, norms, self.layers, traces)
        self.gone: set[int] = set()
        self.untouchable: set[int] = set()
        self.fixed_size = fixed_size

    def readers(self, end: End, trace: Trace, role: Role, feeds: str = "its output feeds") -> list[Target]:
        """What reads channels at ``end``: one neighbour, or each direction of a recurrent layer.

        Raises:
            RefusalError: If it cannot take ``role`` over.
        """
        node = end.node
        if end.refusal is not None:
            raise RefusalError.of(end.refusal)
        if node.target is NORM:
            return [self.at_norm(node, end.labels, role, "next")]
        if node.target is PAD:
            return [self.at_pad(node, along(end.labels, -1, node.meta["val"].shape[-1], "pad"), role, "next")]
        if node.target is LAYER:
            if end.source is not node.args[0]:
                raise RefusalError(Reason.FURTHER_ARGUMENT, f"its output serves as a further input of {describe(node)}")
            axis, size = self.layer_axis(node, "next")
            return [self.at_layer(node, along(end.labels, axis, size, "registered layer"), role, "next")]
        sites = readers_at(node)
        if not sites:
            raise RefusalError(_code_of(node), f"{feeds} {describe(node)}")
        return [self._reader(site, end, trace, role) for site in sites]

    def _reader(self, site: Site, end: End, trace: Trace, role: Role) -> Target:
        words = site.consumer.words
        if end.source is not site.input:
            what = f"its output serves as a weight or state of {describe(end.node)}"
            raise RefusalError(Reason.FURTHER_ARGUMENT, what)
        index = along(end.labels, site.axis, site.num_in, words)
        if site.padded and role != "scale":
            code = Reason.UNEVEN if site.transposed else Reason.PADDED
            how = f"{words}, which spreads it unevenly" if site.transposed else f"padded {words}"
            raise RefusalError(code, f"it is followed by a {how} ({name_of(site, trace)})")
        return self.at_site(site, index, trace, role, "next")

    def at_norm(self, node: Node, labels: Tensor, role: Role, side: Side) -> Target:
        """The norm at ``node``, whose map changes."""
        other = self.norms[node.args[1]]  # type: ignore[index]
        if has_hooks(other.module) or other.index in self.untouchable:
            raise RefusalError(Reason.FEEDS_NORM, "its output feeds a norm that cannot take it over")
        axis = range(labels.ndim)[other.channel_dim] - labels.ndim
        return Target(other.name, role, side, along(labels, axis, other.num_channels, "norm"), norm=other.index)

    def at_pad(self, node: Node, index: Tensor, role: Role, side: Side) -> Target:
        """The pad at ``node``, which must pad with something else once the norm is gone."""
        pad = self.pads[node.args[-1]]  # type: ignore[index]
        if has_hooks(pad.module):
            raise RefusalError(Reason.HOOKS, f"{pad.name} has forward hooks, which see what it pads")
        return Target(pad.name, role, side, index, pad=pad.index)

    def at_layer(self, node: Node, index: Tensor, role: Role, side: Side) -> Target:
        """The registered module at ``node``."""
        layer = self.layers[node.args[-1]]  # type: ignore[index]
        if has_hooks(layer.module):
            raise RefusalError(Reason.HOOKS, f"{layer.name} has forward hooks, which see what it reads and returns")
        for tensor in layer.tensors():
            self._need_own(f"{layer.name}.{tensor}")
        layer.consumer.check(layer.module, side)
        return Target(layer.name, role, side, index, layer=layer.index)

    def layer_axis(self, node: Node, side: Side) -> tuple[int, int]:
        """Axis of the channels of the registered module at ``node``, counted from the end, and how many they are."""
        consumer = self.layers[node.args[-1]].consumer  # type: ignore[index]
        tensor, dim = (node.args[0], consumer.in_dim) if side == "next" else (node, consumer.out_dim)
        shape = tensor.meta["val"].shape  # type: ignore[union-attr]
        axis = range(len(shape))[dim] - len(shape)
        return axis, shape[axis]

    def at_site(self, site: Site, index: Tensor, trace: Trace, role: Role, side: Side) -> Target:
        """``site`` as a target, with a bias to hold the shift where it needs one."""
        weight, name = weight_part(site, trace), name_of(site, trace)
        self._need_own(weight.name)
        dtype = site.weight.meta["val"].dtype
        if not dtype.is_floating_point:
            raise RefusalError(Reason.NOT_FLOAT, f"{name} holds {dtype}, which cannot take it over")
        bias: tuple[Part, ...] = ()
        if site.bias is not None:
            bias = bias_parts(site, trace, name)
            for part in bias:
                self._need_own(part.name)
        elif site.consumer.needs_bias:
            bias = self._new_bias(weight, role)
        module = self.owners.module(weight.name)
        if side == "next" and forward_pre_hooks(module):
            raise RefusalError(Reason.HOOKS, f"{name} has forward pre-hooks, which see its input")
        if side == "previous" and forward_hooks(module):
            raise RefusalError(Reason.HOOKS, f"{name} has forward hooks, which see its output")
        return Target(name, role, side, index, site.consumer, weight, bias, site.bias is None and bool(bias))

    def _need_own(self, name: str) -> None:
        """Refuse a parameter or buffer that something else than the layer it belongs to has a use for."""
        self.owners.need_single(name)
        self.wrappers.need_plain(name)

    def _new_bias(self, weight: Part, role: Role) -> tuple[Part, ...]:
        try:
            self.wrappers.need_no_merging(weight.name)
            return (replace(weight, name=self.owners.new_bias(weight.name), axis=0, groups=1),)
        except RefusalError:
            if role not in SCALES:
                raise
            return ()

    def need_free(self, leaf: Node, trace: Trace) -> None:
        """Refuse a parameter or buffer whose values are not for a fold to change.

        Raises:
            RefusalError: With the reason.
        """
        name, dtype = trace.names[leaf], leaf.meta["val"].dtype
        self._need_own(name)
        if not dtype.is_floating_point:
            raise RefusalError(Reason.NOT_FLOAT, f"{name} holds {dtype}, which cannot take it over")
        if not self.owners.is_saved(name):
            raise RefusalError(Reason.NOT_SAVED, f"{name} is a buffer that is not saved")
        if is_written(leaf):
            raise RefusalError(Reason.IN_PLACE, f"the forward may change {name} in place")

    def at_tensor(self, leaf: Node, axis: int, index: Tensor, trace: Trace, role: Role) -> Target:
        """The parameter or buffer ``leaf``, whose channels lie along ``axis``."""
        channels, name = torch.arange(leaf.meta["val"].shape[axis]), trace.names[leaf]
        return Target(display(name), role, "previous", index, CONSTANTS, Part(name, axis, channels, channels))


def _code_of(node: Node) -> Reason:
    """Of the refusal to let ``node`` read a norm."""
    if node.op == "output":
        return Reason.MODEL_OUTPUT
    if node.target is WATCHED:
        return Reason.KEPT_OUTPUT
    return Reason.FEEDS_SUM if node.target in SUMS else Reason.FEEDS_OPERATION


def has_hooks(module: nn.Module) -> bool:
    """Whether something looks at what ``module`` reads or returns."""
    return bool(forward_hooks(module)) or any(not isinstance(h, OneInput) for h in forward_pre_hooks(module).values())


@dataclass
class _Entry:
    """A target and the operations, per trace, at which it was found."""

    target: Target
    nodes: dict[Trace, set[Node]]


class Found:
    """Targets by name, role and side, for one norm."""

    def __init__(self, known: Neighbours, traces: Sequence[Trace]) -> None:
        self.known, self.traces = known, traces
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, target: Target, trace: Trace, node: Node) -> None:
        """Note that ``target`` was found at ``node``."""
        entry = self._entries.setdefault(f"{target.name} {target.role} {target.side}", _Entry(target, {}))
        if not entry.target.agrees(target):
            words = f"{self._in_full(target)} is called on differently laid out channels"
            raise RefusalError(Reason.SHARED_LAYER, words)
        entry.nodes.setdefault(trace, set()).add(node)

    def exclusive(self) -> tuple[Target, ...]:
        """The targets.

        Raises:
            RefusalError: If one of them also works on something else.
        """
        for entry in self._entries.values():
            for trace in self.traces:
                self._need_exclusive(entry.target, trace, entry.nodes.get(trace, set()))
        return tuple(entry.target for entry in self._entries.values())

    def _need_exclusive(self, target: Target, trace: Trace, nodes: set[Node]) -> None:
        for user in self._users(target, trace, nodes):
            if user not in nodes:
                is_call = user.target in (NORM, PAD, LAYER) or sites_of(user)
                code = Reason.SHARED_LAYER if is_call else Reason.READ_RAW
                use = "used on another input" if is_call else "read raw"
                raise RefusalError(code, f"{self._in_full(target)} is also {use} by {describe(user)}")

    def _users(self, target: Target, trace: Trace, nodes: set[Node]) -> list[Node]:
        """All that ``target`` works on or that reads its weights."""
        if target.norm is not None:
            return trace.calls.get(target.norm, [])
        if target.pad is not None:
            return trace.pad_calls.get(target.pad, [])
        if target.layer is not None:
            layer = self.known.layers[target.layer]
            names = [f"{layer.name}.{name}" for name in layer.tensors()]
            return [*trace.layer_calls.get(target.layer, []), *(user for name in names for user in trace.users(name))]
        parts = [target.weight, *(() if target.new_bias else target.bias)]
        return [user for part in parts if part is not None for user in _readers_of(part, trace, nodes)]

    def _in_full(self, target: Target) -> str:
        """A target that another call bars: its name, and what else it is called."""
        return target.name + ("" if target.weight is None else self.known.owners.other_names(target.weight.name))


def _readers_of(part: Part, trace: Trace, known: Collection[Node]) -> list[Node]:
    """What computes with these elements of a parameter, unless all that reads it is ``known``."""
    seeds = {}
    for source in trace.sources(part.name):
        if source in known:
            continue
        labels = channel_labels(source, part.axis)
        seeds[source] = labels.where(torch.isin(labels, part.rows), -1)
    return [end.node for end in downstream(trace, seeds, (), fixed_size=True)]
