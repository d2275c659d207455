"""Targets: chosen by measuring, verified first, refused in one line where a package or an operator is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import slabformer as sf
from slabformer.deployment import deploy as deployment
from slabformer.deployment.targets.base import Request, Target, Written
from slabformer.deployment.targets.table import TARGETS, register_target, usable
from slabformer.export.program import Run
from slabformer.export.refusals import UnsupportedError
from small_models import images, trained_looking

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
INSTALLED = {name for name in TARGETS if all(map(importlib.util.find_spec, TARGETS[name].packages))}
COMPUTED = [(name, dtype) for name, target in TARGETS.items() for dtype in target.dtypes if name in INSTALLED]


class Stub(Target):
    """Runs the module itself, off by ``error``."""

    name, packages, error = "stub", ("torch",), 0.0

    def write(self, request: Request, folder: Path) -> Written:
        self.flat = request.flat
        (folder / "model.stub").write_text("")
        return Written(did="by hand")

    def load(self, folder: Path, dtype: str, threads: int | None = None) -> Run:
        return lambda tensors: [y + self.error for y in self.flat(*tensors)]

    def opening(self, dtype: str) -> str:
        return "1\n2\n"


@pytest.fixture
def only_stub() -> Iterator[Stub]:
    before, stub = dict(TARGETS), Stub()
    TARGETS.clear()
    TARGETS["stub"] = stub
    yield stub
    TARGETS.clear()
    TARGETS.update(before)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), sf.RepBN(8), nn.Linear(8, 3)).eval()


def test_a_target_of_ones_own_is_registered_written_and_loaded(tmp_path: Path) -> None:
    registered = register_target(Stub())
    x = torch.randn(2, 4)
    try:
        deployed = sf.deploy(tiny(), x, target="stub", seconds=0)
        assert [step.name for step in deployed.report.steps] == ["as given", "fused", "stub"]
        assert torch.equal(sf.load_deployed(deployed.save(tmp_path / "deployed"))(x), deployed(x))
        with pytest.raises(ValueError, match="there is a target 'stub' already"):
            register_target(Stub())
    finally:
        registered.remove()
        registered.remove()
    with pytest.raises(ValueError, match=r"target must be one of auto, onnxruntime, .*, got 'stub'"):
        sf.deploy(tiny(), x, target="stub")
    with pytest.raises(TypeError, match="needs a Target, got int"):
        register_target(1)  # type: ignore[arg-type]


def test_a_target_that_computes_something_else_is_never_taken(only_stub: Stub) -> None:
    only_stub.error = 1.0
    with pytest.raises(sf.VerificationError):
        sf.deploy(tiny(), torch.randn(2, 4), target="stub", seconds=0)
    with pytest.raises(UnsupportedError, match="not for stub: outputs differ"):
        sf.deploy(tiny(), torch.randn(2, 4), target="auto", seconds=0)


class Other(Stub):
    name = "other"


class Refusing(Stub):
    name = "refusing"

    def write(self, request: Request, folder: Path) -> Written:
        raise UnsupportedError("it does not take the operator x")


class Missing(Stub):
    name, packages, extra = "missing", ("nothing_like_it",), "vision"


def test_auto_takes_the_fastest_and_says_why_others_were_not(only_stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    TARGETS.update({target.name: target for target in (Other(), Refusing(), Missing())})
    milliseconds = {"as given": 9.0, "fused": 8.0, "stub": 3.0, "other": 2.0}
    timed = []

    def time_interleaved(calls, **_):
        timed.append(set(calls))
        return {name: [[milliseconds[name] / 1e3]] for name in calls}

    monkeypatch.setattr(deployment, "time_interleaved", time_interleaved)
    deployed = sf.deploy(tiny(), torch.randn(2, 4), target="auto")
    assert timed == [set(milliseconds)]
    assert deployed.report.taken == "other"
    assert [(step.name, step.taken) for step in deployed.report.steps][2:] == [("stub", False), ("other", True)]
    assert round(deployed.report.steps[3].gain, 2) == 4.0
    assert deployed.report.notes == (
        "missing not tried: slabformer needs nothing_like_it for this; pip install 'slabformer[vision]'",
        "not for refusing: it does not take the operator x",
    )


def test_building_ends_with_the_budget(only_stub: Stub) -> None:
    TARGETS["other"] = Other()
    deployed = sf.deploy(tiny(), torch.randn(2, 4), target="auto", seconds=0, budget=0)
    assert deployed.report.taken == "stub"
    assert deployed.report.notes == (
        "other not tried: building took 0 s of a budget of 0",
        "building took 0 s, beyond the budget of 0: stub was begun within it",
    )


@pytest.mark.parametrize(
    ("target", "options", "error", "said"),
    [
        ("onnx", {}, ValueError, "got 'onnx'; did you mean 'onnxruntime'"),
        ("onnxruntime", {"dtype": torch.bfloat16}, ValueError, "onnxruntime has no bfloat16 here; it has float32"),
        ("onnxruntime", {"dtype": torch.int8}, ValueError, "int8 needs batches that show the ranges"),
        ("onnxruntime", {"dtype": torch.int16}, ValueError, "floating point type, got torch.int16"),
        ("onnxruntime", {"dtype": torch.float64}, ValueError, "targets compute in float32, .*, got torch.float64"),
        ("onnxruntime", {"device": "meta"}, ValueError, "targets are for the CPU, got device meta"),
    ],
    ids=["name", "dtype", "calibration", "int16", "float64", "device"],
)
def test_mistakes_are_told(target: str, options: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        sf.deploy(tiny(), torch.randn(2, 4), target=target, **options)


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs openvino for this; pip install 'slabformer\[int8\]'"):
        sf.deploy(tiny(), torch.randn(2, 4), target="openvino")
    with pytest.raises(ValueError, match=r"no target that is installed has float32: .*onnxruntime not tried"):
        usable("auto", "float32")


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize("target", [name for name in ("onnxruntime", "openvino") if name in INSTALLED])
def test_an_operator_that_an_engine_lacks_is_named_with_its_line(target: str) -> None:
    with pytest.raises(UnsupportedError, match=r"the operator \w+\.bessel_j0 \(test_targets\.py, line \d+\)"):
        sf.deploy(Bessel().eval(), torch.randn(2, 4), target=target, seconds=0)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), COMPUTED)
@torch.no_grad()
def test_a_model_goes_through_every_target_in_every_dtype(target: str, dtype: str, tmp_path: Path) -> None:
    model, x = trained_looking(), images()
    try:
        usable(target, dtype)
    except (ValueError, ImportError) as error:
        pytest.skip(str(error))
    calibration = [images(16, seed=5)] if dtype == "int8" else []
    deployed = sf.deploy(model, x, target=target, dtype=getattr(torch, dtype), seconds=0, calibration=calibration)
    loaded = sf.load_deployed(deployed.save(tmp_path / "deployed"))
    for batch in (1, 2, 5) if TARGETS[target].any_batch else (2,):
        fresh = images(batch, seed=3)
        difference = (loaded(fresh) - model(fresh)).abs().max() / model(fresh).square().mean().sqrt()
        assert difference < (1e-4 if dtype == "float32" else 0.05)


def test_files_in_half_precision_are_half_as_large(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4)).eval()
    sizes = {}
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        sf.deploy(model, torch.randn(2, 256), target="onnxruntime", dtype=dtype, seconds=0).save(folder)
        sizes[dtype] = (folder / "model.onnx").stat().st_size
    assert sizes[torch.float16] < 0.6 * sizes[torch.float32]
    graph = onnx.load(tmp_path / "torch.float16" / "model.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_norms_that_stay_in_a_file_are_in_the_report() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    left = sf.deploy(model, torch.randn(2, 4), target="onnxruntime", seconds=0).report.steps[-1].did
    assert left == "an ONNX file, 1 LayerNormalization left"
    gone = sf.deploy(tiny(), torch.randn(2, 4), target="onnxruntime", seconds=0).report.steps[-1].did
    assert gone == "an ONNX file, no norm left"
