"""Tensors on the way that must stay what they are, as if the model returned them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@torch.library.custom_op("slabformer::watched", mutates_args=())
def mark_watched(x: Tensor, words: str) -> Tensor:
    """A copy of what must stay, for which ``words`` stand in a reason."""
    return x.clone()


@mark_watched.register_fake
def _(x: Tensor, words: str) -> Tensor:
    return torch.empty_like(x)


WATCHED = torch.ops.slabformer.watched.default


@dataclass(frozen=True)
class Watched:
    """What a module reads or returns.

    Attributes:
        name: Of the module.
        side: Its inputs or its outputs.
        words: Who wants them to stay, for a reason.
    """

    name: str
    side: Literal["inputs", "outputs"]
    words: str


@contextmanager
def watching(
    model: nn.Module, watched: Sequence[Watched], tensors_of: Callable[[Any], list[Tensor]]
) -> Iterator[list[Tensor]]:
    """A list that copies of the ``watched`` tensors go into while ``model`` runs."""
    found: list[Tensor] = []

    def note(value: Any, words: str) -> None:
        found.extend(torch.ops.slabformer.watched(tensor, words) for tensor in tensors_of(value))

    def before(words: str) -> Callable[..., None]:
        return lambda module, args, kwargs: note((args, kwargs), words)

    def after(words: str) -> Callable[..., None]:
        return lambda module, args, output: note(output, words)

    with ExitStack() as stack:
        for item in watched:
            module = model.get_submodule(item.name)
            if item.side == "inputs":
                handle = module.register_forward_pre_hook(before(item.words), with_kwargs=True)
            else:
                handle = module.register_forward_hook(after(item.words))
            stack.callback(handle.remove)
        yield found


def hooked(model: nn.Module) -> list[Watched]:
    """What the forward hooks of modules see that hold no tensors of their own: blocks, activations, the identity."""
    found = []
    for name, module in model.named_modules():
        if not name or module._parameters or module._buffers:
            continue
        if module._forward_pre_hooks:
            found.append(Watched(name, "inputs", f"the forward pre-hooks of {name}"))
        if module._forward_hooks:
            found.append(Watched(name, "outputs", f"the forward hooks of {name}"))
    return found
