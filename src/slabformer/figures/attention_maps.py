"""Which token attends to which: a layer's effective attention, softmax and linear alike, as one matrix a head.

layers = record(model, images)
weights = pick(layers, "blocks.11").weights()  # (num_heads, N, M)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from slabformer.nn.attention import LinearAttentionCore
from slabformer.nn.resample import Grid
from slabformer.nn.stripes import StripeAttention, WindowLinearAttention

EPS = 1e-6  # as in slabformer.ops.linear_attention
#: tokens that may stand in front of the grid's: a class token, a distillation token, registers
MOST_PREFIX = 9


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Queries and keys of one attention as they met over one image.

    Attributes:
        name: Of the module.
        q: ``(num_heads, N, D)``, tokens in front of the grid's (a class token) first.
        k: ``(num_heads, M, D)``, position table added.
        linear: Whether their product is taken of their ReLU instead of softmax.
        scale: Of the scores before softmax.
        bias: Added to the scores, broadcast to ``(num_heads, N, M)``.
        kernels: Of the depthwise convolutions of the values, ``(num_heads, D, K, K)``; None where there are none.
        query_grid, key_grid: Where tokens lie.
    """

    name: str
    q: Tensor
    k: Tensor
    linear: bool
    scale: float = 1.0
    bias: Tensor | None = None
    kernels: Tensor | None = None
    query_grid: Grid
    key_grid: Grid

    @property
    def num_heads(self) -> int:
        """Heads."""
        return len(self.q)

    def without_local(self) -> Layer:
        """The product of queries and keys alone."""
        return replace(self, kernels=None)

    def weights(self) -> Tensor:
        """What each token of the grid takes from each, in absolute value, ``(num_heads, N, M)``.

        The softmax, or the ReLU kernel over its row's sum; plus, where values also go through a depthwise convolution,
        the row of that convolution's matrix. Its kernels differ from channel to channel, so the absolute value of the
        sum is averaged over the channels of a head.
        """
        rows, columns = math.prod(self.query_grid), math.prod(self.key_grid)
        weights = self._product()[:, -rows:, -columns:]
        return weights if self.kernels is None else _add_local(weights, self.kernels, self.query_grid)

    def _product(self) -> Tensor:
        if self.linear:
            scores = self.q.relu() @ self.k.relu().transpose(1, 2)
            return scores / (scores.sum(-1, keepdim=True) + EPS)
        scores = self.scale * self.q @ self.k.transpose(1, 2)
        return (scores if self.bias is None else scores + self.bias).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """An attention that no matrix over the image can show.

    Attributes:
        name: Of the module.
        reason: Why.
    """

    name: str
    reason: str


def record(model: nn.Module, image: Tensor) -> list[Layer | Hidden]:
    """Every attention that ``image`` passes in ``model``, in order.

    Attentions of ours are known; of any other model those are seen that call ``F.scaled_dot_product_attention``.

    Args:
        model: In eval mode, not compiled.
        image: One, as ``(1, in_chans, H, W)``.

    Raises:
        ValueError: If ``image`` is no single image, or no attention was met.
    """
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(f"attention is recorded of one image (1, in_chans, H, W), got {tuple(image.shape)}")
    recorder = _Recorder(padded_size(model, image))
    with torch.no_grad(), recorder.watching(model), recorder:
        model(image)
    if not recorder.found:
        raise ValueError(f"no attention to show in {type(model).__name__}: neither ours nor by torch's function for it")
    return recorder.found


def padded_size(model: nn.Module, image: Tensor) -> Grid:
    """Height and width of ``image`` as the model's grids cover it: our pyramids pad to their stride."""
    step = getattr(model, "pad_to", 1)
    return image.shape[-2] + -image.shape[-2] % step, image.shape[-1] + -image.shape[-1] % step


def pick(layers: Sequence[Layer | Hidden], wanted: str) -> Layer:
    """The layer at the place ``wanted`` among those that can be shown ("0", "-1"), or of that name or its beginning.

    Raises:
        ValueError: If there is no such layer, or it cannot be shown; names those that can.
    """
    shown = [layer for layer in layers if isinstance(layer, Layer)]
    these = f"these can be shown: {', '.join(layer.name for layer in shown) or 'none'}"
    if wanted.lstrip("-").isdigit():
        if not -len(shown) <= int(wanted) < len(shown):
            raise ValueError(f"there is no layer {wanted} among {len(shown)}; {these}")
        return shown[int(wanted)]
    for layer in layers:
        if f"{layer.name}.".startswith(f"{wanted}."):
            if isinstance(layer, Hidden):
                raise ValueError(f"layer {wanted!r} cannot be shown: {layer.reason}; {these}")
            return layer
    raise ValueError(f"there is no attention {wanted!r}; {these}")


