"""Plain BatchNorm over tokens: what RepBN is without its skip."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slabformer._torch import buffer_slots
from slabformer.nn.device import Device
from slabformer.nn.repbn import RepBN
from slabformer.settings import ChannelDim, Fraction, NonNegativeFloat, PositiveInt, checked


class TokenBatchNorm(RepBN):
    """BatchNorm over the last axis of tokens: a :class:`RepBN` whose skip weight is 0 and no parameter.

    Token masks, ranks that share statistics, recalibration and fusing treat it as they treat RepBN; its state dict is
    that of ``nn.BatchNorm1d``.

    Args:
        dim: Channels ``C``.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None averages all batches alike.
        channel_dim: Axis of the channels: -1 for tokens, 1 for maps.

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same shape and dtype.

    Raises:
        ValueError: As :class:`RepBN`.
    """

    observes_while_warm = RepBN.observes_while_warm  # TorchScript ignores properties of the class itself alone

    @checked
    def __init__(
        self,
        dim: PositiveInt,
        *,
        eps: NonNegativeFloat = 1e-5,
        momentum: Fraction | None = 0.1,
        channel_dim: ChannelDim = -1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps=eps, momentum=momentum, eta=0.0, channel_dim=channel_dim, device=device, dtype=dtype)

    def _make_skip(self, device: Device, dtype: torch.dtype | None) -> None:
        self.register_buffer("eta", torch.zeros(1, device=device, dtype=dtype), persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        buffer_slots(self)["eta"] = torch.zeros_like(self.weight[:1], requires_grad=False)  # no file fills it

    def reset_parameters(self) -> None:
        """As a new module has them; FSDP calls this after ``to_empty()``."""
        super().reset_parameters()
        nn.init.zeros_(self.eta)

    @property
    def affine(self) -> bool:  # type: ignore[override]
        """Not to be asked for: what reads it rebuilds a BatchNorm as another class.

        Raises:
            TypeError: Always, since that class takes channels on another axis.
        """
        raise TypeError(
            "TokenBatchNorm cannot become another BatchNorm, which would take its tokens for channels; to share its "
            "statistics between ranks call slabformer.sync_norms_(model) instead of convert_sync_batchnorm"
        )
