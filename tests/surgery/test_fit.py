from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed import run_ranks
from slabformer import (
    PRepBN,
    ProgressiveSchedule,
    blended,
    convert_norms_,
    fit_norms_,
    recalibrate_,
    sync_norms_,
    token_mask,
)
from slabformer.surgery.fit import OWN_SHARE
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


def best_line(x: Tensor, y: Tensor) -> Tensor:
    """Slope and offset of each channel ``(2, C)``; a token counts by one over its standard deviation."""
    root = (1 / x.std(-1, correction=0)).sqrt().unsqueeze(-1)
    columns = (torch.stack([root * x[:, [c]], root], -1) for c in range(x.shape[-1]))
    found = [torch.linalg.lstsq(A[:, 0], (root * y[:, [c]])).solution[:, 0] for c, A in enumerate(columns)]
    return torch.stack(found, 1)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_first_norm_gets_the_best_line_of_each_channel_however_the_data_is_split(size: int) -> None:
    model, x = converted(), 1 + torch.randn(4, 16, C, dtype=torch.float64) * torch.arange(1, 17).view(16, 1)
    fit_norms_(model, x.split(size))
    expected = best_line(x.flatten(0, 1), model[0].norm(x).flatten(0, 1).detach())
    assert_close(torch.stack(model[0].scale_shift()), expected, 1e-9)


def test_later_norms_are_fitted_to_the_old_output_on_what_fitted_norms_feed_them() -> None:
    model, x = converted(), torch.randn(4, 16, C, dtype=torch.float64)
    teacher = copy.deepcopy(model[:2])
    fit_norms_(model, [x])
    given = model.eval()[:2](x).flatten(0, 1).detach()
    wanted = model[2].norm(teacher[1](teacher[0].norm(x))).flatten(0, 1).detach()
    target = wanted.lerp(model[2].norm(given).detach(), OWN_SHARE)
    assert_close(torch.stack(model[2].scale_shift()), best_line(given, target), 1e-9)
    assert_close(model[2].rep.running_mean, given.mean(0), ALGEBRA)
    assert_close(model[2].rep.running_var, given.var(0, unbiased=False), ALGEBRA)


def test_slope_is_all_in_the_gain() -> None:
    model = converted()
    fit_norms_(model, [shuffled()])
    assert [model[0].rep.eta.item(), model[2].rep.eta.item()] == [0, 0]


class Shared(nn.Module):
    """Layers that call one norm three times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer = nn.LayerNorm(C), nn.Linear(C, C)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.layer(self.norm(x))
        return x


def test_norm_that_is_called_several_times_gets_one_fit_for_all_calls() -> None:
    model, x = Shared(), torch.randn(8, 16, C, dtype=torch.float64)
    convert_norms_(model)
    calls: list[Tensor] = []
    fit_norms_(model, [x] * 20)
    model.eval().norm.register_forward_pre_hook(lambda norm, args: calls.append(args[0].detach()))
    y = model(x)
    with blended(model):
        expected = model(x)
    assert len(calls) == 6
    assert_close(model.norm.rep.running_mean, torch.cat(calls[:3]).mean((0, 1)), 0.1)
    assert (y - expected).square().mean() < 0.1 * expected.square().mean()


class Tied(nn.Module):
    """Two norms of one gain, on inputs whose channels differ."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(C), nn.LayerNorm(C)
        self.b.weight = self.a.weight
        self.double()

    def inputs(self, x: Tensor) -> list[Tensor]:
        return [x, x * torch.arange(1, C + 1)]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.inputs(x)
        return self.a(a) + self.b(b)


def test_norms_with_a_tied_gain_get_the_gain_that_serves_both() -> None:
    model, x = Tied(), torch.randn(64, C, dtype=torch.float64)
    convert_norms_(model)
    assert model.a.rep.weight is model.b.rep.weight
    fit_norms_(model, [x])
    products, squares = torch.zeros(2, C, dtype=torch.float64)
    for norm, tokens in zip([model.a, model.b], model.inputs(x), strict=True):
        weights = (1 / tokens.std(-1, correction=0)).unsqueeze(-1)
        z = (tokens - tokens.mean(0)) / (tokens.var(0, correction=0) + norm.rep.eps).sqrt()
        z = z - (weights * z).sum(0) / weights.sum()
        products += (weights * z * norm.norm(tokens).detach()).sum(0)
        squares += (weights * z.square()).sum(0)
    assert_close(model.a.rep.weight, products / squares, 1e-9)


def test_few_large_tokens_do_not_decide_the_line() -> None:
    model, x = converted(), torch.randn(1, 256, C, dtype=torch.float64)
    fit_norms_(model, [x])
    ordinary = copy.deepcopy(model.eval())
    x[0, :2] *= 30
    fit_norms_(model, [x])
    others = x[:, 2:]
    change = (model[0](others) - ordinary[0](others)).square().mean() / ordinary[0](others).square().mean()
    assert change < 0.15


