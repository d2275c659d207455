"""From calls to classes: one for each kind of block, shared by all modules that are built and run alike."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from slabformer.mindspore.graph import CELL, Call, ConversionError, Traced, is_list, is_tensor
from slabformer.mindspore.leaves import Cell, leaf_of
from slabformer.mindspore.names import attribute
from slabformer.mindspore.operators import DTYPES, Operation, write

#: stands for a tensor in a line until variables have names
_TOKEN = re.compile(r"<(\d+)>")
_RESHAPE = re.compile(r"ops\.reshape\(<(\d+)>, \([-\d, ]+\)\)")
#: a parameter or buffer as an expression
_OWN = re.compile(r"self[\w.\[\]]*")
_VARIABLES = ("x", "y", "z", "u", "v", "w", "a", "b", "c", "d", "e", "f", "g", "h")


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer as source.

    Attributes:
        shape: Of the tensor.
        dtype: What MindSpore calls it.
        kind: "parameter"; "buffer" for one that is saved and not trained; "constant" for one that is in no state dict.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str


@dataclass(frozen=True)
class Use:
    """A class with settings, where another one makes an instance of it."""

    block: int
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Several:
    """A list of cells."""

    members: tuple[Cell | Use | Several | None, ...]


Member = Stored | Cell | Use | Several | None


@dataclass
class Block:
    """One class.

    Attributes:
        kind: The torch class, dotted.
        members: Attribute -> what is assigned to it; of the first module.
        inputs: Names of what ``construct`` takes; None where nothing calls the module.
        lines: Of ``construct``.
        shapes: Of inputs and outputs, in words.
        slots: Names of the settings that modules may differ in.
        paths: The modules.
        values: Their settings, in the order of ``slots``.
    """

    kind: str
    members: Mapping[str, Member]
    inputs: tuple[str, ...] | None
    lines: tuple[str, ...]
    shapes: tuple[str, str]
    slots: tuple[str, ...]
    paths: list[str] = field(default_factory=list)
    values: list[tuple[Any, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """A model as classes.

    Attributes:
        blocks: Every class, before those that use it; the model's is the last.
        names: Name of a parameter by its attributes -> torch's, where they differ.
        inference_only: Why the model cannot be trained; empty where it can.
    """

    blocks: list[Block]
    names: dict[str, str]
    inference_only: str


def plan(traced: Traced) -> Plan:
    """The classes of a traced model.

    Raises:
        ConversionError: If an operator has no counterpart.
    """
    return _Planner(traced).plan()


@dataclass(frozen=True)
class _Member:
    """Number ``index`` of ``total`` in a list, which is called ``name``."""

    name: str
    index: int
    total: int


@dataclass
class _Statement:
    """``outs = text``, with tokens for tensors.

    Attributes:
        outs: Tokens of the results; negative for one that nothing reads.
        text: The expression.
        parts: Tensors in the result, where that is a tuple.
        source: Token of the tuple that the result is part ``index`` of.
        index: See ``source``.
        calls: The member of a list that is called on one tensor.
        loop: The list whose members run one after the other from ``text`` on.
    """

    outs: list[int]
    text: str
    parts: int = 0
    source: int | None = None
    index: int = 0
    calls: _Member | None = None
    loop: str = ""


@dataclass(frozen=True)
class _Body:
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    names: tuple[str, ...]
    lines: tuple[str, ...]


class _Planner:
    def __init__(self, traced: Traced) -> None:
        self.traced, self.model = traced, traced.model
        self.blocks: list[Block] = []
        self.known: dict[Any, int] = {}
        self.names: dict[str, str] = {}
        self.notes: list[str] = []
        self.calls: dict[str, list[Call]] = {}
        self.dissolved: set[str] = set()
        self.tokens: dict[Node, int] = {}
        self.bodies: dict[int, _Body] = {}
        self.order = {node: position for position, node in enumerate(traced.root.nodes())}
        self._note(traced.root)
        self.needed = self._needed()

    def plan(self) -> Plan:
        for path in sorted(self.calls, key=lambda path: -path.count(".") - bool(path)):
            if path and (
                not self._holds(path) or len({self._signature(self.body(call)) for call in self.calls[path]}) > 1
            ):
                self.dissolved.add(path)
                self.bodies.clear()
        root = self.use("", self.model)
        assert isinstance(root, Use)
        return Plan(self.blocks, self.names, "; ".join(dict.fromkeys(self.notes)))

    def _note(self, call: Call) -> None:
        self.calls.setdefault(call.path, []).append(call)
        for item in call.items:
            if isinstance(item, Call):
                self._note(item)

    def _holds(self, path: str) -> bool:
        """Whether a module holds tensors or cells: others, such as activations, are written where they are called."""
        return any(other == path or other.startswith(f"{path}.") for other in self.needed)

    def _needed(self) -> set[str]:
        """Modules that become cells: those that hold tensors, run as cells, or hold such modules."""
        held = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        held |= set(self.model.state_dict()) | set(self.traced.tensors.values())
        cells = {str(node.args[1]) for node in self.traced.root.nodes() if node.target is CELL}
        paths = {name.rpartition(".")[0] for name in held} | cells
        return {".".join(path.split(".")[: depth + 1]) for path in paths for depth in range(path.count(".") + 1)} | {""}

    def is_list(self, module: Any) -> bool:
        """Whether a module is written as a list of cells; the model itself is a class in any case."""
        return module is not self.model and isinstance(module, nn.Module) and is_list(module)

    # --- classes ---------------------------------------------------------------------------------------------------

    def use(self, path: str, module: nn.Module) -> Cell | Use | Several:
        """What stands for a module where its parent makes it."""
        leaf = leaf_of(module) if path else None
        if leaf is not None:
            return leaf
        if self.is_list(module):
            return Several(
                tuple(
                    self.use(f"{path}.{name}", child) if f"{path}.{name}" in self.needed else None
                    for name, child in module.named_children()
                )
            )
        members = dict(self._members(path, module))
        called = path in self.calls and path not in self.dissolved
        body = self.body(self.calls[path][0]) if called else None
        settings = _slots(members, self.blocks)
        slots, values = tuple(slot for slot, _ in settings), tuple(value for _, value in settings)
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        assigned = tuple((name, _frozen(member)) for name, member in members.items())
        key = (kind, assigned, body and self._signature(body), slots)
        if key not in self.known:
            self.known[key] = len(self.blocks)
            if body is None:
                self.blocks.append(Block(kind, members, None, (), ("", ""), slots))
            else:
                read, made = (", ".join(map(_shape_of, nodes)) for nodes in (body.inputs, body.outputs))
                self.blocks.append(Block(kind, members, body.names, body.lines, (read, made), slots))
        block = self.blocks[self.known[key]]
        block.paths.append(path)
        block.values.append(values)
        return Use(self.known[key], values)

    def _members(self, path: str, module: nn.Module) -> Iterator[tuple[str, Member]]:
        prefix = f"{path}." if path else ""
        saved = set(module.state_dict())
        constants = self.traced.constants
        for name, parameter in module.named_parameters(recurse=False):
            yield (
                self._attribute(prefix, name),
                _stored(parameter, "parameter" if parameter.requires_grad else "buffer"),
            )
        for name, buffer in module.named_buffers(recurse=False):
            if name in saved:
                yield self._attribute(prefix, name), _stored(buffer, "buffer")
            elif f"{prefix}{name}" in constants:
                yield self._attribute(prefix, name), _stored(buffer, "constant")
        if not path:
            for name, value in constants.items():
                if "." not in name and not hasattr(module, name):
                    yield self._attribute("", name), _stored(value, "constant")
        for name, child in module.named_children():
            if f"{prefix}{name}" in self.needed:
                yield self._attribute(prefix, name), self.use(f"{prefix}{name}", child)

    def _attribute(self, prefix: str, name: str) -> str:
        own = attribute(name)
        if own != name:
            held = [*self.model.state_dict(), *self.traced.constants]
            mine = [full for full in held if full == f"{prefix}{name}" or full.startswith(f"{prefix}{name}.")]
            self.names |= {self._by_attributes(full): full for full in mine}
        return own

    def _by_attributes(self, name: str) -> str:
        parts: list[str] = []
        module: Any = self.model
        for part in name.split("."):
            parts.append(part if self.is_list(module) else attribute(part))
            module = getattr(module, part, None)
        return ".".join(parts)

    # --- construct -------------------------------------------------------------------------------------------------

    def body(self, call: Call) -> _Body:
        """What ``construct`` of a call's module is."""
        if id(call) not in self.bodies:
            self.bodies[id(call)] = self._body(call)
        return self.bodies[id(call)]

    def _body(self, call: Call) -> _Body:
        items = list(self._items(call))
        own = {node for item in items for node in ([item] if isinstance(item, Node) else item.nodes())}
        inputs = self._inputs(call, items, own)
        outputs = sorted((n for n in own if any(user not in own for user in n.users)), key=self.order.__getitem__)
        if not call.path:
            outputs = list(self.traced.outputs)
        expressions = {node: f"<{self._token(node)}>" for node in inputs}
        statements = [self._statement(item, call, inputs, expressions) for item in items]
        statements = _reshaped_once([one for one in statements if one.text])
        results = [expressions[node] for node in outputs]
        statements = _loops(_unpacked(statements, results))
        names = self._input_names(call, inputs)
        lines = _named(statements, dict(zip((self._token(n) for n in inputs), names, strict=True)), results)
        return _Body(tuple(inputs), tuple(outputs), tuple(names), lines)

    def _signature(self, body: _Body) -> Any:
        shapes = tuple(_shape_of(node) for node in (*body.inputs, *body.outputs))
        return body.names, body.lines, shapes

    def _items(self, call: Call) -> Iterator[Node | Call]:
        for item in call.items:
            if isinstance(item, Call) and item.path in self.dissolved:
                yield from self._items(item)
            else:
                yield item

    def _inputs(self, call: Call, items: Sequence[Node | Call], own: set[Node]) -> list[Node]:
        if not call.path:
            return list(self.traced.inputs)
        read = (
            source
            for item in items
            for node in ([item] if isinstance(item, Node) else self.body(item).inputs)
            for source in (node.all_input_nodes if node is item else [node])
        )
        inputs = dict.fromkeys(
            node for node in read if node not in own and is_tensor(node) and not self._own_tensor(node, call.path)
        )
        return list(inputs)

    def _own_tensor(self, node: Node, path: str) -> str | None:
        """A parameter or buffer as an expression inside the module ``path``; None for what is not below it."""
        name = self.traced.tensors.get(node)
        if name is None or not (not path or name.startswith(f"{path}.")):
            return None
        return self._dotted(path, name)

    def _dotted(self, path: str, name: str) -> str:
        """``self.blocks[0].weight`` for what is called ``name``, inside the module ``path``."""
        module: Any = self.model.get_submodule(path)
        text = "self"
        for part in name.removeprefix(f"{path}." if path else "").split("."):
            text += f"[{part}]" if self.is_list(module) else f".{attribute(part)}"
            module = getattr(module, part, None)
        return text

    def _token(self, node: Node) -> int:
        return self.tokens.setdefault(node, len(self.tokens))

    def _statement(
        self, item: Node | Call, call: Call, inputs: Sequence[Node], expressions: dict[Node, str]
    ) -> _Statement:
        def name(node: Node) -> str:
            own = self._own_tensor(node, call.path)
            return own if own is not None else expressions[node]

        if isinstance(item, Call):
            body = self.body(item)
            operands = [name(node) for node in body.inputs]
            callee = self._dotted(call.path, item.path)
            text, outs = f"{callee}({', '.join(operands)})", list(body.outputs)
        elif item.target is CELL:
            operands = [name(node) for node in item.args[0]]  # type: ignore[union-attr, arg-type]
            callee = self._dotted(call.path, str(item.args[1]))
            text, outs = f"{callee}({', '.join(operands)})", [item]
        else:
            sized = [node for node in (*item.all_input_nodes, *inputs) if isinstance(node.meta.get("val"), Tensor)]
            known = [(node, name(node)) for node in sized if node in expressions]
            text, outs, callee, operands = write(Operation(item, name, lambda: known)), [item], "", []
            if note := _not_for_training(item):
                self.notes.append(f"{note} in {call.path or 'the model'}")
        for node in outs:
            expressions[node] = f"<{self._token(node)}>"
        if len(outs) == 1 and (_TOKEN.fullmatch(text) or _OWN.fullmatch(text)):
            expressions[outs[0]] = text
            return _Statement([], "")
        statement = _Statement([self._token(node) for node in outs], text)
        if isinstance(item, Node) and item.target is operator.getitem:
            statement.source, statement.index = _tokens(text)[0], int(item.args[1])  # type: ignore[arg-type]
        elif isinstance(item, Node) and isinstance(item.meta["val"], (list, tuple)):
            statement.parts = len(item.meta["val"])
        member = re.fullmatch(r"(.+)\[(\d+)\]", callee)
        if member and len(outs) == 1 and len(operands) == 1 and _TOKEN.fullmatch(operands[0]):
            path = item.path if isinstance(item, Call) else str(item.args[1])
            holder = self.model.get_submodule(path.rpartition(".")[0])
            statement.calls = _Member(member[1], int(member[2]), len(holder))  # type: ignore[arg-type]
        return statement

    def _input_names(self, call: Call, inputs: Sequence[Node]) -> list[str]:
        if not call.path:
            return [attribute(node.name) for node in inputs]
        return (
            list(_VARIABLES[: len(inputs)]) if len(inputs) <= len(_VARIABLES) else [f"x{i}" for i in range(len(inputs))]
        )


