"""Attention modules that run in C++: nothing is lost where something trains, nothing dies where there is nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slabformer import SimplifiedLinearAttention
from slabformer.nn.attention import LinearAttentionCore
from slabformer.nn.attention_variants import PyramidLinearAttention
from slabformer.nn.converted_attention import ConvertedLinearAttention
from slabformer.nn.stripes import WindowLinearAttention
from slabformer.ops.dispatch import has_kernel
from slabformer.ops.linear_attention import linear_attention
from slabformer.ops.native import linear_attention as native
from tolerances import FLOAT32, assert_close

pytestmark = pytest.mark.usefixtures("_compiler")

C, GRID = 32, (4, 4)


class Windows(WindowLinearAttention):
    """From tokens alone."""

    def forward(self, x: Tensor, **options: object) -> Tensor:
        return super().forward(x, 0.5 * x, x.sin(), (4, 4), **options)


def converted(grid: tuple[int, int], prefix: int) -> ConvertedLinearAttention:
    projections, out = {"qkv": nn.Linear(C, 3 * C)}, {"proj": nn.Linear(C, C)}
    return ConvertedLinearAttention(projections, out, 2, grid_size=grid, num_prefix_tokens=prefix)


KINDS: dict[str, Callable[[], LinearAttentionCore]] = {
    "packed": lambda: SimplifiedLinearAttention(C, 2, grid_size=GRID),
    "pyramid": lambda: PyramidLinearAttention(C, 2, 1, grid_size=GRID),
    "reduced": lambda: PyramidLinearAttention(C, 2, 2, grid_size=GRID, norm_layer=nn.LayerNorm),
    "windows": lambda: Windows(C, 2, (2, 4)),
    "converted": lambda: converted(GRID, 0),
    "converted_prefix": lambda: converted((3, 5), 1),
}


def attention(kind: str) -> LinearAttentionCore:
    made = KINDS[kind]()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    made.native = True
    return made.eval()


def composed(made: LinearAttentionCore) -> LinearAttentionCore:
    other = copy.deepcopy(made)
    other.native = False
    return other


def tokens(B: int = 2) -> Tensor:
    return torch.randn(B, 16, C)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of queries that C++ was given."""
    seen: list[tuple[int, ...]] = []
    prepare = native.prepare

    def noted(dtype: torch.dtype, head_dim: int, value_dim: int) -> object:
        seen.append((head_dim, value_dim))
        return prepare(dtype, head_dim, value_dim)

    monkeypatch.setattr(native, "prepare", noted)
    return seen


def parameters_of(kind: str) -> list[str]:
    return [name for name, _ in KINDS[kind]().named_parameters()]


