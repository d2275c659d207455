"""Replace softmax attention of vision transformers by linear attention on the same projections (Guo et al. 2024).

teacher = copy.deepcopy(model)
slabformer.convert_attention_(model)
slabformer.align_attention_(model, teacher, images)  # each attention for itself; then train end to end
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from torch import nn

from slabformer.nn.converted_attention import ConvertedLinearAttention, PrefixAttention
from slabformer.nn.resample import Grid
from slabformer.settings import NonNegativeInt, PositiveInt, checked
from slabformer.surgery.conversion_plan import ConversionPlan, names_to_take
from slabformer.surgery.converted import ConvertedModules, LeftModule, summary_of
from slabformer.surgery.normal import makes_ordinary_tensors
from slabformer.surgery.recognise_attention import AttentionForm, find_attentions

logger = logging.getLogger(__name__)

#: names of the parameters that transformers' models put in front of the patches, one token each
CLASS_TOKENS = {"cls_token", "class_embedding", "distillation_token"}


@makes_ordinary_tensors
@checked
def convert_attention_(
    model: nn.Module,
    filter: Callable[[nn.Module, str], bool] | None = None,
    *,
    plan: ConversionPlan | Collection[str] | None = None,
    grid_size: tuple[PositiveInt, PositiveInt] | None = None,
    num_prefix_tokens: NonNegativeInt | None = None,
    prefix_attention: PrefixAttention = "softmax",
    kernel_size: PositiveInt = 5,
) -> ConvertedModules:
    """Replace softmax self-attention of ``model`` in place by linear attention on the same projections.

    An attention is recognised by what it computes: its output must be that of softmax attention on its projections,
    with norms of queries and keys, rotary embeddings and biases of relative positions where the model has them (EVA,
    DINOv3, BEiT, SAM); :class:`~slabformer.nn.converted_attention.ConvertedLinearAttention` says what becomes of these.
    What computes more is left, logged and returned with the reason: windows with masks (Swin), spatial reduction (PVT),
    gates, attention over text. Modes, dtype and device are kept, and so are the names of the projections. The outputs
    change: align (:func:`slabformer.align_attention_`), then train.

    Args:
        model: timm's or transformers' ViT and its kin; edited in place.
        filter: Called with ``(module, name)`` of each such attention; false leaves it as it is.
        plan: Names of those to convert, or what :func:`slabformer.audit_attention` recommends; the others stay.
        grid_size: Grid ``(H, W)`` of the patch tokens; read from each attention or from the model by default.
        num_prefix_tokens: Class and register tokens in front of them; the same.
        prefix_attention: Whether those go on attending by "softmax", which is linear in the number of patches too and
            exact, or are "linear" like all others.
        kernel_size: Of the depthwise convolution, odd.

    Returns:
        Names of the converted modules, in the model's order; ``left`` holds what looks like an attention and was left.

    Raises:
        ValueError: If nothing matched, ``plan`` names an attention that the model does not have, or the grid is not
            known.
    """
    found, left = find_attentions(model)
    planned = set(found) if plan is None else names_to_take(plan, found, "attentions")
    taken = [name for name in found if name in planned and (filter is None or filter(model.get_submodule(name), name))]
    if not taken:
        raise ValueError(no_attention(model, left))
    places = {name: tokens_of(model, found[name], grid_size, num_prefix_tokens) for name in taken}
    made: dict[nn.Module, ConvertedLinearAttention] = {}  # one that stands in several places stays one
    for name in taken:
        old = model.get_submodule(name)
        if old not in made:
            made[old] = linear_form(old, found[name], *places[name], kernel_size, prefix_attention).train(old.training)
        model.set_submodule(name, made[old])
    logger.info("converted %d attentions of %s", len(taken), type(model).__name__)
    for line in summary_of(left):
        logger.warning("%s", line)
    return ConvertedModules(taken, left)


def no_attention(model: nn.Module, left: Iterable[LeftModule]) -> str:
    """The error of a model that has no attention to convert."""
    because = "; ".join(["", *summary_of(left)])
    return f"no softmax attention of {type(model).__name__} to convert{because}"


def linear_form(
    old: nn.Module,
    form: AttentionForm,
    grid: Grid,
    num_prefix_tokens: int,
    kernel_size: int,
    prefix_attention: PrefixAttention = "softmax",
) -> ConvertedLinearAttention:
    """Linear attention on the projections of ``old``, which it shares."""
    return ConvertedLinearAttention(
        {name: old.get_submodule(name) for name in form.projections},  # type: ignore[misc]
        {name: old.get_submodule(name) for name in form.out},
        form.num_heads,
        grid_size=grid,
        num_prefix_tokens=num_prefix_tokens,
        prefix_attention=prefix_attention,
        kernel_size=kernel_size,
        returns_weights=form.returns_weights,
        norms={name: old.get_submodule(name) for name in form.norms},
        biases={name: old.get_parameter(name) for name in form.biases},
        rotary=form.rotary,
        ignored=form.passed_biases,
    )


def tokens_of(
    model: nn.Module, form: AttentionForm, grid_size: Grid | None, num_prefix_tokens: int | None
) -> tuple[Grid, int]:
    """Grid of an attention's patch tokens and tokens in front of them: as asked, as it says, or as the model does.

    Raises:
        ValueError: If neither does.
    """
    said = form.tokens or _tokens_of_timm(model) or _tokens_of_transformers(model) or (None, None)
    grid, prefix = grid_size or said[0], said[1] if num_prefix_tokens is None else num_prefix_tokens
    if grid is None or prefix is None:
        raise ValueError(
            f"{type(model).__name__} does not say how its tokens lie; pass grid_size=(H, W) and num_prefix_tokens="
        )
    return grid, prefix


def _tokens_of_timm(model: nn.Module) -> tuple[Grid, int] | None:
    grid, prefix = (
        getattr(getattr(model, "patch_embed", None), "grid_size", None),
        getattr(model, "num_prefix_tokens", None),
    )
    return ((grid[0], grid[1]), prefix) if grid is not None and isinstance(prefix, int) else None


def _tokens_of_transformers(model: nn.Module) -> tuple[Grid, int] | None:
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is None or patch is None:
        return None
    sizes = [size if isinstance(size, (tuple, list)) else (size, size) for size in (image, patch)]
    grid = tuple(pixels // side for pixels, side in zip(*sizes, strict=True))
    leaves = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
    return (grid[0], grid[1]), sum(leaf in CLASS_TOKENS for leaf in leaves) + getattr(config, "num_register_tokens", 0)
