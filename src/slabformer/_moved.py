"""Modules that have moved and words that have changed: the old ones work for one release, with a deprecation warning.

To be removed with 0.3. Public names (``slabformer.fuse`` and its like) never move.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: old name below `slabformer` -> the modules that now hold what it held
MOVED: dict[str, tuple[str, ...]] = {
    "deployment.allocator": ("measure.allocator",),
    "deployment.attention_maps": ("figures.attention_maps",),
    "deployment.attention_picture": ("figures.attention_picture",),
    "deployment.bench": ("bench.compare",),
    "deployment.comparison": ("figures.comparison",),
    "deployment.comparison_picture": ("figures.comparison_picture",),
    "deployment.cost": ("measure.cost",),
    "deployment.decode": ("bench.decoding",),
    "deployment.decode_report": ("bench.decoding_report",),
    "deployment.detections": ("measure.detections",),
    "deployment.detector_latency": ("bench.detector",),
    "deployment.detector_report": ("bench.detector_report",),
    "deployment.equality": ("measure.equality",),
    "deployment.export": ("export.model",),
    "deployment.export_decoder": ("export.decoder",),
    "deployment.export_detector": ("export.detector",),
    "deployment.flops": ("measure.flops",),
    "deployment.fuse_detector": ("deployment.detector",),
    "deployment.integer_attention": ("quantize.integer_attention",),
    "deployment.integer_form": ("quantize.integer_form",),
    "deployment.integer_windows": ("export.gathered_windows",),
    "deployment.measure": ("measure.timing",),
    "deployment.measurement": ("measure.rows",),
    "deployment.plots": ("figures.plots",),
    "deployment.quantize": ("quantize.openvino",),
    "deployment.report": ("bench.report",),
    "deployment.roofline": ("measure.roofline",),
    "deployment.signal_stack": ("export.signal_stack",),
    "deployment.static_detector": ("export.static_detector",),
    "deployment.variants": ("bench.ceiling", "deployment.compiled"),
    "deployment.zoo": ("bench.zoo",),
    "models.download": ("models.weights.download",),
    "models.hub": ("models.weights.hub",),
    "models.norms": ("nn.norms",),
    "models.official": ("models.weights.official",),
    "models.padding": ("nn.attention_masks",),
    "models.pretrained": ("models.weights.pretrained",),
    "models.published": ("models.weights.published",),
    "quantize.integer_windows": ("export.gathered_windows",),
    "quantize.signal_stack": ("export.signal_stack",),
    "tasks.detection.twin": ("tasks.detection.baseline",),
    "nn.window_attention": ("nn.stripes",),
    "nn.windows": ("nn.shifted_windows",),
    "tasks.engine.files": ("_files",),
}

#: what functions, arguments, attributes, columns, variants and files were called -> what they are called now
RENAMED: dict[str, str] = {
    "twin": "baseline",
    "twin_predictions": "baseline_predictions",
    "over_twin": "over_baseline",
    "train_twin": "train_baseline",
    "twin_config": "baseline_config",
    "LayerNorm twin": "LayerNorm baseline",
    "against=twin": "against=baseline",
    "twin.safetensors": "baseline.safetensors",
}


def current_name(name: str) -> str:
    """``name`` as it is spelled now; an old one is warned about."""
    if name not in RENAMED:
        return name
    _warn(f"{name!r} is now called {RENAMED[name]!r}; the old name goes with slabformer 0.3", stacklevel=3)
    return RENAMED[name]


def current_rows(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Rows of a file that an older version wrote, columns and values as they are spelled now."""
    return [{RENAMED.get(key, key): RENAMED.get(value, value) for key, value in row.items()} for row in rows]


def takes_old_names(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function`` take arguments by their old names too."""

    @functools.wraps(function)
    def taking(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **{current_name(name): value for name, value in kwargs.items()})  # type: ignore[arg-type]

    return taking


class HasOldNames:
    """Base of classes whose attributes were called otherwise."""

    def __getattr__(self, name: str) -> Any:
        if name not in RENAMED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return getattr(self, current_name(name))


class OldNames(MetaPathFinder, Loader):
    """Finds a module under its old name where nothing else does; what it holds is the new module's."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A specification of the old name, or None."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "slabformer" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill ``module``: every attribute is looked up where it now stands."""
        names = [f"slabformer.{name}" for name in MOVED[module.__name__.partition(".")[2]]]
        _warn(f"{module.__name__} has moved to {' and '.join(names)}; the old name goes with slabformer 0.3")
        module.__doc__ = f"Moved to {' and '.join(names)}."
        module.__getattr__ = _looking_in(module.__name__, names)  # type: ignore[method-assign]


def _looking_in(old: str, names: Sequence[str]) -> Any:
    def look_up(attribute: str) -> Any:
        now = RENAMED.get(attribute, attribute)
        for module in map(importlib.import_module, names):
            if hasattr(module, now):
                return getattr(module, now)
        raise AttributeError(f"{old} has moved to {' and '.join(names)}, which has no {attribute}")

    return look_up


def _warn(message: str, stacklevel: int = 2) -> None:
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def answer_to_old_names() -> None:
    """Let imports by old names succeed; called once, by `slabformer` itself."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
