"""One safetensors file is one model: weights, and in the header all it takes to build the model.

Which kind of model that is, a subclass of :class:`SavedInfo` says: a classifier's or a detector's.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer._extras import require
from slabformer._files import check_readable, replaced
from slabformer._torch import uncompiled
from slabformer.nn.affine import Affine, Folded
from slabformer.nn.norms import type_of
from slabformer.settings import NonEmptyStr, check, check_fields, from_mapping
from slabformer.surgery.fuse.tree.sharing import load_tensors_
from slabformer.tasks.conversion import Conversion, as_written_now, buildable_norms, convert_as_described_, describe
from slabformer.tasks.conversion_of_attention import (
    AttentionConversion,
    convert_attentions_as_described_,
    describe_attentions,
)
from slabformer.tasks.engine.documents import parse_json

#: files that PyTorch pickles, as published weights are
CHECKPOINTS = (".pth", ".pt", ".bin")
#: keys of the file's metadata
TIED, DIGEST = "slabformer.tied", "slabformer.sha256"
#: key of what kind of model it is, and what to do with such a file
KINDS = {"slabformer": "a classifier, for `slab`", "slabformer.detector": "a detector, for `slab detect`"}


@dataclass(frozen=True, kw_only=True)
class SavedInfo(ABC):
    """What a saved model is; a kind of models adds what it takes to build one."""

    KEY: ClassVar[str]
    """One of :data:`KINDS`."""
    converted: list[Conversion] = field(default_factory=list)
    """Norms that are not as they are built; found by :func:`save_with_info`."""
    attentions: list[AttentionConversion] = field(default_factory=list)
    """Attentions that were made linear; found by :func:`save_with_info`."""
    fused: bool = False
    """Norms are folded; found by :func:`save_with_info`."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    @abstractmethod
    def title(self) -> str:
        """What errors call the model."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model before conversion and fusing, with any weights."""

    @classmethod
    def restore(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``values`` as JSON gave them, checked, as the fields want them."""
        return values | {
            "converted": [Conversion(**conversion) for conversion in values.get("converted", [])],
            "attentions": [AttentionConversion(**conversion) for conversion in values.get("attentions", [])],
        }

    def to_json(self) -> str:
        """One line, for the file's header."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: If ``text`` is not JSON, lacks or adds a field, or one is out of its range.
        """
        values = parse_json(text)
        if isinstance(values, dict) and "converted" in values:
            values["converted"] = as_written_now(values["converted"])
        return cls(**cls.restore(from_mapping(cls, values)))

    @abstractmethod
    def check_model(self, model: nn.Module) -> None:
        """Refuse a ``model``, as built, that this does not describe.

        Raises:
            ValueError: If class names are of another number than its classes.
        """


Info = TypeVar("Info", bound=SavedInfo)


def save_with_info(model: nn.Module, path: str | Path, info: Info) -> Info:
    """Write ``model`` to ``path``, all of it or nothing; norms that were converted or folded are noted by themselves.

    Args:
        model: Built by ``info``, then converted and fused as you like; wrappers of DDP and compile are taken off.
        path: A ``.safetensors`` file.
        info: What the model is; ``converted``, ``attentions`` and ``fused`` are filled in.

    Returns:
        ``info`` as it was written.

    Raises:
        ValueError: If ``info`` does not describe ``model``.
        OSError: If the file cannot be written.
    """
    model = _unwrap(model)
    info.check_model(model)
    info = replace(
        info,
        attentions=describe_attentions(model),
        fused=any(isinstance(module, (Affine, Folded)) for module in model.modules()),
    )
    if not info.fused:
        info = replace(info, converted=_conversions(model, info))
    with replaced(Path(path)) as temporary:
        tensors, metadata = _fused_contents(model, temporary) if info.fused else _contents(model)
        metadata |= {"format": "pt", info.KEY: info.to_json()}
        metadata[DIGEST] = digest_of(metadata, tensors)
        require("safetensors.torch", extra="vision").save_file(tensors, str(temporary), metadata=metadata)
    return info


def load_with_info(path: Path, kind: type[Info], device: torch.device | str = "cpu") -> tuple[nn.Module, Info]:
    """The model that :func:`save_with_info` wrote to ``path``, in eval mode, and what it is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, altered, no model of this kind, or does not fit the model it names.
    """
    metadata, tensors = _read(path)
    info = _info_of(path, metadata, tensors, kind)
    model = _skeleton(info)
    if info.fused:
        dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        model = sf.load_fused(model.to(dtypes.pop()) if len(dtypes) == 1 else model, path)
    else:
        for name, kept in _ties(path, metadata, tensors).items():
            tensors[name] = tensors[kept]
        load_strictly(model, tensors, f"{path} does not fit {info.title}")
    try:
        info.check_model(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model.to(device).eval(), info


def _unwrap(model: nn.Module) -> nn.Module:
    model = uncompiled(model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _conversions(model: nn.Module, info: SavedInfo) -> list[Conversion]:
    """How ``model``'s norms differ from those that it is built with."""
    built = dict(_build(info).named_modules(remove_duplicate=False))
    others = {
        name: norm
        for name, norm in buildable_norms(model)
        if name in built and type_of(built[name]) is not type_of(norm)
    }
    return describe(others)


def _contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, tied ones once, and under which names the others go."""
    tensors: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, {TIED: json.dumps(tied)} if tied else {}


def _fused_contents(model: nn.Module, temporary: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`slabformer.save_fused` writes, header included."""
    sf.save_fused(model, temporary)
    metadata, tensors = _read(temporary)
    return {name: tensor.clone() for name, tensor in tensors.items()}, metadata


def digest_of(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over header and tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {DIGEST}):
        digest.update(f"{key}={metadata[key]};".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_saved(path: Path, kind: type[SavedInfo]) -> None:
    """Refuse a file of weights to start from that is no model of this ``kind``, by its header alone.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As :func:`load_with_info`, as far as that can be told without its tensors.
    """
    with _opened(path, "weights") as file:
        _check_kind(path, dict(file.metadata() or {}), kind)


def saved_kind(path: Path) -> str:
    """Which of :data:`KINDS` the file ``path`` holds, by its header alone; empty where it does not say.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, or no safetensors file.
    """
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
    return next((key for key in KINDS if key in metadata), "")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with _opened(path) as file:
        return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path, what: str = "model") -> Iterator[Any]:
    check_readable(path, what)
    safetensors = require("safetensors", extra="vision")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        if path.suffix.lower() in CHECKPOINTS:
            message = f"{path} does not say which model it holds; give the model's name, and the file as its checkpoint"
            raise ValueError(message) from error
        raise ValueError(f"{path} is truncated, or no safetensors file ({error})") from error


def _check_kind(path: Path, metadata: Mapping[str, str], kind: type[SavedInfo]) -> None:
    other = next((what for key, what in KINDS.items() if key in metadata and key != kind.KEY), None)
    if other is not None:
        raise ValueError(f"{path} holds {other}")
    if kind.KEY not in metadata:
        raise ValueError(
            f"{path} does not say which model it holds; slabformer did not save it with `save_model`. Load it into a "
            "model of your own and save that"
        )


def _info_of(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor], kind: type[Info]) -> Info:
    _check_kind(path, metadata, kind)
    if metadata.get(DIGEST) != digest_of(metadata, tensors):
        raise ValueError(f"{path} was altered after it was saved (its checksum does not match); get it again")
    try:
        return kind.from_json(metadata[kind.KEY])
    except ValueError as error:
        raise ValueError(f"{path} describes its model in words that cannot be read: {error}") from error


