"""Random module graphs: whatever fuse decides, the outputs stay, also at a size that was not traced."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fusing import FUSED, fused, ready, tokens
from random_graphs import GRID, PADDED_GRID, PIECES, C, RandomNet, Step
from slabformer.surgery.fuse import Reason
from slabformer.surgery.verify import verify

#: a chunk is one test; together at least 2,000 graphs in the slow suite
NUM_CHUNKS, CHUNK, QUICK = 20, 110, 10


def check(pieces: list[tuple[Step, ...]], number: int) -> int:
    """Hold a graph against its fused form; returns how many norms were folded."""
    steps = [Step("norm", variant=number), *(step for piece in pieces for step in piece)]
    model = ready(RandomNet(steps, number), seed=number)
    result, report = fused(model, tokens(2, GRID, GRID, C, seed=number), untie=number % 2 == 1)
    assert not [outcome for outcome in report if Reason.OUTPUT_CHANGES in outcome.codes]
    verify(model, result, tokens(2, PADDED_GRID, PADDED_GRID, C, seed=number), rtol=FUSED)
    return report.num_folded


def run(chunk: int, max_examples: int) -> int:
    """Norms folded in ``max_examples`` graphs, the same ones for the same ``chunk``."""
    folded = []
    options = {
        "max_examples": max_examples,
        "database": None,
        "phases": [Phase.generate],  # shrinking takes minutes; a failing graph is small already
        "suppress_health_check": list(HealthCheck),
    }

    def count(pieces: list[tuple[Step, ...]], number: int) -> None:
        folded.append(check(pieces, number))

    graphs = given(pieces=st.lists(PIECES, min_size=1, max_size=4), number=st.integers(0, 1000))
    seed(chunk)(settings(**options)(graphs(count)))()
    return sum(folded)


def test_random_graphs_keep_their_outputs_and_no_fold_is_rolled_back() -> None:
    assert run(0, QUICK) >= QUICK // 2


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(1, NUM_CHUNKS + 1))
def test_more_random_graphs_keep_their_outputs(chunk: int) -> None:
    assert run(chunk, CHUNK) >= CHUNK // 4
