"""`slab convert`: models of images and text lose their norms; runs go on; mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, ViTImageProcessor, ViTModel

from csv_files import csv_rows
from image_folders import picture
from language_models import save_encoder, write_lines
from slabformer.cli.main import main
from slabformer.converting import ConvertConfig, convert, lose_norms
from slabformer.converting.attention import make_linear_
from slabformer.converting.order import StepOrder
from slabformer.converting.run import rate_for
from slabformer.converting.subjects import open_subject
from slabformer.distillation import Teacher
from slabformer.nn import RepBN
from slabformer.tasks.language.folders import load_model_folder
from slabformer.tasks.saved_model import ModelInfo, load_model, save_model
from slabformer.testing import randomize_norms_
from students import vit
from tiny_training import AtStep

ARGUMENTS = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 16, "num_classes": 3}
TINY: dict[str, Any] = {
    **{"steps": 6, "evaluations": 3, "batch_size": 4, "held_out": 6, "fit_batches": 2, "recalibrate_batches": 2},
    **{"log_every": 1, "device": "cpu"},
}


class InterruptedRunError(Exception):
    pass


def stop() -> None:
    raise InterruptedRunError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made = randomize_norms_(timm.create_model("deit_micro", **ARGUMENTS))
    info = ModelInfo(model="deit_micro", model_args=ARGUMENTS, class_names=list("abc"), input_size=(3, 16, 16))
    save_model(made, tmp_path / "model.safetensors", info)
    return tmp_path / "model.safetensors"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for index in range(20):
        picture(index).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT with its tokenizer, in a folder."""
    return save_encoder(tmp_path / "bert")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_image_model_loses_its_norms(model: Path, images: Path, tmp_path: Path) -> None:
    result = lose_norms(model, images, tmp_path / "run", **TINY)
    assert not [module for module in result.model.modules() if isinstance(module, (RepBN, torch.nn.LayerNorm))]
    summary = result.summary
    assert summary == json.loads((tmp_path / "run" / "result.json").read_text())
    assert summary["norms_folded"] == 3
    assert summary["difference"] < 1e-4
    for stage in ("start", "trained", "recalibrated", "fused"):
        assert {"cosine", "agreement"} == summary[stage].keys()
        assert -1 <= summary[stage]["cosine"] <= 1
    assert summary["fused"]["cosine"] == pytest.approx(summary["recalibrated"]["cosine"], abs=1e-5)
    fused, info = load_model(tmp_path / "run" / "fused.safetensors")
    assert info.fused
    inputs = torch.randn(2, 3, 16, 16)
    assert torch.allclose(fused(inputs), result.model(inputs), atol=1e-5)
    steps = csv_rows(tmp_path / "run" / "steps.csv")
    assert len(steps) == 6
    assert all(float(row["grad_norm"]) >= 0 and row["logits"] for row in steps)
    assert [row["epoch"] for row in csv_rows(tmp_path / "run" / "metrics.csv")] == ["0", "1", "2", "3"]


def test_the_report_stands_alone(model: Path, images: Path, tmp_path: Path) -> None:
    lose_norms(model, images, tmp_path / "run", **TINY)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "") or "src=" not in page
    assert "<script" not in page
    assert "3 of 3" in page
    for words in ("after the start", "after training", "after recalibration", "gradient norm", "norm1"):
        assert words in page


VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 3}


@pytest.fixture
def softmax(tmp_path: Path) -> Path:
    """A ViT with 65 tokens, enough for linear attention to save something."""
    torch.manual_seed(0)
    made = randomize_norms_(timm.create_model("vit_tiny_patch16_224", **VIT))
    info = ModelInfo(model="vit_tiny_patch16_224", model_args=VIT, class_names=list("abc"), input_size=(3, 32, 32))
    save_model(made, tmp_path / "softmax.safetensors", info)
    return tmp_path / "softmax.safetensors"


