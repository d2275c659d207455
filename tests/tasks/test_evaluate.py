from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from slabformer.nn import PRepBN
from slabformer.nn.controls import blended
from slabformer.tasks.classification.config import AugmentConfig, DataConfig
from slabformer.tasks.classification.data import create_loader
from slabformer.tasks.classification.evaluate import evaluate


class Batches:
    def __init__(self, logits: Tensor, labels: Tensor, size: int, class_names: list[str] | None = None) -> None:
        self.pairs = list(zip(logits.split(size), labels.split(size), strict=True))
        self.class_names = class_names or [str(label) for label in range(logits.shape[1])]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.pairs)


@pytest.fixture
def scored() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(101, 7, generator=generator), torch.randint(0, 7, (101,), generator=generator)


@pytest.mark.parametrize("size", [1, 10, 200], ids=lambda size: f"batches-of-{size}")
def test_figures_are_those_of_all_images_at_once(scored: tuple[Tensor, Tensor], size: int) -> None:
    logits, labels = scored
    result = evaluate(nn.Identity(), Batches(logits, labels, size))
    assert result.images == 101
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert result.top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    ranked = logits.argsort(1, descending=True)[:, :5]
    assert result.top5 == pytest.approx((ranked == labels[:, None]).any(1).float().mean().item())
    assert result.images_per_s > 0


def test_few_classes_have_no_top5() -> None:
    result = evaluate(nn.Identity(), Batches(torch.eye(4), torch.arange(4), 2))
    assert (result.top1, result.top5) == (1.0, None)


def test_every_class_has_its_row() -> None:
    logits = torch.tensor([[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0], [3.0, 0, 0]])
    batches = Batches(logits, torch.tensor([0, 0, 1, 0]), 3, ["cat", "dog", "owl"])
    rows = evaluate(nn.Identity(), batches, per_class=True).per_class
    assert rows is not None
    assert [(row.name, row.images) for row in rows] == [("cat", 3), ("dog", 1), ("owl", 0)]
    assert rows[0].top1 == pytest.approx(2 / 3)
    assert rows[1].top1 == 0
    assert rows[2].top1 is None


def test_a_model_with_other_classes_is_refused(scored: tuple[Tensor, Tensor]) -> None:
    batches = Batches(*scored, 10, class_names=["only", "three", "classes"])
    with pytest.raises(ValueError, match=r"the data has 3 classes .*, the model 7"):
        evaluate(nn.Identity(), batches)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="the loader gave no batch"):
        evaluate(nn.Identity(), [])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_deployed_form_is_evaluated_and_the_mode_put_back(training: bool) -> None:
    norm = PRepBN(8)
    norm.rep.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    norm.train(training)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 8, generator=generator), torch.randint(0, 8, (64,), generator=generator)
    loss = evaluate(norm, Batches(images, labels, 32)).loss
    assert norm.training == training
    assert loss == pytest.approx(F.cross_entropy(norm.rep.eval()(images), labels).item(), rel=1e-5)
    with blended(norm):
        assert evaluate(norm, Batches(images, labels, 32)).loss != pytest.approx(loss, rel=1e-3)


def test_an_accelerator_gives_the_same_figures(scored: tuple[Tensor, Tensor]) -> None:
    batches = Batches(*scored, 10)
    plain = evaluate(nn.Identity(), batches, device="cpu")
    reduced = evaluate(nn.Identity(), batches, accelerator=Accelerator(cpu=True))
    assert (plain.loss, plain.top1, plain.top5) == (reduced.loss, reduced.top1, reduced.top5)


def test_ranks_add_up_to_one_process() -> None:
    data = DataConfig(image_size=8, crop_pct=1.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    parts = [
        evaluate(model, create_loader(data, AugmentConfig(), "validation", batch_size=50, seed=0, rank=r, world_size=2))
        for r in (0, 1)
    ]
    whole = evaluate(model, create_loader(data, AugmentConfig(), "validation", batch_size=64, seed=0))
    assert whole.images == sum(part.images for part in parts) == 360
    assert whole.top1 == pytest.approx(sum(part.top1 * part.images for part in parts) / 360)
    assert whole.loss == pytest.approx(sum(part.loss * part.images for part in parts) / 360, rel=1e-5)


def test_progress_counts_images(scored: tuple[Tensor, Tensor]) -> None:
    seen: list[int] = []
    evaluate(nn.Identity(), Batches(*scored, 40), progress=seen.append)
    assert seen == [40, 40, 21]
