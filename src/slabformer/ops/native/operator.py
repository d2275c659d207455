"""The C++ attention as an operator that programs bring with them: a library that torch loads without slabformer."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from slabformer.ops.native.build import built, sources
from slabformer.ops.native.linear_attention import TOKENS, empty_outputs

NAME = "linear_attention"
#: torch's headers ask for it
STANDARD = "-std=c++20"


@functools.cache
def attention_library(dtype: torch.dtype, head_dim: int, value_dim: int) -> tuple[Any, Path]:
    """The operator for heads of these widths, known to this process and its exporters, and the library that brings it.

    Another process knows it after ``torch.ops.load_library``. Its arguments are those of
    ``torch.ops.slabformer.linear_attention_native``; its namespace stands for its sources, dtype and widths, so that
    libraries of several versions get along.

    Args:
        dtype: float32 or bfloat16.
        head_dim: ``D``, a multiple of 16.
        value_dim: ``E``, a multiple of 16.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """
    widths: dict[str, str | int] = {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "TOKEN": TOKENS[dtype]}
    named = "\n".join([*sources(), *map(str, widths.values())])
    namespace = f"slabformer_{hashlib.sha256(named.encode()).hexdigest()[:12]}"
    root = Path(torch.__file__).parent
    flags = [STANDARD, f"-DTORCH={torch.__version__}", f"-I{root / 'include'}"]
    flags += [f"-I{root / 'include/torch/csrc/api/include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    library = built("operator.cpp", flags, **widths, NAMESPACE=namespace)
    torch.ops.load_library(library)
    torch.library.register_fake(f"{namespace}::{NAME}", empty_outputs)
    return getattr(getattr(torch.ops, namespace), NAME).default, library
