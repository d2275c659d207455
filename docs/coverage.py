"""Convert, randomise, fuse and verify a small model of every family: writes ``docs/coverage.md`` (``make coverage``).

Every finished model is kept in ``docs/coverage.json``, so that an interrupted run goes on where it stopped; models
that were done with other code or other versions are done again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import logging
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from coverage_subjects import Subject, keys, noise, subject_of
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slabformer.deployment.measure import num_threads, ratio, time_interleaved
from slabformer.deployment.variants import Compiled
from slabformer.nn import RepBN
from slabformer.nn.controls import prepbn_modules
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fuse import fuse
from slabformer.surgery.fuse.norms import find_norms
from slabformer.surgery.fuse.twin import first_line, tensors_of
from slabformer.surgery.verify import verify
from slabformer.tasks.engine.files import write_text
from slabformer.testing import randomize_norms_

ROOT = Path(__file__).parent.parent
PAGE, STATE = ROOT / "docs" / "coverage.md", ROOT / "docs" / "coverage.json"
#: DESIGN.md: fuse is judged in float64, relative to the output's RMS
FUSED = 1e-9
#: and an ill-conditioned model at this often what a rounding of its inputs costs
OWN_ERROR_ALLOWED, ROUNDING = 4, 1e-15
#: of a redrawn norm: whether one next to 0 bars a fold is a question of values, not of architectures
SMALLEST_GAIN = 0.25
#: how far the outputs for different inputs must be apart, relative to the same
VARIED = 1e-6
logger = logging.getLogger("coverage")


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Attributes:
        library: Of the model.
        family: Of the model.
        model: Its name.
        norms: How many it has, those it had as BatchNorm included.
        forward: Folded into what follows.
        backward: Folded into what precedes.
        kept: How many of each reason.
        max_rel: Largest difference in float64 over the output's RMS.
        seconds: Time to fuse.
        speed: Compiled, unfused over fused; None where it was not measured.
        error: What went wrong, if something did.
    """

    library: str
    family: str
    model: str
    norms: int = 0
    forward: int = 0
    backward: int = 0
    kept: tuple[tuple[str, int], ...] = ()
    max_rel: float = 0.0
    seconds: float = 0.0
    speed: float | None = None
    error: str = ""


def measure(subject: Subject, speed: bool = False) -> Row:
    """The row of one model; without norms in it where the family has none."""
    row = Row(subject.library, subject.family, subject.name)
    torch.manual_seed(0)
    model, args, kwargs = subject.build()
    cases = [_call(args, kwargs), _call(*_changed(args, kwargs))]
    if not convert(model, cases):
        return row
    start = time.perf_counter()
    fused, report = fuse(model, args, kwargs)
    seconds = time.perf_counter() - start
    result = verify(model, fused, cases, rtol=max(FUSED, OWN_ERROR_ALLOWED * own_error(model, args, kwargs)))
    need_varied(model, cases)
    count = Counter(outcome.action for outcome in report)
    kept = Counter(general(outcome.reason) for outcome in report if outcome.action == "kept")
    return replace(
        row,
        norms=len(report),
        forward=count["forward"],
        backward=count["backward"],
        kept=tuple(kept.most_common()),
        max_rel=result.max_rel,
        seconds=seconds,
        speed=_speed(model, fused, args) if speed and not kwargs else None,
    )


def convert(model: nn.Module, cases: list[Any]) -> bool:
    """Put random PRepBNs at gamma 0 into ``model``; false where it has neither their like nor heads and BatchNorm.

    Statistics fit the first of ``cases`` and ``eta`` is small: else the residual stream explodes with depth, and a
    difference of 1e-16 grows beyond what is allowed.
    """
    try:
        convert_norms_(model)
    except ValueError:
        has_heads = any(hasattr(module, "num_heads") or hasattr(module, "heads") for module in model.modules())
        if not (has_heads and find_norms(model)):
            return False
    randomize_norms_(model).eval().double()
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0)
        with torch.no_grad():
            norm.rep.eta.mul_(0.01)
            norm.rep.weight.clamp_(min=SMALLEST_GAIN)
    _fit_statistics(model, cases[0])
    return True


