"""Cells for MindSpore compute what the modules of this library do: values, gradients, running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slabformer as sf
from slabformer.nn.affine import Affine
from slabformer.nn.token_batch_norm import TokenBatchNorm
from tolerances import FLOAT32, assert_close

pytestmark = pytest.mark.mindspore

#: sums over tokens in another order
GRADIENTS = 1e-4


@pytest.fixture(scope="module", params=["graph", "pynative"])
def mindspore(request: pytest.FixtureRequest) -> Iterator[Any]:
    """MindSpore in either of its modes."""
    from slabformer.mindspore.runtime import require

    module = require()
    before = module.get_context("mode")
    module.set_context(mode=module.GRAPH_MODE if request.param == "graph" else module.PYNATIVE_MODE)
    yield module
    module.set_context(mode=before)


def prepbn(gamma: float) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        norm = sf.PRepBN(6, eta=0.3)
        norm.set_gamma(gamma)
        return norm

    return make


#: module, and the cell that computes the same
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "repbn": (lambda: sf.RepBN(6, eta=0.3), lambda cells: cells.RepBN(6)),
    "repbn-maps": (lambda: sf.RepBN(4, eta=0.3, channel_dim=1), lambda cells: cells.RepBN(4, channel_dim=1)),
    "token-batch-norm": (lambda: TokenBatchNorm(6), lambda cells: cells.TokenBatchNorm(6)),
    "batch-norm": (lambda: nn.BatchNorm1d(4), lambda cells: cells.BatchNorm(4)),
    "prepbn-fading": (prepbn(0.5), lambda cells: cells.PRepBN(6)),
    "prepbn-done": (prepbn(0.0), lambda cells: cells.PRepBN(6)),
    "prepbn-warm": (prepbn(1.0), lambda cells: cells.PRepBN(6)),
    "layer-norm": (lambda: nn.LayerNorm(6), lambda cells: cells.LayerNorm(6)),
    "rms-norm": (lambda: nn.RMSNorm(6, eps=1e-6), lambda cells: cells.RMSNorm(6)),
    "affine": (lambda: Affine(6), lambda cells: cells.Affine(6)),
    "linear": (lambda: nn.Linear(6, 3), lambda cells: cells.Linear(6, 3)),
    "attention": (
        lambda: sf.SimplifiedLinearAttention(6, 2, grid_size=(2, 2)),
        lambda cells: cells.SimplifiedLinearAttention(6, 2, grid_size=(2, 2)),
    ),
    "attention-linear-order": (
        lambda: sf.SimplifiedLinearAttention(6, 3, grid_size=(4, 8)),
        lambda cells: cells.SimplifiedLinearAttention(6, 3, grid_size=(4, 8)),
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PAIRS)
def test_values_gradients_and_statistics(mindspore: Any, name: str, training: bool) -> None:
    from slabformer.mindspore import cells
    from slabformer.mindspore.files import load, state_of, to_mindspore

    make, make_cell = PAIRS[name]
    module, cell = redrawn(make()), make_cell(cells)
    module.train(training)
    load(cell, module.state_dict())
    cell.set_train(training)
    x, target = torch.randn(2, 32 if name.endswith("order") else 4, 6), torch.randn(2, 1, 1)
    names = [own for own, parameter in module.named_parameters() if parameter.requires_grad]
    loss = (module(x) * target).square().sum()
    gradients = torch.autograd.grad(loss, [module.get_parameter(own) for own in names], allow_unused=True)

    weights = cell.trainable_params()
    assert {one.name for one in weights} == set(names)

    def forward(tokens: Any, wanted: Any) -> Any:
        return ((cell(tokens) * wanted) ** 2).sum()

    found, found_gradients = mindspore.value_and_grad(forward, None, weights)(to_mindspore(x), to_mindspore(target))
    assert_close(torch.tensor(float(found)), loss.detach(), GRADIENTS)
    by_name = {one.name: torch.from_numpy(g.asnumpy()) for one, g in zip(weights, found_gradients, strict=True)}
    for own, gradient in zip(names, gradients, strict=True):
        expected = torch.zeros_like(by_name[own]) if gradient is None else gradient
        scale = max(expected.abs().max().item(), 1.0)
        assert (by_name[own] - expected).abs().max().item() <= GRADIENTS * scale, own
    state = state_of(cell)
    for own, buffer in module.named_buffers():
        if own in state:
            assert_close(state[own].float(), buffer.float(), FLOAT32)


def redrawn(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return module


def test_stochastic_depth_and_dropout(mindspore: Any) -> None:
    from slabformer.mindspore import cells

    x = mindspore.ops.ones((4000, 1, 2))
    for cell, kept in ((cells.DropPath(0.25), 1 / 0.75), (cells.DropPath(0.25, scale_by_keep=False), 1.0)):
        cell.set_train(True)
        y = cell(x).asnumpy()
        assert abs(y.max() - kept) < 1e-5
        assert set((y / y.max()).flatten()) == {0.0, 1.0}
        assert (y[:, :, 0] == y[:, :, 1]).all()
        assert abs((y == 0).mean() - 0.25) < 0.05
        cell.set_train(False)
        assert (cell(x).asnumpy() == 1).all()
    dropout = cells.Dropout(0.25)
    dropout.set_train(True)
    assert abs((dropout(x).asnumpy() == 0).mean() - 0.25) < 0.05


def test_gamma_is_written_without_compiling_anew(mindspore: Any) -> None:
    from slabformer.mindspore import cells
    from slabformer.mindspore.files import load, to_mindspore

    norm, cell = sf.PRepBN(6, eta=0.3), cells.PRepBN(6)
    load(cell, norm.state_dict())
    norm.train(), cell.set_train(True)
    x = torch.randn(3, 4, 6)
    for gamma in (0.75, 0.25, 0.0):
        norm.set_gamma(gamma)
        assert cells.set_gamma(cell, gamma) == 1
        assert_close(torch.from_numpy(cell(to_mindspore(x)).asnumpy()), norm(x), FLOAT32)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 2"):
        cells.set_gamma(cell, 2)


def test_settings_that_cannot_be_are_refused(mindspore: Any) -> None:
    from slabformer.mindspore import cells

    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got 6 and 4"):
        cells.SimplifiedLinearAttention(6, 4)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        cells.SimplifiedLinearAttention(6, 2, kernel_size=4)


@pytest.mark.parametrize("patch", [2, 3])
def test_convolutions_in_patches_and_overlapping(mindspore: Any, patch: int) -> None:
    from slabformer.mindspore import cells
    from slabformer.mindspore.files import load, to_mindspore

    convolution, x = nn.Conv2d(3, 5, patch, patch), torch.randn(2, 3, 8, 8)
    cell = cells.Conv2d(3, 5, (patch, patch), stride=(patch, patch))
    load(cell, convolution.state_dict())
    assert_close(as_torch(cell(to_mindspore(x))), convolution(x).detach(), FLOAT32)
    overlapping = nn.Conv2d(4, 4, 3, 2, 1, groups=4)
    cell = cells.Conv2d(4, 4, (3, 3), stride=(2, 2), padding=(1, 1), groups=4)
    load(cell, overlapping.state_dict())
    x = torch.randn(2, 4, 9, 7)
    assert_close(as_torch(cell(to_mindspore(x))), overlapping(x).detach(), FLOAT32)


def test_gelu_is_torchs(mindspore: Any) -> None:
    from slabformer.mindspore import functions
    from slabformer.mindspore.files import to_mindspore

    x = torch.linspace(-4, 4, 41)
    assert_close(as_torch(functions.gelu(to_mindspore(x))), F.gelu(x), FLOAT32)
    assert_close(as_torch(functions.gelu_tanh(to_mindspore(x))), F.gelu(x, approximate="tanh"), FLOAT32)


def as_torch(x: Any) -> Tensor:
    return torch.from_numpy(x.asnumpy())
