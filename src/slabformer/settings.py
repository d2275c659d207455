"""What every setting may be, said once: in its annotation.

    epochs: Annotated[int, Range(ge=1, le=100_000)] = 300
    layer_decay: Annotated[float, Range(gt=0, le=1)] | None = None

Recipes (:class:`Settings`), flags of the command line, headers of files and functions (:func:`checked`) are all checked
against such annotations, before anything else runs. Numbers are finite, and true and false are no numbers.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin

F = TypeVar("F", bound=Callable[..., Any])
#: largest count, and largest seed plus 1, that all libraries take
MOST, MOST_64 = 2**31 - 1, 2**63
#: words of a rule that says that there is none
ANY = "any"
#: standard output, where a file may be given
STDOUT = Path("-")


class Rule(Protocol):
    """A rule in the metadata of an ``Annotated`` type."""

    def words(self) -> str:
        """What is allowed, behind "must be"."""
        ...

    def refusal(self, value: Any) -> str | None:
        """What is wrong with a ``value`` of the right type and what is allowed, behind the setting's name."""
        ...


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def _low(self) -> str:
        return "" if self.ge is self.gt is None else f"above {self.gt}" if self.ge is None else f"at least {self.ge}"

    def _high(self) -> str:
        return "" if self.le is self.lt is None else f"below {self.lt}" if self.le is None else f"at most {self.le}"

    def words(self) -> str:
        """See :class:`Rule`; a limit that no sensible value meets goes without saying until it is passed."""
        if self.ge is not None and self.le not in (None, MOST):
            return f"in [{self.ge}, {self.le}]"
        return " and ".join(filter(None, (self._low(), "" if self._is_cap() else self._high())))

    def _is_cap(self) -> bool:
        return self.le == MOST or self.lt == MOST_64

    def refusal(self, value: Any) -> str | None:
        """See :class:`Rule`."""
        low = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        high = (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)
        if low and high:
            return None
        return f"must be {self._high() if low and self._is_cap() else self.words()}, got {shown(value)}"


@dataclass(frozen=True)
class NotEmpty:
    """NonEmptyStr with more than white space in it, or a sequence with an element."""

    def words(self) -> str:
        """See :class:`Rule`."""
        return "not empty"

    def refusal(self, value: Any) -> str | None:
        """See :class:`Rule`."""
        return None if (value.strip() if isinstance(value, str) else value) else f"must not be empty, got {value!r}"


@dataclass(frozen=True)
class Where:
    """Any other condition, with the words for it."""

    allowed: str
    holds: Callable[[Any], bool]

    def words(self) -> str:
        """See :class:`Rule`."""
        return self.allowed

    def refusal(self, value: Any) -> str | None:
        """See :class:`Rule`."""
        return None if self.holds(value) else f"must be {self.allowed}, got {shown(value)}"


@dataclass(frozen=True)
class Known:
    """A name that a library knows, in upper or lower case; it is asked, and imported, when a name is checked."""

    names: Callable[[], Collection[str]]
    allowed: str = ""
    """Which, in words; without any, the names themselves."""

    def words(self) -> str:
        """See :class:`Rule`."""
        return self.allowed or f"one of {', '.join(self.names())}"

    def refusal(self, value: Any) -> str | None:
        """See :class:`Rule`."""
        names = self.names()
        if value.lower() in names:
            return None
        near = difflib.get_close_matches(value.lower(), names, n=1)
        return f"must be {self.words()}, got {shown(value)}" + (f"; did you mean {near[0]!r}?" if near else "")


