"""Layers that stand under several names: they keep the norms in front of them, unless the caller has them untied."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fusing import X, assert_same_outputs, fused, net, norm, ready, tokens
from slabformer.surgery.audit import audit
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fuse import Reason, fuse, fuse_, load_fused, save_fused
from slabformer.surgery.fuse.tree.files import plain_
from tolerances import EXACT, assert_close


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def parallel(m: Any, x: Tensor) -> Tensor:
    x = x + m.mlp1(m.norm1(x))
    return x.tanh() + m.mlp2(m.norm2(x)) + m.mlp3(m.norm3(x.sin()))


def build(forward: Any = parallel, layer: type[nn.Module] = Mlp, **others: nn.Module) -> nn.Module:
    shared = layer()
    mlps = dict.fromkeys(("mlp1", "mlp2", "mlp3"), shared)
    return net(forward, norm1=norm(), norm2=norm(), norm3=norm(), **mlps, **others)


def test_a_layer_under_three_names_takes_three_norms_over_once_untied() -> None:
    model = build()
    result, report = fused(model, X, untie=True)
    assert [outcome.into for outcome in report] == [("mlp1.fc1",), ("mlp2.fc1",), ("mlp3.fc1",)]
    assert_same_outputs(model, result, (tokens(1, 7, 6),))
    assert_same_outputs(model, copy.deepcopy(result), (X,))
    assert model.mlp1 is model.mlp2 is model.mlp3


def test_what_stays_equal_is_still_one() -> None:
    result, _ = fuse(model := build(), X, untie=True)
    assert len({mlp.fc1 for mlp in (result.mlp1, result.mlp2, result.mlp3)}) == 3
    assert result.mlp1.fc2 is result.mlp2.fc2 is result.mlp3.fc2
    assert result.mlp1.act is result.mlp2.act is result.mlp3.act
    kept = {name for name in model.state_dict() if not name.startswith("norm")}
    assert result.state_dict().keys() == kept


def test_the_reason_says_that_untying_helps() -> None:
    _, report = fused(build(), X)
    assert {outcome.reason.partition("; ")[0] for outcome in report} == {
        "mlp1.fc1, one layer with mlp2.fc1 and 1 more, is also used on another input by a linear"
    }
    assert all(outcome.reason.endswith("; untie=True folds it forward") for outcome in report)


def test_a_layer_that_is_called_twice_under_one_name_keeps_both_norms() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        return m.mlp1(m.norm1(x)) + m.mlp1(m.norm2(x.tanh())) + m.mlp3(m.norm3(x.sin()))

    _, report = fused(build(twice), X)
    assert [outcome.reason.endswith("; untie=True folds it forward") for outcome in report] == [False, False, True]
    result, report = fused(build(twice), X, untie=True)
    assert [outcome.action for outcome in report] == ["kept", "kept", "forward"]
    assert report["norm1"].reason.startswith("mlp1.fc1 is also used on another input by a linear")
    assert result.mlp1 is result.mlp2
    assert result.mlp1.fc2 is result.mlp3.fc2


def test_a_layer_whose_other_names_are_never_called_stays_one() -> None:
    model = build(lambda m, x: m.mlp1(m.norm1(x)) + m.mlp1(m.norm2(x.sin())) + m.norm3(x).cos())
    result, report = fused(model, X, untie=True)
    assert report.num_kept == 3
    assert result.mlp1 is result.mlp2 is result.mlp3
    _, report = fused(model, X)
    assert not any("untie" in outcome.reason for outcome in report)


def test_one_norm_before_every_place_needs_no_untying() -> None:
    def one(m: Any, x: Tensor) -> Tensor:
        y = m.norm1(x)
        return m.mlp1(y) + m.mlp2(y.flip(1)) + m.norm2(x).cos() + m.norm3(x).cos()

    result, report = fused(build(one), X, untie=True)
    assert report["norm1"].into == ("mlp1.fc1",)
    assert result.mlp1 is result.mlp2 is result.mlp3


def test_a_layer_takes_norms_behind_it_over_too() -> None:
    def backward(m: Any, x: Tensor) -> Tensor:
        return m.norm1(m.mlp1(x)).tanh() + m.norm2(m.mlp2(x.sin())).cos() + m.norm3(m.mlp3(x)).cos()

    result, report = fused(build(backward), X, untie=True)
    assert [outcome.into for outcome in report] == [("mlp1.fc2",), ("mlp2.fc2",), ("mlp3.fc2",)]
    assert result.mlp1.fc1 is result.mlp3.fc1


def test_channels_laid_out_otherwise_in_another_place_are_untied() -> None:
    def flipped(m: Any, x: Tensor) -> Tensor:
        y = m.norm1(x)
        return m.mlp1(y) + m.mlp2(y.flip(-1)) + m.norm2(x).cos() + m.norm3(x).cos()

    assert "mlp2.fc1 and 1 more, is called on differently laid" in fused(build(flipped), X)[1]["norm1"].reason
    assert fused(build(flipped), X, untie=True)[1]["norm1"].into == ("mlp1.fc1", "mlp2.fc1")


class Block(nn.Module):
    """Holds a shared layer twice, and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.one = norm(), Mlp()
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y + self.two(self.inner(y.tanh()))


def test_shared_layers_inside_shared_blocks_are_untied() -> None:
    model = build(layer=Block)
    result, report = fused(model, X, untie=True)
    assert [outcome.into for outcome in report] == [
        *(("mlp1.one.fc1",), ("mlp2.one.fc1",), ("mlp3.one.fc1",)),
        ("mlp1.two.fc1", "mlp2.two.fc1", "mlp3.two.fc1"),
    ]
    assert result.mlp1.inner is result.mlp3.inner
    assert result.mlp1.one.fc2 is result.mlp3.two.fc2


