"""Replace softmax attention of vision transformers by linear attention on the same projections, and bring it near.

    teacher = copy.deepcopy(model)
    slabformer.convert_attention_(model)
    slabformer.align_attention_(model, teacher, images)  # each attention for itself; then train end to end

After Guo et al. 2024 (the attention) and arXiv 2603.16063 (layers first, then blocks, then the model).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer.nn.converted_attention import ConvertedLinearAttention
from slabformer.nn.resample import Grid
from slabformer.ops.precision import wide
from slabformer.settings import NonNegativeInt, PositiveFloat, PositiveInt, checked
from slabformer.surgery.batches import NO_BATCH, call_model, eval_mode, model_device, to_device
from slabformer.surgery.normal import makes_ordinary_tensors
from slabformer.surgery.outputs import first_line

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
#: added to the diagonal of the normal equations, relative to its mean
_RIDGE = 1e-3
#: shifted copies of values that are in memory at once
_ELEMENTS = 2**23
#: places of the keys' ReLU that the start tries, in standard deviations of the keys
_SHIFTS = (0.0, 0.5, 1.0, 2.0)


class LeftAttention(NamedTuple):
    """A module that looks like an attention and was left as it is.

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


class ConvertedAttentions(list[str]):
    """Names of the converted modules, in the model's order.

    Attributes:
        left: What looks like an attention and was left, but for what the filter refused.
    """

    def __init__(self, names: Iterable[str] = (), left: Iterable[LeftAttention] = ()) -> None:
        super().__init__(names)
        self.left = tuple(left)


@makes_ordinary_tensors
@checked
def convert_attention_(
    model: nn.Module,
    filter: Callable[[nn.Module, str], bool] | None = None,
    *,
    plan: Collection[str] | None = None,
    grid_size: tuple[PositiveInt, PositiveInt] | None = None,
    num_prefix_tokens: NonNegativeInt | None = None,
    kernel_size: PositiveInt = 5,
) -> ConvertedAttentions:
    """Replace softmax self-attention of ``model`` in place by linear attention on the same projections.

    An attention is recognised by what it computes: its output must be that of softmax attention on its projections,
    which rules out masks, biases of positions, rotary embeddings and norms of queries and keys; those are left, logged
    and returned with the reason. Modes, dtype and device are kept, and so are the names of the projections. The
    outputs change: align (:func:`slabformer.align_attention_`), then train.

    Args:
        model: timm's or transformers' ViT and its kin; edited in place.
        filter: Called with ``(module, name)`` of each such attention; false leaves it as it is.
        plan: Names of those to convert; the others stay.
        grid_size: Grid ``(H, W)`` of the patch tokens; read from the model by default.
        num_prefix_tokens: Class and register tokens in front of them; read from the model by default.
        kernel_size: Of the depthwise convolution, odd.

    Returns:
        Names of the converted modules.

    Raises:
        ValueError: If nothing matched, ``plan`` names an attention that the model does not have, or the grid is not
            known.
    """
    found, left = find_attentions(model)
    unknown = sorted(set(plan or ()) - set(found))
    if unknown:
        raise ValueError(f"the plan names {len(unknown)} attentions that cannot be converted (first: {unknown[0]!r})")
    taken = [
        name
        for name in found
        if (plan is None or name in plan) and (filter is None or filter(model.get_submodule(name), name))
    ]
    if not taken:
        because = f"; {left[0]}" if left else ""
        raise ValueError(f"no softmax attention of {type(model).__name__} to convert{because}")
    grid, prefix = _tokens_of(model, grid_size, num_prefix_tokens)
    for name in taken:
        old = model.get_submodule(name)
        projections, out = found[name]
        new = ConvertedLinearAttention(
            {leaf: old.get_submodule(leaf) for leaf in projections},  # type: ignore[misc]
            {leaf: old.get_submodule(leaf) for leaf in out if hasattr(old, leaf)},
            _num_heads(old) or 1,
            grid_size=grid,
            num_prefix_tokens=prefix,
            kernel_size=kernel_size,
            returns_weights=_returns_weights(old, projections),
        )
        model.set_submodule(name, new.train(old.training))
    for line in left:
        logger.warning("%s", line)
    logger.info("converted %d attentions of %s", len(taken), type(model).__name__)
    return ConvertedAttentions(taken, left)


