"""Fused models as files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fusing import Net, fused, net, norm, ready, tokens
from slabformer.nn import Affine, Folded, PRepBN
from slabformer.surgery.fuse import load_fused, save_fused
from tolerances import EXACT, assert_close

X = tokens(2, 4, 6)


def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.c(m.b(m.two(m.a(m.one(x)) + x)) + m.three(x) + m.three(m.two_again(x)))


def build(norm_layer: Any = PRepBN, seed: int = 0) -> nn.Module:
    shared = norm_layer(6)
    children = {
        "one": norm_layer(6),
        "a": nn.Linear(6, 6, bias=False),
        "two": shared,
        "two_again": shared,
        "b": nn.Linear(6, 6),
        "three": norm_layer(6),
        "c": nn.Linear(6, 6),
    }
    return ready(Net(forward, **children), seed=seed)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model, _ = fused(build(), X)
    save_fused(model, tmp_path / "model.safetensors", {"task": "digits"})
    return model, tmp_path / "model.safetensors"


@pytest.mark.parametrize("norm_layer", [PRepBN, nn.LayerNorm, nn.Identity], ids=["PRepBN", "LayerNorm", "Identity"])
def test_a_file_restores_the_fused_model_whatever_norms_the_skeleton_has(norm_layer: Any, saved: Any) -> None:
    model, path = saved
    skeleton = build(norm_layer, seed=5)
    restored = load_fused(skeleton, path)
    assert restored is skeleton
    assert_close(restored(X), model(X), EXACT)
    assert isinstance(restored.one, Folded)
    assert isinstance(restored.three, Affine)
    assert restored.two is restored.two_again
    assert not restored.three.training


def test_a_restored_model_saves_to_the_same_file(saved: Any, tmp_path: Path) -> None:
    restored = load_fused(build(seed=3), saved[1])
    save_fused(restored, tmp_path / "again.safetensors", {"task": "digits"})
    with safe_open(saved[1], "pt") as one, safe_open(tmp_path / "again.safetensors", "pt") as other:
        assert one.metadata() == other.metadata()
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in one.keys())  # noqa: SIM118


def test_a_meta_skeleton_takes_the_files_tensors(saved: Any) -> None:
    model, path = saved
    assert_close(load_fused(build().to("meta"), path)(X), model(X), EXACT)


def test_the_header_keeps_the_callers_strings_and_no_temporary_file_stays(saved: Any) -> None:
    with safe_open(saved[1], "pt") as file:
        assert file.metadata()["task"] == "digits"
    assert [path.name for path in saved[1].parent.iterdir()] == ["model.safetensors"]


def test_tied_weights_are_written_once_and_restored(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = net(
            lambda m, ids: m.head(m.mix(m.norm(m.embed(ids)))),
            embed=nn.Embedding(5, 6),
            norm=norm(),
            mix=nn.Linear(6, 6),
            head=nn.Linear(6, 5, bias=False),
        )
        model.head.weight = model.embed.weight
        return model

    ids = torch.tensor([[0, 1, 4, 3]])
    model, _ = fused(tied(), ids)
    save_fused(model, tmp_path / "tied.safetensors")
    restored = load_fused(tied(), tmp_path / "tied.safetensors")
    assert restored.head.weight is restored.embed.weight
    assert_close(restored(ids), model(ids), EXACT)


def test_a_fixed_size_is_restored(tmp_path: Path) -> None:
    def small() -> nn.Module:
        return net(lambda m, x: m.linear(m.norm(x)), norm=norm(), linear=nn.Linear(6, 3))

    model, _ = fused(small(), X, fixed_size=True)
    save_fused(model, tmp_path / "fixed.safetensors")
    restored = load_fused(small(), tmp_path / "fixed.safetensors")
    assert_close(restored(X), model(X), EXACT)
    with pytest.raises(ValueError, match="for inputs of size 4x6, got 9x6"):
        restored(tokens(2, 9, 6))


def wider() -> nn.Module:
    model = build()
    model.c = nn.Linear(6, 7).double()
    return model


def without_a_norm() -> nn.Module:
    model = build()
    del model.three
    return model


def with_more() -> nn.Module:
    model = build()
    model.more = nn.Linear(2, 2)
    return model


def with_less() -> nn.Module:
    model = build()
    model.b = nn.Identity()
    return model


UNFIT = {
    "another shape": (wider, "2 of another shape (first: c.weight (6, 6), not (7, 6))"),
    "a norm absent": (without_a_norm, "1 norms absent (first: three)"),
    "missing": (with_more, "2 tensors missing (first: more.weight)"),
    "unexpected": (with_less, "2 unexpected (first: b.bias)"),
}


@pytest.mark.parametrize(("skeleton", "message"), UNFIT.values(), ids=UNFIT)
def test_a_skeleton_that_does_not_fit_is_refused_and_left_alone(skeleton: Any, message: str, saved: Any) -> None:
    model = skeleton()
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    with pytest.raises(ValueError) as caught:
        load_fused(model, saved[1])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unfused_model_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Net is not fused; call"):
        save_fused(build(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"not at all")
    for name, message in (
        ("plain", "is not a fused model's file"),
        ("noise", "is not a safetensors file, or is damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            load_fused(build(), tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_fused(build(), tmp_path / "absent.safetensors")
