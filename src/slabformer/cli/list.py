"""`slab list`: models, what was published about them, and what they cost."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.cli.suggest import did_you_mean
from slabformer.settings import NonEmptyStr

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model."""

    model: str
    """Name in timm, once slabformer is imported."""
    family: str
    """Of models, by the file that holds them."""
    published: str | None = None
    """Name in the publication."""
    top1: float | None = None
    """Published ImageNet-1K accuracy in percent."""
    parameters: int
    """In training form; of a published model as published, with what its file holds and nothing reads."""
    deployed_parameters: int | None = None
    """With every norm folded; None unless asked for."""
    macs: int | None = None
    """Multiply-adds of one image in training form; None unless asked for."""
    deployed_macs: int | None = None
    """The same with every norm folded."""
    attention: str
    """One letter a stage: S softmax, L linear."""
    fade: float | None = None
    """Share of training over which LayerNorm fades out in the published recipe."""
    weights: str | None = None
    """Where the released weights are."""
    baseline: str | None = None
    """The LayerNorm and softmax model that it replaces."""


def parser() -> Parser:
    """Options of `slab list`."""
    made = Parser(
        "slab list",
        "Models, published accuracies and released weights.",
        ["slab list swin", "slab list 'slab_*' --weights --macs"],
    )
    made.add_argument(
        "pattern", type=NonEmptyStr, nargs="?", default="*", help="e.g. 'slab_*'; part of a name is enough"
    )
    made.add_argument("--family", type=NonEmptyStr | None, help="of these models only: deit, swin ...")
    made.add_argument("--attention", type=NonEmptyStr | None, help="with this plan only, e.g. LLSS or 'L*'")
    made.add_argument("--weights", action="store_true", help="with released weights only")
    made.add_argument(
        "--macs", action="store_true", help="also count multiply-adds, and what is left when norms are folded (slower)"
    )
    return made


def run(config: Namespace) -> Outcome:
    """The models that match.

    Raises:
        ValueError: If none does.
    """
    rows = models(chosen(config.pattern))
    found = [row for row in rows if _wanted(row, config)]
    if not found:
        families = ", ".join(sorted({row.family for row in rows}))
        raise ValueError(f"no model passes these filters; {config.pattern!r} are of {families}; `slab list` shows all")
    if config.macs:
        with Console(stderr=True).status("counting") as status:
            found = [with_cost(row, status.update) for row in found]
    return Outcome(data=found, shown=[table(found, costs=config.macs)])


def registered() -> list[str]:
    """Names of all models of this package: the published ones first, in the publication's order."""
    from slabformer._extras import require
    from slabformer.models.weights.published import BY_MODEL

    timm = require("timm", extra="vision")
    ours = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("slabformer.")]
    return [*(name for name in BY_MODEL if name in ours), *(name for name in ours if name not in BY_MODEL)]


def chosen(pattern: str) -> list[str]:
    """The models whose name, here or in the publication, matches ``pattern``; part of a name is enough.

    Raises:
        ValueError: If none does; names the nearest.
    """
    known = registered()
    wide = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = [name for name in known if any(fnmatch.fnmatch(spelling, wide) for spelling in _names(name))]
    if not found:
        raise ValueError(f"no model matches {pattern!r}{did_you_mean(pattern, known) or ';'} `slab list` shows all")
    return found


def models(names: Sequence[str]) -> list[Row]:
    """A row for each of ``names``, costs left out."""
    return [_row(name) for name in names]


def with_cost(row: Row, progress: Callable[[str], None] = lambda _: None) -> Row:
    """``row`` with its multiply-adds and what is left when norms are folded."""
    import torch

    from slabformer.measure.cost import cost_of

    progress(f"counting {row.model}")
    model = _without_memory(row.model)
    cost = cost_of(model, torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    return replace(row, deployed_parameters=cost.deployed_parameters, macs=cost.macs, deployed_macs=cost.deployed_macs)


def table(rows: Sequence[Row], costs: bool) -> Table:
    """For a terminal; ``costs`` adds the columns that :func:`with_cost` fills."""
    caption = "attention by stage: S softmax, L linear; fade: share of training until LayerNorm is gone"
    made = Table(title="models", caption=f"{caption}{'; folded norms take part in no multiply-add' * costs}")
    columns = columns_of(costs)
    for heading, (_, is_number) in columns.items():
        made.add_column(heading, justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(text(row) for text, _ in columns.values()))
    return made


def columns_of(costs: bool) -> dict[str, tuple[Callable[[Row], str], bool]]:
    """Heading -> (its text in a row, whether that is a number)."""
    counted: dict[str, tuple[Callable[[Row], str], bool]] = {
        "deployed": (lambda row: _millions(row.deployed_parameters), True),
        "MACs": (lambda row: "-" if row.macs is None else f"{row.macs / 1e9:.2f} G", True),
    }
    return {
        "model": (lambda row: row.model, False),
        "published as": (lambda row: row.published or "-", False),
        "attention": (lambda row: row.attention, False),
        "top-1 %": (lambda row: "-" if row.top1 is None else f"{row.top1:.1f}", True),
        "params": (lambda row: _millions(row.parameters), True),
        **(counted if costs else {}),
        "fade": (lambda row: "-" if row.fade is None else f"{row.fade:.2f}", True),
        "weights": (lambda row: "released" if row.weights else "-", False),
        "LayerNorm baseline": (lambda row: row.baseline or "-", False),
    }


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f} M"


def _names(model: str) -> tuple[str, ...]:
    from slabformer.models.weights.published import BY_MODEL

    return (model, BY_MODEL[model].config) if model in BY_MODEL else (model,)


def _wanted(row: Row, config: Namespace) -> bool:
    return (
        config.family in (None, row.family)
        and fnmatch.fnmatch(row.attention, (config.attention or "*").upper())
        and (row.weights is not None or not config.weights)
    )


def _row(model: str) -> Row:
    from slabformer._extras import require
    from slabformer.measure.timing import count_parameters
    from slabformer.models.registry import baseline_of
    from slabformer.models.weights.published import BY_MODEL

    published = BY_MODEL.get(model)
    family = require("timm", extra="vision").model_entrypoint(model).__module__.rpartition(".")[2]
    if published is None:
        built = _without_memory(model)
        return Row(
            model=model,
            family=family,
            parameters=count_parameters(built),
            attention=_attention(built),
            baseline=baseline_of(model),
        )
    return Row(
        model=model,
        family=family,
        published=published.config,
        top1=published.top1,
        parameters=published.num_params or count_parameters(_without_memory(model)),
        attention=published.attention,
        fade=published.fade,
        weights=published.url,
        baseline=baseline_of(model),
    )


def _attention(model: nn.Module) -> str:
    """The plan of a model with stages; of a plain one, what its attentions are."""
    from slabformer.nn.attention import SimplifiedLinearAttention

    linear = any(isinstance(module, SimplifiedLinearAttention) for module in model.modules())
    return str(getattr(model, "attention", "L" if linear else "S"))


def _without_memory(model: str) -> Any:
    import torch

    from slabformer.tasks.saved_model import create_model

    with torch.device("meta"):
        return create_model(model)
