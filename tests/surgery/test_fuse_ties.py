"""Tied weights: they keep a norm, unless the caller gives every holder one of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusing import assert_same_outputs, fused, net, norm
from slabformer.surgery.fuse import fuse, fuse_, load_fused, save_fused
from tolerances import EXACT, assert_close

IDS = torch.tensor([[0, 1, 2, 4], [3, 3, 0, 1]])


def language(tied: bool = True, **others: nn.Module) -> nn.Module:
    def forward(m: Any, ids: Tensor) -> Tensor:
        return m.head(m.norm(m.mix(m.embed(ids)).tanh()))

    head = nn.Linear(6, 5, bias=False)
    model = net(forward, embed=nn.Embedding(5, 6), mix=nn.Linear(6, 6), norm=norm(), head=head, **others)
    if tied:
        model.head.weight = model.embed.weight
    return model


def test_a_head_that_is_tied_with_an_embedding_takes_a_norm_over_once_untied() -> None:
    model = language()
    result, report = fused(model, IDS, untie=True)
    assert report["norm"].into == ("head",)
    assert torch.equal(result.embed.weight, model.embed.weight)
    assert result.head.weight is not result.embed.weight
    assert model.head.weight is model.embed.weight


def test_ties_that_no_fold_needs_stay() -> None:
    model = language(one=nn.Linear(6, 6), two=nn.Linear(6, 6))
    model.two.weight = model.one.weight
    model.body = lambda m, ids: m.head(m.one(torch.relu(m.norm(m.two(m.embed(ids))).tanh())))
    result, report = fused(model, IDS, untie=True)
    assert report["norm"].action == "backward"
    assert result.head.weight is result.embed.weight
    model.body = lambda m, ids: (y := m.norm(m.one(m.embed(ids)).tanh())).tanh() + m.two(y) + y.sum()
    result, report = fused(model, IDS, untie=True)
    assert report["norm"].action == "kept"
    assert result.one.weight is result.two.weight
    assert result.head.weight is result.embed.weight


def test_untying_in_place_changes_the_model_only_where_it_folds() -> None:
    model = language()
    expected = model(IDS)
    fuse_(model, IDS, untie=True)
    assert model.head.weight is not model.embed.weight
    assert_close(model(IDS), expected, 1e-9)


@pytest.mark.parametrize("tied", [True, False], ids=["tied skeleton", "untied skeleton"])
def test_a_file_unties_the_skeleton(tied: bool, tmp_path: Path) -> None:
    model = language()
    result, _ = fuse(model, IDS, untie=True)
    save_fused(result, tmp_path / "untied.safetensors")
    restored = load_fused(language(tied), tmp_path / "untied.safetensors")
    assert_close(restored(IDS), result(IDS), EXACT)
    assert_same_outputs(model, restored, (IDS,))
