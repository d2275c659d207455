"""Pads that a folded norm goes through: right at every size, whatever size was traced."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusing import assert_same_outputs, fused, net, norm, tokens
from slabformer.nn import Affine, PadTokens, PRepBN
from slabformer.surgery.fuse import Reason, fuse, load_fused, save_fused
from tolerances import EXACT, assert_close

WINDOW = 3
UNPADDED, PADDED = (2, 6, 3, 6), [(2, 6, 3, 6), (2, 4, 6, 6), (1, 6, 5, 6), (3, 4, 4, 6)]
SIZES = pytest.mark.parametrize("size", PADDED, ids=str)


def windows(pad: nn.Module, x: Tensor) -> Tensor:
    """Tokens of windows of 3x3, ``(B, windows, 9, C)``, after padding."""
    x = pad(x, -x.shape[1] % WINDOW, -x.shape[2] % WINDOW)
    x = x.roll((-1, -1), (1, 2)).unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW))
    return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)


def block(m: Any, x: Tensor) -> Tensor:
    y = m.proj(m.qkv(windows(m.pad, m.norm(x))).softmax(2))
    return torch.cat([y.flatten(), x.sum((1, 2)).flatten()])


def windowed(norm_layer: Any = norm, **options: Any) -> nn.Module:
    return net(block, norm=norm_layer(6), pad=PadTokens(6), qkv=nn.Linear(6, 8), proj=nn.Linear(8, 4), **options)


# --- the module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", [(0, 2), (3, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("value", [False, True], ids=["zeros", "value"])
def test_a_pad_adds_rows_and_columns_of_its_value(pads: tuple[int, int], value: bool) -> None:
    pad, x = PadTokens(6, dtype=torch.float64), tokens(2, 4, 5, 6)
    expected = F.pad(x, (0, 0, 0, pads[1], 0, pads[0]))
    if value:
        pad.pad_with(torch.arange(6.0))
        expected = torch.where(F.pad(torch.ones_like(x), (0, 0, 0, pads[1], 0, pads[0])) > 0, expected, pad.value)
    assert_close(pad(x, *pads), expected, EXACT)


def test_a_pad_by_nothing_is_the_input_itself_and_holds_no_tensor() -> None:
    pad, x = PadTokens(6), tokens(2, 4, 5, 6)
    assert pad(x, 0, 0) is x
    assert not pad.state_dict()


def test_a_fill_follows_the_module_and_takes_the_dtype_of_the_input() -> None:
    pad = PadTokens(6).half()
    pad.pad_with(torch.ones(6, dtype=torch.float64))
    assert pad.value.dtype == torch.float16
    assert pad(tokens(2, 4, 5, 6).bfloat16(), 1, 1).dtype == torch.bfloat16
    assert pad.double().value.dtype == torch.float64


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 4, 5, 7)], ids=str)
def test_what_is_no_map_of_its_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"PadTokens takes maps \(B, H, W, 6\), got"):
        PadTokens(6)(tokens(*shape), 1, 1)


# --- folding through it --------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("traced", [UNPADDED, (1, 4, 5, 6)], ids=["traced-unpadded", "traced-padded"])
def test_a_fold_through_a_pad_holds_at_every_size(traced: tuple[int, ...], size: tuple[int, ...]) -> None:
    model = windowed()
    result, report = fused(model, tokens(*traced))
    assert (report["norm"].action, report["norm"].into) == ("forward", ("pad", "qkv"))
    assert_same_outputs(model, result, (tokens(*size, seed=3),))


@SIZES
def test_norms_of_one_map_fold_through_a_pad_one_after_the_other(size: tuple[int, ...]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.pad(m.two(m.one(x)), -x.shape[1] % WINDOW, 0)
        return m.linear(m.again(y, 0, -x.shape[2] % WINDOW)).tanh()

    children = {"one": norm(), "two": norm(), "pad": PadTokens(6), "again": PadTokens(6), "linear": nn.Linear(6, 3)}
    model = net(forward, **children)
    result, report = fused(model, tokens(*UNPADDED))
    assert [o.into for o in report] == [("pad", "again", "linear")] * 2
    assert_same_outputs(model, result, (tokens(*size),))


@SIZES
def test_a_norm_between_pads_folds_into_both(size: tuple[int, ...]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        return m.b(m.two(m.pad(m.a(x), 2, 1))).sum((1, 2)) + m.c(m.again(y, 1, 1)).tanh().sum((1, 2))

    model = net(
        forward,
        one=norm(),
        two=norm(),
        pad=PadTokens(6),
        again=PadTokens(6),
        **{name: nn.Linear(6, 6) for name in "abc"},
    )
    result, report = fused(model, tokens(*UNPADDED))
    assert report.num_kept == 0
    assert_same_outputs(model, result, (tokens(*size),))


@SIZES
def test_a_norm_behind_a_pad_folds_backward_through_it(size: tuple[int, ...]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.a(x), m.b(x)], -1)
        return m.norm(m.pad(y, -x.shape[1] % WINDOW, -x.shape[2] % WINDOW)).tanh()

    model = net(forward, a=nn.Linear(6, 2), b=nn.Linear(6, 4), norm=norm(), pad=PadTokens(6))
    result, report = fused(model, tokens(*UNPADDED))
    assert (report["norm"].action, report["norm"].into) == ("backward", ("a", "b", "pad"))
    assert_same_outputs(model, result, (tokens(*size),))


@SIZES
def test_heads_of_a_padded_map_keep_their_channels(size: tuple[int, ...]) -> None:
    """The pad's fill belongs to the norm over each head: two heads of three channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.pad(m.a(x), -x.shape[1] % WINDOW, -x.shape[2] % WINDOW)
        return m.norm(y.unflatten(-1, (2, 3))).tanh()

    model = net(forward, a=nn.Linear(6, 6), norm=norm(3), pad=PadTokens(6))
    result, report = fused(model, tokens(*UNPADDED))
    assert report["norm"].action == "backward"
    assert_same_outputs(model, result, (tokens(*size),))


