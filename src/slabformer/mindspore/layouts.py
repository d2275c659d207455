"""Names in ``.ckpt`` files: which fit a model, and how the published checkpoint for MindSpore spells ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from slabformer.models.weights.official import load_published, to_published

State = dict[str, Tensor]
Shape = tuple[int, ...]

#: MindSpore's BatchNorm, and torch's
_BATCH_NORM = {
    "bn.gamma": "bn.weight",
    "bn.beta": "bn.bias",
    "bn.moving_mean": "bn.running_mean",
    "bn.moving_variance": "bn.running_var",
}
_COUNTER = "bn.num_batches_tracked"
#: blocks in a file whose names leave out the list that holds the stages
_BARE = re.compile(r"^(?=\d+\.)")


def check_fit(own: Mapping[str, Shape], given: Mapping[str, Shape], title: str, optional: Collection[str] = ()) -> None:
    """Refuse a checkpoint that is not this model's, in one line.

    Args:
        own: Names and shapes of the model.
        given: Those of the checkpoint.
        title: What errors call the model.
        optional: Names of the model that the checkpoint need not have.

    Raises:
        ValueError: If names are missing or left over, or shapes differ.
    """
    missing = [name for name in own if name not in given and name not in optional]
    unexpected = [name for name in given if name not in own]
    shapes = [
        f"{name} is {given[name]}, the model's {shape}"
        for name, shape in own.items()
        if name in given and given[name] != shape
    ]
    found = ((missing, "tensors missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
    problems = [f"{len(which)} {what} (first: {which[0]})" for which, what in found if which]
    if problems:
        raise ValueError(f"checkpoint does not fit {title}: {', '.join(problems)}")


def is_published(names: Collection[str]) -> bool:
    """Whether a checkpoint is in the published layout for MindSpore."""
    return any(name.endswith(("bn.moving_mean", "bn.moving_variance")) for name in names)


def load_published_mindspore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors of the published checkpoint for MindSpore into a torch model, all of them or none.

    Names of blocks may have the prefix ``layers.`` or not. Indices and masks, which are stored there as parameters, are
    not read: they follow from the architecture. Which GELU the publication trained with is not known.

    Raises:
        ValueError: If names or shapes differ.
    """
    load_published(model, _from_mindspore(state))


def to_published_mindspore(model: nn.Module, *, prefix: bool = True) -> State:
    """The state dict of a torch model in the names of the published checkpoint for MindSpore.

    Args:
        model: With RepBN, or with PRepBN whose gamma is 0, which is written as RepBN.
        prefix: Whether names of blocks have the prefix ``layers.``.

    Raises:
        ValueError: If gamma is above 0.
    """
    named = {torchs: ours for ours, torchs in _BATCH_NORM.items()}
    state: State = {}
    for name, value in to_published(model, "repbn").items():
        if not name.endswith(_COUNTER):
            own = _with_end(name, named)
            state[own if prefix else own.removeprefix("layers.")] = value
    return state


def _from_mindspore(state: Mapping[str, Tensor]) -> State:
    """The published names of torch."""
    found: State = {}
    for name, value in state.items():
        torchs = _with_end(_BARE.sub("layers.", name), _BATCH_NORM)
        if torchs in found:
            raise ValueError(f"{name} is in the checkpoint twice, with and without the prefix 'layers.'")
        found[torchs] = value
        if torchs.endswith("bn.running_mean"):
            counter = torchs.removesuffix("bn.running_mean") + _COUNTER
            found[counter] = torch.zeros((), dtype=torch.long)
    return found


def _with_end(name: str, ends: Mapping[str, str]) -> str:
    for end, other in ends.items():
        if name == end or name.endswith(f".{end}"):
            return name.removesuffix(end) + other
    return name
