"""The parser of every verb: one spelling of flags, one layout of help.

A flag has dashes, a switch takes no value, ``--output`` is ``-o`` and ``--config`` is ``-c``; every verb has ``--help``
and ``--json``. What was spelled otherwise once (``--batch_size``, ``--overwrite true``, names in ``aliases``) is
understood and never shown.
"""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from slabformer._jsonargparse import (
    Layout,
    arguments_group,
    groups_of,
    hint_of,
    members_of,
    options_by_flag,
    options_group,
    options_of,
    set_groups,
    set_members,
)
from slabformer.cli.words import facts, placeholder
from slabformer.settings import FileToWrite

#: long flag -> its short form, in every verb that has it
SHORT = {"--output": "-o", "--config": "-c"}
SWITCHED = {"true": True, "yes": True, "false": False, "no": False}
#: options that stand last in help, in this order
GENERAL = ("print_config", "json", "help")
WIDEST = 100
#: of a docstring: :func:`slabformer.verify` is `verify` in help
ROLE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`")


class HelpFormatter(Layout):
    """Flags of an option, what it is for, and in brackets type, range and default."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=26, width=min(WIDEST, shutil.get_terminal_size().columns), **options)

    def invocation(self, action: argparse.Action) -> str:
        """Flags, and a word for the value."""
        if not action.option_strings:
            return str(action.metavar)
        values = (
            ""
            if action.nargs == 0 or action.dest == "print_config"
            else f" {self.values(action, placeholder(type_of(action)))}"
        )
        return ", ".join(flags_of(action)) + values

    def filled(self, text: str, width: int, indent: str) -> str:
        """A paragraph; indented lines, examples for instance, stay as they are."""
        lines = (line if line.startswith("  ") else textwrap.fill(line, width) for line in text.splitlines())
        return textwrap.indent("\n".join(lines), indent)

    def lines(self, text: str, width: int) -> list[str]:
        """The help of an option; flags are not broken at their dashes."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def expanded(self, action: argparse.Action) -> str:
        """The help of an option with its type, range and default."""
        text = ROLE.sub(r"`\1`", (action.help or "").strip().removesuffix("."))
        hint = bool if isinstance(action, ActionYesNo) else type_of(action)
        text = text if in_recipe(action) else text[:1].upper() + text[1:]
        return text + facts(action, hint, needed=is_needed(action), in_recipe=in_recipe(action))


class Parser(ArgumentParser):
    """Options of a verb.

    Args:
        prog: The verb, ``slab fuse``.
        does: What it does, at the top of its help.
        examples: Commands, one a line, below.
        notes: What else is to be said, at the end.
        json: Whether there is a result that ``--json`` writes to standard output.
        json_files: Whether ``--json FILE`` is understood, as before 0.2.
    """

    def __init__(
        self, prog: str, does: str, examples: Sequence[str] = (), *, notes: str = "", json: bool = True,
        json_files: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            prog=prog,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
            formatter_class=HelpFormatter,
            print_config="--print-config",
            epilog=notes or None,
        )
        arguments_group(self).title = "arguments"
        self.does, self.examples, self.json_files = does, tuple(examples), json_files
        self.add_argument("-h", "--help", action="help", help="show this help and exit")
        if json:
            self.add_argument(
                "--json",
                action="store_true",
                default=argparse.SUPPRESS,
                help="write the result to standard output as one JSON document; everything else goes to standard error",
            )
        if json_files:
            self.add_argument("--json-file", type=FileToWrite | None, help=argparse.SUPPRESS)

    # its source is also compiled into the class of this parser's groups (jsonargparse's get_argument_group_class)
    def add_argument(self, *flags: str, aliases: Iterable[str] = (), **options: Any) -> argparse.Action:  # type: ignore[override]
        """As argparse's; ``aliases`` are old names, understood and never shown."""
        styled, options = in_house_style(flags, options)
        action: Any = super().add_argument(*styled, **options)
        if action is not None:  # None for a dataclass, which is a group of options
            action.aliases, action.own_metavar = tuple(aliases), options.get("metavar")
            action.needed = options.get("required", False)  # jsonargparse takes it off the action
        return action

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str], *rest: Any, **options: Any
    ) -> Namespace:
        """As jsonargparse's, of arguments in today's or an older spelling."""
        return super().parse_args(self.spelled(args), *rest, **options)

    def spelled(self, arguments: Sequence[str]) -> list[str]:
        """``arguments`` in today's spelling: long flags with dashes, switches without values.

        Raises:
            ValueError: If a switch has a value that is neither true nor false.
        """
        given, spelled = list(arguments), list[str]()
        while given:
            item = given.pop(0)
            if item == "--":
                return [*spelled, item, *given]
            flag, equals, value = self._long(item).partition("=")
            if not flag.startswith("--"):
                spelled.append(item)
                continue
            flag = self._flag(flag)
            action = options_by_flag(self).get(flag)
            if not equals and given and self._takes_old_value(action, given[0]):
                equals, value = "=", given.pop(0)
            if equals and isinstance(action, ActionYesNo):
                spelled.append(_switch(action, flag, value))
            elif equals and action is not None and action.dest == "json":
                spelled += self._json_file(value)
            else:
                spelled.append(f"{flag}{equals}{value}")
        return spelled

    def _long(self, item: str) -> str:
        """``-o FILE``, ``-oFILE`` and ``-o=FILE`` by the long flag."""
        for long, short in SHORT.items():
            if item.startswith(short) and short in options_by_flag(self):
                value = item[len(short) :].removeprefix("=")
                return f"{long}={value}" if value else long
        return item

    def _flag(self, given: str) -> str:
        """The flag that is spelled with underscores or called by an old name; an unknown one as it is."""
        known, dashed = options_by_flag(self), given.replace("_", "-")
        for action in options_of(self):
            if dashed in getattr(action, "aliases", ()):
                return action.option_strings[-1]
        if dashed in known:
            return dashed
        parts = given.split(".")
        for count in range(len(parts) - 1, 0, -1):
            head = ".".join(parts[:count]).replace("_", "-")
            if head in known:  # a mapping: --model.args.embed-dim names its key embed_dim
                return ".".join([head, *(part.replace("-", "_") for part in parts[count:])])
        return given

    def _takes_old_value(self, action: argparse.Action | None, following: str) -> bool:
        if isinstance(action, ActionYesNo):
            return following.lower() in SWITCHED
        is_json = action is not None and action.dest == "json" and self.json_files
        return is_json and (following == "-" or following.endswith(".json"))

    def _json_file(self, value: str) -> list[str]:
        if not self.json_files:
            raise ValueError(f"--json takes no value, got {value!r}; redirect standard output: --json > FILE")
        return ["--json"] if value == "-" else ["--json-file", value]

    def format_help(self, *args: Any) -> str:
        """What the verb does, its usage, examples, and its options, the general ones last."""
        for action in options_of(self):
            _name_value(action)
        self.usage, self.description = argparse.SUPPRESS, self._opening()
        self._arrange()
        return super().format_help(*args)

    def _arrange(self) -> None:
        """What is required first, what every verb has last; groups that show nothing are left out."""
        own = options_group(self)
        members_of(own).sort(
            key=lambda action: GENERAL.index(action.dest) + 1 if action.dest in GENERAL else -int(is_needed(action))
        )
        groups = [group for group in groups_of(self) if any(map(_is_shown, members_of(group)))]
        sections = [group for group in groups if group not in (arguments_group(self), own)]
        if sections:
            general = [action for action in members_of(own) if action.dest in GENERAL]
            members_of(sections[0]).extend(action for action in members_of(own) if action not in general)
            own.title = "general"
            set_members(own, general)
            groups = [*(group for group in groups if group is not own), own]
        set_groups(self, groups)

    def _opening(self) -> str:
        examples = ["\n".join(["examples:", *(f"  {example}" for example in self.examples)])] if self.examples else []
        return "\n\n".join([self.does, f"usage: {self.short_usage()}", *examples])

    def short_usage(self) -> str:
        """The verb with what it cannot do without."""
        words = [self.prog]
        for action in options_of(self):
            _name_value(action)
            if not _is_shown(action):
                continue
            if not action.option_strings:
                many = {"?": "[{}]", "*": "[{} ...]", "+": "{} ..."}.get(str(action.nargs), "{}")
                words.append(many.format(action.metavar))
            elif is_needed(action):
                words.append(f"{action.option_strings[-1]} {action.metavar}")
        return " ".join([*words, "[options]"])


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS


def type_of(action: argparse.Action) -> Any:
    """An option's type with its rules, a list where it takes several values; None for a switch that is no setting."""
    hint = getattr(action, "checked_type", hint_of(action))
    single = hint is None or action.nargs in (None, "?") or isinstance(action, ActionYesNo)
    return hint if single else list[hint]  # type: ignore[valid-type]


def is_needed(action: argparse.Action) -> bool:
    """Whether an option must be given."""
    return getattr(action, "needed", False)


def in_recipe(action: argparse.Action) -> bool:
    """Whether an option is a setting of a recipe."""
    return hasattr(action, "checked_type")


def flags_of(action: argparse.Action) -> list[str]:
    """The flags of an option that are shown: those of a switch that turn it on, and off where it is on."""
    flags = [flag for flag in getattr(action, "shown", action.option_strings) if not flag.endswith("+")]
    return flags[:1] if isinstance(action, ActionYesNo) and not action.default else flags


def in_house_style(flags: Sequence[str], options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Flags with dashes and short forms; truth values as switches."""
    if is_dataclass(options.get("type")):
        return list(flags), options  # a group of options, called by a name of Python's
    styled = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in flags]
    plain_switch = options.get("action") == "store_true" and options.get("default") != argparse.SUPPRESS
    if styled[-1].startswith("--") and (plain_switch or options.get("type") is bool):
        kept = {key: value for key, value in options.items() if key not in ("type", "metavar", "action")}
        options = {**kept, "action": ActionYesNo(yes_prefix="", no_prefix="no-")}
    short = SHORT.get(styled[-1])
    return [short, *styled] if short and short not in styled else styled, options


def _switch(action: ActionYesNo, flag: str, value: str) -> str:
    yes, no = action.option_strings
    if value.lower() not in SWITCHED:
        raise ValueError(f"{flag} is a switch; give it alone, or {no} for the opposite, got {value!r}")
    return yes if SWITCHED[value.lower()] == (flag == yes) else no


def _name_value(action: argparse.Action) -> None:
    """Set what stands for the value in help, where the verb has not."""
    if action.dest == "config":
        action.metavar = "RECIPE"
    own = None if in_recipe(action) else getattr(action, "own_metavar", None)
    if own is not None or isinstance(action, ActionYesNo) or type_of(action) is None:
        return
    hint = getattr(action, "checked_type", hint_of(action))
    action.metavar = placeholder(hint) if action.option_strings else action.dest.upper().replace("_", "-")
