"""Which attentions of a model were made linear, in data: what it takes to convert a fresh one alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

import slabformer as sf
from slabformer.nn.converted_attention import ConvertedLinearAttention, PrefixAttention
from slabformer.settings import NonEmptyStr, NonNegativeInt, PositiveInt, check_fields


@dataclass(frozen=True, kw_only=True)
class AttentionConversion:
    """Attentions that :func:`slabformer.convert_attention_` replaced with the same settings."""

    names: list[NonEmptyStr]
    """Of the modules."""
    grid_size: tuple[PositiveInt, PositiveInt]
    """Of the patch tokens that position tables are made for."""
    num_prefix_tokens: NonNegativeInt
    """In front of the patch tokens."""
    kernel_size: PositiveInt
    """Of the depthwise convolution."""
    prefix_attention: PrefixAttention = "linear"
    """What those in front attend by; what was saved before there was a choice does not say it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid_size", tuple(self.grid_size))  # JSON has lists alone
        check_fields(self)


def describe_attentions(model: nn.Module) -> list[AttentionConversion]:
    """The conversions that make the linear attentions of ``model`` of what stood in their places."""
    groups: dict[tuple[tuple[int, int], int, int, PrefixAttention], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ConvertedLinearAttention):
            settings = (module.grid_size, module.num_prefix_tokens, module.dwc.kernel_size[0], module.prefix_attention)
            groups.setdefault(settings, []).append(name)
    return [
        AttentionConversion(
            names=names, grid_size=grid, num_prefix_tokens=prefix, kernel_size=kernel, prefix_attention=by
        )
        for (grid, prefix, kernel, by), names in groups.items()
    ]


def convert_attentions_as_described_(model: nn.Module, conversions: Iterable[AttentionConversion], title: str) -> None:
    """Convert the attentions of a fresh ``model``, which ``title`` calls by its name, before its weights are loaded.

    Raises:
        ValueError: If it has no such attention.
    """
    for conversion in conversions:
        try:
            sf.convert_attention_(
                model,
                plan=conversion.names,
                grid_size=conversion.grid_size,
                num_prefix_tokens=conversion.num_prefix_tokens,
                prefix_attention=conversion.prefix_attention,
                kernel_size=conversion.kernel_size,
            )
        except ValueError as error:
            raise ValueError(
                f"the attentions of {title} cannot be converted as described: {error}; is its library another version?"
            ) from error
