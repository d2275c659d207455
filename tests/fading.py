"""A small model with norms that fade, and its training through all phases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slabformer import PRepBN, ProgressiveSchedule, token_mask
from tolerances import assert_close

C = 8
MASKS = {"no_mask": None, "mask": torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3])}


class Net(nn.Module):
    """Two residual blocks, checkpointed or compiled on request."""

    def __init__(self, reentrant: bool | None = None, compiled: str | None = None, dtype: Any = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(PRepBN(C), nn.Linear(C, C), nn.Tanh()) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks).to(dtype)
        self.reentrant = reentrant
        if compiled:
            for block in blocks:
                block.compile(backend=compiled, fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


def train(model: nn.Module, steps: int = 6, mask: Tensor | None = None, **schedule: Any) -> list[Tensor]:
    """Parameters, gradients, statistics and input gradients after some steps through all phases."""
    settings = {"warmup": 1 / 3, "fade": 1 / 3, **schedule}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    progress = ProgressiveSchedule(model, steps, optimizer=optimizer, **settings)
    generator = torch.Generator().manual_seed(1)
    parameter = next(model.parameters())
    results = []
    for _ in range(steps):
        x = (1 + torch.randn(2, 5, C, generator=generator)).to(parameter.dtype).requires_grad_()
        optimizer.zero_grad()
        with token_mask(model, mask):
            model(x).square().mean().backward()
        optimizer.step()
        progress.step()
        results.append(x.grad)
    assert progress.finished
    named = [*model.named_parameters(), *model.named_buffers()]
    return [*results, *(value.detach().clone() for _, value in named), *(p.grad for p in model.parameters())]


def aligned_gradients(model: nn.Module) -> tuple[Tensor, list[Tensor | None]]:
    """The alignment term of one step midway, and all gradients of the loss with it."""
    schedule = ProgressiveSchedule(model, 10, fade=1.0, align=1.0)
    schedule.step()
    x = 1 + torch.randn(2, 5, C, generator=torch.Generator().manual_seed(0), dtype=next(model.parameters()).dtype)
    loss = model(x).square().mean()
    term = schedule.alignment()
    (loss + term).backward()
    return term.detach(), [parameter.grad for parameter in model.parameters()]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Hold each tensor against the one in its place."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, tolerance)
