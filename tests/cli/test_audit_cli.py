"""`slab audit`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import slabformer as sf
from language_models import save_encoder, write_lines
from slabformer.cli.main import main
from slabformer.nn.controls import prepbn_modules
from slabformer.surgery.conversion_plan import ConversionPlan
from slabformer.tasks.saved_model import ModelInfo, load_model, save_model


def factory() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3), nn.LayerNorm(3)), torch.randn(2, 4, 6)


class Shared(nn.Module):
    """One Linear under two names, behind two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.one = self.two = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.norm1(x)) + self.two(self.norm2(x.tanh()))


def shared() -> tuple[nn.Module, Tensor]:
    return Shared(), torch.randn(2, 4, 6)


def wrong() -> int:
    return 3


def test_a_name_is_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "audit.json"
    assert main(["audit", "test_vit", "--input-size", "32", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "13 of 13 norms would fold" in printed
    assert "norms take about" in printed
    found = json.loads(report.read_text())
    assert (found["num_folded"], found["num_kept"]) == (13, 0)
    assert 0 < found["norm_seconds"] < found["forward_seconds"]


def test_a_factory_is_audited(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", f"{__name__}:factory", "--no-time"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 norms would fold (1 forward, 1 backward)" in printed
    assert "norms take" not in printed


@pytest.mark.parametrize(
    ("options", "found"), [([], "0 of 2 norms"), (["--untie"], "2 of 2 norms")], ids=["", "untied"]
)
def test_a_factory_is_audited_with_its_layers_untied(
    options: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", f"{__name__}:shared", "--no-time", *options]) == 0
    assert f"{found} would fold" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--no-time", "--input-size", "48"], ["--meta"]], ids=["resized", "meta"])
@pytest.mark.parametrize(
    ("settings", "norms"),
    [
        ({"architecture": "test_vit", "model_args": {"img_size": 32}}, "13 of 13"),
        (
            {
                "model_type": "llama",
                "vocab_size": 50,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 64,
            },
            "2 of 3",
        ),
    ],
    ids=["timm", "transformers"],
)
def test_a_folder_is_audited(
    settings: dict[str, object], norms: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert main(["audit", str(tmp_path), *options]) == 0
    assert f"{norms} norms would fold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_tinny", "unknown model"),
        ("no_such_module:factory", "is no module:factory that can be called"),
        (f"{__name__}:wrong", "must return (model, example inputs), got int"),
        (".", "holds no config.json"),
    ],
    ids=["name", "module", "factory", "folder"],
)
def test_what_cannot_be_audited_is_refused_in_one_line(
    model: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", model]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


SIZE = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with LayerNorms that were drawn anew, and images of noise."""
    folder = tmp_path_factory.mktemp("audit")
    torch.manual_seed(0)
    arguments = {"img_size": SIZE, "patch_size": 4}
    model = timm.create_model("test_vit", **arguments)
    sf.testing.randomize_norms_(model, 0)
    info = ModelInfo(
        model="test_vit",
        model_args=arguments,
        class_names=[str(label) for label in range(1000)],
        input_size=(3, SIZE, SIZE),
    )
    save_model(model.eval(), folder / "model.safetensors", info)
    (folder / "photos").mkdir()
    for index in range(20):
        pixels = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    return folder


def with_data(place: Path, *options: str) -> list[str]:
    data = ("--data", str(place / "photos"), "--batch-size", "4", "--num-batches", "1", "--no-time")
    return ["audit", str(place / "model.safetensors"), *data, *options]


def test_data_tells_what_each_norm_costs_and_writes_a_plan(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    assert main(with_data(place, "--budget", "0.5", "--plan", str(plan))) == 0
    printed = capsys.readouterr().out
    assert "13 of 13 norms would fold" in printed
    assert "what losing each norm costs" in printed
    assert printed.endswith(f"wrote {plan}\n")
    written = ConversionPlan.from_dict(json.loads(plan.read_text()))
    assert written.summary() in printed
    assert written.budget == 0.5
    assert 0 < written.cost <= 0.5
    model, _ = load_model(place / "model.safetensors")
    sf.convert_norms_(model, plan=written)
    assert {*prepbn_modules(model)} == {*written.take}


def test_costs_and_plan_are_in_the_document(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(with_data(place, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(cost) for cost in found["costs"]] == [{"name", "r2", "tokens", "first_token", "channels", "alone"}] * 13
    assert len(found["plan"]["take"]) + len(found["plan"]["keep"]) == 13


def test_data_tells_what_linear_attention_costs_and_saves(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "attentions.json"
    assert main(with_data(place, "--attention-budget", "0.9", "--attention-plan", str(plan))) == 0
    printed = capsys.readouterr().out
    assert "what making each attention linear costs" in printed
    assert "million multiply-adds of attention's products for each sample" in " ".join(printed.split())
    written = ConversionPlan.from_dict(json.loads(plan.read_text()))
    assert written.summary() in " ".join(printed.split())
    model, _ = load_model(place / "model.safetensors")
    assert sf.convert_attention_(model, plan=written) == list(written.take)
    assert main(with_data(place, "--json")) == 0
    found = json.loads(capsys.readouterr().out)["attentions"]
    assert [set(cost) for cost in found["costs"]] == [{"name", "error", "alone", "products", "saved"}] * 6


def test_a_text_encoder_is_audited_on_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = save_encoder(tmp_path / "bert"), write_lines(tmp_path / "text.txt", 20)
    assert main(["audit", str(folder), "--data", str(text), "--no-time", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["costs"]) == 5
    assert "attentions" not in found
    assert main(["audit", str(folder), "--data", str(text), "--attention-budget", "0.1"]) == 2
    assert "no softmax attention of BertModel to convert" in capsys.readouterr().err
    (text := tmp_path / "empty.txt").write_text("")
    assert main(["audit", str(folder), "--data", str(text)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    [
        ["--budget", "0.1"],
        ["--plan", "p.json"],
        ["--attention-budget", "0.1"],
        ["--attention-plan", "p.json"],
        ["--num-batches", "2"],
        ["--pretrained"],
    ],
)
def test_options_of_data_need_data(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "test_vit", *option]) == 2
    assert capsys.readouterr().err == f"slab: {option[0]} has no effect without data; give --data PATH too\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "1e-12"], "no norm can go within a budget of 1e-12"),
        (["--budget", "0"], "--budget must be above 0"),
        (["--plan", "nowhere/plan.json"], "--plan has no folder 'nowhere'"),
        (["--data", "empty"], "no images in"),
        (["--data", "nowhere"], "nowhere"),
        (["--meta"], "--data needs the model's weights, which --meta does not allocate"),
        (["--pretrained"], "holds its weights"),
    ],
    ids=["budget", "zero", "plan", "empty", "missing", "meta", "pretrained"],
)
def test_what_is_wrong_with_data_is_told_in_one_line(
    place: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(with_data(place, *options)) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [("test_vit", "names a model without weights"), (f"{__name__}:factory", "slabformer.audit(model, batches=...)")],
    ids=["name", "factory"],
)
def test_data_needs_a_trained_model(place: Path, model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", model, "--data", str(place / "photos")]) == 2
    assert message in capsys.readouterr().err
