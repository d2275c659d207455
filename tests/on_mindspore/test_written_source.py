"""What is written for MindSpore computes what torch does; here torch stands in for MindSpore, which is not needed."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

import slabformer as sf
import small_pvts
import small_swins
from slabformer.mindspore.convert import Written, write_model
from slabformer.mindspore.graph import ConversionError
from slabformer.mindspore.operators import OPERATORS, Operator
from slabformer.nn.controls import prepbn_modules
from small_models import IMAGES, images, trained_looking
from tolerances import FLOAT32, assert_close
from torch_as_mindspore import run_source


class Computes(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def run(written: Written, *inputs: Tensor, training: bool = False) -> Any:
    return run_source(written.source, written.tensors, *inputs, training=training)


def assert_written(model: nn.Module, example: Tensor, *others: Tensor) -> Written:
    """That the source computes what ``model`` does, of the example and of other batch sizes."""
    model.eval()
    written = write_model(model, example)
    for x in (example, *others):
        with torch.no_grad():
            assert_close(run(written, x), model(x), FLOAT32)
    return written


@pytest.mark.parametrize(
    "row", [row for row in OPERATORS if row.example is not None], ids=lambda row: str(row.ops[0]).removeprefix("aten.")
)
def test_every_operator_computes_what_torch_does(row: Operator) -> None:
    assert row.example is not None
    model, x = Computes(row.example), torch.randn(2, 4, 6)
    assert_close(run(write_model(model.eval(), x), x).float(), row.example(x).float(), FLOAT32)


def test_operators_are_in_one_row_each() -> None:
    ops = [op for row in OPERATORS for op in row.ops]
    assert len(ops) == len(set(ops))


@pytest.mark.parametrize(
    ("name", "fused"),
    [("slab_deit_micro", False), ("slab_deit_micro", True), ("deit_micro_prepbn", True), ("deit_micro", False)],
)
def test_deit_at_any_batch_size(name: str, fused: bool) -> None:
    model = trained_looking(name)
    if fused:
        model, _ = sf.fuse(model, images())
    assert_written(model, images(1), images(3))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("attention", ["LLSS", "SSSS"])
def test_swin(attention: str, fused: bool) -> None:
    model, x = small_swins.create(attention).float(), small_swins.images().float()
    ready(model)
    if fused:
        model, _ = sf.fuse(model, x)
    written = assert_written(model, x, x[:1])
    assert any(name.endswith("attn.index") for name in written.constants)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slab_pvt_tiny", "pvt_tiny_prepbn", "slab_pvt_v2_b0"])
def test_pvt(name: str) -> None:
    model, x = small_pvts.small(name).float(), small_pvts.images().float()
    assert_written(model, x)


@pytest.mark.slow
def test_cswin() -> None:
    model = timm.create_model("slab_cswin_tiny", img_size=64, depths=(1, 1, 2, 1), embed_dim=8, num_heads=(2, 2, 4, 4))
    assert_written(ready(model), torch.randn(2, 3, 64, 64))


def ready(model: nn.Module) -> nn.Module:
    """In eval mode with gamma 0 and norms redrawn."""
    sf.testing.randomize_norms_(model)
    for norm in prepbn_modules(model).values():
        norm.set_gamma(0.0)
    return model.eval()


def test_blocks_that_are_alike_share_a_class_and_a_loop() -> None:
    source = write_model(trained_looking(), images()).source
    assert source.count("class SlabBlock") == 1
    assert "self.blocks = nn.CellList([SlabBlock() for _ in range(4)])" in source
    assert "for block in self.blocks:\n            x = block(x)" in source
    assert "blocks.0 to blocks.3" in source


def test_a_loop_over_modules_that_are_called_by_a_number_names_one_of_them() -> None:
    stages = [nn.Sequential(*(Residual() for _ in range(3))) for _ in range(2)]
    written = assert_written(nn.Sequential(nn.Linear(6, 6), nn.Sequential(*stages)), torch.randn(2, 6))
    assert "for cell in self" in written.source


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


def test_rates_of_stochastic_depth_are_settings_of_a_class() -> None:
    model = timm.create_model("slab_deit_micro", drop_path_rate=0.3).eval()
    source = write_model(model, torch.randn(2, 3, 32, 32)).source
    assert "def __init__(self, drop_path1, drop_path2):" in source
    assert "self.drop_path1 = cells.DropPath(p=drop_path1)" in source
    ast.parse(source)


def test_every_norm_and_dropout_stays_a_cell() -> None:
    parts = [sf.RepBN(6), sf.PRepBN(6), nn.LayerNorm(6), nn.Dropout(0.1), DropPath(0.1), nn.Linear(6, 3)]
    source = write_model(nn.Sequential(*parts).eval(), torch.randn(2, 4, 6)).source
    for cell in ("RepBN(6", "PRepBN(6", "LayerNorm(6", "Dropout(p=0.1)", "DropPath(p=0.1)", "Linear(6, 3)"):
        assert f"cells.{cell}" in source


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_train_mode_computes_the_blend(gamma: float) -> None:
    model = nn.Sequential(nn.Linear(6, 6), sf.PRepBN(6, eta=0.3), nn.Linear(6, 3), sf.RepBN(3))
    sf.testing.randomize_norms_(model)
    model[1].set_gamma(gamma)
    x = torch.randn(5, 4, 6)
    written = write_model(model.eval(), x)
    assert_close(run(written, x, training=True), model.train()(x), FLOAT32)


class Twice(nn.Module):
    """One module called on tokens of two lengths, and one called twice alike."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.block = Half()

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(self.mixed(x))
        return self.block(x)[:, :2] + self.block(x[:, :2])


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fc = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc(x).chunk(2, 1)
        return torch.cat([second * self.scale, first], 1)


