"""BatchNorms with an activation inside, as timm's hybrids have: the map goes, the activation stays."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn

from fusing import assert_same_outputs, codes, fused, net, outcomes, tokens
from slabformer.surgery.audit import audit
from slabformer.surgery.fuse import Reason, fuse, load_fused, save_fused
from slabformer.testing import randomize_norms_

MAPS = tokens(2, 6, 5, 5)


def conv_first(batch_norm: nn.Module) -> nn.Module:
    return net(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(6, 8, 3, padding=1), norm=batch_norm)


def frozen() -> nn.Module:
    module = FrozenBatchNormAct2d(8, eps=1e-3, act_layer="silu")
    for number, buffer in enumerate(module.buffers()):
        buffer.copy_(torch.rand(8, generator=torch.Generator().manual_seed(number)) + 0.5)
    return module


KINDS = {
    "relu in place": lambda: BatchNormAct2d(8),
    "no activation": lambda: BatchNormAct2d(8, apply_act=False),
    "dropout": lambda: BatchNormAct2d(8, act_layer="gelu", drop_layer=nn.Dropout2d),
    "frozen": frozen,
}


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_the_map_folds_backward_and_the_activation_stays(build: Any) -> None:
    model = conv_first(build())
    assert outcomes(model, MAPS) == [("norm", "backward", ("conv",), "")]


def test_one_that_cannot_fold_stays_as_an_affine_with_its_activation() -> None:
    model = net(lambda m, x: m.norm(x.sin()), norm=BatchNormAct2d(6, act_layer="gelu"))
    assert codes(model, MAPS)[0] == Reason.FEEDS_OPERATION


def test_one_without_an_activation_folds_forward() -> None:
    model = net(lambda m, x: m.conv(m.norm(x)), norm=BatchNormAct2d(6, apply_act=False), conv=nn.Conv2d(6, 4, 1))
    assert outcomes(model, MAPS) == [("norm", "forward", ("conv",), "")]


def test_an_activation_with_weights_of_its_own_keeps_the_batch_norm_as_it_is() -> None:
    model = net(lambda m, x: m.two(m.one(m.conv(x))), conv=nn.Conv2d(6, 6, 1), one=BatchNormAct2d(6, act_layer="prelu"),
                two=nn.BatchNorm2d(6))  # fmt: skip
    result, report = fused(model, MAPS)
    assert [outcome.name for outcome in report] == ["two"]
    assert type(result.one) is BatchNormAct2d


def test_the_audit_sees_the_activation() -> None:
    assert [outcome.action for outcome in audit(conv_first(BatchNormAct2d(8)).float(), MAPS.float())] == ["backward"]


@pytest.mark.parametrize("body", [lambda m, x: m.norm(m.conv(x)), lambda m, x: m.norm(x.sin())], ids=["gone", "kept"])
def test_the_activation_is_there_after_a_round_trip_through_a_file(tmp_path: Any, body: Any) -> None:
    def build() -> nn.Module:
        return net(body, conv=nn.Conv2d(6, 6, 3), norm=BatchNormAct2d(6))

    result, _ = fused(build(), MAPS)
    save_fused(result, tmp_path / "fused.safetensors")
    assert_same_outputs(result, load_fused(build(), tmp_path / "fused.safetensors"), (MAPS,))


@pytest.mark.parametrize("name", ["test_coatnet", pytest.param("mobilevit_xxs", marks=pytest.mark.slow)])
def test_no_batch_norm_is_left_in_a_hybrid(name: str) -> None:
    model = randomize_norms_(timm.create_model(name, num_classes=10)).eval().double()
    x = tokens(1, 3, *model.default_cfg["input_size"][1:])
    result, _ = fuse(model, x)
    assert_same_outputs(model, result, (x,))
    program = torch.export.export(result, (x,), strict=False)
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
