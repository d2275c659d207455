"""Training against a teacher: which model that is, the loss of a batch, and how an epoch is judged without labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from slabformer._extras import require
from slabformer.distillation import Distiller, Teacher
from slabformer.models.registry import baseline_of
from slabformer.models.weights.hub import weights_file
from slabformer.nn.controls import prepbn_modules
from slabformer.tasks.classification.config import TrainConfig
from slabformer.tasks.classification.data import Batch, Loader
from slabformer.tasks.classification.mixup import MixedStep
from slabformer.tasks.saved_model import create_model, load_model

SELF, BASELINE = "self", "baseline"
#: of the labels' loss among the parts of a step
LABELS = "labels"


class GivenTeacher(NamedTuple):
    """A teacher that is not the student itself."""

    model: nn.Module
    class_names: list[str]
    """Of a file that names them; empty otherwise."""


def load_teacher(config: TrainConfig) -> GivenTeacher | None:
    """The teacher that ``config`` names; None where there is none, or the student teaches itself.

    Raises:
        FileNotFoundError: If its file is missing.
        ValueError: If timm does not know it, it has no baseline, or it takes images of another size.
    """
    name = config.teacher
    if name is None or name == SELF:
        return None
    if name == BASELINE:
        found = baseline_of(config.model.name)
        if found is None:
            raise ValueError(
                f"{config.model.name} is its own LayerNorm baseline; pass --teacher {SELF}, or name another teacher"
            )
        name = found
    if not name.endswith(".safetensors") and not Path(name).exists():
        model = create_model(name, pretrained=True)
        size = _input_size(model, config.data.image_size)
        names: list[str] = []
    else:
        model, info = load_model(weights_file(name))
        size, names = info.input_size[-1], info.class_names
    if size != config.data.image_size:
        raise ValueError(
            f"the teacher {name} takes images of {size} pixels, data.image_size is {config.data.image_size}; "
            "make them agree"
        )
    return GivenTeacher(model, names)


def _input_size(model: nn.Module, default: int) -> int:
    settings = getattr(model, "pretrained_cfg", None) or {}
    return int(settings.get("input_size", (3, default, default))[-1])


def classes_without_labels(config: TrainConfig, teacher: GivenTeacher | None) -> tuple[int, list[str]]:
    """How many classes the student has where the data has none, and their names if there are any: the teacher's.

    Raises:
        ValueError: If there is no teacher, or it is no classifier.
    """
    if config.teacher is None:
        raise ValueError("data.labels false needs a teacher; pass --teacher")
    if config.distill.label_weight:
        raise ValueError("distill.label_weight needs labels; leave it out where data.labels is false")
    names: list[str] = []
    if teacher is not None:
        classes, names = getattr(teacher.model, "num_classes", 0), teacher.class_names
    elif config.model.weights is not None:
        model, info = load_model(weights_file(config.model.weights))
        classes, names = getattr(model, "num_classes", 0), info.class_names
    else:
        default = require("timm.models", extra="vision").get_pretrained_cfg(config.model.name)
        classes = config.model.args.get("num_classes", default.num_classes if default is not None else 0)
    if not classes:
        raise ValueError(f"the teacher {config.teacher} has no classes; `slab convert` takes feature extractors")
    return int(classes), names


def create_distiller(config: TrainConfig, student: nn.Module, teacher: GivenTeacher | None) -> Distiller:
    """``student``, which is on its device, against its teacher.

    Raises:
        ValueError: If it cannot teach itself, or has other classes than its teacher.
    """
    if teacher is None and prepbn_modules(student) and not (config.model.pretrained or config.model.weights):
        raise ValueError(
            f"teacher {SELF!r} has nothing to teach: its weights are random; set model.weights or model.pretrained"
        )
    own, theirs = (getattr(model, "num_classes", None) for model in (student, teacher.model if teacher else student))
    if own != theirs:
        raise ValueError(f"the teacher {config.teacher} has {theirs} classes, the student {own}; make them agree")
    device = next(student.parameters()).device
    return Distiller(
        student,
        None if teacher is None else Teacher(teacher.model.to(device), copy=False),
        weights=vars(config.distill.weights),
        temperature=config.distill.temperature,
        dropout=True,  # as the recipe has it
    )


class TaughtStep:
    """The losses of a batch against the teacher, and against its labels where these count.

    Both see the same mixed images. Labels are not asked for where they count nothing.

    Args:
        distiller: Student and teacher.
        mixed: Mixes the images, and holds the labels' loss.
        label_weight: Of that loss.
    """

    def __init__(self, distiller: Distiller, mixed: MixedStep, label_weight: float) -> None:
        self.distiller, self.mixed, self.label_weight = distiller, mixed, label_weight

    @property
    def parts(self) -> list[str]:
        """Names of what the loss is the sum of."""
        weights = self.distiller.weights
        known = {"logits": weights.logits, "hidden": weights.hidden and self.distiller.blocks}
        return [*(name for name, counts in known.items() if counts), *([LABELS] if self.label_weight else [])]

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Losses by name; ``model`` is the student, perhaps wrapped."""
        images, targets = self.mixed.mix(batch)
        found = self.distiller.compare(images, model)
        if not self.label_weight:
            return found.parts
        return {**found.parts, LABELS: self.label_weight * self.mixed.loss(found.output, targets)}


class TaughtLabels:
    """Batches whose labels are the teacher's first classes: accuracy on them is agreement with the teacher.

    Args:
        loader: Images.
        teacher: Of them.
        num_classes: Of the teacher.
    """

    def __init__(self, loader: Loader, teacher: Teacher, num_classes: int) -> None:
        self.loader, self.teacher = loader, teacher
        self.class_names = [str(index) for index in range(num_classes)]

    def __iter__(self) -> Iterator[Batch]:
        for images, _ in self.loader:
            labels = self.teacher(images).argmax(-1)
            yield images, labels.to(images.device)

    def __len__(self) -> int:
        return len(self.loader)
