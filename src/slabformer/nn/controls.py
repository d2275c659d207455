"""Switches over all norms of a model: token masks, ranks that share statistics, the blend in eval, an EMA's gamma."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from slabformer._torch import child_slots
from slabformer.nn.norms import is_from_here
from slabformer.nn.prepbn import PRepBN
from slabformer.nn.repbn import RepBN
from slabformer.nn.sync import StatisticsSync


def prepbn_modules(model: nn.Module) -> dict[str, PRepBN]:
    """Every PRepBN of ``model`` by name, tied ones once; not the originals of those that PEFT trains copies of."""
    replaced = {id(original) for module in model.modules() if (original := _original_of(module)) is not None}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PRepBN) and id(module) not in replaced
    }


def _original_of(module: nn.Module) -> nn.Module | None:
    """What stands aside while a copy is trained in its place (PEFT's ``modules_to_save``)."""
    return child_slots(module).get("original_module") if "modules_to_save" in child_slots(module) else None


def repbn_modules(model: nn.Module) -> dict[str, RepBN]:
    """Every RepBN of ``model`` by name, those inside PRepBN included, tied ones once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RepBN)}


#: one mask; several, of which each norm takes the one that fits its tokens; or some for each of several submodules
Masks = Tensor | Sequence[Tensor | None] | None
TokenMask = Masks | Mapping[str, Masks]


def set_token_mask(model: nn.Module, mask: TokenMask) -> None:
    """Let only the tokens where ``mask`` is true move the statistics of ``model``'s norms, until set again.

    Args:
        model: Holds the norms.
        mask: Boolean ``(B, N)``, true for valid tokens; None for all. Where tokens of several kinds run through a model
            (encoder and decoder, text and image), a sequence of masks of different shapes, of which each norm takes
            the one that fits its tokens; a None among them lets tokens of any other shape count whole. Or a mapping
            from names of submodules to masks, ``{"encoder": ..., "decoder": ...}``: the longest name that a norm lies
            under decides, and all tokens count for norms under none of them.

    Raises:
        ValueError: If a mask is not boolean, two of them have the same shape, or there is no norm for one of them. A
            mask that does not fit the tokens is refused in the forward, by the name of the norm.
    """
    for norm, (name, masks) in _masks_of_norms(model, mask).items():
        norm.name, norm.token_mask = name, masks


@contextmanager
def token_mask(model: nn.Module, mask: TokenMask) -> Iterator[None]:
    """:func:`set_token_mask` for the duration of a block; keep ``backward()`` inside under activation checkpointing.

    Raises:
        ValueError: As :func:`set_token_mask` does; and on leaving the block, if some of the masks were used in it and
            others fitted no norm.
    """
    norms = repbn_modules(model).values()
    before = {norm: (norm.token_mask, norm.masks_used) for norm in norms}
    used: set[int] = set()
    try:
        set_token_mask(model, mask)
        for norm in norms:
            norm.masks_used = used
        yield
        asked = [norm for norm in norms if id(norm) in used]
        idle = [
            mask for norm in asked for mask in _as_tuple(norm.token_mask) if mask is not None and id(mask) not in used
        ]
    finally:
        for norm, previous in before.items():
            norm.token_mask, norm.masks_used = previous
    if idle:
        raise ValueError(
            f"the token mask of shape {tuple(idle[0].shape)} fitted no norm in this block, though others did; "
            "leave it out, or give it the shape of the tokens that it is for"
        )


def _masks_of_norms(
    model: nn.Module, mask: TokenMask
) -> dict[RepBN, tuple[str, Tensor | tuple[Tensor | None, ...] | None]]:
    """A name and the masks of every norm; tied ones get those of all their places."""
    by_name = mask if isinstance(mask, Mapping) else {"": mask}
    checked = {name: _checked(masks) for name, masks in by_name.items()}
    title = type(model).__name__
    places = [
        (name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, RepBN)
    ]
    for name, masks in checked.items():
        if (masks or name) and not any(is_under(place, name) for place, _ in places):
            where = f" under {name!r}" if name else ""
            raise ValueError(f"{title} has no RepBN{where} for a token mask; call convert_norms_(model) first")
    found: dict[RepBN, tuple[str, list[Tensor | None]]] = {}
    for place, norm in places:
        owner = max((name for name in checked if is_under(place, name)), key=len, default=None)
        own = found.setdefault(norm, (place or title, []))[1]
        masks = checked[owner] if owner is not None else ()
        own += [mask for mask in masks or (None,) if not any(mask is other for other in own)]
    for name, own in found.values():
        _refuse_equal_shapes(own, f" for {name}, which lies under several names")
    return {norm: (name, _as_given(own)) for norm, (name, own) in found.items()}


def _checked(masks: Masks) -> tuple[Tensor | None, ...]:
    given = _as_tuple(masks if masks is None or isinstance(masks, Tensor) else tuple(masks))
    for mask in given:
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype.is_floating_point):
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"token mask must be boolean, true where a token is valid, got {got}")
    _refuse_equal_shapes(given, "; give each by the name of its submodule")
    return tuple(None if mask is None else mask.bool() for mask in given)


def _refuse_equal_shapes(masks: Sequence[Tensor | None], rest: str) -> None:
    shapes = [tuple(mask.shape) for mask in masks if mask is not None]
    if len(set(shapes)) < len(shapes):
        twice = max(shapes, key=shapes.count)
        raise ValueError(f"{shapes.count(twice)} token masks of shape {twice}{rest}")


def _as_tuple(masks: Tensor | tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...]:
    return masks if isinstance(masks, tuple) else () if masks is None else (masks,)


def _as_given(masks: list[Tensor | None]) -> Tensor | tuple[Tensor | None, ...] | None:
    if not any(isinstance(mask, Tensor) for mask in masks):
        return None
    return masks[0] if len(masks) == 1 else tuple(masks)


def is_under(place: str, name: str) -> bool:
    """Whether the module at ``place`` is ``name`` or inside of it; everything is under the empty name."""
    return not name or place == name or place.startswith(f"{name}.")


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name of every norm that torch does not bring, that of the norm that fades included: none of them
    should decay.

    Those are PRepBN, RepBN, TokenBatchNorm, DyT and registered ones. Weight decay pulls the gain and ``eta`` to 0.
    Libraries recognise norms by their names or their classes; this tells which parameters are meant, whatever a norm is
    called::

        spared = set(slabformer.norm_parameters(model))
        decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and name not in spared]
    """
    norms = [name for name, module in model.named_modules() if is_from_here(module)]
    return {
        f"{norm}.{leaf}" if norm else leaf: parameter
        for norm in norms
        for leaf, parameter in model.get_submodule(norm).named_parameters()
    }


def sync_norms_(model: nn.Module, enabled: bool = True, process_group: dist.ProcessGroup | None = None) -> None:
    """Share the batch statistics of every RepBN between the ranks of ``process_group`` (all ranks by default).

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` does the same to the RepBN of every PRepBN, and converts the model's
    plain BatchNorms; a RepBN outside of a PRepBN it refuses.
    """
    sync = StatisticsSync(process_group) if enabled else None
    for module in repbn_modules(model).values():
        module.sync = sync


@contextmanager
def blended(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluate ``gamma * LN(x) + (1 - gamma) * RepBN(x)`` instead of RepBN alone inside the block."""
    modules = list(prepbn_modules(model).values())
    before = [module.blend_in_eval for module in modules]
    for module in modules:
        module.blend_in_eval = True
    try:
        yield model
    finally:
        for module, previous in zip(modules, before, strict=True):
            module.blend_in_eval = previous


def copy_gamma_(source: nn.Module, target: nn.Module) -> None:
    """Copy gamma and phase from ``source`` to ``target``, whose averaged copy (an EMA's) means nothing.

    Norms are paired in the order of the modules, so either may be wrapped (DistributedDataParallel, ``torch.compile``).

    Raises:
        ValueError: If the two do not hold PRepBN modules of the same widths.
    """
    norms, copies = list(prepbn_modules(source).values()), list(prepbn_modules(target).values())
    if [norm.normalized_shape for norm in norms] != [copy.normalized_shape for copy in copies]:
        raise ValueError(f"source has {len(norms)} PRepBN modules, target {len(copies)}, not of the same widths")
    for norm, copy in zip(norms, copies, strict=True):
        copy.copy_gamma_(norm)
