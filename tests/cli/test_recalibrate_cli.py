from pathlib import Path

import pytest
import torch

import slabformer as sf
from saved_digits import INFO, digits_model, save_digits_model
from slabformer.cli.main import main
from slabformer.tasks.classification.config import AugmentConfig
from slabformer.tasks.classification.data import create_loader
from slabformer.tasks.classification.predict import data_config
from slabformer.tasks.saved_model import load_model


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return save_digits_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("options", "num_batches"), [([], None), (["--num-batches", "2"], 2)], ids=["all", "two"])
def test_statistics_are_those_of_the_training_images(
    model_file: Path, options: list[str], num_batches: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = model_file.with_name("new.safetensors")
    arguments = ["recalibrate", str(model_file), "--data", "digits", "--output", str(output), "--device", "cpu"]
    assert main([*arguments, *options]) == 0
    images = "1,437" if num_batches is None else "256"
    assert f"statistics of 9 norms over {images} images" in capsys.readouterr().out
    expected = digits_model()
    data = data_config(INFO, path="digits")
    plain = AugmentConfig(policy="none")
    loader = create_loader(data, plain, "train", batch_size=128, seed=0, drop_last=False)
    sf.recalibrate_(expected, loader, num_batches)
    recalibrated, info = load_model(output)
    before = load_model(model_file)[0].state_dict()
    assert info == load_model(model_file)[1]
    for name, tensor in recalibrated.state_dict().items():
        assert torch.allclose(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-5), name
        assert torch.equal(tensor, before[name]) == ("running" not in name), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-batches", "0"], "--num-batches must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
    ],
    ids=["num-batches", "batch-size"],
)
def test_mistakes_cost_one_line(
    model_file: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["recalibrate", str(model_file), "--data", "digits", "--output", "never.safetensors"]
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_fused_model_is_refused(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fused = model_file.with_name("fused.safetensors")
    assert main(["fuse", str(model_file), "--output", str(fused)]) == 0
    assert main(["recalibrate", str(fused), "--data", "digits", "--output", "never.safetensors"]) == 2
    assert "is fused, its statistics are in the weights; recalibrate before fusing" in capsys.readouterr().err
