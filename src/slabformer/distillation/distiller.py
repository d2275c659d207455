"""Student against teacher: one object whose call is the loss of a batch."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from slabformer._loss_weights import LossWeights
from slabformer.distillation.captures import Capture, find_blocks
from slabformer.distillation.dropout import switch_dropout_off_
from slabformer.distillation.losses import cosine_loss, feature_loss, logit_loss, pooled, similarity_loss
from slabformer.distillation.outputs import Compared, Kind, attention_mask, check_alike, compared_outputs, mask_for
from slabformer.distillation.teacher import Teacher, without_labels
from slabformer.nn.attention_masks import keep_padding_out_everywhere_
from slabformer.nn.controls import prepbn_modules, repbn_modules
from slabformer.settings import NonNegativeFloat, PositiveFloat, checked
from slabformer.surgery.batches import call_model, to_device

logger = logging.getLogger(__name__)


class Targets(NamedTuple):
    """What a teacher says about a batch."""

    outputs: dict[str, Compared]
    """By place."""
    blocks: dict[str, list[Tensor]]
    """By the student's name, one for each call."""


class Comparison(NamedTuple):
    """Student against teacher on one batch."""

    loss: Tensor
    """Sum of ``parts``, a scalar."""
    parts: dict[str, Tensor]
    """Losses by name, times their weights."""
    output: Any
    """What the student returned."""


