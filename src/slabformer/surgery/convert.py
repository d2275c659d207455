"""Replace LayerNorm and RMSNorm of any model by PRepBN, recognised by what they compute."""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slabformer.nn import PRepBN, RepBN
from slabformer.nn.affine import Affine, Folded
from slabformer.settings import Fraction, NonNegativeFloat, Number, checked
from slabformer.surgery.one_input import optional_arguments, take_one_input_
from slabformer.surgery.recognise import HOOKS, Lookalike, NormForm, Verdict, recognise

logger = logging.getLogger(__name__)

_OURS = (PRepBN, RepBN, Affine, Folded)


class LeftNorm(NamedTuple):
    """A module that looks like a norm and was left as it is.

    Attributes:
        name: Of the module.
        kind: Name of its class.
        reason: Why it was left, as a clause.
    """

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}) left as it is: {self.reason}"


class ConvertedNorms(list[str]):
    """Names of the converted modules, in the model's order; a tied one stands under each of its names.

    Attributes:
        left: What looks like a norm and was left, but for what the filter refused.
    """

    def __init__(self, names: Iterable[str] = (), left: Iterable[LeftNorm] = ()) -> None:
        super().__init__(names)
        self.left = tuple(left)


@checked
def convert_norms_(
    model: nn.Module,
    filter: Callable[[nn.Module, str], bool] | None = None,
    *,
    progressive: bool = True,
    eta: Number = 1.0,
    eps: NonNegativeFloat = 1e-5,
    momentum: Fraction | None = 0.1,
) -> ConvertedNorms:
    """Replace every LayerNorm and RMSNorm of ``model`` in place by a :class:`PRepBN` that still holds it.

    A norm is recognised by what a copy of it computes, whatever its class and the names of its parameters: LayerNorm,
    RMSNorm or timm's SimpleNorm over the last axis, or over the channels of a map, with a gain of any form. Its gain
    and offset become RepBN's start too. Weights, dtype, device, mode, hooks and ties are kept; the optimizer must be
    built afterwards. What looks like a norm but cannot be converted is left, logged and returned with the reason:
    norms over several axes or with a gain per head, with further inputs, with an activation, L2 normalisation,
    GroupNorm.

    Args:
        model: Edited in place.
        filter: Called with ``(module, name)`` of each such norm; false leaves it as it is.
        progressive: True for PRepBN; False for RepBN from the start, which drops the old norm.
        eta: Initial skip weight: 1 in the paper's vision models, 0 in its language model.
        eps: Added to RepBN's variance.
        momentum: Of RepBN's running statistics.

    Returns:
        Names of the converted modules, in the model's order, a tied one under each of its names; ``left`` holds what
        looks like a norm and was left.

    Raises:
        ValueError: If nothing matched, or ``model`` itself is the norm.
    """
    recognised, left = find_layer_norms(model)
    found = {
        name: form for name, form in recognised.items() if filter is None or filter(model.get_submodule(name), name)
    }
    if not found:
        raise ValueError(nothing_to_convert(model, len(recognised), left))
    replace_norms_(model, found, progressive=progressive, eta=eta, eps=eps, momentum=momentum)
    logger.info("converted %d norms of %s", len(found), type(model).__name__)
    for line in _summary(left):
        logger.warning("%s", line)
    return ConvertedNorms(found, left)


def replace_norms_(
    model: nn.Module,
    found: Mapping[str, NormForm],
    *,
    progressive: bool,
    eta: float,
    eps: float,
    momentum: float | None,
) -> None:
    """Replace the norms ``found`` by :func:`find_layer_norms` as :func:`convert_norms_` does.

    Raises:
        ValueError: If ``model`` itself is the norm.
    """
    if "" in found:
        raise ValueError(f"the model itself is a {type(model).__name__}; wrap it: nn.Sequential(norm)")
    converted: dict[nn.Module, nn.Module] = {}
    forms: dict[nn.Module, NormForm] = {}
    for name, form in found.items():
        norm = model.get_submodule(name)
        if norm not in converted:
            options = {"eta": eta, "momentum": momentum, **_place(norm, model)}
            converted[norm] = _replacement(norm, form, progressive, eps, options)
            forms[norm] = form
    _tie(converted, forms)
    places = {name: converted[model.get_submodule(name)] for name in found}
    for name, new in places.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    for norm, new in converted.items():
        _move_hooks(norm, new)
        take_one_input_(new, norm)
    switch_off_fast_paths(model)


