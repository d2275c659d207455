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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from coverage_page import Kept, Row, general, page, table_row
from coverage_places import pre_norms
from coverage_speed import speed_of
from coverage_subjects import Subject, keys, noise, subject_of
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slabformer._files import write_text
from slabformer.nn import RepBN
from slabformer.nn.controls import prepbn_modules
from slabformer.surgery.convert import convert_norms_
from slabformer.surgery.fuse import NormOutcome, fuse
from slabformer.surgery.fuse.tree.norms import find_norms
from slabformer.surgery.outputs import first_line, tensors_of
from slabformer.surgery.verify import verify
from slabformer.testing import randomize_norms_

ROOT = Path(__file__).parent.parent.parent
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


def measure(subject: Subject, speed_limit: int = 0) -> Row:
    """The row of one model; without norms in it where the family has none.

    Args:
        subject: The model.
        speed_limit: Give up measuring its speed after so many seconds; 0 does not measure it.
    """
    row = Row(subject.library, subject.family, subject.name)
    torch.manual_seed(0)
    model, args, kwargs = subject.build()
    inputs = [(args, kwargs), _changed(args, kwargs)]
    cases = [_call(*given) for given in inputs]
    if not convert(model, cases):
        return row
    start = time.perf_counter()
    fused, report = fuse(model, args, kwargs)
    seconds = time.perf_counter() - start
    allowed = max(FUSED, *(OWN_ERROR_ALLOWED * own_error(model, *given) for given in inputs))
    result = verify(model, fused, cases, rtol=allowed)
    need_varied(model, cases)
    count, early = Counter(outcome.action for outcome in report), pre_norms(model, args, kwargs)
    row = replace(
        row,
        norms=len(report),
        forward=count["forward"],
        backward=count["backward"],
        pre_norms=len(early),
        kept=tuple(grouped([outcome for outcome in report if outcome.action == "kept"], early)),
        max_rel=result.max_rel,
        seconds=seconds,
    )
    if not speed_limit:
        return row
    speed = speed_of(subject.build()[0], fused, args, speed_limit)
    return replace(row, speed=speed, gave_up=speed_limit if speed is None else 0)


def grouped(outcomes: list[NormOutcome], early: set[str]) -> Iterator[Kept]:
    """Outcomes with the same reason, most of them first."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.name in early, general(outcome.reason)), []).append(outcome.name)
    for (is_early, reason), names in sorted(groups.items(), key=lambda group: -len(group[1])):
        last = dict.fromkeys(general(name) for name in names)
        yield Kept(", ".join(last), len(names), is_early, reason)


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


def code_version() -> str:
    """Changes when a row could come out differently."""
    digest = hashlib.sha256()
    rooms = [ROOT / "src" / "slabformer" / room for room in ("ops", "nn", "surgery")]
    for path in sorted(
        [*(path for room in rooms for path in room.rglob("*.py")), *Path(__file__).parent.glob("coverage*.py")]
    ):
        digest.update(path.read_bytes())
    versions = (importlib.metadata.version(name) for name in ("torch", "timm", "transformers", "torchvision"))
    return f"{digest.hexdigest()[:12]} {' '.join(versions)}"


# --- running -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="a regular expression of library/family: the others stay as they are"
    )
    parser.add_argument("--speed", default="^$", help="a regular expression of those whose speed is measured, slowly")
    parser.add_argument("--speed-limit", type=int, default=300, help="seconds after which that is given up")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    state: dict[str, Any] = json.loads(STATE.read_text()) if STATE.is_file() else {}
    version, every = code_version(), keys()
    for key in track(every, "coverage"):
        limit = options.speed_limit if re.search(options.speed, key) and has_a_size_to_time(key) else 0
        if re.search(options.only, key) and not is_done(state.get(key, {}), version, limit):
            state[key] = {"version": version, "row": asdict(attempt(subject_of(key), limit))}
            write_text(STATE, json.dumps(state, indent=1))
    write_text(PAGE, page(Row.of(state[key]["row"]) for key in every if key in state))


def has_a_size_to_time(key: str) -> bool:
    """Whether its model is one that people run: those of transformers and torch are built with a few channels."""
    return key.startswith(("timm/", "torchvision/"))


def is_done(entry: dict[str, Any], version: str, speed_limit: int) -> bool:
    """Whether a row is there, from this code, and as long as it was to be measured."""
    if entry.get("version") != version:
        return False
    row = Row.of(entry["row"])
    return not speed_limit or not row.norms or row.speed is not None or row.gave_up >= speed_limit


def attempt(subject: Subject, speed_limit: int = 0) -> Row:
    """The row, or what went wrong in its place."""
    try:
        row = measure(subject, speed_limit)
    except Exception as error:  # whatever it is, it belongs into the table
        row = Row(subject.library, subject.family, subject.name, error=first_line(error).replace("|", "/"))
    logger.info("%s", table_row(row).strip())
    return row


if __name__ == "__main__":
    main()
