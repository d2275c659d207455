"""Layers that hold more than their forward shows: adapters, quantisers and other wrappers around a Linear or Conv.

A fold changes the weights that a graph reads. Merging an adapter, unmerging it or switching it off reads others, too,
so a fold would be forgotten there. Wrappers are recognised by what they compute, not by their names: a module that is
one affine map of its input is a layer, and it is more than the layer inside where it holds parameters that the forward
never reads (adapters that are merged or switched off), or adds the outputs of a layer and of two layers in a row
(a low-rank update beside the weight that it belongs to).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from slabformer._torch import Conv, recurrent_weights
from slabformer.surgery.fuse.consumers import CONSTANT, writer_at
from slabformer.surgery.fuse.graph.flow import SUMS
from slabformer.surgery.fuse.graph.rules import CHECKS, FOLLOW
from slabformer.surgery.fuse.graph.trace import LAYER, NORM, Trace, paths
from slabformer.surgery.fuse.tree.norms import Layer, Norm
from slabformer.surgery.reasons import Reason, RefusalError

aten = torch.ops.aten
#: affine in one argument while the others are constants
_PRODUCTS = {
    *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.einsum.default),
    *(aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor),
}
#: affine in all arguments together
_AFFINE = SUMS | {aten.sub.Tensor}
_LAYERS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, Conv)


class Wrappers:
    """Which parameters of a model belong to plain layers, whose weights mean what the graph shows."""

    def __init__(
        self, model: nn.Module, norms: Sequence[Norm], layers: Sequence[Layer], traces: Sequence[Trace]
    ) -> None:
        self._named = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in self._named.items():
            self._names.setdefault(module, []).append(name)
        self._first: dict[Tensor, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._first[tensor] = name
        self._read = {name for trace in traces for node, name in trace.names.items() if _is_read(node)}
        called = [norm.module for norm in norms if any(norm.index in trace.calls for trace in traces)]
        called += [layer.module for layer in layers if any(layer.index in trace.layer_calls for trace in traces)]
        self._read |= {self._first[t] for module in called for t in (*module.parameters(), *module.buffers())}
        self._calls = [_Calls(trace, self._named) for trace in traces]
        self._reasons: dict[nn.Module, str] = {}

    def need_plain(self, tensor: str) -> None:
        """Refuse the parameter or buffer ``tensor`` where a wrapper has other uses for it than the forward.

        Raises:
            RefusalError: Naming the wrapper.
        """
        prefix, _, _ = tensor.rpartition(".")
        if ".parametrizations." in f".{tensor}":
            raise RefusalError(Reason.COMPUTED_WEIGHT, f"{tensor} is parametrized; remove the parametrization first")
        owner = self._named[prefix]
        if owner not in self._reasons:
            self._reasons[owner] = next(self._objections(owner, prefix), "")
        if self._reasons[owner]:
            raise RefusalError(Reason.WRAPPER, self._reasons[owner])

    def need_plain_norm(self, norm: Norm) -> None:
        """Refuse a norm inside a module that chooses between it and others, which the forward does not call.

        Raises:
            RefusalError: Naming the module.
        """
        for name in norm.names:
            for place, module in self._around(name.rpartition(".")[0], _Calls.is_norm):
                unread = self._unread(module)
                if unread:
                    kind = type(module).__name__
                    words = f"{place} is a {kind} {unread}; merge adapters, or give an example of each use"
                    raise RefusalError(Reason.WRAPPER, words)

    def need_no_merging(self, weight: str) -> None:
        """Refuse a new bias beside ``weight`` where a wrapper that holds other weights, too, may know of none.

        Raises:
            RefusalError: Naming the wrapper.
        """
        owner = self._named[weight.rpartition(".")[0]]
        own = set(owner.parameters())
        for name in self._names[owner]:
            for place, module in self._around(name):
                if not _is_torchs(module) and not own.issuperset(module.parameters()):
                    kind = type(module).__name__
                    words = f"{place} is a {kind} with weights beside {name}, which gets no bias there"
                    raise RefusalError(Reason.WRAPPER, words)

    def _objections(self, owner: nn.Module, name: str) -> Iterator[str]:
        extra = _extra_tensors(owner)
        if extra:
            kind = type(owner).__name__
            yield f"{name} is a {kind} that also holds {extra[0]}; merge or remove what was added to it first"
        for own_name in self._names[owner]:
            for place, module in self._around(own_name):
                reason = self._objection(module)
                if reason:
                    yield f"{place} is a {type(module).__name__} {reason}; merge adapters first"

    def _around(
        self, name: str, fits: Callable[[_Calls, nn.Module], bool] | None = None
    ) -> Iterator[tuple[str, nn.Module]]:
        """The layers that ``name`` is part of, inner ones first; or the modules whose calls ``fits``."""
        fits = fits or _Calls.is_layer
        while name:
            module = self._named[name]
            called = [calls for calls in self._calls if module in calls.nodes]
            if called and not all(fits(calls, module) for calls in called):
                return
            if called:
                yield name, module
            name = name.rpartition(".")[0]

    def _objection(self, module: nn.Module) -> str:
        if _is_torchs(module):
            return ""
        unread = self._unread(module)
        if unread:
            return unread
        if any(calls.has_low_rank_update(module) for calls in self._calls):
            return "that adds a low-rank update to a layer"
        return ""

    def _unread(self, module: nn.Module) -> str:
        for tensor in (*module.parameters(), *module.buffers()):
            name = self._first[tensor]
            if tensor.is_floating_point() and tensor.numel() > 1 and name not in self._read:
                return f"whose {name} the forward does not read"
        return ""


class _Calls:
    """The operations of one trace, by the modules that run them."""

    def __init__(self, trace: Trace, modules: dict[str, nn.Module]) -> None:
        self.nodes: dict[nn.Module, list[Node]] = {}
        for node in trace.graph.nodes:
            if node.op not in ("placeholder", "output"):
                for path in paths(node):
                    if path in modules:
                        self.nodes.setdefault(modules[path], []).append(node)

    def is_layer(self, module: nn.Module) -> bool:
        """Whether all that ``module`` computes is affine in its input."""
        return all(self._is_affine(node) for node in self.nodes[module])

    def is_norm(self, module: nn.Module) -> bool:
        """Whether ``module`` computes a norm and nothing else."""
        return all(node.target is NORM or node.target in FOLLOW or node.target in CHECKS for node in self.nodes[module])

    def has_low_rank_update(self, module: nn.Module) -> bool:
        """Whether ``module`` adds what comes out of one layer and out of two in a row."""
        depth: dict[Node, int] = {}
        for node in self.nodes.get(module, []):
            sources = [source for source in node.all_input_nodes if _varies(source)]
            found = [depth.get(source, 0) for source in sources]
            if node.target in _AFFINE and len(found) == 2 and min(found) >= 1 and max(found) >= 2:
                return True
            depth[node] = max(found, default=0) + self._is_weighted(node)
        return False

    def _is_affine(self, node: Node) -> bool:
        if not _varies(node) or node.target in CHECKS or node.target in FOLLOW or node.target in _AFFINE:
            return True
        one = sum(map(_varies, node.all_input_nodes)) == 1
        return one and (node.target in _PRODUCTS or node.target is LAYER or writer_at(node) is not None)

    def _is_weighted(self, node: Node) -> bool:
        is_product = node.target in _PRODUCTS and any(
            not _varies(source) and source.meta["val"].ndim > 1 for source in node.all_input_nodes
        )
        return is_product or node.target is LAYER or writer_at(node) is not None


def _varies(node: Node) -> bool:
    """Whether it depends on the inputs of the model."""
    return not node.meta[CONSTANT]


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _is_read(node: Node) -> bool:
    return any(user.target not in CHECKS for user in node.users)


def _extra_tensors(layer: nn.Module) -> list[str]:
    """What a subclass of one of torch's layers holds beside the weights of its base."""
    if not isinstance(layer, _LAYERS) or _is_torchs(layer):
        return []
    own = {"weight", "bias", *recurrent_weights(layer)}
    attributes = [name for name, value in vars(layer).items() if isinstance(value, Tensor)]
    named: tuple[Callable[[], Any], ...] = (layer.named_parameters, layer.named_buffers)
    held = [name for found in named for name, _ in found()]
    return [name for name in (*held, *attributes) if name not in own]
