"""What is changed in the whole process is put back, in whatever order threads end."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import nn

import slabformer as sf
from slabformer._process import Shared, no_logs, no_warnings


def overlapping(block: Callable[[], AbstractContextManager[object]]) -> None:
    """Two threads: the first enters first and leaves first."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with block():
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second() -> None:
        assert first_in.wait(10)
        with block():
            second_in.set()
            assert first_out.wait(10)

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


def test_a_shared_change_holds_until_the_last_block_ends_and_is_taken_back() -> None:
    state = ["usual"]

    @contextmanager
    def change() -> Iterator[None]:
        before, state[0] = state[0], "changed"
        yield
        state[0] = before

    seen = []
    shared = Shared(change)

    @contextmanager
    def block() -> Iterator[None]:
        with shared():
            yield
            seen.append(state[0])

    overlapping(block)
    assert seen == ["changed", "changed"]
    assert state == ["usual"]


def test_warnings_come_back_after_overlapping_threads() -> None:
    overlapping(no_warnings)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_logging_comes_back_after_overlapping_threads() -> None:
    before = logging.root.manager.disable
    overlapping(lambda: no_logs("torch"))
    assert logging.root.manager.disable == before
    assert not any(handler.filters for handler in logging.getLogger("torch").handlers)


def test_only_this_thread_and_these_loggers_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    with no_logs("ours", below=logging.ERROR):
        logging.getLogger("ours.inner").warning("unheard")
        logging.getLogger("ours.inner").error("an error")
        logging.getLogger("others").warning("another logger")
        thread = threading.Thread(target=logging.getLogger("ours").warning, args=("another thread",))
        thread.start()
        thread.join()
    logging.getLogger("ours").warning("afterwards")
    assert caplog.messages == ["an error", "another logger", "another thread", "afterwards"]


def test_converting_in_several_threads_leaves_the_process_as_it_was() -> None:
    before = list(warnings.filters)
    models = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)]
    state = torch.get_rng_state()
    threads = [threading.Thread(target=sf.convert_norms_, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
    assert torch.equal(state, torch.get_rng_state())
    assert all(isinstance(model[0], sf.PRepBN) for model in models)


def test_fusing_in_two_threads_leaves_the_process_as_it_was() -> None:
    before = (logging.root.manager.disable, list(warnings.filters), torch.backends.mha.get_fastpath_enabled())
    models = [nn.Sequential(sf.RepBN(4), nn.Linear(4, 4)).eval() for _ in range(3)]
    x, state = torch.randn(1, 2, 4), torch.get_rng_state()
    threads = [threading.Thread(target=sf.fuse, args=(model, x)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == (logging.root.manager.disable, list(warnings.filters), torch.backends.mha.get_fastpath_enabled())
    assert torch.equal(state, torch.get_rng_state())
