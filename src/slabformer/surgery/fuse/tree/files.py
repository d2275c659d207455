"""A fused model as one safetensors file, whose header says what fusing changed about the tree; or in a stock model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from slabformer._extras import require
from slabformer._files import check_readable, replaced
from slabformer._torch import Conv
from slabformer.nn import PadTokens
from slabformer.nn.affine import Affine, Folded
from slabformer.settings import NonEmptyStr, NonNegativeInt, NotEmpty, PositiveInt, Range, check
from slabformer.surgery.convert import switch_off_fast_paths
from slabformer.surgery.fuse.tree.fold import KEPT_BUFFERS, NEW_BIASES, create_bias, keep_buffer, set_module
from slabformer.surgery.fuse.tree.norms import tail_of
from slabformer.surgery.fuse.tree.sharing import (
    load_tensors_,
    names_of_shared,
    note_untied_,
    untie_as_in_file_,
)
from slabformer.surgery.fuse.tree.size import fix_size_, fixed_sizes
from slabformer.surgery.normal import makes_ordinary_tensors
from slabformer.surgery.one_input import take_one_input_

#: key of the header under which the changes are written, as JSON
HEADER = "slabformer_fused"


@dataclass(kw_only=True)
class _Norm:
    """A norm in the header."""

    names: Annotated[list[NonEmptyStr], NotEmpty()]
    gone: bool
    dim: PositiveInt
    eps: Annotated[float, Range(ge=0, le=1)] | None
    channel_dim: Annotated[int, Range(ge=-8, le=8)] = -1


@dataclass(kw_only=True)
class _Changes:
    """What the header holds; fields with a default are younger than the first version."""

    norms: list[_Norm]
    new_biases: list[NonEmptyStr]
    tied: dict[str, NonEmptyStr]
    filled_pads: dict[str, PositiveInt] = field(default_factory=dict)
    kept_buffers: dict[str, PositiveInt] = field(default_factory=dict)
    fixed_sizes: list[list[list[NonNegativeInt]]] | None = None


def save_fused(model: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write the weights of a fused model, and which norms are gone and which biases are new, for :func:`load_fused`.

    The file is written beside and renamed, so that it is complete or absent.

    Args:
        model: What :func:`fuse` returned.
        path: Of the file.
        metadata: More strings for the file's header.

    Raises:
        ValueError: If ``model`` is not fused.
        ImportError: If safetensors is missing.
    """
    safetensors = require("safetensors.torch", "vision")
    changes = _changes(model)
    if not changes["norms"]:
        raise ValueError(f"{type(model).__name__} is not fused; call slabformer.fuse(model, example_inputs) first")
    tensors, changes["tied"] = _untie(model.state_dict())
    target = Path(path)
    with replaced(target) as temporary:
        safetensors.save_file(tensors, temporary, metadata={**(metadata or {}), HEADER: json.dumps(changes)})


def _changes(model: nn.Module) -> dict[str, Any]:
    norms: dict[nn.Module, dict[str, Any]] = {}
    biases, pads, buffers = [], {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (Affine, Folded)):
            row = {
                "names": [],
                "gone": isinstance(module, Folded),
                "dim": module.normalized_shape[0],
                "eps": module.eps,
            }
            row["channel_dim"] = getattr(module, "channel_dim", -1)
            norms.setdefault(module, row)["names"].append(name)
        if isinstance(module, PadTokens) and module.value is not None:
            pads[name] = module.dim
        for leaf in getattr(module, KEPT_BUFFERS, ()):
            buffers[f"{name}.{leaf}".removeprefix(".")] = len(module.get_buffer(leaf))
        biases += [f"{name}.{bias}".removeprefix(".") for bias in getattr(module, NEW_BIASES, ())]
    changes = {"norms": list(norms.values()), "new_biases": biases, "filled_pads": pads, "kept_buffers": buffers}
    return {**changes, "fixed_sizes": fixed_sizes(model)}