def find_layer_norms(model: nn.Module) -> tuple[dict[str, NormForm], tuple[LeftNorm, ...]]:
    """What :func:`convert_norms_` can convert, by name, and what looks like it and cannot be; nothing is changed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside_ours = tuple(f"{name}." if name else "" for name, module in modules.items() if isinstance(module, _OURS))
    known: dict[Any, Verdict] = {}
    forms: dict[str, NormForm] = {}
    left: dict[str, str] = {}
    for name, module in modules.items():
        if name.startswith(inside_ours) or isinstance(module, _OURS):
            continue
        found = recognise(module, known)
        if isinstance(found, NormForm) and (given := _given_by_callers(model, name, optional_arguments(module))):
            found = Lookalike(f"its caller gives it a further input ({given})")
        if isinstance(found, NormForm):
            forms[name] = found
        elif found is not None:
            left[name] = found.reason
    # of a norm inside another one the inner is converted, and what only looks like one is a part of the other
    forms = {name: form for name, form in forms.items() if not _holds_any(name, forms)}
    left = {
        name: reason
        for name, reason in left.items()
        if not _holds_any(name, forms) and not any(_holds_any(other, [name]) for other in (*forms, *left))
    }
    return forms, tuple(LeftNorm(name, type(modules[name]).__name__, reason) for name, reason in left.items())


def _holds_any(name: str, others: Iterable[str]) -> bool:
    return any(other != name and other.startswith(f"{name}." if name else "") for other in others)


def nothing_to_convert(model: nn.Module, num_refused: int, left: Sequence[LeftNorm]) -> str:
    """The words of an error about it, with what the filter refused and what was left."""
    there = sum(isinstance(module, (PRepBN, RepBN)) for module in model.modules())
    if num_refused:
        hint = f"the filter refused all {num_refused}"
    elif there:
        hint = f"it holds {there} of ours already"
    else:
        hint = "; ".join(_summary(left)) or "is it norm-free?"
    return f"no LayerNorm or RMSNorm to convert in {type(model).__name__}; {hint}"


def _summary(left: Iterable[LeftNorm]) -> list[str]:
    """One line for each class and reason: the first such norm, and how many more there are."""
    groups: dict[tuple[str, str], list[LeftNorm]] = {}
    for norm in left:
        groups.setdefault((norm.kind, norm.reason), []).append(norm)
    return [str(first) + (f" (and {len(more)} more like it)" if more else "") for first, *more in groups.values()]


def _given_by_callers(model: nn.Module, name: str, optional: Mapping[str, Any]) -> str:
    """Which of the ``optional`` arguments the code of the module above ``name`` gives, as far as its source tells."""
    if not optional:
        return ""
    parent, _, leaf = name.rpartition(".")
    while parent and isinstance(model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict)):
        parent, _, leaf = parent.rpartition(".")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(model.get_submodule(parent)))))
    except (OSError, SyntaxError, TypeError):  # no source at hand
        return ""
    given: set[str] = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and _is_attribute_of_self(call.func, leaf):
            positional = zip(optional, call.args[1:], strict=False)
            named = ((word.arg, word.value) for word in call.keywords if word.arg in optional)
            for argument, value in (*positional, *named):
                if not (isinstance(value, ast.Constant) and value.value == optional[str(argument)]):
                    given.add(str(argument))
    return ", ".join(sorted(given))


def _is_attribute_of_self(called: ast.expr, leaf: str) -> bool:
    """Whether it is ``self.leaf``, or an item of it."""
    while isinstance(called, ast.Subscript):
        called = called.value
    return (
        isinstance(called, ast.Attribute)
        and called.attr == leaf
        and isinstance(called.value, ast.Name)
        and called.value.id == "self"
    )


def _replacement(norm: nn.Module, form: NormForm, progressive: bool, eps: float, options: dict[str, Any]) -> nn.Module:
    options = {**options, "channel_dim": form.channel_dim}
    dim = form.num_channels
    new = PRepBN(dim, norm=norm, bn_eps=eps, **options) if progressive else RepBN(dim, eps=eps, **options)
    rep = new.rep if isinstance(new, PRepBN) else new
    gain, offset = form.gain_and_offset(norm)
    with torch.no_grad():
        rep.weight.mul_(gain.to(rep.weight) if isinstance(gain, Tensor) else gain)
        rep.bias.add_(offset.to(rep.bias) if isinstance(offset, Tensor) else offset)
    return new.train(norm.training)


def _place(norm: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Device and dtype of the norm's tensors; a norm without any says nothing, the model does."""
    tensors = itertools.chain(norm.parameters(), norm.buffers(), model.parameters())
    like = next((tensor for tensor in tensors if tensor.dtype.is_floating_point), None)
    return {} if like is None else {"device": like.device, "dtype": like.dtype}


def _tie(converted: Mapping[nn.Module, nn.Module], forms: Mapping[nn.Module, NormForm]) -> None:
    """Norms that shared a parameter share RepBN's too."""
    first: dict[tuple[Any, ...], nn.Parameter] = {}
    for norm, new in converted.items():
        rep = new.rep if isinstance(new, PRepBN) else new
        form, own = forms[norm], dict(norm.named_parameters())
        for leaf, names in (("weight", form.gains), ("bias", form.offsets)):
            if len(names) == 1 and names[0] in own:
                key = (own[names[0]], leaf, form.num_channels, form.gain)
                setattr(rep, leaf, first.setdefault(key, getattr(rep, leaf)))


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
