"""`slab audit`: what would fold and what would not, and with data what losing each norm costs, before any training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from slabformer._files import write_json
from slabformer.cli.audited import EXAMPLES, EXAMPLES_OF_DATA, build, trained
from slabformer.cli.common import add_weight_options
from slabformer.cli.fuse import fuse_table
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import FileToWrite, NonEmptyStr, PositiveFraction, PositiveInt

if TYPE_CHECKING:
    from torch import nn

    from slabformer.surgery.audit import AuditReport
    from slabformer.surgery.audit_attention import AttentionAudit


#: options that have no effect without data
OF_DATA = ("budget", "plan", "attention_budget", "attention_plan", "num_batches", "checkpoint", "pretrained")
CHOICES = {True: "[green]convert[/]", False: "[yellow]keep[/]"}


def parser() -> Parser:
    """Options of `slab audit`."""
    from slabformer._defaults import AUDIT_BATCHES

    made = Parser(
        "slab audit",
        "Convert a model's norms on a copy, follow each to its neighbours, and say which would fold and why the "
        "others would not; no weights are needed. With data, also measure what a trained model loses with "
        "each norm and each softmax attention, and plan which of them to convert.",
        [
            "slab audit convnext_atto",
            "slab audit mypackage.models:build --untie",
            "slab audit model.safetensors --data photos/ --budget 0.003 --plan plan.json",
        ],
        json_files=True,
    )
    made.add_argument(
        "model",
        type=NonEmptyStr,
        help="the name of a model in timm, a .safetensors file that slab wrote, a folder with a config.json of timm or "
        "transformers, or module:factory, which returns a model and a tuple of example inputs",
    )
    made.add_argument(
        "--data",
        type=NonEmptyStr | None,
        help="data for the model, without labels: for images a folder or a data set as in slab convert, for text a "
        "file, folder or pattern",
    )
    made.add_argument(
        "--budget",
        type=PositiveFraction | None,
        help="what converting may take from the cosine of the model's outputs, before training; by default the plan "
        "converts the norms that take at most 0.1 each",
    )
    made.add_argument("--plan", type=FileToWrite | None, help="file to write the plan to, as JSON")
    made.add_argument(
        "--attention-budget",
        type=PositiveFraction | None,
        help="the same for linear attention in place of softmax attention",
    )
    made.add_argument(
        "--attention-plan", type=FileToWrite | None, help="file to write the plan of attentions to, as JSON"
    )
    made.add_argument(
        "--num-batches", type=PositiveInt | None, help=f"batches of data to read; by default {AUDIT_BATCHES}"
    )
    add_weight_options(made)
    made.add_argument(
        "--batch-size",
        type=PositiveInt | None,
        help=f"examples per batch; by default {EXAMPLES}, with data {EXAMPLES_OF_DATA}",
    )
    made.add_argument("--fixed-size", action="store_true", help="fold for this input size only, as in slab fuse")
    made.add_argument("--untie", action="store_true", help="give shared layers separate copies, as in slab fuse")
    made.add_argument("--meta", action="store_true", help="allocate no weights, for models too large to build")
    made.add_argument("--time", type=bool, default=True, help="time the norms as they are, eager; not with --meta")
    return made


def run(config: Namespace) -> Outcome:
    """Build and audit."""
    import torch

    from slabformer.surgery.audit import audit, time_norms

    _check_options(config)
    attentions: AttentionAudit | None = None
    options: dict[str, Any] = {"fixed_size": config.fixed_size, "untie": config.untie}
    if config.data is None:
        with torch.device("meta") if config.meta else nullcontext():
            model, args, kwargs = build(config)
    else:
        subject = trained(config)
        model, batches = subject.model, subject.held_out
        args, kwargs = ((), batches[0]) if isinstance(batches[0], dict) else ((batches[0],), {})
        attentions = _attentions_of(model, batches, config)
        options |= {"batches": batches, "num_batches": len(batches), "budget": config.budget}
    report = audit(model, args, kwargs, **options)
    shown: list[RenderableType] = [fuse_table(report), report.summary().replace(" folded", " would fold", 1)]
    if report.plan is not None:
        shown += [cost_table(report), report.plan.summary()]
    if config.plan is not None and report.plan is not None:
        write_json(config.plan, report.plan.to_dict())
    found = report.to_dict()
    if attentions is not None:
        shown += [attention_table(attentions), attentions.summary()]
        found["attentions"] = attentions.to_dict()
        if config.attention_plan is not None:
            write_json(config.attention_plan, attentions.plan.to_dict())
    if config.time and not config.meta:
        taken = time_norms(model, args, kwargs)
        found["norm_seconds"], found["forward_seconds"] = taken.norms, taken.total
        shown.append(
            f"norms take about {taken.norms * 1e3:.1f} of {taken.total * 1e3:.1f} ms today ({taken.share:.0%}), eager, "
            f"{torch.get_num_threads()} threads"
        )
    files = [file for file in (config.plan, config.attention_plan) if file is not None]
    return Outcome(data=found, shown=shown, files=files)


def _attentions_of(model: nn.Module, batches: list[Any], config: Namespace) -> AttentionAudit | None:
    """The audit of the model's attentions; None where it has none that could be linear.

    Raises:
        ValueError: If options ask for one and there is none.
    """
    from slabformer.surgery.audit_attention import audit_attention
    from slabformer.surgery.convert_attention import no_attention
    from slabformer.surgery.recognise_attention import find_attentions

    found, left = find_attentions(model)
    if found:
        return audit_attention(model, batches, num_batches=len(batches), budget=config.attention_budget)
    if config.attention_budget is not None or config.attention_plan is not None:
        raise ValueError(no_attention(model, left))
    return None


def cost_table(report: AuditReport) -> Table:
    """What losing each norm costs, and what the plan does with it."""
    kept = set(report.plan.keep if report.plan else ())
    table = Table(title="what losing each norm costs, untrained")
    for heading in ("norm", "R2", "cosine lost alone", "plan", "most of the error in"):
        table.add_column(heading, justify="right" if heading in ("R2", "cosine lost alone") else "left")
    for cost in report.costs:
        choice = CHOICES[cost.name not in kept]
        table.add_row(escape(cost.name), f"{cost.r2:.3f}", f"{cost.alone:.2g}", choice, cost.where())
    return table


def attention_table(report: AttentionAudit) -> Table:
    """What linear attention in each place costs and saves, and what the plan does with it."""
    table = Table(title="what making each attention linear costs, untrained")
    for heading in ("attention", "error", "cosine lost alone", "multiply-adds saved", "plan"):
        table.add_column(heading, justify="left" if heading in ("attention", "plan") else "right")
    for cost in report.costs:
        saved = f"{cost.saved / 1e6:,.1f} of {cost.products / 1e6:,.1f} M"
        choice = CHOICES[cost.name not in report.plan.keep]
        table.add_row(escape(cost.name), f"{cost.error:.3f}", f"{cost.alone:.2g}", saved, choice)
    return table


def _check_options(config: Namespace) -> None:
    """Refuse what has no effect.

    Raises:
        ValueError: With the option, and what it needs.
    """
    lone = [name for name in OF_DATA if getattr(config, name)]
    if config.data is None and lone:
        raise ValueError(f"--{lone[0].replace('_', '-')} has no effect without data; give --data PATH too")
    if config.data is not None and config.meta:
        raise ValueError("--data needs the model's weights, which --meta does not allocate; give one of them")
