"""What fits a model, the published layout for MindSpore in and out, and versions: none of it needs MindSpore."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import slabformer as sf
from slabformer.mindspore.layouts import (
    check_fit,
    is_published,
    load_published_mindspore,
    to_published_mindspore,
)
from slabformer.mindspore.runtime import check_versions
from small_swins import SMALL
from tolerances import EXACT, assert_close


def swin() -> nn.Module:
    torch.manual_seed(0)
    return sf.testing.randomize_norms_(timm.create_model("swin_tiny_prepbn", norm="repbn", **SMALL)).eval()


@pytest.mark.parametrize("prefix", [True, False], ids=["prefixed", "bare"])
def test_the_published_layout_is_read_and_written(prefix: bool) -> None:
    model, other = swin(), timm.create_model("swin_tiny_prepbn", norm="repbn", **SMALL)
    state = to_published_mindspore(model, prefix=prefix)
    first = "layers.0.blocks.0.norm1." if prefix else "0.blocks.0.norm1."
    assert {f"{first}alpha", f"{first}bn.moving_mean", f"{first}bn.gamma", "patch_embed.norm.bn.beta"} <= set(state)
    assert any(name.endswith("attn_mask") for name in state)
    assert any(name.endswith("relative_position_index") for name in state)
    assert not any("num_batches_tracked" in name or "running_mean" in name for name in state)
    assert is_published(state)
    load_published_mindspore(other, state)
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert_close(other.state_dict()[name], value, EXACT)


def test_a_published_checkpoint_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = swin()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = to_published_mindspore(swin())
    state["layers.9.norm1.alpha"] = state.pop("layers.0.blocks.0.norm1.alpha")
    with pytest.raises(ValueError, match=r"1 tensors missing .*layers\.0\.blocks\.0\.norm1\.alpha.*1 unexpected"):
        load_published_mindspore(model, state)
    twice = to_published_mindspore(swin())
    twice["0.blocks.0.norm1.alpha"] = twice["layers.0.blocks.0.norm1.alpha"]
    with pytest.raises(ValueError, match="in the checkpoint twice"):
        load_published_mindspore(model, twice)
    for name, value in model.state_dict().items():
        assert_close(value, before[name], EXACT)


def test_what_does_not_fit_is_told_in_one_line() -> None:
    own = {"a": (2,), "b": (3,), "index": (4,)}
    check_fit(own, {"a": (2,), "b": (3,)}, "Swin", {"index"})
    with pytest.raises(ValueError) as caught:
        check_fit(own, {"a": (1,), "c": (3,), "index": (4,)}, "Swin")
    assert str(caught.value) == (
        "checkpoint does not fit Swin: 1 tensors missing (first: b), 1 unexpected (first: c), "
        "1 of another shape (first: a is (1,), the model's (2,))"
    )


@pytest.mark.parametrize(
    ("mindspore", "numpy", "said"),
    [
        ("2.9.1", "1.26.4", "was tried with MindSpore from 2.10 to below 2.12, found 2.9.1"),
        ("2.12.0", "1.26.4", "found 2.12.0; pip install 'slabformer[mindspore]'"),
        ("2.10.0", "2.4.6", "MindSpore 2.10.0 is built for NumPy 1, found 2.4.6; pip install 'numpy<2'"),
    ],
)
def test_versions_that_do_not_work_are_told_before_they_crash(mindspore: str, numpy: str, said: str) -> None:
    with pytest.raises(ImportError, match=re.escape(said)):
        check_versions(mindspore, numpy)


def test_versions_that_work_pass() -> None:
    check_versions("2.10.0", "1.26.4")
    check_versions("2.11.1", "1.26.4")
    check_versions(None, "2.4.6")  # importing it says what to install


def test_nothing_imports_mindspore_before_it_is_needed() -> None:
    code = (
        "import sys, slabformer.mindspore.convert, slabformer.mindspore.layouts; assert 'mindspore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