def _not_for_training(node: Node) -> str:
    """Why an operation, written as it is in eval mode, is not what training needs; empty where it is."""
    if node.target is torch.ops.aten.batch_norm.default:
        return "a BatchNorm that is no module of its own"
    if node.target in (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default) and node.args[1]:
        return "a dropout that is no module of its own"
    return ""


def _shape_of(node: Node) -> str:
    value: Any = node.meta["val"]
    sizes = [
        "B" if isinstance(size, torch.SymInt) and str(size).isidentifier() else _size(size) for size in value.shape
    ]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _size(size: Any) -> str:
    return re.sub(r"s\d+", "B", str(size)).replace("*", " * ")


def _stored(tensor: Tensor, kind: str) -> Stored:
    if tensor.dtype not in DTYPES:
        raise ConversionError(f"MindSpore has no {tensor.dtype}")
    return Stored(tuple(tensor.shape), DTYPES[tensor.dtype], kind)


def _frozen(member: Member) -> Any:
    """What two members have in common that may share a class."""
    if isinstance(member, Cell):
        settings = member.settings or {}
        kept = ((k, _frozen(v) if isinstance(v, Cell) else v) for k, v in settings.items() if k not in member.varies)
        return member.name, member.arguments, tuple(kept), tuple(k for k in settings if k in member.varies)
    if isinstance(member, Use):
        return member.block
    if isinstance(member, Several):
        return tuple(map(_frozen, member.members))
    return member


