"""Models by name, weights from and to torch, and a training whose LayerNorm fades out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import slabformer as sf
from small_models import IMAGES, MODEL_ARGS, images, trained_looking
from small_swins import SMALL
from tolerances import EXACT, FLOAT32, assert_close

pytestmark = pytest.mark.mindspore


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore writes what it knows of an error to the working folder."""
    monkeypatch.chdir(tmp_path)


def test_models_by_name_fused_and_their_weights() -> None:
    from slabformer import mindspore as ours

    cell = ours.create_model("slab_deit_micro", fused=True, **MODEL_ARGS)
    assert not any("rep." in name for name in ours.state_of(cell))
    fused, _ = sf.fuse(trained_looking(), images())
    ours.load(cell, fused.state_dict())
    assert_close(ours.runtime_of(cell)(images(3)), fused(images(3)).detach(), FLOAT32)
    with pytest.raises(ValueError, match="unknown model 'slab_deit_mikro'; did you mean 'slab_deit_micro'"):
        ours.create_model("slab_deit_mikro")


def test_weights_go_to_torch_and_back(tmp_path: Path) -> None:
    from slabformer import mindspore as ours

    model, other = trained_looking(), trained_looking(seed=1)
    ours.from_torch(model, images(), tmp_path, name="micro")
    ours.load_into_torch(other, tmp_path / "micro.ckpt")
    for name, value in model.state_dict().items():
        assert_close(other.state_dict()[name], value, EXACT)
    ours.save_from_torch(other, tmp_path / "again.ckpt")
    assert set(ours.read_checkpoint(tmp_path / "again.ckpt")) == set(model.state_dict())
    with pytest.raises(ValueError, match="checkpoint does not fit Linear: 2 tensors missing"):
        ours.load_into_torch(nn.Linear(2, 3), tmp_path / "again.ckpt")


def test_constants_are_in_the_checkpoint_and_not_in_torchs_state(tmp_path: Path) -> None:
    from slabformer import mindspore as ours

    model = sf.testing.randomize_norms_(timm.create_model("swin_tiny_prepbn", norm="repbn", **SMALL)).eval()
    x = torch.randn(2, 3, 64, 64)
    cell = ours.from_torch(model, x, tmp_path / "made", name="swin")
    assert set(ours.state_of(cell)) == set(model.state_dict())
    other = timm.create_model("swin_tiny_prepbn", norm="repbn", **SMALL).eval()
    ours.load_into_torch(other, tmp_path / "made" / "swin.ckpt")
    assert_close(other(x), model(x), EXACT)
    ours.save_from_torch(model, tmp_path / "published.ckpt", published=True)
    assert "patch_embed.norm.bn.moving_mean" in ours.read_checkpoint(tmp_path / "published.ckpt")
    again = timm.create_model("swin_tiny_prepbn", norm="repbn", **SMALL).eval()
    ours.load_into_torch(again, tmp_path / "published.ckpt")
    assert_close(again(x), model(x), EXACT)
    fresh = ours.build(tmp_path / "made" / "swin.py")
    with pytest.raises(ValueError, match=r"tensors missing \(first: .*attn\.index\)"):
        ours.load(fresh, model.state_dict())  # it has zeros for them, and no one to say better


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_gamma_falls_as_in_torch(shape: Any) -> None:
    from slabformer import mindspore as ours

    callback = ours.ProgressiveCallback(40, warmup=0.1, fade=0.5, shape=shape)
    schedule = sf.ProgressiveSchedule(nn.Sequential(sf.PRepBN(4)), 40, warmup=0.1, fade=0.5, shape=shape)
    for step in range(41):
        assert callback.gamma_at(step) == pytest.approx(schedule.gamma)
        if step < 40:
            schedule.step()
    with pytest.raises(ValueError, match="the schedule would end after training"):
        ours.ProgressiveCallback(40, warmup=0.5, fade=0.6)


def test_a_model_trains_while_its_layernorm_fades(tmp_path: Path) -> None:
    import mindspore
    from mindspore import dataset
    from mindspore import nn as cells
    from mindspore.train import Model

    from slabformer import mindspore as ours

    args = {**MODEL_ARGS, "depth": 1}
    cell = ours.create_model("slab_deit_micro", **args)
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 64).astype(np.int32)
    pictures = draw.normal(labels[:, None, None, None] - 0.5, 1, (64, *IMAGES)).astype(np.float32)
    data = dataset.NumpySlicesDataset((pictures, labels), shuffle=False).batch(32)
    loss = cells.CrossEntropyLoss()
    before = float(loss(cell(mindspore.Tensor(pictures[:32])), mindspore.Tensor(labels[:32])))
    optimizer = cells.AdamWeightDecay(cell.trainable_params(), 3e-3)
    callback = ours.ProgressiveCallback(12, fade=0.5)
    Model(cell, loss_fn=loss, optimizer=optimizer).train(6, data, callbacks=[callback], dataset_sink_mode=False)
    state = ours.state_of(cell)
    assert state["norm.gamma"].item() == 0
    assert state["norm.rep.num_batches_tracked"].item() == 11  # statistics rest while gamma is 1, in the first step
    cell.set_train(False)
    after = float(loss(cell(mindspore.Tensor(pictures[:32])), mindspore.Tensor(labels[:32])))
    assert after < 0.6 * before
    model = timm.create_model("slab_deit_micro", **args).eval()
    model.load_state_dict(state)
    fused, _ = sf.fuse(model, images())
    assert_close(ours.runtime_of(cell)(images()), fused(images()).detach(), FLOAT32)


def test_a_training_that_could_not_fade_is_refused() -> None:
    from mindspore import dataset
    from mindspore import nn as cells
    from mindspore.train import Model

    from slabformer import mindspore as ours

    plain = ours.cells.Linear(4, 2)
    data = dataset.NumpySlicesDataset((np.ones((8, 4), np.float32), np.zeros(8, np.int32))).batch(4)
    optimizer = cells.SGD(plain.trainable_params(), 0.1)
    model = Model(plain, loss_fn=cells.CrossEntropyLoss(), optimizer=optimizer)
    with pytest.raises(ValueError, match="no PRepBN to fade"):
        model.train(1, data, callbacks=[ours.ProgressiveCallback(2)], dataset_sink_mode=False)
