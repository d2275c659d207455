"""RepBN: BatchNorm with a learnable skip, the form that every norm is deployed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slabformer.nn.affine import Affine
from slabformer.nn.sync import StatisticsSync
from slabformer.ops.affine import repbn_scale_shift
from slabformer.ops.moments import (
    Moments,
    MomentsAccumulator,
    accumulation_dtype,
    batch_moments,
    in_backward,
    share_moments,
    update_running_,
)
from slabformer.ops.rep_norm import rep_norm


class RepBN(nn.Module):
    """BatchNorm with a learnable skip, ``BN(x) + eta * x`` (Guo et al. 2024, RepBN).

    In eval mode it is one scale and shift per channel, so :func:`slabformer.fuse` can remove it. Which tokens count
    for the statistics is set by :func:`slabformer.token_mask`, which ranks share them by
    :func:`slabformer.sync_norms_`.

    Args:
        dim: Channels ``C``.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None averages all batches alike.
        eta: Initial skip weight: 1 in the paper's vision models, 0 in its language model.
        channel_dim: Axis of the channels: -1 for tokens, 1 for maps.

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same shape and dtype. Statistics run over every
        axis but the channels'.

    Raises:
        ValueError: If the channel axis of the input is not ``dim``, the token mask does not fit the tokens, or a
            training batch holds a single token.
    """

    if TYPE_CHECKING:  # TorchScript would read them
        running_mean: Tensor
        running_var: Tensor
        num_batches_tracked: Tensor

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        eta: float = 1.0,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channel_dim not in (-1, 1):
            raise ValueError(f"channel_dim must be -1 (tokens) or 1 (maps), got {channel_dim}")
        self.normalized_shape, self.channel_dim = (dim,), channel_dim
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.eta = nn.Parameter(torch.full((1,), float(eta), device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(dim, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(dim, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        #: first batches are averaged alike, so that running statistics forget their start of (0, 1) at once
        self.warm_statistics = False
        self.token_mask: Tensor | None = None
        self.sync: StatisticsSync | None = None
        #: set while recalibrating: batch statistics go here and the running ones stay
        self.accumulator: MomentsAccumulator | None = None
        self._mask_of_forward: Tensor | None = None

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """RepBN of ``x``, times the scalar tensor ``share`` where one is given."""
        if torch.jit.is_scripting():
            if self.training or share is not None:
                raise RuntimeError("norms in TorchScript are for inference; call eval() on the scripted model")
            return self._by_running_statistics(
                x.movedim(self.channel_dim, -1), self.weight, self.bias, self.eta
            ).movedim(-1, self.channel_dim)
        tokens = self._tokens_last(x)
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        eta: Tensor = self.eta
        if share is not None:
            weight, bias, eta = weight * share, bias * share, eta * share
        if self.training or self.accumulator is not None:
            moments = self.observe(tokens, tokens_last=True)
            shared = self._shares_batch()
            group = self.sync.group if self.sync is not None else None
            y = rep_norm(tokens, weight, bias, eta, moments, self.eps, self.token_mask, shared, group)
        else:
            y = self._by_running_statistics(tokens, weight, bias, eta)
        return y.movedim(-1, self.channel_dim)

    def _by_running_statistics(self, tokens: Tensor, weight: Tensor, bias: Tensor, eta: Tensor) -> Tensor:
        variance = self.running_var.to(accumulation_dtype(tokens.dtype))
        scale = weight * torch.rsqrt(variance + self.eps)
        shift = torch.addcmul(bias, self.running_mean, scale, value=-1)
        return torch.addcmul(shift, tokens, scale + eta).to(tokens.dtype)

    def observe(self, x: Tensor, tokens_last: bool = False) -> Moments:
        """Take the batch's statistics into the running ones (or the accumulator) and return them, without gradient."""
        tokens = x if tokens_last else self._tokens_last(x)
        self._check_tokens(tokens)
        with torch.no_grad():
            dtype = torch.float64 if self.accumulator is not None else None
            moments = batch_moments(tokens, self.token_mask, dtype)
            if self.accumulator is not None:
                self.accumulator.add(moments)
            if self._shares_batch() and self.sync is not None:
                moments = share_moments(moments, self.sync.group)
            if self.accumulator is not None:
                dtype = accumulation_dtype(tokens.dtype)
                return Moments(*(t.to(dtype) for t in (moments.count, moments.mean, moments.var)))
            self._check_recomputation()
            update_running_(
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
                moments,
                self.momentum,
                average_first=self.warm_statistics,
            )
        return moments

    def _shares_batch(self) -> bool:
        """Whether the batch is that of all ranks together; while recalibrating, one may have run out of data."""
        together = self.accumulator is None or self.accumulator.normalise_together
        return together and self.sync is not None and self.sync.active

    def _check_recomputation(self) -> None:
        """Refuse another token mask in the recomputation by activation checkpointing than in its forward."""
        if torch.compiler.is_compiling():
            return
        if not in_backward():
            self._mask_of_forward = self.token_mask
        elif self._mask_of_forward is not self.token_mask:
            raise RuntimeError(
                "the token mask changed between forward and its recomputation by activation checkpointing; "
                "keep backward() inside the `with token_mask(...)` block"
            )

    def _tokens_last(self, x: Tensor) -> Tensor:
        dim = self.normalized_shape[0]
        if x.ndim < 2 or x.shape[self.channel_dim] != dim:
            raise ValueError(
                f"RepBN over {dim} channels on axis {self.channel_dim}, got input of shape {tuple(x.shape)}"
            )
        return x.movedim(self.channel_dim, -1)

    def _check_tokens(self, tokens: Tensor) -> None:
        if self.token_mask is not None and self.token_mask.shape != tokens.shape[:-1]:
            raise ValueError(
                f"token mask of shape {tuple(self.token_mask.shape)} does not fit tokens of shape "
                f"{tuple(tokens.shape[:-1])}; give one boolean per token, or set it to None"
            )
        alone = self.sync is None or not self.sync.active
        if self.training and alone and tokens.numel() <= tokens.shape[-1]:
            raise ValueError("RepBN needs more than one token to train on; enlarge the batch or call eval()")

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The map of eval mode, ``x * scale + shift``, float64 ``(C,)`` each."""
        return repbn_scale_shift(self.weight, self.bias, self.running_mean, self.running_var, self.eta, self.eps)

    def fuse(self) -> Affine:
        """The same map as an :class:`Affine`; timm's ``reparameterize_model`` calls this."""
        scale, shift = self.scale_shift()
        affine = Affine.of(scale, shift, like=self.weight, channel_dim=self.channel_dim, eps=self.eps)
        return affine.train(self.training)

    def extra_repr(self) -> str:
        """Channels and settings."""
        return f"{self.normalized_shape[0]}, eps={self.eps}, momentum={self.momentum}, channel_dim={self.channel_dim}"