def _slots(members: Mapping[str, Member], blocks: Sequence[Block]) -> list[tuple[str, Any]]:
    return [slot for name, member in members.items() for slot in _slots_of(name, member, blocks)]


def _slots_of(name: str, member: Member, blocks: Sequence[Block]) -> Iterator[tuple[str, Any]]:
    if isinstance(member, Cell):
        varied = [key for key in member.settings or {} if key in member.varies]
        yield from ((name if len(varied) == 1 else f"{name}_{key}", (member.settings or {})[key]) for key in varied)
    elif isinstance(member, Use):
        pairs = zip(blocks[member.block].slots, member.values, strict=True)
        yield from ((f"{name}_{slot}", value) for slot, value in pairs)
    elif isinstance(member, Several):
        for index, one in enumerate(member.members):
            yield from _slots_of(f"{name}{index}", one, blocks)


# --- statements ------------------------------------------------------------------------------------------------------


def _tokens(text: str) -> list[int]:
    return [int(token) for token in _TOKEN.findall(text)]


def _unpacked(statements: Sequence[_Statement], results: Sequence[str]) -> list[_Statement]:
    """``q, k, v = ops.split(x, ...)`` where the parts of a split are taken by their numbers alone."""
    readers: dict[int, list[_Statement]] = {}
    for one in statements:
        for token in set(_tokens(one.text)):
            readers.setdefault(token, []).append(one)
    returned = {token for text in results for token in _tokens(text)}
    kept, gone = [], set()
    for one in statements:
        items = readers.get(one.outs[0], []) if one.parts and one.outs[0] not in returned else []
        by_index = {item.index: item.outs[0] for item in items if item.source == one.outs[0]}
        if items and len(by_index) == len(items):
            one = replace(one, outs=[by_index.get(index, -1 - index) for index in range(one.parts)])
            gone |= {id(item) for item in items}
        if id(one) not in gone:
            kept.append(one)
    return kept


