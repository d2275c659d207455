"""What the verbs that train share: a recipe on the command line."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TextIO, TypeVar

import yaml
from jsonargparse import Namespace, set_parsing_settings

from slabformer._files import check_readable, read_text
from slabformer._jsonargparse import groups_of, members_of, options_by_flag, options_of, set_groups, set_members
from slabformer.cli.options import add_settings
from slabformer.cli.outcome import Outcome
from slabformer.cli.parser import Parser
from slabformer.settings import field_hints, shown
from slabformer.tasks.engine.documents import parse_yaml

C = TypeVar("C")
#: settings that stand first in help, in this order
MOST_USED = (
    *("config", "model.name", "model.backbone", "data.path", "output"),
    *("epochs", "steps", "batch_size", "optimizer.lr"),
)
NOTES = (
    "Settings given after --config override the recipe; every switch has a --no- form. In recipes, and in what "
    "--print-config writes, names have underscores."
)


class RecipeParser(Parser):
    """Reads ``--data PATH`` as ``--data.path PATH``; everywhere else that key is a group."""

    def parse_args(self, args: Sequence[str], *rest: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """See :class:`Parser`; a recipe is looked at before it is read."""
        given = self.spelled(args)
        for item, following in zip(given, [*given[1:], ""], strict=True):
            if item == "--config" or item.startswith("--config="):
                _check_recipe(following if item == "--config" else item.removeprefix("--config="))
        return super().parse_args(given, *rest, **options)


def _check_recipe(given: str) -> None:
    """Refuse a recipe that is no regular file, out of bounds or no mapping; what else is wrong the parser tells."""
    path = check_readable(given, "recipe")
    text = read_text(path)
    try:
        recipe = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError:
        return
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is no recipe: it must be a mapping of settings to values, got {shown(recipe)}")


def recipe_parser(
    prog: str,
    does: str,
    config: type,
    *,
    examples: Sequence[str],
    sections: Collection[str] | None = None,
    **options: Any,
) -> RecipeParser:
    """Options for a recipe, and for any key of the dataclass ``config``.

    Args:
        prog: The verb.
        does: What it does.
        config: What a recipe may hold; groups of options are called by its nested fields.
        examples: Commands.
        sections: Fields that count, where not all do: the others may stand in a recipe and are no flags.
        options: For :class:`~slabformer.cli.parser.Parser`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = RecipeParser(prog, does, examples, notes=NOTES, **options)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    next(
        action for action in options_of(parser) if action.dest == "print_config"
    ).help = "write the settings as a recipe and exit"
    add_settings(parser, config)
    hints = field_hints(config)
    for action in options_of(parser):
        section = action.dest.partition(".")[0]
        if section in hints and sections is not None and section not in sections:
            _take_flags(parser, action)
        elif _nested(config, action.dest) is not None:
            action.help = argparse.SUPPRESS  # a whole group in one value
        elif action.dest == "data.path":
            action.aliases = ("--data",)  # type: ignore[attr-defined]
            action.shown = ["--data"]  # type: ignore[attr-defined]
    _arrange(parser, config)
    return parser


def _nested(config: type, key: str) -> type | None:
    """The dataclass of a dotted key, if it is one."""
    kind: Any = config
    for name in key.split("."):
        kind = field_hints(kind).get(name) if isinstance(kind, type) and is_dataclass(kind) else None
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def _take_flags(parser: Parser, action: argparse.Action) -> None:
    """Leave a setting to recipes."""
    for flag in action.option_strings:
        options_by_flag(parser).pop(flag)
    action.option_strings, action.help = [f"--{action.dest}"], argparse.SUPPRESS


def name_sections(parser: Parser, config: type) -> None:
    """Call sections by their keys in a recipe, and describe them by their dataclasses."""
    for key, group in (parser.groups or {}).items():
        kind = _nested(config, key)
        group.title = "run" if kind is None else key.replace("_", "-")
        group.description = inspect.cleandoc((kind or config).__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _arrange(parser: Parser, config: type) -> None:
    """Sections by name, the most used settings before them."""
    name_sections(parser, config)
    used = {action.dest: action for action in options_of(parser) if action.dest in MOST_USED}
    for group in groups_of(parser):
        set_members(group, [action for action in members_of(group) if action.dest not in used])
    first = parser.add_argument_group("most used")
    set_members(first, [used[dest] for dest in MOST_USED if dest in used])
    set_groups(parser, [first, *(group for group in groups_of(parser) if group is not first)])


def settings_of(parser: Parser, parsed: Namespace) -> dict[str, Any]:
    """What was parsed, its groups as the dataclasses that they stand for."""
    # its name before jsonargparse 4.49 was another
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return vars(instantiate(parsed))


def config_of(parser: Parser, parsed: Namespace, config: type[C]) -> C:
    """What was parsed as a ``config``."""
    settings = settings_of(parser, parsed)
    return config(**{field.name: settings[field.name] for field in fields(config)})  # type: ignore[arg-type]


@contextmanager
def ending_well() -> Iterator[None]:
    """Around training: a signal that stopped it is one line and its exit code, and processes take leave of each other.

    Raises:
        SystemExit: With 143 after SIGTERM, 130 after SIGINT.
    """
    import torch.distributed as dist

    from slabformer.tasks.engine.signals import StoppedError

    try:
        yield
    except StoppedError as stopped:
        write_once(sys.stderr, f"slab: {stopped}\n")
        raise SystemExit(stopped.exit_code) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def outcome_of(result: Any, figures: Mapping[str, Any], spec: str = ".4g") -> Outcome | None:
    """Whether anything was trained, where it is, and ``figures``, formatted by ``spec`` for people; once a run."""
    if not is_first_process():
        return None
    verdict = "already finished" if result.already_finished else "finished"
    told = "  ".join(f"{name} {value:{spec}}" for name, value in figures.items())
    data = {"output": result.output, "already_finished": result.already_finished, "figures": dict(figures)}
    return Outcome(data=data, shown=[f"{verdict}: {result.output}  {told}"])


def write_once(stream: TextIO, line: str) -> None:
    """Write ``line`` once, however many processes train."""
    if is_first_process():
        stream.write(line)


def is_first_process() -> bool:
    """Whether this process tells what all of a run found."""
    return os.environ.get("RANK", "0") == "0"
