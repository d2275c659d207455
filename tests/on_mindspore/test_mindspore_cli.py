"""`slab mindspore`: weights there and back, what is exported against torch, accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import slabformer as sf
from saved_digits import save_digits_model
from slabformer.cli import main as cli
from slabformer.tasks.saved_model import load_model
from small_models import images, saved, trained_looking
from tolerances import EXACT, assert_close

pytestmark = pytest.mark.mindspore


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore writes what it knows of an error to the working folder."""
    monkeypatch.chdir(tmp_path)


def slab(*options: object) -> int:
    return cli.main(["mindspore", *map(str, options)])


def test_weights_go_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = saved(tmp_path / "first.safetensors"), saved(tmp_path / "other.safetensors", seed=1)
    assert slab("convert", first, "--output", "first.ckpt") == cli.DONE
    assert slab("convert", other, "--checkpoint", "first.ckpt", "-o", "again.safetensors") == cli.DONE
    model, _ = load_model(tmp_path / "again.safetensors")
    assert_close(model(images()), trained_looking()(images()), EXACT)
    deit = saved(tmp_path / "plain.safetensors", "deit_micro")
    assert slab("convert", deit, "--checkpoint", "first.ckpt", "-o", "none.safetensors") == cli.USAGE
    assert "checkpoint does not fit" in capsys.readouterr().err
    Path("broken.ckpt").write_bytes(Path("first.ckpt").read_bytes()[:1000])
    assert slab("convert", first, "--checkpoint", "broken.ckpt", "-o", "none.safetensors") == cli.USAGE
    assert "truncated, or no .ckpt" in capsys.readouterr().err
    assert not Path("none.safetensors").exists()


def test_what_is_exported_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path / "model.safetensors")
    assert slab("export", model, "--output", "exported", "--json") == cli.DONE
    told = json.loads(capsys.readouterr().out)
    assert told["form"] == "fused"
    assert max(told["max_rel"], told["max_rel_mindir"]) < 1e-5
    assert sorted(path.suffix for path in Path("exported").iterdir()) == [".ckpt", ".mindir", ".py"]
    assert slab("verify", model, "exported") == cli.DONE
    assert slab("verify", model, "exported/slab_deit_micro.mindir", "--batch-size", 5) == cli.DONE
    assert slab("verify", saved(tmp_path / "other.safetensors", seed=1), "exported") == cli.FAILURE
    assert slab("export", model, "--output", "exported") == cli.USAGE
    Path("exported/slab_deit_micro.ckpt").unlink()
    assert slab("verify", model, "exported") == cli.USAGE
    assert slab("verify", model, model) == cli.USAGE


def test_accuracy_is_that_of_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from slabformer.tasks.classification.config import AugmentConfig
    from slabformer.tasks.classification.data import create_loader
    from slabformer.tasks.classification.evaluate import evaluate
    from slabformer.tasks.classification.predict import data_config

    path = save_digits_model(tmp_path / "digits.safetensors")
    assert slab("eval", path, "--data", "digits", "--fused", "--batch-size", 50, "--json") == cli.DONE
    found = json.loads(capsys.readouterr().out)["fused"]
    model, info = load_model(path)
    fused, _ = sf.fuse(model, torch.randn(2, *info.input_size))
    data = data_config(info, path="digits")
    wanted = evaluate(fused, create_loader(data, AugmentConfig(), "validation", batch_size=50, seed=0))
    assert (found["top1"], found["images"]) == (wanted.top1, wanted.images)
    assert found["loss"] == pytest.approx(wanted.loss, rel=1e-5)