def _reshaped_once(statements: Sequence[_Statement]) -> list[_Statement]:
    """Without reshapes of what nothing but another reshape reads."""
    reads = Counter(token for one in statements for token in _tokens(one.text))
    made = {one.outs[0]: one for one in statements if _RESHAPE.fullmatch(one.text)}
    gone = set()
    for one in statements:
        found = _RESHAPE.fullmatch(one.text)
        before = made.get(int(found[1])) if found else None
        if before is not None and reads[before.outs[0]] == 1:
            source = _RESHAPE.fullmatch(before.text)
            assert source is not None
            one.text = one.text.replace(f"<{before.outs[0]}>", f"<{source[1]}>", 1)
            gone.add(id(before))
    return [one for one in statements if id(one) not in gone]


def _loops(statements: Sequence[_Statement]) -> list[_Statement]:
    """``for block in self.blocks: x = block(x)`` where all members of a list run one after the other."""
    reads = Counter(token for one in statements for token in _tokens(one.text))
    found: list[_Statement] = []
    position = 0
    while position < len(statements):
        first = statements[position]
        run = _run(statements[position:], reads)
        if first.calls is not None and run == first.calls.total > 1:
            last = statements[position + run - 1]
            found.append(_Statement(last.outs, f"<{_tokens(first.text)[0]}>", loop=first.calls.name))
        else:
            run = 1
            found.append(first)
        position += run
    return found


