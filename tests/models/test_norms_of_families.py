"""Every norm of the table in every family: it trains, is saved and read back, and folds where the table says so."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import slabformer as sf
from detectors import SMALL
from slabformer._norm_names import norm_names
from slabformer.models.detection.backbones import create_backbone
from slabformer.nn.controls import prepbn_modules
from slabformer.nn.norms import norm_types, type_of
from slabformer.tasks.conversion import count_norms
from slabformer.tasks.saved_model import ModelInfo, load_model, save_model
from slabformer.testing import randomize_norms_
from tolerances import EXACT, assert_close

FAMILIES = {
    "deit": ("slab_deit_micro", {"embed_dim": 16, "num_heads": 2, "depth": 1, "img_size": 16}),
    "swin": ("slab_swin_tiny", {**SMALL["swin"], "depths": (1, 1), "num_heads": (1, 1), "attention": "LS"}),
    "pvt": ("slab_pvt_tiny", {**SMALL["pvt"], "attention": "LLSS"}),
    "pvt_v2": ("slab_pvt_v2_b0", {**SMALL["pvt"], "attention": "LLSS"}),
    "cswin": ("slab_cswin_tiny", {**SMALL["cswin"], "attention": "LLSS"}),
}
each_norm = pytest.mark.parametrize("norm", norm_names())


def build(family: str, **arguments: object) -> nn.Module:
    name, own = FAMILIES[family]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **own, **arguments)


def images(family: str) -> Tensor:
    side = FAMILIES[family][1]["img_size"]
    return torch.randn(2, 3, side, side)


def as_after_training(model: nn.Module) -> nn.Module:
    for fading in prepbn_modules(model).values():
        fading.set_gamma(0)
    return randomize_norms_(model).eval()


@each_norm
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_and_is_saved(family: str, norm: str, tmp_path: object) -> None:
    model, x = build(family, norm=norm), images(family)
    assert set(count_norms(model)) == {norm_types()[norm].title}
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    as_after_training(model)
    name, own = FAMILIES[family]
    arguments = {"num_classes": 3, **own, "norm": norm}
    info = ModelInfo(model=name, model_args=arguments, class_names=list("abc"), input_size=tuple(x.shape[1:]))
    save_model(model, f"{tmp_path}/model.safetensors", info)
    again, written = load_model(f"{tmp_path}/model.safetensors")
    assert not written.converted
    assert_close(again(x), model(x), EXACT)


# where a norm stands depends on the family, how it folds on its row of the table
@pytest.mark.parametrize(
    ("family", "norm"),
    [*(("deit", norm) for norm in norm_names()), *((name, "batchnorm") for name in FAMILIES if name != "deit")],
)
def test_it_folds_where_the_table_says_so(family: str, norm: str) -> None:
    model, x, row = as_after_training(build(family, norm=norm)), images(family), norm_types()[norm]
    if row.scale_shift is None:
        with pytest.raises(ValueError, match=f"to fuse in .*, but [0-9]+ {row.title} ") as error:
            sf.fuse(model, x)
        assert row.stays in str(error.value)
        return
    fused, report = sf.fuse(model, x)
    assert report.num_folded > 0
    assert not report.left
    sf.verify(model, fused, [x])


@each_norm
@pytest.mark.parametrize("family", ["deit", "swin"])
def test_backbones_of_detectors_take_it_everywhere(family: str, norm: str) -> None:
    name = {"deit": "slab_deit_micro", "swin": "slab_swin_tiny"}[family]
    backbone = create_backbone(name, norm=norm, output_norm=norm, **SMALL[family])
    assert set(count_norms(backbone)) == {norm_types()[norm].title}
    maps = backbone(torch.randn(2, 3, 64, 64))
    sum(each.square().sum() for each in maps).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_that_is_not_there_is_answered_by_the_choices(family: str) -> None:
    with pytest.raises(
        ValueError, match=r"unknown norm 'batchnrm'; did you mean 'batchnorm'\? choose from prepbn, repbn"
    ):
        build(family, norm="batchnrm")
    with pytest.raises(ValueError, match="norm must be text, got 3"):
        build(family, norm=3)
    with pytest.raises(ValueError, match="eta is for norms with a skip"):
        build(family, norm="dyt", eta=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_initial_skip_weight_is_a_keyword(family: str) -> None:
    for norm, holder in (("prepbn", "rep"), ("repbn", "")):
        model = build(family, norm=norm, eta=0.25)
        norms = [m.get_submodule(holder) for m in model.modules() if getattr(type_of(m), "name", "") == norm]
        assert norms
        assert all(rep.eta.item() == 0.25 for rep in norms)


def test_fuse_tells_what_stays_and_why() -> None:
    norms = sf.TokenBatchNorm(6), sf.DyT(6), nn.RMSNorm(6)
    model = nn.Sequential(*(layer for norm in norms for layer in (nn.Linear(6, 6), norm)), nn.Linear(6, 6))
    _, report = sf.fuse(randomize_norms_(model).eval(), torch.randn(2, 5, 6))
    assert report.num_folded == 1
    assert [(left.name, left.kind) for left in report.left] == [("3", "DyT"), ("5", "RMSNorm")]
    assert "3  left      DyT: its tanh is not linear" in report.table()