def _ties(path: Path, metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Under which name each tied tensor's values are found."""
    try:
        ties: dict[str, str] = parse_json(metadata.get(TIED, "{}"))
        check(TIED, ties, dict[str, NonEmptyStr])
    except ValueError as error:
        raise ValueError(f"{path} says which tensors are tied in words that cannot be read: {error}") from error
    absent = sorted(set(ties.values()) - tensors.keys())
    if absent:
        raise ValueError(f"{path} says that tensors are tied to {absent[0]!r}, but does not hold it")
    return ties


def _build(info: SavedInfo) -> nn.Module:
    """The model as it is built; the random numbers that this draws are not missed elsewhere."""
    with torch.random.fork_rng(devices=[]):
        return info.build()


def _skeleton(info: SavedInfo) -> nn.Module:
    """The model before its weights, norms and attentions converted."""
    model = _build(info)
    convert_attentions_as_described_(model, info.attentions, info.title)
    convert_as_described_(model, info.converted, info.title)
    return model


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], complaint: str) -> None:
    """Load ``tensors``, dtypes included, into ``model``: all of them, and nothing else.

    Raises:
        ValueError: ``complaint`` and what is missing, too many or of another shape; nothing is changed then.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or unexpected or shapes:
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        told = [f"{len(names)} tensors {what} (first: {names[0]})" for what, names in parts.items() if names]
        raise ValueError(f"{complaint}: {', '.join(told)}")
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named():
            if name in tensors and tensor.dtype != tensors[name].dtype:
                tensor.data = tensor.data.to(tensors[name].dtype)
    load_tensors_(model, tensors)