def _run(statements: Sequence[_Statement], reads: Mapping[int, int]) -> int:
    """How many of the first statements call the members of one list in order, each on what the one before returned."""
    first = statements[0].calls
    if first is None or first.index != 0:
        return 0
    for count in range(1, first.total):
        before, after = statements[count - 1], statements[count] if count < len(statements) else None
        follows = after is not None and after.calls == replace(first, index=count)
        if not follows or _tokens(after.text) != before.outs or reads[before.outs[0]] != 1:  # type: ignore[union-attr]
            return count
    return first.total


def _named(statements: Sequence[_Statement], live: dict[int, str], results: Sequence[str]) -> tuple[str, ...]:
    """Lines with variables, whose names are used again as soon as nothing reads them any more."""
    last: dict[int, int] = {}
    for number, one in enumerate(statements):
        last |= dict.fromkeys(_tokens(one.text), number)
    last |= {token: len(statements) for text in results for token in _tokens(text)}
    lines: list[str] = []

    def named(text: str) -> str:
        return _TOKEN.sub(lambda found: live[int(found[1])], text)

    for number, one in enumerate(statements):
        text = named(one.text)
        dying = [token for token in dict.fromkeys(_tokens(one.text)) if last.get(token) == number]
        free = [live.pop(token) for token in dying]
        for token in [token for token in live if token not in last]:
            free.append(live.pop(token))
        targets: list[str] = []
        for token in one.outs:
            name = "_" if token < 0 else free.pop(0) if free else _fresh({*live.values(), *targets})
            targets.append(name)
            if token >= 0:
                live[token] = name
        if one.loop:
            lines += [] if targets[0] == text else [f"{targets[0]} = {text}"]
            item = _member_name(one.loop)
            lines += [f"for {item} in {one.loop}:", f"    {targets[0]} = {item}({targets[0]})"]
        else:
            lines.append(f"{', '.join(targets)} = {text}")
    returned = ", ".join(map(named, results))
    if statements and not statements[-1].loop and lines[-1].startswith(f"{returned} = "):
        lines[-1] = lines[-1].replace(f"{returned} =", "return", 1)
    else:
        lines.append(f"return {returned}")
    return tuple(lines)


def _member_name(expression: str) -> str:
    name = re.findall(r"\w+", expression)[-1]
    single = name.removesuffix("s") if name.endswith("s") and not name.endswith("ss") else f"{name}_item"
    return single if not single[0].isdigit() and single not in _VARIABLES else "cell"


def _fresh(taken: set[str]) -> str:
    for name in _VARIABLES:
        if name not in taken:
            return name
    return next(name for i in range(len(taken) + 1) if (name := f"x{i}") not in taken)
