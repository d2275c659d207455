"""Options held against the rules in their types, before a verb runs; complaints of the parser in our words."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Collection, Sequence

from jsonargparse import ArgumentError, Namespace

from slabformer._jsonargparse import options_of
from slabformer.cli.parser import Parser, in_recipe, type_of
from slabformer.cli.suggest import did_you_mean
from slabformer.settings import asks_the_disk, check, describe, is_default, nested_hints, shown

MISTYPED = re.compile(
    r'.*Parser key "(?P<key>[\w.]+)"(?: element \d+)?: '
    r"(?:(?:Expected|Does not validate).*(?:Got value|Given value): |Value not boolean: )(?P<given>.*)"
)
UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: (?P<flag>-[\w.\-]+)"
    r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<member>[^']+)'"
    r"|Option '(?P<option>[^']+)' is not accepted"
)


def add_settings(parser: Parser, kind: type, skip: Collection[str] = ()) -> None:
    """Every field of a dataclass as an option, but for those to ``skip``, nested ones by dotted names."""
    parser.add_class_arguments(kind, skip=set(skip))
    hints = nested_hints(kind)
    for action in options_of(parser):
        if action.dest in hints:
            # the parser's own type has lost its rules
            action.checked_type = hints[action.dest]  # type: ignore[attr-defined]
            if (action.help or "").startswith("Deprecated"):
                action.help = argparse.SUPPRESS


def parse(parser: Parser, options: Sequence[str], command: str) -> Namespace:
    """``options`` as values that are within the range of each.

    Raises:
        ValueError: With the option, what was given and what is allowed.
    """
    given = parser.spelled(options)
    _refuse_empty(given)
    try:
        config = parser.parse_args(given)
    except ArgumentError as error:
        message = _explain(" ".join(str(error).split()), parser, given)
        raise ValueError(f"{message} (`{command} --help` shows all options)") from error
    for name in parser.groups or {}:
        if name in config and not isinstance(config[name], Namespace):
            raise ValueError(f"{name} must be a mapping of settings to values, got {shown(config[name])}")
    for action in options_of(parser):
        hint = type_of(action)
        if hint is None or action.dest not in config:
            continue
        value = config[action.dest]
        if asks_the_disk(hint) or not is_default(value, action.default):
            check(_shown_name(action, given), value, hint)
    return config


def _refuse_empty(options: Sequence[str]) -> None:
    """Paths forget that they were empty: ``--output ''`` would be the current folder."""
    for flag, value in itertools.pairwise([*options, "-"]):
        name, equals, given = flag.partition("=")
        if flag.startswith("--") and not (given if equals else value).strip():
            raise ValueError(f"{name} must not be empty; give a value, or leave it out")


def _shown_name(action: argparse.Action, given: Sequence[str]) -> str:
    """A flag as it is given; a setting that comes from a recipe as it is written there."""
    flags = [flag for flag in action.option_strings if not flag.endswith("+")]
    typed = any(item.partition("=")[0] in flags for item in given)
    return flags[-1] if flags and (typed or not in_recipe(action)) else action.dest


def _explain(message: str, parser: Parser, given: Sequence[str]) -> str:
    """``message`` of a parser, with what is allowed, or the nearest known key where it is about an unknown one."""
    mistyped = MISTYPED.search(message)
    if mistyped is not None:
        action = next(action for action in options_of(parser) if action.dest == mistyped["key"])
        hint = type_of(action)
        allowed = describe(bool if hint is None else hint)
        return f"{_shown_name(action, given)} must be {allowed}, got {mistyped['given'].removesuffix('.')}"
    unknown = UNKNOWN_KEY.search(message)
    if unknown is None:
        return message
    group, member, flag = unknown["group"], unknown["member"], unknown["flag"]
    if flag:
        return _unknown_flag(flag, parser)
    key = f"{group}.{member}" if group else unknown["option"]
    settings = [action.dest for action in options_of(parser) if action.option_strings]
    return f"unknown setting {key!r}{did_you_mean(key.replace('-', '_'), settings)}"


def _unknown_flag(flag: str, parser: Parser) -> str:
    name = flag.removeprefix("--")
    if any(not action.option_strings and action.dest == name for action in options_of(parser)):
        return f"{name} is given without --{name}, as in the usage line"
    shown_flags = [
        flag for action in options_of(parser) for flag in action.option_strings if action.help != argparse.SUPPRESS
    ]
    return f"unknown option {flag!r}{did_you_mean(flag.replace('_', '-'), shown_flags)}"
