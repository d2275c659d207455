"""Replace LayerNorm and RMSNorm of any model by PRepBN or another norm, recognised by what they compute."""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._norm_names import NormName
from slabformer._torch import HOOKS
from slabformer.nn.affine import Folded
from slabformer.nn.norms import NormType, check_eta, norm_type, norm_types, norms_of, type_of
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.repbn import RepBN
from slabformer.settings import Eta, Fraction, NonNegativeFloat, checked
from slabformer.surgery.conversion_plan import ConversionPlan, names_to_take
from slabformer.surgery.converted import ConvertedModules, LeftModule, summary_of
from slabformer.surgery.normal import makes_ordinary_tensors
from slabformer.surgery.one_input import optional_arguments, take_one_input_
from slabformer.surgery.reasons import Reason, Why
from slabformer.surgery.recognise import Lookalike, NormForm, Verdict, recognise

logger = logging.getLogger(__name__)
#: attribute of a norm that was put in another one's place; a plain value survives copies, moves and pickling
CONVERTED = "slabformer_converted"


@makes_ordinary_tensors
@checked
def convert_norms_(
    model: nn.Module,
    filter: Callable[[nn.Module, str], bool] | None = None,
    *,
    plan: ConversionPlan | Collection[str] | None = None,
    norm: NormName = "prepbn",
    progressive: bool | None = None,
    eta: Eta | None = None,
    eps: NonNegativeFloat = 1e-5,
    momentum: Fraction | None = 0.1,
) -> ConvertedModules:
    """Replace every LayerNorm and RMSNorm of ``model`` in place by a :class:`PRepBN` that still holds it.

    A norm is recognised by what a copy of it computes, whatever its class and the names of its parameters: LayerNorm,
    RMSNorm or timm's SimpleNorm over the last axis, or over the channels of a map, with a gain of any form; and DyT.
    Its gain and offset become RepBN's start too. Weights, dtype, device, mode, hooks and ties are kept; the optimizer
    must be built afterwards. What looks like a norm but cannot be converted is left, logged and returned with the
    reason: norms over several axes or with a gain per head, with further inputs, with an activation, L2 normalisation,
    GroupNorm.

    Args:
        model: Edited in place.
        filter: Called with ``(module, name)`` of each such norm; false leaves it as it is.
        plan: Names of the norms to convert, or what :func:`slabformer.audit` recommends on data; the others stay.
        norm: What to convert to: "prepbn", which holds the old norm while it fades; "repbn" or "batchnorm" from the
            start; "layernorm", "rmsnorm" or "dyt" as baselines; or the name of a registered norm. Norms that are of
            that kind already are left. Where the new kind has an offset or a gain, it takes that of the old one.
        progressive: An older spelling, until 0.3: False for ``norm="repbn"``.
        eta: Initial skip weight of RepBN and PRepBN: 0 by default, or "published", 1, as in the paper's vision models.
        eps: Added to the variance of BatchNorm, RepBN and PRepBN; other norms take the old norm's.
        momentum: Of their running statistics.

    Returns:
        Names of the converted modules, in the model's order, a tied one under each of its names; ``left`` holds what
        looks like a norm and was left.

    Raises:
        ValueError: If nothing matched, ``model`` itself is the norm, ``norm`` is unknown, or ``plan`` names a norm that
            the model does not have.
    """
    if progressive is not None:
        warnings.warn(
            f"progressive={progressive} is now norm={'prepbn' if progressive else 'repbn'!r}; it goes with 0.3",
            DeprecationWarning,
            stacklevel=3,
        )
        norm = norm if progressive else "repbn"
    row = norm_type(norm)
    settings = {"bn_eps": eps, "momentum": momentum} | ({} if eta is None else {"eta": check_eta(row, eta)})
    recognised, left = find_layer_norms(model)
    others = {name: form for name, form in recognised.items() if form.kind != row.name}
    planned = set(recognised) if plan is None else names_to_take(plan, recognised)
    asked = {
        name: form
        for name, form in others.items()
        if name in planned and (filter is None or filter(model.get_submodule(name), name))
    }
    found = {name: form for name, form in asked.items() if form.channel_dim == -1 or "channel_dim" in row.settings}
    over_maps = Why.of(Reason.OVER_MAPS, f"it is over the channels of maps, {row.title} is not")
    left += tuple(LeftModule.of(name, model.get_submodule(name), over_maps) for name in asked if name not in found)
    if not found:
        already = f"{len(recognised) - len(others)} {row.title}" if len(recognised) > len(others) else ""
        raise ValueError(nothing_to_convert(model, len(others) - len(asked), left, already))
    replace_norms_(model, found, norm=row, **settings)
    logger.info("converted %d norms of %s to %s", len(found), type(model).__name__, row.title)
    for line in summary_of(left):
        logger.warning("%s", line)
    return ConvertedModules(found, left)


