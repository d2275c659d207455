"""Layers, norms, pads, tables and parameters as targets of a fold: which of them may take a norm over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from slabformer.surgery.fuse.graph.memory import is_written
from slabformer.surgery.fuse.graph.parts import bias_parts, name_of, table_part, weight_part
from slabformer.surgery.fuse.graph.sites import Site, along
from slabformer.surgery.fuse.graph.trace import Trace
from slabformer.surgery.fuse.refusal import RefusalError
from slabformer.surgery.fuse.search.wrappers import Wrappers
from slabformer.surgery.fuse.tree.norms import Norm
from slabformer.surgery.fuse.tree.owners import Owners, display
from slabformer.surgery.fuse.tree.pads import find_pads
from slabformer.surgery.fuse.tree.plan import Part, Role, Side, Target
from slabformer.surgery.one_input import OneInput


class Neighbours:
    """What a decision knows of a model, and how far it is.

    Attributes:
        owners: Of its parameters.
        wrappers: Which of them belong to plain layers.
        norms: Of the model.
        pads: Of the model.
        gone: Norms that are folded: the identity to the others.
        untouchable: Norms that cannot even become an Affine.
        fixed_size: Whether the examples are the only sizes.
    """

    def __init__(self, model: nn.Module, norms: Sequence[Norm], traces: Sequence[Trace], fixed_size: bool) -> None:
        self.owners, self.norms, self.pads = Owners(model), norms, find_pads(model)
        self.wrappers = Wrappers(model, norms, traces)
        self.gone: set[int] = set()
        self.untouchable: set[int] = set()
        self.fixed_size = fixed_size

    def at_norm(self, node: Node, labels: Tensor, role: Role, side: Side) -> Target:
        """The norm at ``node``, whose map changes."""
        other = self.norms[node.args[1]]  # type: ignore[index]
        if has_hooks(other.module) or other.index in self.untouchable:
            raise RefusalError("its output feeds a norm that cannot take it over")
        axis = range(labels.ndim)[other.channel_dim] - labels.ndim
        return Target(other.name, role, side, along(labels, axis, other.num_channels, "norm"), norm=other.index)

    def at_pad(self, node: Node, index: Tensor, role: Role, side: Side) -> Target:
        """The pad at ``node``, which must pad with something else once the norm is gone."""
        pad = self.pads[node.args[-1]]  # type: ignore[index]
        if has_hooks(pad.module):
            raise RefusalError(f"{pad.name} has forward hooks, which see what it pads")
        return Target(pad.name, role, side, index, pad=pad.index)

    def at_site(self, site: Site, index: Tensor, trace: Trace, role: Role, side: Side) -> Target:
        """``site`` as a target, with a bias to hold the shift."""
        weight, name = weight_part(site, trace), name_of(site, trace)
        self._need_own(weight.name)
        if site.bias is None:
            bias = self._new_bias(weight, role)
        else:
            bias = bias_parts(site, trace, name)
            for part in bias:
                self._need_own(part.name)
        module = self.owners.module(weight.name)
        if side == "next" and module._forward_pre_hooks:
            raise RefusalError(f"{name} has forward pre-hooks, which see its input")
        if side == "previous" and module._forward_hooks:
            raise RefusalError(f"{name} has forward hooks, which see its output")
        return Target(name, role, side, index, weight, bias, site.bias is None and bool(bias), groups=site.groups)

    def _need_own(self, name: str) -> None:
        """Refuse a parameter or buffer that something else than the layer it belongs to has a use for."""
        self.owners.need_single(name)
        self.wrappers.need_plain(name)

    def _new_bias(self, weight: Part, role: Role) -> tuple[Part, ...]:
        try:
            self.wrappers.need_no_merging(weight.name)
            return (replace(weight, name=self.owners.new_bias(weight.name), axis=0, groups=1),)
        except RefusalError:
            if role != "scale":
                raise
            return ()

    def at_table(self, node: Node, index: Tensor, trace: Trace, role: Role) -> Target:
        """The table of the embedding at ``node``; the shift goes into its rows."""
        part = table_part(node, trace)
        self._need_own(part.name)
        name, dtype = display(part.name), node.meta["val"].dtype
        if not dtype.is_floating_point:
            raise RefusalError(f"{name} holds {dtype}, which cannot take it over")
        if self.owners.module(part.name)._forward_hooks:
            raise RefusalError(f"{name} has forward hooks, which see its output")
        return Target(name, role, "previous", index, values=part)

    def need_free(self, leaf: Node, trace: Trace) -> None:
        """Refuse a parameter or buffer whose values are not for a fold to change.

        Raises:
            RefusalError: With the reason.
        """
        name = trace.names[leaf]
        self._need_own(name)
        if not leaf.meta["val"].is_floating_point():
            raise RefusalError(f"{name} holds {leaf.meta['val'].dtype}, which cannot take it over")
        if not self.owners.is_saved(name):
            raise RefusalError(f"{name} is a buffer that is not saved")
        if is_written(leaf):
            raise RefusalError(f"the forward may change {name} in place")

    def at_tensor(self, leaf: Node, axis: int, index: Tensor, trace: Trace, role: Role) -> Target:
        """The parameter or buffer ``leaf``, whose channels lie along ``axis``."""
        channels, name = torch.arange(leaf.meta["val"].shape[axis]), trace.names[leaf]
        return Target(display(name), role, "previous", index, values=Part(name, axis, channels, channels))


def has_hooks(module: nn.Module) -> bool:
    """Whether something looks at what ``module`` reads or returns."""
    return bool(module._forward_hooks) or any(not isinstance(h, OneInput) for h in module._forward_pre_hooks.values())
