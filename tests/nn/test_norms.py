"""The one table of norms, and what one more row of it does."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer._norm_names import norm_names
from slabformer.nn.norms import resolve_norm_layer, rows, type_of
from slabformer.surgery.recognise import NormForm, recognise
from slabformer.testing import randomize_norms_
from tolerances import EXACT, FLOAT32, assert_close

C = 8
#: where a library keeps the norms that the table names, those that are on this machine alone
HOMES = {
    "torch": ["torch.nn"],
    "timm": ["timm.layers"],
    "torchvision": ["torchvision.ops.misc", "torchvision.models.convnext"],
    "transformers": [
        f"transformers.models.{name}.modeling_{name}"
        for name in ("convnext", "cohere", "llama", "t5", "gemma2", "detr")
    ],
}
NAMED = [(row, library, name) for row in rows() for library in HOMES for name in row.elsewhere.get(library, ())]


class MeanAbsNorm(nn.Module):
    """A norm that nobody here knows: each token over its mean absolute value."""

    def __init__(self, dim: int, eps: float = 1e-6, device: torch.device | None = None, dtype: object = None) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (dim,), eps
        self.gain = nn.Parameter(torch.ones(dim, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class RunningMax(nn.Module):
    """And one that is a scale per channel in eval mode: over the largest value so far."""

    def __init__(self, dim: int, device: torch.device | None = None, dtype: object = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("largest", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.largest = torch.maximum(self.largest, x.detach().abs().flatten(0, -2).amax(0))
        return x * (self.weight / self.largest) + self.bias


@pytest.fixture
def outside() -> Iterator[None]:
    """Two rows from outside the package, through public names alone."""
    handles = [
        sf.register_norm(
            sf.NormType(
                name="meanabs",
                title="MeanAbsNorm",
                matches=lambda module: isinstance(module, MeanAbsNorm),
                build=MeanAbsNorm,
                settings={"eps": "eps"},
                normalise=lambda x, dim: x / x.abs().mean(dim, keepdim=True),
            )
        ),
        sf.register_norm(
            sf.NormType(
                name="runningmax",
                title="RunningMax",
                matches=lambda module: isinstance(module, RunningMax),
                build=RunningMax,
                scale_shift=lambda m: ((m.weight / m.largest).double().detach(), m.bias.double().detach()),
            )
        ),
    ]
    yield
    for handle in handles:
        handle.remove()


def block(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, C), norm, nn.Linear(C, 3))


@pytest.mark.usefixtures("outside")
def test_one_row_from_outside_is_converted() -> None:
    model, x = randomize_norms_(block(MeanAbsNorm(C))), torch.randn(2, 5, 4)
    before = model(x)
    assert sf.convert_norms_(model) == ["1"]
    assert isinstance(model[1], sf.PRepBN)
    assert_close(model.train()(x), before, EXACT)  # gamma is 1
    assert_close(model[1].rep.weight, model[1].norm.gain, FLOAT32)


@pytest.mark.usefixtures("outside")
def test_one_row_from_outside_is_converted_to_trained_saved_and_folded(tmp_path: object) -> None:
    model, x = randomize_norms_(block(nn.LayerNorm(C))), torch.randn(2, 5, 4)
    weight = model[1].weight.clone()
    sf.convert_norms_(model, norm="runningmax")
    assert_close(model[1].weight, weight, EXACT)
    model.train()(x).sum().backward()
    fused, report = sf.fuse(model.eval(), x)
    assert report.num_folded == 1
    sf.verify(model, fused, [x])
    again = block(RunningMax(C))
    sf.save_fused(fused, f"{tmp_path}/fused.safetensors")
    assert_close(sf.load_fused(again.eval(), f"{tmp_path}/fused.safetensors")(x), fused(x), EXACT)


@pytest.mark.usefixtures("outside")
def test_models_take_a_norm_from_outside_by_its_name() -> None:
    assert isinstance(resolve_norm_layer("RunningMax")(C), RunningMax)
    assert resolve_norm_layer("meanabs", eps=1e-3)(C).eps == 1e-3


def test_a_removed_row_is_gone() -> None:
    row = sf.NormType(name="gone", title="Gone", matches=lambda module: False, build=nn.LayerNorm)
    handle = sf.register_norm(row)
    assert "gone" in norm_names()
    handle.remove()
    handle.remove()
    assert "gone" not in norm_names()
    assert "gone" not in sf.norm_types()


def test_the_row_that_was_registered_last_counts() -> None:
    first, last = (
        sf.register_norm(
            sf.NormType(name=name, title=name, matches=lambda m: isinstance(m, nn.BatchNorm1d), build=nn.Identity)
        )
        for name in ("first", "last")
    )
    assert type_of(nn.BatchNorm1d(C)) is last.row
    last.remove()
    assert type_of(nn.BatchNorm1d(C)) is first.row
    first.remove()
    assert type_of(nn.BatchNorm1d(C)).name == "batchnorm2d"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"name": "RMS", "build": nn.RMSNorm}, "name of a norm must be a lower-case identifier .*, got 'RMS'"),
        (
            {"build": nn.RMSNorm, "settings": {"epsilon": "eps"}},
            "asks for the setting 'epsilon'; there are eps, bn_eps",
        ),
        ({}, "norm 'mine' needs one of build, normalise, gain_and_offset and scale_shift"),
    ],
    ids=["name", "setting", "empty"],
)
def test_a_row_that_cannot_be_used_is_refused(row: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sf.NormType(**{"name": "mine", "title": "Mine", "matches": lambda module: False, **row})


def test_a_name_that_is_taken_is_refused() -> None:
    row = sf.NormType(name="rmsnorm", title="Mine", matches=lambda module: False, build=nn.RMSNorm)
    with pytest.raises(ValueError, match="there is a norm 'rmsnorm' already"):
        sf.register_norm(row)
    with pytest.raises(TypeError, match="register_norm takes a NormType, got str"):
        sf.register_norm("rmsnorm")


def test_an_unknown_name_is_answered_by_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown norm 'rmsnrm'; did you mean 'rmsnorm'\? choose from prepbn, repbn"):
        resolve_norm_layer("rmsnrm")
    with pytest.raises(
        ValueError, match=r"norm must be one of prepbn, .*dyt.*, got 'layernrm'; did you mean 'layernorm'"
    ):
        sf.convert_norms_(block(nn.LayerNorm(C)), norm="layernrm")


@pytest.mark.parametrize(("row", "library", "name"), NAMED, ids=[f"{library}.{name}" for _, library, name in NAMED])
def test_what_others_call_a_norm_is_that_norm(row: sf.NormType, library: str, name: str) -> None:
    homes = [importlib.import_module(home) for home in HOMES[library]]
    kind = next(getattr(home, name) for home in homes if hasattr(home, name))
    module = kind(C)
    if row.normalise is not None:
        found = recognise(module)
        assert isinstance(found, NormForm)
        assert found.kind == row.name
    elif row.name == "batchnorm":  # the same function of tokens flattened to a batch
        ours = sf.TokenBatchNorm(C)
        ours.load_state_dict(module.state_dict())
        x = torch.randn(5, C)
        assert_close(ours(x), module(x), FLOAT32)
    else:
        assert type_of(module) is row


def test_names_and_rows_are_the_same() -> None:
    assert set(norm_names()) == {name for name, row in sf.norm_types().items() if row.build is not None}


def test_modules_match_the_row_that_builds_them() -> None:
    for name in norm_names():
        assert type_of(resolve_norm_layer(name)(C)).name == name


@pytest.mark.parametrize("name", norm_names())
def test_every_norm_is_built_where_it_is_asked_for(name: str) -> None:
    norm = resolve_norm_layer(name, eps=1e-3)(C, device="meta", dtype=torch.float64)
    assert {p.device.type for p in norm.parameters()} == {"meta"}
    assert {p.dtype for p in norm.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", norm_names())
def test_conversion_to_every_norm_keeps_gain_and_offset(name: str) -> None:
    model = randomize_norms_(block(nn.LayerNorm(C) if name != "layernorm" else nn.RMSNorm(C)))
    old = copy.deepcopy(model[1])
    assert sf.convert_norms_(model, norm=name) == ["1"]
    assert type_of(model[1]).name == name
    assert_close(model[1].weight, old.weight, FLOAT32)
    has_offset = getattr(sf.norm_types()[name].build(C), "bias", None) is not None
    if getattr(old, "bias", None) is not None and has_offset:
        assert_close(model[1].bias, old.bias, FLOAT32)
    model(torch.randn(2, 5, 4)).sum().backward()


def test_an_offset_without_a_place_is_told(caplog: pytest.LogCaptureFixture) -> None:
    sf.convert_norms_(randomize_norms_(block(nn.LayerNorm(C))), norm="rmsnorm")
    assert "1 norms lose their offset: a RMSNorm has none, the LayerNorm had" in caplog.text
    caplog.clear()
    sf.convert_norms_(block(nn.LayerNorm(C)), norm="rmsnorm")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_norms_that_are_of_that_kind_already_are_left() -> None:
    model = nn.Sequential(nn.LayerNorm(C), nn.RMSNorm(C))
    assert sf.convert_norms_(model, norm="rmsnorm") == ["0"]
    with pytest.raises(
        ValueError, match="no LayerNorm or RMSNorm to convert in Sequential; it holds 2 RMSNorm already"
    ):
        sf.convert_norms_(model, norm="rmsnorm")


def test_norms_of_maps_are_left_where_the_new_one_is_of_tokens() -> None:
    class Norm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    model = nn.Sequential(Norm2d(C), nn.LayerNorm(C))
    found = sf.convert_norms_(copy.deepcopy(model), norm="rmsnorm")
    assert found == ["1"]
    assert str(found.left[0]) == "0 (Norm2d) left as it is: it is over the channels of maps, RMSNorm is not"
    assert sf.convert_norms_(model, norm="dyt") == ["0", "1"]
    assert model[0](torch.randn(2, C, 4, 3)).shape == (2, C, 4, 3)


def test_a_model_of_dynamic_tanh_loses_it() -> None:
    model, x = randomize_norms_(block(sf.DyT(C))), torch.randn(2, 5, 4)
    before = model(x)
    sf.convert_norms_(model)
    assert_close(model.train()(x), before, EXACT)
    model[1].set_gamma(0)
    fused, report = sf.fuse(model.eval(), x)
    assert report.num_folded == 1
    sf.verify(model, fused, [x])


def test_a_skip_weight_is_for_norms_that_have_one() -> None:
    assert resolve_norm_layer("repbn", eta=0.25)(C).eta.item() == 0.25
    assert resolve_norm_layer("prepbn", eta=0.0)(C).rep.eta.item() == 0
    for fails in (
        lambda: resolve_norm_layer("batchnorm", eta=0.0),
        lambda: sf.convert_norms_(block(nn.LayerNorm(C)), norm="batchnorm", eta=0.0),
    ):
        with pytest.raises(
            ValueError, match=r"eta is for norms with a skip \(prepbn, repbn\), and 'batchnorm' has none"
        ):
            fails()


def test_progressive_is_an_older_spelling() -> None:
    model = block(nn.LayerNorm(C))
    with pytest.warns(DeprecationWarning, match="progressive=False is now norm='repbn'"):
        sf.convert_norms_(model, progressive=False)
    assert isinstance(model[1], sf.RepBN)


def test_parameters_of_all_norms_that_torch_does_not_bring_are_spared_from_decay() -> None:
    model = nn.Sequential(sf.TokenBatchNorm(C), sf.DyT(C), nn.Linear(C, C), nn.LayerNorm(C))
    names = ["0.weight", "0.bias", "1.alpha", "1.weight", "1.bias"]
    assert list(sf.norm_parameters(model)) == names
