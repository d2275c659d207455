"""Count, mean and squared deviations per channel: of a batch, over ranks, over a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from slabformer._torch import in_backward
from slabformer.ops.precision import wide, wide_device


@dataclass(frozen=True)
class Moments:
    """First two moments of the valid tokens, per channel.

    Shape:
        ``count`` is a scalar tensor, ``mean`` and ``var`` (biased) are ``(C,)``.
    """

    count: Tensor
    mean: Tensor
    var: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that sums over tokens run in: float64 stays, everything shorter becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flat_tokens(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x`` as ``(N, C)`` and ``mask`` as ``(N,)`` where that costs no copy.

    Compiled sums over one axis take half the time of sums over two.
    """
    return (x.flatten(0, -2), None if mask is None else mask.flatten()) if x.is_contiguous() else (x, mask)


def batch_moments(x: Tensor, mask: Tensor | None = None, dtype: torch.dtype | None = None) -> Moments:
    """Moments of ``x`` over every axis but the last, in two passes so that a large mean costs no digits.

    Args:
        x: Tokens ``(*, C)``.
        mask: Valid tokens, boolean ``(*,)``; the others count as absent whatever they hold.
        dtype: Dtype of the sums; float32 by default, float64 for float64 input.
    """
    x, mask = flat_tokens(x.to(dtype or accumulation_dtype(x.dtype)), mask)
    axes = tuple(range(x.ndim - 1))
    if mask is None:
        count = x.new_full((), x.numel() // x.shape[-1])
        mean = x.sum(axes) / count.clamp(min=1)
        squares = (x - mean).square()
    else:
        valid = mask.unsqueeze(-1)
        count = mask.sum(dtype=x.dtype)
        mean = torch.where(valid, x, 0).sum(axes) / count.clamp(min=1)
        squares = torch.where(valid, x - mean, 0).square()
    return Moments(count, mean, squares.sum(axes) / count.clamp(min=1))


def share_moments(moments: Moments, group: dist.ProcessGroup | None) -> Moments:
    """Moments over all ranks from one all-reduce of count, sum and sum of squares, in float64.

    The sums are taken from moments rather than from raw values, so that no digits are lost before float64.
    Ranks may hold different numbers of tokens, zero included.
    """
    count, mean, var = (wide(t) for t in (moments.count, moments.mean, moments.var))
    sums = torch.cat([count.reshape(1), count * mean, count * (var + mean.square())])
    dist.all_reduce(sums, group=group)
    count, total, squares = sums.split([1, mean.numel(), mean.numel()])
    count = count.squeeze()
    mean = total / count.clamp(min=1)
    var = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    like = moments.mean
    return Moments(count.to(like), mean.to(like), var.to(like))


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    moments: Moments,
    momentum: float | None,
    average_first: bool = False,
) -> None:
    """Move running statistics towards a batch's, the variance unbiased as in ``nn.BatchNorm1d``; compiled or not.

    Fewer than two tokens have no variance and change nothing. Inside backward nothing changes either: activation
    checkpointing runs a forward again there, and it must not count twice.

    Args:
        running_mean: ``(C,)``, edited in place.
        running_var: ``(C,)``, edited in place.
        num_batches: Scalar of integers, counts the batches.
        moments: Of the batch.
        momentum: Weight of the batch; None averages all batches alike.
        average_first: Average the first batches alike, until ``momentum`` weighs more.
    """
    dtype = moments.mean.dtype
    enough = moments.count > 1
    seen = num_batches + enough
    rate = 1.0 / seen.clamp(min=1).to(dtype)
    if momentum is not None:
        rate = rate.clamp(min=momentum) if average_first else torch.full_like(rate, momentum)
    rate = torch.where(enough, rate, 0)
    unbiased = moments.var * (moments.count / (moments.count - 1).clamp(min=1))
    mean = torch.lerp(running_mean, moments.mean.to(running_mean.dtype), rate.to(running_mean.dtype))
    var = torch.lerp(running_var, unbiased.to(running_var.dtype), rate.to(running_var.dtype))
    store = torch.ops.slabformer.store_running_ if torch.compiler.is_compiling() else _store_running
    store(running_mean, running_var, num_batches, mean, var, seen)


def _store_running(
    running_mean: Tensor, running_var: Tensor, num_batches: Tensor, mean: Tensor, var: Tensor, seen: Tensor
) -> None:
    if in_backward():
        return
    running_mean.copy_(mean)
    running_var.copy_(var)
    num_batches.copy_(seen)


# an operator of its own, because compiled code cannot ask at run time whether it is being recomputed
torch.library.custom_op(
    "slabformer::store_running_",
    _store_running,
    mutates_args=("running_mean", "running_var", "num_batches"),
    schema=(
        "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches, Tensor mean, Tensor var, "
        "Tensor seen) -> ()"
    ),
)


class MomentsAccumulator:
    """Moments of a stream of batches, merged exactly in float64 (Chan et al. 1979, eq. 2.1).

    Averaging the variances of batches would lose the variance between them; merging squared deviations does not.
    """

    def __init__(self, num_channels: int, device: torch.device) -> None:
        device = wide_device(device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self.squares = torch.zeros(num_channels, dtype=torch.float64, device=device)
        #: whether every rank has a batch at this moment, so that all normalise by what they hold together
        self.normalise_together = False

    def add(self, moments: Moments) -> None:
        """Merge the moments of one more batch; nothing is read back to the host."""
        count, mean, var = (wide(t) for t in (moments.count, moments.mean, moments.var))
        total = self.count + count
        share = count / total.clamp(min=1)
        delta = mean - self.mean
        self.mean += delta * share
        self.squares += var * count + delta.square() * self.count * share
        self.count = total

    def result(self, group: dist.ProcessGroup | None = None, shared: bool = False) -> Moments:
        """Population moments of everything added, over all ranks when ``shared``."""
        moments = Moments(self.count, self.mean, self.squares / self.count.clamp(min=1))
        return share_moments(moments, group) if shared else moments
