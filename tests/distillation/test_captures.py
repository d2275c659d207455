from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from slabformer import convert_norms_
from slabformer.distillation.captures import Capture, find_blocks
from students import bert


class Shared(nn.Module):
    """One block called twice, which returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(x))


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{index}" for index in range(count)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: timm.create_model("deit_micro"), names("blocks", 4)),
        (bert, names("encoder.layer", 2)),
        (
            lambda: timm.create_model("swin_tiny_prepbn", depths=(1, 2, 1, 1), embed_dim=24),
            ["stages.0.blocks.0", *names("stages.1.blocks", 2), "stages.2.blocks.0", "stages.3.blocks.0"],
        ),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 3, enable_nested_tensor=False),
            names("layers", 3),
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), []),
    ],
    ids=["deit", "bert", "swin", "torch", "sequential"],
)
def test_blocks_are_found_by_structure(model: object, expected: list[str]) -> None:
    assert find_blocks(model()) == expected  # type: ignore[operator]


def test_blocks_are_the_same_after_conversion() -> None:
    model = bert()
    before = find_blocks(model)
    convert_norms_(model)
    assert find_blocks(model) == before


def test_every_call_of_a_shared_module_is_kept_and_nothing_stays_on_the_model() -> None:
    model, x = Shared(), torch.randn(2, 3)
    capture = Capture(model, ["block"])
    with capture.running():
        y = model(x)
    first, second = capture.take()["block"]
    assert torch.equal(first, model.block(x))
    assert second is y
    assert capture.outputs == {}
    assert not model.block._forward_hooks


def test_hooks_go_away_after_an_error() -> None:
    model = Shared()
    capture = Capture(model, ["block"])
    with pytest.raises(RuntimeError), capture.running():
        model(torch.randn(2, 5))
    assert not model.block._forward_hooks


def test_unknown_and_unused_modules_are_named() -> None:
    model = Shared()
    with pytest.raises(ValueError, match="Shared has no module 'blocks' to compare"):
        Capture(model, ["blocks"])
    with (
        pytest.raises(ValueError, match="block returned no tensor in this forward"),
        Capture(model, ["block"]).running(),
    ):
        pass