@pytest.mark.parametrize("scale", [0.0, 1e-5], ids=["zero", "tiny"])
def test_a_channel_that_the_norm_erases_keeps_it(scale: float) -> None:
    model = windowed(Affine)
    with torch.no_grad():
        model.norm.weight[2] = scale
    result, report = fused(model, tokens(*UNPADDED))
    assert Reason.SCALE_NEAR_ZERO in report["norm"].codes
    assert result.pad.value is None
    assert_same_outputs(model, result, (tokens(*PADDED[-1]),))


def test_an_erased_channel_without_a_shift_folds() -> None:
    model = windowed(Affine)
    with torch.no_grad():
        model.norm.weight[2] = model.norm.bias[2] = 0
    result, report = fused(model, tokens(*UNPADDED))
    assert report.num_kept == 0
    assert_same_outputs(model, result, (tokens(*PADDED[-1]),))


def test_a_pad_that_two_maps_share_keeps_the_norm() -> None:
    model = net(
        lambda m, x: m.linear(m.pad(m.norm(x), 1, 0)) + m.linear(m.pad(x, 1, 0)),
        norm=norm(),
        pad=PadTokens(6),
        linear=nn.Linear(6, 3),
    )
    _, report = fused(model, tokens(*UNPADDED))
    assert Reason.SHARED_LAYER in report["norm"].codes


def test_a_residual_behind_the_pad_keeps_the_norm() -> None:
    model = net(
        lambda m, x: (y := m.pad(m.norm(x), 1, 0)) + m.linear(y), norm=norm(), pad=PadTokens(6), linear=nn.Linear(6, 6)
    )
    result, report = fused(model, tokens(*UNPADDED))
    assert report["norm"].codes[0] == Reason.FEEDS_SUM
    assert result.pad.value is None


def test_a_pad_over_another_axis_than_the_channels_keeps_the_norm() -> None:
    model = net(
        lambda m, x: m.linear(m.pad(m.norm(x.mT).mT, 1, 0)), norm=norm(3), pad=PadTokens(6), linear=nn.Linear(6, 3)
    )
    _, report = fused(model, tokens(*UNPADDED))
    assert report["norm"].codes[0] == Reason.CHANNELS_MIXED


def test_hooks_on_a_pad_keep_what_they_look_at() -> None:
    model = windowed()
    model.pad.register_forward_hook(lambda module, args, output: None)
    _, report = fused(model, tokens(*UNPADDED))
    assert report["norm"].codes[0] == Reason.HOOKS


def test_a_fixed_size_without_padding_needs_no_fill() -> None:
    result, report = fused(windowed(), tokens(*UNPADDED), fixed_size=True)
    assert report["norm"].into == ("qkv",)
    assert result.pad.value is None


def test_a_second_fuse_keeps_the_fill() -> None:
    first, _ = fused(windowed(), tokens(*UNPADDED))
    second, _ = fused(first, tokens(*PADDED[-1]))
    assert torch.equal(second.pad.value, first.pad.value)


@pytest.mark.parametrize("norm_layer", [PRepBN, nn.LayerNorm], ids=["PRepBN", "LayerNorm"])
def test_files_carry_the_fill(norm_layer: Any, tmp_path: Path) -> None:
    result, _ = fuse(windowed(), tokens(*UNPADDED))
    save_fused(result, tmp_path / "padded.safetensors")
    restored = load_fused(windowed(norm_layer), tmp_path / "padded.safetensors")
    for size in PADDED:
        assert_close(restored(tokens(*size)), result(tokens(*size)), EXACT)


def test_a_skeleton_that_pads_in_another_way_is_refused(tmp_path: Path) -> None:
    result, _ = fuse(windowed(), tokens(*UNPADDED))
    save_fused(result, tmp_path / "padded.safetensors")
    skeleton = windowed()
    skeleton.pad = nn.Identity()
    with pytest.raises(ValueError, match=r"1 pads absent \(first: pad\)"):
        load_fused(skeleton, tmp_path / "padded.safetensors")


def test_a_fused_pad_exports_to_the_same() -> None:
    result, _ = fuse(windowed(), tokens(*UNPADDED))
    x = tokens(*PADDED[-1])
    program = torch.export.export(result, (x,))
    assert_close(program.module()(x), result(x), EXACT)