Form = tuple[tuple[str, ...], tuple[str, ...]]


def find_attentions(model: nn.Module) -> tuple[dict[str, Form], tuple[LeftAttention, ...]]:
    """What can be converted, by name, and what looks like it and cannot be; nothing is changed."""
    found: dict[str, Form] = {}
    left: list[LeftAttention] = []
    for name, module in model.named_modules():
        form = next((form for form in FORMS if _has(module, form)), None)
        if form is None or isinstance(module, ConvertedLinearAttention) or not _num_heads(module):
            continue
        reason = _why_not(module, form)
        if reason:
            left.append(LeftAttention(name, type(module).__name__, reason))
        else:
            found[name] = form
    return found, tuple(left)


def _has(module: nn.Module, form: Form) -> bool:
    projections, out = form
    return all(type(getattr(module, name, None)) is nn.Linear for name in (*projections, out[0]))


def _num_heads(module: nn.Module) -> int | None:
    values = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads"))
    return next((value for value in values if isinstance(value, int)), None)


def _why_not(module: nn.Module, form: Form) -> str:
    """Why ``module`` is no plain softmax attention; empty if it is."""
    projections = [module.get_submodule(name) for name in form[0]]
    width = projections[0].in_features
    assert isinstance(width, int)
    heads = _num_heads(module) or 1
    weight = projections[0].weight
    assert isinstance(weight, Tensor)
    dim = weight.shape[0] * len(projections) // 3
    if dim % heads:
        return f"its {dim} channels are no multiple of its {heads} heads"
    further = [name for name in inspect.signature(module.forward).parameters if name not in TAKEN]
    if further:
        return f"its forward also takes {further[0]}, which linear attention cannot"
    if weight.is_meta:
        return "its weights are on the meta device"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*_PROBE, width, generator=generator).to(weight)
    with torch.no_grad(), eval_mode(module):
        try:
            output = module(x)
        except Exception as error:  # code of others, on inputs of ours
            return f"it takes more than tokens ({first_line(error)})"
        actual = output[0] if isinstance(output, tuple) else output
        outputs = [projection(x) for projection in projections]
        q, k, v = outputs[0].chunk(3, dim=-1) if len(outputs) == 1 else outputs
        expected = F.scaled_dot_product_attention(*(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)))
        expected = expected.transpose(1, 2).flatten(2)
        for name in form[1]:
            expected = getattr(module, name, nn.Identity())(expected)
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return "its output has another shape than its input"
    distance = (actual - expected).abs().max() / expected.abs().mean().clamp(min=1e-12)
    return "" if distance < _SAME else "it computes more than softmax attention on its projections"


def _returns_weights(module: nn.Module, projections: tuple[str, ...]) -> bool:
    linear = module.get_submodule(projections[0])
    assert isinstance(linear, nn.Linear)
    with torch.no_grad(), eval_mode(module):
        return isinstance(module(torch.zeros(1, 4, linear.in_features).to(linear.weight)), tuple)


def _tokens_of(model: nn.Module, grid_size: Grid | None, num_prefix_tokens: int | None) -> tuple[Grid, int]:
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


