"""The table of torch modules that stay modules: one row a kind, and the cell of :mod:`slabformer.mindspore.cells`.

All other modules are written operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from slabformer.nn.affine import Affine
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.repbn import RepBN
from slabformer.nn.token_batch_norm import TokenBatchNorm


@dataclass(frozen=True)
class Cell:
    """A cell as source: ``name(arguments)``.

    Attributes:
        name: Of its constructor.
        arguments: Its positional arguments, in order.
        settings: Its keyword arguments.
        varies: Settings that may differ between blocks that share a class, such as the rate of stochastic depth.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    settings: Mapping[str, Any] | None = None
    varies: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Leaf:
    """One row.

    Attributes:
        matches: Whether a module is of this kind.
        cell: What it becomes; None for a module whose settings have no counterpart.
        keeps_shape: Whether its output has the shape of its input.
    """

    matches: Callable[[nn.Module], bool]
    cell: Callable[[Any], Cell | None]
    keeps_shape: bool = True


def _exactly(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: type(module) in kinds


def _linear(module: nn.Linear) -> Cell:
    return Cell("cells.Linear", (module.in_features, module.out_features), _unless(True, bias=module.bias is not None))


def _conv(module: nn.Conv2d) -> Cell | None:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    settings = {
        **_unless((1, 1), stride=tuple(module.stride)),
        **_unless((0, 0), padding=tuple(module.padding)),
        **_unless((1, 1), dilation=tuple(module.dilation)),
        **_unless(1, groups=module.groups),
        **_unless(True, bias=module.bias is not None),
    }
    return Cell("cells.Conv2d", (module.in_channels, module.out_channels, tuple(module.kernel_size)), settings)


def _is_layer_norm(module: nn.Module) -> bool:
    """torch's and timm's, whose forward is torch's."""
    return isinstance(module, nn.LayerNorm) and type(module).__name__ == "LayerNorm"


def _layer_norm(module: nn.LayerNorm) -> Cell | None:
    if len(module.normalized_shape) != 1 or module.weight is None:
        return None
    settings = {"eps": module.eps, **_unless(True, bias=module.bias is not None)}
    return Cell("cells.LayerNorm", tuple(module.normalized_shape), settings)


def _rms_norm(module: nn.RMSNorm) -> Cell | None:
    if len(module.normalized_shape) != 1 or module.weight is None or module.eps is None:
        return None
    return Cell("cells.RMSNorm", tuple(module.normalized_shape), {"eps": module.eps})


def _batch_norm(module: Any) -> Cell | None:
    if not (module.affine and module.track_running_stats) or module.momentum is None:
        return None
    return Cell(
        "cells.BatchNorm", (module.num_features,), {"eps": module.eps, **_unless(0.1, momentum=module.momentum)}
    )


def _repbn(module: RepBN) -> Cell | None:
    if module.momentum is None:
        return None
    kind = "TokenBatchNorm" if isinstance(module, TokenBatchNorm) else "RepBN"
    return Cell(f"cells.{kind}", module.normalized_shape, _norm_settings(module))


def _norm_settings(module: RepBN) -> dict[str, Any]:
    return {
        "eps": module.eps,
        **_unless(0.1, momentum=module.momentum),
        **_unless(-1, channel_dim=module.channel_dim),
    }


def _prepbn(module: PRepBN) -> Cell | None:
    norm, rep = leaf_of(module.norm), module.rep
    if norm is None or rep.momentum is None:
        return None
    own = _norm_settings(rep)
    settings = {"bn_eps": own.pop("eps"), **own}
    if type(module.norm) is nn.LayerNorm and module.norm.bias is not None:
        return Cell("cells.PRepBN", rep.normalized_shape, {"eps": module.norm.eps, **settings})
    return Cell("cells.PRepBN", rep.normalized_shape, {"norm": norm, **settings})


def _affine(module: Affine) -> Cell | None:
    if module.then is not None:
        return None
    return Cell("cells.Affine", module.normalized_shape, _unless(-1, channel_dim=module.channel_dim))


def _dropout(module: Any) -> Cell | None:
    if not module.p:
        return None
    return Cell("cells.Dropout", (), {"p": module.p}, frozenset({"p"}))


def _is_drop_path(module: nn.Module) -> bool:
    """Stochastic depth of timm, and of everybody who copied it."""
    return type(module).__name__ == "DropPath" and hasattr(module, "drop_prob") and not list(module.parameters())


def _drop_path(module: Any) -> Cell | None:
    if not module.drop_prob:
        return None
    settings = {"p": float(module.drop_prob), **_unless(True, scale_by_keep=getattr(module, "scale_by_keep", True))}
    return Cell("cells.DropPath", (), settings, frozenset({"p"}))


def _unless(default: Any, **given: Any) -> dict[str, Any]:
    """A setting, if it is not the cell's default."""
    return {name: value for name, value in given.items() if value != default}


#: every kind of module that becomes a cell of its own
LEAVES: list[Leaf] = [
    Leaf(_exactly(nn.Linear), _linear, keeps_shape=False),
    Leaf(_exactly(nn.Conv2d), _conv, keeps_shape=False),
    Leaf(_is_layer_norm, _layer_norm),
    Leaf(_exactly(nn.RMSNorm), _rms_norm),
    Leaf(_exactly(nn.BatchNorm1d, nn.BatchNorm2d), _batch_norm),
    Leaf(_exactly(RepBN, TokenBatchNorm), _repbn),
    Leaf(_exactly(PRepBN), _prepbn),
    Leaf(_exactly(Affine), _affine),
    Leaf(_exactly(nn.Dropout), _dropout),
    Leaf(_is_drop_path, _drop_path),
]


def row_of(module: nn.Module) -> Leaf | None:
    """The row of a module that becomes a cell."""
    found = next((row for row in LEAVES if row.matches(module)), None)
    return found if found is not None and found.cell(module) is not None else None


def leaf_of(module: nn.Module) -> Cell | None:
    """The cell that ``module`` becomes; None where it is written operation by operation."""
    row = row_of(module)
    return None if row is None else row.cell(module)
