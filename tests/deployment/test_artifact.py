"""Folders of deployed models: whole or absent, refused where damaged or from elsewhere, run without this library."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import slabformer as sf
from deployed_folders import printed_by
from slabformer.deployment import artifact
from slabformer.deployment.artifact import ArtifactError
from slabformer.deployment.targets.table import TARGETS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Model(nn.Module):
    """Two inputs, two outputs and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), sf.RepBN(8), nn.Linear(8, 3)
        sf.testing.randomize_norms_(self)
        self.eval()

    def forward(self, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.first(tokens))
        return {"logits": self.last(hidden) * weights, "hidden": hidden.sum(1)}


def inputs(batch: int = 2) -> dict[str, Tensor]:
    return {"tokens": torch.randn(batch, 5, 4), "weights": torch.rand(batch, 5, 1)}


def test_what_is_on_every_machine_is_found() -> None:
    """The module's fixtures need onnxruntime alone."""
    assert list(TARGETS) == ["onnxruntime", "openvino", "torch", "executorch", "aoti", "tensorrt", "coreml"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    deployed = sf.deploy(Model(), inputs(), target="onnxruntime", seconds=0.05)
    folder = tmp_path_factory.mktemp("artifacts") / "deployed"
    return deployed.save(folder, class_names=["one", "two", "three"], preprocessing={"mean": [0.5]})


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


@torch.no_grad()
def test_a_folder_computes_what_the_model_does_by_name_and_position_at_any_batch_size(written: Path) -> None:
    loaded = sf.load_deployed(written, threads=1)
    for batch in (1, 2, 5):
        given = inputs(batch)
        expected = Model()(**given)
        for outputs in (loaded(**given), loaded(*given.values())):
            assert outputs.keys() == expected.keys()
            for name, output in outputs.items():
                torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-4)
    assert loaded.manifest.class_names == ["one", "two", "three"]
    assert loaded.manifest.preprocessing == {"mean": [0.5]}
    assert [step["name"] for step in loaded.report["steps"]] == ["as given", "fused", "onnxruntime"]
    assert loaded.report["machine"]["versions"]["onnxruntime"] == importlib.metadata.version("onnxruntime")


def test_the_three_lines_run_without_torch_and_without_this_library(written: Path) -> None:
    lines = (written / "run.py").read_text().splitlines()
    assert len(lines) == 3
    printed = printed_by(written)
    with numpy.load(written / "expected.npz") as expected:
        first = f"{expected['logits'].flat[0]:.3f}"[:5]
    assert first in printed


def test_checksums_are_those_of_every_file(written: Path) -> None:
    lines = dict(reversed(line.split("  ")) for line in (written / "SHA256SUMS").read_text().splitlines())
    files = {path.name for path in written.iterdir()}
    assert set(lines) == files - {"SHA256SUMS"}
    assert all(hashlib.sha256((written / name).read_bytes()).hexdigest() == digest for name, digest in lines.items())
    assert {"model.onnx", "artifact.json", "report.json", "example.npz", "expected.npz", "run.py"} <= files