@checked
def align_attention_(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    fit_batches: PositiveInt = 2,
    steps: NonNegativeInt = 100,
    lr: PositiveFloat = 3e-4,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, float]:
    """Bring every converted attention near the one that it replaced, each for itself, on the teacher's activations.

    First a start in closed form: the depthwise branch by least squares against what linear attention misses, and the
    place of the keys' ReLU by trying a few. Then ``steps`` of AdamW on each attention's own squared error. One forward
    of the teacher a batch serves all of them; no gradient leaves an attention. Memory: inputs and heads of every
    attention on the batches of the start, or on one batch of training.

    Args:
        model: Converted by :func:`convert_attention_`; edited in place.
        teacher: The model before it was converted.
        batches: As for :func:`slabformer.recalibrate_`; begun anew where they end before ``steps``, if they can be.
        fit_batches: Batches that the start uses.
        steps: Batches that are trained on after it; 0 for the start alone.
        lr: Highest rate of AdamW, which falls to 0 by a cosine.
        forward: As for :func:`slabformer.recalibrate_`.

    Returns:
        For each attention the squared error of its output over the variance of the teacher's, on the batches of the
        start; where training did not lower it, the attention keeps its start.

    Raises:
        ValueError: If the model has no converted attention, the teacher has none under such a name, or there is no
            batch.
    """
    students = {n: m for n, m in model.named_modules() if isinstance(m, ConvertedLinearAttention)}
    if not students:
        raise ValueError("the model has no converted attention; call convert_attention_(model) first")
    pairs = {name: (student, _teacher_of(teacher, name, student)) for name, student in students.items()}
    if isinstance(batches, Iterator):
        batches = list(itertools.islice(batches, fit_batches + steps))
    seen = list(itertools.islice(batches, fit_batches))
    if not seen:
        raise ValueError(NO_BATCH)
    device, call = model_device(teacher), forward or call_model
    with eval_mode(model), eval_mode(teacher):
        captures = [_captured(teacher, pairs, call, to_device(batch, device)) for batch in seen]
        for name, (student, _) in pairs.items():
            _start(student, [capture[name] for capture in captures])
        errors = _errors(pairs, captures)
        if not steps:
            return errors
        started = {name: copy.deepcopy(student.state_dict()) for name, (student, _) in pairs.items()}
        _train(pairs, teacher, call, itertools.islice(_endless(batches), steps), steps, lr, device)
        trained = _errors(pairs, captures)
        for name in [name for name, error in trained.items() if not error <= errors[name]]:
            pairs[name][0].load_state_dict(started[name])
            logger.warning("training brought %s no nearer to its teacher: it keeps its start; lower lr", name)
        return {name: min(error, errors[name]) for name, error in trained.items()}


class _Seen(NamedTuple):
    """What one attention of the teacher did in one forward."""

    x: Tensor
    mixed: Tensor


Pairs = Mapping[str, tuple[ConvertedLinearAttention, nn.Module]]


def _teacher_of(teacher: nn.Module, name: str, student: ConvertedLinearAttention) -> nn.Module:
    try:
        found = teacher.get_submodule(name)
    except AttributeError:
        found = None
    if found is None or isinstance(found, ConvertedLinearAttention) or not hasattr(found, student._out[0]):
        raise ValueError(f"the teacher has no softmax attention {name!r}; pass the model as it was before conversion")
    return found


@torch.no_grad()
def _captured(teacher: nn.Module, pairs: Pairs, call: Callable[[nn.Module, Any], Any], batch: Any) -> dict[str, _Seen]:
    """Inputs and heads of the teacher's attentions on ``batch``."""
    inputs: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    handles = []
    for name, (student, module) in pairs.items():

        def begin(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            inputs[name] = args[0] if args else kwargs["hidden_states"]

        def middle(_: nn.Module, args: Any, name: str = name) -> None:
            heads[name] = args[0]

        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.get_submodule(student._out[0]).register_forward_pre_hook(middle))
    try:
        call(teacher, batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in pairs if name not in heads]
    if missing:
        raise ValueError(f"the teacher's forward does not call {missing[0]}")
    wrong = [name for name, mixed in heads.items() if not mixed.isfinite().all()]
    if wrong:
        raise ValueError(f"outputs of the teacher's {wrong[0]} are not finite; check the data")
    return {name: _Seen(inputs[name], heads[name]) for name in pairs}