def _untie(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and under which name the others are found."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
    return _apart({name: tensor.contiguous() for name, tensor in state.items() if name not in tied}), tied


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that overlap with others, which safetensors refuses."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda row: row[1].data_ptr()):
        if tensor.data_ptr() < end:
            tensors[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return tensors


@makes_ordinary_tensors
def load_fused(skeleton: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn ``skeleton``, a fresh unfused model, into the fused model of a file: its module tree and its weights.

    Args:
        skeleton: The architecture with any norms at all in their places (LayerNorm, PRepBN ...). Edited in place.
        path: Written by :func:`save_fused`.

    Returns:
        ``skeleton``.

    Raises:
        ValueError: If the file is not a fused model's or does not fit; ``skeleton`` is then unchanged.
        ImportError: If safetensors is missing.
    """
    tensors, changes = _read(path)
    _check_fit(skeleton, path, tensors, changes)
    for row in changes["norms"]:
        _put_norm(skeleton, row)
    untie_as_in_file_(skeleton, changes["tied"])
    for name in changes["new_biases"]:
        create_bias(skeleton, name, _weight_beside(name), len(tensors[name]))
    for name, dim in changes["filled_pads"].items():
        skeleton.get_submodule(name).pad_with(torch.zeros(dim))  # type: ignore[operator]
    for name in changes["kept_buffers"]:
        keep_buffer(skeleton, name)
    tensors |= {name: tensors[first] for name, first in changes["tied"].items()}
    load_tensors_(skeleton, tensors)
    note_untied_(skeleton)
    switch_off_fast_paths(skeleton)
    if changes["fixed_sizes"] is not None:
        fix_size_(skeleton, changes["fixed_sizes"])
    return skeleton


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    safetensors = require("safetensors", "vision")
    check_readable(path, "fused model")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    if header is None:
        raise ValueError(f"{path} is not a fused model's file; write one with slabformer.save_fused")
    return tensors, _changes_in(header, path, tensors)


def _changes_in(header: str, path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the header of a file of ``tensors`` says.

    Raises:
        ValueError: If it is not what :func:`save_fused` writes.
    """
    try:
        changes = json.loads(header)
        check(HEADER, changes, _Changes)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} says what was folded in words that cannot be read: {error}") from error
    absent = [name for name in (*changes["new_biases"], *changes["tied"].values()) if name not in tensors]
    if absent:
        raise ValueError(f"{path} says that {absent[0]!r} was folded or tied, but does not hold it")
    return {"filled_pads": {}, "kept_buffers": {}, "fixed_sizes": None, **changes}


def _check_fit(
    skeleton: nn.Module, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], changes: Mapping[str, Any]
) -> None:
    expected = _expected_shapes(skeleton, changes)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found |= {name: found[first] for name, first in changes["tied"].items()}
    places = dict(skeleton.named_modules(remove_duplicate=False))
    absent = [name for row in changes["norms"] for name in row["names"] if name not in places]
    unpadded = [name for name in changes["filled_pads"] if not isinstance(places.get(name), PadTokens)]
    missing, unexpected = [n for n in expected if n not in found], [n for n in found if n not in expected]
    other = [f"{n} {found[n]}, not {expected[n]}" for n in expected if n in found and found[n] != expected[n]]
    faults = {"norms absent": absent, "pads absent": unpadded}
    faults |= {"tensors missing": missing, "unexpected": unexpected, "of another shape": other}
    said = [f"{len(names)} {what} (first: {names[0]})" for what, names in faults.items() if names]
    if said:
        raise ValueError(f"{path} does not fit {type(skeleton).__name__}: {', '.join(said)}")


def _expected_shapes(skeleton: nn.Module, changes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the skeleton's state dict after the changes."""
    inside = tuple(f"{name}." for row in changes["norms"] for name in row["names"])
    state = skeleton.state_dict().items()
    shapes = {name: tuple(tensor.shape) for name, tensor in state if not name.startswith(inside)}
    for row in changes["norms"]:
        if not row["gone"]:
            shapes |= {f"{name}.{leaf}": (row["dim"],) for name in row["names"] for leaf in ("weight", "bias")}
    shapes |= {f"{name}.value": (dim,) for name, dim in changes["filled_pads"].items()}
    shapes |= {name: (dim,) for name, dim in changes["kept_buffers"].items()}
    for name in changes["new_biases"]:
        weight = shapes.get(_weight_beside(name))
        if weight is not None:
            owner = skeleton.get_submodule(name.rpartition(".")[0])
            shapes[name] = (owner.out_channels if isinstance(owner, Conv) else weight[0],)
    return shapes


def _weight_beside(bias: str) -> str:
    return f"{bias.removesuffix('bias')}weight"


def _put_norm(skeleton: nn.Module, row: Mapping[str, Any]) -> None:
    old = skeleton.get_submodule(row["names"][0])
    like = next(iter((*old.parameters(), *old.buffers(), *skeleton.parameters())), torch.empty(0))
    options: dict[str, Any] = {"eps": row["eps"], "then": tail_of(old), "dtype": like.dtype}
    options["device"] = "cpu" if like.is_meta else like.device
    if row["gone"]:
        new: nn.Module = Folded(row["dim"], **options)
    else:
        new = Affine(row["dim"], channel_dim=row["channel_dim"], **options)
    take_one_input_(new, old)
    set_module(skeleton, row["names"], new.train(old.training))


def plain_(stock: nn.Module, fused: nn.Module) -> nn.Module:
    """Load the weights of ``fused`` into ``stock``, the same architecture built with the identity as its norm.

    Args:
        stock: For example ``timm.create_model(name, norm_layer=nn.Identity)``. Edited in place.
        fused: What :func:`slabformer.fuse` returned.

    Returns:
        ``stock``, in eval mode.

    Raises:
        ValueError: If ``fused`` holds what ``stock`` has no place for: norms that were kept, biases that folding added,
            fills of pads, weights of their own for layers that are one there; ``stock`` is then unchanged.
    """
    barred = _additions(fused)
    expected, found = stock.state_dict(), fused.state_dict()
    barred += [f"{name} has no place" for name in found if name not in expected]
    barred += [f"{name} has no value" for name in expected if name not in found]
    for first, *others in names_of_shared(stock):
        barred += [f"{first} and {name} are one there" for name in others if _differ(found, first, name)]
    if barred:
        more = f" (and {len(barred) - 1} more)" if len(barred) > 1 else ""
        raise ValueError(
            f"{type(stock).__name__} without norms cannot hold the fused weights: {barred[0]}{more}; "
            "save the fused model instead, or export it"
        )
    stock.load_state_dict(found, strict=True)
    return stock.eval()


def _differ(found: Mapping[str, Tensor], one: str, other: str) -> bool:
    return one in found and other in found and not torch.equal(found[one], found[other])


def _additions(fused: nn.Module) -> list[str]:
    found = []
    for name, module in fused.named_modules():
        if isinstance(module, Affine):
            found.append(f"{name} was kept")
        if isinstance(module, PadTokens) and module.value is not None:
            found.append(f"{name} pads with a value")
        found += [f"{name}.{leaf} is new" for note in (NEW_BIASES, KEPT_BUFFERS) for leaf in getattr(module, note, ())]
    return found
