"""What generated models call where MindSpore's own operators differ from torch's or have no kernel on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from slabformer.mindspore.runtime import require

ops = require().ops
Tensor = Any


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, weight ``(out, in)``, over the last axis of ``x``."""
    tokens = ops.reshape(x, (-1, x.shape[-1]))
    y = ops.matmul(tokens, ops.transpose(weight, (1, 0)))
    if bias is not None:
        y = y + bias
    return ops.reshape(y, x.shape[:-1] + (weight.shape[0],))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Convolution of maps ``(B, C, H, W)`` with zeros around them.

    Patches that do not overlap are multiplied as a matrix: MindSpore's strided convolution is slow on a CPU.
    """
    kernel = weight.shape[2:]
    whole = x.shape[2] % kernel[0] == 0 and x.shape[3] % kernel[1] == 0
    if groups == 1 and kernel == stride and padding == (0, 0) and dilation == (1, 1) and whole:
        grid = (x.shape[2] // kernel[0], x.shape[3] // kernel[1])
        patches = ops.reshape(x, (-1, x.shape[1], grid[0], kernel[0], grid[1], kernel[1]))
        size = x.shape[1] * kernel[0] * kernel[1]
        patches = ops.reshape(ops.transpose(patches, (0, 2, 4, 1, 3, 5)), (-1, grid[0] * grid[1], size))
        y = linear(patches, ops.reshape(weight, (-1, size)), bias)
        return ops.reshape(ops.transpose(y, (0, 2, 1)), (-1, weight.shape[0], grid[0], grid[1]))
    y = ops.conv2d(x, weight, None, stride, "pad", padding, dilation, groups)
    return y if bias is None else y + ops.reshape(bias, (1, -1, 1, 1))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention, tokens on the last axis but one; ``mask`` is added to the logits."""
    axes = tuple(range(q.ndim - 2)) + (q.ndim - 1, q.ndim - 2)
    logits = ops.matmul(q * scale, ops.transpose(k, axes))
    if mask is not None:
        logits = logits + mask
    return ops.matmul(ops.softmax(logits, -1), v)


def gelu(x: Tensor) -> Tensor:
    """Torch's default, with the error function: MindSpore's ``nn.GELU`` takes tanh."""
    return x * 0.5 * (1.0 + ops.erf(x * (0.5**0.5)))


def gelu_tanh(x: Tensor) -> Tensor:
    """Its approximation by tanh."""
    return x * ops.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


def tanh(x: Tensor) -> Tensor:
    """``tanh``: MindSpore's is off by 1e-4 on a CPU."""
    return 2.0 * ops.sigmoid(2.0 * x) - 1.0


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    return x * ops.sigmoid(x)


def hardsigmoid(x: Tensor) -> Tensor:
    """``relu6(x + 3) / 6``."""
    return ops.relu6(x + 3.0) / 6.0


def hardswish(x: Tensor) -> Tensor:
    """``x * hardsigmoid(x)``."""
    return x * hardsigmoid(x)


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """``x``, and ``slope * x`` below 0."""
    return ops.relu(x) - slope * ops.relu(-x)


def roll(x: Tensor, shifts: Sequence[int], axes: Sequence[int]) -> Tensor:
    """``torch.roll``: MindSpore's has no kernel on a CPU."""
    for index in range(len(axes)):
        axis = axes[index]
        size = x.shape[axis]
        head = size - shifts[index] % size
        if head != size:
            first, second = ops.split(x, (head, size - head), axis)
            x = ops.cat((second, first), axis)
    return x


def pad(x: Tensor, pads: Sequence[int], value: float) -> Tensor:
    """``torch.nn.functional.pad`` with a constant: two counts an axis, the last axis first."""
    for index in range(len(pads) // 2):
        axis = x.ndim - 1 - index
        for count, after in ((pads[2 * index], False), (pads[2 * index + 1], True)):
            if count:
                border = ops.full(x.shape[:axis] + (count,) + x.shape[axis + 1 :], value, dtype=x.dtype)
                x = ops.cat((x, border), axis) if after else ops.cat((border, x), axis)
    return x


def var(x: Tensor, axes: Sequence[int], correction: float, keepdim: bool) -> Tensor:
    """Variance over axes, divided by the count less ``correction``."""
    centred = x - ops.mean(x, axes, True)
    return ops.sum(centred * centred, axes, keepdim) / (count_along(x, axes) - correction)


def count_along(x: Tensor, axes: Sequence[int]) -> int:
    """Entries over some axes."""
    count = 1
    for axis in axes:
        count = count * x.shape[axis]
    return count


def vector_norm(x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """Euclidean norm over axes."""
    return ops.sqrt(ops.sum(x * x, axes, keepdim))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis."""
    centred = x - ops.mean(x, (-1,), True)
    y = centred * ops.rsqrt(ops.mean(centred * centred, (-1,), True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last axis."""
    y = x * ops.rsqrt(ops.mean(x * x, (-1,), True) + eps)
    return y if weight is None else y * weight


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """BatchNorm over axis 1 by running statistics."""
    scale = ops.rsqrt(var + eps) if weight is None else weight * ops.rsqrt(var + eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return x * ops.reshape(scale, shape) + ops.reshape(shift, shape)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """GroupNorm: groups of channels on axis 1, each with all that follows."""
    grouped = ops.reshape(x, (x.shape[0], groups, -1))
    y = ops.reshape(layer_norm(grouped, None, None, eps), x.shape)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * ops.reshape(weight, shape)
    return y if bias is None else y + ops.reshape(bias, shape)


def mean_pool(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Means over windows that tile maps ``(B, C, H, W)``."""
    grid = (x.shape[2] // window[0], x.shape[3] // window[1])
    windows = ops.reshape(x, (-1, x.shape[1], grid[0], window[0], grid[1], window[1]))
    return ops.mean(windows, (3, 5), False)


def max_pool(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Maxima over windows of maps ``(B, C, H, W)``."""
    x = pad(x, (padding[1], padding[1], padding[0], padding[0]), -3.0e38)
    return ops.max_pool2d(x, kernel, stride)


def resize_nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``(B, C, H, W)`` repeated to a multiple of their size."""
    rows, columns = size[0] // x.shape[2], size[1] // x.shape[3]
    return ops.repeat_interleave(ops.repeat_interleave(x, rows, 2), columns, 3)
