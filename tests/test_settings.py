"""Ranges of settings: what each rule refuses and in which words, and that no setting comes without one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

import slabformer as sf
from slabformer import settings
from slabformer.cli.main import GROUPS, VERBS
from slabformer.cli.options import type_of
from slabformer.models.cswin import CSWin
from slabformer.models.deit import DeiT, SlabDeiT
from slabformer.models.detection.config import DetectorConfig
from slabformer.models.llama import SlabLlamaConfig
from slabformer.models.pvt import PVT
from slabformer.models.pvt_v2 import PVTv2
from slabformer.models.pyramid import PyramidTransformer
from slabformer.models.swin import Swin
from slabformer.settings import (
    ClassNames,
    FolderToWrite,
    Fraction,
    ModelToWrite,
    NonEmptyStr,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    Settings,
    ShareOrCount,
    check,
    checked,
    describe,
    field_hints,
    has_rule,
    nested_hints,
)
from slabformer.tasks.classification.config import TrainConfig
from slabformer.tasks.conversion import Conversion
from slabformer.tasks.detection.config import TrainConfig as DetectionConfig
from slabformer.tasks.detection.saved import DetectorInfo
from slabformer.tasks.language.config import TrainConfig as LanguageConfig
from slabformer.tasks.saved_model import ModelInfo


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (PositiveInt, 0, "it must be at least 1, got 0"),
        (PositiveInt, True, "it must be a whole number of at least 1, got True"),
        (PositiveInt, 1.5, "it must be a whole number of at least 1, got 1.5"),
        (PositiveInt, 2**31, "it must be at most 2147483647, got 2147483648"),
        (Seed, 2**63, "it must be below 9223372036854775808, got 9223372036854775808"),
        (PositiveFloat, float("nan"), "it must be a finite number above 0, got nan"),
        (PositiveFloat, float("inf"), "it must be a finite number above 0, got inf"),
        (PositiveFloat, "1", "it must be a finite number above 0, got '1'"),
        (PositiveFloat | None, -1.0, "it must be above 0, got -1.0"),
        (Fraction, 3, "it must be in [0, 1], got 3"),
        (ShareOrCount, 1.5, "it must be a share in [0, 1), or a whole count from 1 on, got 1.5"),
        (NonEmptyStr, " ", "it must not be empty, got ' '"),
        (NonEmptyStr, 7, "it must be text that is not empty, got 7"),
        (NonEmptyStr, None, "it must be text that is not empty, got None"),
        (Literal["a", "b"] | None, "c", "it must be 'a' or 'b', got 'c'"),
        (Literal[1, 2], True, "it must be 1 or 2, got True"),
        (bool, 1, "it must be true or false, got 1"),
        (tuple[PositiveFloat, PositiveFloat], (1.0,), "each a finite number above 0, got 1 of them: (1.0,)"),
        (tuple[PositiveFloat, PositiveFloat], (1.0, 0.0), "it[1] must be above 0, got 0.0"),
        (list[PositiveInt], 3, "it must be a list of values, each a whole number of at least 1, got 3"),
        (ClassNames, ["cat", "cat"], "it must be different names, one for each class, got ['cat', 'cat']"),
        (ClassNames, ["cat", None], "it[1] must be text that is not empty, got None"),
        (dict[str, PositiveInt], {"a": 0}, "it.a must be at least 1, got 0"),
    ],
)
def test_what_is_out_of_range_is_told_in_one_line(hint: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        check("it", value, hint)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (PositiveInt, 1),
        (PositiveFloat, 1),
        (PositiveFloat | None, None),
        (Fraction, 1.0),
        (ShareOrCount, 12),
        (Any, {}),
    ],
)
def test_what_is_in_range_passes(hint: Any, value: Any) -> None:
    check("it", value, hint)


def test_a_nested_field_is_called_by_its_dotted_name() -> None:
    with pytest.raises(ValueError, match=r"^optimizer\.clip_norm must be above 0, got -1\.0$"):
        check("optimizer", {"clip_norm": -1.0}, nested_dataclass(TrainConfig, "optimizer"))


def nested_dataclass(kind: type, name: str) -> Any:
    return field_hints(kind)[name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: TrainConfig(output=""), "output must not be empty"),
        (lambda: TrainConfig(epochs=10**9), r"epochs must be in \[1, 100000\]"),
        (lambda: nested_dataclass(TrainConfig, "augment")(label_smoothing=3), "label_smoothing must be at least 0"),
        (lambda: nested_dataclass(TrainConfig, "augment")(mixup=-0.1), "mixup must be at least 0"),
        (lambda: nested_dataclass(TrainConfig, "ema")(decay=2), "decay must be at least 0 and below 1, got 2"),
        (lambda: nested_dataclass(TrainConfig, "optimizer")(lr_base_batch=0), "lr_base_batch must be at least 1"),
        (lambda: nested_dataclass(TrainConfig, "recalibrate")(batches=0), "batches must be at least 1"),
        (lambda: nested_dataclass(TrainConfig, "data")(std=(1.0, 0.0, 1.0)), r"std\[1\] must be above 0"),
        (lambda: nested_dataclass(TrainConfig, "data")(mean=(0.5,)), "mean must be a list of 3 values"),
        (lambda: nested_dataclass(LanguageConfig, "model")(hidden_size=0), "hidden_size must be at least 1"),
        (lambda: DetectorConfig(nms_iou=1.5), r"nms_iou must be in \[0, 1\]"),
        (lambda: DetectorConfig(anchor_ratios=()), "anchor_ratios must not be empty"),
        (lambda: ModelInfo(**{"model": 7, "class_names": []}), "model must be text that is not empty, got 7"),
        (lambda: ModelInfo(**{"model": "a", "class_names": None}), "class_names must be a list"),
    ],
)
def test_recipes_and_headers_refuse_nonsense_when_they_are_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_field_of_a_subclass_replaces_the_range_of_its_base() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Base(Settings):
        count: PositiveInt = 1

    @dataclasses.dataclass(kw_only=True)
    class Wider(Base):
        count: Annotated[int, Range(ge=0)] = 1

    assert Wider(count=0).count == 0
    with pytest.raises(ValueError, match="count must be at least 1"):
        Base(count=0)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (PositiveFloat | None, "a finite number above 0 or null"),
        (Fraction, "a finite number in [0, 1]"),
        (Seed, "a whole number of at least 0"),
        (settings.Number, "a finite number"),
        (ModelToWrite, "a .safetensors file"),
        (settings.FigureToWrite, "a .png, .svg or .pdf file"),
    ],
)
def test_ranges_are_described(hint: Any, words: str) -> None:
    assert describe(hint) == words


def test_outputs_are_held_against_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check("--output", tmp_path / "new.safetensors", ModelToWrite)
    check("--output", tmp_path / "new" / "deeper", FolderToWrite)
    for path, hint, message in (
        (tmp_path / "f.txt", ModelToWrite, "must be a .safetensors file"),
        (tmp_path, ModelToWrite, "must be a .safetensors file, got the folder"),
        (tmp_path / "none" / "f.safetensors", ModelToWrite, "create it first"),
        (tmp_path / "file" / "deeper", FolderToWrite, "is a file"),
        (tmp_path / "none", settings.ExistingFile, "no such file or folder"),
        (tmp_path, settings.ExistingFile, "got the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            check("--output", path, hint)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for path, hint, message in (
        (tmp_path / "f.safetensors", ModelToWrite, "no permission to write into"),
        (tmp_path / "new", FolderToWrite, "no permission to write into"),
        (tmp_path / "file", settings.ExistingFile, "no permission to read"),
    ):
        with pytest.raises(ValueError, match=message):
            check("--output", path, hint)


def test_checked_functions_refuse_before_they_run() -> None:
    ran = []

    @checked
    def work(count: PositiveInt, *, share: Fraction = 0.5, name: str = "") -> int:
        ran.append(count)
        return count

    assert work(2, share=1) == 2
    with pytest.raises(ValueError, match=r"^share must be in \[0, 1\], got nan$|share must be a finite number"):
        work(2, share=float("nan"))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        work(count=0)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        work()  # type: ignore[call-arg]
    assert ran == [2]
    assert list(inspect.signature(work).parameters) == ["count", "share", "name"]


def parsers() -> Iterator[tuple[str, Any]]:
    verbs = {verb: module for verb, (module, _) in VERBS.items()}
    for group, (package, _) in GROUPS.items():
        verbs |= {f"{group} {verb}": module for verb, (module, _) in importlib.import_module(package).VERBS.items()}
    for verb, module in verbs.items():
        yield verb, importlib.import_module(module).parser()


#: free text: an empty prompt is one
FREE = {("lm generate", "prompt")}


def test_no_option_comes_without_a_range() -> None:
    bare = [
        f"{verb}: {action.dest}"
        for verb, parser in parsers()
        for action in parser._actions
        if type_of(action) is not None and not has_rule(type_of(action)) and (verb, action.dest) not in FREE
    ]
    assert bare == []


@pytest.mark.parametrize("kind", [TrainConfig, DetectionConfig, LanguageConfig], ids=["classifier", "detector", "lm"])
def test_no_field_of_a_recipe_comes_without_a_range(kind: type) -> None:
    hints = nested_hints(kind)
    assert len(hints) > 40
    assert [name for name, hint in hints.items() if not has_rule(hint)] == []


@pytest.mark.parametrize("kind", [ModelInfo, DetectorInfo, Conversion])
def test_no_field_of_a_header_comes_without_a_range(kind: type) -> None:
    ruled = {name: hint for name, hint in nested_hints(kind).items() if name != "KEY"}
    assert [name for name, hint in ruled.items() if not has_rule(hint) and get_origin(hint) is not list] == []


def numeric(hint: Any) -> bool:
    """Whether a type holds a number without a rule."""
    if get_origin(hint) in (Annotated, Literal, Callable):
        return False
    return hint in (int, float) or any(numeric(part) for part in get_args(hint))


#: read on every call of a forward, which checks nothing that is not needed
HOT = {("linear_attention", "eps")}
#: what functions return or raise
RESULTS = {"FuseReport", "NormOutcome", "VerifyResult", "VerificationError"}


def public_callables() -> Iterator[tuple[str, Any]]:
    for module in (sf, sf.ops, sf.testing):
        for name in getattr(module, "__all__", ["randomize_norms_"]):
            value = getattr(module, name)
            if callable(value) and name not in RESULTS:
                yield name, value.__init__ if inspect.isclass(value) else value


def model_constructors() -> Iterator[tuple[str, Any]]:
    for kind in (DeiT, SlabDeiT, Swin, PVT, PVTv2, CSWin, PyramidTransformer):
        yield kind.__name__, kind.__init__


@pytest.mark.parametrize("callables", [public_callables, model_constructors])
def test_no_number_of_the_public_api_comes_without_a_range(
    callables: Callable[[], Iterator[tuple[str, Any]]],
) -> None:
    bare = []
    for name, function in callables():
        plain = inspect.unwrap(function)
        for parameter in inspect.signature(plain).parameters.values():
            try:
                hint = settings._resolved(parameter.annotation, plain.__globals__, name)
            except NameError:  # of what is imported for type checkers alone: no number
                continue
            if numeric(hint) and (name, parameter.name) not in HOT:
                bare.append(f"{name}({parameter.name}: {parameter.annotation})")
    assert bare == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeiT(embed_dim=0), r"^embed_dim must be at least 1, got 0$"),
        (lambda: DeiT(num_heads=5), r"^num_heads must divide embed_dim \(768\), got 5$"),
        (lambda: DeiT(drop_path_rate=-1), r"^drop_path_rate must be at least 0 and below 1, got -1$"),
        (lambda: SlabDeiT(depth=-2), r"^depth must be at least 1, got -2$"),
        (lambda: SlabDeiT(img_size=8), r"^img_size must be at least patch_size \(16\), got 8$"),
        (lambda: Swin(depths=(2, -2, 6, 2)), r"^depths\[1\] must be at least 1, got -2$"),
        (lambda: Swin(window_size=0), r"^window_size must be .* got 0$"),
        (lambda: Swin(num_heads=(3, 5, 12, 24)), r"^num_heads\[1\] must divide the 192 channels of its stage, got 5$"),
        (lambda: PVT(embed_dims=(64, 0, 320, 512)), r"^embed_dims\[1\] must be at least 1, got 0$"),
        (lambda: PVT(sr_ratios=(0, 4, 2, 1)), r"^sr_ratios\[0\] must be at least 1, got 0$"),
        (lambda: PVTv2(num_classes=-1), r"^num_classes must be at least 0, got -1$"),
        (lambda: CSWin(stripe_widths=(1, 0, 7, None)), r"^stripe_widths\[1\] must be at least 1, got 0$"),
        (lambda: CSWin(drop_rate=2), r"^drop_rate must be at least 0 and below 1, got 2$"),
        (lambda: SlabLlamaConfig(hidden_size=0), r"^hidden_size must be at least 1, got 0$"),
        (lambda: SlabLlamaConfig(num_attention_heads=0), r"^num_attention_heads must be at least 1, got 0$"),
        (
            lambda: SlabLlamaConfig(num_attention_heads=5),
            r"^num_attention_heads must divide hidden_size \(4096\), got 5$",
        ),
        (lambda: SlabLlamaConfig(num_key_value_heads=5), r"^num_key_value_heads must divide num_attention_heads"),
        (lambda: SlabLlamaConfig(bn_momentum=2.0), r"^bn_momentum must be above 0 and at most 1, got 2\.0$"),
        (lambda: SlabLlamaConfig(norm="groupnorm"), r"^norm must be one of prepbn, .*, dyt, folded, got 'groupnorm'"),
    ],
)
def test_sizes_of_models_are_told_when_one_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@dataclasses.dataclass(kw_only=True)
class OfTypeCheckers(settings.Settings):
    """Of a name that a type checker alone sees."""

    count: OnlyInStubs = 1  # type: ignore[name-defined]  # noqa: F821


def test_a_rule_that_cannot_be_read_is_no_rule_that_is_dropped() -> None:
    with pytest.raises(NameError, match=r"OfTypeCheckers.count cannot be checked: its annotation is 'OnlyInStubs'"):
        OfTypeCheckers(count=-1)

    @settings.checked
    def draw(count: OnlyInStubs) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(NameError, match=r"draw\(count\) cannot be checked"):
        draw(-1)


def test_a_default_is_checked_where_it_depends_on_the_disk() -> None:
    assert settings.asks_the_disk(settings.FigureToWrite | None)
    assert not settings.asks_the_disk(Annotated[str, settings.Known("a name", set)])
