"""A conversion that is killed goes on bit for bit; two processes convert as one does; bfloat16."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from csv_files import CLOCK, csv_rows
from image_folders import picture
from language_models import save_encoder, write_lines
from slabformer.converting import ConvertConfig, convert, lose_norms
from slabformer.tasks.engine.observers import Observer
from slabformer.tasks.language.folders import load_model_folder
from tiny_training import AtStep, assert_same, die, die_in_checkpoint, finish, start, start_ranks

KILLED = -signal.SIGKILL
#: between sums in another order, after eight steps of Adam, which turns rounding of tiny gradients into steps
SAME_TRAINING = 0.02
BATCH = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with dropout and its tokenizer, and text beside it."""
    folder = tmp_path_factory.mktemp("encoder")
    write_lines(folder / "text.txt", 60)
    return save_encoder(folder / "bert")


def config(encoder: Path, output: Path, **changes: Any) -> ConvertConfig:
    """Eight steps of a conversion, with all that could differ: accumulation, a fade one after the other, alignment."""
    settings: dict[str, Any] = {
        **{"model": str(encoder), "data": str(encoder.parent / "text.txt"), "output": str(output), "device": "cpu"},
        **{"steps": 8, "evaluations": 4, "batch_size": 4, "accumulate": 2, "held_out": 6, "fit_batches": 2},
        **{"recalibrate_batches": 3, "log_every": 1, "save_every": 1},
    }
    made = ConvertConfig(**settings | changes)
    made.gamma.fade, made.gamma.stagger, made.gamma.align = 0.6, 0.5, 0.1
    return made


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of the fused model."""
    return load_model_folder(folder / "fused").state_dict()


def outputs(folder: Path) -> torch.Tensor:
    """Of the fused model for one batch."""
    with torch.no_grad():
        return load_model_folder(folder / "fused")(**BATCH).last_hidden_state


def observe_death(step: int) -> list[Observer]:
    return [AtStep(step, die)]


def die_while_fusing() -> list[Observer]:
    import slabformer.converting.subjects as subjects

    subjects.FolderSubject.fuse = lambda *_: die()
    return []


def die_while_reporting() -> list[Observer]:
    import slabformer.converting.run as run

    run.write_report = lambda *_: die()
    return []


@pytest.fixture(scope="module")
def undisturbed(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finish(start(config(encoder, folder))) == [0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "setups",
    [
        (partial(observe_death, 1),),
        (partial(observe_death, 3), partial(observe_death, 7)),
        (partial(die_in_checkpoint, 1, "half written"),),
        (partial(die_in_checkpoint, 5, "before rename"),),
        (die_while_fusing,),
        (die_while_reporting,),
    ],
    ids=["first-step", "twice", "first-checkpoint", "later-checkpoint", "fusing", "reporting"],
)
def test_a_killed_conversion_ends_as_the_undisturbed_one(
    setups: tuple[Any, ...], encoder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    for setup in setups:
        assert finish(start(config(encoder, tmp_path), setup)) == [KILLED]
        assert not (tmp_path / "result.json").exists()
    assert finish(start(config(encoder, tmp_path))) == [0]
    assert_same(tensors(tmp_path), tensors(undisturbed))
    assert (tmp_path / "result.json").read_text() == (undisturbed / "result.json").read_text()
    for name in ("metrics.csv", "steps.csv"):
        assert csv_rows(tmp_path / name, *CLOCK) == csv_rows(undisturbed / name, *CLOCK)
    assert (tmp_path / "report.html").exists()
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.slow
def test_two_processes_convert_as_one_does(encoder: Path, tmp_path: Path) -> None:
    one = config(encoder, tmp_path / "one", accumulate=1, batch_size=8)
    two = config(encoder, tmp_path / "two", accumulate=1, batch_size=4)
    assert finish(start(one), *start_ranks(two)) == [0, 0, 0]
    histories = [csv_rows(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    for left, right in zip(*histories, strict=True):
        assert float(left["cosine"]) == pytest.approx(float(right["cosine"]), abs=1e-3)
    expected, got = (outputs(tmp_path / name) for name in ("one", "two"))
    assert (got - expected).norm() <= SAME_TRAINING * expected.norm()


@pytest.mark.slow
def test_two_killed_processes_end_as_the_undisturbed_ones(encoder: Path, tmp_path: Path) -> None:
    whole, cut = (config(encoder, tmp_path / name) for name in ("whole", "cut"))
    assert finish(*start_ranks(whole)) == [0, 0]
    first, second = finish(*start_ranks(cut, partial(observe_death, 3)), seconds=60)
    assert KILLED in (first, second)
    assert finish(*start_ranks(cut)) == [0, 0]
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))


def test_bfloat16_trains_and_the_result_is_float32(encoder: Path, tmp_path: Path) -> None:
    results = [
        convert(config(encoder, tmp_path / precision, precision=precision, steps=4)) for precision in ("fp32", "bf16")
    ]
    cosines = [result.summary["fused"]["cosine"] for result in results]
    assert cosines[0] == pytest.approx(cosines[1], abs=0.02)
    assert cosines[0] != cosines[1]
    assert {tensor.dtype for tensor in tensors(tmp_path / "bf16").values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert results[1].summary["difference"] < 1e-4


def test_images_are_converted_in_bfloat16(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    from students import vit

    (tmp_path / "images").mkdir()
    for index in range(20):
        picture(index).save(tmp_path / "images" / f"{index}.png")
    vit().save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    result = lose_norms(
        tmp_path / "vit", tmp_path / "images", tmp_path / "run", precision="bf16", device="cpu", steps=2, batch_size=4
    )
    assert result.summary == json.loads((tmp_path / "run" / "result.json").read_text())
    assert -1 <= result.summary["fused"]["cosine"] <= 1
