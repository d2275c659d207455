"""A run that was stopped goes on bit for bit; a finished one is not trained again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import Trainer

from csv_files import csv_rows
from language_models import SIZES, sentences, streamed, tiny_config
from slabformer.tasks.engine.signals import StoppedError
from slabformer.tasks.language.config import ModelConfig
from slabformer.tasks.language.train import train
from slabformer.tasks.language.watch import SignalCallback
from tolerances import EXACT, assert_close


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SIGTERM during ``step`` does."""
    original = SignalCallback.on_step_end

    def on_step_end(self: SignalCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.signals.received = 15 if state.global_step == step else 0
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(SignalCallback, "on_step_end", on_step_end)


def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"accumulate": 2, "save_every": 4, "eval_every": 4, "model": ModelConfig(**SIZES, context=8)}
    whole = train(tiny_config(tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(StoppedError, match="stopped by SIGTERM after step 6"):
            train(tiny_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = train(tiny_config(tmp_path / "run", **changes))
    assert resumed.summary["resumed"]
    expected, actual = (load_file(result.output / "model.safetensors") for result in (whole, resumed))
    for name, value in expected.items():
        assert_close(actual[name], value, EXACT)
    assert csv_rows(resumed.output / "metrics.csv") == csv_rows(whole.output / "metrics.csv")
    assert "training ended" not in caplog.text


def test_a_finished_run_is_not_trained_again_and_another_one_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    first = train(config)
    again = train(config)
    assert again.already_finished
    assert again.summary == first.summary
    with pytest.raises(ValueError, match="holds another run: seed was 0, now 1"):
        train(replace(config, seed=1))
    with pytest.raises(ValueError, match="holds a run already"):
        train(replace(config, resume="never"))
    other = train(replace(config, seed=1, overwrite=True))
    assert other.summary["perplexity"] != first.summary["perplexity"]


def test_a_checkpoint_that_could_not_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path / "run", save_every=3)

    def die(self: Trainer, *args: Any) -> None:
        if self.state.global_step == 6:
            raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_scaler", die)
        with pytest.raises(OSError, match="no space left"):
            train(config)
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-3"]
    assert train(config).summary["resumed"]
    assert [row["step"] for row in csv_rows(tmp_path / "run" / "steps.csv")] == ["5", "10"]


def test_a_stream_that_was_stopped_in_a_later_epoch_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(sentences(30)))  # 20 to train on: two steps an epoch
    whole = train(streamed(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(StoppedError):
            train(streamed(tmp_path / "run"))
    monkeypatch.setattr("slabformer.tasks.language.text.train_tokenizer", None)  # the checkpoint has one
    resumed = train(streamed(tmp_path / "run"))
    expected, actual = (load_file(result.output / "model.safetensors") for result in (whole, resumed))
    for name, value in expected.items():
        assert_close(actual[name], value, EXACT)
