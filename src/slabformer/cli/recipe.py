"""What the verbs that train share: a recipe on the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from slabformer._files import check_readable, read_text
from slabformer.cli.options import add_settings
from slabformer.settings import shown
from slabformer.tasks.engine.documents import parse_yaml

C = TypeVar("C")


class _Parser(ArgumentParser):
    """Reads ``--data PATH`` as ``--data.path PATH``: everywhere else the key is a group."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Namespace:
        """See ``ArgumentParser.parse_args``."""
        given = list(sys.argv[1:] if args is None else args)
        for item, following in zip(given, [*given[1:], ""], strict=True):
            if item == "--config" or item.startswith("--config="):
                _check_recipe(following if item == "--config" else item.removeprefix("--config="))
        short = [f"--data.path{item[6:]}" if item == "--data" or item.startswith("--data=") else item for item in given]
        return super().parse_args(short, *rest, **options)


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


def recipe_parser(prog: str, description: str, example: str, config: type) -> ArgumentParser:
    """Options for a recipe, and for any key of the dataclass ``config``."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    options = _Parser(
        prog=prog,
        allow_abbrev=False,
        description=f"{description} The output folder goes on where it stopped.",
        epilog="--data PATH is short for --data.path PATH. Keys given after --config override the recipe.",
    )
    options.add_argument("--config", action="config", help=f"a recipe, e.g. {example}")
    add_settings(options, config)
    return options


def config_of(parser: ArgumentParser, parsed: Namespace, config: type[C]) -> C:
    """What was parsed as a ``config``."""
    # its name before jsonargparse 4.49 was another
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return config(**{key: value for key, value in vars(instantiate(parsed)).items() if key != "config"})


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


def write_outcome(result: Any, figures: Mapping[str, float], spec: str = ".4g") -> None:
    """One line: whether anything was trained, where it is, and ``figures`` formatted by ``spec``."""
    verdict = "already finished" if result.already_finished else "finished"
    shown = "  ".join(f"{name} {value:{spec}}" for name, value in figures.items())
    write_once(sys.stdout, f"{verdict}: {result.output}  {shown}\n")


def write_once(stream: TextIO, line: str) -> None:
    """Write ``line`` once, however many processes train."""
    if os.environ.get("RANK", "0") == "0":
        stream.write(line)
