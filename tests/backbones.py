"""What timm's users expect of every backbone."""

from __future__ import annotations

from collections.abc import Callable

from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from slabformer.nn.controls import prepbn_modules
from tolerances import EXACT, assert_close


def decayed_names(model: nn.Module) -> set[str]:
    """Parameters that timm's optimizers decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    return {names[p] for group in groups if group["weight_decay"] for p in group["params"]}


def matrix_names(model: nn.Module) -> set[str]:
    """Parameters of more than one dimension."""
    return {name for name, p in model.named_parameters() if p.ndim > 1}


def assert_groups_cover_every_parameter_once(model: nn.Module, coarse: bool = False) -> int:
    """Layers as timm decays their rates; returns how many."""
    groups = group_parameters(model, model.group_matcher(coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    return len(groups)


def assert_checkpointing_changes_nothing(create: Callable[[], nn.Module], x: Tensor) -> None:
    """Neither gradients nor statistics, while norms fade; ``create`` makes the same model each time."""
    results = []
    for enable in (False, True):
        model = create().train()
        for norm in prepbn_modules(model).values():
            norm.set_gamma(0.5)
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        results.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    for plain, checkpointed in zip(*results, strict=True):
        for key, value in plain.items():
            assert_close(checkpointed[key], value, EXACT)
