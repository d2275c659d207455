"""From the attention masks of transformers' models to the token masks of their norms."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slabformer._torch import forward_pre_hooks
from slabformer.nn.controls import repbn_modules, set_token_mask

#: arguments by which a model of transformers takes its data; those of text come with a mask
DATA = frozenset({"input_ids", "decoder_input_ids", "pixel_values", "input_values", "input_features", "features"})
#: of these, those that are padded tokens
TEXT = frozenset({"input_ids", "decoder_input_ids"})


def keep_padding_out(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: statistics see only tokens that the argument ``attention_mask`` ``(B, N)`` lets through.

    Norms whose tokens are others than the mask's (pooled ones, learned queries) count all of theirs.
    """
    if _is_watching(model):
        # left in place, since activation checkpointing runs the norms again in backward
        mask = _attention_mask(model, args, kwargs)
        set_token_mask(model, (mask, None) if _is_of_tokens(mask) else None)


def keep_padding_out_of_tower(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """As :func:`keep_padding_out` inside a larger model: a mask that was prepared there already leaves its own."""
    mask = _attention_mask(tower, args, kwargs)
    if mask is None or _is_of_tokens(mask):
        keep_padding_out(tower, args, kwargs)


def keep_padding_out_everywhere_(model: nn.Module) -> list[RemovableHandle]:
    """Hook ``model`` and every tower in it that takes data of its own, once; the handles take the hooks away again.

    An encoder, a decoder, a text and an image model each get the mask that they themselves are called with, or none. An
    embedding of tokens, which takes no mask, is a part of the tower around it.
    """
    handles = []
    for module in model.modules():
        if not repbn_modules(module) or (module is not model and not _takes_data(module)):
            continue
        hook = keep_padding_out if module is model else keep_padding_out_of_tower
        if not {keep_padding_out, keep_padding_out_of_tower} & set(forward_pre_hooks(module).values()):
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


@contextmanager
def padding_left_out(model: nn.Module) -> Iterator[None]:
    """Norms leave out what the ``attention_mask`` of a call does, inside the block; masks that were set stay in force.

    Only where the model takes an ``attention_mask``; ``model`` is as before afterwards.
    """
    before = {norm: norm.token_mask for norm in repbn_modules(model).values()}
    takes_masks = any("attention_mask" in inspect.signature(module.forward).parameters for module in model.modules())
    given = any(mask is not None for mask in before.values())
    handles = keep_padding_out_everywhere_(model) if takes_masks and not given else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, mask in before.items():
            norm.token_mask = mask


def _is_watching(model: nn.Module) -> bool:
    return any(norm.training or norm.accumulator is not None for norm in repbn_modules(model).values())


def _takes_data(module: nn.Module) -> bool:
    taken = inspect.signature(module.forward).parameters.keys()
    return not DATA.isdisjoint(taken) and (TEXT.isdisjoint(taken) or "attention_mask" in taken)


def _attention_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "attention_mask" in kwargs or not args:
        return kwargs.get("attention_mask")
    return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")


def _is_of_tokens(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2
