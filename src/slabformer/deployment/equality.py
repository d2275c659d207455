"""Whether a deployed form computes what the model does, by the project's rule for each kind of form."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.surgery.verify import VerifyResult, verify

#: fused against unfused, float32, relative to the output's scale
FUSED_RTOL = 1e-5
#: a model may be so ill-conditioned that float32 itself is further off: this often its own distance to float64 passes
OWN_ERROR_ALLOWED = 4
#: compilers and other runtimes reorder sums and products; a wrong graph differs by far more
RUNTIME_RTOL = 1e-3


def verify_fused(model: nn.Module, fused: nn.Module, inputs: Any, rtol: float = FUSED_RTOL) -> VerifyResult:
    """Hold ``fused`` against ``model``: within ``rtol``, or 4 times the model's own distance to its float64 self.

    Raises:
        VerificationError: If they differ by more.
    """
    result = verify(model, fused, inputs, rtol=math.inf)
    if result.max_rel > rtol:
        own = verify(_InFloat64(model), model, inputs, rtol=math.inf).max_rel
        verify(model, fused, inputs, rtol=max(rtol, OWN_ERROR_ALLOWED * own))
    return result


class Runtime(nn.Module):
    """Something that is not a module, an onnxruntime session for example, where :func:`verify` wants one."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        """What ``run`` returns."""
        return self.run(*inputs)


class _InFloat64(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).double()

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*(x.double() if torch.is_floating_point(x) else x for x in inputs))
