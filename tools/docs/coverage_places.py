"""Which norms stand in front of nothing but Linears and unpadded convolutions: those that fusing is to fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Node

from slabformer.surgery.fuse.consumers import readers_at
from slabformer.surgery.fuse.graph.rules import CHECKS, FOLLOW, unread
from slabformer.surgery.fuse.graph.trace import NORM, Trace, trace_model
from slabformer.surgery.fuse.tree.copies import Example, deployed_copy
from slabformer.surgery.fuse.tree.norms import find_norms


def pre_norms(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[str]:
    """Names of the norms whose every reader is a Linear, an unpadded convolution or a recurrent layer.

    Whether fuse can follow the channels there is not asked: anything that only moves, averages or pads what it reads is
    passed, other norms too. So a norm in front of a Linear over tokens is one of them, although none can fold.
    """
    norms = find_norms(model)
    traced = trace_model(deployed_copy(model), norms, Example(args, kwargs))
    found = {norm.name: traced.calls.get(norm.index, []) for norm in norms}
    return {name for name, calls in found.items() if calls and all(_is_pre_norm(traced, call) for call in calls)}


def _is_pre_norm(traced: Trace, call: Node) -> bool:
    pending, seen = [call], {call}
    reaches_a_site = False
    while pending:
        node = pending.pop()
        for user in node.users:
            sites = readers_at(user)
            if sites:
                reaches_a_site = True
                if any(site.padded or site.input is not node for site in sites):
                    return False
            elif user.target is NORM or FOLLOW.get(user.target, unread) is not unread:
                fresh = {user} - seen
                pending += fresh
                seen |= fresh
            elif user.target not in CHECKS and user.target not in FOLLOW:
                return False
    return reaches_a_site
