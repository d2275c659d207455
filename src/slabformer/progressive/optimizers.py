"""Which parameters the optimizers of a model step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from slabformer.nn.prepbn import PRepBN


class OptimizerWatch:
    """Notes which parameters the optimizers of a model step, until closed or forgotten.

    Args:
        norms: Whose parameters must be held.
        model: Optimizers that hold none of its parameters are somebody else's; the norms alone by default.
    """

    def __init__(self, norms: dict[str, PRepBN], model: nn.Module | None = None) -> None:
        self.has_seen = False
        self._norms = norms
        self._model = None if model is None else weakref.ref(model)
        self._seen: set[nn.Parameter] = set()
        this = weakref.ref(self)

        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (watch := this()) is not None and watch.concerns(optimizer):
                watch.saw(optimizer)

        self._handle = register_optimizer_step_post_hook(note)
        weakref.finalize(self, self._handle.remove)

    def concerns(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` holds a parameter of the model."""
        model = None if self._model is None else self._model()
        modules = self._norms.values() if model is None else [model]
        own = {parameter for module in modules for parameter in module.parameters()}
        return not own.isdisjoint(_parameters_of(optimizer))

    def saw(self, optimizer: Optimizer) -> None:
        """Note the parameters of ``optimizer``."""
        self.has_seen = True
        self._seen.update(_parameters_of(optimizer))

    def missing(self) -> list[str]:
        """Names of the parameters of the norms that train and no optimizer holds."""
        return [
            f"{name}.{leaf}"
            for name, norm in self._norms.items()
            for leaf, parameter in norm.named_parameters()
            if parameter.requires_grad and parameter not in self._seen
        ]

    def close(self) -> None:
        """Note nothing from here on."""
        self._handle.remove()


def _parameters_of(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