@pytest.mark.parametrize("name", ["model.onnx", "artifact.json", "report.json", "run.py", "example.npz"])
@pytest.mark.parametrize("damage", ["cut", "gone", "altered"])
def test_a_damaged_folder_is_refused(folder: Path, name: str, damage: str) -> None:
    contents = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "cut":
        (folder / name).write_bytes(contents[: len(contents) // 2])
    elif damage == "altered":
        (folder / name).write_bytes(bytes([contents[0] ^ 1]) + contents[1:])
    with pytest.raises((ArtifactError, FileNotFoundError), match=rf"{name} is missing or altered|no deployed model at"):
        sf.load_deployed(folder)


@pytest.mark.parametrize("text", ["", "words\n", "0  model.onnx\n"], ids=["empty", "words", "short"])
def test_sums_that_say_nothing_are_refused(folder: Path, text: str) -> None:
    (folder / "SHA256SUMS").write_text(text)
    with pytest.raises(ArtifactError, match="SHA256SUMS is missing or altered"):
        sf.load_deployed(folder)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """``folder`` with another manifest and the sums that fit it."""
    values = json.loads((folder / "artifact.json").read_text())
    change(values)
    (folder / "artifact.json").write_text(json.dumps(values))
    sums = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    digest = hashlib.sha256((folder / "artifact.json").read_bytes()).hexdigest()
    lines = [f"{digest if name == 'artifact.json' else old}  {name}\n" for old, name in sums]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "riscv64"}, "is for riscv64, and this machine is .*; run `slab deploy` on this machine"),
        ({"versions": {"onnxruntime": "999.1"}}, r"is for? ?.*999\.1.*pip install 'onnxruntime>=999\.1'"),
        ({"format": 2}, "is of format 2, and this slabformer reads 1"),
        ({"target": "abacus"}, "a target that is not registered here: target must be one of auto, onnxruntime"),
        ({"dtype": "int4"}, "describes no deployed model: dtype must be"),
        ({"more": 1}, "describes no deployed model"),
        ({"signature": {"inputs": []}}, "describes no deployed model"),
        ({"signature": 3}, "describes no deployed model"),
    ],
    ids=["machine", "version", "format", "target", "dtype", "field", "signature", "number"],
)
def test_what_does_not_fit_here_is_refused_with_what_to_do(folder: Path, changes: dict[str, Any], said: str) -> None:
    if "versions" in changes:
        said = said.replace("is for? ?.*", "was written for onnxruntime ")
    with pytest.raises(ArtifactError, match=said) as refused:
        sf.load_deployed(rewritten(folder, lambda values: values.update(changes)))
    assert "\n" not in str(refused.value)


def test_instructions_that_this_processor_lacks_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "instructions", lambda: ("avx2",))
    with pytest.raises(ArtifactError, match="for a processor with amx_bf16, avx512f, which"):
        sf.load_deployed(rewritten(folder, lambda v: v.update(instructions=["avx2", "avx512f", "amx_bf16"])))
    monkeypatch.setattr(artifact, "instructions", lambda: ())  # a system that does not tell
    sf.load_deployed(folder)


def test_compiled_folders_hold_for_one_minor_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TARGETS["onnxruntime"]), "same_version", True)
    sf.load_deployed(folder)
    with pytest.raises(ArtifactError, match=r"holds for that minor version alone.*pip install 'onnxruntime==1\.1\.0'"):
        sf.load_deployed(rewritten(folder, lambda values: values.update(versions={"onnxruntime": "1.1.0"})))


def test_a_runtime_that_computes_something_else_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = TARGETS["onnxruntime"].load
    monkeypatch.setattr(
        type(TARGETS["onnxruntime"]), "load", lambda *args: lambda x: [1.1 * y for y in load(*args[1:])(x)]
    )
    with pytest.raises(sf.VerificationError, match="something else here than where it was written"):
        sf.load_deployed(folder)
    sf.load_deployed(folder, check=False)


def test_no_folder_is_no_deployed_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no deployed model at"):
        sf.load_deployed(tmp_path / "absent")


def test_saving_replaces_a_folder_where_asked_alone(written: Path, tmp_path: Path) -> None:
    deployed = sf.deploy(nn.Linear(4, 2).eval(), torch.randn(2, 4), target="torch", seconds=0)
    target = tmp_path / "deployed"
    target.mkdir()
    deployed.save(target)
    with pytest.raises(FileExistsError, match="is not empty"):
        deployed.save(target)
    deployed.save(target, overwrite=True)
    sf.load_deployed(target)
    for make in (Path.touch, Path.mkdir):
        (target / "of the user").unlink(missing_ok=True)
        make(target / "of the user")
        with pytest.raises(FileExistsError, match="holds 'of the user', which overwriting would delete"):
            deployed.save(target, overwrite=True)
    sf.load_deployed(target)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        deployed.save(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deployed", "file"]


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = sf.deploy(nn.Linear(4, 2).eval(), torch.randn(2, 4), target="torch", seconds=0)
    monkeypatch.setattr(artifact, "_sha256", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        deployed.save(tmp_path / "deployed")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_form_of_this_process_is_saved_for_torch(tmp_path: Path) -> None:
    given = inputs()
    deployed = sf.deploy(Model(), given, compile=False, seconds=0)
    assert deployed(**given).keys() == {"logits", "hidden"}
    loaded = sf.load_deployed(deployed.save(tmp_path / "deployed"))
    torch.testing.assert_close(loaded(**given)["logits"], Model()(**given)["logits"])
    assert loaded.manifest.target == "torch"
    assert [step["name"] for step in loaded.report["steps"]] == ["as given", "fused"]