def test_modules_that_are_called_again() -> None:
    assert_written(Twice(), torch.randn(2, 4, 6), torch.randn(3, 4, 6))


class Tied(nn.Module):
    """A weight that two modules share, and one that another module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.reader = nn.Linear(6, 6), nn.Linear(6, 6), Reader()
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.second(self.first(x)), self.first.bias)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.fc(x) * bias


def test_tied_weights_and_weights_of_other_modules() -> None:
    assert_written(Tied(), torch.randn(2, 4, 6))


class OddNames(nn.Module):
    """Names that cells of MindSpore have for themselves, or that are no names in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Linear(6, 6)
        self.parts = nn.ModuleDict({"in": nn.Linear(6, 6), "one-two": Half()})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["one-two"](self.parts["in"](self.phase(x)))


def test_parameters_have_torchs_names_whatever_attributes_are_called() -> None:
    written = assert_written(OddNames(), torch.randn(2, 4, 6))
    assert '"phase_.weight", "phase.weight",' in written.source
    assert '"parts.one_two.fc.bias", "parts.one-two.fc.bias",' in written.source


def test_a_list_with_gaps_and_several_outputs() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.Tanh(), nn.Linear(6, 3))
    assert_written(model, torch.randn(2, 6))
    two = Computes(lambda x: (x * 2, x.sum(-1)))
    x = torch.randn(2, 6)
    first, second = run(write_model(two.eval(), x), x)
    assert_close(first, x * 2, FLOAT32)
    assert_close(second, x.sum(-1), FLOAT32)


def test_writing_in_place_is_taken_where_nothing_reads_on() -> None:
    assert_written(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), torch.randn(2, 6))

    def reads_on(x: Tensor) -> Tensor:
        y = x * 2
        z = y.view(-1)
        z.mul_(3)
        return y + 1

    with pytest.raises(ConversionError, match=r"aten\.mul_\.Tensor: it writes to memory that is read again"):
        write_model(Computes(reads_on).eval(), torch.randn(2, 6))


def test_an_unknown_operator_is_refused_by_name_with_its_line() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(x, 1)

    with pytest.raises(ConversionError) as caught:
        write_model(Unknown().eval(), torch.randn(2, 6))
    assert "aten.cumsum.default: this operator has no counterpart yet; it comes from test_written_source.py:" in str(
        caught.value
    )
    assert str(caught.value).endswith("return torch.cumsum(x, 1)")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: F.adaptive_avg_pool2d(x[:, None], (3, 4)), "which windows of one size do not tile"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "causal attention"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), r"aten\.div\.Tensor_mode: this operator has no counterpart"),
        (lambda x: x[1:], "a part of the batch is taken"),
        (lambda x: x[x[:, 0, 0] > 0], "cannot|no counterpart|whole numbers"),
        (lambda x: {"logits": x, "count": 3}, "must return tensors"),
    ],
    ids=["pool", "causal", "rounding", "batch", "mask", "no-tensor"],
)
def test_what_has_no_counterpart_is_refused(function: Callable[[Tensor], Any], said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        write_model(Computes(function).eval(), torch.randn(2, 4, 6))


def test_a_model_that_would_train_wrongly_says_so() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    written = write_model(Drops().eval(), torch.randn(2, 6))
    assert 'self.inference_only = "a dropout that is no module of its own in the model"' in written.source
    with pytest.raises(ValueError, match="this model is for inference: it has a dropout"):
        run(written, torch.randn(2, 6), training=True)


def test_train_mode_and_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval"):
        write_model(nn.Linear(6, 3).train(), torch.randn(2, 6))
    with pytest.raises(ConversionError, match=r"weight is not; call model\.float"):
        write_model(nn.Linear(6, 3).double().eval(), torch.randn(2, 6).double())
    with pytest.raises(ValueError, match="example_inputs must be a tensor"):
        write_model(nn.Linear(6, 3).eval(), "images")  # type: ignore[arg-type]


def test_the_docstring_says_origin_and_sizes() -> None:
    written = write_model(trained_looking(), images(), "slab_deit_micro")
    about = ast.get_docstring(ast.parse(written.source))
    assert about is not None
    assert about.startswith("slab_deit_micro for MindSpore, ")
    assert f"for inputs of {'x'.join(map(str, IMAGES))}, any batch size" in about
