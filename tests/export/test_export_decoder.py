"""ONNX with a cache: what onnxruntime writes is what PyTorch writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from language_models import SIZES, tokens, trained_looking
from slabformer.export import decoder
from slabformer.export.decoder import export_decoder
from slabformer.surgery.verify import VerificationError
from slabformer.tasks.language.fusing import fuse_language_model

# the exporter renames axes that it finds to be equal, and says so
pytestmark = pytest.mark.filterwarnings("ignore:# The axis name:UserWarning", "ignore::DeprecationWarning")
NEW = 10


def greedy_in_onnx(path: Path, prompt: np.ndarray) -> list[int]:
    """Tokens that onnxruntime writes: the prompt at once, then one token after the other through the cache."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    heads = SIZES["num_attention_heads"]
    empty = np.zeros((1, heads, 0, SIZES["hidden_size"] // heads), np.float32)
    past = {given.name: empty for given in session.get_inputs() if given.name.startswith("past.")}
    names = [output.name for output in session.get_outputs()]
    ids, written = prompt, []
    for _ in range(NEW):
        outputs = dict(zip(names, session.run(None, {"input_ids": ids, **past}), strict=True))
        written.append(int(outputs["logits"][0, -1].argmax()))
        past = {name: outputs[name.replace("past", "present")] for name in past}
        ids = np.array([[written[-1]]])
    return written


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unfused", "fused"])
def test_onnxruntime_writes_what_generate_does(fused: bool, tmp_path: Path) -> None:
    """Slow where the next test, of an unfused model whose weights lie beside the file, says the same."""
    model = trained_looking()
    if fused:
        model, _ = fuse_language_model(model)
    result = export_decoder(model, tmp_path / "model.onnx", metadata={"by": "a test"})
    assert result.max_rel < 1e-4
    prompt = tokens(1, 7)
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert greedy_in_onnx(tmp_path / "model.onnx", prompt.numpy()) == expected[0, 7:].tolist()


def test_weights_that_do_not_fit_into_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slabformer.export.decoder.LARGEST_FILE", 20_000)
    model = trained_looking(num_hidden_layers=1)
    result = export_decoder(model, tmp_path / "model.onnx")
    assert result.weights == tmp_path / "model.onnx.data"
    assert result.weights.stat().st_size > 4 * 2 * model.lm_head.weight.numel()  # embedding and head
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (result.path, result.weights):  # the two move together
        path.rename(elsewhere / path.name)
    prompt = tokens(1, 7)
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert greedy_in_onnx(elsewhere / "model.onnx", prompt.numpy()) == expected[0, 7:].tolist()


@pytest.mark.slow
def test_grouped_keys_are_exported_too(tmp_path: Path) -> None:
    assert export_decoder(trained_looking(num_key_value_heads=1), tmp_path / "model.onnx").max_rel < 1e-4


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_refused_and_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = decoder._runner
    monkeypatch.setattr(decoder, "_runner", lambda session: lambda *given: [1.01 * y for y in right(session)(*given)])
    with pytest.raises(VerificationError):
        export_decoder(trained_looking(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_in_train_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export needs eval mode"):
        export_decoder(trained_looking().train(), tmp_path / "model.onnx")
