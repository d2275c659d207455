"""Options held against the rules in their types, before a verb runs; complaints of the parser in our words."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from slabformer.cli.suggest import did_you_mean
from slabformer.settings import asks_the_disk, check, describe, is_default, nested_hints, shown

MISTYPED = re.compile(
    r'.*Parser key "(?P<key>[\w.]+)"(?: element \d+)?: (?:Expected|Does not validate)'
    r".*(?:Got value|Given value): (?P<given>.*)"
)
UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: --(?P<flag>[\w.\-]+)"
    r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<member>[^']+)'"
    r"|Option '(?P<option>[^']+)' is not accepted"
)


def add_settings(parser: ArgumentParser, kind: type) -> None:
    """Every field of a dataclass as an option, nested ones by dotted names."""
    parser.add_class_arguments(kind)
    hints = nested_hints(kind)
    for action in parser._actions:
        if action.dest in hints:
            # the parser's own type has lost its rules
            action.checked_type = hints[action.dest]  # type: ignore[attr-defined]


def parse(parser: ArgumentParser, options: Sequence[str], command: str) -> Namespace:
    """``options`` as values that are within the range of each.

    Raises:
        ValueError: With the option, what was given and what is allowed.
    """
    _refuse_empty(options)
    parser.formatter_class = type("HelpFormatter", (_TellsRanges, parser.formatter_class), {})
    parser.exit_on_error = False
    try:
        config = parser.parse_args(options)
    except ArgumentError as error:
        message = _explain(" ".join(str(error).split()), parser)
        raise ValueError(f"{message} (`{command} --help` shows all options)") from error
    for name in parser.groups or {}:
        if name in config and not isinstance(config[name], Namespace):
            raise ValueError(f"{name} must be a mapping of settings to values, got {shown(config[name])}")
    for action in parser._actions:
        hint = type_of(action)
        if hint is None or action.dest not in config:
            continue
        value = config[action.dest]
        if asks_the_disk(hint) or not is_default(value, action.default):
            check(_shown_name(action), value, hint)
    return config


class _TellsRanges:
    """Mixed into a parser's formatter, so that `--help` says what is allowed."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        hint = type_of(action)
        return super()._get_type_str(action) if hint is None else describe(hint)  # type: ignore[misc]


def type_of(action: argparse.Action) -> Any:
    """An option's type with its rules, a list where it takes several values; None for a switch."""
    hint = getattr(action, "checked_type", getattr(action, "_typehint", None))
    return hint if hint is None or action.nargs in (None, "?") else list[hint]  # type: ignore[valid-type]


def _refuse_empty(options: Sequence[str]) -> None:
    """Paths forget that they were empty: ``--output ''`` would be the current folder."""
    for flag, value in itertools.pairwise([*options, "-"]):
        name, equals, given = flag.partition("=")
        if flag.startswith("--") and not (given if equals else value).strip():
            raise ValueError(f"{name} must not be empty; give a value, or leave it out")


def _shown_name(action: argparse.Action) -> str:
    """A flag as it is given, a recipe's key as it is written there."""
    if hasattr(action, "checked_type") or not action.option_strings:
        return action.dest
    return action.option_strings[-1]


def _explain(message: str, parser: ArgumentParser) -> str:
    """``message`` of a parser, with what is allowed, or the nearest known key where it is about an unknown one."""
    mistyped = MISTYPED.search(message)
    if mistyped is not None:
        action = next(action for action in parser._actions if action.dest == mistyped["key"])
        return f"{_shown_name(action)} must be {describe(type_of(action))}, got {mistyped['given']}"
    unknown = UNKNOWN_KEY.search(message)
    if unknown is None:
        return message
    group, member = unknown["group"], unknown["member"]
    key = f"{group}.{member}" if group else unknown["flag"] or unknown["option"]
    positional = next(
        (action.dest for action in parser._actions if not action.option_strings and action.dest == key), None
    )
    if positional:
        return f"{positional} is given without --{positional}, as in the usage line"
    known = [action.dest for action in parser._actions if action.option_strings]
    return f"unknown option {key!r}{did_you_mean(key.replace('-', '_'), known)}"
