"""RepBN on tensors: ``BN(x) + eta * x`` with the batch's own statistics, forward and backward in closed form."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from slabformer.ops.moments import Moments, accumulation_dtype, flat_tokens


def rep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eta: Tensor,
    moments: Moments,
    eps: float,
    mask: Tensor | None = None,
    shared: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias + eta * x`` (Guo et al. 2024, RepBN), one pass over ``x``.

    Gradients run through the statistics, as in BatchNorm. Sums over tokens are float32 or better.

    Args:
        x: Tokens ``(*, C)``.
        weight: ``(C,)``.
        bias: ``(C,)``.
        eta: Skip weight ``(1,)``.
        moments: Statistics of this very ``x`` (of all ranks' ``x`` when ``shared``), taken as a function of it.
        eps: Added to the variance.
        mask: Tokens ``(*,)`` that the statistics were taken over; all when None.
        shared: Whether the statistics, and so their gradients, are sums over ranks.
        group: Process group of those ranks; the default group when None.
    """
    inv_std = torch.rsqrt(moments.var + eps)
    tokens, mask = flat_tokens(x, mask)
    y = _RepNorm.apply(tokens, weight, bias, eta, moments.mean, inv_std, moments.count, mask, shared, group)
    return y.view(x.shape)


class _RepNorm(torch.autograd.Function):
    """Hand-written because autograd through ``var_mean`` costs three times the memory traffic in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eta: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        count: Tensor,
        mask: Tensor | None,
        shared: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, eta, mean, inv_std, count, mask)
        ctx.shared, ctx.group = shared, group
        gain = weight * inv_std
        scale, shift = _materialise(gain + eta, bias - gain * mean)
        y = torch.addcmul(shift, x.to(shift.dtype), scale)
        # where nothing is converted, torch 2.11 compiles the result of to() as a second output: the gradient goes there
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, eta, mean, inv_std, count, mask = ctx.saved_tensors
        dtype = accumulation_dtype(x.dtype)
        axes = tuple(range(x.ndim - 1))
        g = grad.to(dtype)
        centred = x.to(dtype) - mean
        sum_g = g.sum(axes)
        products = g * centred
        if mask is not None:
            products = torch.where(g == 0, 0, products)  # padding may hold NaN, which 0 times would let through
        sum_gc = products.sum(axes)
        grad_eta = (sum_gc + mean * sum_g).sum().reshape(eta.shape)
        grad_weight = sum_gc * inv_std
        grad_bias = sum_g
        if ctx.shared:
            sums = torch.cat([sum_g, sum_gc])
            dist.all_reduce(sums, group=ctx.group)
            sum_g, sum_gc = sums.chunk(2)
        # through the statistics: every valid token moved the mean and the variance that all tokens saw
        gain = weight * inv_std / count.clamp(min=1)
        scale, shift, slope = _materialise(weight * inv_std + eta, -gain * sum_g, -gain * inv_std.square() * sum_gc)
        through = torch.addcmul(shift, centred, slope)
        if mask is not None:
            through = torch.where(mask.unsqueeze(-1), through, 0)
        grad_x = through.addcmul_(g, scale).to(x.dtype)
        grads = (grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_eta.to(eta.dtype))
        return (*grads, None, None, None, None, None, None)


def _materialise(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Vectors that compiled code computes once: it would inline their square roots into the loop over all tokens."""
    return torch.stack(vectors).unbind()


def keep_in_graph(x: Tensor, *unused: Tensor) -> Tensor:
    """``x`` itself, with gradients of zero for ``unused``: DistributedDataParallel waits for what is off too."""
    return _KeepInGraph.apply(x, *unused) if torch.is_grad_enabled() else x


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *unused: Tensor) -> Tensor:
        ctx.unused = [(t.shape, t.dtype, t.device) for t in unused]
        return x.detach()  # no view, so that the caller may edit it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.unused))