def replace_norms_(
    model: nn.Module,
    found: Mapping[str, NormForm],
    *,
    norm: NormType,
    **settings: Any,
) -> None:
    """Replace the norms ``found`` by :func:`find_layer_norms` by those of a row, as :func:`convert_norms_` does.

    Args:
        model: Edited in place.
        found: What to replace, by name.
        norm: The kind that they become.
        settings: As :meth:`slabformer.NormType.layer` takes them, where they are not the old norm's.

    Raises:
        ValueError: If ``model`` itself is the norm.
    """
    if "" in found:
        raise ValueError(f"the model itself is a {type(model).__name__}; wrap it: nn.Sequential(norm)")
    converted: dict[nn.Module, nn.Module] = {}
    forms: dict[nn.Module, NormForm] = {}
    for name, form in found.items():
        old = model.get_submodule(name)
        if old not in converted:
            converted[old] = _replacement(old, form, norm, settings, _place(old, model))
            forms[old] = form
    _warn_of_lost_offsets(forms, converted)
    _tie(converted, forms)
    places = {name: converted[model.get_submodule(name)] for name in found}
    for name, new in places.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    for old, new in converted.items():
        setattr(new, CONVERTED, True)
        _move_hooks(old, new)
        take_one_input_(new, old)
    switch_off_fast_paths(model)


def was_converted(module: nn.Module) -> bool:
    """Whether :func:`convert_norms_` put it where it is."""
    return CONVERTED in vars(module)


