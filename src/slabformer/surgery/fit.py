"""Start RepBN where LayerNorm is: a least-squares fit, norm after norm, on some batches."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slabformer._torch import uncompiled
from slabformer.nn.attention_masks import padding_left_out
from slabformer.nn.controls import prepbn_modules
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.statistics import check_statistics
from slabformer.ops.moments import MomentsAccumulator, accumulation_dtype
from slabformer.settings import PositiveInt, checked
from slabformer.surgery.batches import NO_BATCH, call_model, eval_mode, model_device, to_device
from slabformer.surgery.lockstep import TeacherForwards, replaced
from slabformer.surgery.normal import makes_ordinary_tensors
from slabformer.surgery.ranks import NO_MORE, Ranks
from slabformer.surgery.regression import TokenSums

logger = logging.getLogger(__name__)

#: share of the old norm's output on the fitted model's own stream in what a norm is fitted to; the rest is the
#: teacher's. It keeps errors from adding up where the stream has drifted (docs/log.md)
OWN_SHARE = 0.5
#: a line per channel through fewer tokens than this is told about
FEW_TOKENS = 16
#: a channel that varies less than this share of the one that varies most, after standardising, is constant
DEAD = 1e-8


@makes_ordinary_tensors
@checked
def fit_norms_(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: PositiveInt | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Fit RepBN of every PRepBN to its old norm by least squares, in order of execution, in one pass over the data.

    Two forwards run side by side on each batch: the teacher's, with the old norms, and the fitted model's, which has
    lost all norms up to the one that is being fitted. So each norm is fitted to the teacher's output on inputs that
    the fitted norms before it really give, and corrects for their errors instead of adding to them. The fit of a norm
    takes in each batch before the batch goes on, and serves all later ones.

    The fit is one line per channel. Errors count relative to a token's standard deviation, so that tokens of massive
    activations do not decide alone, and half of the target is the old norm's output on the fitted model's own
    tokens. ``eta`` becomes 0: the gain alone holds the slope. Running statistics are those of the fitted model's
    activations. A norm that is called several times, or whose gain is tied to another's, gets one fit for all.

    Time: two forwards a batch. Memory: beyond one forward, what another one holds while it waits at a norm. A few
    thousand tokens are enough.

    Args:
        model: Edited in place, once all batches have run; gamma must still be 1.
        batches: As for :func:`slabformer.recalibrate_`: padding is left out by ``attention_mask``, and after
            :func:`slabformer.sync_norms_` all ranks fit to what they bring together, before DistributedDataParallel.
        num_batches: Stop after so many; all by default.
        forward: As for :func:`slabformer.recalibrate_`; it must call the model that it is given.

    Returns:
        Number of batches used on this rank.

    Raises:
        ValueError: If the model has no PRepBN or cannot be copied, fading has begun, ``batches`` is empty, an
            activation is not finite, or the norms run in another order with the old norms than without (nothing is
            changed then).
    """
    norms = prepbn_modules(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no PRepBN to fit; call convert_norms_(model) first")
    begun = [name for name, norm in norms.items() if float(norm.gamma) < 1]
    if begun:
        raise ValueError(f"fading has begun (gamma of {begun[0]} is below 1); fit before training")
    model = uncompiled(model)
    norms = prepbn_modules(model)
    fit = _Fit(norms)
    with torch.no_grad(), _eager():
        teacher = TeacherForwards(model, norms)
        with eval_mode(model), _watching(norms.values()), padding_left_out(model):
            count = fit.run(model, teacher, itertools.islice(batches, num_batches), forward or call_model)
        fit.write()
    return count


class _Line(NamedTuple):
    """What RepBN is to hold, float64 ``(C,)`` each."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor


class _Fit:
    """Sums over the tokens of every norm, and the lines that they make by now."""

    def __init__(self, norms: Mapping[str, PRepBN]) -> None:
        self._norms = norms
        self._sums = {name: _no_tokens(norm) for name, norm in norms.items()}
        self._ranks = Ranks(norms, max(len(sums.row()) for sums in self._sums.values()))
        self._batch = 0
        self._next_of_teacher: Callable[[], tuple[str, Tensor] | None]

    def run(
        self, model: nn.Module, teacher: TeacherForwards, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any]
    ) -> int:
        """Both forwards on each batch; returns how many this rank had."""
        device, count = model_device(model), 0
        with replaced(self._norms, self._compute), self._ranks.fail_together():
            for batch in self._ranks.in_step(batches):
                self._batch += 1
                if batch is not NO_MORE:
                    count += 1
                    batch = to_device(batch, device)
                    with teacher.of(call, batch) as self._next_of_teacher:
                        call(model, batch)
                        if (more := self._next_of_teacher()) is not None:
                            raise ValueError(_other_order(more[0], "no norm"))
                for name, rows in self._ranks.follow():
                    self._merge(name, rows)
        return count

    def _compute(self, name: str, x: Tensor) -> Tensor:
        """What the fitted norm makes of ``x``, once ``x`` and the teacher's output have been taken in."""
        answer = self._next_of_teacher()
        if answer is None or answer[0] != name:
            raise ValueError(_other_order("no norm" if answer is None else answer[0], name))
        norm = self._norms[name]
        own = norm.norm(x).to(x.dtype)
        if answer[1].shape != own.shape:
            raise ValueError(_other_order(f"{name} on {tuple(answer[1].shape)}", f"{name} on {tuple(own.shape)}"))
        axis = norm.rep.channel_dim
        tokens, target = x.movedim(axis, -1), answer[1].lerp(own, OWN_SHARE).movedim(axis, -1)
        self._take_in(name, tokens, target, norm.rep.mask_of(tokens))
        if not self._sums[name].alike.weight:
            return own  # every token so far is padding
        weight, bias, mean, var = self._line(name)
        scale = weight * torch.rsqrt(var + norm.rep.eps)
        dtype = accumulation_dtype(x.dtype)
        scale, shift = (t.to(x.device, dtype) for t in (scale, bias - scale * mean))
        return torch.addcmul(shift, tokens, scale).to(x.dtype).movedim(-1, axis)

    def _take_in(self, name: str, tokens: Tensor, target: Tensor, mask: Tensor | None) -> None:
        sums = _no_tokens(self._norms[name])
        sums.add(*((t.flatten(0, -2) if mask is None else t[mask]) for t in (tokens, target)))
        self._merge(name, self._ranks.gather(name, sums.row()))

    def _merge(self, name: str, rows: Iterable[Tensor]) -> None:
        """Take in the sums of a batch on each rank, in the same order on all."""
        for row in rows:
            if not row.isfinite().all():
                raise ValueError(
                    f"inputs or outputs of {name} are not finite in batch {self._batch}; check the data and the weights"
                )
            self._sums[name].merge_row(row)

    def _line(self, name: str) -> _Line:
        """The best line for ``name``, and for the norms that its gain or offset is tied to as well."""
        mean, var = self._population(name)
        weight = self._weight(name)
        total, offset = torch.zeros_like(mean), torch.zeros_like(mean)
        for other in self._tied_to(name, "bias"):
            sums = self._sums[other].relative
            other_mean, other_var = self._population(other)
            slope = self._weight(other) * torch.rsqrt(other_var + self._norms[other].rep.eps)
            offset += sums.weight * (sums.mean[1] - slope * (sums.mean[0] - other_mean))
            total += sums.weight
        return _Line(weight, offset / total, mean, var)

    def _weight(self, name: str) -> Tensor:
        products: Tensor | float = 0.0
        squares: Tensor | float = 0.0
        for other in self._tied_to(name, "weight"):
            sums = self._sums[other].relative
            inv_std = torch.rsqrt(self._population(other)[1] + self._norms[other].rep.eps)
            products = products + inv_std * sums.products[1]
            squares = squares + inv_std.square() * sums.products[0]
        assert isinstance(products, Tensor)
        assert isinstance(squares, Tensor)
        varies = squares > DEAD * squares.max()
        return torch.where(varies, products / squares.where(varies, 1), 0)

    def _population(self, name: str) -> tuple[Tensor, Tensor]:
        sums = self._sums[name].alike
        return sums.mean[0], sums.products[0] / sums.weight

    def _tied_to(self, name: str, leaf: str) -> list[str]:
        """Norms that share this parameter of ``name`` and have seen a token, itself included."""
        parameter = getattr(self._norms[name].rep, leaf)
        return [
            other
            for other, norm in self._norms.items()
            if getattr(norm.rep, leaf) is parameter and self._sums[other].alike.weight
        ]

    def write(self) -> None:
        """Give every norm that has seen a token its line.

        Raises:
            ValueError: If none has, or statistics overflow; nothing is written then.
        """
        lines = {name: self._line(name) for name in self._norms if self._sums[name].alike.weight}
        if not lines:
            raise ValueError(NO_BATCH)
        check_statistics({name: (line.mean, line.var) for name, line in lines.items()})
        for name, (weight, bias, mean, var) in lines.items():
            rep = self._norms[name].rep
            rep.eta.zero_()
            rep.weight.copy_(weight)
            rep.bias.copy_(bias)
            rep.running_mean.copy_(mean)
            rep.running_var.copy_(var)
        self._warn_of_few_tokens(lines)

    def _warn_of_few_tokens(self, names: Iterable[str]) -> None:
        counts = {name: int(self._sums[name].alike.weight) for name in names}
        few = [name for name, count in counts.items() if count < FEW_TOKENS]
        if few:
            more = f" (and {len(few) - 1} more like it)" if few[1:] else ""
            logger.warning("the fit of %s%s rests on %d tokens; give more batches", few[0], more, counts[few[0]])


def _no_tokens(norm: PRepBN) -> TokenSums:
    return TokenSums(norm.normalized_shape[0], norm.rep.running_mean.device)


def _other_order(teacher: str, fitted: str) -> str:
    return (
        f"the forward with the old norms calls {teacher} where the fitted one calls {fitted}; a model whose path "
        "depends on the data cannot be fitted"
    )


@contextmanager
def _watching(norms: Iterable[PRepBN]) -> Iterator[None]:
    """Norms have an accumulator inside the block, which is how those that set token masks know who needs them."""
    reps = [norm.rep for norm in norms]
    for rep in reps:
        rep.accumulator = MomentsAccumulator(rep.num_features, rep.running_mean.device)
    try:
        yield
    finally:
        for rep in reps:
            rep.accumulator = None


def _eager() -> AbstractContextManager[Any]:
    """Compiled code holds what norms computed before; nothing is compiled where Dynamo was never imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
