"""Stand-ins for a model: traced, run and changed in its place, so that a failure leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slabformer._process import no_warnings
from slabformer._torch import buffer_slots, forward_hooks, forward_pre_hooks, parameter_slots, tree_map_tensors
from slabformer.nn.prepbn import PRepBN
from slabformer.ops.precision import widened_on_use
from slabformer.surgery.outputs import first_line, tensors_of


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
def watching(model: nn.Module, watched: Sequence[Watched]) -> Iterator[list[Tensor]]:
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
        if not name or parameter_slots(module) or buffer_slots(module):
            continue
        if forward_pre_hooks(module):
            found.append(Watched(name, "inputs", f"the forward pre-hooks of {name}"))
        if forward_hooks(module):
            found.append(Watched(name, "outputs", f"the forward hooks of {name}"))
    return found


def _forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


@dataclass(frozen=True)
class Output:
    """Something that a model is asked for: its forward, a method, or any function of it.

    Attributes:
        call: Of the model and the example inputs.
        words: What stands for it in a reason; empty for the forward.
    """

    call: Callable[..., Any] = _forward
    words: str = ""


@dataclass(frozen=True)
class Example:
    """One set of inputs, what is asked of them, and what must stay on the way.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What the model is asked for.
        watched: Tensors inside the model that count as outputs.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Output = Output()
    watched: tuple[Watched, ...] = ()

    def tensors(self) -> list[Tensor]:
        """All tensors in it, in order."""
        return tensors_of((self.args, dict(self.kwargs)))

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """The same with every tensor changed."""
        args, kwargs = tree_map_tensors(change, (self.args, dict(self.kwargs)))
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def outputs_of(self, model: nn.Module) -> Any:
        """What ``model`` returns, and with it what is watched."""
        with watching(model, self.watched) as seen:
            output = self.output.call(model, *self.args, **self.kwargs)
        if not self.output.words:
            return (output, *seen) if self.watched else output
        return [torch.ops.slabformer.watched(tensor, self.output.words) for tensor in tensors_of(output)] + seen


def copy_model(model: nn.Module, share: Callable[[Tensor], Tensor] | None = None, needed_by: str = "fuse") -> nn.Module:
    """A copy of the module tree, hooks included; ``share`` says what stands for each of its tensors (None: a copy)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            # computed attributes of weight_norm and the like are no leaves, which deepcopy refuses
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                memo[id(value)] = (share or torch.clone)(value.detach())
        for parameter in parameter_slots(module).values():
            if parameter is not None and share is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(share(parameter.detach()), parameter.requires_grad)
        for buffer in buffer_slots(module).values():
            if buffer is not None and share is not None and id(buffer) not in memo:
                memo[id(buffer)] = share(buffer.detach()).clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        message = f"{type(model).__name__} cannot be copied, which {needed_by} needs: {first_line(error)}"
        raise ValueError(message) from error


def deployed_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy that shares the parameters and computes what is deployed, in ``dtype`` where given.

    In float64 large parameters are widened where they are used, so that such a copy takes little memory.
    """

    def share(tensor: Tensor) -> Tensor:
        if dtype is torch.float64:
            return widened_on_use(tensor)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    copied = copy_model(model, share)
    for module in copied.modules():
        if isinstance(module, PRepBN):
            module.blend_in_eval = False
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # a cache is no tensor that a graph could return
    return copied


@contextmanager
def quiet() -> Iterator[None]:
    """No gradients, and none of the warnings that tracing and copying raise about code that is not the caller's."""
    with torch.no_grad(), no_warnings():
        yield
