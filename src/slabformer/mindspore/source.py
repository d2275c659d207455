"""Classes as a Python file."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from slabformer.mindspore.blocks import Block, Member, Plan, Several, Stored, Use
from slabformer.mindspore.leaves import Cell
from slabformer.mindspore.names import attribute

_WIDTH = 118
_IMPORTS = """\
import mindspore
from mindspore import nn, ops

from slabformer.mindspore import cells, functions
"""


def write_source(plan: Plan, about: str) -> str:
    """The file of a model: imports, then a class for each kind of block; ``build()`` makes the model.

    Args:
        plan: The classes.
        about: What the file's docstring says of origin and sizes.
    """
    names = _class_names(plan.blocks)
    parts = [f'"""{about}\n"""\n\n{_IMPORTS}']
    parts += [_Writer(plan, names, index).text() for index in range(len(plan.blocks))]
    parts.append(f'def build():\n    """The model, with zeros for weights."""\n    return {names[-1]}()\n')
    return "\n\n".join(parts)


def _class_names(blocks: Sequence[Block]) -> list[str]:
    """Torch's names, numbered where several classes came from one."""
    wanted = [attribute(block.kind.rpartition(".")[2]) for block in blocks]
    taken: set[str] = set()
    names = []
    for name in wanted:
        number = next(i for i in range(1, len(blocks) + 2) if (name if i == 1 else f"{name}{i}") not in taken)
        names.append(name if number == 1 else f"{name}{number}")
        taken.add(names[-1])
    return names


class _Writer:
    """Writes one class."""

    def __init__(self, plan: Plan, names: Sequence[str], index: int) -> None:
        self.plan, self.names, self.block, self.name = plan, names, plan.blocks[index], names[index]
        self.is_model = index == len(plan.blocks) - 1

    def text(self) -> str:
        base = "cells.Model" if self.is_model else "nn.Cell"
        lines = [f"class {self.name}({base}):", *_indented(self._docstring()), ""]
        varied = _varied(self.block)
        taken = [f"{slot}" for slot in varied]
        lines += [f"    def __init__({', '.join(['self', *taken])}):", "        super().__init__()"]
        settings = iter(
            slot if slot in varied else repr(value)
            for slot, value in zip(self.block.slots, self.block.values[0], strict=True)
        )
        for name, member in self.block.members.items():
            lines += [f"        {line}" for line in _assigned(f"self.{name}", self._made(name, member, settings))]
        if self.is_model and self.plan.inference_only:
            lines.append(f"        self.inference_only = {_text(self.plan.inference_only)}")
        if self.is_model and self.plan.names:
            lines += ["        self.name_parameters("]
            lines += [f"            {_text(own)}, {_text(torch)}," for own, torch in self.plan.names.items()]
            lines += ["        )"]
        if self.block.inputs is not None:
            lines += ["", f"    def construct({', '.join(['self', *self.block.inputs])}):"]
            lines += [f"        {line}" for line in self.block.lines]
        return "\n".join(lines) + "\n"

    def _docstring(self) -> list[str]:
        module = _listed(self.block.paths)
        origin = f"{self.block.kind}{f', {module}' if module else ''}."
        read, made = self.block.shapes
        sizes = ["", f"{read} to {made}."] if read else []
        return _wrapped(['"""' + origin, *sizes]) if sizes else ['"""' + origin + '"""']

    def _made(self, name: str, member: Member, settings: Iterator[str]) -> Any:
        """The expression of a member; nested lists of them for lists."""
        if isinstance(member, Stored):
            return f"cells.{member.kind}({member.shape}, mindspore.{member.dtype}, {_text(name)})"
        if isinstance(member, Cell):
            return self._cell(member, settings)
        if isinstance(member, Use):
            block = self.plan.blocks[member.block]
            varied = _varied(block)
            values = [(slot, next(settings)) for slot in block.slots]
            return f"{self.names[member.block]}({', '.join(f'{s}={v}' for s, v in values if s in varied)})"
        if isinstance(member, Several):
            return [self._made(name, one, settings) for one in member.members]
        return "nn.Identity()"

    def _cell(self, cell: Cell, settings: Iterator[str]) -> str:
        given = [repr(argument) for argument in cell.arguments]
        for key, value in (cell.settings or {}).items():
            if key in cell.varies:
                text = next(settings)
            else:
                text = self._cell(value, settings) if isinstance(value, Cell) else repr(value)
            given.append(f"{key}={text}")
        return f"{cell.name}({', '.join(given)})"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _varied(block: Block) -> list[str]:
    """Settings that are not the same in all modules of a class: what its constructor takes."""
    columns = zip(*block.values, strict=True) if block.slots else ()
    return [slot for slot, column in zip(block.slots, columns, strict=True) if len(set(column)) > 1]


def _assigned(target: str, value: Any) -> list[str]:
    """``target = value``; lists with a line a member, those that follow each other and are alike as one."""
    if not isinstance(value, list):
        return [f"{target} = {value}"]
    lines = [f"{target} = nn.CellList("]
    if len(value) > 1 and all(isinstance(one, str) and one == value[0] for one in value):
        return [f"{target} = nn.CellList([{value[0]} for _ in range({len(value)})])"]
    lines = [f"{target} = nn.CellList(", "    ["]
    lines += [f"        {line}" for one in value for line in _listed_member(one)]
    return [*lines, "    ]", ")"]


def _listed_member(value: Any) -> list[str]:
    if not isinstance(value, list):
        return [f"{value},"]
    first, *rest = _assigned("", value)
    lines = [first.removeprefix(" = "), *rest]
    return [*lines[:-1], f"{lines[-1]},"]


def _listed(paths: Sequence[str]) -> str:
    """Modules in words: "blocks.0 to blocks.11"."""
    if len(paths) == 1:
        return paths[0]
    return f"{paths[0]} to {paths[-1]}" if len(paths) > 2 else " and ".join(paths)


def _wrapped(paragraphs: Sequence[str]) -> list[str]:
    lines = [line for text in paragraphs for line in (textwrap.wrap(text, _WIDTH - 8) or [""])]
    return [*lines, '"""']


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" if line else "" for line in lines]
