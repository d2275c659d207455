"""Floating point operations of eager code: torch's counter, with the operators that it does not know.

A CPU runs attention, ``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer`` and LSTMs as operators of their own.
torch's counter sees into some of them only after other code has registered decompositions, and into others never.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

Shape = Sequence[int]
aten = torch.ops.aten


def flop_counter() -> FlopCounterMode:
    """A context that counts two operations to a multiply-add; ``get_total_flops()`` has the sum."""
    return FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))


def is_counted(operator: Any) -> bool:
    """Whether :func:`flop_counter` has a formula for ``operator``, an overload packet."""
    return operator in flop_registry or operator in FORMULAS


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Scores and weighted sums; heads that share keys and values count as often as they are read."""
    B, num_heads, N, D = query
    M, E = value[-2:]
    return 2 * B * num_heads * N * M * (D + E)


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Scores again, and the gradients of scores, values, queries and keys."""
    B, num_heads, N, D = query
    M, E = value[-2:]
    return 2 * B * num_heads * N * M * (3 * D + 2 * E)


def _multi_head_attention(
    query: Shape, key: Shape, value: Shape, embed_dim: int, num_heads: int, *_: object, **__: object
) -> int:
    """Projections in and out around self-attention."""
    B, N, C = query
    return 2 * B * N * 4 * C * C + _attention(*[(B, num_heads, N, C // num_heads)] * 3)


def _encoder_layer(source: Shape, embed_dim: int, num_heads: int, *arguments: Any, **__: object) -> int:
    """Self-attention and the two Linears of the MLP; ``arguments`` go on with the schema's ``qkv_weight``."""
    B, N, C = source
    hidden = arguments[11][0]  # ffn_weight_1
    return _multi_head_attention(source, source, source, C, num_heads) + 2 * B * N * 2 * C * hidden


def _matrix_vector(matrix: Shape, vector: Shape, **_: object) -> int:
    return 2 * matrix[0] * matrix[1]


def _add_matrix_vector(_: Shape, matrix: Shape, vector: Shape, **__: object) -> int:
    return _matrix_vector(matrix, vector)


def _dot(one: Shape, other: Shape, **_: object) -> int:
    return 2 * one[0]


def _lstm(source: Shape, weight_ih: Shape, weight_hh: Shape, *_: object, **__: object) -> int:
    steps, width = source[0] * source[1], weight_ih[0]
    return 2 * steps * width * (weight_ih[1] + weight_hh[1])


def _integer_product(one: Shape, other: Shape, **_: object) -> int:
    return 2 * one[0] * one[1] * other[1]


#: operator -> formula of its arguments' shapes
FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._native_multi_head_attention: _multi_head_attention,
    aten._transformer_encoder_layer_fwd: _encoder_layer,
    aten.mv: _matrix_vector,
    aten.addmv: _add_matrix_vector,
    aten.dot: _dot,
    aten.vdot: _dot,
    aten.mkldnn_rnn_layer: _lstm,
    aten._int_mm: _integer_product,
}
