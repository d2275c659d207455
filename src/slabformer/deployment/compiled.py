"""A model through ``torch.compile``, as it is deployed."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._torch import inductor_settings


class Compiled(nn.Module):
    """``model`` through ``torch.compile``, weights frozen into the program on a CPU; for inference at one shape.

    Args:
        model: In eval mode; run it under ``torch.no_grad``.
        device: Where it runs: a GPU replays CUDA graphs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.train(False)
        self._settings: dict[str, Any] = {"triton.cudagraphs": True} if device.type == "cuda" else {"freezing": True}
        self._compiled_for: set[tuple[tuple[object, torch.Size], ...]] = set()
        self.run = torch.compile(_own_code(model), dynamic=False, options=self._settings)

    def forward(self, *inputs: Tensor, **named: Tensor) -> object:
        """The model's outputs."""
        shapes = tuple((key, each.shape) for key, each in (*enumerate(inputs), *named.items()))
        if shapes in self._compiled_for:
            return self.run(*inputs, **named)
        # options reach the compiler's back end alone; whether weights are constants is decided in front of it
        with inductor_settings(self._settings):
            outputs = self.run(*inputs, **named)
        self._compiled_for.add(shapes)
        return outputs


def _own_code(model: nn.Module) -> Callable[..., object]:
    """A function with a code object of its own, to which the compiler's cache is tied.

    Many compiled models would else share the cache of ``nn.Module.__call__``: it holds 8, and runs the rest uncompiled.
    """

    def run(*inputs: Tensor, **named: Tensor) -> object:
        return model(*inputs, **named)

    return types.FunctionType(run.__code__.replace(), run.__globals__, "run", run.__defaults__, run.__closure__)
