"""Which arguments of a model are its architecture. Files and recipes may set these, and none that load something."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from slabformer.models.registry import check_model_name
from slabformer.settings import FractionBelowOne, NonNegativeInt, Pixels, PositiveFloat, PositiveInt, check

#: of constructors, but about where a model lies and what it returns rather than what it is
PLACEMENT = {"self", "device", "dtype", "out_indices"}
#: timm's spelling of ``norm``, which the families of this package take too
TRANSLATED = {"norm_layer"}
#: limits of a value, far beyond any model
LARGEST, LONGEST, DEEPEST = 1_000_000, 256, 4
TEXT = re.compile(r"[\w.\-+ ]{0,64}")
#: arguments that mean the same in every family, of timm or not: what one value may be, or one of each stage
RANGES: dict[str, Any] = {
    **dict.fromkeys(("embed_dim", "embed_dims", "depth", "depths", "num_heads", "in_chans", "patch_size"), PositiveInt),
    **dict.fromkeys(("mlp_ratio", "mlp_ratios"), PositiveFloat),
    **dict.fromkeys(("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate"), FractionBelowOne),
    **dict.fromkeys(("pos_drop_rate", "patch_drop_rate"), FractionBelowOne),
    "num_classes": NonNegativeInt,
    "img_size": Pixels,
}


def check_ranges(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of a model outside of :data:`RANGES`; others pass.

    Raises:
        ValueError: With the argument, what was given and what is allowed.
    """
    for name, value in arguments.items():
        if name not in RANGES or value is None:
            continue
        if not isinstance(value, (list, tuple)):
            check(name, value, RANGES[name])
            continue
        for index, item in enumerate(value):
            if item is not None and not isinstance(item, (list, tuple)):  # some families of timm nest theirs
                check(f"{name}[{index}]", item, RANGES[name])


def check_arguments(model: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are not of the model's architecture, or not plain values.

    timm's ``create_model`` takes others beside them: ``checkpoint_path`` and ``pretrained`` load weights,
    ``pretrained_cfg_overlay`` says from where, ``scriptable`` and ``exportable`` change the whole process.

    Args:
        model: A name in timm.
        arguments: For ``timm.create_model``, as JSON or YAML holds them.

    Raises:
        ValueError: If ``model`` is unknown, or an argument is not one of its constructors', or its value is no number,
            short text, true, false or null, nor a list or mapping of such.
    """
    known = architecture_of(model)
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            suggestion = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r} is not an argument of {model}'s architecture{suggestion}")
        if not _is_plain(value):
            raise ValueError(
                f"argument {name!r} of {model} must be numbers up to {LARGEST:,}, short names, true, false or null, "
                f"or lists or mappings of such; got {str(value)[:80]!r}"
            )
    check_ranges(arguments)


@functools.cache
def architecture_of(model: str) -> frozenset[str]:
    """What the constructors in the model's own source file, and those of the classes behind them, take.

    Raises:
        ValueError: If timm does not know ``model``.
    """
    check_model_name(model)
    family = vars(sys.modules[timm.model_entrypoint(model).__module__])
    classes = [value for value in family.values() if isinstance(value, type) and issubclass(value, nn.Module)]
    with_bases = {base for kind in classes for base in kind.__mro__ if issubclass(base, nn.Module)} - {nn.Module}
    signatures = [inspect.signature(kind.__init__) for kind in with_bases]
    names = {
        parameter.name
        for signature in signatures
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    return frozenset(names - PLACEMENT | TRANSLATED)


def _is_plain(value: Any, depth: int = 0) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) <= LARGEST
    if isinstance(value, str):
        return TEXT.fullmatch(value) is not None
    if depth == DEEPEST or not isinstance(value, (list, tuple, Mapping)) or len(value) > LONGEST:
        return False
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item, depth + 1) for key, item in value.items())
    return all(_is_plain(item, depth + 1) for item in value)