def find_layer_norms(model: nn.Module) -> tuple[dict[str, NormForm], tuple[LeftModule, ...]]:
    """What :func:`convert_norms_` can convert, by name, and what looks like it and cannot be; nothing is changed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    gone = [name for name, module in modules.items() if _needs_none(module)]
    inside = tuple(f"{name}." if name else "" for name in gone)
    known: dict[Any, Verdict] = {}
    forms: dict[str, NormForm] = {}
    left: dict[str, Why] = {}
    for name, module in modules.items():
        if name.startswith(inside) or _needs_none(module):
            continue
        found = recognise(module, known)
        if isinstance(found, NormForm) and (given := _given_by_callers(model, name, optional_arguments(module))):
            found = Lookalike(Why.of(Reason.FURTHER_INPUTS, f"its caller gives it a further input ({given})"))
        if isinstance(found, NormForm):
            forms[name] = found
        elif found is not None:
            left[name] = found.why
    # of a norm inside another one the inner is converted, and what only looks like one is a part of the other
    forms = {name: form for name, form in forms.items() if not _holds_any(name, forms)}
    left = {
        name: why
        for name, why in left.items()
        if not _holds_any(name, forms) and not any(_holds_any(other, [name]) for other in (*forms, *left))
    }
    return forms, tuple(LeftModule.of(name, modules[name], why) for name, why in left.items())


def staying_norms(model: nn.Module) -> tuple[LeftModule, ...]:
    """Norms of ``model`` that :func:`slabformer.fuse` cannot fold whatever stands next to them, and why."""
    forms, _ = find_layer_norms(model)
    rows = {name: norm_types()[form.kind] for name, form in forms.items()}
    rows |= {name: row for name, row in norms_of(model) if row.scale_shift is None}
    return tuple(
        LeftModule.of(name, model.get_submodule(name), Why.of(Reason.NOT_AFFINE, row.stays))
        for name, row in rows.items()
    )


def _needs_none(module: nn.Module) -> bool:
    """Whether it is folded, or :func:`slabformer.fuse` can fold it as it is."""
    row = type_of(module)
    return isinstance(module, Folded) or (row is not None and row.scale_shift is not None)


def _holds_any(name: str, others: Iterable[str]) -> bool:
    return any(other != name and other.startswith(f"{name}." if name else "") for other in others)


def nothing_to_convert(model: nn.Module, num_refused: int, left: Sequence[LeftModule], already: str = "") -> str:
    """The words of an error about it, with what the filter refused, what was left and what is ``already`` there."""
    there = sum(isinstance(module, (PRepBN, RepBN)) for module in model.modules())
    if num_refused:
        hint = f"the filter refused all {num_refused}"
    elif already:
        hint = f"it holds {already} already"
    elif there:
        hint = f"it holds {there} of ours already"
    else:
        hint = "; ".join(summary_of(left)) or "is it norm-free?"
    return f"no LayerNorm or RMSNorm to convert in {type(model).__name__}; {hint}"


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


def _replacement(
    old: nn.Module, form: NormForm, norm: NormType, settings: dict[str, Any], place: dict[str, Any]
) -> nn.Module:
    """A norm of another kind with the gain and offset of the ``old`` one, as far as it has them."""
    own = {"channel_dim": form.channel_dim, "norm": old} | ({"eps": form.eps} if form.eps else {})
    new = norm.layer(**settings, **own)(form.num_channels, **place)
    weight, bias = (_parameter(new, leaf) for leaf in ("weight", "bias"))
    gain, offset = form.gain_and_offset(old)
    with torch.no_grad():
        if weight is not None:
            weight.mul_(gain.to(weight) if isinstance(gain, Tensor) else gain)
        if bias is not None:
            bias.add_(offset.to(bias) if isinstance(offset, Tensor) else offset)
    return new.train(old.training)


def _weights_of(norm: nn.Module) -> nn.Module:
    """The module that holds the gain and offset of a new norm: RepBN inside a PRepBN."""
    return norm.rep if isinstance(norm, PRepBN) else norm


def _parameter(norm: nn.Module, leaf: str) -> nn.Parameter | None:
    own = getattr(_weights_of(norm), leaf, None)
    return own if isinstance(own, nn.Parameter) else None


def _warn_of_lost_offsets(forms: Mapping[nn.Module, NormForm], converted: Mapping[nn.Module, nn.Module]) -> None:
    lost = [
        (old, new)
        for old, new in converted.items()
        if _parameter(new, "bias") is None and bool(torch.as_tensor(forms[old].gain_and_offset(old)[1]).any())
    ]
    if lost:
        old, new = lost[0]
        logger.warning(
            "%d norms lose their offset: a %s has none, the %s had", len(lost), type(new).__name__, type(old).__name__
        )


def _place(norm: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Device and dtype of the norm's tensors; a norm without any says nothing, the model does."""
    tensors = itertools.chain(norm.parameters(), norm.buffers(), model.parameters())
    like = next((tensor for tensor in tensors if tensor.dtype.is_floating_point), None)
    return {} if like is None else {"device": like.device, "dtype": like.dtype}


def _tie(converted: Mapping[nn.Module, nn.Module], forms: Mapping[nn.Module, NormForm]) -> None:
    """Norms that shared a parameter share the new one's too."""
    first: dict[tuple[Any, ...], nn.Parameter] = {}
    for norm, new in converted.items():
        holder = _weights_of(new)
        form, own = forms[norm], dict(norm.named_parameters())
        for leaf, names in (("weight", form.gains), ("bias", form.offsets)):
            if len(names) == 1 and names[0] in own and _parameter(new, leaf) is not None:
                key = (own[names[0]], leaf, form.num_channels, form.gain)
                setattr(holder, leaf, first.setdefault(key, getattr(holder, leaf)))


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
