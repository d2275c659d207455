"""Replace softmax attention of vision transformers by linear attention on the same projections (Guo et al. 2024).

teacher = copy.deepcopy(model)
slabformer.convert_attention_(model)
slabformer.align_attention_(model, teacher, images)  # each attention for itself; then train end to end
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.converted_attention import ConvertedLinearAttention
from slabformer.nn.resample import Grid
from slabformer.settings import NonNegativeInt, PositiveInt, checked
from slabformer.surgery.batches import eval_mode
from slabformer.surgery.conversion_plan import ConversionPlan, names_to_take
from slabformer.surgery.converted import ConvertedModules, LeftModule, summary_of
from slabformer.surgery.normal import makes_ordinary_tensors
from slabformer.surgery.outputs import first_line
from slabformer.surgery.reasons import Reason, Why

logger = logging.getLogger(__name__)

#: names of the projections of queries, keys and values, and of what follows the heads, in order
FORMS = (
    (("qkv",), ("proj", "proj_drop")),  # timm
    (("q_proj", "k_proj", "v_proj"), ("proj", "proj_drop")),  # timm's EVA
    (("q_proj", "k_proj", "v_proj"), ("o_proj",)),  # transformers' ViT, DeiT, DINOv2, BEiT
    (("q_proj", "k_proj", "v_proj"), ("out_proj",)),  # its CLIP, SigLIP
)
#: what the forward of an attention may be called with; what is neither tokens nor a mask of keys must then be nothing
TAKEN = {"x", "hidden_states", "attn_mask", "attention_mask", "is_causal", "head_mask", "output_attentions", "kwargs"}
#: names of the parameters that transformers' models put in front of the patches, one token each
CLASS_TOKENS = {"cls_token", "class_embedding", "distillation_token"}
#: an attention and what its projections alone would compute are the same within this share of the output's size
_SAME = 1e-3
_PROBE = (2, 10)


@makes_ordinary_tensors
@checked
def convert_attention_(
    model: nn.Module,
    filter: Callable[[nn.Module, str], bool] | None = None,
    *,
    plan: ConversionPlan | Collection[str] | None = None,
    grid_size: tuple[PositiveInt, PositiveInt] | None = None,
    num_prefix_tokens: NonNegativeInt | None = None,
    kernel_size: PositiveInt = 5,
) -> ConvertedModules:
    """Replace softmax self-attention of ``model`` in place by linear attention on the same projections.

    An attention is recognised by what it computes: its output must be that of softmax attention on its projections,
    which rules out masks, biases of positions, rotary embeddings and norms of queries and keys; those are left, logged
    and returned with the reason. Modes, dtype and device are kept, and so are the names of the projections. The
    outputs change: align (:func:`slabformer.align_attention_`), then train.

    Args:
        model: timm's or transformers' ViT and its kin; edited in place.
        filter: Called with ``(module, name)`` of each such attention; false leaves it as it is.
        plan: Names of those to convert, or what :func:`slabformer.audit_attention` recommends; the others stay.
        grid_size: Grid ``(H, W)`` of the patch tokens; read from the model by default.
        num_prefix_tokens: Class and register tokens in front of them; read from the model by default.
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
    grid, prefix = tokens_of(model, grid_size, num_prefix_tokens)
    made: dict[nn.Module, ConvertedLinearAttention] = {}  # one that stands in several places stays one
    for name in taken:
        old = model.get_submodule(name)
        if old not in made:
            made[old] = linear_form(old, found[name], grid, prefix, kernel_size).train(old.training)
        model.set_submodule(name, made[old])
    logger.info("converted %d attentions of %s", len(taken), type(model).__name__)
    for line in summary_of(left):
        logger.warning("%s", line)
    return ConvertedModules(taken, left)


def no_attention(model: nn.Module, left: Iterable[LeftModule]) -> str:
    """The error of a model that has no attention to convert."""
    because = "; ".join(["", *summary_of(left)])
    return f"no softmax attention of {type(model).__name__} to convert{because}"


Form = tuple[tuple[str, ...], tuple[str, ...]]


