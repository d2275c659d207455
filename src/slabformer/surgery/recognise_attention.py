"""Softmax attentions, recognised by what they compute: projections, heads, softmax, and what may stand around them."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.converted_attention import ROTATIONS, ConvertedLinearAttention, Rotary, rotate
from slabformer.nn.resample import Grid
from slabformer.surgery.batches import eval_mode
from slabformer.surgery.converted import LeftModule
from slabformer.surgery.outputs import first_line
from slabformer.surgery.reasons import Reason, Why

#: names of the projections of queries, keys and values, and of what follows the heads, in order, the projection last
#: but for its dropout
FORMS = (
    (("qkv",), ("norm", "proj", "proj_drop")),  # timm, transformers' SAM
    (("q_proj", "k_proj", "v_proj"), ("norm", "proj", "proj_drop")),  # timm's EVA
    (("q_proj", "k_proj", "v_proj"), ("o_proj",)),  # transformers' ViT, DeiT, DINOv2, DINOv3, BEiT
    (("q_proj", "k_proj", "v_proj"), ("out_proj",)),  # its CLIP, SigLIP
)
#: projections of queries, and of keys and values on a reduced map, as in pyramids (PVT)
REDUCED = ("q", "kv")
OUTGOING = ("proj", "o_proj", "out_proj")
#: of heads of queries and keys, and biases of queries and values that are not their projection's
NORMS, BIASES = ("q_norm", "k_norm"), ("q_bias", "v_bias")
#: parameters that hold biases of positions
TABLES = ("relative_position_bias_table", "rel_pos_h", "rel_pos_w")
#: arguments that hold them
PASSED_BIASES = ("shared_rel_pos_bias",)
#: attributes of layers around an attention that make biases of positions and pass them as its mask
MAKERS = ("relative_position_bias", "shared_position_bias")
#: what the forward of an attention may be called with; what is neither tokens, a mask of keys nor about positions must
#: then be nothing
TAKEN = {
    *("x", "hidden_states", "attn_mask", "attention_mask", "is_causal", "head_mask", "output_attentions", "kwargs"),
    *ROTATIONS,
    *PASSED_BIASES,
}
REDUCED_MAP = "its keys and values come from a reduced map, so that softmax over them costs little already"
#: an attention and what its projections alone would compute are the same within this share of the output's size
_SAME = 1e-3
_BATCH, _TOKENS = 2, 10


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """How a softmax attention is built.

    Attributes:
        projections: Names of the projections of queries, keys and values, one or three.
        out: Names of what follows the heads, in order.
        num_heads: Its heads.
        norms: ``q_norm`` and ``k_norm``, or nothing.
        biases: ``q_bias`` and ``v_bias``, or nothing.
        rotary: How rotary embeddings pair channels, where it takes them.
        passed_biases: Arguments that hold biases of positions.
        tokens: Grid of its patch tokens, and how many tokens are in front of them, where the attention itself says so.
        returns_weights: Whether it returns the attention matrix, too.
    """

    projections: tuple[str, ...]
    out: tuple[str, ...]
    num_heads: int
    norms: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    rotary: Rotary | None = None
    passed_biases: tuple[str, ...] = ()
    tokens: tuple[Grid, int] | None = None
    returns_weights: bool = False


def find_attentions(model: nn.Module) -> tuple[dict[str, AttentionForm], tuple[LeftModule, ...]]:
    """What can be converted, by each of its names, and what looks like it and cannot be; nothing is changed."""
    found: dict[str, AttentionForm] = {}
    left: list[LeftModule] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or isinstance(module, ConvertedLinearAttention) or not _num_heads(module):
            continue
        if _has_linears(module, (*REDUCED, "proj")):
            left.append(LeftModule.of(name, module, Why.of(Reason.FEW_KEYS, REDUCED_MAP)))
        if not _names_of(module):
            continue
        form = _recognise(module, _gets_bias_as_mask(model, name))
        if isinstance(form, Why):
            left.append(LeftModule.of(name, module, form))
        else:
            found[name] = form
    return found, tuple(left)


def _names_of(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Names of its projections, and of what follows the heads, that are there and do something."""
    for projections, out in FORMS:
        needed = (*projections, next(name for name in out if name in OUTGOING))
        if _has_linears(module, needed):
            return projections, tuple(name for name in out if _is_something(getattr(module, name, None)))
    return None


