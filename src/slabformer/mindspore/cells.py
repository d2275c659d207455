"""Cells of MindSpore that compute what modules of this library do, under the same names of parameters.

They stand by themselves: in models that :func:`slabformer.mindspore.from_torch` writes, and in anybody else's. Nothing
here needs torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from slabformer.mindspore import functions
from slabformer.mindspore.runtime import require

mindspore = require()
ops = mindspore.ops
if TYPE_CHECKING:
    from mindspore import nn
else:
    nn = mindspore.nn
Tensor = Any


def parameter(shape: tuple[int, ...], dtype: Any = None, name: str = "weight", init: Any = "zeros") -> Any:
    """A weight of ``shape``, zeros unless ``init`` says otherwise."""
    dtype = mindspore.float32 if dtype is None else dtype
    return mindspore.Parameter(mindspore.common.initializer.initializer(init, shape, dtype), name=name)


def buffer(shape: tuple[int, ...], dtype: Any = None, name: str = "buffer", init: Any = "zeros") -> Any:
    """What is saved and not trained, such as running statistics."""
    stored = parameter(shape, dtype, name, init)
    stored.requires_grad = False
    return stored


def constant(shape: tuple[int, ...], dtype: Any = None, name: str = "constant") -> Any:
    """A buffer that is in a ``.ckpt`` and in no state dict of torch, such as the index of a position table."""
    stored = buffer(shape, dtype, name)
    stored.is_constant = True
    return stored


class Model(nn.Cell):
    """Base of the models that are written from torch's.

    Attributes:
        inference_only: Why the model cannot be trained; empty where it can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inference_only = ""

    def set_train(self, mode: bool = True) -> Any:
        """As on every cell.

        Raises:
            ValueError: For training, where operators stand in the model as they are in eval mode.
        """
        if mode and self.inference_only:
            raise ValueError(f"this model is for inference: it has {self.inference_only}")
        return super().set_train(mode)

    def name_parameters(self, *names: str) -> None:
        """Call parameters what torch calls them; pairs of the name by attributes, and torch's."""
        wanted = dict(zip(names[::2], names[1::2], strict=True))
        for name, stored in self.parameters_and_names():
            if name in wanted:
                stored.name = wanted[name]