def linear_form(
    old: nn.Module, form: Form, grid: Grid, num_prefix_tokens: int, kernel_size: int
) -> ConvertedLinearAttention:
    """Linear attention on the projections of ``old``, which it shares."""
    projections, out = form
    return ConvertedLinearAttention(
        {leaf: old.get_submodule(leaf) for leaf in projections},  # type: ignore[misc]
        {leaf: old.get_submodule(leaf) for leaf in out if hasattr(old, leaf)},
        _num_heads(old) or 1,
        grid_size=grid,
        num_prefix_tokens=num_prefix_tokens,
        kernel_size=kernel_size,
        returns_weights=_returns_weights(old, projections),
    )


def find_attentions(model: nn.Module) -> tuple[dict[str, Form], tuple[LeftModule, ...]]:
    """What can be converted, by each of its names, and what looks like it and cannot be; nothing is changed."""
    found: dict[str, Form] = {}
    left: list[LeftModule] = []
    for name, module in model.named_modules(remove_duplicate=False):
        form = next((form for form in FORMS if _has(module, form)), None)
        if not name or form is None or isinstance(module, ConvertedLinearAttention) or not _num_heads(module):
            continue
        why = _why_not(module, form)
        if why:
            left.append(LeftModule.of(name, module, why))
        else:
            found[name] = form
    return found, tuple(left)


def _has(module: nn.Module, form: Form) -> bool:
    projections, out = form
    return all(type(getattr(module, name, None)) is nn.Linear for name in (*projections, out[0]))


def _num_heads(module: nn.Module) -> int | None:
    values = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads"))
    return next((value for value in values if isinstance(value, int)), None)


def _why_not(module: nn.Module, form: Form) -> Why | None:
    """Why ``module`` is no plain softmax attention; None if it is."""
    projections = [module.get_submodule(name) for name in form[0]]
    width = projections[0].in_features
    assert isinstance(width, int)
    heads = _num_heads(module) or 1
    weight = projections[0].weight
    assert isinstance(weight, Tensor)
    dim = weight.shape[0] * len(projections) // 3
    if dim % heads:
        return Why.of(Reason.UNEVEN_HEADS, f"its {dim} channels are no multiple of its {heads} heads")
    further = [name for name in inspect.signature(module.forward).parameters if name not in TAKEN]
    if further:
        return Why.of(Reason.FURTHER_INPUTS, f"its forward also takes {further[0]}, which linear attention cannot")
    if weight.is_meta:
        return Why.of(Reason.NO_VALUES, "its weights are on the meta device")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*_PROBE, width, generator=generator).to(weight)
    with torch.no_grad(), eval_mode(module):
        try:
            output = module(x)
        except Exception as error:  # code of others, on inputs of ours
            return Why.of(Reason.CANNOT_RUN, f"it takes more than tokens ({first_line(error)})")
        actual = output[0] if isinstance(output, tuple) else output
        outputs = [projection(x) for projection in projections]
        q, k, v = outputs[0].chunk(3, dim=-1) if len(outputs) == 1 else outputs
        expected = F.scaled_dot_product_attention(*(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)))
        expected = expected.transpose(1, 2).flatten(2)
        for name in form[1]:
            expected = getattr(module, name, nn.Identity())(expected)
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return Why.of(Reason.NOT_SOFTMAX_ATTENTION, "its output has another shape than its input")
    distance = (actual - expected).abs().max() / expected.abs().mean().clamp(min=1e-12)
    if distance < _SAME:
        return None
    return Why.of(Reason.NOT_SOFTMAX_ATTENTION, "it computes more than softmax attention on its projections")


def _returns_weights(module: nn.Module, projections: tuple[str, ...]) -> bool:
    linear = module.get_submodule(projections[0])
    assert isinstance(linear, nn.Linear)
    with torch.no_grad(), eval_mode(module):
        return isinstance(module(torch.zeros(1, 4, linear.in_features).to(linear.weight)), tuple)


def tokens_of(model: nn.Module, grid_size: Grid | None, num_prefix_tokens: int | None) -> tuple[Grid, int]:
    """Grid of the patch tokens and tokens in front of them, as asked or as the model says.

    Raises:
        ValueError: If it does not.
    """
    own_grid, own_prefix = _tokens_of_timm(model) or _tokens_of_transformers(model) or (None, None)
    grid, prefix = grid_size or own_grid, own_prefix if num_prefix_tokens is None else num_prefix_tokens
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
