"""Which of a model's outputs are compared, as what, and which of their tokens count."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from slabformer.surgery.outputs import tensors_by_place

logger = logging.getLogger(__name__)

Kind = Literal["logits", "features"]
#: what transformers' models return beside their outputs
_BESIDE = re.compile(r"loss|mems|past_key_values|\w*hidden_states|\w*attentions|aux_outputs")
_KEY = re.compile(r"\['(\w+)'\]|\.(\w+)")


class Compared(NamedTuple):
    """One output of a model."""

    kind: Kind
    """Logits are compared as distributions, features as vectors."""
    tensor: Tensor
    """``(B, *, C)``."""


def compared_outputs(output: Any, model: nn.Module, kind: Kind | None = None) -> dict[str, Compared]:
    """The floating point outputs of a model by their places, for a loss on each.

    What is called logits, and what a model with ``num_classes`` returns in that width, are logits; all else are
    features. Losses, caches, attention maps and lists of hidden states are left out, and so is a pooled copy of hidden
    states that are there.

    Args:
        output: What the model returned.
        model: Says how many classes it has, where it does.
        kind: Of all outputs, where the caller knows better.

    Raises:
        ValueError: If there is no such output.
    """
    tensors = {place: t for place, t in tensors_by_place(output).items() if t.is_floating_point() and t.ndim > 1}
    found = {place: tensor for place, tensor in tensors.items() if not _BESIDE.fullmatch(_key(place))}
    keys = {_key(place) for place in found}
    if {"pooler_output", "last_hidden_state"} <= keys:
        found = {place: tensor for place, tensor in found.items() if _key(place) != "pooler_output"}
    if not found:
        raise ValueError(f"{type(model).__name__} returns no tensor of floating point numbers that could be compared")
    return {place: Compared(kind or _kind(place, tensor, model), tensor) for place, tensor in found.items()}


def _key(place: str) -> str:
    match = _KEY.match(place)
    return (match[1] or match[2]) if match else ""


def _kind(place: str, tensor: Tensor, model: nn.Module) -> Kind:
    classes = getattr(model, "num_classes", None)
    called = "logits" in _key(place) or (isinstance(classes, int) and 0 < classes == tensor.shape[-1])
    return "logits" if called else "features"


def check_alike(student: Mapping[str, Compared], teacher: Mapping[str, Compared]) -> None:
    """Refuse a teacher of other outputs.

    Raises:
        ValueError: With the first output that only one has, or that differs in shape.
    """
    for place in {**student, **teacher}:
        own, target = student.get(place), teacher.get(place)
        shapes = [None if one is None else tuple(one.tensor.shape) for one in (own, target)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the teacher has another output{f' {place}' if place else ''} than the student: "
                f"{_words(shapes[1])} instead of {_words(shapes[0])}; give a teacher of the same outputs"
            )


def _words(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(shape)


def attention_mask(batch: Any) -> Tensor | None:
    """The mask of padding in a batch that is a mapping, ``(B, N)``."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def mask_for(features: Tensor, mask: Tensor | None) -> Tensor | None:
    """``mask`` ``(B, N)`` where ``features`` are its tokens ``(B, N, C)``; None for those of another kind."""
    return mask if mask is not None and features.shape[:-1] == mask.shape else None
