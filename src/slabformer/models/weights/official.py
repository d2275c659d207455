"""Published SLAB state dicts into our models, strictly, and back; their spellings live here and nowhere else."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slabformer._files import check_readable
from slabformer._listing import check_regular
from slabformer.nn import PRepBN, RepBN

NormLayout = Literal["prepbn", "repbn"]
State = dict[str, Tensor]
#: how torch.load calls a class that is no tensor's
UNSUPPORTED = re.compile(r"GLOBAL ([\w.]+)")

#: published name within a RepBN, in published order, and ours
_REP = {
    "alpha": "eta",
    "bn.weight": "weight",
    "bn.bias": "bias",
    "bn.running_mean": "running_mean",
    "bn.running_var": "running_var",
    "bn.num_batches_tracked": "num_batches_tracked",
}
#: counters of the published schedule as they stand at its end: gamma is iter / total_step
_COUNTERS = {"warm": 0, "iter": 0, "total_step": 1}


@dataclass(frozen=True)
class PublishedLayout:
    """Where a family's published names differ from ours, norms aside; held by models as ``published_layout``."""

    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions over our names and what replaces them in the published ones, applied in turn."""
    dropped: tuple[str, ...] = ()
    """Regular expressions of published names that are not loaded: unused, or recomputed and never trusted."""
    computed: tuple[str, ...] = ()
    """Regular expressions of our names that no file fills: buffers that follow from the architecture."""
    complete: Callable[[nn.Module, State], State] = lambda model, state: state
    """Puts back on the way out what was dropped."""

    def name(self, ours: str) -> str:
        """Published spelling of a name of ours."""
        for pattern, replacement in self.renames:
            ours = re.sub(pattern, replacement, ours)
        return ours


def load_published(model: nn.Module, source: str | Path | Mapping[str, Any]) -> None:
    """Load a published state dict, all of it or nothing; gamma is 0 afterwards.

    Files with PRepBN and with RepBN alone both fit models of either kind. A RepBN file leaves a PRepBN model's
    LayerNorm as it is; a RepBN model takes RepBN's part of a PRepBN file.

    Args:
        model: A model of this package with PRepBN or RepBN.
        source: File, or its contents, with or without the wrapper whose weights lie under "model".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or names or shapes differ; the model is untouched then.
    """
    state, own = read_published(source), model.state_dict()
    names = published_names(model, _norm_layout(model, state))
    _check_fit(model, own, names, state)
    loaded = own | {ours: state[name] for name, ours in names.items() if ours is not None}
    for path, norm in _norms(model).items():
        if isinstance(norm, PRepBN):
            loaded[f"{path}.gamma"] = torch.zeros_like(norm.gamma)
    model.load_state_dict(loaded)


def to_published(model: nn.Module, layout: NormLayout | None = None) -> State:
    """The state dict of ``model`` in published names, order and dtypes; inverse of :func:`load_published`.

    Counters are written as they stand after training; what else models here do not hold (an unused class token) is
    written as initialised.

    Args:
        model: A model of this package with PRepBN or RepBN, gamma at 0.
        layout: "prepbn" or "repbn"; by default what the model holds.

    Raises:
        ValueError: If ``layout`` is unknown, asks for a LayerNorm that is not there, or gamma is above 0.
    """
    prepbn = [norm for norm in _norms(model).values() if isinstance(norm, PRepBN)]
    layout = layout or ("prepbn" if prepbn else "repbn")
    if layout not in get_args(NormLayout):
        raise ValueError(f"layout must be one of {get_args(NormLayout)}, got {layout!r}")
    if layout == "prepbn" and not prepbn:
        raise ValueError("layout 'prepbn' holds LayerNorms and this model has none; use 'repbn'")
    if any(norm.phase != "done" for norm in prepbn):
        raise ValueError("to_published needs gamma 0, since published models evaluate RepBN alone; finish the schedule")
    own, state = model.state_dict(), {}
    for name, ours in published_names(model, layout).items():
        if ours is None:
            state[name] = torch.tensor(_COUNTERS[name.rpartition(".")[2]])
        else:
            state[name] = own[ours].float() if own[ours].is_floating_point() else own[ours]
    return _layout(model).complete(model, state)


def read_published(source: str | Path | Mapping[str, Any]) -> State:
    """Tensors of a published file or state dict, without the training script's wrapper; nothing else is unpickled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, holds more than plain data, or anything but tensors as weights.
    """
    loaded = source if isinstance(source, Mapping) else unpickle(source)
    state = loaded.get("model", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("a published checkpoint maps names to tensors, by itself or under 'model'; this one does not")
    return dict(state)


def unpickle(path: str | Path) -> object:
    """What ``torch.save`` wrote to ``path``, if it holds tensors and plain values alone.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, or is one of other objects.
    """
    check_regular(path)
    check_readable(path, "checkpoint")
    # the training script saves its yacs config beside the weights; as an OrderedDict it needs no yacs and runs no code
    with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no checkpoint raise whatever the opcodes that they look like do
            raise ValueError(f"cannot read {path} as a checkpoint of plain tensors: {why_unreadable(error)}") from error


def why_unreadable(error: Exception) -> str:
    """What ``error`` of ``torch.load`` says of the file."""
    unsupported = UNSUPPORTED.search(str(error))
    if unsupported is not None:
        return f"it holds {unsupported[1]}, and other objects than tensors may run code"
    return "it is truncated, or torch.save did not write it"


def published_names(model: nn.Module, norm_layout: NormLayout) -> dict[str, str | None]:
    """Published name -> ours (None where we hold nothing), in published order, for every tensor a file must hold."""
    layout, names, done = _layout(model), dict[str, str | None](), set()
    norms = _norms(model)
    owner = {f"{path}.{name}": path for path, norm in norms.items() for name in norm.state_dict()}
    for ours in model.state_dict():
        path = owner.get(ours)
        if path is None:
            if not any(re.search(pattern, ours) for pattern in layout.computed):
                names[layout.name(ours)] = ours
        elif path not in done:
            done.add(path)
            prefix = layout.name(f"{path}.")
            for name, leaf in _names_in_norm(norms[path], norm_layout).items():
                names[prefix + name] = None if leaf is None else f"{path}.{leaf}"
    return names


def _names_in_norm(norm: PRepBN | RepBN, norm_layout: NormLayout) -> dict[str, str | None]:
    own_prefix = "rep." if isinstance(norm, PRepBN) else ""
    held = norm.state_dict().keys()  # a plain BatchNorm has no skip
    rep = {name: own_prefix + leaf for name, leaf in _REP.items() if own_prefix + leaf in held}
    if norm_layout == "repbn":
        return {**rep}
    fading: dict[str, str | None] = dict.fromkeys(("norm1.weight", "norm1.bias"))
    if isinstance(norm, PRepBN):
        fading = {f"norm1.{leaf}": f"norm.{leaf}" for leaf in norm.norm.state_dict()}
    return dict.fromkeys(_COUNTERS) | fading | {f"norm2.{name}": leaf for name, leaf in rep.items()}


def _norms(model: nn.Module) -> dict[str, PRepBN | RepBN]:
    """Norms by path, those inside a PRepBN left out."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, (PRepBN, RepBN))}
    return {path: norm for path, norm in found.items() if not isinstance(found.get(path.rpartition(".")[0]), PRepBN)}


def _layout(model: nn.Module) -> PublishedLayout:
    return getattr(model, "published_layout", PublishedLayout())


def _norm_layout(model: nn.Module, state: State) -> NormLayout:
    layout = _layout(model)
    return "prepbn" if any(layout.name(f"{path}.") + "norm2.alpha" in state for path in _norms(model)) else "repbn"


def _check_fit(model: nn.Module, own: State, names: dict[str, str | None], state: State) -> None:
    missing = [name for name, ours in names.items() if ours is not None and name not in state]
    dropped = _layout(model).dropped
    unexpected = [name for name in state if name not in names and not any(re.search(p, name) for p in dropped)]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model's {tuple(own[ours].shape)}"
        for name, ours in names.items()
        if ours is not None and name in state and state[name].shape != own[ours].shape
    ]
    found = ((missing, "tensors missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
    problems = [f"{len(which)} {what} (first: {which[0]})" for which, what in found if which]
    if problems:
        title = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        raise ValueError(f"checkpoint does not fit {title}: {', '.join(problems)}")
