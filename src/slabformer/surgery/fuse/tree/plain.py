"""Fused weights in a stock model, built without norms: nothing of slabformer is needed to load them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slabformer.nn import PadTokens
from slabformer.nn.affine import Affine
from slabformer.surgery.fuse.tree.fold import KEPT_BUFFERS, NEW_BIASES
from slabformer.surgery.fuse.tree.ties import names_of_shared


def plain_(stock: nn.Module, fused: nn.Module) -> nn.Module:
    """Load the weights of ``fused`` into ``stock``, the same architecture built with the identity as its norm.

    Args:
        stock: For example ``timm.create_model(name, norm_layer=nn.Identity)``. Edited in place.
        fused: What :func:`slabformer.fuse` returned.

    Returns:
        ``stock``, in eval mode.

    Raises:
        ValueError: If ``fused`` holds what ``stock`` has no place for: norms that were kept, biases that folding added,
            fills of pads, weights of their own for layers that are one there; ``stock`` is then unchanged.
    """
    barred = _additions(fused)
    expected, found = stock.state_dict(), fused.state_dict()
    barred += [f"{name} has no place" for name in found if name not in expected]
    barred += [f"{name} has no value" for name in expected if name not in found]
    for first, *others in names_of_shared(stock):
        barred += [f"{first} and {name} are one there" for name in others if _differ(found, first, name)]
    if barred:
        more = f" (and {len(barred) - 1} more)" if len(barred) > 1 else ""
        raise ValueError(
            f"{type(stock).__name__} without norms cannot hold the fused weights: {barred[0]}{more}; "
            "save the fused model instead, or export it"
        )
    stock.load_state_dict(found, strict=True)
    return stock.eval()


def _differ(found: Mapping[str, Tensor], one: str, other: str) -> bool:
    return one in found and other in found and not torch.equal(found[one], found[other])


def _additions(fused: nn.Module) -> list[str]:
    found = []
    for name, module in fused.named_modules():
        if isinstance(module, Affine):
            found.append(f"{name} was kept")
        if isinstance(module, PadTokens) and module.value is not None:
            found.append(f"{name} pads with a value")
        found += [f"{name}.{leaf} is new" for note in (NEW_BIASES, KEPT_BUFFERS) for leaf in getattr(module, note, ())]
    return found
