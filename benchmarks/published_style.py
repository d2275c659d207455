"""Our models computed the way SLAB was published, the slow reference of every speed: norms unfused and channels first,
heads copied into the batch, attention and depthwise branch as a chain of einsums, transposes and copies in eager
mode."""

from __future__ import annotations

import copy
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn import PRepBN, RepBN
from slabformer.nn.attention import LinearAttentionCore
from slabformer.nn.resample import Grid, resize_tokens

EPS = 1e-6


def published_style(model: nn.Module) -> nn.Module:
    """A copy of ``model``, in eval mode with gamma 0, that computes the same as published.

    CSWin's two convolutions of the values stay one, as in our model.
    """
    slow = copy.deepcopy(model).eval()
    for module in list(slow.modules()):
        if isinstance(module, LinearAttentionCore):
            module.attend = MethodType(_attend, module)
            module.local = MethodType(_local, module)
        for name, child in module.named_children():
            rep = child.rep if isinstance(child, PRepBN) else child
            if isinstance(rep, RepBN):
                setattr(module, name, ChannelsFirstRepBN(rep))
    return slow


class ChannelsFirstRepBN(nn.Module):
    """RepBN through ``F.batch_norm`` on transposed tokens, plus the skip."""

    def __init__(self, rep: RepBN) -> None:
        super().__init__()
        self.rep = rep

    def forward(self, x: Tensor) -> Tensor:
        rep, tokens = self.rep, x.flatten(1, -2).transpose(1, 2)
        y = F.batch_norm(tokens, rep.running_mean, rep.running_var, rep.weight, rep.bias, eps=rep.eps)
        return (y + rep.eta * tokens).transpose(1, 2).reshape(x.shape)


def _attend(
    self: LinearAttentionCore,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_grid: Grid,
    mask: None = None,
    kernels: tuple[Tensor, Tensor | None] | None = None,
    biases: None = None,
    native: bool = False,
) -> Tensor:
    assert mask is None, "published SLAB knows no masks"
    assert biases is None, "its projections add their own"
    assert not native, "it has no kernels"
    shape = q.shape
    local = 0.0 if kernels is None else _convolved(v, key_grid, *kernels)
    q, k, v = (t.contiguous().flatten(0, 1).float() for t in (q, self.placed(k, key_grid), v))
    q, k = q.relu(), k.relu()
    z = 1 / (torch.einsum("bic,bc->bi", q, k.sum(1)) + EPS)
    (i, c), (j, d) = q.shape[1:], v.shape[1:]
    if i * j * (c + d) > c * d * (i + j):
        x = torch.einsum("bic,bcd,bi->bid", q, torch.einsum("bjc,bjd->bcd", k, v), z)
    else:
        x = torch.einsum("bij,bjd,bi->bid", torch.einsum("bic,bjc->bij", q, k), v, z)
    return x.view(*shape[:3], d).to(self.dwc.weight.dtype) + local


def _local(self: LinearAttentionCore, v: Tensor, old: Grid, new: Grid) -> Tensor:
    tokens = resize_tokens(v.flatten(0, 1), old, new).unflatten(0, v.shape[:2])
    return _convolved(tokens, new, *self.shared_kernels())


def _convolved(v: Tensor, grid: Grid, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Values ``(B, num_heads, N, D)`` through kernels ``(1 or num_heads, D, K, K)``, channels first and back."""
    B, num_heads, _, D = v.shape
    maps = v.transpose(2, 3).reshape(B, num_heads * D, *grid).contiguous()
    weight = weight.expand(num_heads, -1, -1, -1).flatten(0, 1)[:, None]
    bias = None if bias is None else bias.expand(num_heads, -1).flatten()
    maps = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=num_heads * D)
    return maps.flatten(2).unflatten(1, (num_heads, D)).transpose(2, 3).contiguous()
