"""Random module graphs over maps ``(B, H, W, C)``, for tests of fuse: every value has the shape of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from slabformer.nn import Affine, PadTokens, PRepBN, RepBN

C = 6
#: traced, and one at which windows of 3 must be padded
GRID, PADDED_GRID, WINDOW = 6, 4, 3


class Step(NamedTuple):
    """One value: what computes it, from which values back, in which variant, with an earlier step's module or not."""

    kind: str
    back: int = 0
    other: int = 0
    variant: int = 0
    shared: bool = False


def steps_of(*kinds: str) -> st.SearchStrategy[Step]:
    near = st.sampled_from([0, 0, 0, 0, 0, 1, 2])
    shared = st.sampled_from([False] * 7 + [True])
    return st.builds(Step, st.sampled_from(kinds), near, st.integers(0, 3), st.integers(0, 7), shared)


def straight(*kinds: str) -> st.SearchStrategy[Step]:
    """Steps that read the value before them, with modules of their own."""
    return st.builds(Step, st.sampled_from(kinds), variant=st.integers(0, 7))


def beside(*kinds: str) -> st.SearchStrategy[Step]:
    """Steps that read what the value before them was made of."""
    return st.builds(Step, st.sampled_from(kinds), st.just(1), variant=st.integers(0, 7))


def added_to(steps_back: int) -> st.SearchStrategy[Step]:
    """The sum with an earlier value: the end of a residual branch."""
    return st.just(Step("join", other=steps_back, variant=1))


ALL = (
    *("norm", "linear", "conv", "move", "pad", "join", "tanh", "inplace", "fill", "pool", "packed", "scale"),
    *("raw", "table", "class"),
)
#: a norm before a module or behind one, with something in between: most graphs hold a fold
PIECES: st.SearchStrategy[tuple[Step, ...]] = st.one_of(
    st.tuples(steps_of("norm"), steps_of("move", "move", "pad", "join"), steps_of("linear", "conv")),
    st.tuples(steps_of("linear", "conv"), steps_of("move"), steps_of("norm"), steps_of("tanh", "join")),
    st.tuples(steps_of("norm"), steps_of("linear", "conv", "norm", "packed")),
    st.tuples(steps_of("linear", "conv"), steps_of("norm"), steps_of("tanh", "inplace", "join")),
    st.tuples(steps_of("norm"), steps_of("fill", "pool", "pad"), steps_of("linear", "packed")),
    # residual branches whose norm stands in front of padding
    st.tuples(straight("norm"), straight("pad", "fill"), straight("linear", "packed"), straight("linear"), added_to(4)),
    st.tuples(straight("norm"), straight("conv"), straight("tanh"), straight("linear"), straight("move"), added_to(5)),
    st.tuples(straight("norm"), straight("pad", "pool"), straight("linear"), steps_of("linear", "norm"), added_to(4)),
    # sums of layers, tables and parameters in front of a norm
    st.tuples(
        steps_of("linear", "conv", "table", "raw", "packed"),
        steps_of("raw", "table", "class", "move", "fill"),
        steps_of("norm"),
        steps_of("tanh", "inplace", "linear"),
    ),
    st.tuples(
        straight("linear", "table", "raw"),
        beside("linear", "conv", "raw", "table"),
        added_to(1),
        steps_of("raw", "class", "move", "pad"),
        straight("norm"),
        steps_of("tanh", "join"),
    ),
    st.tuples(steps_of(*ALL)),
)
NORMS: tuple[Callable[[int], nn.Module], ...] = (RepBN, PRepBN, Affine, nn.BatchNorm1d)
MOVES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.roll((1, -1), (1, 2)) * 0.5,
    lambda x: x.unflatten(2, (2, -1)).unflatten(1, (2, -1)).permute(0, 1, 3, 2, 4, 5).reshape(x.shape),
    lambda x: x.unflatten(-1, (2, 3)).transpose(-1, -2).flatten(-2),
    lambda x: x.transpose(1, 2).contiguous(),
    lambda x: torch.stack(x.unflatten(-1, (2, 3)).unbind(-2)[::-1], -2).flatten(-2),
    lambda x: torch.cat([x[:, 0::2], x[:, 1::2]], 1),
    lambda x: torch.cat(x.chunk(3, -1)[::-1], -1),
    lambda x: x.mean((1, 2), keepdim=True).expand_as(x),
)


