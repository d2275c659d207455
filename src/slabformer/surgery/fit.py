"""Start RepBN where LayerNorm is: a least-squares fit on some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slabformer.nn.controls import blended, prepbn_modules
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.statistics import check_statistics
from slabformer.ops.precision import wide, wide_device
from slabformer.settings import PositiveInt, checked
from slabformer.surgery.batches import NO_BATCH, eval_mode, run_batches


class _Regression:
    """Running sums for a line per channel, ``y = slope * x + offset``, in float64."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.count = 0
        self.origin: Tensor | None = None
        self.sums = torch.zeros(4, dim, dtype=torch.float64, device=wide_device(device))

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = wide(x), wide(y)
        if not x.shape[0]:
            return
        if self.origin is None:  # shifting by a first mean keeps the digits of the sums of squares
            self.origin = x.mean(0)
        x = x - self.origin
        self.count += x.shape[0]
        self.sums += torch.stack([x.sum(0), y.sum(0), x.square().sum(0), (x * y).sum(0)])

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Take the sums of all ranks together; one that saw no token brings none."""
        own = self.origin if self.origin is not None else torch.zeros_like(self.sums[0])
        row = torch.cat([own.new_tensor([float(self.count)]), own])
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, row, group=group)
        counts = torch.stack(rows)[:, 0].tolist()
        self.count = int(sum(counts))
        if not self.count:
            return
        self.origin = next(row[1:] for row, count in zip(rows, counts, strict=True) if count)
        shift, count = own - self.origin, row[0]
        x, y, xx, xy = self.sums
        self.sums = torch.stack([x + count * shift, y, xx + 2 * shift * x + count * shift.square(), xy + shift * y])
        dist.all_reduce(self.sums, group=group)

    def solve(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slope, mean of y, mean of x and variance of x, ``(C,)`` each."""
        assert self.origin is not None
        mean_x, mean_y, mean_xx, mean_xy = self.sums / self.count
        variance = (mean_xx - mean_x.square()).clamp(min=0)  # rounding may leave it below
        slope = (mean_xy - mean_x * mean_y) / variance.clamp(min=1e-12)
        return slope, mean_y, mean_x + self.origin, variance


@checked
def fit_norms_(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: PositiveInt | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Fit ``eta``, weight, bias and statistics of every PRepBN to its LayerNorm's output by least squares.

    The published start (``eta`` 1, weight 1) adds the raw residual stream and may explode; after this, RepBN is the
    best affine approximation of the norm that it replaces, so that fading starts from nearly the same function. ``eta``
    takes what the slopes of all channels have in common, the weights what is left:
    ``weight_c = (slope_c - eta) * sqrt(var_c + eps)``.

    Args:
        model: Edited in place; gamma must still be 1.
        batches: As for :func:`slabformer.recalibrate_`: after :func:`slabformer.sync_norms_` all ranks fit to what they
            bring together, before DistributedDataParallel.
        num_batches: Stop after so many; all by default.
        forward: As for :func:`slabformer.recalibrate_`.

    Returns:
        Number of batches used on this rank.

    Raises:
        ValueError: If the model has no PRepBN, fading has begun, ``batches`` is empty, or an activation is not finite
            (nothing is changed then).
    """
    norms = prepbn_modules(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no PRepBN to fit; call convert_norms_(model) first")
    begun = [name for name, norm in norms.items() if float(norm.gamma) < 1]
    if begun:
        raise ValueError(f"fading has begun (gamma of {begun[0]} is below 1); fit before training")
    fits = {norm: _Regression(norm.normalized_shape[0], norm.weight.device) for norm in norms.values()}

    def note(norm: PRepBN, args: tuple[Any, ...], output: Tensor) -> None:
        axis = norm.rep.channel_dim
        x, y = args[0].movedim(axis, -1), output.movedim(axis, -1)
        mask = norm.rep.mask_of(x)
        fits[norm].add(*((t.flatten(0, -2) if mask is None else t[mask]) for t in (x, y)))

    handles = [norm.register_forward_hook(note) for norm in fits]
    phases = {norm: norm.phase for norm in fits}
    for norm in fits:
        norm.set_gamma(1)  # not the begin of fading, but the old norm alone
    try:
        with eval_mode(model), blended(model):
            count = run_batches(model, batches, num_batches, forward)
    finally:
        for handle in handles:
            handle.remove()
        for norm, phase in phases.items():
            norm.set_gamma(1, phase)
    for norm, fit in fits.items():
        if norm.rep.sync is not None and norm.rep.sync.active:
            fit.share(norm.rep.sync.group)
    if not count and not any(fit.count for fit in fits.values()):
        raise ValueError(NO_BATCH)
    for name, norm in norms.items():
        if not fits[norm].sums.isfinite().all():
            raise ValueError(f"inputs or outputs of {name} are not finite; check the data")
    fitted = {name: norm for name, norm in norms.items() if fits[norm].count}
    for norm in fitted.values():
        _write(norm, fits[norm])
    check_statistics({name: (norm.rep.running_mean, norm.rep.running_var) for name, norm in fitted.items()})
    return count


@torch.no_grad()
def _write(norm: PRepBN, fit: _Regression) -> None:
    slope, mean_y, mean_x, variance = fit.solve()
    rep = norm.rep
    eta = (variance * slope).sum() / variance.sum().clamp(min=1e-12)
    rep.eta.fill_(eta)
    rep.weight.copy_((slope - eta) * (variance + rep.eps).sqrt())
    rep.bias.copy_(mean_y - eta * mean_x)
    rep.running_mean.copy_(mean_x)
    rep.running_var.copy_(variance)
