"""On a device without float64 what needs it runs on the CPU; no tensor of that device is ever float64."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import slabformer as sf
from slabformer.ops import precision
from slabformer.ops.affine import fold_into_next, fold_into_previous
from slabformer.ops.moments import Moments, MomentsAccumulator
from slabformer.ops.precision import has_float64, wide, widened

#: stands for a device without float64: torch simulates tensors of this one without values where there is none
POOR = torch.device("cuda")
CORE = Path(sf.__file__).parent
#: what computes on the CPU in any case, or only draws an operator
ON_CPU = {
    "ops/precision.py",
    "ops/reference.py",
    "surgery/recognise.py",
    "surgery/fuse/graph/rules.py",
    "nn/foreign_norms.py",
}


class _Refuses(TorchDispatchMode):
    """As Apple's GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == POOR.type and leaf.dtype == torch.float64:
                raise TypeError(f"{func} made a float64 tensor on {leaf.device}")
        return result


@pytest.fixture
def _no_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that refuses float64, with tensors without values."""
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", frozenset({POOR.type}))
    with FakeTensorMode(), _Refuses():
        yield


def test_widening_leaves_a_device_that_has_float64() -> None:
    assert wide(torch.ones(2)).dtype == torch.float64
    assert widened(torch.ones(2, dtype=torch.int64)).dtype == torch.int64
    assert has_float64(torch.device("cuda"))
    assert not has_float64(torch.device("mps"))


@pytest.mark.usefixtures("_no_float64")
def test_the_simulated_device_refuses_float64() -> None:
    with pytest.raises(TypeError, match="made a float64 tensor on cuda"):
        torch.empty(2, device=POOR).double()
    assert wide(torch.empty(2, device=POOR)).device.type == "cpu"


@pytest.mark.usefixtures("_no_float64")
def test_folding_computes_on_the_cpu() -> None:
    weight, bias, scale, shift = (torch.empty(s, device=POOR) for s in ((3, 4), (3,), (4,), (4,)))
    for folded in (fold_into_next(weight, bias, scale, shift), fold_into_previous(weight, bias, scale[:3], shift[:3])):
        assert all(t.dtype == torch.float64 and t.device.type == "cpu" for t in folded)


@pytest.mark.usefixtures("_no_float64")
@pytest.mark.parametrize("make", [sf.RepBN, sf.PRepBN])
def test_norms_say_their_map_and_become_an_affine_there(make: type[nn.Module]) -> None:
    norm = make(4, device=POOR).eval()
    scale, shift = norm.scale_shift()
    assert (scale.device.type, shift.device.type) == ("cpu", "cpu")
    affine = sf.Affine.of(scale, shift, like=norm.weight, channel_dim=-1, eps=1e-5)
    assert (affine.weight.device.type, affine.weight.dtype) == (POOR.type, torch.float32)


@pytest.mark.usefixtures("_no_float64")
def test_recalibrating_accumulates_on_the_cpu() -> None:
    norm = sf.RepBN(4, device=POOR)
    norm.accumulator = MomentsAccumulator(4, POOR)
    assert norm(torch.empty(2, 3, 4, device=POOR)).device.type == POOR.type
    result = norm.accumulator.result()
    assert (result.mean.dtype, result.mean.device.type) == (torch.float64, "cpu")
    norm.running_mean.copy_(result.mean)
    norm.accumulator.add(Moments(*(torch.empty(s, device=POOR) for s in ((), (4,), (4,)))))


def widenings(source: str) -> set[str]:
    """Calls of ``.double()`` in ``source``."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {ast.unparse(c) for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "double"}


@pytest.mark.parametrize(
    "path",
    [path for room in ("ops", "nn", "surgery") for path in sorted((CORE / room).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(CORE)),
)
def test_the_core_widens_in_one_place(path: Path) -> None:
    if path.relative_to(CORE).as_posix() not in ON_CPU:
        assert not widenings(path.read_text())