@dataclass(frozen=True, init=False)
class OutputFile:
    """A file that can be written: its folder is there, and so is the permission.

    Args:
        suffixes: Of which one decides what is written; any by default.
        stdout: Whether ``-`` stands for standard output.
    """

    suffixes: tuple[str, ...]
    stdout: bool

    def __init__(self, *suffixes: str, stdout: bool = False) -> None:
        object.__setattr__(self, "suffixes", suffixes)
        object.__setattr__(self, "stdout", stdout)

    def words(self) -> str:
        """See :class:`Rule`."""
        *others, last = self.suffixes or ("",)
        kind = f"a {', '.join(others)} or {last} file" if others else f"a {last} file" if last else "a file"
        return f"{kind}, or - for standard output" if self.stdout else kind

    def refusal(self, value: Any) -> str | None:
        """See :class:`Rule`."""
        path = Path(value)
        if self.stdout and path == STDOUT:
            return None
        if not path.name or path.is_dir():
            return f"must be {self.words()}, got the folder {str(path)!r}"
        if path.exists() and not path.is_file():
            return f"must be {self.words()}, but {str(path)!r} is a named pipe or a device"
        if self.suffixes and path.suffix not in self.suffixes:
            return f"must be {self.words()}, got {str(path)!r}"
        if not path.parent.is_dir():
            return f"has no folder {str(path.parent)!r} to write {path.name} into; create it first"
        return _not_writable(path.parent)


@dataclass(frozen=True)
class OutputFolder:
    """A folder that can be written into, or be made."""

    def words(self) -> str:
        """See :class:`Rule`."""
        return "a folder to write into"

    def refusal(self, value: Any) -> str | None:
        """See :class:`Rule`."""
        path = Path(value)
        if not str(value).strip():
            return f"must not be empty, got {value!r}"
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists() or folder.is_symlink())
        if not nearest.is_dir():
            return f"must be {self.words()}, but {str(nearest)!r} is a file"
        return _not_writable(nearest)


@dataclass(frozen=True, init=False)
class InputPath:
    """What is there and can be read.

    Args:
        kind: "file", "folder", or "path" for either.
    """

    kind: Literal["file", "folder", "path"]

    def __init__(self, kind: Literal["file", "folder", "path"] = "path") -> None:
        object.__setattr__(self, "kind", kind)

    def words(self) -> str:
        """See :class:`Rule`."""
        return "a file or folder that exists" if self.kind == "path" else f"a {self.kind} that exists"

    def refusal(self, value: Any) -> str | None:
        """See :class:`Rule`."""
        path = Path(value)
        if not path.exists():
            return f"must be {self.words()}, got {str(path)!r}: no such file or folder"
        if self.kind != "path" and path.is_dir() != (self.kind == "folder"):
            return f"must be {self.words()}, got the {'folder' if path.is_dir() else 'file'} {str(path)!r}"
        if not os.access(path, os.R_OK):
            return f"cannot be read: no permission to read {str(path)!r}"
        return None


def _not_writable(folder: Path) -> str | None:
    """Also of a file system that is mounted read-only."""
    return None if os.access(folder, os.W_OK) else f"cannot be written: no permission to write into {str(folder)!r}"


def _is_device(name: str) -> bool:
    import torch  # not before: options without a device answer at once

    try:
        return bool(name) and torch.device(name) is not None
    except RuntimeError:
        return False


def _is_argument(item: tuple[Any, Any]) -> bool:
    name, value = item
    return isinstance(name, str) and bool(name) and not (isinstance(value, float) and not math.isfinite(value))