@torch.no_grad()
def _start(student: ConvertedLinearAttention, seen: list[_Seen]) -> None:
    """Keys' shift and depthwise branch that miss least of the teacher's heads."""
    keys = torch.cat([student.projected(each.x)[1].flatten(0, 1) for each in seen])
    spread = keys.std(0)
    best: tuple[float, float, Tensor] | None = None
    for shift in _SHIFTS:
        _shift_keys(student, shift * spread)
        missed, kernels = _depthwise(student, seen)
        if best is None or missed < best[0]:
            best = (missed, shift, kernels)
    assert best is not None
    _shift_keys(student, best[1] * spread)
    side = student.dwc.kernel_size[0]
    student.dwc.weight.copy_(best[2][:, :-1].unflatten(1, (1, side, side)))
    assert student.dwc.bias is not None
    student.dwc.bias.copy_(best[2][:, -1])


def _shift_keys(student: ConvertedLinearAttention, shift: Tensor) -> None:
    student.positional_encoding.copy_(shift.expand_as(student.positional_encoding))
    student.prefix_encoding.copy_(shift.expand_as(student.prefix_encoding))


def _depthwise(student: ConvertedLinearAttention, seen: list[_Seen]) -> tuple[float, Tensor]:
    """Least squares over all heads: share of the teacher's patch tokens missed, and ``(D, K * K + 1)`` kernels."""
    prefix, side = student.num_prefix_tokens, student.dwc.kernel_size[0]
    normal: Tensor | float = 0.0
    wanted: Tensor | float = 0.0
    square, size = 0.0, 0.0
    for x, mixed in seen:
        grid = student.grid_of(x)
        q, k, v = student.heads(*student.projected(x))
        linear = student.attend(q, k, v.contiguous(), grid)
        targets = (student.split(mixed)[:, :, prefix:] - linear[:, :, prefix:]).flatten(0, 1)  # (B h, N, D)
        values = v[:, :, prefix:].flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # (B h, D, H, W)
        rows = max(1, _ELEMENTS // (values[0].numel() * side**2))
        for maps, target in zip(values.split(rows), targets.split(rows), strict=True):
            maps, target = wide(maps), wide(target)
            taps = F.unfold(maps, side, padding=side // 2).unflatten(1, (maps.shape[1], -1))  # (b, D, K K, N)
            taps = torch.cat([taps, torch.ones_like(taps[:, :, :1])], dim=2)
            normal = normal + torch.einsum("bdkn,bdln->dkl", taps, taps)
            wanted = wanted + torch.einsum("bdkn,bnd->dk", taps, target)
            square += float(target.square().sum())
        size += float(wide(mixed[:, prefix:]).square().sum())
    assert isinstance(normal, Tensor)
    assert isinstance(wanted, Tensor)
    ridge = _RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    kernels = torch.linalg.solve(normal + ridge[:, None, None] * eye, wanted)
    missed = square - 2 * float((kernels * wanted).sum()) + float(torch.einsum("dk,dkl,dl->", kernels, normal, kernels))
    return missed / max(size, 1e-12), kernels


@torch.no_grad()
def _errors(pairs: Pairs, captures: Sequence[Mapping[str, _Seen]]) -> dict[str, float]:
    """Mean over the captured batches."""
    return {
        name: sum(float(_error(student, module, capture[name])) for capture in captures) / len(captures)
        for name, (student, module) in pairs.items()
    }


def _error(student: ConvertedLinearAttention, teacher: nn.Module, seen: _Seen) -> Tensor:
    """Squared error of the output over the variance of the teacher's."""
    output = student(seen.x)
    output = output[0] if isinstance(output, tuple) else output
    with torch.no_grad():
        target = seen.mixed
        for name in student._out:
            target = teacher.get_submodule(name)(target)
        target = target.float()
    return (output.float() - target).square().mean() / target.var(correction=0).clamp(min=1e-12)


def _train(
    pairs: Pairs,
    teacher: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    batches: Iterable[Any],
    steps: int,
    lr: float,
    device: torch.device,
) -> None:
    parameters = [p for student, _ in pairs.values() for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in batches:
        seen = _captured(teacher, pairs, call, to_device(batch, device))
        with torch.enable_grad():
            errors = torch.stack([_error(*pair, seen[name]) for name, pair in pairs.items()])
            gradients = torch.autograd.grad(errors.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            return