class Linear(nn.Cell):
    """``x @ weight.T + bias``.

    Args:
        in_features: Channels of the input, its last axis.
        out_features: Channels of the output.
        bias: Whether there is one.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        uniform = mindspore.common.initializer.HeUniform(math.sqrt(5))
        self.weight = parameter((out_features, in_features), name="weight", init=uniform)
        self.bias = parameter((out_features,), name="bias") if bias else None

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        return functions.linear(x, self.weight, self.bias)


class Conv2d(nn.Cell):
    """Convolution of maps ``(B, C, H, W)`` with zeros around them, as torch's ``nn.Conv2d``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width.
        stride: Down and right.
        padding: Zeros above and below, and left and right.
        dilation: Down and right.
        groups: Of channels that are convolved apart.
        bias: Whether there is one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        uniform = mindspore.common.initializer.HeUniform(math.sqrt(5))
        self.weight = parameter((out_channels, in_channels // groups, *kernel_size), name="weight", init=uniform)
        self.bias = parameter((out_channels,), name="bias") if bias else None

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        return functions.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LayerNorm(nn.Cell):
    """LayerNorm over the last axis, ``eps`` 1e-5 by default as torch has it.

    Args:
        dim: Channels ``C``.
        eps: Added to the variance.
        bias: Whether there is one.

    Shape:
        ``(*, C)`` to the same.
    """

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((dim,), name="weight", init="ones")
        self.bias = parameter((dim,), name="bias") if bias else None

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        return functions.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Cell):
    """RMSNorm over the last axis.

    Args:
        dim: Channels ``C``.
        eps: Added to the mean square.

    Shape:
        ``(*, C)`` to the same.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((dim,), name="weight", init="ones")

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        return functions.rms_norm(x, self.weight, self.eps)


class Affine(nn.Cell):
    """``x * weight + bias`` per channel: a norm in eval mode that no neighbour took over.

    Args:
        dim: Channels ``C``.
        channel_dim: Axis of the channels, -1 or 1.

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same.
    """

    def __init__(self, dim: int, channel_dim: int = -1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.weight = parameter((dim,), name="weight", init="ones")
        self.bias = parameter((dim,), name="bias")

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.channel_dim == -1:
            return x * self.weight + self.bias
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return x * ops.reshape(self.weight, shape) + ops.reshape(self.bias, shape)


class TokenBatchNorm(nn.Cell):
    """BatchNorm over every axis but the channels', with torch's momentum: the weight of a batch.

    Args:
        dim: Channels ``C``.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
        channel_dim: Axis of the channels: -1 for tokens, 1 for maps.

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same.
    """

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1, channel_dim: int = -1) -> None:
        super().__init__()
        self.eps, self.momentum, self.channel_dim = eps, momentum, channel_dim
        #: average the first batches alike, until ``momentum`` weighs more; set it before training is compiled
        self.warm_statistics = False
        self.weight = parameter((dim,), name="weight", init="ones")
        self.bias = parameter((dim,), name="bias")
        self.running_mean = buffer((dim,), name="running_mean")
        self.running_var = buffer((dim,), name="running_var", init="ones")
        self.num_batches_tracked = buffer((), mindspore.int64, "num_batches_tracked")

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.normalise(x, 1.0, 0.0)

    def normalise(self, x: Tensor, observed: Any, eta: Any) -> Tensor:
        """``BN(x) + eta * x``; in train mode the batch counts ``observed``, 0 or 1, for the running statistics."""
        channel = x.ndim - 1 if self.channel_dim == -1 else 1
        shape = (1,) * channel + (-1,) + (1,) * (x.ndim - 1 - channel)
        if self.training:
            axes = tuple([axis for axis in range(x.ndim) if axis != channel])
            mean = ops.mean(x, axes, True)
            centred = x - mean
            var = ops.mean(centred * centred, axes, True)
            self._observe(ops.stop_gradient(mean), ops.stop_gradient(var), functions.count_along(x, axes), observed)
            scale = ops.reshape(self.weight, shape) * ops.rsqrt(var + self.eps)
            return centred * scale + ops.reshape(self.bias, shape) + eta * x
        scale = self.weight * ops.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * ops.reshape(scale + eta, shape) + ops.reshape(shift, shape)

    def _observe(self, mean: Tensor, var: Tensor, count: int, observed: Any) -> None:
        share = self.momentum * observed
        if self.warm_statistics:
            seen = ops.cast(self.num_batches_tracked, mindspore.float32) + 1.0
            share = ops.maximum(1.0 / seen, self.momentum * ops.ones((), mindspore.float32)) * observed
        mean, var = ops.reshape(mean, (-1,)), ops.reshape(var, (-1,)) * (count / max(count - 1, 1))
        ops.assign(self.running_mean, self.running_mean + share * (mean - self.running_mean))
        ops.assign(self.running_var, self.running_var + share * (var - self.running_var))
        counted = ops.cast(observed * ops.ones((), mindspore.float32), mindspore.int64)
        ops.assign(self.num_batches_tracked, self.num_batches_tracked + counted)


class BatchNorm(TokenBatchNorm):
    """BatchNorm over axis 1, as torch's ``nn.BatchNorm1d`` and ``nn.BatchNorm2d``.

    Args:
        dim: Channels ``C``.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.

    Shape:
        ``(B, C, *)`` to the same.
    """

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(dim, eps, momentum, channel_dim=1)


class RepBN(TokenBatchNorm):
    """BatchNorm with a learnable skip, ``BN(x) + eta * x`` (Guo et al. 2024, RepBN).

    In eval mode it is one scale and shift per channel.

    Args:
        dim: Channels ``C``.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics, as in torch.
        eta: Initial skip weight; 1 in the paper's vision models.
        channel_dim: Axis of the channels: -1 for tokens, 1 for maps.

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, momentum: float = 0.1, eta: float = 0.0, channel_dim: int = -1
    ) -> None:
        super().__init__(dim, eps, momentum, channel_dim)
        self.eta = mindspore.Parameter(mindspore.Tensor([eta], dtype=mindspore.float32), name="eta")

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.normalise(x, 1.0, self.eta)

    def observing(self, x: Tensor, observed: Tensor) -> Tensor:
        """The same; in train mode the batch counts ``observed``, 0 or 1, for the running statistics."""
        return self.normalise(x, observed, self.eta)


