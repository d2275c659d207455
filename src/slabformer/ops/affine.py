"""The algebra of folding: a norm in eval mode as (scale, shift), and neighbours that take it over, in float64."""

from __future__ import annotations

from torch import Tensor


def repbn_scale_shift(
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eta: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RepBN in eval mode as ``x * scale + shift`` (Guo et al. 2024, Lemma 4.1), float64 ``(C,)`` each."""
    gain = weight.double() / (running_var.double() + eps).sqrt()
    return (gain + eta.double()).detach(), (bias.double() - gain * running_mean.double()).detach()
