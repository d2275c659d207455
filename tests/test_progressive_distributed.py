from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed import run_ranks
from fading import C, Net
from slabformer import PRepBN, ProgressiveSchedule, set_token_mask, sync_norms_, token_mask
from slabformer.nn.controls import prepbn_modules
from slabformer.progressive import Guard
from tolerances import ALGEBRA, EXACT, assert_close

STEPS = 6
#: images a rank holds, of four in all
SHARES = {"even": [2, 2], "uneven": [3, 1], "one_image_each": [1, 1]}
MASKS = {
    "no_mask": None,
    "uneven_mask": [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]],
    "rank_without_valid_tokens": [[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]],
}


def train(net: nn.Module, wrapped: nn.Module, own: slice, num_ranks: int, mask: Tensor | None, total: int) -> list[Any]:
    """Gradients of every step, then parameters and buffers; the loss is the mean over all ranks' valid tokens."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    schedule = ProgressiveSchedule(net, STEPS, warmup=1 / 3, fade=1 / 3, optimizer=optimizer)
    generator = torch.Generator().manual_seed(1)
    results = []
    mask = torch.ones(total, 3, dtype=torch.bool) if mask is None else mask
    for _ in range(STEPS):
        x = (1 + torch.randn(total, 3, C, generator=generator, dtype=torch.float64))[own].requires_grad_()
        optimizer.zero_grad()
        loss = (wrapped(x).square() * mask[own].unsqueeze(-1)).sum() / mask.sum()
        (loss * num_ranks).backward()  # DistributedDataParallel takes the mean over ranks
        results += [parameter.grad.clone() for parameter in net.parameters()]
        optimizer.step()
        schedule.step()
    assert schedule.finished
    return results + [value.clone() for value in net.state_dict().values()]


def train_rank(rank: int, num_ranks: int, shares: list[int], mask: Tensor | None, reentrant: bool | None) -> list[Any]:
    net = Net(reentrant)
    sync_norms_(net)
    wrapped = DistributedDataParallel(net, find_unused_parameters=False)
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    set_token_mask(net, None if mask is None else mask[own])
    return train(net, wrapped, own, num_ranks, mask, sum(shares))


@pytest.mark.parametrize(
    ("shares", "mask", "reentrant"),
    [
        ("even", "no_mask", None),
        ("uneven", "no_mask", None),
        ("even", "uneven_mask", None),
        ("even", "rank_without_valid_tokens", None),
        ("even", "uneven_mask", False),
        ("even", "uneven_mask", True),
    ],
)
def test_two_ranks_train_as_one_through_all_phases(
    tmp_path: Path, shares: str, mask: str, reentrant: bool | None
) -> None:
    valid = None if MASKS[mask] is None else torch.tensor(MASKS[mask], dtype=torch.bool)
    ranks = run_ranks(train_rank, tmp_path, SHARES[shares], valid, reentrant)
    net, total = Net(), sum(SHARES[shares])
    with token_mask(net, valid):
        expected = train(net, net, slice(total), 1, valid, total)
    for rank in ranks:
        for ours, theirs in zip(rank, expected, strict=True):
            assert_close(ours, theirs, ALGEBRA)


def aligned_rank(rank: int, num_ranks: int) -> list[Any]:
    """Own images on each rank, the norms staggered and aligned, activations of one rank exploding midway."""
    net = Net()
    sync_norms_(net)
    wrapped = DistributedDataParallel(net, find_unused_parameters=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    guard = Guard(every=1)
    schedule = ProgressiveSchedule(net, 12, fade=0.8, stagger=0.5, align=0.3, guard=guard, optimizer=optimizer)
    generator = torch.Generator().manual_seed(rank)
    for step in range(12):
        x = torch.randn(2, 3, C, generator=generator, dtype=torch.float64) * (200 if (rank, step) == (1, 6) else 1)
        optimizer.zero_grad()
        loss = wrapped(x).square().mean()
        (loss + schedule.alignment()).backward()
        optimizer.step()
        schedule.step()
    state = schedule.state_dict()
    return [torch.tensor(state["waited"]), torch.tensor(state["step"]), *net.state_dict().values()]


def test_ranks_wait_and_align_together(tmp_path: Path) -> None:
    first, second = run_ranks(aligned_rank, tmp_path)
    assert first[0] > 0
    for ours, theirs in zip(first, second, strict=True):
        assert_close(ours, theirs, EXACT)


def loaded_rank(rank: int, num_ranks: int) -> list[Any]:
    """Only the first rank has loaded a model that has faded; DistributedDataParallel gives it to the others."""
    net = Net()
    if rank == 0:
        for norm in prepbn_modules(net).values():
            norm.set_gamma(0)
    wrapped = DistributedDataParallel(net, find_unused_parameters=False)
    wrapped(torch.ones(2, 3, C, dtype=torch.float64) * torch.arange(3)[:, None]).mean().backward()
    norms = prepbn_modules(net).values()
    assert {norm.phase for norm in norms} == {"done"}
    return [norm.norm.weight.grad for norm in norms]


def test_ranks_follow_the_gamma_that_ddp_broadcasts(tmp_path: Path) -> None:
    for rank in run_ranks(loaded_rank, tmp_path):
        for grad in rank:
            assert_close(grad, torch.zeros(C, dtype=torch.float64), EXACT)


def unsynced_rank(rank: int, num_ranks: int) -> list[Any]:
    net = Net()
    wrapped = DistributedDataParallel(net, find_unused_parameters=False)
    return train(net, wrapped, slice(2 * rank, 2 * rank + 2), num_ranks, None, 4)


def test_phases_change_under_ddp_without_shared_statistics(tmp_path: Path) -> None:
    first, second = run_ranks(unsynced_rank, tmp_path)
    num_gradients = STEPS * len(list(Net().parameters()))
    for ours, theirs in zip(first[:num_gradients], second[:num_gradients], strict=True):
        assert_close(ours, theirs, EXACT)


def one_token_rank(rank: int, num_ranks: int) -> Tensor:
    net = nn.Sequential(PRepBN(C))
    sync_norms_(net)
    net[0].set_gamma(0)
    return net(torch.full((1, 1, C), float(rank)))


def test_one_token_a_rank_is_enough_when_statistics_are_shared(tmp_path: Path) -> None:
    first, second = run_ranks(one_token_rank, tmp_path)
    assert_close(first, -torch.ones(1, 1, C), 1e-4)  # 0 and 1, normalised together
    assert_close(second, torch.ones(1, 1, C), 1e-4)


def two_forwards_rank(rank: int, num_ranks: int) -> Tensor:
    net = Net()
    wrapped = DistributedDataParallel(net)
    for block in net.blocks:
        block[0].set_gamma(0.5)
    x = torch.randn(2, 3, C, dtype=torch.float64)
    (wrapped(x) * wrapped(x + 1)).mean().backward()  # DDP writes all buffers in place before the second
    return net.blocks[0][0].norm.weight.grad


def test_two_forwards_before_one_backward_work_under_ddp(tmp_path: Path) -> None:
    first, second = run_ranks(two_forwards_rank, tmp_path)
    assert first.any()
    assert_close(first, second, EXACT)


def fail(rank: int, num_ranks: int) -> None:
    raise KeyError(f"of rank {rank}")


def test_errors_of_a_rank_are_raised_here(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="of rank"):
        run_ranks(fail, tmp_path)
