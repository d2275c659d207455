"""RepBN: BatchNorm with a learnable skip, the form that every norm is deployed in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slabformer._torch import BatchNorm, NormBase, in_backward
from slabformer.nn.affine import Affine
from slabformer.nn.device import Device
from slabformer.nn.float32 import KeepsFloat32
from slabformer.nn.statistics import check_statistics
from slabformer.nn.sync import StatisticsSync
from slabformer.ops.affine import repbn_scale_shift
from slabformer.ops.moments import (
    Moments,
    MomentsAccumulator,
    accumulation_dtype,
    batch_moments,
    share_moments,
    update_running_,
)
from slabformer.ops.precision import has_float64
from slabformer.ops.rep_norm import rep_norm
from slabformer.settings import ChannelDim, Eta, Fraction, NonNegativeFloat, PositiveInt, checked

logger = logging.getLogger(__name__)

#: of every RepBN in the published vision models
PUBLISHED_ETA = 1.0


class RepBN(KeepsFloat32, BatchNorm):
    """BatchNorm with a learnable skip, ``BN(x) + eta * x`` (Guo et al. 2024, RepBN).

    In eval mode it is one scale and shift per channel, so :func:`slabformer.fuse` can remove it. Which tokens count
    for the statistics is set by :func:`slabformer.token_mask`, which ranks share them by
    :func:`slabformer.sync_norms_`.

    A BatchNorm to other libraries, so that parameter groups, freezing loops (``eval()`` holds the statistics still) and
    ``torch.optim.swa_utils.update_bn`` treat it as one. Running statistics are float32 (float64 in a float64 model)
    whatever the parameters' dtype: float16 overflows at a standard deviation of 256, bfloat16 drifts.

    Args:
        dim: Channels ``C``.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None averages all batches alike.
        eta: Initial skip weight. With 0 the output is bounded as BatchNorm's is; "published" is 1, that of the paper's
            vision models, which lets the residual stream through and explodes in deep ones (docs/log.md). Trained like
            any weight.
        channel_dim: Axis of the channels: -1 for tokens, 1 for maps.

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same shape and dtype. Statistics run over every
        axis but the channels'.

    Raises:
        ValueError: If the channel axis of the input is not ``dim``, no token mask fits the tokens, or a training batch
            holds a single token.
        TypeError: If another library rebuilds it as a plain BatchNorm, which would lose ``eta``.
    """

    float32_buffers = ("running_mean", "running_var")
    __constants__ = []  # noqa: RUF012 - as torch has it; its own would ask for `affine`
    __jit_ignored_attributes__ = ("affine", "observes_while_warm")

    if TYPE_CHECKING:  # TorchScript would read them
        running_mean: Tensor
        running_var: Tensor
        num_batches_tracked: Tensor

    @checked
    def __init__(
        self,
        dim: PositiveInt,
        *,
        eps: NonNegativeFloat = 1e-5,
        momentum: Fraction | None = 0.1,
        eta: Eta = 0.0,
        channel_dim: ChannelDim = -1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super(NormBase, self).__init__()  # BatchNorm's own would keep the statistics in the parameters' dtype
        self.normalized_shape, self.num_features, self.channel_dim = (dim,), dim, channel_dim
        self.eps, self.momentum, self.track_running_stats = eps, momentum, True
        statistics_dtype = accumulation_dtype(dtype or torch.get_default_dtype())
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.initial_eta = eta_of(eta)
        self._make_skip(device, dtype)
        self.register_buffer("running_mean", torch.zeros(dim, device=device, dtype=statistics_dtype))
        self.register_buffer("running_var", torch.ones(dim, device=device, dtype=statistics_dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        #: first batches are averaged alike, so that running statistics forget their start of (0, 1) at once
        self.warm_statistics = False
        #: valid tokens, boolean; of several masks the one that fits counts, and None among them stands for all tokens
        self.token_mask: Tensor | tuple[Tensor | None, ...] | None = None
        #: where messages say it is; set with the mask
        self.name = type(self).__name__
        #: where messages say what it is, which TorchScript cannot ask of a class
        self.kind = self.name
        self.sync: StatisticsSync | None = None
        #: set while recalibrating: batch statistics go here and the running ones stay
        self.accumulator: MomentsAccumulator | None = None
        #: whether the module around it puts it back where a BatchNorm of another class is put in its place
        self.kept_by_parent = False
        #: ids of the norms that used a mask and of those masks, while someone asks
        self.masks_used: set[int] | None = None
        self._mask_of_forward: Tensor | tuple[Tensor | None, ...] | None = None
        self._since_reset: MomentsAccumulator | None = None
        self._told_unmasked = False

    def _make_skip(self, device: Device, dtype: torch.dtype | None) -> None:
        self.eta = nn.Parameter(torch.full((1,), self.initial_eta, device=device, dtype=dtype))

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
        if self.training or self.accumulator is not None or self.running_mean is None:
            moments = self.observe(tokens, tokens_last=True)
            shared = self._shares_batch()
            group = self.sync.group if self.sync is not None else None
            y = rep_norm(tokens, weight, bias, eta, moments, self.eps, self.mask_of(tokens), shared, group)
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
            dtype = torch.float64 if self.accumulator is not None and has_float64(tokens.device) else None
            moments = batch_moments(tokens, self.mask_of(tokens), dtype)
            if self.accumulator is not None:
                self.accumulator.add(moments)
            if self._shares_batch() and self.sync is not None:
                moments = share_moments(moments, self.sync.group)
            if self.accumulator is not None:
                dtype = accumulation_dtype(tokens.dtype)
                return Moments(*(t.to(tokens.device, dtype) for t in (moments.count, moments.mean, moments.var)))
            self._check_recomputation()
            if self.running_mean is not None and self.track_running_stats:
                self._update_running(moments)
        return moments

    def _update_running(self, moments: Moments) -> None:
        self.keep_float32()
        # nothing is written that is there already: torch 2.11 compiles no write to a module inside a checkpoint
        if self.momentum is not None and self._since_reset is not None:
            self._since_reset = None
        if self._since_reset is not None and (torch.compiler.is_compiling() or not in_backward()):
            self._since_reset.add(moments)
            population = self._since_reset.result()
            self.running_mean.copy_(population.mean)
            self.running_var.copy_(population.var)
            self.num_batches_tracked.add_(1)
            return
        update_running_(
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            moments,
            self.momentum,
            average_first=self.warm_statistics,
        )

    @property
    def observes_while_warm(self) -> bool:
        """Whether the statistics follow the data although another norm's output is used."""
        return self.warm_statistics or (self._since_reset is not None and self.momentum is None)

    def reset_running_stats(self) -> None:
        """Forget the statistics; with ``momentum`` None they become the population's of all tokens from here on.

        This is how ``torch.optim.swa_utils.update_bn`` uses a BatchNorm. The average over batches that BatchNorm takes
        then would lose the variance between batches and weigh a short last batch like the others.
        """
        super().reset_running_stats()
        self._since_reset = MomentsAccumulator(self.num_features, self.weight.device)

    def reset_parameters(self) -> None:
        """As a new module has them, ``eta`` too; FSDP calls this after ``to_empty()``."""
        self.reset_running_stats()
        self._since_reset = None
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.eta, self.initial_eta)

    @property
    def affine(self) -> bool:  # type: ignore[override]
        """True where it can be asked for: what reads it rebuilds a BatchNorm as another class.

        Raises:
            TypeError: Where the module that is built would lose ``eta`` without a word.
        """
        if not self.kept_by_parent:
            raise TypeError(
                "RepBN cannot become another BatchNorm, which would lose eta; to share its statistics between ranks "
                "call slabformer.sync_norms_(model) instead of convert_sync_batchnorm"
            )
        return True

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name != "affine"]  # torch.jit.trace asks for all that is listed

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super(NormBase, self)._load_from_state_dict(*args, **kwargs)  # BatchNorm's own does not miss its counter
        self.keep_float32()

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
                f"{self.kind} over {dim} channels on axis {self.channel_dim}, got input of shape {tuple(x.shape)}"
            )
        return x.movedim(self.channel_dim, -1)

    def mask_of(self, tokens: Tensor) -> Tensor | None:
        """The token mask that fits ``tokens`` ``(*, C)``, in their shape; None where all of them count.

        A mask ``(B, N)`` also fits tokens ``(B * N, C)`` and those that were split further, into ``(B, N, heads, C)``.

        Raises:
            ValueError: If there are masks and none fits.
        """
        if self.token_mask is None:
            return None
        masks = self.token_mask if isinstance(self.token_mask, tuple) else (self.token_mask,)
        shape = tokens.shape[:-1]
        for mask in masks:
            if mask is not None and (fitted := _fit(mask, shape)) is not None:
                if self.masks_used is not None and not torch.compiler.is_compiling():
                    self.masks_used.update((id(self), id(mask)))
                return fitted
        given = " or ".join(str(tuple(mask.shape)) for mask in masks if mask is not None)
        if all(mask is not None for mask in masks):
            raise ValueError(
                f"token mask of shape {given} does not fit tokens of shape {tuple(shape)} at {self.name}; give one "
                "boolean per token, masks by the names of submodules, or None"
            )
        if len(shape) > 1 and not self._told_unmasked and not torch.compiler.is_compiling():
            self._told_unmasked = True
            logger.warning(
                "all tokens of shape %s at %s count for its statistics: the token mask of shape %s does not fit them",
                *(tuple(shape), self.name, given),
            )
        return None

    def _check_tokens(self, tokens: Tensor) -> None:
        alone = self.sync is None or not self.sync.active
        if self.training and alone and tokens.numel() <= tokens.shape[-1]:
            raise ValueError(f"{self.kind} needs more than one token to train on; enlarge the batch or call eval()")

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The map of eval mode, ``x * scale + shift``, float64 ``(C,)`` each."""
        return repbn_scale_shift(self.weight, self.bias, self.running_mean, self.running_var, self.eta, self.eps)

    def fuse(self) -> Affine:
        """The same map as an :class:`Affine`; timm's ``reparameterize_model`` calls this.

        Raises:
            ValueError: If the running statistics are not finite, or a variance is negative.
        """
        check_statistics({self.kind: (self.running_mean, self.running_var)})
        scale, shift = self.scale_shift()
        affine = Affine.of(scale, shift, like=self.weight, channel_dim=self.channel_dim, eps=self.eps)
        return affine.train(self.training)

    def extra_repr(self) -> str:
        """Channels and settings."""
        return f"{self.normalized_shape[0]}, eps={self.eps}, momentum={self.momentum}, channel_dim={self.channel_dim}"


def eta_of(eta: Eta) -> float:
    """The number that ``eta`` stands for."""
    return PUBLISHED_ETA if isinstance(eta, str) else float(eta)


def _fit(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """``mask`` over tokens of ``shape``; None where it says nothing about them."""
    if mask.shape == shape:
        return mask
    if shape[: mask.ndim] != mask.shape and shape[0] == mask.numel():
        mask = mask.flatten()
    if shape[: mask.ndim] != mask.shape:
        return None
    return mask.view(*mask.shape, *[1] * (len(shape) - mask.ndim)).expand(shape)
