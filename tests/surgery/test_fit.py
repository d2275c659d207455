from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed import run_ranks
from slabformer import PRepBN, ProgressiveSchedule, convert_norms_, fit_norms_, sync_norms_, token_mask
from tolerances import ALGEBRA, EXACT, assert_close

C = 6


def converted(norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(norm or nn.LayerNorm(C), nn.Linear(C, C), nn.RMSNorm(C)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5)
    convert_norms_(model)
    return model


def shuffled(num: int = 64) -> Tensor:
    """Tokens of equal mean and variance, on which LayerNorm is one affine map."""
    return torch.stack([torch.arange(C, dtype=torch.float64)[torch.randperm(C)] for _ in range(num)])[None]


def distance(norm: PRepBN, x: Tensor) -> float:
    target = norm.norm(x)
    return ((norm.rep(x) - target).square().mean() / target.square().mean()).item()


@pytest.mark.parametrize("split", [64, 7, 1])
def test_fit_is_exact_where_the_norm_is_affine(split: int) -> None:
    model, x = converted(), shuffled()
    assert fit_norms_(model, x.split(split, dim=1)) == -(-64 // split)
    assert_close(model.eval()[0](x), model[0].norm(x), ALGEBRA)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_fit_comes_nearer_than_the_published_start(scale: float) -> None:
    model = converted().eval()
    x = scale * (1 + torch.randn(4, 16, C, dtype=torch.float64))
    model[0].rep.running_mean.copy_(x.mean((0, 1)))
    model[0].rep.running_var.copy_(x.var((0, 1)))
    before = distance(model[0], x)
    fit_norms_(model, [x])
    assert distance(model[0], x) < min(before, 0.9)


def test_fit_is_the_least_squares_line_of_each_channel() -> None:
    model, x = converted(), torch.randn(4, 16, C, dtype=torch.float64)
    fit_norms_(model, x.split(1))
    tokens, target = x.flatten(0, 1), model[0].norm(x).flatten(0, 1).detach()
    scale, shift = model[0].scale_shift()
    for channel in range(C):
        columns = torch.stack([tokens[:, channel], torch.ones(len(tokens), dtype=torch.float64)], 1)
        slope, offset = torch.linalg.lstsq(columns, target[:, channel]).solution
        assert scale[channel].item() == pytest.approx(slope.item(), rel=1e-9)
        assert shift[channel].item() == pytest.approx(offset.item(), rel=1e-9)


def test_later_norms_are_fitted_to_what_the_old_norms_feed_them() -> None:
    model, x = converted(), torch.randn(4, 16, C, dtype=torch.float64)
    fit_norms_(model, [x])
    inputs = model[1](model[0].norm(x)).detach()
    assert_close(model[2].rep.running_mean, inputs.mean((0, 1)), ALGEBRA)
    assert_close(model[2].rep.running_var, inputs.var((0, 1), unbiased=False), ALGEBRA)


def test_fit_moves_neither_the_old_norms_nor_other_layers_nor_modes() -> None:
    model = converted()
    model[1].eval()
    ProgressiveSchedule(model, 10)
    before = copy.deepcopy(model.state_dict())
    fit_norms_(model, [shuffled()])
    for name, value in model.state_dict().items():
        if ".rep." not in name:
            assert_close(value, before[name], EXACT)
    assert model[0].phase == "fading"  # as the schedule left it
    assert [module.training for module in model] == [True, False, True]
    assert not model[0]._forward_hooks
    assert not model[0].blend_in_eval


def test_padding_stays_out_of_the_fit() -> None:
    model, expected = converted(), converted()
    x = torch.randn(2, 8, C, dtype=torch.float64)
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    fit_norms_(expected, [x[:1], x[1:, :3]])
    with token_mask(model, mask):
        fit_norms_(model, [x.masked_fill(~mask.unsqueeze(-1), torch.nan)])
    for name, value in model.state_dict().items():
        assert_close(value, expected.state_dict()[name], ALGEBRA)


def test_maps_are_fitted_over_their_channels() -> None:
    from timm.layers import LayerNorm2d

    model = nn.Sequential(LayerNorm2d(C).double())
    convert_norms_(model)
    x = shuffled(12).view(3, 4, C).permute(2, 0, 1)[None]
    fit_norms_(model, [x])
    assert_close(model.eval()(x), model[0].norm(x), ALGEBRA)


def test_constant_channel_gives_finite_parameters() -> None:
    model, x = converted(), torch.ones(2, 3, C, dtype=torch.float64)
    fit_norms_(model, [x])
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "no batch to run"), ([torch.full((2, 3, C), torch.nan, dtype=torch.float64)], "of 0 are not finite")],
    ids=["empty", "nan"],
)
def test_bad_data_is_refused_and_changes_nothing(batches: Any, message: str) -> None:
    model = converted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fit_norms_(model, batches)
    for name, value in model.state_dict().items():
        assert_close(value, before[name], EXACT)


def test_fit_is_for_the_start_only() -> None:
    model = converted()
    model[2].set_gamma(0.9)
    with pytest.raises(ValueError, match="fading has begun \\(gamma of 2"):
        fit_norms_(model, [shuffled()])
    with pytest.raises(ValueError, match="no PRepBN to fit"):
        fit_norms_(nn.Linear(C, C), [shuffled()])


def shared_data(rank: int) -> list[Tensor]:
    """One rank brings three batches far from 0, the other two; the third brings none."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2, 5, C)
    return [1e3 * (1 - rank) + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3 - rank)]


def fit_rank(rank: int, num_ranks: int) -> list[Any]:
    model = converted()
    sync_norms_(model)
    count = fit_norms_(model, shared_data(rank) if rank < 2 else [])
    bad = converted()
    sync_norms_(bad)
    with pytest.raises(ValueError, match=r"inputs or outputs of 0 are not finite"):
        fit_norms_(bad, [torch.full((1, 4, C), float("nan") if rank == 1 else 1.0, dtype=torch.float64)])
    return [count, *model.state_dict().values()]


def test_ranks_that_share_statistics_fit_to_all_data_and_refuse_together(tmp_path: Path) -> None:
    whole = converted()
    fit_norms_(whole, shared_data(0) + shared_data(1))
    for rank, (count, *values) in enumerate(run_ranks(fit_rank, tmp_path, num_ranks=3)):
        assert count == max(0, 3 - rank) * (rank < 2)
        for ours, theirs in zip(values, whole.state_dict().values(), strict=True):
            assert_close(ours, theirs, 1e-7)  # of a variance about a mean a thousand times as large
