"""Transposed convolutions: a norm behind one always folds, one in front only where its shift arrives evenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusing import assert_same_outputs, fused, net, norm, outcomes, reason, tokens
from slabformer.surgery.fuse import load_fused, save_fused

MAPS = {1: (2, 6, 5), 2: (2, 6, 5, 4), 3: (2, 6, 3, 4, 2)}
CONVS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "windows": {"kernel_size": 2, "stride": 2},
    "overlapping": {"kernel_size": 4, "stride": 2, "padding": 1},
    "output padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "gaps": {"kernel_size": 1, "stride": 2},
    "points": {"kernel_size": 1},
}
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
each_groups = pytest.mark.parametrize("groups", [1, 2, 6])


@each_geometry
@each_groups
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_norm_behind_folds_backward(geometry: dict[str, Any], groups: int, bias: bool) -> None:
    up = nn.ConvTranspose2d(6, 12, groups=groups, bias=bias, **geometry)
    model = net(lambda m, x: torch.tanh(m.norm(m.up(x))), up=up, norm=nn.BatchNorm2d(12))
    assert outcomes(model, tokens(*MAPS[2])) == [("norm", "backward", ("up",), "")]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_norm_folds_around_every_rank(rank: int) -> None:
    x = tokens(*MAPS[rank])
    behind = net(lambda m, x: torch.tanh(m.norm(m.up(x))), up=CONVS[rank](6, 4, 3, stride=2), norm=norm(4, 1))
    assert outcomes(behind, x) == [("norm", "backward", ("up",), "")]
    front = net(lambda m, x: m.up(m.norm(x)), norm=norm(6, 1), up=CONVS[rank](6, 4, 1))
    assert outcomes(front, x) == [("norm", "forward", ("up",), "")]


@each_groups
@pytest.mark.parametrize("geometry", [{}, {"padding": 1}], ids=["plain", "cropped"])
def test_a_norm_in_front_folds_forward_into_a_kernel_of_one_point(geometry: dict[str, Any], groups: int) -> None:
    up = nn.ConvTranspose2d(6, 12, 1, groups=groups, bias=False, **geometry)
    model = net(lambda m, x: m.up(m.norm(x)), norm=norm(6, 1), up=up)
    assert outcomes(model, tokens(*MAPS[2])) == [("norm", "forward", ("up",), "")]


@pytest.mark.parametrize(
    "geometry", [GEOMETRIES[name] for name in GEOMETRIES if name != "points"], ids=list(GEOMETRIES)[:-1]
)
def test_a_norm_in_front_is_kept_where_its_shift_spreads_unevenly(geometry: dict[str, Any]) -> None:
    model = net(lambda m, x: m.up(m.norm(x)), norm=norm(6, 1), up=nn.ConvTranspose2d(6, 4, **geometry))
    why = "it is followed by a transposed convolution, which spreads it unevenly (up)"
    assert reason(model, tokens(*MAPS[2])).startswith(why)


@each_groups
def test_a_norm_in_front_folds_by_moving_the_stream(groups: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.branch(torch.tanh(x))
        return m.up(m.norm(x).permute(0, 3, 1, 2))

    up = nn.ConvTranspose2d(6, 12, 4, stride=2, padding=1, groups=groups)
    model = net(forward, embed=nn.Linear(6, 6), branch=nn.Linear(6, 6), norm=norm(), up=up)
    _, report = fused(model, tokens(2, 5, 4, 6))
    assert report["norm"].into == ("up", "branch")


def test_rows_of_the_input_are_told_apart_by_group() -> None:
    model = net(
        lambda m, x: torch.tanh(m.two(m.up(m.one(x)))),
        one=norm(6, 1),
        up=nn.ConvTranspose2d(6, 4, 1, groups=2, bias=False),
        two=norm(4, 1),
    )
    assert [(o[1], o[2]) for o in outcomes(model, tokens(*MAPS[2]))] == [("forward", ("up",)), ("backward", ("up",))]


def test_a_file_restores_the_new_bias_of_a_transposed_convolution(tmp_path: Path) -> None:
    def build() -> nn.Module:
        up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, bias=False)
        return net(lambda m, x: torch.tanh(m.norm(m.up(x))), up=up, norm=nn.BatchNorm2d(4))

    x = tokens(*MAPS[2])
    result, _ = fused(build(), x)
    save_fused(result, tmp_path / "model.safetensors")
    assert_same_outputs(result, load_fused(build(), tmp_path / "model.safetensors"), (x,))
