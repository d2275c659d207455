"""For tests of code that changes models: make every norm matter, so that a wrong fold cannot hide."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slabformer._torch import buffer_slots
from slabformer.nn.affine import Affine
from slabformer.nn.repbn import RepBN
from slabformer.settings import Seed, checked


@torch.no_grad()
@checked
def randomize_norms_(model: nn.Module, seed: Seed = 0) -> nn.Module:
    """Redraw what fresh models leave at values that hide mistakes; returns ``model``.

    Statistics, weights and ``eta`` of every norm (mean 0 and variance 1 hide a wrong fold), parameters that are
    constant throughout: zero-initialised heads and biases, LayerScale of 1e-5, position tables, weights of other norms.

    Args:
        model: Edited in place.
        seed: The values are a function of it and of the order of the parameters.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            assert isinstance(module.running_mean, Tensor)
            assert isinstance(module.running_var, Tensor)
            module.running_mean.copy_(0.3 * normal(module.running_mean))
            module.running_var.copy_(0.5 + normal(module.running_var).square())
        if isinstance(getattr(module, "eta", None), nn.Parameter) and isinstance(module, RepBN):
            module.eta.copy_(0.7 + 0.2 * normal(module.eta))
        if isinstance(module, (RepBN, Affine)) or _is_frozen(module):
            assert isinstance(module.weight, Tensor)
            assert isinstance(module.bias, Tensor)
            module.weight.copy_(1 + 0.3 * normal(module.weight))
            module.bias.copy_(0.3 * normal(module.bias))
    for name, parameter in model.named_parameters():
        if _is_constant(parameter):
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            gain = 1.0 if is_gain or _is_layer_scale(name) else 0.0
            spread = 0.3 if parameter.ndim <= 1 or gain else parameter[0].numel() ** -0.5
            parameter.copy_(gain + spread * normal(parameter))
    return model


def _is_frozen(module: nn.Module) -> bool:
    """Whether it is a BatchNorm whose gain and offset are buffers, as detectors have."""
    return {"weight", "bias", "running_mean", "running_var"} <= buffer_slots(module).keys()


def _is_constant(parameter: Tensor) -> bool:
    """Whether every element is alike, or a lone one is still 0."""
    if not parameter.dtype.is_floating_point or parameter.numel() == 0:
        return False
    first = parameter.flatten()[0]
    return bool((parameter == first).all()) and (parameter.numel() > 1 or not first)


def _is_layer_scale(name: str) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    return leaf.rstrip("_0123456789") in {"gamma", "lambda", "layer_scale", "ls"} or "layer_scale" in name
