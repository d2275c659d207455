"""What converting and fusing gains: a family's own model over the fused one, both compiled, in one process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from slabformer.deployment.compiled import Compiled
from slabformer.measure.timing import num_threads, ratio, time_interleaved

#: of measuring, behind the warm-up; after 2 s a busy core said 0.82 of a model of which 10 s say 1.01
SECONDS = 10.0


def speed_of(own: nn.Module, fused: nn.Module, args: tuple[Any, ...], limit: int) -> float | None:
    """How many times longer ``own`` takes than ``fused``, float32 at batch 1 on one thread; None after ``limit`` s."""
    inputs = tuple(value.float() for value in args)
    try:
        with _alarm(limit), num_threads(1), torch.inference_mode():
            forms = {
                "own": Compiled(own.float(), torch.device("cpu")),
                "fused": Compiled(fused.float(), torch.device("cpu")),
            }
            runs = {name: partial(form, *inputs) for name, form in forms.items()}
            turns = time_interleaved(runs, seconds=SECONDS, device=torch.device("cpu"))
    except TimeoutError:
        return None
    finally:
        torch.compiler.reset()  # hundreds of compiled models would fill the memory
    return ratio(turns["own"], turns["fused"])


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """TimeoutError in the block after ``seconds``, also while it compiles."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
