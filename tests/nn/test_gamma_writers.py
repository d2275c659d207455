"""Gamma decides what training computes, whoever wrote it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from slabformer import PRepBN, convert_norms_, copy_gamma_, fuse
from slabformer.nn import prepbn
from slabformer.nn.controls import prepbn_modules
from tolerances import EXACT, FLOAT32, assert_close

C = 6


def net(gamma: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, C))
    convert_norms_(model)
    model[1].set_gamma(gamma)
    return model


def copied(source: nn.Module, target: nn.Module) -> nn.Module:
    with torch.no_grad():
        for theirs, ours in zip(source.buffers(), target.buffers(), strict=True):
            ours.copy_(theirs)
    return target


def copied_through_data(source: nn.Module, target: nn.Module) -> nn.Module:
    for theirs, ours in zip(source.buffers(), target.buffers(), strict=True):
        ours.data.copy_(theirs.data)
    return target


def data_replaced(source: nn.Module, target: nn.Module) -> nn.Module:
    for theirs, ours in zip(source.buffers(), target.buffers(), strict=True):
        ours.data = theirs.data.clone()
    return target


def buffers_replaced(source: nn.Module, target: nn.Module) -> nn.Module:
    for theirs, ours in zip(source.modules(), target.modules(), strict=True):
        for name, buffer in theirs.named_buffers(recurse=False):
            setattr(ours, name, buffer.clone())
    return target


def into_numpy(source: nn.Module, target: nn.Module) -> nn.Module:
    for theirs, ours in zip(source.buffers(), target.buffers(), strict=True):
        ours.numpy()[...] = theirs.numpy()
    return target


def into_state_dict(source: nn.Module, target: nn.Module) -> nn.Module:
    state = source.state_dict()
    for name, value in target.state_dict().items():
        value.copy_(state[name])
    return target


def averaged_parameters(source: nn.Module, target: nn.Module) -> nn.Module:
    average = AveragedModel(target)
    average.update_parameters(source)
    return average.module


def loaded(source: nn.Module, target: nn.Module) -> nn.Module:
    target.load_state_dict(source.state_dict())
    return target


def assigned(source: nn.Module, target: nn.Module) -> nn.Module:
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    return target


def from_meta(source: nn.Module, target: nn.Module) -> nn.Module:
    return loaded(source, target.to("meta").to_empty(device="cpu"))


def deep_copied(source: nn.Module, target: nn.Module) -> nn.Module:
    return copy.deepcopy(copied(source, target))


def pickled(source: nn.Module, target: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(copied(source, target)))


def saved_whole(source: nn.Module, target: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(copied(source, target), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def moved(source: nn.Module, target: nn.Module) -> nn.Module:
    return copied(source, target).double().float()


WRITERS = [
    copied,
    copied_through_data,
    data_replaced,
    buffers_replaced,
    into_numpy,
    into_state_dict,
    averaged_parameters,
    loaded,
    assigned,
    from_meta,
    deep_copied,
    pickled,
    saved_whole,
    moved,
]
#: which an accelerator shows by the buffer's identity or version, or by train()
SILENT = {copied_through_data, data_replaced, into_numpy}


def blend(norm: PRepBN, x: Tensor) -> Tensor:
    rep = copy.deepcopy(norm.rep)
    return norm.gamma * norm.norm(x) + (1 - norm.gamma) * rep(x)


def check(model: nn.Module, gamma: float) -> None:
    norm = model[1]
    x = torch.randn(5, C)
    expected = blend(norm, x)
    assert norm.gamma == gamma
    assert norm.phase == {1.0: "warm", 0.5: "fading", 0.0: "done"}[gamma]
    assert_close(norm(x), expected, FLOAT32)
    model.eval()
    if gamma:
        with pytest.raises(ValueError, match=f"gamma is {gamma:.3g}"):
            fuse(model, x)
    else:
        fused, _ = fuse(model, x)
        assert_close(fused(x), model(x), FLOAT32)


@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("before", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_training_and_fusing_follow_gamma_whoever_writes_it(
    write: Callable[[nn.Module, nn.Module], nn.Module], before: float, after: float
) -> None:
    target = net(before)
    target(torch.randn(5, C))  # has noticed what it was before
    check(write(net(after), target).train(), after)


@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_accelerators_notice_too(
    write: Callable[[nn.Module, nn.Module], nn.Module], after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepbn, "_reads_freely", lambda buffer: False)
    target = net(0.5)
    target(torch.randn(5, C))
    written = write(net(after), target)
    if write in SILENT:
        written.eval().train()
    check(written, after)


def test_safetensors_brings_the_phase_along(tmp_path: Path) -> None:
    target = net()
    save_model(net(0.0), str(tmp_path / "model.safetensors"))
    load_model(target, str(tmp_path / "model.safetensors"))
    check(target, 0.0)


def test_accelerators_read_gamma_once_for_each_foreign_write(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    value = prepbn._value
    monkeypatch.setattr(prepbn, "_reads_freely", lambda buffer: False)
    monkeypatch.setattr(prepbn, "_value", lambda buffer: reads.append(buffer) or value(buffer))
    norm, x = PRepBN(C), torch.randn(5, C)
    for step in range(6):
        norm.set_gamma(1 - step / 5)
        norm.train()
        norm(x)
    assert not reads
    norm.gamma.fill_(0.5)
    for _ in range(3):
        norm(x)
    assert len(reads) == 1
    norm.eval()(x)
    assert len(reads) == 1


def test_gamma_moves_to_an_average_without_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepbn, "_reads_freely", lambda buffer: False)
    source, target = net(0.25), net()
    with monkeypatch.context() as patch:
        patch.setattr(prepbn, "_value", lambda buffer: pytest.fail("gamma was read"))
        copy_gamma_(source, target)
        assert target[1].phase == "fading"
    source[1].gamma.zero_()
    copy_gamma_(source, target)
    assert target[1].phase == "done"


def test_start_of_fading_survives_copies_and_the_averages() -> None:
    norm = PRepBN(C)
    norm.set_gamma(1.0, "fading")
    other = nn.Sequential(PRepBN(C))
    copy_gamma_(nn.Sequential(norm), other)
    assert [n.phase for n in (norm, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), other[0])] == ["fading"] * 4


@pytest.mark.parametrize("value", [float("nan"), -1.0, 3e8])
def test_gamma_that_is_no_share_is_refused(value: float) -> None:
    norm = PRepBN(C)
    norm.gamma.fill_(value)
    with pytest.raises(ValueError, match=r"gamma of a PRepBN must be in \[0, 1\].*load the weights, or set_gamma"):
        norm(torch.randn(5, C))
    assert "PRepBN" in repr(norm)


def test_rounding_of_an_average_is_no_mistake() -> None:
    norm = PRepBN(C)
    norm.gamma.fill_(1.0000001)
    assert norm.phase == "fading"


def test_empty_memory_is_initialised_by_reset_parameters() -> None:
    model = net(0.5).to("meta").to_empty(device="cpu")
    model[1].gamma.fill_(3e8)  # whatever the memory held
    for parameter in model.parameters():
        nn.init.constant_(parameter, 3e8)
    for module in model.modules():
        if not isinstance(module, nn.Sequential):
            module.reset_parameters()
    check(model, 1.0)
    fresh = PRepBN(C, eps=1e-5).state_dict()
    for name, value in model[1].state_dict().items():
        assert_close(value, fresh[name], EXACT)


def test_shards_load_one_after_the_other_into_empty_memory() -> None:
    model, state = net().to("meta").to_empty(device="cpu"), net(0.5).state_dict()
    model[1].gamma.fill_(3e8)  # whatever the memory held
    model.load_state_dict({name: value for name, value in state.items() if "gamma" not in name}, strict=False)
    model.load_state_dict({"1.gamma": state["1.gamma"]}, strict=False)
    check(model, 0.5)


def test_small_steps_of_gamma_survive_a_buffer_that_was_narrowed() -> None:
    norm = PRepBN(C)
    norm._buffers["gamma"] = norm.gamma.bfloat16()  # as transformers' from_pretrained does it
    norm.set_gamma(0.9999)
    assert float(norm.gamma) == pytest.approx(0.9999, abs=1e-7)
    norm._buffers["gamma"] = torch.zeros((), dtype=torch.bfloat16)
    assert norm.phase == "done"


def test_models_built_in_inference_mode_follow_gamma_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepbn, "_reads_freely", lambda buffer: False)
    with torch.inference_mode():
        norm = PRepBN(C)
        norm.gamma.zero_()
        assert norm.phase == "done"


def test_nothing_but_gamma_is_kept_beside_the_norms() -> None:
    model = net(0.5)
    plain = net()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, C)
    assert_close(plain(x), model(x), EXACT)
    assert {name for name, norm in prepbn_modules(plain).items() if norm.phase == "fading"} == {"1"}