def test_error_does_not_grow_with_depth() -> None:
    """Fits on undisturbed activations compound; these see what came before."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(12)]
    model = Stream(blocks)
    convert_norms_(model)
    x = torch.randn(4, 32, 32)
    fit_norms_(model, [x])
    with torch.no_grad(), blended(model.eval()):
        expected = model(x)
    similarity = nn.functional.cosine_similarity(model(x), expected, dim=-1).mean()
    assert similarity > 0.9


class Stream(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


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
    fit_norms_(expected, [x[mask]])
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
    [
        ([], "no batch to run"),
        ([torch.ones(2, 3, C).double(), torch.full((2, 3, C), torch.nan).double()], "of 0 are not finite in batch 2;"),
        ([torch.ones(2, 3, C + 1).double()], "shape"),
        ([torch.ones(2, 3, C).double(), "text"], "cannot feed a batch of type str"),
    ],
    ids=["empty", "nan", "other_width", "text"],
)
def test_bad_data_is_refused_and_changes_nothing(batches: Any, message: str) -> None:
    model, others = converted(), threading.active_count()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        fit_norms_(model, batches)
    assert "forward" not in vars(model[0])
    assert model[0].rep.accumulator is None
    assert threading.active_count() == others
    for name, value in model.state_dict().items():
        assert_close(value, before[name], EXACT)


def test_fit_is_for_the_start_only() -> None:
    model = converted()
    model[2].set_gamma(0.9)
    with pytest.raises(ValueError, match="fading has begun \\(gamma of 2"):
        fit_norms_(model, [shuffled()])
    with pytest.raises(ValueError, match="no PRepBN to fit"):
        fit_norms_(nn.Linear(C, C), [shuffled()])


def test_forward_of_another_model_is_refused() -> None:
    model = converted()
    with pytest.raises(ValueError, match="0 was called from another thread; forward= must call the model"):
        fit_norms_(model, [shuffled()], forward=lambda given, x: model(x))


class Picky(nn.Module):
    """Calls another norm where its input is not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.large, self.small = nn.LayerNorm(C), nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.large(x) if (x.var(-1, correction=0) - 1).abs().max() > 0.1 else self.small(x)


def test_path_that_depends_on_the_data_is_refused() -> None:
    model, others = Picky(), threading.active_count()
    convert_norms_(model)
    with pytest.raises(ValueError, match="with the old norms calls small where the fitted one calls large"):
        fit_norms_(model, [torch.randn(2, 7, C)])
    assert threading.active_count() == others


def test_state_that_modules_keep_in_a_forward_does_not_mix() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))
            self.kept = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.kept = x + 10 * self.norms[0](x)
            return self.norms[1](self.kept + self.norms[1](self.kept))

    torch.manual_seed(0)
    model = Keeps().double()
    convert_norms_(model)
    x = torch.randn(4, 16, C, dtype=torch.float64)
    seen: list[Tensor] = []
    original = model.norms[1].norm.forward
    model.norms[1].norm.forward = lambda given: (seen.append(given), original(given))[1]
    fit_norms_(model, [x])
    kept = x + 10 * model.norms[0].norm(x)
    assert_close(seen[0], kept.detach(), ALGEBRA)  # the teacher's own, not the fitted model's


def test_padding_is_left_out_by_the_attention_mask_of_a_batch() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = converted()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x)

    x, mask = torch.randn(2, 8, C, dtype=torch.float64), (torch.arange(8) < torch.tensor([[8], [3]])).long()
    model, expected = Text(), converted()
    fit_norms_(expected, [x[mask.bool()]])
    padded = {"x": x.masked_fill(~mask.bool().unsqueeze(-1), 1e3), "attention_mask": mask}
    fit_norms_(model, [padded])
    for name, value in model.inner.state_dict().items():
        assert_close(value, expected.state_dict()[name], ALGEBRA)
    assert model.inner[0].rep.token_mask is None
    assert not model._forward_pre_hooks
    recalibrate_(model, [padded])
    assert_close(model.inner[0].rep.running_mean, x[mask.bool()].mean(0), ALGEBRA)


def test_autocast_and_dropout_reach_both_forwards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(C, C), nn.Dropout(0.5), nn.LayerNorm(C)).train()
    convert_norms_(model)
    dtypes: set[torch.dtype] = set()
    model[2].norm.register_forward_hook(lambda norm, args, output: dtypes.add(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        fit_norms_(model, [shuffled().float()])
    assert dtypes == {torch.bfloat16}
    assert model.training


def test_fit_of_few_tokens_is_told_about(caplog: pytest.LogCaptureFixture) -> None:
    fit_norms_(converted(), [shuffled(5)])
    assert "the fit of 0 (and 1 more like it) rests on 5 tokens" in caplog.text


def test_compiled_model_is_fitted() -> None:
    x = torch.randn(4, 16, C, dtype=torch.float64)
    model, plain = converted(), converted()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    fit_norms_(compiled, [x])
    fit_norms_(plain, [x])
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            assert_close(value, plain.state_dict()[name], EXACT)


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
    one, other = shared_data(0), shared_data(1)
    fit_norms_(whole, [*map(torch.cat, zip(one, other, strict=False)), one[2]])
    for rank, (count, *values) in enumerate(run_ranks(fit_rank, tmp_path, num_ranks=3)):
        assert count == max(0, 3 - rank) * (rank < 2)
        for ours, theirs in zip(values, whole.state_dict().values(), strict=True):
            assert_close(ours, theirs, 1e-7)  # of a variance about a mean a thousand times as large
