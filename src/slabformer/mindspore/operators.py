"""The table of operators: one row an operator of torch, and the MindSpore expression that computes the same.

Where MindSpore's own operator differs from torch's, or has no kernel on a CPU, the expression calls
:mod:`slabformer.mindspore.functions`. Sizes are those of the example, the batch's is left open.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from slabformer.mindspore.graph import ConversionError, refusal

aten = torch.ops.aten
#: what MindSpore calls a dtype
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool_",
}


@dataclass(frozen=True)
class Operation:
    """One operation of a graph, and how its operands are called where it is written.

    Attributes:
        node: The operation.
        name: Expression for a tensor: a variable, or ``self.weight``.
        sized: Expressions of tensors that hold the batch's size, for operators that must be told it.
    """

    node: Node
    name: Callable[[Node], str]
    sized: Callable[[], Sequence[tuple[Node, str]]]

    @property
    def x(self) -> str:
        """The first operand."""
        return self.text(self.node.args[0])

    @property
    def value(self) -> Tensor:
        """The result as the tracer saw it: shape and dtype."""
        return self.node.meta["val"]

    @property
    def source(self) -> Tensor:
        """The same of the first operand."""
        return self.node.args[0].meta["val"]  # type: ignore[union-attr]

    def arg(self, position: int, name: str = "", default: Any = None) -> Any:
        """An argument, as it stands in the graph."""
        return self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get(name, default)

    def text(self, value: Any) -> str:
        """An argument as an expression."""
        if isinstance(value, Node):
            known = value.meta.get("val")
            return self.size(known) if isinstance(known, (SymInt, int)) else self.name(value)
        if isinstance(value, SymInt):
            return self.size(value)
        if isinstance(value, (tuple, list)):
            inner = ", ".join(map(self.text, value))
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, torch.dtype):
            return self.dtype(value)
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        return repr(value)

    def dtype(self, dtype: torch.dtype) -> str:
        """A dtype as an expression."""
        if dtype not in DTYPES:
            raise self.refusal(f"MindSpore has no {dtype}")
        return f"mindspore.{DTYPES[dtype]}"

    def size(self, size: int | SymInt) -> str:
        """A size as an expression; one that follows from the batch's is read off a tensor."""
        if isinstance(size, int):
            return str(size)
        for node, name in self.sized():
            for axis, other in enumerate(node.meta["val"].shape):
                if isinstance(other, SymInt):
                    if str(other) == str(size):
                        return f"{name}.shape[{axis}]"
                    factor = _factor(size, other)
                    if factor is not None:
                        return f"{factor} * {name}.shape[{axis}]"
        raise self.refusal(f"the size {size} follows from the batch's in a way that cannot be written")

    def shape(self, value: Tensor | None = None) -> str:
        """The result's shape for a reshape: -1 where it follows from the batch's size."""
        sizes = list((self.value if value is None else value).shape)
        if sum(isinstance(size, SymInt) for size in sizes) > 1:
            return self.text(sizes)
        return self.text([-1 if isinstance(size, SymInt) else size for size in sizes])

    def axis(self, axis: int, ndim: int | None = None) -> int:
        """An axis counted from the front."""
        return axis % (self.source.ndim if ndim is None else ndim)

    def refusal(self, reason: str) -> ConversionError:
        """What is said of an operation that cannot be written."""
        return refusal(self.node, reason)


