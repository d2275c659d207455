"""Quantisation-aware training: a folded model whose Linears round as integers do while it trains, through torchao.

model = round_linears_(fold(model, example))     # rounds in every forward pass, gradients pass as if it did not
...
shipped = without_rounding(model)                # the same weights in plain Linears, for the runtime to round
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from slabformer._extras import require
from slabformer.nn.controls import prepbn_modules
from slabformer.surgery.fuse import fuse

EXTRA = "torchao"


def fold(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` whose norms are folded, as deployed; in training mode, its parameters trainable.

    Raises:
        ValueError: If norms have not faded.
    """
    fading = sum(norm.phase != "done" for norm in prepbn_modules(model).values())
    if fading:
        raise ValueError(
            f"qat folds norms before it trains, and {fading} of this model have not faded; "
            "give model.weights of a run that has ended"
        )
    folded, _ = fuse(model.eval(), example)
    return folded.requires_grad_(True).train()


def round_linears_(model: nn.Module) -> nn.Module:
    """Let every Linear round its weights (8 bits, per channel) and its inputs (8 bits, per token) as it computes.

    torchao's fake quantisation rounds activations per token or per group only, so that runtimes with one range for all
    tokens find theirs by calibration afterwards. Products inside attention and convolutions are not rounded.

    Raises:
        ImportError: If torchao is missing; names the extra.
        ValueError: If ``model`` has no Linear.
    """
    if not any(type(module) is nn.Linear for module in model.modules()):
        raise ValueError("qat rounds Linears, and this model has none")
    qat = _qat()
    inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    _quantize_(model, qat.QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    return model


def without_rounding(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with plain Linears of the same weights."""
    plain = copy.deepcopy(model)
    _quantize_(plain, _qat().QATConfig(step="convert"))
    return plain


def check_torchao() -> None:
    """Refuse to begin without torchao.

    Raises:
        ImportError: If it is missing; names the extra.
    """
    _qat()


def _qat() -> Any:
    return require("torchao.quantization.qat", extra=EXTRA)


def _quantize_(model: nn.Module, config: object) -> None:
    require("torchao.quantization", extra=EXTRA).quantize_(model, config)
