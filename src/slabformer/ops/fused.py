"""Linear attention and its depthwise convolution as one operator, on whichever device the tokens are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slabformer.ops.native.linear_attention import NO_BIASES, Biases, native_linear_attention


def fused_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    grid_size: tuple[int, int] = (0, 0),
    eps: float = 1e-6,
    biases: Biases = NO_BIASES,
) -> Tensor:
    """:func:`slabformer.ops.linear_attention` with a depthwise convolution of the values added to its output.

    For what :func:`slabformer.ops.dispatch.has_kernel` takes. Tensors of any strides are read as they stand, slices of
    a packed projection too, as long as channels lie side by side.

    Args:
        q: Queries before the ReLU, ``(B, num_heads, N, D)``.
        k: Keys before the ReLU and without the table, ``(B, num_heads, M, D)``.
        v: Values, ``(B, num_heads, M, E)``.
        table: Added to the keys, ``(1, num_heads, M, D)``.
        mask: Valid keys, boolean ``(B, M)``; the convolution takes the others' values as 0.
        weight: Kernels ``(1 or num_heads, E, K, K)``, ``K`` odd; None for no convolution. Needs ``M == N``.
        bias: ``(1 or num_heads, E)``.
        grid_size: ``(H, W)`` that the values lie on, where there is a convolution.
        eps: Added to the normaliser.
        biases: Of queries, keys and values, ``(num_heads, D)`` or ``E``, where their projection left them out; on a
            CPU alone.

    Returns:
        ``(B, num_heads, N, E)`` in the dtype of ``q``; in memory tokens come before heads.

    Raises:
        ValueError: If there is a ``bias`` without a ``weight``, ``biases`` on a GPU, or on a CPU a tensor that needs a
            gradient: the kernel there has none.
    """
    if bias is not None and weight is None:
        raise ValueError("bias is added to the convolution, got one without a weight")
    options: dict[str, Any] = {
        "table": table,
        "mask": mask,
        "weight": weight,
        "bias": bias,
        "grid_size": grid_size,
        "eps": eps,
    }
    if q.device.type == "cpu":
        return native_linear_attention(q, k, v, **options, biases=biases)
    from slabformer.ops.kernels.linear_attention import triton_linear_attention

    if any(each is not None for each in biases):
        raise ValueError(f"biases are added on a CPU alone, got some for {q.device}; let the projection add them")
    return triton_linear_attention(q, k, v, **options)
