"""Random module graphs: whatever fuse decides, the outputs stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusing import fused, ready, tokens
from slabformer.nn import Affine, PRepBN, RepBN

C, GRID = 6, 4


class Step(NamedTuple):
    """One value: what computes it, from which values back, in which variant, with an earlier step's module or not."""

    kind: str
    back: int
    other: int
    variant: int
    shared: bool


def steps_of(*kinds: str) -> st.SearchStrategy[Step]:
    near = st.sampled_from([0, 0, 0, 0, 0, 1, 2])
    shared = st.sampled_from([False] * 7 + [True])
    return st.builds(Step, st.sampled_from(kinds), near, st.integers(0, 3), st.integers(0, 7), shared)


#: a norm before a module or behind one, with something in between: most graphs hold a fold
PIECES = st.one_of(
    st.tuples(steps_of("norm"), steps_of("move", "move", "pad", "join"), steps_of("linear", "conv")),
    st.tuples(steps_of("linear", "conv"), steps_of("move"), steps_of("norm"), steps_of("tanh", "join")),
    st.tuples(steps_of("norm"), steps_of("linear", "conv", "norm")),
    st.tuples(steps_of("linear", "conv"), steps_of("norm"), steps_of("tanh", "inplace", "join")),
    st.tuples(steps_of("norm", "linear", "conv", "move", "pad", "join", "tanh", "inplace")),
)
NORMS: tuple[Callable[[int], nn.Module], ...] = (RepBN, PRepBN, Affine, nn.BatchNorm1d)
MOVES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.roll((1, -1), (1, 2)),
    lambda x: x.view(2, 2, 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(2, GRID, GRID, C),
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
        return maps.repeat(1, 2, 2, 1)[:, :GRID, :GRID].contiguous()


def module_of(step: Step) -> nn.Module:
    if step.kind == "norm":
        return NORMS[step.variant % 4](C)
    if step.kind == "join":
        return nn.Linear(2 * C, C)
    return Conv(step.variant) if step.kind == "conv" else nn.Linear(C, C, bias=step.variant != 1)


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
            values.append(self.value(step, module, one, other))
        return values[-1], values[-2].mean((1, 2))

    @staticmethod
    def value(step: Step, module: nn.Module, x: Tensor, other: Tensor) -> Tensor:
        if step.kind == "norm":
            return module(x.reshape(-1, C)).view(x.shape)
        if step.kind in ("linear", "conv"):
            return module(x)
        if step.kind == "move":
            return MOVES[step.variant](x.contiguous())
        if step.kind == "pad":
            return F.pad(x, (0, 0, 0, step.variant % 2))[:, :, -GRID:]
        if step.kind == "join":
            ways = (module(torch.cat([x, other], -1)), x + other, torch.cat([x[:, :2], other[:, 2:]], 1))
            return ways[step.variant % 3]
        return x.mul_(0.9) if step.kind == "inplace" else torch.tanh(x)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking takes minutes; a failing graph is small already
    suppress_health_check=list(HealthCheck),
)
@given(pieces=st.lists(PIECES, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_random_graphs_keep_their_outputs_and_no_fold_is_rolled_back(pieces: list[tuple[Step, ...]], seed: int) -> None:
    steps = [Step("norm", 0, 0, seed, False), *(step for piece in pieces for step in piece)]
    _, report = fused(ready(RandomNet(steps, seed), seed=seed), tokens(2, GRID, GRID, C, seed=seed))
    assert not [outcome for outcome in report if "changes the output" in outcome.reason]
