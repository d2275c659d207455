"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: imported once, by the server that ranks are forked from
PRELOADED = ["torch", "torch.distributed", "timm", "slabformer.deployment.deploy"]


def run_ranks(function: Callable[..., Any], folder: Path, *args: Any, num_ranks: int = 2) -> list[Any]:
    """``function(rank, num_ranks, *args)`` on each rank, results in the ranks' order; a rank's error is raised here.

    Args:
        function: Of a module's top level; returns tensors or plain containers of them.
        folder: Empty, for the ranks' meeting point and results.
        args: Handed on.
        num_ranks: How many.
    """
    # one server imports torch and is forked for every rank, so that a test takes a second instead of ten
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    mp.start_processes(_rank, (function, num_ranks, str(folder), args), nprocs=num_ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _rank(rank: int, function: Callable[..., Any], num_ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_ranks)
    try:
        torch.save(function(rank, num_ranks, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
