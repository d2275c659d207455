"""The core from LayerNorm to none with torch alone: run by `.ci/run` in an environment that holds nothing else."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

import slabformer as sf

EXTRAS = ("timm", "torchvision", "transformers", "accelerate", "safetensors", "jsonargparse", "rich", "sklearn", "onnx")


class Block(nn.Module):
    """A pre-norm MLP block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to the same."""
        return x + self.mlp(self.norm(x))


def main() -> None:
    """Convert, train, recalibrate, fuse, verify."""
    present = [name for name in EXTRAS if importlib.util.find_spec(name) is not None]
    assert not present, f"this environment should hold torch alone, it has {present}"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Block(16), Block(16), nn.LayerNorm(16), nn.Linear(16, 4))
    converted = sf.convert_norms_(model)
    assert len(converted) == 3, converted

    batches = [torch.randn(4, 7, 8) for _ in range(4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = sf.ProgressiveSchedule(model, total_steps=len(batches), fade=0.5)
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert schedule.gamma == 0, schedule.gamma

    model.eval()
    sf.recalibrate_(model, batches)
    deployed, report = sf.fuse(model, batches[0])
    assert report.num_folded == 3, report.table()
    result = sf.verify(model, deployed, batches[1])
    print(f"torch {torch.__version__} alone: {report.num_folded} norms folded, outputs within {result.max_rel:.1e}")


if __name__ == "__main__":
    main()
