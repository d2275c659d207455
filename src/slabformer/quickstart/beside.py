"""Train a model in a process of its own while this one does something else; what it reports arrives here."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from slabformer.tasks.classification.config import TrainConfig
from slabformer.tasks.classification.train import TrainResult, train
from slabformer.tasks.engine.observers import Observer, RunStart, StepReport

_END = "end"


class Beside:
    """A training that runs in another process; :meth:`result` waits for it."""

    def __init__(self, config: TrainConfig, observers: Sequence[Observer]) -> None:
        self.config, self._observers = config, observers
        context = get_context("spawn")
        self._events: Any = context.Queue()
        self._process = context.Process(
            target=_train, args=(config, torch.get_num_threads(), self._events), daemon=True
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._error: str | None = "it ended without a word"
        self._process.start()
        self._listener.start()

    def result(self) -> TrainResult:
        """What the training left, read from its folder.

        Raises:
            RuntimeError: If it failed.
        """
        self._listener.join()
        self._process.join()
        if self._error is not None:
            raise RuntimeError(f"training {self.config.model.name} failed: {self._error}")
        return train(replace(self.config, overwrite=False))

    def stop(self) -> None:
        """End the process if it still runs."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _listen(self) -> None:
        while True:
            try:
                name, args = self._events.get(timeout=1.0)
            except queue.Empty:
                if self._process.is_alive():
                    continue
                return
            if name == _END:
                self._error = args[0]
                return
            for observer in self._observers:
                getattr(observer, name)(*args)


@contextmanager
def training_beside(config: TrainConfig, observers: Sequence[Observer] = ()) -> Iterator[Beside]:
    """Train ``config`` in another process, with as many threads as this one, which is ended with the block."""
    beside = Beside(config, observers)
    try:
        yield beside
    finally:
        beside.stop()


class _Teller(Observer):
    """Sends what it hears to the other process."""

    def __init__(self, events: Any) -> None:
        self._events = events

    def on_start(self, start: RunStart) -> None:
        self._events.put(("on_start", (start,)))

    def on_step(self, report: StepReport) -> None:
        self._events.put(("on_step", (report,)))

    def on_epoch(self, row: dict[str, float]) -> None:
        self._events.put(("on_epoch", (row,)))


def _train(config: TrainConfig, threads: int, events: Any) -> None:
    torch.set_num_threads(threads)
    try:
        train(config, observers=[_Teller(events)])
    except Exception as error:
        events.put((_END, (str(error) or type(error).__name__,)))
        raise SystemExit(1) from None
    events.put((_END, (None,)))
