"""Private names of torch are there, do what they are used for, and are named where they are missing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from slabformer import _torch


def test_backward_is_told_from_forward() -> None:
    seen = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.in_backward())
        return x.sin()

    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_transforms_of_functions_are_seen() -> None:
    seen = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.in_function_transform())
        return x.sin().sum()

    watched(torch.ones(2))
    torch.func.grad(watched)(torch.ones(2))
    torch.func.jvp(watched, (torch.ones(2),), (torch.ones(2),))
    assert seen == [False, True, True]


def test_constants_of_the_compiler_are_marked_as_torch_marks_them() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    assert vars(_torch.assume_constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_bases_are_those_of_torch_s_classes() -> None:
    assert issubclass(nn.BatchNorm2d, _torch.BatchNorm)
    assert issubclass(nn.SyncBatchNorm, _torch.BatchNorm)
    assert issubclass(nn.ConvTranspose1d, _torch.Conv)


def test_tensors_that_share_memory_have_one_identity() -> None:
    for device in ("cpu", "meta"):
        x = torch.zeros(4, device=device)
        assert _torch.storage_identity(x) == _torch.storage_identity(x.view(2, 2))
        assert _torch.storage_identity(x) != _torch.storage_identity(torch.zeros(4, device=device))


def test_modules_compiled_in_place_are_seen() -> None:
    module = nn.Linear(2, 2)
    assert not _torch.is_compiled_in_place(module)
    module.compile()
    assert _torch.is_compiled_in_place(module)


def test_containers_are_walked() -> None:
    tree = {"a": [torch.ones(1), 2], "b": (torch.zeros(1),)}
    assert len(_torch.tree_leaves(tree)) == 3
    assert _torch.tree_map_tensors(lambda t: t + 1, tree)["a"][0] == 2


def test_settings_of_the_compiler_hold_for_a_block() -> None:
    from torch._inductor import config

    before = config.freezing
    with _torch.inductor_settings({"freezing": not before}):
        assert config.freezing is not before
    assert config.freezing is before
    assert issubclass(_torch.compile_error(), Exception)


def test_slots_of_a_module_are_its_own() -> None:
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    _torch.parameter_slots(module[0])["bias"] = nn.Parameter(torch.ones(3))
    assert module(torch.zeros(1, 2).expand(2, 2)).shape == (2, 3)
    assert "0.bias" in module.state_dict()
    _torch.unsaved_buffers(module[1]).add("running_mean")
    _torch.buffer_slots(module[1])["running_var"] = torch.full((3,), 4.0)
    assert "1.running_mean" not in module.state_dict()
    assert torch.equal(module.state_dict()["1.running_var"], torch.full((3,), 4.0))
    _torch.child_slots(module)["0"] = nn.Identity()
    assert module.eval()(torch.ones(1, 3)).shape == (1, 3)


def test_a_copy_with_another_child_shares_the_others() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    made = _torch.with_child(module, "0", nn.Identity())
    assert made[1] is module[1]
    assert isinstance(made[0], nn.Identity)
    assert isinstance(module[0], nn.Linear)


def test_hooks_are_those_that_a_module_calls() -> None:
    module, seen = nn.Identity(), []
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module(1)
    assert len(_torch.forward_hooks(module)) == len(_torch.forward_pre_hooks(module)) == 1
    _torch.forward_hooks(module).clear()
    module(1)
    assert seen == ["before", "after", "before"]
    assert all(name in vars(module) for name in _torch.HOOKS)


def test_operators_of_a_graph_are_described() -> None:
    add = torch.ops.aten.add_.Tensor
    assert _torch.operator_of(add) is torch.ops.aten.add_
    assert _torch.name_of_operator(add) == "aten::add_.Tensor"
    assert _torch.schema_of(add).arguments[0].alias_info.is_write
    assert _torch.schema_of(len) is _torch.name_of_operator(len) is None


def test_a_compiled_model_is_unwrapped_and_recurrent_weights_are_named() -> None:
    model = nn.LSTM(2, 3)
    assert _torch.uncompiled(torch.compile(model)) is model
    assert _torch.uncompiled(model) is model
    assert {"weight_ih_l0", "bias_hh_l0"} <= set(_torch.recurrent_weights(model))
    assert not list(_torch.recurrent_weights(nn.Linear(2, 2)))


def test_methods_that_our_modules_override_are_called() -> None:
    """``_apply`` and ``_load_from_state_dict``, which only a subclass can override, have no place in one file."""

    class Watched(nn.Linear):
        called: ClassVar[list[str]] = []

        def _apply(self, *args, **kwargs):
            self.called.append("apply")
            return super()._apply(*args, **kwargs)

        def _load_from_state_dict(self, *args, **kwargs):
            self.called.append("load")
            super()._load_from_state_dict(*args, **kwargs)

    model = nn.Sequential(Watched(2, 2))
    model.double().load_state_dict(model.state_dict())
    assert Watched.called == ["apply", "load"]
