from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slabformer.ops.moments import Moments, MomentsAccumulator, batch_moments, update_running_
from tolerances import ALGEBRA, FLOAT32, assert_close


def flat(x: Tensor) -> tuple[Tensor, Tensor]:
    tokens = x.double().flatten(0, -2)
    return tokens.mean(0), tokens.var(0, unbiased=False)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 7, 3), (2, 197, 3), (5, 3), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_batch_moments_are_mean_and_biased_variance(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (2 + torch.randn(shape, dtype=torch.float64)).to(dtype)
    moments = batch_moments(x)
    mean, var = flat(x)
    tolerance = ALGEBRA if dtype == torch.float64 else FLOAT32
    assert moments.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert moments.count == x.numel() // shape[-1]
    assert_close(moments.mean, mean, tolerance)
    assert_close(moments.var, var, tolerance)


def test_sums_of_half_precision_do_not_overflow() -> None:
    x = torch.full((8, 3136, 2), 60000.0, dtype=torch.float16)
    moments = batch_moments(x)
    assert_close(moments.mean, flat(x)[0], FLOAT32)
    assert not moments.var.any()


def test_small_variance_survives_a_large_mean() -> None:
    x = 1e4 + 0.1 * torch.randn(16, 197, 3)
    # float32 places the mean to 5e-4, and its square over the variance is what is lost
    assert_close(batch_moments(x).var, flat(x)[1], 1e-4)


def test_masked_moments_are_those_of_the_valid_tokens() -> None:
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    mask = torch.rand(3, 7) > 0.5
    x[~mask] = torch.nan
    moments = batch_moments(x, mask)
    mean, var = flat(x[mask])
    assert moments.count == mask.sum()
    assert_close(moments.mean, mean, ALGEBRA)
    assert_close(moments.var, var, ALGEBRA)


@pytest.mark.parametrize("x", [torch.zeros(0, 3, 4), torch.zeros(2, 0, 4)], ids=["no_images", "no_tokens"])
def test_nothing_has_finite_moments_of_count_zero(x: Tensor) -> None:
    moments = batch_moments(x)
    assert moments.count == 0
    assert moments.mean.isfinite().all()
    assert moments.var.isfinite().all()


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0),
    offset=st.sampled_from([0.0, 1.0, -300.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_accumulating_any_split_gives_the_moments_of_the_whole(sizes: list[int], offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = offset + torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    accumulator = MomentsAccumulator(3, x.device)
    for part in x.split(sizes):
        accumulator.add(batch_moments(part))
    merged, (mean, var) = accumulator.result(), flat(x)
    assert merged.count == len(x)
    assert_close(merged.mean, mean, ALGEBRA)
    # squares round to their own size, however much smaller the variance is
    assert (merged.var - var).abs().max() <= 8 * torch.finfo(torch.float64).eps * x.square().max()


def running() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(3), torch.ones(3), torch.zeros((), dtype=torch.long)


def test_running_statistics_stand_still_inside_backward() -> None:
    mean, var, count = running()
    x = torch.randn(5, 3, requires_grad=True)

    def update(grad: Tensor) -> Tensor:
        update_running_(mean, var, count, batch_moments(x.detach()), 0.1)
        return grad

    y = x * 2
    y.register_hook(update)
    y.sum().backward()
    assert count == 0
    assert not mean.any()
    update(x)
    assert count == 1
    assert mean.all()


def test_update_operator_is_registered_correctly() -> None:
    arguments = (*running(), torch.randn(3), torch.rand(3), torch.ones((), dtype=torch.long))
    torch.library.opcheck(torch.ops.slabformer.store_running_.default, arguments)


def test_update_takes_the_unbiased_variance() -> None:
    mean, var, count = running()
    moments = Moments(torch.tensor(4.0), torch.ones(3), torch.full((3,), 3.0))
    update_running_(mean, var, count, moments, 0.5)
    assert_close(var, torch.full((3,), 0.5 + 0.5 * 4.0), FLOAT32)
    assert_close(mean, torch.full((3,), 0.5), FLOAT32)