PositiveInt = Annotated[int, Range(ge=1, le=MOST)]
NonNegativeInt = Annotated[int, Range(ge=0, le=MOST)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
#: of a whole, a probability, or a factor that shrinks
Fraction = Annotated[float, Range(ge=0, le=1)]
FractionBelowOne = Annotated[float, Range(ge=0, lt=1)]
PositiveFraction = Annotated[float, Range(gt=0, le=1)]
#: finite, and nothing else
Number = Annotated[float, Where(ANY, lambda value: True)]
#: initial skip weight of RepBN, a number or by name: "published" is that of the paper's vision models
Eta = Number | Literal["published"]
#: what torch, NumPy and Python all take
Seed = Annotated[int, Range(ge=0, lt=MOST_64)]
Epochs = Annotated[int, Range(ge=1, le=100_000)]
Pixels = Annotated[int, Range(ge=1, le=65_536)]
#: height and width, or one number for both
ImageSize = Pixels | tuple[Pixels, Pixels]
#: processes or threads
Workers = Annotated[int, Range(ge=0, le=4_096)]
Threads = Annotated[int, Range(ge=1, le=4_096)]
Seconds = Annotated[float, Range(ge=0, le=86_400)]
#: versions of ONNX that PyTorch's exporter writes, and of its files
Opset = Annotated[int, Range(ge=18, le=30)]
IrVersion = Annotated[int, Range(ge=8, le=30)]
#: a difference over the scale of what it is held against
Tolerance = Annotated[float, Range(ge=0, lt=1)]
SHARE_OR_COUNT = Where(
    "a share in [0, 1), or a whole count from 1 on", lambda value: value >= 0 and (value < 1 or value % 1 == 0)
)
ShareOrCount = Annotated[float, SHARE_OR_COUNT]
NonEmptyStr = Annotated[str, NotEmpty()]
#: of classes, by label; a model without any has none
ClassNames = Annotated[
    list[NonEmptyStr], Where("different names, one for each class", lambda names: len(set(names)) == len(names))
]
#: of an annotation file, which numbers as it likes
CategoryId = Annotated[int, Range(ge=-MOST_64, lt=MOST_64)]
Arguments = Annotated[
    dict[str, Any],
    Where("a mapping of names to values that are finite", lambda given: all(map(_is_argument, given.items()))),
]
FileToWrite = Annotated[Path, OutputFile()]
#: ``-`` for standard output
JsonToWrite = Annotated[Path, OutputFile(stdout=True)]
ModelToWrite = Annotated[Path, OutputFile(".safetensors")]
FigureToWrite = Annotated[Path, OutputFile(".png", ".svg", ".pdf")]
FolderToWrite = Annotated[Path, OutputFolder()]
ExistingFile = Annotated[Path, InputPath("file")]
ExistingPath = Annotated[Path, InputPath("path")]
#: axis of a norm's channels
ChannelDim = Annotated[int, Where("-1 (tokens) or 1 (maps)", lambda axis: axis in (-1, 1))]
DeviceName = Annotated[str, Where("a device such as cpu, cuda or cuda:1", _is_device)]
DeviceOrAuto = Annotated[
    str, Where("auto, or a device such as cpu, cuda or cuda:1", lambda name: name == "auto" or _is_device(name))
]


@dataclass(kw_only=True)
class Settings:
    """Base of dataclasses whose fields are checked whenever one is made; errors name a field by its dotted name.

    Raises:
        ValueError: With the field, what was given, and what is allowed.
    """

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(settings: Any, prefix: str = "") -> None:
    """Refuse a dataclass, nested ones included, with a field outside of its range; ``prefix`` goes before names.

    Raises:
        ValueError: See :class:`Settings`.
    """
    kind: Any = type(settings)
    defaults = {f.name: f.default for f in fields(kind)}
    for name, hint in field_hints(kind).items():
        value = getattr(settings, name)
        if not is_default(value, defaults[name]):
            check(f"{prefix}{name}", value, hint)


def is_default(value: Any, default: Any) -> bool:
    """Whether ``value`` need not be checked, and the library that knows its names not be imported for it."""
    return type(value) is type(default) and bool(value == default)


def asks_the_disk(hint: Any) -> bool:
    """Whether a type's rules depend on which files are there: then a default may be wrong too."""
    return any(
        isinstance(part, (OutputFile, OutputFolder, InputPath)) or asks_the_disk(part) for part in get_args(hint)
    )


def from_mapping(kind: type, values: Any) -> dict[str, Any]:
    """``values``, read from a file, if they are what the dataclass ``kind`` can be made of.

    Raises:
        ValueError: If they are no mapping, a field is missing, unknown, or out of its range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"it must be a mapping, got {shown(values)}")
    if wrong := _other_fields(values, kind):
        raise ValueError(wrong)
    for name, hint in field_hints(kind).items():
        if name in values:
            check(name, values[name], hint)
    return dict(values)


def check(name: str, value: Any, hint: Any, none: str = "null") -> None:
    """Refuse a ``value`` that is not what ``hint``, a type with rules in it, allows.

    Args:
        name: What errors call the setting.
        value: What was given; mappings may stand for dataclasses.
        hint: ``Annotated``, ``Literal``, a union, a sequence or a mapping of such, or a dataclass; all else passes.
        none: What errors call None.

    Raises:
        ValueError: In one line.
    """
    refused = _refusal(name, value, hint, none)
    if refused is not None:
        raise ValueError(refused)


def checked(function: F) -> F:
    """Decorator: arguments are checked against their annotations before the function, or constructor, runs.

    Raises:
        ValueError: By the function, for an argument outside of its range.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own words name the function
        for name, hint in parameter_hints(function).items():
            if name in bound.arguments:
                check(name, bound.arguments[name], hint, none="None")
        return function(*args, **kwargs)

    return guarded  # type: ignore[return-value]


def check_fractions(warmup: float, fade: float) -> None:
    """Of training, before LayerNorm starts to fade and while it does.

    Raises:
        ValueError: If LayerNorm would not be gone when training ends.
    """
    if warmup + fade > 1 + 1e-9:
        raise ValueError(
            f"the schedule would end after training: warmup {warmup} + fade {fade} is above 1; LayerNorm would stay"
        )


@functools.cache
def field_hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields, with their rules.

    Raises:
        NameError: If an annotation has a name that is not there at run time: its rule would not hold.
    """
    found: dict[str, Any] = {}
    package = kind.__module__.partition(".")[0]
    for base in reversed(kind.__mro__):
        own, names = inspect.get_annotations(base), vars(sys.modules[base.__module__])
        if base.__module__.partition(".")[0] == package:
            found |= {name: _resolved(hint, names, f"{base.__name__}.{name}") for name, hint in own.items()}
        else:  # another library's fields carry no rules of ours
            found |= dict.fromkeys(own, Any)
    return {f.name: found[f.name] for f in fields(kind) if f.name in found}


def nested_hints(kind: Any, prefix: str = "") -> dict[str, Any]:
    """:func:`field_hints` by dotted names: of a nested dataclass, its fields."""
    found: dict[str, Any] = {}
    for name, hint in field_hints(kind).items():
        found |= nested_hints(hint, f"{prefix}{name}.") if is_dataclass(hint) else {f"{prefix}{name}": hint}
    return found


@functools.cache
def parameter_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of a function's parameters that carry rules.

    Raises:
        NameError: See :func:`field_hints`.
    """
    function = inspect.unwrap(function)
    own = {
        name: _resolved(parameter.annotation, function.__globals__, f"{function.__qualname__}({name})")
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    return {name: hint for name, hint in own.items() if has_rule(hint)}


def has_rule(hint: Any) -> bool:
    """Whether every number and every text in a type has a rule, and there is one."""
    if hint is bool or get_origin(hint) is Literal:
        return True
    if get_origin(hint) is Annotated:
        return any(hasattr(rule, "refusal") for rule in get_args(hint)[1:])
    parts = [part for part in get_args(hint) if part not in (types.NoneType, Ellipsis)]
    if get_origin(hint) in (dict, Mapping):
        parts = parts[1:]
    return bool(parts) and all(has_rule(part) for part in parts)


def describe(hint: Any, none: str = "null") -> str:
    """What a type with rules allows, in words behind "must be"."""
    if get_origin(hint) is Annotated:
        base, *rules = get_args(hint)
        return _with_rules(base, [rule.words() for rule in rules if hasattr(rule, "words")])
    if get_origin(hint) is Literal:
        return _listed([repr(value) if value is not None else none for value in get_args(hint)])
    if _is_union(hint):
        members = [describe(part, none) for part in get_args(hint) if part is not types.NoneType]
        return _listed([*members, *([none] if types.NoneType in get_args(hint) else [])])
    if get_origin(hint) in (tuple, list, Sequence):
        parts = [part for part in get_args(hint) if part is not Ellipsis]
        count = f"{len(parts)} " if get_origin(hint) is tuple and Ellipsis not in get_args(hint) else ""
        return f"a list of {count}values, each {describe(parts[0], none)}"
    if hint in BASES:
        return BASES[hint][1]
    return "a mapping" if get_origin(hint) is dict or is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def shown(value: Any, longest: int = 80) -> str:
    """``repr`` of what was given, cut where it is long."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


#: plain types: what passes as one, and what it is called
BASES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
    float: (
        lambda value: isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value),
        "a finite number",
    ),
    str: (lambda value: isinstance(value, str), "text"),
    Path: (lambda value: isinstance(value, (str, os.PathLike)), "a path"),
}


def _with_rules(base: Any, words: list[str]) -> str:
    if base in (int, float):
        joined = " and ".join(word for word in words if word != ANY)
        return " ".join(filter(None, (BASES[base][1], "of" if joined.startswith("at ") else "", joined)))
    if base is str and words == [NotEmpty().words()]:
        return "text that is not empty"
    if base in (str, Path) and words:
        return " and ".join(words)
    return " and ".join([describe(base), *words])


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _refusal(name: str, value: Any, hint: Any, none: str) -> str | None:
    """What is wrong with ``value``, the setting's name first, or None."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, *rules = parts
        found = _refusal(name, value, base, none)
        if found is not None:
            plain = base in BASES
            return f"{name} must be {describe(hint, none)}, got {shown(value)}" if plain else found
        refusals = (rule.refusal(value) for rule in rules if hasattr(rule, "refusal"))
        return next((f"{name} {refused}" for refused in refusals if refused is not None), None)
    if origin is Literal:
        fits = any(value == allowed and type(value) is type(allowed) for allowed in parts)
        return None if fits else f"{name} must be {describe(hint, none)}, got {shown(value)}"
    if _is_union(hint):
        return _refusal_of_union(name, value, hint, none)
    if is_dataclass(hint):
        return _refusal_of_fields(name, value, hint, none)
    if origin in (tuple, list, Sequence):
        return _refusal_of_sequence(name, value, hint, none)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return f"{name} must be a mapping, got {shown(value)}"
        return _first(_refusal(f"{name}.{key}", item, parts[1], none) for key, item in value.items())
    if hint in BASES:
        passes, words = BASES[hint]
        return None if passes(value) else f"{name} must be {words}, got {shown(value)}"
    return None


def _refusal_of_union(name: str, value: Any, hint: Any, none: str) -> str | None:
    members = [part for part in get_args(hint) if part is not types.NoneType]
    if value is None and len(members) < len(get_args(hint)):
        return None
    refusals = [_refusal(name, value, part, none) for part in members]
    if None in refusals:
        return None
    if len(members) > 1 or value is None:
        return f"{name} must be {describe(hint, none)}, got {shown(value)}"
    return refusals[0]


def _refusal_of_fields(name: str, value: Any, hint: Any, none: str) -> str | None:
    given = vars(value) if isinstance(value, hint) else value
    if not isinstance(given, Mapping):
        return f"{name} must be a mapping, got {shown(value)}"
    if given is value and (wrong := _other_fields(given, hint)):
        return f"{name}: {wrong}"
    hints = field_hints(hint)
    return _first(_refusal(f"{name}.{key}", given[key], hints[key], none) for key in hints if key in given)


def _other_fields(given: Mapping[str, Any], kind: Any) -> str:
    """Which field of the dataclass ``kind`` is missing in ``given``, or is none of its own."""
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    missing = [f"field {name!r} is missing" for name in needed if name not in given]
    known = {f.name for f in fields(kind)}
    unknown = [f"unknown field {name!r}; a newer slabformer may have written it" for name in given if name not in known]
    return next(iter(missing + unknown), "")


def _refusal_of_sequence(name: str, value: Any, hint: Any, none: str) -> str | None:
    parts = get_args(hint)
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return f"{name} must be {describe(hint, none)}, got {shown(value)}"
    if get_origin(hint) is tuple and Ellipsis not in parts:
        if len(value) != len(parts):
            return f"{name} must be {describe(hint, none)}, got {len(value)} of them: {shown(value)}"
    else:
        parts = (parts[0],) * len(value)
    pairs = enumerate(zip(value, parts, strict=True))
    return _first(_refusal(f"{name}[{index}]", item, part, none) for index, (item, part) in pairs)


def _first(refusals: Any) -> str | None:
    return next((refused for refused in refusals if refused is not None), None)


def _resolved(hint: Any, names: Mapping[str, Any], setting: str) -> Any:
    """A type as it was written."""
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, dict(names))
    except NameError as error:
        raise NameError(f"{setting} cannot be checked: its annotation is {hint!r}, and {error} at run time") from error
