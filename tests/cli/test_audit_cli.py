"""`slab audit`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slabformer.cli.main import main


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
