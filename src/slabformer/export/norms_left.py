"""What still normalises in a file: operators that do, and chains of others that amount to one.

left = norms_in(onnx_operators(path))     # {"LayerNormalization": 2, "decomposed norm": 1}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slabformer._extras import require

#: operators of ONNX, onnxruntime and OpenVINO that normalise
NORMS = {
    *("LayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
    *("LpNormalization", "MeanVarianceNormalization", "MVN", "SimplifiedLayerNormalization", "RMS"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "BatchNormInference", "NormalizeL2", "GroupNorm"),
    *("SkipGroupNorm", "EmbedLayerNormalization", "QLinearLayerNormalization", "LRN"),
}
DECOMPOSED = "decomposed norm"
#: a norm in other operators is a root, or a power, of a mean or sum over axes
ROOTS = {"Sqrt", "Rsqrt", "Pow", "Power"}
STATISTICS = {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"}
#: what may stand between the two: an epsilon, a constant factor, a number of axes, a dtype
BETWEEN = {"Add", "Mul", "Multiply", "Div", "Divide", "Reciprocal"}
SHAPED = {"Cast", "Convert", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Expand", "Broadcast"}
BOUNDS = {"Max", "Maximum", "Min", "Minimum", "Clip", "Clamp"}
BETWEEN |= SHAPED | BOUNDS


@dataclass(frozen=True)
class Operator:
    """One of a graph.

    Attributes:
        kind: As the format calls it.
        reads: Places of the operators that it reads, in the list that it stands in.
    """

    kind: str
    reads: tuple[int, ...] = ()


def norms_in(operators: Sequence[Operator]) -> dict[str, int]:
    """Of a graph's operators those that normalise, with how many there are.

    A root of a mean of squares counts as a :data:`DECOMPOSED` one: RMSNorm, LayerNorm and GroupNorm written by hand, or
    taken apart by an exporter, each have one. So does a division by a vector's length. A mean that is not rooted is
    pooling, a root of weights is a constant.
    """
    kinds = [each.kind for each in operators if each.kind in NORMS]
    kinds += [DECOMPOSED for each in operators if each.kind in ROOTS and _reaches(each, operators, STATISTICS, BETWEEN)]
    lengths = [each for each in operators if each.kind in ("Div", "Divide")]
    kinds += [DECOMPOSED for each in lengths if _reaches(each, operators, {"ReduceL2"}, SHAPED | BOUNDS)]
    return dict(Counter(kinds))


def norms_in_words(left: Mapping[str, int]) -> str:
    """What a report says of :func:`norms_in`."""
    return "no norm left" if not left else ", ".join(f"{count} {kind} left" for kind, count in left.items())


def onnx_operators(path: Path) -> list[Operator]:
    """Those of an ONNX file, of the functions and branches inside it too."""
    model: Any = require("onnx", extra="export").load(str(path), load_external_data=False)
    return [each for graph in (model.graph, *model.functions) for each in _of_graph(graph)]


def openvino_operators(graph: Any) -> list[Operator]:
    """Those of OpenVINO's own model."""
    nodes = graph.get_ordered_ops()
    places = {node.get_friendly_name(): place for place, node in enumerate(nodes)}
    return [
        Operator(
            node.get_type_name(), tuple(places[each.get_node().get_friendly_name()] for each in node.input_values())
        )
        for node in nodes
    ]


def _of_graph(graph: Any) -> list[Operator]:
    nodes = list(_nodes(graph))
    makers = {name: place for place, node in enumerate(nodes) for name in node.output}
    return [Operator(node.op_type, tuple(makers[name] for name in node.input if name in makers)) for node in nodes]


def _nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph or a function, and of the branches and loop bodies inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _nodes(inner)


def _reaches(
    operator: Operator, operators: Sequence[Operator], wanted: Collection[str], through: Collection[str]
) -> bool:
    """Whether what ``operator`` reads was made by one of ``wanted``, but for operators of ``through`` in between."""
    pending = list(operator.reads)
    while pending:
        each = operators[pending.pop()]
        if each.kind in wanted:
            return True
        if each.kind in through:
            pending += each.reads
    return False
