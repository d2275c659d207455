"""What an exporter or an engine refuses, in one line: the operator, and the line of code that it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slabformer.surgery.outputs import first_line

#: how PyTorch spells an operator in its messages
OPERATOR = re.compile(r"(?:torch\.ops\.|OpOverload\(op=')([\w]+(?:\.|::)[\w]+)")
#: and an axis that cannot have any length
AXES = re.compile(r"Constraints violated.*\n\s+- (.+)")
SOURCE_LINE = re.compile(r'File "([^"]+)", line (\d+)')
#: code between a model and its operators, which is not where they come from
NOT_OF_MODELS = re.compile(r"[/\\](?:torch|onnxscript|onnx_ir|executorch|contextlib|slabformer[/\\]export)[/\\.]")


class UnsupportedError(RuntimeError):
    """A format or an engine does not take a model."""


def unsupported(engine: str, error: BaseException, program: Any = None) -> UnsupportedError:
    """What ``error`` says, in one line.

    Args:
        engine: What refuses.
        error: Raised by an exporter or an engine; its causes are searched.
        program: The ``ExportedProgram`` that was to be converted, where there is one already.
    """
    text = "\n".join(str(each) for each in _chain(error))
    operator = next(iter(OPERATOR.findall(text)), "").replace("::", ".")
    place = _place(operator, program) or _last_place(text)
    what = f"the operator {operator}" if operator else "this model"
    where = f" ({place})" if place else ""
    return UnsupportedError(f"{engine} does not take {what}{where}: {_reason(error)}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause, which exporters wrap in pages of advice; of axes, the first complaint."""
    innermost = list(_chain(error))[-1]
    complaint = AXES.search(str(innermost))
    return " ".join(complaint[1].split()) if complaint else first_line(innermost)


def _place(operator: str, program: Any) -> str:
    """Where ``program`` says that it calls ``operator``."""
    base = operator.rpartition(".")[2].strip("_")  # decompositions put prefixes in front
    if program is None or not base:
        return ""
    for node in program.graph.nodes:
        if base in str(node.target):
            return _last_place(node.meta.get("stack_trace") or "")
    return ""


def _last_place(text: str) -> str:
    """The innermost line of code of a model that a trace names."""
    places = [(file, line) for file, line in SOURCE_LINE.findall(text) if not NOT_OF_MODELS.search(file)]
    return f"{Path(places[-1][0]).name}, line {places[-1][1]}" if places else ""