class _Recorder(TorchFunctionMode):
    """Notes queries and keys of every attention that runs inside, and which module it runs in."""

    def __init__(self, size: Grid) -> None:
        super().__init__()
        self.size = size
        self.found: list[Layer | Hidden] = []
        self.running: list[tuple[str, nn.Module]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self.running:
            self._note_softmax(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follow ``model`` from module to module, and look into its linear attentions, until the block ends."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                entry: Any = (name, module)
                for handle in (
                    module.register_forward_pre_hook(lambda *_, entry=entry: self.running.append(entry)),
                    module.register_forward_hook(lambda *_: self.running.pop() and None),
                ):
                    stack.callback(handle.remove)
                if isinstance(module, LinearAttentionCore):
                    stack.enter_context(self._shadowing(module))
            yield

    @contextmanager
    def _shadowing(self, module: LinearAttentionCore) -> Iterator[None]:
        """An attribute of the instance stands before its method ``attend`` until the block ends."""
        attend = module.attend

        def noted(q: Tensor, k: Tensor, v: Tensor, key_grid: Grid, *rest: Any, **options: Any) -> Tensor:
            self._note(q, module.placed(k, key_grid), linear=True)
            return attend(q, k, v, key_grid, *rest, **options)

        module.attend = noted  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.attend

    def _note_softmax(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
    ) -> None:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill(~attn_mask, -torch.inf)
        bias = None if attn_mask is None else attn_mask.float().reshape(-1, *attn_mask.shape[-2:])
        scale = options.get("scale") or query.shape[-1] ** -0.5
        self._note(query, key, linear=False, scale=scale, bias=bias)

    def _note(self, q: Tensor, k: Tensor, *, linear: bool, **softmax: Any) -> None:
        name, module = self.running[-1]
        grids = [_grid(tokens.shape[2], self.size) for tokens in (q, k)]
        kernels = _kernels(module)
        reason = None
        if len(q) > 1 or q.shape[1] != getattr(module, "num_heads", q.shape[1]):
            reason = "it attends in windows"
        elif None in grids:
            reason = "its tokens form no grid over the image"
        elif kernels is not None and grids[0] != grids[1]:
            reason = "its values are resized for the depthwise convolution"
        if reason is not None:
            self.found.append(Hidden(name=name, reason=reason))
            return
        q, k = q[0].float(), k[0].float()
        where: Any = {"query_grid": grids[0], "key_grid": grids[1]}
        self.found.append(Layer(name=name, q=q, k=k, linear=linear, kernels=kernels, **where, **softmax))


def _grid(num_tokens: int, size: Grid) -> Grid | None:
    """Grid over an image of ``size`` of nearly all tokens: few of them (class, registers) may stand in front."""
    for prefix in range(min(num_tokens, MOST_PREFIX + 1)):
        side = math.sqrt((num_tokens - prefix) / (size[0] * size[1]))
        grid = (round(size[0] * side), round(size[1] * side))
        if grid[0] * grid[1] == num_tokens - prefix:
            return grid
    return None


def _kernels(module: nn.Module) -> Tensor | None:
    """Kernels ``(num_heads, D, K, K)`` of the depthwise convolutions of ``module``'s values."""
    if isinstance(module, StripeAttention):
        weight = module.get_v.weight
    elif isinstance(module, WindowLinearAttention):
        weight = module.kernels()[0]
    elif isinstance(module, LinearAttentionCore):
        weight = module.dwc.weight.repeat(module.num_heads, 1, 1, 1)
    else:
        return None
    return weight.detach().squeeze(1).unflatten(0, (module.num_heads, -1)).float()


def _add_local(weights: Tensor, kernels: Tensor, grid: Grid) -> Tensor:
    """``mean_d |weights + convolution_d|`` over the channels ``d`` of each head, for tokens on ``grid``."""
    (H, W), radius = grid, kernels.shape[-1] // 2
    place = torch.arange(H * W, device=weights.device).view(H, W)
    result = weights.clone()
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            # tokens whose neighbour at this offset lies on the grid
            rows, columns = slice(max(0, -dy), max(0, H - max(0, dy))), slice(max(0, -dx), max(0, W - max(0, dx)))
            i = place[rows, columns].flatten()
            j = i + dy * W + dx
            kernel = kernels[:, :, dy + radius, dx + radius, None]  # (num_heads, D, 1)
            result[:, i, j] = (weights[:, None, i, j] + kernel).abs().mean(1)
    return result
