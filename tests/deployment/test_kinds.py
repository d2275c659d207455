"""Language models, detectors and encoders of text through targets; their run.py without torch and this library."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import slabformer as sf
from deployed_folders import printed_by
from detectors import pictures, small_detector, trained_looking
from language_models import talkative, tokens
from slabformer.deployment.kinds import KINDS
from slabformer.deployment.targets.table import TARGETS
from slabformer.export.detector import without_padding
from slabformer.export.static_decoder import AXES, StaticDecoder, write_tokens
from slabformer.export.static_detector import StaticDetector
from slabformer.nn.controls import prepbn_modules

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name:UserWarning"
)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
INSTALLED = [name for name in TARGETS if all(map(importlib.util.find_spec, TARGETS[name].packages))]


def of_kind(kind: str) -> list[object]:
    """Its targets here; compiling ahead of time is slow."""
    wanted = [name for name in INSTALLED if not KINDS[kind].targets or name in KINDS[kind].targets]
    return [pytest.param(name, marks=[] if name == "onnxruntime" else pytest.mark.slow) for name in wanted]


@pytest.mark.parametrize("target", of_kind("decoder"))
def test_a_language_model_writes_what_generate_does(target: str, tmp_path: Path) -> None:
    model = talkative()
    decoder, prompt = StaticDecoder(model, 40), tokens(2, 7)
    deployed = sf.deploy(decoder, decoder.inputs(prompt), target=target, seconds=0, axes=AXES)
    assert deployed.report.steps[1].did == "5 of 5 norms folded"
    folder = deployed.save(tmp_path / "deployed")
    loaded = sf.load_deployed(folder)
    for given in (prompt, tokens(1, 3, seed=1)):
        expected = model.generate(given, max_new_tokens=20, **GREEDY)[:, given.shape[1] :]
        assert torch.equal(write_tokens(loaded, decoder.inputs(given), 20), expected)
    hidden = ("slabformer", "transformers", *(() if "torch" in TARGETS[target].packages else ("torch",)))
    printed = printed_by(folder, folder / "example.npz", 12, hidden=hidden)
    expected = model.generate(prompt, max_new_tokens=12, **GREEDY)[:, 7:]
    assert [[int(token) for token in line.split()] for line in printed.splitlines()] == expected.T.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("target", of_kind("detector"))
@torch.no_grad()
def test_a_detector_finds_the_same_and_prints_it(target: str, tmp_path: Path) -> None:
    (image,) = pictures((60, 90))
    detector = StaticDetector(trained_looking(small_detector()), (64, 96))
    given = detector.inputs(image)
    folder = tmp_path / "deployed"
    deployed = sf.deploy(detector, given, target=target, seconds=0, axes={})
    loaded = sf.load_deployed(deployed.save(folder, class_names=["cat", "dog", "emu"]))
    expected, found = without_padding(detector(**given)), without_padding(loaded(**given))
    assert len(expected["scores"]) == 10
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=0.05)
    lines = [line.split() for line in printed_by(folder).splitlines()]
    assert [line[0] for line in lines] == [["cat", "dog", "emu"][label - 1] for label in expected["labels"]]
    boxes = torch.tensor([[float(side) for side in line[2:]] for line in lines])
    torch.testing.assert_close(boxes, expected["boxes"], rtol=0, atol=0.11)  # one digit is printed


class Sentences(torch.nn.Module):
    """A BERT as encoders of sentences use it: the mean over tokens, normalised, and the tokens."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        settings = BertConfig(vocab_size=300, max_position_embeddings=32, **sizes)
        self.bert = BertModel(settings, add_pooling_layer=False)
        sf.convert_norms_(self.bert, eps=1e-3)
        sf.testing.randomize_norms_(self)
        for norm in prepbn_modules(self).values():
            norm.set_gamma(0.0)
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return {"embedding": mean / mean.norm(dim=-1, keepdim=True), "tokens": hidden}


def sentences(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two thirds of the last sentence are padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 3 :] = 0
    return {"input_ids": tokens(batch, length, seed), "attention_mask": mask}


@pytest.mark.parametrize("target", of_kind("model"))
@torch.no_grad()
def test_an_encoder_of_sentences_takes_texts_of_any_length(target: str, tmp_path: Path) -> None:
    model, given = Sentences(), sentences(3, 9)
    axes = {name: {0: "batch", 1: "tokens"} for name in given}
    deployed = sf.deploy(model, given, target=target, seconds=0, axes=axes)
    folded = deployed.report.steps[1].did
    assert folded == "4 of 5 norms folded"  # the last one is the output
    loaded = sf.load_deployed(deployed.save(tmp_path / "deployed"))
    sizes = [(1, 5), (4, 20)] if TARGETS[target].any_batch else [(3, 9)]
    for batch, length in sizes:
        other = sentences(batch, length, seed=1)
        expected, found = model(**other), loaded(**other)
        assert found.keys() == expected.keys()
        for name, output in expected.items():
            torch.testing.assert_close(found[name], output, rtol=1e-3, atol=1e-4)
    if TARGETS[target].any_batch:
        with pytest.raises(ValueError, match=r"inputs must share one number of tokens of at least 1, got \[5, 6\]"):
            loaded(tokens(1, 5), torch.ones(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"input_ids must be int64 \(.*\), got float32"):
        loaded(torch.rand(3, 9), given["attention_mask"])


def test_mistakes_about_axes_and_targets_are_told() -> None:
    decoder = StaticDecoder(talkative(num_hidden_layers=1), 16)
    given = decoder.inputs(tokens(1, 4))
    with pytest.raises(ValueError, match="there is no input 'ids' to name axes of; the inputs are input_ids, position"):
        sf.deploy(decoder, given, target="torch", seconds=0, axes={"ids": {0: "batch"}})
    with pytest.raises(ValueError, match="input_ids has axes 0 to 1, got 2"):
        sf.deploy(decoder, given, target="torch", seconds=0, axes={"input_ids": {2: "batch"}})
    with pytest.raises(
        ValueError, match="executorch takes no such model; use onnxruntime or openvino or torch or aoti"
    ):
        KINDS["decoder"].check_target("executorch")
