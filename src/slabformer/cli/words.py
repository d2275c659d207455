"""A setting's type, range and default in words that fit into one line of help."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from slabformer.settings import ANY, MOST, MOST_64, InputPath, NotEmpty, OutputFile, OutputFolder, Range

NAMES: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", bool: "{true,false}", Path: "PATH"}


def placeholder(hint: Any) -> str:
    """What stands for a value behind its flag: ``INT``, ``FILE``, ``{a,b}``, ``[FLOAT,FLOAT]``."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, *rules = parts
        return next(filter(None, map(_place, rules)), "") or placeholder(base)
    if origin is Literal:
        return "{" + ",".join("null" if value is None else str(value) for value in parts) + "}"
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(placeholder(part) for part in parts if part is not types.NoneType))
    if origin is tuple and Ellipsis not in parts:
        return f"[{','.join(map(placeholder, parts))}]"
    if origin in (list, tuple, Sequence):
        return f"[{placeholder(parts[0])},...]"
    return "MAPPING" if origin in (dict, Mapping) else NAMES.get(hint, "VALUE")


def limits(hint: Any) -> str:
    """What a value may be beyond its type, ``>= 1``; nothing where the type says it all."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        is_mapping = get_origin(parts[0]) is dict
        return "" if is_mapping else " and ".join(filter(None, map(_limit, parts[1:])))
    if origin in (Union, types.UnionType, list, tuple, Sequence):
        return " or ".join(dict.fromkeys(filter(None, map(limits, parts))))
    return ""


def facts(action: argparse.Action, hint: Any, *, needed: bool, in_recipe: bool) -> str:
    """Type, range and default of an option, in brackets behind its help; ``null`` where a recipe may hold it."""
    kind, limit = placeholder(hint) if hint is not None else "", limits(hint)
    if not kind.isalpha() or _is_sentence(limit):
        kind = ""
    allowed = " ".join(filter(None, (kind, limit)))
    if in_recipe and types.NoneType in get_args(hint) and allowed and action.default is not None:
        allowed += ", or null" if "," in allowed else " or null"
    default = "required" if needed else _default(action, in_recipe)
    parts = list(filter(None, (allowed if allowed != kind else "", default)))  # the kind alone stands behind the flag
    return f" ({('; ' if ',' in allowed else ', ').join(parts)})" if parts else ""


def in_words(value: Any) -> str:
    """A default as it would be given."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "on", False: "off"}[value]
    if isinstance(value, (list, tuple)):
        return " ".join(map(in_words, value))
    return str(value)


def _default(action: argparse.Action, in_recipe: bool) -> str:
    value = action.default
    if (
        value == argparse.SUPPRESS
        or value in ([], {})
        or (not action.option_strings and action.nargs not in ("?", "*"))
    ):
        return ""
    if value is None or (value is False and not in_recipe):
        return "default null" if in_recipe else ""
    listed = isinstance(value, (list, tuple)) and action.nargs is None
    return f"default {list(value) if listed else in_words(value)}"


def _place(rule: Any) -> str:
    if isinstance(rule, OutputFolder):
        return "FOLDER"
    return "FILE" if isinstance(rule, OutputFile) else rule.kind.upper() if isinstance(rule, InputPath) else ""


def _limit(rule: Any) -> str:
    if isinstance(rule, Range):
        if rule.ge is not None and rule.le not in (None, MOST):
            return f"{rule.ge} to {rule.le}"
        return " and ".join(_bounds(rule))
    if isinstance(rule, OutputFile):
        return f"ending in {' or '.join(rule.suffixes)}" if rule.suffixes else ""
    if isinstance(rule, (NotEmpty, OutputFolder, InputPath)) or not hasattr(rule, "words"):
        return ""
    return "" if rule.words() == ANY else rule.words()


def _bounds(rule: Range) -> Iterator[str]:
    for sign, bound in ((">=", rule.ge), (">", rule.gt), ("<=", rule.le), ("<", rule.lt)):
        if bound is not None and bound not in (MOST, MOST_64):
            yield f"{sign} {bound}"


def _is_sentence(limit: str) -> bool:
    return limit[:1].isalpha() and not limit.startswith("ending in")