@torch.no_grad()
def _fit_statistics(model: nn.Module, case: Any) -> None:
    """Statistics of every norm near those of its input, one after the other in a single forward."""

    def fit(module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].movedim(module.channel_dim if isinstance(module, RepBN) else 1, 0).flatten(1)
        if x.shape[1] > 1:
            module.running_mean.copy_(x.mean(1))
            module.running_var.copy_(x.var(1) + 0.1 * x.var())  # no channel is all but erased, or blown up

    norms = [module for module in model.modules() if isinstance(module, (RepBN, _BatchNorm))]
    handles = [norm.register_forward_pre_hook(fit) for norm in norms if isinstance(norm.running_mean, Tensor)]
    try:
        run(model, case)
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, case: Any) -> Any:
    """Call ``model`` with one of its inputs."""
    return model(**case) if isinstance(case, dict) else model(*case)


def own_error(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """How far outputs move, relative to their RMS, when inputs are off by a rounding: what no equality can undercut."""
    near = _call(*_changed(args, kwargs, ROUNDING))
    with torch.no_grad():
        outputs = [tensors_of(run(model, case)) for case in (_call(args, kwargs), near)]
    pairs = [(one, two) for one, two in zip(*outputs, strict=True) if one.is_floating_point()]
    return max(float((one - two).abs().max() / one.square().mean().sqrt()) for one, two in pairs)


def need_varied(model: nn.Module, cases: list[Any]) -> None:
    """Refuse outputs that show nothing because they are constant."""
    with torch.no_grad():
        one, two = (_first(run(model, case)) for case in cases)
    if not float((one - two).abs().max()) > VARIED * float(one.square().mean().sqrt()):
        raise ValueError("the outputs hardly vary with the inputs, so their equality shows nothing")


def _first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    items = list(output.values()) if hasattr(output, "values") else list(output)
    return next(found for item in items if (found := item if isinstance(item, Tensor) else _first(item)) is not None)


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs or args


def _changed(
    args: tuple[Any, ...], kwargs: dict[str, Any], amount: float = 0.01
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Other values of the same shapes."""

    def other(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return value + amount * noise(*value.shape).flip(-1)
        return value if amount == ROUNDING else value.flip(-1)

    return tuple(other(value) for value in args), {name: other(value) for name, value in kwargs.items()}


def general(reason: str) -> str:
    """A reason without the number of the block that it is about."""
    return re.sub(r"\b(?!torch\.)(?:\w+\.)+(\w+)\b", r"*.\1", reason)


def _speed(model: nn.Module, fused: nn.Module, args: tuple[Any, ...]) -> float:
    inputs = tuple(value.float() for value in args)
    with num_threads(1), torch.inference_mode():
        calls = {name: Compiled(form.float(), torch.device("cpu")) for name, form in (("old", model), ("new", fused))}
        runs = {name: partial(form, *inputs) for name, form in calls.items()}
        turns = time_interleaved(runs, seconds=5, device=inputs[0].device)
    return ratio(turns["old"], turns["new"])


def code_version() -> str:
    """Changes when a row could come out differently."""
    digest = hashlib.sha256()
    rooms = [ROOT / "src" / "slabformer" / room for room in ("ops", "nn", "surgery")]
    for path in sorted([*(path for room in rooms for path in room.rglob("*.py")), *ROOT.glob("docs/coverage*.py")]):
        digest.update(path.read_bytes())
    versions = (importlib.metadata.version(name) for name in ("torch", "timm", "transformers", "torchvision"))
    return f"{digest.hexdigest()[:12]} {' '.join(versions)}"


# --- the page ------------------------------------------------------------------------------------------------------

HEAD = """# Coverage: what converts and folds

Generated by `make coverage` with {versions}.

One small model of every family with LayerNorm, RMSNorm, or BatchNorm in a transformer: converted, norms and constant
parameters redrawn, fused, and held against the unfused model in float64 on two inputs. *Difference* is the largest one
over the RMS of the outputs (at most 1e-9 is allowed, or 4 times what an ill-conditioned model makes of a change of its
inputs by 1e-15). Speed is compiled, one CPU thread, unfused over fused (LayerNorm gone in both); a dash is unmeasured.
Base models without a head end with a norm, which is their output. Statistics fit the input, skip weights are small and
gains at least 0.25: norms drawn without regard to each other make deep streams grow past what 1e-9 can judge.

{summary}

| library | family | model | norms | forward | backward | kept | difference | fusing | speed |
|---|---|---|---|---|---|---|---|---|---|
"""
WHY = """
## Every norm that is kept, and why

Module paths are cut to their last name. First the reason against folding forward, then, after the semicolon, backward.

| family | norms | reason |
|---|---|---|
"""


def page(rows: list[Row]) -> str:
    """The page ``docs/coverage.md``."""
    rows = [row for row in rows if row.norms or row.error]
    total, kept = sum(row.norms for row in rows), sum(_num_kept(row) for row in rows)
    whole = sum(not row.kept and not row.error for row in rows)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm", "transformers"))
    summary = (
        f"**{len(rows)} families, {total} norms: {total - kept} ({(total - kept) / max(total, 1):.1%}) folded, {kept} "
        f"kept; {whole} families lose all of them.**"
    )
    reasons = [f"| {row.library} {row.family} | {count} | {reason} |\n" for row in rows for reason, count in row.kept]
    return HEAD.format(versions=versions, summary=summary) + "".join(map(table_row, rows)) + WHY + "".join(reasons)


def table_row(row: Row) -> str:
    """One line of the table."""
    if row.error:
        return f"| {row.library} | {row.family} | {row.model} | {row.error} |||||||\n"
    speed = "-" if row.speed is None else f"{row.speed:.2f}"
    counts = f"{row.norms} | {row.forward} | {row.backward} | {_num_kept(row)}"
    figures = f"{row.max_rel:.0e} | {row.seconds:.1f} s | {speed}"
    return f"| {row.library} | {row.family} | {row.model} | {counts} | {figures} |\n"


def _num_kept(row: Row) -> int:
    return sum(count for _, count in row.kept)


# --- running -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="a regular expression of library/family: the others stay as they are"
    )
    parser.add_argument("--speed", default="^$", help="a regular expression of those whose speed is measured, slowly")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    state: dict[str, Any] = json.loads(STATE.read_text()) if STATE.is_file() else {}
    version = code_version()
    for key in track(keys(), "coverage"):
        done, speed = state.get(key, {}), bool(re.search(options.speed, key))
        fresh = done.get("version") == version and (not speed or done["row"]["speed"] is not None)
        if not fresh and re.search(options.only, key):
            state[key] = {"version": version, "row": asdict(attempt(subject_of(key), speed))}
            write_text(STATE, json.dumps(state, indent=1))
    write_text(PAGE, page([row_of(state[key]["row"]) for key in keys() if key in state]))


def attempt(subject: Subject, speed: bool) -> Row:
    """The row, or what went wrong in its place."""
    try:
        row = measure(subject, speed)
    except Exception as error:  # whatever it is, it belongs into the table
        row = Row(subject.library, subject.family, subject.name, error=first_line(error).replace("|", "/"))
    logger.info("%s", table_row(row).strip())
    return row


def row_of(data: dict[str, Any]) -> Row:
    """A row as it was before it became JSON."""
    return Row(**{**data, "kept": tuple((reason, count) for reason, count in data["kept"])})


if __name__ == "__main__":
    main()
