"""What a run changes in the process that it runs in, put back when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from slabformer._accelerate import shared_settings
from slabformer._extras import require
from slabformer.tasks.engine.seeds import random_state, set_random_state

P = ParamSpec("P")
R = TypeVar("R")


def leaves_the_process_alone(train: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a function that trains: the caller's random numbers, threads and accelerate settings come back.

    A run seeds the generators of Python, NumPy and torch, may set torch's threads, and gives accelerate, which keeps
    one setting for the whole process, its own.
    """

    @wraps(train)
    def trained(*args: P.args, **kwargs: P.kwargs) -> R:
        with _restored():
            return train(*args, **kwargs)

    return trained


@contextmanager
def _restored() -> Iterator[None]:
    random, threads = random_state(), torch.get_num_threads()
    require("accelerate", extra="train")
    shared = shared_settings()
    before = [dict(each) for each in shared]
    try:
        yield
    finally:
        set_random_state(random)
        torch.set_num_threads(threads)
        for now, then in zip(shared, before, strict=True):
            now.clear()
            now.update(then)