@pytest.mark.parametrize(
    ("options", "linear"),
    [({"attention": "all"}, 2), ({"attention": "plan"}, 2), ({"attention": "plan", "attention_budget": 0.02}, None)],
    ids=["all", "plan", "budget"],
)
def test_attention_becomes_linear_too(
    options: dict[str, Any], linear: int | None, softmax: Path, images: Path, tmp_path: Path
) -> None:
    result = lose_norms(softmax, images, tmp_path / "run", **TINY, **options)
    summary = result.summary
    assert summary["norms_folded"] == 5
    assert summary["attentions_linear"] + summary["attentions_kept"] == 2
    assert linear in (None, summary["attentions_linear"])
    assert len(summary["attention_errors"]) == summary["attentions_linear"] > 0
    assert all(0 < error < 1 for error in summary["attention_errors"].values())
    noted = json.loads((tmp_path / "run" / "attention.json").read_text())
    fused, info = load_model(tmp_path / "run" / "fused.safetensors")
    assert noted["names"] == info.attentions[0].names
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.allclose(fused(inputs), result.model(inputs), atol=1e-5)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<b>{summary['attentions_linear']} of 2</b> softmax attentions became linear" in page


def test_a_conversion_of_attention_goes_on_bit_for_bit(softmax: Path, images: Path, tmp_path: Path) -> None:
    settings = TINY | {"save_every": 1, "attention": "plan", "attention_budget": 0.02, "align_steps": 2}
    lose_norms(softmax, images, tmp_path / "whole", **settings)
    halved = ConvertConfig(model=str(softmax), data=str(images), output=str(tmp_path / "halved"), **settings)
    with pytest.raises(InterruptedRunError):
        convert(halved, observers=[AtStep(4, stop)])
    noted = tmp_path / "halved" / "attention.json"
    kept = noted.read_text()
    noted.write_text("{}")
    with pytest.raises(ValueError, match=r"does not say which attentions the run made linear .*names"):
        convert(halved)
    noted.write_text(kept)
    convert(halved)
    whole, again = (load_file(tmp_path / name / "fused.safetensors") for name in ("whole", "halved"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_norms_outside_the_plan_stay(softmax: Path, images: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"take": ["blocks.0.norm1", "norm"], "keep": ["blocks.1.norm2"], "cost": 0.1}))
    result = lose_norms(softmax, images, tmp_path / "run", **TINY, plan=str(plan))
    assert (result.summary["norms_folded"], result.summary["norms_left"]) == (2, 3)
    assert [name for name, module in result.model.named_modules() if isinstance(module, torch.nn.LayerNorm)] == [
        *("blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2")
    ]
    fused, _ = load_model(tmp_path / "run" / "fused.safetensors")
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.allclose(fused(inputs), result.model(inputs), atol=1e-5)
    assert "<b>3</b> stay as planned" in (tmp_path / "run" / "report.html").read_text()


