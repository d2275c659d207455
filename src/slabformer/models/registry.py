"""What every family registers with timm alike: default configurations, released weights, LayerNorm baselines."""

from __future__ import annotations

import difflib
import sys
from contextlib import nullcontext
from typing import Any, TypeVar

import timm
import torch
from timm.models import build_model_with_cfg, register_notrace_module
from torch import nn

from slabformer.models.weights.pretrained import pretrained_source
from slabformer.models.weights.published import BY_MODEL
from slabformer.nn import PRepBN, RepBN
from slabformer.nn.attention import LinearAttentionCore
from slabformer.nn.attention_variants import PyramidAttention
from slabformer.nn.shifted_windows import ShiftedWindowAttention
from slabformer.nn.stripes import StripeAttention

# leaves of traced graphs: their arithmetic on sizes is no place for proxies
for _leaf in (RepBN, PRepBN, LinearAttentionCore, PyramidAttention, ShiftedWindowAttention, StripeAttention):
    register_notrace_module(_leaf)

Model = TypeVar("Model", bound=nn.Module)


def cfg(model: str, **kwargs: Any) -> dict[str, Any]:
    """Default configuration of ``model``: ImageNet at 224 px with published preprocessing, unless ``kwargs`` differ."""
    published = BY_MODEL.get(model)
    return {
        "url": published.url if published else "",
        "custom_load": True,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2405.11582",
        **kwargs,
    }


def create(
    model_cls: type[Model],
    variant: str,
    pretrained: bool,
    defaults: dict[str, Any],
    **kwargs: Any,
) -> Model:
    """Build ``variant`` through timm, from its released weights if ``pretrained``.

    Args:
        model_cls: Its class.
        variant: Its name.
        pretrained: Whether to load weights.
        defaults: Arguments of the variant; ``out_indices`` are the stages (or blocks) that ``features_only`` returns.
        kwargs: The caller's arguments, which win; ``norm_layer`` is taken as timm's spelling of ``norm``, ``device``
            and ``dtype`` are those of all that is built.
    """
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    if "norm_layer" in kwargs:
        kwargs["norm"] = kwargs.pop("norm_layer")
    if pretrained:
        sources = (kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"), kwargs.get("cache_dir"))
        kwargs["pretrained_cfg_overlay"] = pretrained_source(variant, *sources)
    arguments = {"out_indices": (0, 1, 2, 3)} | defaults | kwargs
    features = {"out_indices": arguments.pop("out_indices"), "feature_cls": "getter"}
    with nullcontext() if device is None else torch.device(device):
        model: Model = build_model_with_cfg(model_cls, variant, pretrained, feature_cfg=features, **arguments)
    return model if dtype is None else model.to(dtype)


def is_ours(model: str) -> bool:
    """Whether ``model`` is one of this package's in timm's registry."""
    return timm.is_model(model) and timm.model_entrypoint(model).__module__.startswith(f"{__package__}.")


def baseline_of(model: str) -> str | None:
    """Name of the LayerNorm model with softmax attention that ``model`` replaces; None for models that are not ours.

    Families say so in a dict ``layernorm_baselines``.
    """
    if not timm.is_model(model):
        return None
    family = sys.modules[timm.model_entrypoint(model).__module__]
    return getattr(family, "layernorm_baselines", {}).get(model)


def check_model_name(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ValueError: With the nearest name that it does.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        suggestion = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown model {name!r}; {suggestion}`slab list` shows all")
