"""Models written for MindSpore and run there: written whole or not at all, loaded strictly, equal to torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import slabformer as sf
from slabformer.mindspore.operators import OPERATORS, Operator
from small_models import images, trained_looking
from tolerances import EXACT, FLOAT32, assert_close

pytestmark = pytest.mark.mindspore


class AllOperators(nn.Module):
    """The examples of all rows, as one model: each compiled by itself would take minutes."""

    rows: ClassVar[dict[str, Operator]] = {str(row.ops[0]): row for row in OPERATORS if row.example is not None}

    def forward(self, x: Tensor) -> list[Tensor]:
        return [row.example(x) for row in self.rows.values() if row.example is not None]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore writes what it knows of an error to the working folder."""
    monkeypatch.chdir(tmp_path)


def test_every_operator(tmp_path: Path) -> None:
    from slabformer.mindspore.convert import build, runtime_of, write_model
    from slabformer.mindspore.files import load

    model, x = AllOperators().eval(), torch.randn(2, 4, 6)
    written = write_model(model, x)
    (tmp_path / "operators.py").write_text(written.source)
    cell = build(tmp_path / "operators.py")
    load(cell, written.tensors)
    wrong = {}
    for name, actual, expected in zip(AllOperators.rows, runtime_of(cell)(x), model(x), strict=True):
        scale = expected.float().square().mean().sqrt()
        error = ((actual.float() - expected.float()).abs().max() / scale).item()
        if actual.dtype != expected.dtype or actual.shape != expected.shape or not error <= FLOAT32:
            wrong[name] = error
    assert wrong == {}


@pytest.mark.parametrize("name", ["slab_deit_micro", "deit_micro_prepbn"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_model_its_files_and_its_weights(name: str, fused: bool, tmp_path: Path) -> None:
    from slabformer import mindspore as ours

    model = trained_looking(name)
    if fused:
        model, _ = sf.fuse(model, images())
    cell = ours.from_torch(model, images(), tmp_path / "made", name=name)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [f"{name}.ckpt", f"{name}.py"]
    state, own = ours.state_of(cell), model.state_dict()
    assert set(state) == set(own)
    for key, value in own.items():
        assert_close(state[key], value, EXACT)
    for x in (images(1, seed=1), images(3, seed=2)):
        assert_close(outputs(cell, x), model(x).detach(), FLOAT32)
    again = ours.build(tmp_path / "made" / f"{name}.py")
    ours.load(again, tmp_path / "made" / f"{name}.ckpt")
    assert_close(outputs(again, images()), model(images()).detach(), FLOAT32)


def outputs(cell: Any, x: Tensor) -> Tensor:
    from slabformer.mindspore.files import to_mindspore

    return torch.from_numpy(cell(to_mindspore(x)).asnumpy())


def test_a_training_step_has_torchs_gradients_and_statistics(tmp_path: Path) -> None:
    import mindspore

    from slabformer import mindspore as ours
    from slabformer.mindspore.files import to_mindspore

    model, x = trained_looking(), images(4)
    for norm in model.modules():
        if isinstance(norm, sf.PRepBN):
            norm.set_gamma(0.5)
    cell = ours.from_torch(model, x, tmp_path)
    cell.set_train(True)
    model.train()
    loss = model(x).square().mean()
    loss.backward()
    weights = cell.trainable_params()
    step = mindspore.value_and_grad(lambda images: (cell(images) ** 2).mean(), None, weights)
    found, gradients = step(to_mindspore(x))
    assert abs(float(found) / loss.item() - 1) < 1e-5
    assert {one.name for one in weights} == {own for own, _ in model.named_parameters()}
    for one, gradient in zip(weights, gradients, strict=True):
        expected = model.get_parameter(one.name).grad
        assert expected is not None
        scale = max(expected.abs().max().item(), 1e-3)
        assert (torch.from_numpy(gradient.asnumpy()) - expected).abs().max().item() < 1e-3 * scale, one.name
    state = ours.state_of(cell)
    for own, buffer in model.named_buffers():
        if own in state:
            assert_close(state[own].float(), buffer.float(), FLOAT32)


def test_nothing_is_left_of_a_model_that_does_not_compute_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slabformer import mindspore as ours
    from slabformer.mindspore import functions

    monkeypatch.setattr(functions, "gelu", functions.gelu_tanh)
    folder = tmp_path / "made"
    with pytest.raises(sf.VerificationError):
        ours.from_torch(trained_looking(), images(), folder)
    assert list(folder.iterdir()) == []


def test_checkpoints_of_other_models_and_other_files_are_refused(tmp_path: Path) -> None:
    from slabformer import mindspore as ours

    cell = ours.from_torch(nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3)).eval(), torch.randn(2, 6), tmp_path)
    state = ours.state_of(cell)
    before = {name: value.clone() for name, value in state.items()}
    state["2.weight"] = state.pop("1.weight")
    ours.write_checkpoint(state, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"1 tensors missing \(first: 1\.weight\), 1 unexpected \(first: 2\.weight\)"):
        ours.load(cell, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"cannot read .*text\.ckpt as a checkpoint of MindSpore"):
        ours.load(cell, tmp_path / "text.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.ckpt"):
        ours.load(cell, tmp_path / "none.ckpt")
    for name, value in ours.state_of(cell).items():
        assert_close(value, before[name], EXACT)


def test_names_that_cells_have_for_themselves() -> None:
    import mindspore

    from slabformer.mindspore.names import RESERVED

    own = {name for name in dir(mindspore.nn.Cell()) if not name.startswith("_")}
    assert own <= RESERVED, sorted(own - RESERVED)
