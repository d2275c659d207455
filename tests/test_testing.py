from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from slabformer import Affine, convert_norms_
from slabformer.nn.controls import repbn_modules
from slabformer.testing import randomize_norms_
from tolerances import EXACT, assert_close


def model(**options: object) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10, init_values=1e-5, weight_init="jax", **options
    )
    convert_norms_(net)
    return net


def test_every_norm_gets_a_scale_and_shift_that_vary() -> None:
    for norm in repbn_modules(randomize_norms_(model())).values():
        scale, shift = norm.scale_shift()
        assert scale.std() > 0.05
        assert shift.std() > 0.05
        assert scale.isfinite().all()
        assert norm.running_var.min() > 0
        assert norm.eta not in (0, 1)
        assert norm.running_mean.std() > 0.05
        assert norm.running_var.std() > 0.05


def test_a_frozen_batch_norm_gets_values_that_vary() -> None:
    frozen = randomize_norms_(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(50)))[0]
    assert all(buffer.std() > 0.05 for buffer in frozen.buffers())


def test_no_parameter_is_left_constant() -> None:
    net = randomize_norms_(model())
    constant = [name for name, p in net.named_parameters() if p.numel() > 1 and p.std() == 0]
    assert not constant
    assert net.head.weight.std() > 0.01
    assert 0.1 < net.blocks[0].ls1.gamma.mean() < 2


def test_output_varies_between_inputs_and_classes() -> None:
    net = randomize_norms_(model()).eval()
    logits = net(torch.randn(4, 3, 32, 32))
    assert logits.std(0).min() > 1e-3
    assert logits.std(1).min() > 1e-3


def test_values_are_a_function_of_the_seed() -> None:
    start = model()
    first, again, other = (randomize_norms_(copy.deepcopy(start), seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.norm.rep.weight, other.norm.rep.weight)
    for ours, theirs in zip(first.buffers(), again.buffers(), strict=True):
        assert_close(ours, theirs, EXACT)


def test_global_generator_is_left_alone() -> None:
    net = model()
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    randomize_norms_(net)
    assert_close(torch.randn(3), expected, EXACT)


def test_learned_weights_stay() -> None:
    net = model()
    weight = net.blocks[0].attn.qkv.weight.clone()
    randomize_norms_(net)
    assert_close(net.blocks[0].attn.qkv.weight, weight, EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_norms_dtypes_and_tied_modules(dtype: torch.dtype) -> None:
    tied = nn.BatchNorm2d(4)
    net = nn.Sequential(tied, tied, nn.BatchNorm2d(4, track_running_stats=False), Affine(4), nn.LayerNorm(4)).to(dtype)
    randomize_norms_(net)
    for tensor in [*net.parameters(), tied.running_mean, tied.running_var]:
        assert tensor.dtype == dtype
        assert tensor.std() > 0
