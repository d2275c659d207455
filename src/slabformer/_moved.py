"""Modules that have moved: their old names work for one release, with a deprecation warning.

To be removed with 0.3. Public names (``slabformer.fuse`` and its like) never move.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
    "deployment.integer_windows": ("quantize.integer_windows",),
    "deployment.measure": ("measure.timing",),
    "deployment.measurement": ("measure.rows",),
    "deployment.plots": ("figures.plots",),
    "deployment.quantize": ("quantize.openvino",),
    "deployment.report": ("bench.report",),
    "deployment.roofline": ("measure.roofline",),
    "deployment.signal_stack": ("quantize.signal_stack",),
    "deployment.static_detector": ("export.static_detector",),
    "deployment.variants": ("bench.ceiling", "deployment.compiled"),
    "deployment.zoo": ("bench.zoo",),
    "models.download": ("models.weights.download",),
    "models.hub": ("models.weights.hub",),
    "models.official": ("models.weights.official",),
    "models.pretrained": ("models.weights.pretrained",),
    "models.published": ("models.weights.published",),
    "nn.window_attention": ("nn.stripes",),
    "nn.windows": ("nn.shifted_windows",),
}


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
        warnings.warn(
            f"{module.__name__} has moved to {' and '.join(names)}; the old name goes with slabformer 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        module.__doc__ = f"Moved to {' and '.join(names)}."
        module.__getattr__ = _looking_in(module.__name__, names)  # type: ignore[method-assign]


def _looking_in(old: str, names: Sequence[str]) -> Any:
    def look_up(attribute: str) -> Any:
        for module in map(importlib.import_module, names):
            if hasattr(module, attribute):
                return getattr(module, attribute)
        raise AttributeError(f"{old} has moved to {' and '.join(names)}, which has no {attribute}")

    return look_up


def answer_to_old_names() -> None:
    """Let imports by old names succeed; called once, by `slabformer` itself."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
