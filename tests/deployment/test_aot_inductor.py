"""Compiled packages: linear attention in C++ beside them, run by torch without this library at any batch size."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
import torch

import slabformer as sf
from deployed_folders import printed_by
from slabformer.deployment.targets import aot_inductor
from slabformer.deployment.targets.aot_inductor import AotInductor
from slabformer.deployment.targets.base import Request
from slabformer.export.signature import flatten
from slabformer.ops.native.build import BuildError
from small_models import images, trained_looking
from tolerances import FLOAT32, assert_close

pytestmark = [pytest.mark.usefixtures("_compiler"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    deployed = sf.deploy(trained_looking(), images(), target="aoti", seconds=0)
    assert deployed.report.steps[-1].did == "compiled ahead of time, 4 linear attentions in C++"
    return deployed.save(tmp_path_factory.mktemp("aoti") / "deployed")


def test_the_three_lines_need_torch_alone(folder: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in folder.glob("*.so")) == ["attention_0.so"]
    five = tmp_path / "five.npz"
    numpy.savez(five, images=images(5, seed=1).numpy())
    with torch.no_grad():
        expected = trained_looking()(images(5, seed=1))
    numbers = torch.tensor(
        [float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", printed_by(folder, five, hidden=("slabformer",)))]
    )
    assert_close(numbers.view(5, 5), expected, 1e-3)  # four digits are printed


@torch.no_grad()
def test_two_copies_are_loaded_by_one_process(folder: Path) -> None:
    first, second = (sf.load_deployed(folder, check=False) for _ in range(2))
    x = images(3, seed=2)
    assert torch.equal(first(x), second(x))
    assert_close(first(x), trained_looking()(x), FLOAT32)


def request() -> Request:
    signature, flat = flatten(trained_looking(), images())
    return Request(flat=flat, signature=signature, inputs=[images()])


def no_compiler(*_: object) -> None:
    raise BuildError("no C++ compiler")


def test_without_the_library_attention_stays_with_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_inductor, "aoti_compile", lambda program, path: path.write_text(str(program.graph)))
    assert AotInductor().write(request(), tmp_path).did == "compiled ahead of time, 4 linear attentions in C++"
    assert (tmp_path / "model.pt2").read_text().count(".linear_attention.default](") == 4
    (tmp_path / "attention_0.so").unlink()
    monkeypatch.setattr(aot_inductor, "bring_attention_", no_compiler)
    said = AotInductor().write(request(), tmp_path).did
    assert said == "compiled ahead of time; no linear attention in C++: no C++ compiler"
    assert "linear_attention" not in (tmp_path / "model.pt2").read_text()
    assert not list(tmp_path.glob("*.so"))
