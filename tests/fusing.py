"""For tests of fuse: small models in float64 with norms that matter, and what every fusion must satisfy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.nn import PRepBN, RepBN
from slabformer.surgery.fuse import FuseReport, NormOutcome, Reason, fuse
from slabformer.surgery.outputs import tensors_of
from slabformer.testing import randomize_norms_
from tolerances import assert_close

FUSED = 1e-9  # DESIGN.md: fuse is judged in float64 at 1e-9 of the reference output's RMS


class Net(nn.Module):
    """Children by name, and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def ready(model: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """``model`` with random norms, gamma 0, in eval mode."""
    for module in model.modules():
        if isinstance(module, PRepBN):
            module.set_gamma(0)
    return randomize_norms_(model, seed).eval().to(dtype)


def net(forward: Callable[..., Any], **children: nn.Module) -> nn.Module:
    return ready(Net(forward, **children))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(dim: int = 6, channel_dim: int = -1) -> RepBN:
    return RepBN(dim, channel_dim=channel_dim)


def assert_same_outputs(
    reference: nn.Module, fused: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> None:
    with torch.no_grad():
        expected = tensors_of(reference(*args, **(kwargs or {})))
        actual = tensors_of(fused(*args, **(kwargs or {})))
    expected, actual = ([t for t in ts if t.is_floating_point()] for ts in (expected, actual))
    assert len(expected) == len(actual) > 0
    for one, other in zip(expected, actual, strict=True):
        assert one.numel() == 1 or one.std() > 0, "an output that does not vary shows nothing"
        assert_close(other, one, FUSED)


def fused(
    model: nn.Module, example: Any, kwargs: Mapping[str, Any] | None = None, **options: Any
) -> tuple[nn.Module, FuseReport]:
    """Fuse, and hold the result against the model on each example and on other values of the same shapes."""
    result, report = fuse(model, example, kwargs, **options)
    for case in example if isinstance(example, list) else [example]:
        args = (case,) if isinstance(case, Tensor) else case
        assert_same_outputs(model, result, args, kwargs)
        other = tuple(a + 0.5 * torch.sin(7 * a) if a.is_floating_point() else a for a in args)
        assert_same_outputs(model, result, other, kwargs)
    return result, report


#: what small models are traced on unless a test gives its own
X = tokens(2, 4, 6)


def outcomes(model: nn.Module, example: Any = X, **options: Any) -> list[tuple[str, str, tuple[str, ...], str]]:
    _, report = fused(model, example, **options)
    return [(o.name, o.action, o.into, o.reason) for o in report]


def kept(model: nn.Module, example: Any = X, name: str = "norm", **options: Any) -> NormOutcome:
    _, report = fused(model, example, **options)
    assert report[name].action == "kept"
    return report[name]


def reason(model: nn.Module, example: Any = X, name: str = "norm", **options: Any) -> str:
    """Why a norm stays, in words."""
    return kept(model, example, name, **options).reason


def codes(model: nn.Module, example: Any = X, name: str = "norm", **options: Any) -> tuple[Reason, ...]:
    """Why a norm stays."""
    return kept(model, example, name, **options).codes
