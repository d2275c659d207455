from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from redrawn import redrawn
from reference_files import published_state, reference
from slabformer.models.weights.official import load_published, published_names
from slabformer.nn.attention import SimplifiedLinearAttention
from slabformer.nn.attention_variants import PyramidLinearAttention
from slabformer.nn.resample import resample_table
from slabformer.nn.stripes import WindowLinearAttention
from slabformer.ops.reference import linear_attention_reference
from tolerances import ALGEBRA, EXACT, FLOAT32, assert_close

C, HEADS = 24, 3
# half precisions: some units in the last place, after two linear layers, two products and a convolution
NEAR_FLOAT64 = {torch.float32: FLOAT32, torch.bfloat16: 5e-2, torch.float16: 8e-3}

GOLDEN = {
    "sla_swin": lambda: SimplifiedLinearAttention(C, HEADS, grid_size=(8, 8)),
    "sla_deit": lambda: SimplifiedLinearAttention(C, HEADS, grid_size=(8, 8)),
    "sla_pvt_sr1": lambda: PyramidLinearAttention(C, HEADS, 1, grid_size=(8, 8)),
    "sla_pvt_sr2": lambda: PyramidLinearAttention(C, HEADS, 2, grid_size=(8, 8), resize="1d"),
    "sla_cswin": lambda: WindowLinearAttention(C, HEADS, (8, 4)),
}


def attention(**kwargs) -> SimplifiedLinearAttention:
    return redrawn(SimplifiedLinearAttention(C, HEADS, **{"grid_size": (4, 6), **kwargs}))


def tokens(N: int, seed: int = 0, B: int = 2) -> Tensor:
    return torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_published_outputs_and_all_gradients_are_reproduced(name):
    module, expected = GOLDEN[name](), reference(name)
    state = published_state(name)
    state.pop("scale", None)  # CSWin's files hold one that nothing reads
    load_published(module, state)
    # in float64, so that all the difference is the reference's own float32
    module = module.double().eval()
    x = expected["input"].double().requires_grad_()
    output = module(*x, grid_size=(8, 8)) if name == "sla_cswin" else module(x)
    output.backward(expected["grad_output"].double())
    assert_close(output, expected["output"], FLOAT32)
    assert_close(x.grad, expected["grad_input"], FLOAT32)
    gradients = {f"grad.{published}": parameter.grad for published, parameter in published_parameters(module)}
    assert gradients.keys() == {key for key in expected if key.startswith("grad.")}
    for key, gradient in gradients.items():
        assert_close(gradient, expected[key], FLOAT32)


def published_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    names = {ours: published for published, ours in published_names(module, "prepbn").items()}
    return [(names[name], p) for name, p in module.named_parameters() if not name.startswith("norm.norm.")]


