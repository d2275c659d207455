from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from redrawn import redrawn
from slabformer.nn import PadTokens, SimplifiedLinearAttention
from slabformer.nn.shifted_windows import (
    APART,
    ShiftedWindowAttention,
    ShiftedWindowLinearAttention,
    Windows,
    relative_position_index,
    resample_bias_table,
)
from tolerances import ALGEBRA, EXACT, assert_close

C, HEADS = 12, 2
# (grid, window, shift): tiled, padded, not square, one window, a shift along one axis, a window larger than the map
CUTS = [
    ((4, 6), (2, 3), (0, 0)),
    ((4, 6), (2, 3), (1, 1)),
    ((5, 7), (3, 3), (1, 1)),
    ((7, 4), (2, 4), (1, 0)),
    ((3, 3), (3, 3), (1, 1)),
    ((2, 5), (4, 4), (2, 2)),
]
each_cut = pytest.mark.parametrize("cut", CUTS, ids=str)


def tokens(N: int, B: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def softmax_attention(cut: tuple, fixed: bool = True, **kwargs) -> ShiftedWindowAttention:
    grid, window, shift = cut
    return redrawn(ShiftedWindowAttention(C, HEADS, window, shift, grid_size=grid, fixed=fixed, **kwargs))


def windows_by_hand(x: Tensor, windows: Windows) -> list[tuple[Tensor, Tensor, list[int | None]]]:
    """Tokens ``(N, C)`` of each window of one image, the published region of each, and where each comes from."""
    (H, W), (h, w), (down, right) = windows
    rows, columns = H + -H % h, W + -W % w
    region = torch.zeros(rows, columns)
    spans = [
        [slice(0, -size), slice(-size, -shift), slice(-shift, None)] if shift else [slice(None)]
        for size, shift in ((h, down), (w, right))
    ]
    for number, (i, j) in enumerate((i, j) for i in spans[0] for j in spans[1]):
        region[i, j] = number
    found = []
    for top in range(0, rows, h):
        for left in range(0, columns, w):
            places = [(i, j) for i in range(top, top + h) for j in range(left, left + w)]
            sources = [((i + down) % rows, (j + right) % columns) for i, j in places]
            origin = [i * W + j if i < H and j < W else None for i, j in sources]
            values = torch.stack([x.new_zeros(C) if o is None else x[o] for o in origin])
            found.append((values, torch.stack([region[place] for place in places]), origin))
    return found


@each_cut
def test_windows_are_cut_as_published_and_joined_again(cut):
    windows, pad = Windows(*cut), PadTokens(C)
    x = tokens(cut[0][0] * cut[0][1])
    expected = [values for image in x for values, _, _ in windows_by_hand(image, windows)]
    assert_close(windows.cut(x, pad), torch.stack(expected), EXACT)
    for num_heads in (1, C // 2):
        heads = windows.cut(x, pad).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        assert_close(windows.join(heads[:, None]), x, EXACT)
        assert_close(windows.join(heads.unflatten(0, (len(x), -1))), x, EXACT)


@each_cut
def test_the_mask_keeps_published_regions_apart(cut):
    windows = Windows(*cut)
    by_hand = windows_by_hand(tokens(cut[0][0] * cut[0][1], 1)[0], windows)
    regions = torch.stack([region for _, region, _ in by_hand])
    expected = torch.where(regions[:, :, None] == regions[:, None], 0.0, APART)
    mask = windows.mask()
    if mask is None:
        assert not any(cut[2])
        mask = torch.zeros_like(expected)
    assert_close(mask, expected, EXACT)


def test_windows_shrink_to_smaller_maps_and_then_stand_still():
    assert Windows.fitted((3, 9), (7, 7), (3, 3)) == ((3, 9), (3, 7), (0, 3))
    assert Windows.fitted((7, 7), (7, 7), (3, 3)) == ((7, 7), (7, 7), (0, 0))
    assert Windows.fitted((8, 7), (7, 7), (3, 3)) == ((8, 7), (7, 7), (3, 0))
    assert Windows((3, 9), (7, 7), (3, 3)).padded == (7, 14)


@pytest.mark.parametrize("window", [(7, 7), (2, 3), (1, 4)], ids=str)
def test_the_index_is_timms(window):
    assert_close(relative_position_index(window, window), get_relative_position_index(*window), EXACT)


@pytest.mark.parametrize("window", [(4, 5), (2, 5), (1, 3)], ids=str)
def test_a_smaller_window_reads_the_same_offsets(window):
    down, right = torch.meshgrid(torch.arange(-3, 4), torch.arange(-4, 5), indexing="ij")
    table = torch.stack([down, right], -1).flatten(0, 1)  # of a window of 4x5: each row is its own offset
    places = torch.cartesian_prod(torch.arange(window[0]), torch.arange(window[1])).view(-1, 2)
    assert_close(table[relative_position_index(window, (4, 5))], places[:, None] - places[None], EXACT)


def test_bias_tables_are_resampled_over_their_offsets():
    table = torch.randn(5 * 9, 3, dtype=torch.float64)  # of a window of 3x5
    assert_close(resample_bias_table(table, (3, 5), (3, 5)), table, EXACT)
    constant = resample_bias_table(table[:1].expand(45, 3), (3, 5), (7, 4))
    assert_close(constant, table[:1].expand(13 * 7, 3), ALGEBRA)
    # the middle row is the offset 0 at every size
    assert_close(resample_bias_table(table, (3, 5), (5, 9))[9 * 17 // 2], table[22], ALGEBRA)


def reference(module: ShiftedWindowAttention, x: Tensor, windows: Windows) -> Tensor:
    """Window by window, head by head, with the bias of every pair of tokens looked up by hand."""
    (h, w), (rows, columns) = windows.window, module.window_size
    table = module.relative_position_bias_table.view(2 * rows - 1, 2 * columns - 1, HEADS)
    places = [(i, j) for i in range(h) for j in range(w)]
    bias = torch.stack(
        [torch.stack([table[i - k + rows - 1, j - m + columns - 1] for k, m in places]) for i, j in places]
    )
    images = []
    for image in x:
        out: dict[int, Tensor] = {}
        for values, region, origin in windows_by_hand(image, windows):
            q, k, v = module.qkv(values).view(-1, 3, HEADS, C // HEADS).permute(1, 2, 0, 3)
            logits = q @ k.mT * (C // HEADS) ** -0.5 + bias.permute(2, 0, 1)
            logits = logits + torch.where(region[:, None] == region[None], 0.0, APART)
            attended = module.proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
            out |= {o: token for o, token in zip(origin, attended, strict=True) if o is not None}
        images.append(torch.stack([out[i] for i in range(len(image))]))
    return torch.stack(images)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "fitted"])
@each_cut
def test_softmax_attention_equals_its_reference_with_gradients(cut, fixed):
    module, x = softmax_attention(cut, fixed), tokens(cut[0][0] * cut[0][1])
    parameters = [x, *module.parameters()]
    grad = torch.randn_like(x)
    expected = reference(module, x, (Windows if fixed else Windows.fitted)(*cut))
    expected_grads = torch.autograd.grad(expected, parameters, grad)
    actual = module(x)
    assert_close(actual, expected, ALGEBRA)
    for one, other in zip(torch.autograd.grad(actual, parameters, grad), expected_grads, strict=True):
        assert_close(one, other, ALGEBRA)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "fitted"])
def test_tables_made_on_the_spot_equal_the_kept_ones(fixed):
    module, x = softmax_attention(((9, 6), (3, 4), (1, 2)), fixed), tokens(10)
    expected = module(x, grid_size=(2, 5))
    module.set_grid_size((2, 5))
    assert_close(module(x), expected, EXACT)
    assert_close(module(x, grid_size=(2, 5)), expected, EXACT)
    assert set(module.state_dict()) == {
        "relative_position_bias_table",
        *("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"),
    }


@each_cut
def test_linear_attention_runs_in_each_window_by_itself(cut):
    grid, window, shift = cut
    module = redrawn(ShiftedWindowLinearAttention(C, HEADS, window, shift))
    alone = SimplifiedLinearAttention(C, HEADS, grid_size=window).double()
    alone.load_state_dict(module.state_dict())
    x = tokens(grid[0] * grid[1], 1)
    out: dict[int, Tensor] = {}
    for values, _, origin in windows_by_hand(x[0], Windows(*cut)):
        attended = alone(values[None])[0]
        out |= {o: token for o, token in zip(origin, attended, strict=True) if o is not None}
    actual = module(x, grid_size=grid)
    assert_close(actual[0], torch.stack([out[i] for i in range(x.shape[1])]), ALGEBRA)
    module.set_grid_size((8, 8))
    assert_close(module(x, grid_size=grid), actual, EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shorter_dtypes_stay_near_float64(dtype):
    module, x = softmax_attention(CUTS[2]), tokens(35)
    expected = module(x)
    actual = module.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    # some units in the last place, after two linear layers and two products
    assert_close(actual, expected, 5e-2 if dtype == torch.bfloat16 else 8e-3)


def test_weights_are_dropped_in_training_alone():
    module, x = softmax_attention(CUTS[1], attn_drop=0.5), tokens(24)
    assert_close(module(x), module(x), EXACT)
    assert not torch.equal(module.train()(x), module(x))


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_one_graph_holds_the_whole_attention(kind):
    grid, window, shift = CUTS[2]
    module = softmax_attention(CUTS[2]) if kind == "softmax" else ShiftedWindowLinearAttention(C, HEADS, window, shift)
    module, x = module.double().eval(), tokens(35)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_close(compiled(x, grid_size=grid), module(x, grid_size=grid), EXACT)


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got 12 and 5"):
        ShiftedWindowAttention(12, 5, grid_size=(7, 7))