class Conv(nn.Conv2d):
    """A convolution over tokens on a grid; unpadded maps are repeated to their old size."""

    def __init__(self, variant: int) -> None:
        groups, (kernel, padding) = (1, 2, 3, 6)[variant % 4], ((1, 0), (2, 0), (3, 1), (3, 0))[variant % 3]
        super().__init__(C, C, kernel, padding=padding, groups=groups, bias=variant != 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return maps.repeat(1, 2, 2, 1)[:, : x.shape[1], : x.shape[2]].contiguous()


class Packed(nn.Linear):
    """Some rows of a weight that other steps may share."""

    def __init__(self, variant: int) -> None:
        super().__init__(C, 3 * C, bias=variant != 1)

    def rows(self, x: Tensor, number: int) -> Tensor:
        bias = None if self.bias is None else self.bias.split(C)[number]
        return F.linear(x, self.weight.split(C)[number], bias)


def module_of(step: Step) -> nn.Module:
    if step.kind == "norm":
        return NORMS[step.variant % 4](C)
    if step.kind in ("join", "linear"):
        num_in = 2 * C if step.kind == "join" else C
        return nn.Linear(num_in, C, bias=step.variant != 1)
    made = {"conv": Conv, "packed": Packed, "fill": lambda _: PadTokens(C), "scale": lambda _: Scale()}
    made |= {"raw": Raw, "table": Table, "class": lambda _: ClassTokens()}
    return made.get(step.kind, lambda _: nn.Identity())(step.variant)


class Scale(nn.Module):
    """LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Raw(nn.Module):
    """A parameter of its own, added to the value or in its stead: a vector, a map, one resampled, two halves."""

    SHAPES = ((C,), (1, GRID, GRID, C), (1, 3, 3, C), (C // 2,))

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.variant, shape = variant, self.SHAPES[variant % 4]
        self.one, self.two = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        ways: tuple[Callable[[], Tensor], ...] = (
            lambda: self.one,
            lambda: self.one[:, : x.shape[1], : x.shape[2]],
            lambda: F.interpolate(self.one.permute(0, 3, 1, 2), x.shape[1:3], mode="bilinear").permute(0, 2, 3, 1),
            lambda: torch.cat([self.one, self.two * 1], -1),
        )
        values = ways[self.variant % 4]()
        return values.expand(x.shape) if self.variant < 4 else x + values


class Table(nn.Embedding):
    """Rows of a table, picked by place or by the signs of the input, added to the value or in its stead."""

    def __init__(self, variant: int) -> None:
        super().__init__(4, C)
        self.variant = variant

    def forward(self, x: Tensor, signs: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        places = torch.arange(H)[:, None] % 2 + 2 * (torch.arange(W) % 2)
        rows = super().forward(places if self.variant % 2 else (signs[..., 0] > 0) + 2 * (signs[..., 1] > 0))
        rows = rows * 2 if self.variant % 3 else rows
        return rows.expand(x.shape) if self.variant < 4 else x + rows


class ClassTokens(nn.Module):
    """A parameter in place of the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 1, C))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), 1, x.shape[2], C), x[:, 1:]], 1)


def window_pads(x: Tensor) -> tuple[int, int]:
    return -x.shape[1] % WINDOW, -x.shape[2] % WINDOW


class RandomNet(nn.Module):
    """Values are numbered as they come; each step reads earlier ones, and the last two are returned."""

    def __init__(self, steps: list[Step], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.children_of = steps, nn.ModuleList()
        for number, step in enumerate(steps):
            earlier = [self.children_of[i] for i in range(number) if steps[i].kind == step.kind]
            module = earlier[step.variant % len(earlier)] if step.shared and earlier else module_of(step)
            if step.kind == "linear" and step.variant == 7 and earlier:
                module.weight = earlier[0].weight
            self.children_of.append(module)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x.clone()]
        for step, module in zip(self.steps, self.children_of, strict=True):
            one, other = (values[-1 - back % len(values)] for back in (step.back, step.other))
            values.append(module(one, values[0]) if step.kind == "table" else self.value(step, module, one, other))
        return values[-1], values[-2].mean((1, 2))

    @staticmethod
    def value(step: Step, module: nn.Module, x: Tensor, other: Tensor) -> Tensor:
        if step.kind == "norm":
            return module(x.reshape(-1, C)).view(x.shape)
        if step.kind == "packed":
            return module.rows(x, step.variant % 3)
        if step.kind == "move":
            return MOVES[step.variant](x.contiguous())
        if step.kind in ("pad", "fill"):
            pad_h, pad_w = window_pads(x)
            y = module(x, pad_h, pad_w) if step.kind == "fill" else F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
            return y.roll((1, 1), (1, 2))[:, : x.shape[1], : x.shape[2]]
        if step.kind == "pool":
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, padding=0 if step.variant % 2 else 1)
            return F.interpolate(pooled, size=x.shape[1:3]).permute(0, 2, 3, 1)
        if step.kind == "join":
            ways = (module(torch.cat([x, other], -1)), x + other, torch.cat([x[:, :2], other[:, 2:]], 1))
            return ways[step.variant % 3]
        if step.kind in ("inplace", "tanh"):
            # a parameter that was expanded is no memory to write to
            return x.contiguous().mul_(0.9) if step.kind == "inplace" else torch.tanh(x)
        return module(x)