def _factor(size: SymInt, base: SymInt) -> int | None:
    """``k`` where ``size`` is ``k * base``."""
    small, large = (int(symbol.node.hint or 0) for symbol in (base, size))  # type: ignore[arg-type]
    if small and large and large % small == 0 and str(large // small * base) == str(size):
        return large // small
    return None


Write = Callable[[Operation], str]


@dataclass(frozen=True)
class Operator:
    """One row.

    Attributes:
        ops: Torch's operators.
        write: Expression of the result; raises :class:`ConversionError` for arguments without counterpart.
        example: A function of ``x``, ``(2, 4, 6)``, that runs it: its test.
    """

    ops: tuple[Any, ...]
    write: Write
    example: Callable[[Tensor], Any] | None = None


def _same(c: Operation) -> str:
    return c.x


def _reshaped(c: Operation) -> str:
    return c.x if c.value.shape == c.source.shape else f"ops.reshape({c.x}, {c.shape()})"


def _permuted(c: Operation) -> str:
    """Axes are found by moving a tensor whose sizes are all different."""
    probe = torch.empty(tuple(range(2, 2 + c.source.ndim)), device="meta")
    order = tuple(size - 2 for size in c.node.target(probe, *c.node.args[1:], **c.node.kwargs).shape)  # type: ignore[operator]
    return f"ops.transpose({c.x}, {order})"


def _cast(c: Operation) -> str:
    return c.x if c.value.dtype == c.source.dtype else f"ops.cast({c.x}, {c.dtype(c.value.dtype)})"


def _expanded(c: Operation) -> str:
    if c.value.shape == c.source.shape:
        return c.x
    return f"ops.broadcast_to({c.x}, {c.text(list(c.value.shape))})"


def _sliced(c: Operation) -> str:
    axis, start, end, step = c.axis(c.arg(1, "dim", 0)), c.arg(2, "start"), c.arg(3, "end"), c.arg(4, "step", 1)
    length = c.source.shape[axis]
    if isinstance(length, SymInt):
        if start in (None, 0) and (end is None or end >= 2**62) and step == 1:
            return c.x
        raise c.refusal("a part of the batch is taken")
    first, last, by = slice(start, end, step).indices(length)
    if (first, last, by) == (0, length, 1):
        return c.x
    inner = f"{first or ''}:{'' if last == length else last}" + (f":{by}" if by != 1 else "")
    return f"{c.x}[{':, ' * axis}{inner}]"


def _selected(c: Operation) -> str:
    axis, index = c.axis(c.arg(1, "dim", 0)), c.arg(2, "index")
    return f"{c.x}[{':, ' * axis}{index}]"


def _narrowed(c: Operation) -> str:
    axis, start, length = c.axis(c.arg(1)), c.arg(2), c.arg(3)
    return f"{c.x}[{':, ' * axis}{start}:{start + length}]"


def _parts(c: Operation) -> str:
    """Every way to split: all of them by sizes."""
    parts: Any = c.value
    axis = c.axis(c.arg(2, "dim", 0))
    sizes = [part.shape[axis] for part in parts]
    if any(isinstance(size, SymInt) for size in sizes):
        raise c.refusal("the batch is split")
    return f"ops.split({c.x}, {c.text(sizes) if len(set(sizes)) > 1 else sizes[0]}, {axis})"


def _unbound(c: Operation) -> str:
    return f"ops.unbind({c.x}, {c.axis(c.arg(1, 'dim', 0))})"


def _item(c: Operation) -> str:
    return f"{c.x}[{c.arg(1)}]"


def _joined(name: str) -> Write:
    def write(c: Operation) -> str:
        return f"ops.{name}({c.text(c.arg(0))}, {c.axis(c.arg(1, 'dim', 0), c.value.ndim)})"

    return write


def _indexed(c: Operation) -> str:
    indices = c.arg(1)
    given = [axis for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or indices[given[0]].meta["val"].dtype in (torch.bool, torch.uint8):
        raise c.refusal("only one axis can be picked from, by whole numbers")
    return f"ops.gather({c.x}, {c.text(indices[given[0]])}, {given[0]})"


def _index_selected(c: Operation) -> str:
    return f"ops.gather({c.x}, {c.text(c.arg(2))}, {c.axis(c.arg(1))})"


def _looked_up(c: Operation) -> str:
    return f"ops.gather({c.x}, {c.text(c.arg(1))}, 0)"


def _rolled(c: Operation) -> str:
    shifts, axes = c.arg(1), c.arg(2, "dims", [])
    if not axes:
        raise c.refusal("it rolls over all axes at once")
    return f"functions.roll({c.x}, {c.text(shifts)}, {c.text([c.axis(a) for a in axes])})"


def _padded(c: Operation) -> str:
    pads, mode, value = c.arg(1), c.arg(2, "mode", "constant"), c.arg(3, "value")
    if c.node.target is aten.constant_pad_nd.default:
        mode, value = "constant", c.arg(2, "value", 0)
    if mode != "constant" or any(pad < 0 for pad in pads):
        raise c.refusal(f"it pads with mode {mode!r} by {list(pads)}")
    return c.x if not any(pads) else f"functions.pad({c.x}, {c.text(pads)}, {float(value or 0)!r})"


def _infix(symbol: str) -> Write:
    def write(c: Operation) -> str:
        if c.node.kwargs.get("alpha", 1) != 1:
            return f"{c.x} {symbol} {c.node.kwargs['alpha']!r} * {c.text(c.arg(1))}"
        if c.node.kwargs.get("rounding_mode"):
            raise c.refusal("it rounds")
        return f"{c.x} {symbol} {c.text(c.arg(1))}"

    return write


def _subtracted_from(c: Operation) -> str:
    return f"{c.text(c.arg(1))} - {c.x}"


def _called(name: str) -> Write:
    """``name`` of the first operand alone."""
    return lambda c: f"{name}({c.x})"


def _called_with(name: str, *settings: tuple[int, str, Any]) -> Write:
    """``name`` of the first operand and some arguments: position, torch's name, default."""

    def write(c: Operation) -> str:
        return f"{name}({', '.join([c.x, *(c.text(c.arg(*setting)) for setting in settings)])})"

    return write


def _two(name: str) -> Write:
    return lambda c: f"{name}({c.x}, {c.text(c.arg(1))})"


def _clamped(c: Operation) -> str:
    low, high = c.arg(1, "min"), c.arg(2, "max")
    if c.node.target is aten.clamp_max.default:
        low, high = None, c.arg(1)
    return f"ops.clamp({c.x}, {c.text(low)}, {c.text(high)})"


def _reduced(name: str) -> Write:
    def write(c: Operation) -> str:
        axes = c.arg(1, "dim")
        axes = list(range(c.source.ndim)) if axes in (None, []) else [axes] if isinstance(axes, int) else axes
        x = c.x
        wanted: Any = c.node.kwargs.get("dtype")
        if wanted is not None and wanted != c.source.dtype:
            x = f"ops.cast({x}, {c.dtype(wanted)})"
        return f"{name}({x}, {c.text([c.axis(a) for a in axes])}, {bool(c.arg(2, 'keepdim', False))})"

    return write


def _varied(c: Operation) -> str:
    axes, keepdim = c.arg(1, "dim"), c.node.kwargs.get("keepdim", False)
    correction = c.node.kwargs.get("correction", 1)
    axes = axes or list(range(c.source.ndim))
    return f"functions.var({c.x}, {c.text([c.axis(a) for a in axes])}, {correction}, {bool(keepdim)})"


def _normed(c: Operation) -> str:
    order, axes, keepdim = c.arg(1, "ord", 2), c.arg(2, "dim"), c.arg(3, "keepdim", False)
    if order != 2 or not axes:
        raise c.refusal(f"a norm of order {order} over {axes or 'all axes'}")
    return f"functions.vector_norm({c.x}, {c.text([c.axis(a) for a in axes])}, {bool(keepdim)})"


def _gelu(c: Operation) -> str:
    return f"functions.gelu({c.x})" if c.arg(1, "approximate", "none") == "none" else f"functions.gelu_tanh({c.x})"


def _softmax(name: str) -> Write:
    def write(c: Operation) -> str:
        return f"{name}({_in_dtype(c, c.arg(2, 'dtype'))}, {c.axis(c.arg(1))})"

    return write


def _in_dtype(c: Operation, dtype: torch.dtype | None) -> str:
    return c.x if dtype is None or dtype == c.source.dtype else f"ops.cast({c.x}, {c.dtype(dtype)})"


def _linear(c: Operation) -> str:
    return f"functions.linear({', '.join(c.text(arg) for arg in c.node.args[:3] if arg is not None)})"


def _convolved(c: Operation) -> str:
    stride, padding, dilation, groups = c.arg(3, "", [1]), c.arg(4, "", [0]), c.arg(5, "", [1]), c.arg(6, "", 1)
    if isinstance(padding, str):
        raise c.refusal(f"padding {padding!r}")
    pairs = (c.text([*p, *p][:2] if len(p) == 1 else list(p)) for p in (stride, padding, dilation))
    return f"functions.conv2d({c.x}, {c.text(c.arg(1))}, {c.text(c.arg(2))}, {', '.join(pairs)}, {groups})"


def _layer_normed(c: Operation) -> str:
    shape, weight, bias, eps = c.arg(1), c.arg(2), c.arg(3), c.arg(4, "eps", 1e-5)
    if len(shape) != 1:
        raise c.refusal("it runs over more than the last axis")
    return f"functions.layer_norm({c.x}, {c.text(weight)}, {c.text(bias)}, {eps!r})"


def _rms_normed(c: Operation) -> str:
    shape, weight, eps = c.arg(1), c.arg(2), c.arg(3)
    if len(shape) != 1:
        raise c.refusal("it runs over more than the last axis")
    eps = torch.finfo(c.source.dtype).eps if eps is None else eps
    return f"functions.rms_norm({c.x}, {c.text(weight)}, {eps!r})"


def _attended(c: Operation) -> str:
    mask, dropout, causal = c.arg(3, "attn_mask"), c.arg(4, "dropout_p", 0.0), c.arg(5, "is_causal", False)
    if dropout or causal or c.node.kwargs.get("enable_gqa"):
        raise c.refusal("causal attention, grouped queries and dropout of attention weights")
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        raise c.refusal("a boolean mask")
    scale = c.node.kwargs.get("scale")
    scale = float(c.source.shape[-1]) ** -0.5 if scale is None else scale
    return f"functions.attention({c.x}, {c.text(c.arg(1))}, {c.text(c.arg(2))}, {c.text(mask)}, {scale!r})"


def _added_product(c: Operation) -> str:
    return f"{c.x} + {c.node.kwargs.get('value', 1)!r} * {c.text(c.arg(1))} * {c.text(c.arg(2))}".replace(" 1 *", "", 1)


def _matrix_sum(c: Operation) -> str:
    if c.node.kwargs.get("beta", 1) != 1 or c.node.kwargs.get("alpha", 1) != 1:
        raise c.refusal("beta and alpha")
    return f"{c.x} + ops.matmul({c.text(c.arg(1))}, {c.text(c.arg(2))})"


def _pooled(c: Operation) -> str:
    size = c.arg(1)
    height, width = c.source.shape[-2:]
    if list(size) == [1, 1]:
        return f"ops.mean({c.x}, (2, 3), True)"
    if list(size) == [height, width]:
        return c.x
    if height % size[0] or width % size[1]:
        raise c.refusal(f"{height}x{width} to {size[0]}x{size[1]}, which windows of one size do not tile")
    return f"functions.mean_pool({c.x}, {(height // size[0], width // size[1])})"


def _average_pooled(c: Operation) -> str:
    kernel = c.arg(1)
    stride, padding = c.arg(2, "stride", None) or kernel, c.arg(3, "padding", [0, 0])
    kernel, stride = ([*p, *p][:2] if len(p) == 1 else list(p) for p in (kernel, stride))
    if any(padding) or c.arg(4, "ceil_mode", False) or kernel != stride or c.arg(6, "divisor_override"):
        raise c.refusal("padding, overlapping windows and ceil_mode")
    height, width = c.source.shape[-2:]
    if height % kernel[0] or width % kernel[1]:
        raise c.refusal(f"windows of {kernel[0]}x{kernel[1]} do not tile {height}x{width}")
    return f"functions.mean_pool({c.x}, {tuple(kernel)})"


def _max_pooled(c: Operation) -> str:
    kernel, padding = c.arg(1), c.arg(3, "padding", [0, 0])
    stride = c.arg(2, "stride", None) or kernel
    if c.arg(5, "ceil_mode", False) or any(d != 1 for d in c.arg(4, "dilation", [1])):
        raise c.refusal("dilation and ceil_mode")
    pairs = (c.text([*p, *p][:2] if len(p) == 1 else list(p)) for p in (kernel, stride, padding))
    return f"functions.max_pool({c.x}, {', '.join(pairs)})"


def _repeated(c: Operation) -> str:
    old, new = c.source.shape[-2:], c.value.shape[-2:]
    if new[0] % old[0] or new[1] % old[1]:
        raise c.refusal(f"{old[0]}x{old[1]} to {new[0]}x{new[1]}, which is no multiple")
    return f"functions.resize_nearest({c.x}, {tuple(new)})"


def _batch_normed(c: Operation) -> str:
    weight, bias, mean, var, training, eps = (c.arg(i) for i in (1, 2, 3, 4, 5, 7))
    if training or mean is None:
        raise c.refusal("it runs by the batch's statistics")
    return f"functions.batch_norm({', '.join([c.x, *map(c.text, (weight, bias, mean, var))])}, {eps!r})"


def _filled(c: Operation) -> str:
    return f"ops.masked_fill({c.x}, {c.text(c.arg(1))}, {c.text(c.arg(2))})"


def _chosen(c: Operation) -> str:
    return f"ops.where({c.x}, {c.text(c.arg(1))}, {c.text(c.arg(2))})"


def _full(value: float | None) -> Write:
    def write(c: Operation) -> str:
        shape = c.text(list(c.value.shape))
        fill = c.arg(2 if c.node.target is aten.new_full.default else 1, "fill_value") if value is None else value
        return f"ops.full({shape}, {c.text(fill)}, dtype={c.dtype(c.value.dtype)})"

    return write


def _group_normed(c: Operation) -> str:
    groups, weight, bias, eps = c.arg(1), c.arg(2), c.arg(3), c.arg(4, default=1e-5)
    return f"functions.group_norm({c.x}, {groups}, {c.text(weight)}, {c.text(bias)}, {eps!r})"


def _counted(c: Operation) -> str:
    if any(isinstance(arg, Node) for arg in c.node.args):
        raise c.refusal("it counts to what depends on the batch")
    start, end, step = (0, *c.node.args, 1) if len(c.node.args) == 1 else (*c.node.args, 1)[:3]
    return f"ops.arange({start}, {end}, {step}, dtype={c.dtype(c.value.dtype)})"


#: every operator that can be written; a new one is one row, and its example becomes its test
OPERATORS: list[Operator] = [
    Operator(
        (
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.view_as.default,
            aten.reshape_as.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.ravel.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.squeeze.default,
            aten.unsqueeze.default,
        ),
        _reshaped,
        lambda x: x.view(2, 2, 2, 6).flatten(1, 2).unflatten(-1, (3, 2)).unsqueeze(1).squeeze(1).reshape(-1, 24),
    ),
    Operator(
        (
            aten.permute.default,
            aten.transpose.int,
            aten.swapaxes.default,
            aten.t.default,
            aten.mT.default,
            aten.numpy_T.default,
            aten.movedim.int,
            aten.movedim.intlist,
        ),
        _permuted,
        lambda x: x.permute(0, 2, 1).transpose(1, 2).mT.movedim(1, -1),
    ),
    Operator(
        (
            aten.contiguous.default,
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
            aten.lift_fresh_copy.default,
        ),
        _same,
        lambda x: x.clone().mT.contiguous(),
    ),
    Operator((aten.dropout.default, aten.feature_dropout.default), _same),
    Operator(
        (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten._to_copy.default,
            aten.type_as.default,
        ),
        _cast,
        lambda x: x.to(torch.float64).sum(-1).float(),
    ),
    Operator(
        (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default),
        _expanded,
        lambda x: x[:, :1].expand(-1, 3, -1) + x[:, None].expand(-1, 2, -1, -1)[:, 0, :3],
    ),
    Operator((aten.slice.Tensor,), _sliced, lambda x: x[:, 1::2, 2:5]),
    Operator((aten.select.int,), _selected, lambda x: x[:, 0] + x[:, -1]),
    Operator((aten.narrow.default,), _narrowed, lambda x: x.narrow(1, 1, 2)),
    Operator(
        (
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.chunk.default,
            aten.tensor_split.sections,
        ),
        _parts,
        lambda x: x.chunk(3, -1)[2] + x.split([1, 3], 1)[1][..., :2].sum(1, keepdim=True),
    ),
    Operator((aten.unbind.int,), _unbound, lambda x: x.unflatten(-1, (2, 3)).unbind(2)[1]),
    Operator((operator.getitem,), _item, lambda x: x.chunk(2, 1)[1]),
    Operator((aten.cat.default, aten.concat.default), _joined("cat"), lambda x: torch.cat([x, x[:, :1]], 1)),
    Operator((aten.stack.default,), _joined("stack"), lambda x: torch.stack([x, x], -2)),
    Operator(
        (aten.repeat.default, aten.tile.default),
        lambda c: f"ops.tile({c.x}, {c.text(c.arg(1))})",
        lambda x: x.repeat(1, 2, 3),
    ),
    Operator((aten.roll.default,), _rolled, lambda x: x.roll((1, -2), (1, 2))),
    Operator((aten.flip.default,), lambda c: f"ops.flip({c.x}, {c.text(c.arg(1))})", lambda x: x.flip(1)),
    Operator((aten.index.Tensor,), _indexed, lambda x: x[:, torch.tensor([[3, 0], [0, 1]])]),
    Operator((aten.index_select.default,), _index_selected, lambda x: x.index_select(1, torch.tensor([2, 1]))),
    Operator(
        (aten.embedding.default,), _looked_up, lambda x: x @ torch.nn.functional.embedding(torch.arange(6), x[0].T)
    ),
    Operator(
        (aten.pad.default, aten.constant_pad_nd.default),
        _padded,
        lambda x: torch.nn.functional.pad(x, (1, 2, 0, 1)),
    ),
    Operator((aten.add.Tensor, aten.add.Scalar), _infix("+"), lambda x: x + x[:, :1] + 2.0),
    Operator((aten.sub.Tensor, aten.sub.Scalar), _infix("-"), lambda x: x - x[:, :1] - 2.0),
    Operator((aten.rsub.Scalar, aten.rsub.Tensor), _subtracted_from, lambda x: 1.0 - x),
    Operator((aten.mul.Tensor, aten.mul.Scalar), _infix("*"), lambda x: x * x[:, :1] * 0.3),
    Operator((aten.div.Tensor, aten.div.Scalar), _infix("/"), lambda x: x / (x[:, :1] ** 2 + 1.0) / 3.0),
    Operator((aten.pow.Tensor_Scalar,), _infix("**"), lambda x: x**2),
    Operator((aten.neg.default,), _called("ops.neg"), lambda x: -x),
    Operator((aten.exp.default,), _called("ops.exp"), lambda x: x.exp()),
    Operator((aten.log.default,), _called("ops.log"), lambda x: (x**2 + 1).log()),
    Operator((aten.sqrt.default,), _called("ops.sqrt"), lambda x: (x**2 + 1).sqrt()),
    Operator((aten.rsqrt.default,), _called("ops.rsqrt"), lambda x: (x**2 + 1).rsqrt()),
    Operator((aten.reciprocal.default,), _called("ops.reciprocal"), lambda x: (x**2 + 1).reciprocal()),
    Operator((aten.abs.default,), _called("ops.abs"), lambda x: x.abs()),
    Operator((aten.sin.default,), _called("ops.sin"), lambda x: x.sin()),
    Operator((aten.cos.default,), _called("ops.cos"), lambda x: x.cos()),
    Operator((aten.maximum.default,), _two("ops.maximum"), lambda x: torch.maximum(x, x.flip(1))),
    Operator((aten.minimum.default,), _two("ops.minimum"), lambda x: torch.minimum(x, x.flip(1))),
    Operator(
        (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
        _clamped,
        lambda x: x.clamp(-0.5, 0.5) + x.clamp_min(0.1) + x.clamp_max(0.2),
    ),
    Operator((aten.relu.default,), _called("ops.relu"), lambda x: x.relu()),
    Operator((aten.relu6.default,), _called("ops.relu6"), lambda x: torch.nn.functional.relu6(5 * x)),
    Operator(
        (aten.gelu.default,),
        _gelu,
        lambda x: torch.nn.functional.gelu(x) + torch.nn.functional.gelu(x, approximate="tanh"),
    ),
    Operator((aten.silu.default,), _called("functions.silu"), lambda x: torch.nn.functional.silu(x)),
    Operator((aten.sigmoid.default,), _called("ops.sigmoid"), lambda x: x.sigmoid()),
    Operator((aten.tanh.default,), _called("functions.tanh"), lambda x: x.tanh()),
    Operator((aten.erf.default,), _called("ops.erf"), lambda x: x.erf()),
    Operator((aten.hardswish.default,), _called("functions.hardswish"), lambda x: torch.nn.functional.hardswish(4 * x)),
    Operator(
        (aten.hardsigmoid.default,), _called("functions.hardsigmoid"), lambda x: torch.nn.functional.hardsigmoid(4 * x)
    ),
    Operator(
        (aten.leaky_relu.default,),
        _called_with("functions.leaky_relu", (1, "negative_slope", 0.01)),
        lambda x: torch.nn.functional.leaky_relu(x, 0.2),
    ),
    Operator((aten.softmax.int,), _softmax("ops.softmax"), lambda x: x.softmax(-1)),
    Operator((aten.log_softmax.int,), _softmax("ops.log_softmax"), lambda x: x.log_softmax(1)),
    Operator(
        (aten.mean.dim, aten.mean.default), _reduced("ops.mean"), lambda x: x.mean(1) + x.mean((1, 2), True)[:, 0]
    ),
    Operator(
        (aten.sum.dim_IntList, aten.sum.default), _reduced("ops.sum"), lambda x: x.sum(-1, keepdim=True) + x.sum()
    ),
    Operator((aten.amax.default,), _reduced("ops.amax"), lambda x: x.amax(-1, keepdim=True)),
    Operator((aten.amin.default,), _reduced("ops.amin"), lambda x: x.amin(1)),
    Operator(
        (aten.var.correction, aten.var.dim),
        _varied,
        lambda x: x.var(1, correction=0) + x.var((1, 2), correction=1, keepdim=True)[:, 0],
    ),
    Operator((aten.linalg_vector_norm.default,), _normed, lambda x: torch.nn.functional.normalize(x, dim=-1)),
    Operator((aten.linear.default,), _linear, lambda x: torch.nn.functional.linear(x, x[0], x[0, :, 0])),
    Operator(
        (aten.conv2d.default,),
        _convolved,
        lambda x: torch.nn.functional.conv2d(x[:, None], x[0, :3, :3].reshape(1, 1, 3, 3), padding=1, stride=2),
    ),
    Operator(
        (aten.layer_norm.default,), _layer_normed, lambda x: torch.nn.functional.layer_norm(x, (6,), x[0, 0], x[0, 1])
    ),
    Operator(
        (aten.group_norm.default,),
        _group_normed,
        lambda x: torch.nn.functional.group_norm(x, 2, x[0, :, 0], x[0, :, 1]),
    ),
    Operator(
        (aten.batch_norm.default,),
        _batch_normed,
        lambda x: torch.nn.functional.batch_norm(x, x[0, :, 0], x[0, :, 1] ** 2, x[0, :, 2], x[0, :, 3]),
    ),
    Operator((aten.rms_norm.default,), _rms_normed, lambda x: torch.nn.functional.rms_norm(x, (6,), x[0, 0], 1e-5)),
    Operator(
        (aten.matmul.default, aten.mm.default, aten.bmm.default),
        _two("ops.matmul"),
        lambda x: x @ x.mT + torch.bmm(x, x.mT),
    ),
    Operator((aten.addmm.default, aten.baddbmm.default), _matrix_sum, lambda x: torch.baddbmm(x[..., :4], x, x.mT)),
    Operator((aten.addcmul.default,), _added_product, lambda x: torch.addcmul(x, x, x[:, :1], value=-0.5)),
    Operator(
        (aten.scaled_dot_product_attention.default,),
        _attended,
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x.flip(1), x, x @ x.mT),
    ),
    Operator(
        (aten.adaptive_avg_pool2d.default,),
        _pooled,
        lambda x: torch.nn.functional.adaptive_avg_pool2d(x[:, None], (2, 3)),
    ),
    Operator((aten.avg_pool2d.default,), _average_pooled, lambda x: torch.nn.functional.avg_pool2d(x[:, None], 2)),
    Operator((aten.max_pool2d.default,), _max_pooled, lambda x: torch.nn.functional.max_pool2d(x[:, None], 3, 2, 1)),
    Operator(
        (aten.upsample_nearest2d.vec,),
        _repeated,
        lambda x: torch.nn.functional.interpolate(x[:, None], scale_factor=2),
    ),
    Operator((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _filled, lambda x: x.masked_fill(x > 0, 0.5)),
    Operator((aten.where.self,), _chosen, lambda x: torch.where(x > 0, x, -2 * x)),
    Operator((aten.gt.Scalar, aten.gt.Tensor), _infix(">"), lambda x: (x > 0.1).float()),
    Operator((aten.ge.Scalar, aten.ge.Tensor), _infix(">="), lambda x: (x >= 0.1).float()),
    Operator((aten.lt.Scalar, aten.lt.Tensor), _infix("<"), lambda x: (x < 0.1).float()),
    Operator((aten.le.Scalar, aten.le.Tensor), _infix("<="), lambda x: (x <= 0.1).float()),
    Operator((aten.eq.Scalar, aten.eq.Tensor), _infix("=="), lambda x: (x == x[:, :1]).float()),
    Operator((aten.ne.Scalar, aten.ne.Tensor), _infix("!="), lambda x: (x != x[:, :1]).float()),
    Operator((aten.arange.default,), _counted, lambda x: x * torch.arange(6)),
    Operator(
        (aten.arange.start, aten.arange.start_step),
        _counted,
        lambda x: x * torch.arange(2, 8) + torch.arange(1, 13, 2),
    ),
    Operator(
        (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default),
        _full(0),
        lambda x: x + torch.zeros_like(x),
    ),
    Operator(
        (aten.ones.default, aten.ones_like.default, aten.new_ones.default), _full(1), lambda x: x + x.new_ones(4, 1)
    ),
    Operator(
        (aten.full.default, aten.full_like.default, aten.new_full.default),
        _full(None),
        lambda x: x + torch.full_like(x, 2.0),
    ),
]
WRITES: dict[Any, Write] = {op: row.write for row in OPERATORS for op in row.ops}


def write(operation: Operation) -> str:
    """The expression that computes an operation.

    Raises:
        ConversionError: If the table has no row for it, or its arguments have no counterpart.
    """
    found = WRITES.get(operation.node.target)
    if found is None:
        raise operation.refusal("this operator has no counterpart yet")
    return found(operation)