def test_a_conversion_within_a_budget_goes_on_bit_for_bit(encoder: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "text.txt", 60)
    settings = TINY | {"save_every": 1, "budget": 0.003}
    whole = lose_norms(encoder, text, tmp_path / "whole", **settings)
    noted = json.loads((tmp_path / "whole" / "norms.json").read_text())
    assert 0 < len(noted["take"]) < 5
    assert noted["cost"] <= noted["budget"] == 0.003
    assert whole.summary["norms_left"] == len(noted["keep"])
    halved = ConvertConfig(model=str(encoder), data=str(text), output=str(tmp_path / "halved"), **settings)
    with pytest.raises(InterruptedRunError):
        convert(halved, observers=[AtStep(4, stop)])
    (tmp_path / "halved" / "norms.json").rename(tmp_path / "kept.json")
    with pytest.raises(ValueError, match="does not say which norms the run converts"):
        convert(halved)
    (tmp_path / "kept.json").rename(tmp_path / "halved" / "norms.json")
    convert(halved)
    one, other = (load_file(tmp_path / name / "fused" / "fused.safetensors") for name in ("whole", "halved"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (None, "No such file"),
        ({"take": ["norm9"], "keep": [], "cost": 0}, r"names 1 norm that the model does not have .*'norm9'"),
        ({"take": ["norm"]}, r"plan.json: not a conversion plan"),
        ({"take": ["blocks.0.attn"], "keep": [], "cost": 0, "of": "attentions"}, "give it to convert_attention_"),
    ],
    ids=["missing", "unknown", "damaged", "attentions"],
)
def test_a_plan_that_does_not_fit_leaves_nothing_behind(
    plan: dict[str, Any] | None, words: str, softmax: Path, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    if plan is not None:
        file.write_text(json.dumps(plan))
    with pytest.raises((OSError, ValueError), match=words) as error:
        lose_norms(softmax, images, tmp_path / "run", **TINY, plan=str(file))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_plan_and_budget_are_one_too_many(softmax: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plan and budget both say which norms go; give one of them"):
        lose_norms(softmax, images, tmp_path / "run", plan="plan.json", budget=0.1)


def test_ranks_go_on_with_the_first_ones_attention(
    softmax: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has aligned it on data of its own; norms are fitted on one model."""
    sent: list[torch.Tensor] = []
    group = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, broadcast=lambda tensor, source: sent.append(tensor)
    )
    monkeypatch.setattr("slabformer.converting.attention.dist", group)
    config = ConvertConfig(
        model=str(softmax), data=str(images), output=str(tmp_path / "run"), **TINY, attention="all", align_steps=1
    )
    subject = open_subject(config, 0, 1)
    make_linear_(subject.model, Teacher(subject.model), subject.loader, subject.held_out, config)
    assert {tensor.data_ptr() for tensor in sent} == {p.data_ptr() for p in subject.model.parameters()}


def test_settings_of_attention_without_effect_are_refused(softmax: Path, images: Path, tmp_path: Path) -> None:
    for settings, words in (
        ({"attention_budget": 0.1}, "attention_budget has no effect with attention 'none'; set attention to plan"),
        ({"attention": "all", "attention_budget": 0.1}, "has no effect with attention 'all'; set attention to plan"),
        ({"align_steps": 5}, "align_steps has no effect with attention 'none'; set attention to all or plan"),
    ):
        with pytest.raises(ValueError, match=words):
            lose_norms(softmax, images, tmp_path / "run", **TINY, **settings)
    assert not (tmp_path / "run").exists()


def test_a_text_encoder_loses_its_norms(encoder: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "text.txt", 60)
    result = lose_norms(encoder, text, tmp_path / "run", **TINY)
    assert result.summary["norms_folded"] + result.summary["norms_kept"] == 5
    assert "agreement" not in result.summary["fused"]
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with torch.no_grad():
        outputs = [load_model_folder(tmp_path / "run" / name)(**batch).last_hidden_state for name in ("model", "fused")]
    assert torch.allclose(*outputs, atol=1e-3)
    assert (tmp_path / "run" / "fused" / "tokenizer.json").exists()


def test_a_sentence_encoder_saved_without_pooler_loses_its_norms(encoder: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(encoder)
    assert not [name for name in load_file(encoder / "model.safetensors") if name.startswith("pooler")]
    result = lose_norms(encoder, write_lines(tmp_path / "text.txt", 60), tmp_path / "run", **TINY)
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    read = [load_model_folder(tmp_path / "run" / name) for name in ("model", "fused")]
    with torch.no_grad():
        outputs = [model(**batch) for model in (*read, result.model)]
    assert all(output.pooler_output is None for output in outputs)
    assert torch.allclose(outputs[0].last_hidden_state, outputs[1].last_hidden_state, atol=1e-3)
    assert torch.equal(outputs[1].last_hidden_state, outputs[2].last_hidden_state)


def test_an_encoder_without_other_weights_is_refused(encoder: Path, tmp_path: Path) -> None:
    weights = load_file(encoder / "model.safetensors")
    for missing in ("pooler.dense.bias", "encoder.layer.1.output.dense.bias"):
        kept = {name: tensor for name, tensor in weights.items() if name != missing}
        save_file(kept, encoder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"1 tensors missing \(first: {missing}\)"):
            lose_norms(encoder, write_lines(tmp_path / "text.txt", 60), tmp_path / "run", **TINY)


def test_an_image_encoder_of_transformers_loses_its_norms(images: Path, tmp_path: Path) -> None:
    randomize_norms_(ViTModel(vit().config)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    result = lose_norms(tmp_path / "vit", images, tmp_path / "run", **TINY)
    assert result.summary["norms_folded"] >= 4


@pytest.mark.parametrize("step", [1, 3])
def test_a_conversion_goes_on_bit_for_bit(step: int, model: Path, images: Path, tmp_path: Path) -> None:
    settings = TINY | {"save_every": 1}
    lose_norms(model, images, tmp_path / "whole", **settings)
    halved = ConvertConfig(model=str(model), data=str(images), output=str(tmp_path / "halved"), **settings)
    with pytest.raises(InterruptedRunError):
        convert(halved, observers=[AtStep(step + 1, stop)])
    convert(halved)
    whole, again = (load_file(tmp_path / name / "fused.safetensors") for name in ("whole", "halved"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (tmp_path / "whole/metrics.csv").read_text().count("\n") == 5
    assert (tmp_path / "halved/metrics.csv").read_text().count("\n") == 5


def test_the_command_line_converts_refuses_a_used_folder_and_starts_again(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(model), "--data", str(images), "--output", str(tmp_path / "run")]
    options += [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    assert main(["convert", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"finished: {tmp_path / 'run'}  cosine ")
    assert "norms_folded 3" in captured.out
    assert "epoch 3: train_loss" in captured.err
    assert "cosine" in captured.err
    assert main(["convert", *options]) == 0
    assert capsys.readouterr().out.startswith("already finished")
    assert main(["convert", *options, "--resume", "never"]) == 2
    assert "holds a run already; pass --overwrite true" in capsys.readouterr().err
    assert main(["convert", *options, "--lr", "1e-5"]) == 2
    assert "lr was None, now 1e-05" in capsys.readouterr().err
    (tmp_path / "run" / "mine.txt").write_text("kept")
    assert main(["convert", *options, "--lr", "1e-5", "--overwrite", "true"]) == 0
    assert (tmp_path / "run" / "mine.txt").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "deit_mic"}, "unknown model 'deit_mic'"),
        ({"model": "gone.safetensors"}, "gone.safetensors"),
        ({"model": "{images}"}, "the folder holds no config.json"),
        ({"data": "nowhere"}, "no data at 'nowhere'"),
        ({"model": "{encoder}", "data": "{images}"}, "no text at"),
        ({"batch_size": 1000}, "do not fill one batch of 1000"),
        ({"image_size": 32}, "takes images of 16 pixels; leave image_size out"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
    ids=["name", "file", "folder", "data", "images for text", "batch", "size", "steps"],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(
    changes: dict[str, Any], words: str, model: Path, images: Path, encoder: Path, tmp_path: Path
) -> None:
    places = {"{images}": str(images), "{encoder}": str(encoder)}
    given = {"model": str(model), "data": str(images)} | {
        name: places.get(value, value) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        convert(ConvertConfig(**TINY | given | {"output": str(tmp_path / "run")}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_has_no_part_in_the_loss_is_not_trained(encoder: Path, tmp_path: Path) -> None:
    result = lose_norms(encoder, write_lines(tmp_path / "text.txt", 60), tmp_path / "run", **TINY)
    before, after = (
        load_file(encoder / "model.safetensors"),
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
    )
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    assert same == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(parameter.requires_grad for parameter in result.model.parameters())


def test_a_converted_model_is_not_converted_again(encoder: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "text.txt", 60)
    lose_norms(encoder, text, tmp_path / "run", **TINY)
    with pytest.raises(ValueError, match="whose norms were converted before; give the original"):
        lose_norms(tmp_path / "run" / "model", text, tmp_path / "other", **TINY)


def test_steps_go_through_the_data_again_and_again_from_any_place() -> None:
    def order() -> StepOrder:
        return StepOrder(10, 5, batch_size=3, seed=0, rank=0, world_size=1)

    whole = order()
    taken = []
    for part in range(2):
        whole.epoch = part
        taken += whole.take()
    assert len(taken) == 10
    for start in range(0, 9, 3):  # three batches are one time through the data
        assert len({int(index) for batch in taken[start : start + 3] for index in batch}) == 9
    later = order()
    later.epoch, later.start = 1, 2
    assert [list(batch) for batch in later.take()] == [list(batch) for batch in taken[7:]]


def test_ranks_share_each_batch() -> None:
    one = StepOrder(13, 4, batch_size=4, seed=0, rank=0, world_size=1)
    two = [StepOrder(13, 4, batch_size=2, seed=0, rank=rank, world_size=2) for rank in range(2)]
    for whole, *shares in zip(one.take(), *(order.take() for order in two), strict=True):
        assert list(whole) == [index for share in shares for index in share]


def test_the_rate_falls_with_the_size_of_large_models() -> None:
    with torch.device("meta"):
        small, large = torch.nn.Linear(10, 10), torch.nn.Linear(20_000, 20_000)
    assert rate_for(small) == 3e-4
    assert rate_for(large) == pytest.approx(1.5e-4, rel=1e-2)