def _has_linears(module: nn.Module, names: Iterable[str]) -> bool:
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


def _is_something(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _num_heads(module: nn.Module) -> int | None:
    values = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads"))
    return next((value for value in values if isinstance(value, int)), None)


def _gets_bias_as_mask(model: nn.Module, name: str) -> bool:
    """Whether a layer around the attention makes biases of positions and passes them as a mask (transformers' BEiT)."""
    parts = name.split(".")
    around = ["", *itertools.accumulate(parts[:-1], "{}.{}".format)]
    holders = (getattr(model.get_submodule(each), attribute, None) for each in around for attribute in MAKERS)
    return any(isinstance(holder, nn.Module) for holder in holders)


def _recognise(module: nn.Module, bias_as_mask: bool) -> AttentionForm | Why:
    """How ``module`` is built, or why it is no softmax attention on its projections."""
    names, heads = _names_of(module), _num_heads(module)
    assert names is not None
    assert heads is not None
    weight = module.get_submodule(names[0][0]).weight
    assert isinstance(weight, Tensor)
    dim = weight.shape[0] * len(names[0]) // 3
    parameters = inspect.signature(module.forward).parameters
    further = [name for name in parameters if name not in TAKEN]
    if dim % heads:
        return Why.of(Reason.UNEVEN_HEADS, f"its {dim} channels are no multiple of its {heads} heads")
    if further == ["mask"] and isinstance(getattr(module, "window_size", None), tuple):
        H, W = module.window_size  # type: ignore[misc]
        words = f"its windows of {H}x{W} tokens are small, so that softmax over them costs little already"
        return Why.of(Reason.FEW_KEYS, f"{words}, and their masks tell queries apart")
    if further:
        return Why.of(Reason.FURTHER_INPUTS, f"its forward also takes {further[0]}, which linear attention cannot")
    config = getattr(module, "config", None)
    if hasattr(config, "vocab_size") and not hasattr(config, "image_size"):
        return Why.of(Reason.NO_GRID, "its tokens are of text, which lie on no grid")
    if weight.is_meta:
        return Why.of(Reason.NO_VALUES, "its weights are on the meta device")
    form = AttentionForm(
        projections=names[0],
        out=names[1],
        num_heads=heads,
        norms=NORMS if any(_is_something(getattr(module, name, None)) for name in NORMS) else (),
        biases=BIASES if all(getattr(module, name, None) is not None for name in BIASES) else (),
        passed_biases=tuple(name for name in PASSED_BIASES if name in parameters)
        + (("attention_mask",) if bias_as_mask else ()),
        tokens=_own_tokens(module),
    )
    return _tried(module, form, next((name for name in ROTATIONS if name in parameters), None))


def _own_tokens(module: nn.Module) -> tuple[Grid, int] | None:
    """Grid and prefix of an attention that holds biases of relative positions, from their sizes."""
    rows, columns = (getattr(module, name, None) for name in ("rel_pos_h", "rel_pos_w"))
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        return ((len(rows) + 1) // 2, (len(columns) + 1) // 2), 0
    index, window = (getattr(module, name, None) for name in ("relative_position_index", "window_size"))
    if isinstance(index, Tensor) and isinstance(window, tuple) and index.ndim == 2:
        return (window[0], window[1]), len(index) - window[0] * window[1]
    return None


def _tried(module: nn.Module, form: AttentionForm, rotation: str | None) -> AttentionForm | Why:
    """``form`` with what a run shows, or what the run shows against it."""
    tables = [name for name in TABLES if isinstance(getattr(module, name, None), nn.Parameter)]
    if tables:  # linear attention does without these biases: the rest must be softmax attention
        module = copy.deepcopy(module)
        for name in tables:
            nn.init.zeros_(module.get_parameter(name))
    refused = Why.of(Reason.NOT_SOFTMAX_ATTENTION, "it computes more than softmax attention on its projections")
    with torch.no_grad(), eval_mode(module):
        for rotary, given in _rotations(module, form, rotation):
            x = _probe(module, form)
            try:
                output = module(x, **given)
            except Exception as error:  # code of others, on inputs of ours
                return Why.of(Reason.CANNOT_RUN, f"it takes more than tokens ({first_line(error)})")
            actual = output[0] if isinstance(output, tuple) else output
            expected = _softmax_attention(module, form, x.flatten(1, -2), rotary)
            if not isinstance(actual, Tensor) or actual.shape != x.shape[:-1] + expected.shape[-1:]:
                return Why.of(Reason.NOT_SOFTMAX_ATTENTION, "its output has another shape than its input")
            distance = (actual.flatten(1, -2) - expected).abs().max() / expected.abs().mean().clamp(min=1e-12)
            if distance < _SAME:
                pairing = None if rotary is None else rotary[0]
                return replace(form, rotary=pairing, returns_weights=isinstance(output, tuple))
    return refused


def _probe(module: nn.Module, form: AttentionForm) -> Tensor:
    """Tokens, or maps for those that take them, as many as the attention wants."""
    linear = module.get_submodule(form.projections[0])
    assert isinstance(linear, nn.Linear)
    shape: tuple[int, ...] = (_TOKENS,)
    if form.tokens is not None:
        (H, W), prefix = form.tokens
        shape = (H, W) if hasattr(module, "rel_pos_h") else (H * W + prefix,)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_BATCH, *shape, linear.in_features, generator=generator).to(linear.weight)


Turned = tuple[Rotary, Tensor, Tensor, int]


def _rotations(
    module: nn.Module, form: AttentionForm, argument: str | None
) -> Iterator[tuple[Turned | None, dict[str, Any]]]:
    """What to try: without rotation, or angles in the order of one pairing, and the arguments that pass them."""
    if argument is None:
        yield None, {}
        return
    linear = module.get_submodule(form.projections[0])
    assert isinstance(linear, nn.Linear)
    head_dim = linear.out_features * len(form.projections) // 3 // form.num_heads
    prefix = getattr(module, "num_prefix_tokens", 1)
    angles = torch.rand(_TOKENS - prefix, head_dim // 2, generator=torch.Generator().manual_seed(1)).to(linear.weight)
    for rotary, each in (("half", angles.repeat(1, 2)), ("interleaved", angles.repeat_interleave(2, 1))):
        cos, sin = each.cos(), each.sin()
        given = torch.cat([sin, cos], -1) if argument == "rope" else (cos, sin)
        yield (rotary, cos, sin, prefix), {argument: given}  # type: ignore[misc]


def _softmax_attention(module: nn.Module, form: AttentionForm, x: Tensor, turned: Turned | None) -> Tensor:
    """What the attention computes on tokens if it is what ``form`` says."""
    outputs = [module.get_submodule(name)(x) for name in form.projections]
    q, k, v = outputs[0].chunk(3, dim=-1) if len(outputs) == 1 else outputs
    if form.biases:
        q, v = q + module.get_parameter("q_bias"), v + module.get_parameter("v_bias")
    q, k, v = (each.unflatten(-1, (form.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
    if form.norms:
        q, k = module.get_submodule("q_norm")(q), module.get_submodule("k_norm")(k)
    if turned is not None:
        rotary, cos, sin, prefix = turned
        q, k = (torch.cat([t[:, :, :prefix], rotate(t[:, :, prefix:], cos, sin, rotary)], 2) for t in (q, k))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    for name in form.out:
        expected = module.get_submodule(name)(expected)
    return expected
