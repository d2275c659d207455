from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer import Teacher
from students import bert, classifier, converted, tokens
from tolerances import EXACT, assert_close


def storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def test_a_teacher_is_what_the_model_computed_before_it_was_converted() -> None:
    model, batch = bert(dropout=0.5), tokens(valid=4)
    expected = copy.deepcopy(model).eval()(**batch).last_hidden_state
    before = Teacher(model)
    after = Teacher(converted(model))
    for teacher in (before, after):
        assert_close(teacher(batch).last_hidden_state, expected, EXACT)


def test_a_teacher_of_a_fitted_model_still_has_its_norms() -> None:
    model, images = converted(classifier()), torch.randn(4, 3, 16, 16)
    expected = Teacher(model)(images)
    sf.fit_norms_(model, [images])
    assert_close(Teacher(model)(images), expected, EXACT)


def test_a_copy_shares_no_tensor_and_takes_no_gradients_along() -> None:
    model, images = classifier(), torch.randn(2, 3, 16, 16)
    model(images).sum().backward()
    gradient = model.head.weight.grad
    teacher = Teacher(model)
    assert storages(teacher.model).isdisjoint(storages(model))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.model.parameters())
    assert model.head.weight.grad is gradient
    assert model.training


def test_training_the_student_leaves_its_teacher_alone() -> None:
    model, images = converted(classifier()), torch.randn(4, 3, 16, 16)
    teacher = Teacher(model)
    before = teacher(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().sum().backward()
    optimizer.step()
    assert_close(teacher(images), before, EXACT)


def test_somebody_elses_model_is_run_and_left_as_it_is() -> None:
    model, images = classifier(), torch.randn(2, 3, 16, 16)
    model.blocks[0].eval()
    teacher = Teacher(model, copy=False)
    output = teacher(images)
    assert teacher.model is model
    assert not output.requires_grad
    assert model.training
    assert not model.blocks[0].training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_labels_are_not_looked_at() -> None:
    batch = tokens()
    assert_close(
        Teacher(bert())({**batch, "labels": torch.zeros(4)}).last_hidden_state,
        Teacher(bert())(batch).last_hidden_state,
        EXACT,
    )


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "a batch of pixel_values: ValueError"),
        ({"attention_mask": torch.ones(1, 4)}, "a batch of attention_mask: ValueError"),
        (torch.zeros(2, 5), r"a batch of type Tensor of shape \(2, 5\)"),
        (["text"], "a batch of type list: TypeError: cannot feed a batch of type list"),
    ],
    ids=["other", "part", "tensor", "text"],
)
def test_data_without_the_teachers_inputs_is_refused_in_one_line(batch: object, words: str) -> None:
    with pytest.raises(ValueError, match=rf"the teacher \(BertModel\) cannot run on {words}") as error:
        Teacher(bert())(batch)
    assert "\n" not in str(error.value)


def test_the_digest_tells_teachers_apart() -> None:
    model = bert()
    assert Teacher(model).digest() == Teacher(bert()).digest()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias += 1e-3
    assert Teacher(model).digest() != Teacher(bert()).digest()


def test_another_forward_is_used() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model.forward_features(batch)  # type: ignore[operator]

    assert Teacher(classifier())(torch.randn(2, 3, 16, 16), forward).ndim == 3