def wide() -> tuple[SimplifiedLinearAttention, Tensor]:
    """Heads of 32 channels: narrow ones have queries with hardly a positive entry, whose direction is all rounding."""
    module = redrawn(SimplifiedLinearAttention(96, 3, grid_size=(4, 6)))
    return module, torch.randn(2, 24, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", NEAR_FLOAT64, ids=str)
def test_shorter_dtypes_stay_near_float64(dtype):
    module, x = wide()
    expected = module(x)
    actual = module.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert_close(actual, expected, NEAR_FLOAT64[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite_at_16384_tokens_forwards_and_backwards(dtype):
    module = redrawn(SimplifiedLinearAttention(8, 2, grid_size=(16, 16))).to(dtype)
    x = torch.randn(1, 16384, 8).mul(4).to(dtype).requires_grad_()
    module(x).float().square().mean().backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in (x, *module.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_near_float64(dtype):
    module, x = wide()
    expected = module(x)
    with torch.autocast("cpu", dtype):
        actual = module.float()(x.float())
    assert_close(actual, expected, NEAR_FLOAT64[dtype])


@pytest.mark.parametrize("num_tokens", [1, 24, 49, 144])
def test_every_parameter_gets_a_gradient(num_tokens):
    module, x = attention(), tokens(num_tokens)
    (module(x) * tokens(num_tokens, seed=1).detach()).sum().backward()
    assert [name for name, parameter in module.named_parameters() if not parameter.grad.any()] == []
    assert x.grad.any()


def test_one_kernel_serves_every_head():
    module = attention()
    with torch.no_grad():
        module.qkv.weight[: 2 * C].zero_()
        module.qkv.bias[: 2 * C] = -100.0  # no query, no key: the depthwise branch alone
    x = tokens(24)
    v = (x @ module.qkv.weight[2 * C :].T + module.qkv.bias[2 * C :]).view(2, 4, 6, HEADS, -1)
    heads = [module.dwc(v[..., h, :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for h in range(HEADS)]
    expected = module.proj(torch.cat(heads, -1).flatten(1, 2))
    assert_close(module(x), expected, ALGEBRA)


def test_a_new_grid_resamples_the_table_as_set_grid_size_does():
    module, x = attention(), tokens(15)
    expected = module(x, grid_size=(5, 3))
    module.set_grid_size((5, 3))
    assert module.positional_encoding.shape == (1, 15, C)
    assert_close(module(x), expected, EXACT)


def test_tables_are_resampled_without_antialiasing():
    table = torch.randn(1, 9 * 6, C, dtype=torch.float64)
    picked = table.view(9, 6, C)[1::3, 1::3].reshape(1, 6, C)  # the centres of 3x3 blocks, and nothing around them
    assert_close(resample_table(table, (9, 6), (3, 2)), picked, ALGEBRA)


@pytest.mark.parametrize(
    ("num_tokens", "given", "message"),
    [
        (197, None, "197 tokens form no square grid; pass grid_size=\\(H, W\\)"),
        (24, (5, 5), "grid_size \\(5, 5\\) does not hold 24 tokens"),
    ],
)
def test_tokens_without_a_grid_are_refused(num_tokens, given, message):
    with pytest.raises(ValueError, match=message):
        attention()(tokens(num_tokens), grid_size=given)


def test_the_table_decides_between_grids_of_as_many_tokens():
    module, x = attention(grid_size=(2, 8)), tokens(16)
    assert_close(module(x), module(x, grid_size=(2, 8)), EXACT)
    assert (module(x) - module(x, grid_size=(4, 4))).abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["flat", "broadcast"])
def test_masked_tokens_change_no_other_whatever_they_hold(shape):
    module, x = attention(), tokens(24).detach()
    mask = torch.arange(24).expand(2, 24) % 5 != 2
    mask[1, 12:] = False
    attn_mask = mask if shape == "flat" else mask[:, None, None]
    garbage = torch.where(mask.unsqueeze(-1), x, torch.nan)
    expected, actual = module(x, attn_mask=attn_mask), module(garbage, attn_mask=attn_mask)
    assert_close(actual[mask], expected[mask], EXACT)
    assert (module(x) - expected)[mask].abs().max() > 1e-3


def test_a_mask_gives_what_fewer_keys_without_depthwise_neighbours_give():
    module, x, context = attention(), tokens(10), tokens(24, seed=1).detach()
    mask = torch.arange(24).expand(2, 24) < 6
    q, k, v = module.heads(*module._project(x, context)[0])
    (table,) = module.heads(module.positional_encoding)
    expected = linear_attention_reference(q, k + table, v, mask=mask)
    actual = module(x, context, attn_mask=mask)  # ten queries on no grid: no depthwise branch
    assert_close(actual, module.proj(expected.transpose(1, 2).flatten(2)), ALGEBRA)


def test_a_context_of_its_own_tokens_is_self_attention():
    module, x = attention(), tokens(24)
    assert_close(module(x, x), module(x), ALGEBRA)


def test_queries_on_another_grid_see_values_resized_in_two_dimensions():
    module, x, context = attention(), tokens(6), tokens(24, seed=1)
    out = module(x, context, grid_size=(2, 3))
    branch_off = module(x, context)
    v = module.heads(context @ module.qkv.weight[2 * C :].T + module.qkv.bias[2 * C :])[0]
    maps = nn.functional.interpolate(v.reshape(6, 4, 6, 8).permute(0, 3, 1, 2), (2, 3), mode="bilinear")
    local = module.dwc(maps).flatten(2).unflatten(0, (2, HEADS)).permute(0, 3, 1, 2).flatten(2)
    assert_close(out - branch_off, local @ module.proj.weight.T, ALGEBRA)
    gradients = torch.autograd.grad(out.square().sum(), (x, context))
    assert all(g.abs().sum(-1).min() > 0 for g in gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 25}, "dim must be a multiple of num_heads, got 25 and 3"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"attn_drop": 0.1}, "attn_drop must be 0, got 0.1"),
    ],
    ids=["heads", "kernel", "dropout"],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimplifiedLinearAttention(**{"dim": C, "num_heads": HEADS, **arguments})


def test_masks_that_tell_queries_apart_are_refused():
    with pytest.raises(ValueError, match="is not causal"):
        attention()(tokens(24), is_causal=True)
    for mask in (torch.ones(2, 1, 24, 24, dtype=torch.bool), torch.zeros(2, 24)):
        with pytest.raises(ValueError, match=r"attn_mask must be boolean \(B, M\) or \(B, 1, 1, M\)"):
            attention()(tokens(24), attn_mask=mask)


def test_projections_do_without_bias_where_asked():
    module = attention(qkv_bias=False, proj_bias=False)
    assert module.qkv.bias is None
    assert module.proj.bias is None
    assert_close(module(tokens(24), tokens(24)), module(tokens(24)), ALGEBRA)


@pytest.mark.parametrize("sr_ratio", [1, 2, 3])
def test_pyramid_attention_takes_grids_that_reduction_does_not_divide(sr_ratio):
    module, x = redrawn(PyramidLinearAttention(C, HEADS, sr_ratio, grid_size=(6, 6))), tokens(35)
    out = module(x, grid_size=(7, 5))
    assert out.shape == x.shape
    out.square().sum().backward()
    assert x.grad[:, 0].any()


def test_windows_attend_to_themselves_alone():
    module, x = redrawn(WindowLinearAttention(C, HEADS, (2, 3))), tokens(24)
    out = module(x, x, x, (4, 6)).view(2, 4, 6, C)
    (gradient,) = torch.autograd.grad(out[:, :2, 3:].square().sum(), x)
    touched = gradient.view(2, 4, 6, C).abs().sum((0, 3)) > 0
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, 3:] = True
    assert_close(touched, expected, EXACT)


def test_windows_that_do_not_tile_are_refused():
    module = redrawn(WindowLinearAttention(C, HEADS, (3, 4)))
    with pytest.raises(ValueError, match="windows of 3x4 do not tile a grid of 4x6"):
        module(tokens(24), tokens(24), tokens(24), (4, 6))
