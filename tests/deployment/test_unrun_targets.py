"""Targets that are written here and run elsewhere: what is checked of them, and that nothing is said of the rest."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import slabformer as sf
from slabformer.deployment.targets.base import Request, Target, Written
from slabformer.deployment.targets.core_ml import CoreMl
from slabformer.deployment.targets.table import register_target, usable
from slabformer.deployment.targets.tensor_rt import TensorRt
from slabformer.export.refusals import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Torch version")


def tiny(last: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), sf.RepBN(8), last or nn.Linear(8, 3)).eval()


class Elsewhere(Target):
    """Writes a file for another system."""

    name, in_auto = "elsewhere", False
    packages = ("torch",)

    def runs_here(self) -> bool:
        return False

    def write(self, request: Request, folder: Path) -> Written:
        (folder / "model.elsewhere").write_text("")
        return Written(did="by hand")

    def load(self, folder: Path, dtype: str, threads: int | None = None) -> None:
        raise UnsupportedError("not on this system")

    def opening(self, dtype: str) -> str:
        return "1\n"


def test_what_does_not_run_here_is_written_and_neither_compared_nor_timed(tmp_path: Path) -> None:
    registered = register_target(Elsewhere())
    try:
        deployed = sf.deploy(tiny(), torch.randn(2, 4), target="elsewhere", seconds=0.05)
        step = deployed.report.steps[-1]
        assert step.did == "by hand; does not run on this system: neither compared nor timed"
        assert math.isnan(step.p50_ms)
        assert math.isnan(step.max_rel)
        with pytest.raises(UnsupportedError, match="written for elsewhere does not run on this system; save it, and"):
            deployed(torch.randn(2, 4))
        folder = deployed.save(tmp_path / "deployed")
        assert (folder / "model.elsewhere").exists()
        assert (folder / "expected.npz").exists()  # of the model itself
        with pytest.raises(UnsupportedError, match="not on this system"):
            sf.load_deployed(folder)
        assert "elsewhere" not in [target.name for target in usable("auto", "float32")[0]]
    finally:
        registered.remove()


def test_tensorrt_gets_operators_that_its_parser_takes(tmp_path: Path) -> None:
    deployed = sf.deploy(tiny(), torch.randn(2, 4), target="tensorrt", seconds=0)
    did = "an ONNX file, no norm left, operators as TensorRT's parser takes them; not run on TensorRT here"
    assert deployed.report.steps[-1].did == did
    assert "TensorrtExecutionProvider" in (deployed.save(tmp_path / "deployed") / "run.py").read_text()
    assert not TensorRt.in_auto


class Infinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.isinf().float()


def test_an_operator_that_its_parser_lacks_is_named() -> None:
    with pytest.raises(UnsupportedError, match="TensorRT's parser does not take IsInf; use onnxruntime"):
        sf.deploy(tiny(Infinite()), torch.randn(2, 4), target="tensorrt", seconds=0)


def test_coreml_is_converted_and_looked_through(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="of an extra of its own")
    x = torch.randn(2, 4)
    for model, left in ((tiny(), "no norm left"), (tiny(nn.LayerNorm(8)), "1 layer_norm left")):
        deployed = sf.deploy(model, x, target="coreml", seconds=0)
        assert deployed.report.steps[-1].did.startswith(f"a CoreML program, {left}")
    folder = deployed.save(tmp_path / "deployed")
    assert (folder / "model.mlpackage.zip").stat().st_size > 1000
    if not CoreMl().runs_here():
        with pytest.raises(UnsupportedError, match="CoreML's programs run on macOS alone; copy the folder there"):
            sf.load_deployed(folder)