def test_a_recurrent_layer_is_untied() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.mlp1(m.norm1(x))[0] + m.mlp2(m.norm2(x.sin()))[0] + m.mlp3(m.norm3(x.cos()))[0]

    def lstm() -> nn.LSTM:
        return nn.LSTM(6, 6, batch_first=True)

    result, report = fused(build(forward, lstm), X, untie=True)
    assert report.num_folded == 3
    assert result.mlp1.weight_hh_l0 is result.mlp3.weight_hh_l0
    assert result.mlp1.weight_ih_l0 is not result.mlp3.weight_ih_l0


def tied() -> nn.Module:
    """A head under two names whose weight is an embedding's."""

    def forward(m: Any, ids: Tensor) -> Tensor:
        x = m.embed(ids).tanh()
        return m.head1(m.norm1(x)) + m.head2(m.norm2(x.sin()))

    head = nn.Linear(6, 5)
    model = net(forward, embed=nn.Embedding(5, 6), norm1=norm(), norm2=norm(), head1=head, head2=head)
    head.weight = model.embed.weight
    return model


def test_shared_parameters_and_layers_are_untied_together(tmp_path: Path) -> None:
    model, ids = tied(), torch.tensor([[0, 1, 2, 4], [3, 3, 0, 1]])
    _, report = fused(model, ids)
    assert all(Reason.TIED in outcome.codes for outcome in report)
    result, report = fused(model, ids, untie=True)
    assert [outcome.into for outcome in report] == [("head1",), ("head2",)]
    assert torch.equal(result.embed.weight, model.embed.weight)
    save_fused(result, tmp_path / "untied.safetensors")
    assert_close(load_fused(tied(), tmp_path / "untied.safetensors")(ids), result(ids), EXACT)


def test_a_file_takes_the_skeletons_layers_apart_as_they_were(tmp_path: Path) -> None:
    model = build()
    result, _ = fuse(model, X, untie=True)
    save_fused(result, tmp_path / "untied.safetensors")
    restored = load_fused(build(), tmp_path / "untied.safetensors")
    assert_close(restored(X), result(X), EXACT)
    assert restored.mlp1.fc2.weight is restored.mlp3.fc2.weight
    save_fused(restored, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "untied.safetensors").read_bytes()


def test_a_file_of_shared_layers_leaves_the_skeletons_shared(tmp_path: Path) -> None:
    result, _ = fuse(build(lambda m, x: m.mlp2(m.norm1(x)).tanh() + m.norm2(x) + m.norm3(x)), X)
    save_fused(result, tmp_path / "shared.safetensors")
    restored = load_fused(skeleton := build(result.body), tmp_path / "shared.safetensors")
    assert skeleton.mlp1 is skeleton.mlp2 is skeleton.mlp3
    assert_close(restored(X), result(X), EXACT)


def test_a_layer_without_bias_gets_one_in_each_place(tmp_path: Path) -> None:
    def bare() -> nn.Linear:
        return nn.Linear(6, 6, bias=False)

    result, report = fused(build(layer=bare), X, untie=True)
    assert report.num_folded == 3
    save_fused(result, tmp_path / "biases.safetensors")
    restored = load_fused(build(layer=bare), tmp_path / "biases.safetensors")
    assert_close(restored(X), result(X), EXACT)


def test_in_place_only_what_folds_is_untied() -> None:
    model = build()
    expected, fc1, fc2 = model(X), model.mlp1.fc1, model.mlp1.fc2
    fuse_(model, X, untie=True)
    assert_close(model(X), expected, 1e-9)
    assert model.mlp1.fc1 is fc1 is not model.mlp2.fc1
    assert fc2 is model.mlp1.fc2 is model.mlp2.fc2


def test_a_stock_model_that_shares_the_layer_is_refused() -> None:
    result, _ = fuse(build(), X, untie=True)
    stock = build()
    for name in ("norm1", "norm2", "norm3"):
        setattr(stock, name, nn.Identity())
    before = stock.mlp1.fc1.weight.clone()
    with pytest.raises(ValueError, match=r"mlp1\.fc1\.weight and mlp2\.fc1\.weight are one there"):
        plain_(stock, result)
    assert torch.equal(stock.mlp1.fc1.weight, before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("untie", [False, True])
def test_an_audit_says_the_same(untie: bool, device: str) -> None:
    model = build()
    _, expected = fuse(model, X, untie=untie)
    found = audit(copy.deepcopy(model).to(device), X.to(device), untie=untie)
    assert found.outcomes == expected.outcomes


@pytest.mark.slow
def test_coat_folds_all_but_the_norms_in_front_of_its_mix_of_class_tokens(tmp_path: Path) -> None:
    def coat() -> nn.Module:
        return timm.create_model("coat_tiny", num_classes=10, img_size=64)

    convert_norms_(model := coat())
    x, path = tokens(1, 3, 64, 64), tmp_path / "coat.safetensors"
    result, report = fused(ready(model), x, untie=True)
    assert [outcome.name for outcome in report if outcome.action == "kept"] == ["norm2", "norm3", "norm4"]
    assert_same_outputs(model, result, (tokens(1, 3, 64, 64, seed=1),))
    save_fused(result, path)
    assert_close(load_fused(coat().double().eval(), path)(x), result(x), EXACT)
