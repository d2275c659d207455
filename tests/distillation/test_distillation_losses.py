from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slabformer.distillation import cosine_loss, feature_loss, logit_loss, pooled, similarity_loss
from tolerances import ALGEBRA, FLOAT32, assert_close

Loss = Callable[..., Tensor]
LOSSES = [logit_loss, cosine_loss, feature_loss, similarity_loss]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    return student, torch.randn(shape, dtype=torch.float64).to(dtype)


def lines(count: int, length: int, valid: int) -> Tensor:
    mask = torch.ones(count, length, dtype=torch.long)
    mask[::2, valid:] = 0
    return mask


@every_loss
@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (3, 5, 6), (2, 1, 6)], ids=str)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(loss: Loss, shape: tuple[int, ...]) -> None:
    student, _ = pair(*shape)
    value = loss(student, student.detach().clone())
    value.backward()
    assert abs(value.item()) < ALGEBRA
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7


@every_loss
def test_padding_counts_neither_in_the_loss_nor_in_the_gradient(loss: Loss) -> None:
    (student, teacher), mask = pair(3, 5, 6), lines(3, 5, 2)
    expected = loss(student, teacher, mask)
    spoiled, target = student.detach().clone(), teacher.clone()
    spoiled[mask == 0] = torch.nan
    target[mask == 0] = torch.inf
    spoiled.requires_grad_()
    value = loss(spoiled, target, mask)
    value.backward()
    assert_close(value, expected, ALGEBRA)
    assert spoiled.grad is not None
    assert (spoiled.grad[mask == 0] == 0).all()
    assert spoiled.grad[mask == 1].abs().sum() > 0


@pytest.mark.parametrize("loss", [logit_loss, cosine_loss, feature_loss], ids=lambda loss: loss.__name__)
def test_a_masked_loss_is_that_of_the_tokens_that_are_left(loss: Loss) -> None:
    (student, teacher), mask = pair(3, 5, 6), lines(3, 5, 2)
    kept = mask == 1
    assert_close(loss(student, teacher, mask), loss(student[kept], teacher[kept]), ALGEBRA)


def test_similarity_of_masked_tokens_is_that_of_shorter_samples() -> None:
    (student, teacher), mask = pair(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    assert_close(similarity_loss(student, teacher, mask), similarity_loss(student[:, :3], teacher[:, :3]), ALGEBRA)


@every_loss
def test_nothing_to_compare_is_a_loss_of_zero_that_can_be_differentiated(loss: Loss) -> None:
    student, teacher = pair(2, 3, 6)
    value = loss(student, teacher, torch.zeros(2, 3))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert (student.grad == 0).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_dtypes_are_compared_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = pair(3, 5, 6, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert_close(value, loss(student.float(), teacher.float()), FLOAT32)


@every_loss
def test_the_teacher_gets_no_gradient(loss: Loss) -> None:
    student, teacher = pair(2, 3, 6)
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None


@every_loss
def test_other_shapes_and_masks_are_refused_in_one_line(loss: Loss) -> None:
    student, teacher = pair(2, 3, 6)
    with pytest.raises(ValueError, match=r"student \(2, 3, 6\) and teacher \(2, 3, 5\) must have the same shape"):
        loss(student, teacher[..., :5])
    with pytest.raises(ValueError, match=r"mask must be of shape \(2, 3\).* got \(2, 4\)"):
        loss(student, teacher, torch.ones(2, 4))


def test_logit_loss_is_the_divergence_at_a_temperature() -> None:
    student, teacher = pair(4, 6)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    assert_close(logit_loss(student, teacher, temperature=3.0), 9 * (p * (p / q).log()).sum(-1).mean(), ALGEBRA)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        logit_loss(*pair(2, 3), temperature=0)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e3, 0.0), (1.0, 50.0)])
def test_feature_loss_is_one_for_the_means_alone_at_any_scale(scale: float, offset: float) -> None:
    teacher = pair(7, 5, 6)[1] * scale + offset
    student = teacher.mean((0, 1)).expand_as(teacher)
    assert_close(feature_loss(student, teacher), torch.tensor(1.0, dtype=torch.float64), ALGEBRA)


def test_feature_loss_of_a_single_vector_is_relative_to_its_square() -> None:
    teacher = torch.tensor([[3.0, 4.0]])
    assert_close(feature_loss(torch.zeros(1, 2), teacher), torch.tensor(1.0), FLOAT32)


def test_similarity_loss_compares_cosines_of_pairs() -> None:
    student, teacher = pair(5, 6)
    own, target = (F.cosine_similarity(x[:, None], x[None], dim=-1) for x in (student, teacher))
    off = ~torch.eye(5, dtype=torch.bool)
    expected = (own - target)[off].square().mean() / target[off].var(correction=0)
    assert_close(similarity_loss(student, teacher), expected, ALGEBRA)


def test_similarity_of_a_teacher_to_whom_all_is_alike_stays_bounded() -> None:
    student, teacher = torch.randn(5, 6), 1 + 1e-6 * torch.randn(5, 6)
    assert similarity_loss(student, teacher).item() < 400


def test_similarity_ignores_lengths_of_vectors() -> None:
    student, _ = pair(5, 6)
    assert similarity_loss(3 * student, student.detach()).item() < ALGEBRA


def test_pooled_is_the_mean_of_valid_tokens_and_zero_without_any() -> None:
    features, mask = pair(2, 4, 6)[1], torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    assert_close(pooled(features, mask)[0], features[0, :2].mean(0), ALGEBRA)
    assert (pooled(features, mask)[1] == 0).all()
    assert_close(pooled(features.unflatten(1, (2, 2))), features.mean(1), ALGEBRA)