class PRepBN(nn.Cell):
    """``gamma * LN(x) + (1 - gamma) * RepBN(x)`` (Guo et al. 2024, PRepBN): a LayerNorm on its way out.

    ``gamma`` is a parameter that is not trained; :func:`set_gamma` writes it, in graph mode without compiling anew.
    While it is 1, running statistics rest, unless ``rep.warm_statistics`` is set. Eval mode is RepBN whatever ``gamma``
    is, as published.

    Args:
        dim: Channels ``C``.
        eps: LayerNorm's, when ``norm`` is None.
        bn_eps: BatchNorm's.
        momentum: BatchNorm's, as in torch.
        eta: Initial skip weight of RepBN.
        norm: The norm that fades; LayerNorm by default.
        channel_dim: Axis of the channels: -1 for tokens, 1 for maps.

    Shape:
        ``(B, *, C)``, or ``(B, C, *)`` with ``channel_dim=1``, to the same.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        bn_eps: float = 1e-5,
        momentum: float = 0.1,
        eta: float = 0.0,
        norm: Any = None,
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        self.gamma = buffer((), name="gamma", init="ones")
        self.norm = LayerNorm(dim, eps) if norm is None else norm
        self.rep = RepBN(dim, bn_eps, momentum, eta, channel_dim)

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        if not self.training:
            return self.rep(x)
        observed = 1.0 if self.rep.warm_statistics else ops.cast(self.gamma < 1.0, mindspore.float32)
        return self.gamma * self.norm(x) + (1.0 - self.gamma) * self.rep.observing(x, observed)

    def set_gamma(self, gamma: float) -> None:
        """Write ``gamma``, in graph mode without compiling anew."""
        self.gamma.set_data(mindspore.Tensor(gamma, dtype=mindspore.float32))


def set_gamma(model: Any, gamma: float) -> int:
    """Write ``gamma`` of every PRepBN in ``model``; returns how many there are.

    Raises:
        ValueError: If ``gamma`` is outside of [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    norms = prepbn_cells(model)
    for norm in norms:
        norm.set_gamma(gamma)
    return len(norms)


def prepbn_cells(model: Any) -> list[PRepBN]:
    """Every PRepBN in ``model``."""
    return [cell for _, cell in model.cells_and_names() if isinstance(cell, PRepBN)]


class Dropout(nn.Cell):
    """Zeros in train mode with probability ``p``, the rest divided by what is left."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(p=p)

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.drop(x)


class DropPath(nn.Cell):
    """Stochastic depth: in train mode the whole branch of an example is 0 with probability ``p``.

    Args:
        p: Of a branch.
        scale_by_keep: Divide the other ones by ``1 - p``.
    """

    def __init__(self, p: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop = nn.Dropout(p=p)
        self.scale = 1.0 if scale_by_keep else 1.0 - p

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        if not self.training:
            return x
        kept = self.drop(ops.ones((x.shape[0],) + (1,) * (x.ndim - 1), x.dtype))
        return x * kept * self.scale


class SimplifiedLinearAttention(nn.Cell):
    """``proj(relu(q) (relu(k)^T v) / normaliser + DWC(v))`` with a learned position table on k (Guo et al. 2024).

    Args:
        dim: Channels ``C``.
        num_heads: Heads of ``D = C / num_heads`` channels.
        grid_size: Grid ``(H, W)`` of the tokens.
        qkv_bias: Whether queries, keys and values have a bias.
        proj_bias: Whether the output projection has one.
        kernel_size: Of the depthwise convolution, odd.
        proj_drop: Dropout after the output projection.

    Shape:
        ``(B, H * W, C)`` to the same.

    Raises:
        ValueError: If ``dim`` is no multiple of ``num_heads``, or ``kernel_size`` is even.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid_size: tuple[int, int] = (14, 14),
        qkv_bias: bool = True,
        proj_bias: bool = True,
        kernel_size: int = 5,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        D = dim // num_heads
        self.dim, self.num_heads, self.grid_size = dim, num_heads, tuple(grid_size)
        self.positional_encoding = parameter((1, grid_size[0] * grid_size[1], dim), name="positional_encoding")
        self.qkv = Linear(dim, 3 * dim, qkv_bias)
        self.proj = Linear(dim, dim, proj_bias)
        self.proj_drop = nn.Dropout(p=proj_drop)
        half = kernel_size // 2
        self.dwc = Conv2d(D, D, (kernel_size, kernel_size), padding=(half, half), groups=D)

    def construct(self, x: Tensor) -> Tensor:
        """See the class."""
        q, k, v = ops.split(self.qkv(x), self.dim, 2)
        q, k, v = self._heads(q), self._heads(k + self.positional_encoding), self._heads(v)
        out = linear_attention(q, k, v) + self._local(v)
        out = ops.reshape(ops.transpose(out, (0, 2, 1, 3)), (-1, x.shape[1], self.dim))
        return self.proj_drop(self.proj(out))

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, num_heads, N, D)``."""
        return ops.transpose(ops.reshape(x, (x.shape[0], x.shape[1], self.num_heads, -1)), (0, 2, 1, 3))

    def _local(self, v: Tensor) -> Tensor:
        """The depthwise branch, whose kernels all heads share."""
        H, W = self.grid_size
        maps = ops.transpose(ops.reshape(v, (-1, H, W, v.shape[3])), (0, 3, 1, 2))
        return ops.reshape(ops.transpose(self.dwc(maps), (0, 2, 3, 1)), v.shape)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """``o_i = q_i sum_j(k_j^T v_j) / (q_i . sum_j k_j + eps)`` with ``relu(q)``, ``relu(k)``, in the cheaper order.

    Args:
        q: Queries ``(B, num_heads, N, D)``.
        k: Keys ``(B, num_heads, M, D)``, position table included.
        v: Values ``(B, num_heads, M, E)``.
        eps: Added to the normaliser.

    Returns:
        ``(B, num_heads, N, E)``.
    """
    q, k = ops.relu(q), ops.relu(k)
    N, D, M, E = q.shape[2], q.shape[3], v.shape[2], v.shape[3]
    if (N + M) * D * E > N * M * (D + E):
        weights = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2)))
        return ops.matmul(weights / (ops.sum(weights, (3,), True) + eps), v)
    scale = M**-0.5  # sums over tokens stay in range
    k = k * scale
    normaliser = ops.sum(q * ops.sum(k, (2,), True), (3,), True) + eps * scale
    return ops.matmul(q, ops.matmul(ops.transpose(k, (0, 1, 3, 2)), v)) / normaliser
