from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from image_folders import picture
from saved_digits import INFO, digits_model
from slabformer.tasks.classification.augment import eval_transform
from slabformer.tasks.classification.predict import class_names, data_config, predict
from slabformer.tasks.images import expand_paths


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for index in range(5):
        picture(index).save(tmp_path / f"{index}.png")
    return sorted(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return digits_model()


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_guesses_are_the_likeliest_classes_in_order(model: nn.Module, files: list[Path], batch_size: int) -> None:
    transform = eval_transform(data_config(INFO))
    with torch.no_grad():
        expected = model(torch.stack([transform(picture(index)) for index in range(5)])).softmax(-1)
    predictions = list(predict(model, INFO, files, top=3, batch_size=batch_size))
    assert [prediction.path for prediction in predictions] == [str(file) for file in files]
    for prediction, row in zip(predictions, expected, strict=True):
        values, labels = row.topk(3)
        assert [guess.name for guess in prediction.guesses] == [str(label) for label in labels.tolist()]
        assert [guess.probability for guess in prediction.guesses] == pytest.approx(values.tolist(), rel=1e-4)


def test_no_more_guesses_than_classes(model: nn.Module, files: list[Path]) -> None:
    (prediction,) = predict(model, INFO, files[:1], top=50)
    assert len(prediction.guesses) == 10
    assert sum(guess.probability for guess in prediction.guesses) == pytest.approx(1, rel=1e-5)


def test_unreadable_images_are_told_and_the_others_go_on(model: nn.Module, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    bad = [tmp_path / "missing.png", tmp_path / "text.png"]
    predictions = list(predict(model, INFO, [files[0], *bad, files[1]], batch_size=2))
    assert [bool(prediction.guesses) for prediction in predictions] == [True, False, False, True]
    assert predictions[1].error == "No such file or directory"
    assert "cannot identify image file" in str(predictions[2].error)
    assert all(prediction.error for prediction in predict(model, INFO, bad))  # a whole batch of them


def test_photographs_are_turned_upright(model: nn.Module, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture(0).rotate(180).save(tmp_path / "turned.png", exif=exif)
    picture(0).save(tmp_path / "upright.png")
    turned, upright = predict(model, INFO, [tmp_path / "turned.png", tmp_path / "upright.png"])
    assert [guess.name for guess in turned.guesses] == [guess.name for guess in upright.guesses]
    assert turned.guesses[0].probability == pytest.approx(upright.guesses[0].probability, rel=1e-4)


def test_the_models_mode_stays(files: list[Path]) -> None:
    model = digits_model().train()
    list(predict(model, INFO, files))
    assert model.training


def test_folders_stand_for_their_images(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    picture(9).save(tmp_path / "sub" / "z.JPG", "JPEG")
    (tmp_path / "notes.txt").write_text("")
    assert expand_paths([tmp_path]) == [*files, tmp_path / "sub" / "z.JPG"]
    assert expand_paths(["other.png", tmp_path / "sub"]) == [Path("other.png"), tmp_path / "sub" / "z.JPG"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty"):
        expand_paths([tmp_path / "empty"])


def test_classes_are_named_as_well_as_can_be() -> None:
    assert class_names(replace(INFO, class_names=["a", "b"]), 2) == ["a", "b"]
    assert class_names(replace(INFO, class_names=[]), 3) == ["0", "1", "2"]
    assert class_names(replace(INFO, class_names=[]), 1000)[1].startswith("goldfish")
    with pytest.raises(ValueError, match="slab_deit_micro has 11 classes and names for 10"):
        class_names(INFO, 11)


def test_only_square_rgb_images_can_be_prepared() -> None:
    with pytest.raises(ValueError, match=r"takes images of \(1, 28, 28\)"):
        data_config(replace(INFO, input_size=(1, 28, 28)))


class Constant(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 10)


@pytest.mark.parametrize("options", [{"top": 0}, {"batch_size": 0}], ids=str)
def test_nothing_at_once_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="top and batch_size must be at least 1"):
        list(predict(Constant(), INFO, ["x.png"], **options))
