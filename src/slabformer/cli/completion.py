"""`slab completion`: a script that completes commands and options in a shell, written by shtab."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ActionYesNo, Namespace

from slabformer._extras import require
from slabformer._jsonargparse import hint_of, options_of
from slabformer.cli import main
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser, flags_of
from slabformer.cli.words import placeholder

NOTES = (
    "The script is a file of the installed version: write it anew after an update. zsh reads it from a folder of its "
    "$fpath, where it is called _slab."
)


def parser() -> Parser:
    """Options of `slab completion`."""
    made = Parser(
        "slab completion",
        "Write a script that completes the commands and options of slab in a shell.",
        [
            "slab completion bash > ~/.local/share/bash-completion/completions/slab",
            "slab completion zsh > ~/.zfunc/_slab",
        ],
        notes=NOTES,
        json=False,
    )
    made.add_argument("shell", type=Literal["bash", "zsh"], help="bash or zsh")
    return made


def run(config: Namespace) -> Outcome:
    """Build the parsers of all verbs, and shtab's script of them."""
    shtab = require("shtab", extra="cli")
    return Outcome(data=None, shown=[shtab.complete(everything(shtab), config.shell).rstrip("\n")])


def everything(shtab: Any) -> argparse.ArgumentParser:
    """Every verb with its options, as argparse knows them."""
    whole = argparse.ArgumentParser("slab", description="Transformers without LayerNorm")
    whole.add_argument("-V", "--version", action="store_true", help="versions")
    commands = whole.add_subparsers()
    _add_verbs(shtab, commands, main.VERBS)
    for group, (module, what) in main.GROUPS.items():
        inner = commands.add_parser(group, help=what).add_subparsers()
        _add_verbs(shtab, inner, importlib.import_module(module).VERBS)
    return whole


def _add_verbs(shtab: Any, commands: Any, verbs: Mapping[str, tuple[str, str]]) -> None:
    for verb, (module, what) in verbs.items():
        plain = commands.add_parser(verb, help=what, add_help=False)
        try:
            actions = options_of(parser_of(module))
        except ImportError:  # an extra is missing: the verb says which when it runs
            continue
        for action in actions:
            if action.help != argparse.SUPPRESS:
                _add_option(shtab, plain, action)


def _add_option(shtab: Any, plain: argparse.ArgumentParser, action: argparse.Action) -> None:
    """The same option, with what its values are completed from."""
    flags = [*dict.fromkeys([*flags_of(action), *action.option_strings])] or [action.dest]
    flags = [flag for flag in flags if not flag.endswith("+")]
    if action.nargs == 0 or isinstance(action, ActionYesNo) or action.dest == "print_config":
        plain.add_argument(*flags, action="store_true", help=action.help)
        return
    hint = getattr(action, "checked_type", hint_of(action))
    added = plain.add_argument(*flags, nargs=action.nargs, help=action.help)
    if choices := _choices(hint):
        added.choices = choices
        return
    kind = "PATH" if action.dest == "config" else placeholder(hint)
    complete = {"FILE": shtab.FILE, "PATH": shtab.FILE, "FOLDER": shtab.DIRECTORY}.get(kind)
    if complete is not None:
        added.complete = complete  # type: ignore[attr-defined]


def _choices(hint: Any) -> list[str]:
    """The names that a type allows, where it is a choice between some."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint) if value is not None]
    return [name for part in get_args(hint) if get_origin(part) is Literal for name in _choices(part)]


def parser_of(module: str) -> Parser:
    """Options of the verb in ``module``."""
    return importlib.import_module(module).parser()
