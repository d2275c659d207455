"""What a student is held against its teacher by, as plain functions of two tensors.

All compute in float32 or wider, whatever autocast says, and are 0 where the student equals the teacher. Padding that
``mask`` leaves out never counts, whatever it holds. Gradients reach the student alone. With nothing left to compare, a
loss is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from slabformer.ops.moments import accumulation_dtype, batch_moments
from slabformer.settings import PositiveFloat, checked


@checked
def logit_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: PositiveFloat = 1.0
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution, times ``temperature ** 2`` (Hinton et al. 2015).

    The factor keeps the scale of the gradient, whatever the temperature.

    Args:
        student: Logits ``(*, num_classes)``.
        teacher: The same.
        mask: ``(*)``, true (or above 0) for the rows that count; all by default.
        temperature: Divides the logits of both; above 1 it weighs unlikely classes more.

    Raises:
        ValueError: If shapes differ, or ``mask`` is not of the leading axes.
    """
    student, teacher, mask = _aligned(student, teacher, mask)
    with _full_precision(student):
        own, target = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
        divergence = F.kl_div(own, target, reduction="none", log_target=True).sum(-1)
        return _mean(divergence, mask) * temperature**2


def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """One minus the cosine between the vectors of both.

    Args:
        student: Features ``(*, C)``.
        teacher: The same.
        mask: ``(*)``, as for :func:`logit_loss`.

    Raises:
        ValueError: As :func:`logit_loss`.
    """
    student, teacher, mask = _aligned(student, teacher, mask)
    with _full_precision(student):
        return _mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)


def feature_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error over the teacher's variance: 1 for a student that has each channel's mean right and nothing else.

    Both are sums over channels, which thus weigh by what they carry. A teacher that does not vary, as a single vector,
    is measured by its square.

    Args:
        student: Features ``(*, C)``.
        teacher: The same.
        mask: ``(*)``, as for :func:`logit_loss`.

    Raises:
        ValueError: As :func:`logit_loss`.
    """
    student, teacher, mask = _aligned(student, teacher, mask)
    with _full_precision(student):
        moments = batch_moments(teacher, mask)
        variance, square = moments.var.sum(), (moments.var + moments.mean.square()).sum()
        tiny = torch.finfo(square.dtype)
        scale = torch.where(variance > tiny.eps * square, variance, square).clamp(min=tiny.tiny)
        return _mean((student - teacher).square().sum(-1), mask) / scale


def similarity_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the cosines between all pairs (Tung and Mori 2019), relative to their variance.

    The variance is the teacher's, and not below 0.01: what is all alike to a teacher differs by noise alone. Vectors
    ``(B, C)`` are compared with each other: which samples are alike. Tokens ``(B, N, C)`` are compared within their
    sample: which tokens are alike. See :func:`pooled` for samples of tokens. A
    rank compares its own samples.

    Args:
        student: Features ``(*, N, C)``.
        teacher: The same.
        mask: ``(*, N)``, as for :func:`logit_loss`.

    Raises:
        ValueError: As :func:`logit_loss`.
    """
    student, teacher, mask = _aligned(student, teacher, mask)
    with _full_precision(student):
        own, target = (rows @ rows.mT for rows in (F.normalize(x, dim=-1) for x in (student, teacher)))
        pairs = ~torch.eye(own.shape[-1], dtype=torch.bool, device=own.device)
        if mask is not None:
            pairs = pairs & mask.unsqueeze(-1) & mask.unsqueeze(-2)
        pairs = pairs.expand_as(own)
        variance = batch_moments(target.unsqueeze(-1), pairs).var.sum()
        return _mean((own - target).square(), pairs) / variance.clamp(min=_LEAST_VARIANCE)


def pooled(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens of each sample, ``(B, *, C)`` to ``(B, C)`` in float32 or wider; 0 without a token."""
    tokens = features.flatten(1, -2).to(accumulation_dtype(features.dtype))
    if mask is None:
        return tokens.mean(1)
    valid = _as_mask(mask, features).flatten(1).unsqueeze(-1)
    return torch.where(valid, tokens, 0).sum(1) / valid.sum(1).clamp(min=1)


#: of cosines
_LEAST_VARIANCE = 1e-2


def _aligned(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both in one dtype, the teacher without gradient, and zeros in both where ``mask`` is false."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape to be compared"
        )
    dtype = accumulation_dtype(torch.promote_types(student.dtype, teacher.dtype))
    student, teacher = student.to(dtype), teacher.detach().to(student.device, dtype)
    if mask is None:
        return student, teacher, None
    mask = _as_mask(mask, student)
    valid = mask.unsqueeze(-1)
    return torch.where(valid, student, 0), torch.where(valid, teacher, 0), mask


def _as_mask(mask: Tensor, features: Tensor) -> Tensor:
    if mask.shape != features.shape[:-1]:
        raise ValueError(
            f"mask must be of shape {tuple(features.shape[:-1])}, the leading axes of {tuple(features.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    return mask.to(features.device) > 0


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over all ``values`` that count; 0, with a gradient of 0, where none does."""
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
