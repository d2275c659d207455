"""Norms as other code meets them: copies, attributes, the fused form, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from slabformer import Affine, PRepBN, RepBN
from small_norms import MASK, C, trained
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RepBN(C, channel_dim=2), "channel_dim must be -1"),
        (lambda: RepBN(C)(torch.zeros(2, 3, C + 1)), r"over 6 channels on axis -1, got input of shape \(2, 3, 7\)"),
        (lambda: RepBN(C, channel_dim=1)(torch.zeros(2, 3, C)), "channels on axis 1"),
        (lambda: RepBN(C)(torch.zeros(C)), "got input of shape"),
        (lambda: RepBN(C)(torch.zeros(1, 1, C)), "more than one token"),
        (lambda: RepBN(C)(torch.zeros(0, 3, C)), "more than one token"),
        (lambda: PRepBN(C, channel_dim=1), "pass norm="),
        (lambda: PRepBN(C).set_gamma(1.5), "gamma must be in"),
        (lambda: PRepBN(C).set_gamma(float("nan")), "gamma must be in"),
        (lambda: PRepBN(C).set_gamma(0.5, "melting"), "phase must be one of"),
        (lambda: PRepBN(C).set_gamma(0.5, "done"), "does not go with"),
        (lambda: PRepBN(C).set_gamma(0.0, "fading"), "does not go with"),
        (lambda: PRepBN(C).fuse(), "still holds its norm"),
    ],
)
def test_misuse_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(copier: Callable[[PRepBN], PRepBN]) -> None:
    norm = PRepBN(C)
    norm.set_gamma(0.4)
    norm.rep.token_mask = MASK
    x = torch.randn(2, 4, C)
    norm(x)
    copied = copier(norm)
    assert copied.phase == "fading"
    assert_close(copied(x), norm(x), EXACT)
    assert_close(copied.rep.running_var, norm.rep.running_var, EXACT)
    copied.set_gamma(0.0)
    assert norm.gamma == torch.tensor(0.4)


@pytest.mark.parametrize("channel_dim", [-1, 1], ids=["tokens", "maps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_norm_is_an_affine_with_the_same_output(channel_dim: int, dtype: torch.dtype) -> None:
    norm = trained(channel_dim, dtype).eval()
    x = torch.randn((2, 3, 5, C) if channel_dim == -1 else (2, C, 3, 5)).to(dtype)
    affine = norm.fuse()
    assert isinstance(affine, Affine)
    assert not affine.training
    assert affine.weight.dtype == dtype
    assert_close(affine(x), norm(x), {torch.float64: ALGEBRA, torch.float32: FLOAT32}.get(dtype, 0.03))


def test_timm_reparameterizes_a_finished_model_and_refuses_a_fading_one() -> None:
    model = nn.Sequential(nn.Linear(C, C), PRepBN(C), nn.Sequential(RepBN(C)))
    for module in model.modules():
        if isinstance(module, RepBN):
            module.load_state_dict(trained(dtype=torch.float32).state_dict())
    model.eval()
    with pytest.raises(ValueError, match="still holds its norm"):
        reparameterize_model(model)
    model[1].set_gamma(0)
    fused = reparameterize_model(model)
    assert [type(fused[1]), type(fused[2][0])] == [Affine, Affine]
    x = torch.randn(2, 3, C)
    assert_close(fused(x), model(x), FLOAT32)


def test_meta_device_builds_loads_and_prints() -> None:
    norm = PRepBN(C, device="meta")
    assert "warm" in repr(norm)
    source = PRepBN(C)
    source.set_gamma(0)
    norm.load_state_dict(source.state_dict(), assign=True)
    assert norm.phase == "done"
    assert norm.eval()(torch.zeros(2, 3, C)).isfinite().all()


def test_attributes_that_other_code_reads_off_a_norm() -> None:
    norm = PRepBN(C, eps=1e-3)
    assert norm.eps == 1e-3
    assert norm.normalized_shape == (C,)
    assert norm.weight is norm.rep.weight
    assert norm.bias is norm.rep.bias
    names = "norm.weight norm.bias rep.weight rep.bias rep.eta rep.running_mean rep.running_var rep.num_batches_tracked"
    assert set(norm.state_dict()) == {*names.split(), "gamma"}
    assert len(dict(norm.named_parameters())) == 5
