"""Private names of torch are there, do what they are used for, and are named where they are missing."""

from __future__ import annotations

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
