"""How near a deployed form must be to the model that it was made of, by the kind of form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Runtime(nn.Module):
    """Something that is not a module, an onnxruntime session for example, where :func:`slabformer.verify` wants one."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """What ``run`` returns."""
        return self.run(*inputs, **named)