@pytest.mark.parametrize(
    ("kind", "trained"), [(kind, name) for kind in KINDS for name in (*parameters_of(kind), "all", "input", "none")]
)
def test_whatever_needs_a_gradient_gets_it_and_outputs_keep_their_biases(kind, trained, calls):
    made, x = attention(kind), tokens().requires_grad_(trained == "input")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trained in ("all", name))
    other = composed(made)
    expected, actual = other(x), made(x)
    assert_close(actual, expected, FLOAT32)
    assert bool(calls) == (trained == "none" and kind != "reduced")  # that one has few keys: quadratic is cheaper
    if trained == "none":
        assert not actual.requires_grad
        return
    leaves = [[p for p in (x, *each.parameters()) if p.requires_grad] for each in (made, other)]
    weights = torch.randn_like(expected)
    got, wanted = (
        torch.autograd.grad((out * weights).sum(), leaf) for out, leaf in zip((actual, expected), leaves, strict=True)
    )
    for one, same in zip(got, wanted, strict=True):
        assert_close(one, same, FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_grad_mode_it_runs_in_c_plus_plus_whatever_could_train(kind, mode, calls):
    made, x = attention(kind), tokens()
    with mode():
        assert_close(made(x), composed(made)(x), FLOAT32)
    assert calls or kind == "reduced"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_an_empty_batch_gives_an_empty_batch(kind, grad):
    made = attention(kind)
    with torch.set_grad_enabled(grad):
        assert made(tokens(0)).shape == (0, 16, C)


@pytest.mark.parametrize(("B", "N", "M"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("order", [None, "linear", "quadratic"])
def test_no_tokens_give_no_tokens_and_no_keys_give_zero(B, N, M, order):
    q, k = torch.randn(B, 2, N, 16), torch.randn(B, 2, M, 16)
    for grad in (False, True):
        out = linear_attention(q.requires_grad_(grad), k, k, order=order, native=True)
        assert out.shape == (B, 2, N, 16)
        assert out.eq(0).all()
    with torch.no_grad():
        out = native.native_linear_attention(q, k, k)
    assert out.shape == (B, 2, N, 16)
    assert out.eq(0).all()


def test_a_table_that_trains_gets_its_gradient():
    q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))
    table = torch.randn(1, 2, 16, 16, requires_grad=True)
    gradients = [
        torch.autograd.grad(linear_attention(q, k, v, table=table, native=each).square().sum(), table)[0]
        for each in (False, True)
    ]
    assert_close(gradients[1], gradients[0], FLOAT32)


def test_the_kernel_itself_refuses_what_needs_a_gradient():
    q = torch.randn(1, 2, 16, 16)
    with pytest.raises(ValueError, match=r"the attention in C\+\+ has no gradient; call it under torch.no_grad"):
        native.native_linear_attention(q, q, q, biases=(torch.randn(2, 16, requires_grad=True), None, None))
    assert native.native_linear_attention(q, q, q).shape == q.shape


@pytest.mark.parametrize("broken", ["forward", "hook", "pre_hook", "subclass"])
def test_a_projection_with_a_forward_of_its_own_is_called(broken, calls):
    made, x = attention("packed"), tokens()
    plain = nn.Linear.forward
    if broken == "forward":
        made.qkv.forward = lambda x: 2 * plain(made.qkv, x)
    elif broken == "hook":
        made.qkv.register_forward_hook(lambda module, args, out: 2 * out)
    elif broken == "pre_hook":
        made.qkv.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    else:
        made.qkv.__class__ = type("Twice", (nn.Linear,), {"forward": lambda self, x: 2 * plain(self, x)})
    with torch.no_grad():
        assert_close(made(x), composed(made)(x), FLOAT32)


class Tagged(torch.Tensor):
    """A tensor that computes in its own way."""


def test_subclasses_of_tensors_are_left_to_torch(calls):
    made, x = attention("packed"), tokens().as_subclass(Tagged)
    with torch.no_grad():
        assert isinstance(made(x), Tagged)
        q = torch.randn(1, 2, 16, 16)
        assert not has_kernel(q.as_subclass(Tagged), q, q, native=True)
        assert not has_kernel(q, q, q, native=True, also=[None, q.as_subclass(Tagged)])
        assert has_kernel(q, q, q, native=True, also=[None, q])
    assert not calls


def test_functional_transforms_see_through_it(calls):
    made, x = attention("packed"), tokens()
    with torch.no_grad():
        expected = composed(made)(x)
        each = torch.func.vmap(lambda row: made(row[None])[0])(x)
        assert_close(each, expected, FLOAT32)
        weights = dict(composed(made).named_parameters())
        assert_close(torch.func.functional_call(made, weights, (x,)), expected, FLOAT32)
        jacobian = torch.func.jacrev(lambda x: made(x).sum())(x)
    expected = torch.autograd.functional.jacobian(lambda x: composed(made)(x).sum(), x)
    assert_close(jacobian, expected, 10 * FLOAT32)


def test_masked_keys_may_be_all_of_them(calls):
    q = torch.randn(2, 2, 16, 16)
    mask = torch.tensor([[False] * 16, [True] * 16])
    with torch.no_grad():
        out = linear_attention(q, q, q, mask=mask, native=True)
    assert calls
    assert out[0].eq(0).all()
    assert_close(out, linear_attention(q, q, q, mask=mask), FLOAT32)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_expanded_and_sliced_tokens_are_read_as_they_stand(name, calls):
    heads = {each: torch.randn(2, 2, 16, 16) for each in "qkv"}
    for change in (
        lambda t: t[:1].expand(2, -1, -1, -1),
        lambda t: t[:, :, :1].expand(-1, -1, 16, -1),
        lambda t: t[..., :1].expand(-1, -1, -1, 16),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t, t], 2)[:, :, ::2],
    ):
        changed = heads | {name: change(heads[name])}
        with torch.no_grad():
            assert_close(linear_attention(**changed, native=True), linear_attention(**changed), FLOAT32)
    assert len(calls) == 5
