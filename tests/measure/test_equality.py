"""How near is near enough."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slabformer._defaults import RUNTIME_RTOL
from slabformer.measure.equality import Runtime
from slabformer.surgery.verify import VerificationError, verify


def test_another_runtime_may_round_and_no_more() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8).eval(), torch.randn(4, 8)
    with torch.no_grad():
        verify(model, Runtime(lambda x: model(x) * (1 + 3e-4)), x, rtol=RUNTIME_RTOL)
        with pytest.raises(VerificationError):
            verify(model, Runtime(lambda x: model(x) * (1 + 3e-3)), x, rtol=RUNTIME_RTOL)
