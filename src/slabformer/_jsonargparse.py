"""Every private name of jsonargparse, and of argparse below it, that this package uses: options, groups and layout."""

from __future__ import annotations

import argparse
from typing import Any

from jsonargparse import DefaultHelpFormatter

CHECKED_WITH = ("4.50", "4.53")


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Every option and argument of ``parser``, in order."""
    return parser._actions


def options_by_flag(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Its options by each of their flags; a write is seen by the parser."""
    return parser._option_string_actions


def groups_of(parser: argparse.ArgumentParser) -> list[Any]:
    """The sections of its help, its own two among them."""
    return list(parser._action_groups)


def set_groups(parser: argparse.ArgumentParser, groups: list[Any]) -> None:
    """Let its help show ``groups``."""
    parser._action_groups = groups


def arguments_group(parser: argparse.ArgumentParser) -> Any:
    """Its section of what is given without a flag."""
    return parser._positionals


def options_group(parser: argparse.ArgumentParser) -> Any:
    """Its section of options that stand in no other."""
    return parser._optionals


def members_of(group: Any) -> list[argparse.Action]:
    """What a section shows; a write is seen by the section."""
    return group._group_actions


def set_members(group: Any, members: list[argparse.Action]) -> None:
    """Let a section show ``members``."""
    group._group_actions = members


def hint_of(action: argparse.Action) -> Any:
    """The type that jsonargparse holds an option against; None where it has none."""
    return getattr(action, "_typehint", None)


class Layout(DefaultHelpFormatter):
    """Base of a layout of help: argparse's private hooks under public names."""

    def invocation(self, action: argparse.Action) -> str:
        """What the left column shows of an option."""
        return super()._format_action_invocation(action)

    def values(self, action: argparse.Action, name: str) -> str:
        """The values that an option takes, by ``name``."""
        return self._format_args(action, name)

    def filled(self, text: str, width: int, indent: str) -> str:
        """A paragraph in lines of ``width``."""
        return super()._fill_text(text, width, indent)

    def lines(self, text: str, width: int) -> list[str]:
        """The help of an option in lines of ``width``."""
        return super()._split_lines(text, width)

    def expanded(self, action: argparse.Action) -> str:
        """The help of an option with what is said of its type and default."""
        return super()._expand_help(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return self.invocation(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return self.filled(text, width, indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return self.lines(text, width)

    def _expand_help(self, action: argparse.Action) -> str:
        return self.expanded(action)