class Distiller:
    """The loss of a student that is to compute what its teacher computes; data needs no labels.

        teacher = sf.Teacher(model)  # optional: by default the norms that are still in the student are the teacher
        sf.convert_norms_(model)
        distiller = sf.Distiller(model, teacher)
        loss = distiller(batch)

    The teacher runs once a batch, in eval mode; the student without dropout and stochastic depth, which no teacher's
    output has: modules that drop are put into eval mode, and stay so until the next ``student.train()``.
    Padding that a batch's ``attention_mask`` names counts in no loss, nor in the statistics of the student's norms.
    Nothing is remembered from batch to batch, so that a run that goes on from a checkpoint is bit for bit the one that
    was not interrupted; :meth:`state_dict` says which teacher and settings it must go on with. In
    DistributedDataParallel, each rank compares its own samples: ``distiller(batch, model=wrapped)``.

    Args:
        student: The model that is trained, not wrapped.
        teacher: A model, which is copied only if it shares tensors with the student, or a :class:`Teacher`; by default
            the student as it was before conversion.
        weights: Of the losses by name, see :class:`LossWeights`; those not named keep their defaults.
        temperature: Of the logits.
        blocks: Modules whose outputs are compared too: "auto" for the repeated blocks of the student, if the teacher
            has as many of the same output; names; or the student's names to the teacher's.
        kind: Of the outputs: "logits" or "features"; by default told from their names and widths.
        dropout: Leave the student's dropout and stochastic depth on; data that is gone through many times may need it.
        forward: ``forward(model, batch)``, as for :func:`slabformer.recalibrate_`, of both.

    Raises:
        TypeError: If the teacher is no model.
        ValueError: If there is no norm to take the default teacher from, it has begun to fade, a weight is unknown, or
            a model has no block of a given name.
    """

    @checked
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None = None,
        *,
        weights: Mapping[str, NonNegativeFloat] | None = None,
        temperature: PositiveFloat = 1.0,
        blocks: Literal["auto"] | Sequence[str] | Mapping[str, str] = "auto",
        kind: Kind | None = None,
        dropout: bool = False,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self.student, self.temperature, self.kind, self.forward = student, temperature, kind, forward
        self.dropout = dropout
        self.weights, self._auto = _weights(weights or {}), blocks == "auto"
        self.teacher = _teacher_of(student, teacher)
        self.blocks = _pair_blocks(student, self.teacher.model, blocks) if self.weights.hidden else {}
        self._captures = Capture(student, self.blocks), Capture(self.teacher.model, self.blocks.values())
        if "attention_mask" in inspect.signature(student.forward).parameters and repbn_modules(student):
            keep_padding_out_everywhere_(student)

    def __call__(self, batch: Any, model: nn.Module | None = None, targets: Targets | None = None) -> Tensor:
        """The loss of ``batch``; see :meth:`compare`."""
        return self.compare(batch, model, targets).loss

    def targets(self, batch: Any) -> Targets:
        """What the teacher says about ``batch``, for an optimizer that asks for the loss of a batch several times.

        Raises:
            ValueError: If the teacher cannot run on it.
        """
        if self.teacher.is_copy and self.teacher.device != _device_of(self.student):
            self.teacher.to(_device_of(self.student))
        capture = self._captures[1]
        with capture.running():
            output = self.teacher(batch, self.forward)
        outputs = capture.take()
        blocks = {own: outputs[name] for own, name in self.blocks.items()}
        return Targets(compared_outputs(output, self.teacher.model, self.kind), blocks)

    def compare(
        self, batch: Any, model: nn.Module | None = None, targets: Targets | None = None, *, keep_labels: bool = False
    ) -> Comparison:
        """Run both on ``batch`` and hold them against each other.

        Args:
            batch: As for :func:`slabformer.recalibrate_`.
            model: Called in the student's place: it wrapped or compiled.
            targets: Of this batch, from :meth:`targets`; computed by default.
            keep_labels: Let the student have the labels in a batch that is a mapping, so that its output holds the loss
                of its own; they never reach the teacher.

        Raises:
            ValueError: If teacher or batch do not fit the student.
        """
        batch = to_device(batch, _device_of(self.student))
        batch = batch if keep_labels else without_labels(batch)
        targets = self.targets(batch) if targets is None else targets
        if not self.dropout:
            switch_dropout_off_(self.student)
        capture = self._captures[0]
        with capture.running():
            output = (self.forward or call_model)(self.student if model is None else model, batch)
        outputs = compared_outputs(output, self.student, self.kind)
        check_alike(outputs, targets.outputs)
        mask = attention_mask(batch)
        parts = self._output_parts(outputs, targets.outputs, mask)
        hidden = capture.take()
        if self._auto and not _are_alike(hidden, targets.blocks):
            logger.info("blocks of the teacher return other shapes than the student's: they are not compared")
            self.blocks, self._captures = {}, (Capture(self.student, ()), Capture(self.teacher.model, ()))
        if self.blocks:
            parts["hidden"] = self._hidden_part(hidden, targets.blocks, mask)
        return Comparison(torch.stack([*parts.values()]).sum(), parts, output)

    def state_dict(self) -> dict[str, Any]:
        """The settings and a digest of the teacher, as plain values: what a run must go on with."""
        return {
            "teacher": self.teacher.digest(),
            "weights": asdict(self.weights),
            "temperature": self.temperature,
            "blocks": "auto" if self._auto else dict(self.blocks),
            "kind": self.kind,
            "dropout": self.dropout,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with another teacher or other settings.

        Raises:
            ValueError: With the first that differs.
        """
        own = self.state_dict()
        differing = sorted(key for key in own.keys() | state.keys() if own.get(key) != state.get(key))
        if differing:
            key = differing[0]
            raise ValueError(
                f"the distillation cannot go on: {key} was {state.get(key)!r}, now {own.get(key)!r}; "
                "build the Distiller with the same teacher and settings"
            )

    def _output_parts(
        self, student: Mapping[str, Compared], teacher: Mapping[str, Compared], mask: Tensor | None
    ) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for place, (kind, own) in student.items():
            for name, loss in self._losses(kind, own, teacher[place].tensor, mask_for(own, mask)).items():
                found.setdefault(name, []).append(loss)
        return {name: getattr(self.weights, name) * torch.stack(losses).mean() for name, losses in found.items()}

    def _losses(self, kind: Kind, own: Tensor, target: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        if kind == "logits":
            losses = {"logits": lambda: logit_loss(own, target, mask, self.temperature)}
        else:
            samples = (own, target) if own.ndim == 2 else (pooled(own, mask), pooled(target, mask))
            losses = {
                "features": lambda: feature_loss(own, target, mask),
                "cosine": lambda: cosine_loss(own, target, mask),
                "similarity": lambda: similarity_loss(*samples),
            }
            if own.ndim > 2:
                losses["pooled"] = lambda: cosine_loss(*samples)
                losses["tokens"] = lambda: similarity_loss(own, target, mask)
        return {name: loss() for name, loss in losses.items() if getattr(self.weights, name)}

    def _hidden_part(
        self, student: Mapping[str, list[Tensor]], teacher: Mapping[str, list[Tensor]], mask: Tensor | None
    ) -> Tensor:
        losses = []
        for name, outputs in student.items():
            for own, target in zip(outputs, teacher[name], strict=True):
                if own.shape != target.shape:
                    raise ValueError(
                        f"{name} returns {tuple(own.shape)}, the teacher's {self.blocks[name]} {tuple(target.shape)}; "
                        "leave it out of the blocks"
                    )
                if torch.is_grad_enabled() and not own.requires_grad and self._captures[0].is_trained(name):
                    raise ValueError(
                        f"no gradient reaches the output of {name}, as under reentrant activation checkpointing; "
                        "checkpoint with use_reentrant=False, or pass blocks=()"
                    )
                losses.append(feature_loss(own, target, mask_for(own, mask)))
        return self.weights.hidden * torch.stack(losses).mean()


def _are_alike(student: Mapping[str, list[Tensor]], teacher: Mapping[str, list[Tensor]]) -> bool:
    shapes = [{name: [x.shape for x in outputs] for name, outputs in of.items()} for of in (student, teacher)]
    return shapes[0] == shapes[1]


def _weights(given: Mapping[str, float]) -> LossWeights:
    known = asdict(LossWeights())
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"unknown loss {unknown[0]!r}; it must be one of {', '.join(known)}")
    return LossWeights(**given)


def _teacher_of(student: nn.Module, teacher: nn.Module | Teacher | None) -> Teacher:
    if isinstance(teacher, Teacher):
        return teacher
    if not isinstance(teacher, nn.Module | None):
        raise TypeError(f"the teacher must be a model or a slabformer.Teacher, got {type(teacher).__name__}")
    if teacher is None:
        _check_unfaded(student)
        return Teacher(student)
    return Teacher(teacher, copy=not _tensors(teacher).isdisjoint(_tensors(student)))


def _check_unfaded(student: nn.Module) -> None:
    """Refuse to take a teacher out of a student that no longer computes what it did."""
    norms = prepbn_modules(student)
    gone = len(repbn_modules(student)) - len(norms)
    faded = [f"{name} is at gamma {float(norm.gamma):.3g}" for name, norm in norms.items() if float(norm.gamma) < 1]
    if norms and not faded and not gone:
        return
    reason = faded[0] if faded else f"{gone} of its norms are gone" if gone else "it holds no PRepBN"
    raise ValueError(
        f"the student cannot be its own teacher: {reason}; take it before: teacher = slabformer.Teacher(model)"
    )


def _tensors(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _pair_blocks(
    student: nn.Module, teacher: nn.Module, blocks: Literal["auto"] | Sequence[str] | Mapping[str, str]
) -> dict[str, str]:
    """The student's blocks and the teacher's names for them."""
    if isinstance(blocks, Mapping):
        return dict(blocks)
    if blocks != "auto":
        return {name: name for name in blocks}
    own, others = find_blocks(student), find_blocks(teacher)
    return dict(zip(own, others, strict=True)) if len(own) == len(others) else {}
