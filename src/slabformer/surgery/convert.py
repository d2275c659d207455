"""Replace LayerNorm and RMSNorm of any model by PRepBN, recognised by what they compute."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slabformer.nn import PRepBN, RepBN
from slabformer.nn.affine import Affine, Folded

logger = logging.getLogger(__name__)

#: what a norm may compute from tokens ``(*, C)`` before its gain and offset: one row a kind
NORMALIZERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "LayerNorm": lambda x, eps: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, False, keepdim=True) + eps),
    "RMSNorm": lambda x, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps),
    "SimpleNorm": lambda x, eps: x * torch.rsqrt(x.var(-1, keepdim=True) + eps),
}
#: how its ``weight`` becomes the gain (Gemma's RMSNorm stores the gain minus 1)
GAINS: dict[str, Callable[[Tensor], Tensor]] = {"weight": lambda w: w, "1 + weight": lambda w: 1 + w}

_OURS = (PRepBN, RepBN, Affine, Folded)
#: where a module keeps the hooks on its calls, and what kind its backward hooks are
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def convert_norms_(
    model: nn.Module,
    filter: Callable[[nn.Module, str], bool] | None = None,
    *,
    progressive: bool = True,
    eta: float = 1.0,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> list[str]:
    """Replace every LayerNorm and RMSNorm of ``model`` in place by a :class:`PRepBN` that still holds it.

    A norm is recognised by what it computes, whatever its class: LayerNorm, RMSNorm or timm's SimpleNorm over the last
    axis, or over the channels of a map, with a gain stored as it is or minus 1. Its gain and offset become RepBN's
    start too. Weights, dtype, device, mode, hooks and ties are kept; the optimizer must be built afterwards.

    Args:
        model: Edited in place.
        filter: Called with ``(module, name)`` of each such norm; false leaves it as it is.
        progressive: True for PRepBN; False for RepBN from the start, which drops the old norm.
        eta: Initial skip weight: 1 in the paper's vision models, 0 in its language model.
        eps: Added to RepBN's variance.
        momentum: Of RepBN's running statistics.

    Returns:
        Names of the converted modules, in the model's order; a tied one stands under each of its names.

    Raises:
        ValueError: If nothing matched, or ``model`` itself is the norm.
    """
    found = list(_find_norms(model, filter))
    if not found:
        there = sum(isinstance(module, (PRepBN, RepBN)) for module in model.modules())
        hint = f"; it holds {there} of ours already" if there else "; is it norm-free, or did the filter refuse all?"
        raise ValueError(f"no LayerNorm or RMSNorm to convert in {type(model).__name__}{hint}")
    if not found[0][0]:
        raise ValueError(f"the model itself is a {type(model).__name__}; wrap it: nn.Sequential(norm)")
    converted: dict[nn.Module, nn.Module] = {}
    for _, norm, channel_dim, gain in found:
        if norm not in converted:
            options = {"eta": eta, "momentum": momentum, **_place(norm, model)}
            converted[norm] = _replacement(norm, channel_dim, gain, progressive, eps, options)
    _tie(converted)
    for name, norm, *_ in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, converted[norm])
    for norm, new in converted.items():
        _move_hooks(norm, new)
    switch_off_fast_paths(model)
    names = [name for name, *_ in found]
    logger.info("converted %d norms of %s", len(names), type(model).__name__)
    return names


def _find_norms(
    model: nn.Module, filter: Callable[[nn.Module, str], bool] | None
) -> Iterator[tuple[str, nn.Module, int, str]]:
    modules = model.named_modules(remove_duplicate=False)
    inside_ours = tuple(f"{name}." if name else "" for name, m in modules if isinstance(m, _OURS))
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside_ours) or not _may_be_norm(module):
            continue
        kind = recognise(module)
        if kind is None:
            logger.debug(
                "%s (%s) looks like a norm but computes something else; left alone", name, type(module).__name__
            )
        elif filter is None or filter(module, name):
            yield name, module, *kind


def _may_be_norm(module: nn.Module) -> bool:
    named_so = not isinstance(module, _OURS) and "norm" in type(module).__name__.lower()
    # a second argument, given or not, is a gate, a residual or a condition
    return named_so and not any(module.children()) and len(inspect.signature(module.forward).parameters) == 1


def recognise(module: nn.Module) -> tuple[int, str] | None:
    """Channel axis and gain rule of ``module`` if it computes a LayerNorm or RMSNorm, else None.

    A copy of the module with random weights and buffers is held against each kind on random tokens and maps, so that
    subclasses, look-alikes of other libraries and norms with an activation inside are told apart by result, not class.
    """
    dim = _num_channels(module)
    if dim is None:
        return None
    bare = copy.copy(module)
    bare.__dict__.update(
        {
            name: type(hooks)()
            for name, hooks in vars(module).items()
            if name in HOOKS and name != "_is_full_backward_hook"
        }
    )
    twin = copy.deepcopy(bare).to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # buffers too, else what the memory held decides: a frozen BatchNorm of zeros is a LayerNorm of gain 0
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
        for channel_dim, shape in ((-1, (2, 3, dim)), (-1, (2, 3, 5, dim)), (1, (2, dim, 3, 5))):
            x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
            try:
                y = twin(x)
            except Exception:  # foreign code, on an input that it may not be made for
                continue
            if not isinstance(y, Tensor) or y.shape != x.shape:
                continue
            for gain in GAINS:
                if _computes(twin, gain, x.movedim(channel_dim, -1), y.movedim(channel_dim, -1)):
                    return channel_dim, gain
    return None


def _num_channels(module: nn.Module) -> int | None:
    shape = getattr(module, "normalized_shape", None)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        shape = weight.shape
    if isinstance(shape, int):
        return shape
    return shape[0] if shape is not None and len(shape) == 1 else None


def _computes(norm: nn.Module, gain: str, x: Tensor, y: Tensor) -> bool:
    scale, shift = _gain_and_offset(norm, gain)
    eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 1e-6)
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    # look-alikes may compute in float32
    return any(
        torch.allclose(normalize(x, eps) * scale + shift, y.double(), rtol=1e-4, atol=1e-4)
        for normalize in NORMALIZERS.values()
    )


def _gain_and_offset(norm: nn.Module, gain: str) -> tuple[Tensor | float, Tensor | float]:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return (1.0 if weight is None else GAINS[gain](weight), 0.0 if bias is None else bias)


def _replacement(
    norm: nn.Module, channel_dim: int, gain: str, progressive: bool, eps: float, options: dict[str, Any]
) -> nn.Module:
    dim = _num_channels(norm)
    assert dim is not None
    options = {**options, "channel_dim": channel_dim}
    new = PRepBN(dim, norm=norm, bn_eps=eps, **options) if progressive else RepBN(dim, eps=eps, **options)
    rep = new.rep if isinstance(new, PRepBN) else new
    scale, shift = _gain_and_offset(norm, gain)
    with torch.no_grad():
        rep.weight.mul_(scale)
        rep.bias.add_(shift)
    return new.train(norm.training)


def _place(norm: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Device and dtype of the norm's gain; a norm without parameters says nothing, the model does."""
    like = getattr(norm, "weight", None)
    if like is None:
        like = next((parameter for parameter in model.parameters() if parameter.dtype.is_floating_point), None)
    return {} if like is None else {"device": like.device, "dtype": like.dtype}


def _tie(converted: dict[nn.Module, nn.Module]) -> None:
    """Norms that shared a parameter share RepBN's too."""
    first: dict[Tensor, nn.Parameter] = {}
    for norm, new in converted.items():
        rep = new.rep if isinstance(new, PRepBN) else new
        for leaf in ("weight", "bias"):
            if (own := getattr(norm, leaf, None)) is not None:
                setattr(rep, leaf, first.setdefault(own, getattr(rep, leaf)))


def _move_hooks(norm: nn.Module, new: nn.Module) -> None:
    """Hooks follow the name that they were put on: the old norm is not called in eval mode, nor once it has faded."""
    for name in HOOKS:
        theirs = vars(norm)[name]
        vars(norm)[name], vars(new)[name] = vars(new)[name], theirs


def switch_off_fast_paths(model: nn.Module) -> None:
    """torch's fused encoder kernel reads LayerNorm weights off its children and never calls them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
