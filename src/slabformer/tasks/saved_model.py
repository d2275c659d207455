"""One safetensors file is one model: weights, and in the header all it takes to build the model and feed it."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer._extras import require
from slabformer.models.hub import weights_file
from slabformer.nn import PRepBN, RepBN
from slabformer.nn.affine import Affine, Folded
from slabformer.tasks.engine.files import replaced

#: files that PyTorch pickles, as published weights are
CHECKPOINTS = (".pth", ".pt", ".bin")
#: keys of the file's metadata
INFO, TIED, DIGEST = "slabformer", "slabformer.tied", "slabformer.sha256"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Norms that :func:`slabformer.convert_norms_` replaced with the same settings."""

    names: list[str]
    """Of the modules."""
    progressive: bool
    """PRepBN, or RepBN from the start."""
    eps: float
    """RepBN's."""
    momentum: float | None
    """RepBN's."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a saved model is and what it expects."""

    model: str
    """Name in timm."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``timm.create_model``."""
    class_names: list[str]
    """By label."""
    input_size: tuple[int, int, int] = (3, 224, 224)
    """Channels, height, width."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides what is left."""
    interpolation: str = "bicubic"
    """How images are resized."""
    crop_pct: float = 0.875
    """Centre crop over the resized shorter side."""
    converted: list[Conversion] = field(default_factory=list)
    """Norms that are not as timm builds them; found by :func:`save_model`."""
    fused: bool = False
    """Norms are folded; found by :func:`save_model`."""

    def to_json(self) -> str:
        """One line, for the file's header."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelInfo:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: If ``text`` is not JSON, or lacks or adds a field.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not a mapping")
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown field {min(unknown)!r}; a newer slabformer may have written it")
        for name in ("input_size", "mean", "std"):
            values[name] = tuple(values.get(name, getattr(cls, name)))
        try:
            values["converted"] = [Conversion(**conversion) for conversion in values.get("converted", [])]
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from error


def save_model(model: nn.Module, path: str | Path, info: ModelInfo) -> ModelInfo:
    """Write ``model`` to ``path``, all of it or nothing; norms that were converted or folded are noted by themselves.

    Args:
        model: Built by ``info.model``, then converted and fused as you like; wrappers of DDP and compile are taken off.
        path: A ``.safetensors`` file.
        info: What the model is; ``converted`` and ``fused`` are filled in.

    Returns:
        ``info`` as it was written.

    Raises:
        OSError: If the file cannot be written.
    """
    model = _unwrap(model)
    info = replace(info, fused=any(isinstance(module, (Affine, Folded)) for module in model.modules()))
    if not info.fused:
        info = replace(info, converted=_conversions(model, info))
    with replaced(Path(path)) as temporary:
        tensors, metadata = _fused_contents(model, temporary) if info.fused else _contents(model)
        metadata |= {"format": "pt", INFO: info.to_json()}
        metadata[DIGEST] = _digest(metadata, tensors)
        require("safetensors.torch", extra="vision").save_file(tensors, str(temporary), metadata=metadata)
    return info


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, ModelInfo]:
    """The model that :func:`save_model` wrote to ``path``, in eval mode, and what it is.

    Published ``.pth`` files name no model: build it and call :func:`slabformer.load_published`.

    Args:
        path: The file, a folder that `slab push` wrote, or ``hf-hub:user/name``.
        device: Where the model goes.

    Raises:
        FileNotFoundError: If there is no such file.
        ConnectionError: If the hub cannot be reached.
        ValueError: If it is truncated, altered, or no model of ours, or does not fit the model it names.
    """
    path = weights_file(path)
    metadata, tensors = _read(path)
    info = _info_of(path, metadata, tensors)
    model = _skeleton(info)
    if info.fused:
        dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        model = sf.load_fused(model.to(dtypes.pop()) if len(dtypes) == 1 else model, path)
    else:
        for name, kept in json.loads(metadata.get(TIED, "{}")).items():
            tensors[name] = tensors[kept]
        _load_strictly(model, tensors, f"{path} does not fit {info.model}")
    return model.to(device).eval(), info


def create_model(name: str, *, pretrained: bool = False, **model_args: Any) -> nn.Module:
    """``timm.create_model`` whose errors name what is near.

    Raises:
        ValueError: If timm does not know ``name``, or the model refuses an argument.
    """
    check_model_name(name)
    try:
        return require("timm", extra="vision").create_model(name, pretrained=pretrained, **model_args)
    except TypeError as error:
        raise ValueError(f"{name} refuses its arguments ({error})") from error


def check_model_name(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ValueError: With the nearest name that it does.
    """
    timm = require("timm", extra="vision")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        suggestion = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown model {name!r}; {suggestion}`slab list` shows all")


def _unwrap(model: nn.Module) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _conversions(model: nn.Module, info: ModelInfo) -> list[Conversion]:
    """How ``model``'s norms differ from those that timm builds."""
    built = dict(_build(info).named_modules(remove_duplicate=False))
    groups: dict[tuple[bool, float, float | None], list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (PRepBN, RepBN)) and name in built and not isinstance(built[name], type(module)):
            rep = module.rep if isinstance(module, PRepBN) else module
            groups.setdefault((isinstance(module, PRepBN), rep.eps, rep.momentum), []).append(name)
    return [Conversion(names=names, progressive=p, eps=eps, momentum=m) for (p, eps, m), names in groups.items()]


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


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over header and tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {DIGEST}):
        digest.update(f"{key}={metadata[key]};".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no model at {str(path)!r}: no such file")
    safetensors = require("safetensors", extra="vision")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        if path.suffix in CHECKPOINTS:
            message = f"{path} does not say which model it holds; give the model's name, and the file as its checkpoint"
            raise ValueError(message) from error
        raise ValueError(f"{path} is truncated, or no safetensors file ({error})") from error


def _info_of(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> ModelInfo:
    if INFO not in metadata:
        raise ValueError(
            f"{path} does not say which model it holds; slabformer did not save it with `save_model`. Load it into a "
            "model of your own and save that"
        )
    if metadata.get(DIGEST) != _digest(metadata, tensors):
        raise ValueError(f"{path} was altered after it was saved (its checksum does not match); get it again")
    try:
        return ModelInfo.from_json(metadata[INFO])
    except ValueError as error:
        raise ValueError(f"{path} describes its model in words that cannot be read: {error}") from error


def _build(info: ModelInfo) -> nn.Module:
    """The model as timm builds it; the random numbers that this draws are not missed elsewhere."""
    with torch.random.fork_rng(devices=[]):
        return create_model(info.model, **info.model_args)


def _skeleton(info: ModelInfo) -> nn.Module:
    """The model before its weights, norms converted."""
    model = _build(info)
    for conversion in info.converted:
        names = frozenset(conversion.names)
        found = sf.convert_norms_(
            model,
            lambda _, name: name in names,  # noqa: B023 - called before the next round
            progressive=conversion.progressive,
            eps=conversion.eps,
            momentum=conversion.momentum,
        )
        if names - set(found):
            raise ValueError(
                f"{info.model} has no norm {min(names - set(found))!r} to convert; is timm another version?"
            )
    return model


def _load_strictly(model: nn.Module, tensors: dict[str, Tensor], complaint: str) -> None:
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
    model.load_state_dict(tensors)
