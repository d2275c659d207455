"""What a conversion leaves, and how near a model is to its teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slabformer._loss_weights import LossWeights
from slabformer.distillation.losses import pooled
from slabformer.distillation.outputs import Kind, attention_mask, compared_outputs, mask_for
from slabformer.distillation.teacher import Teacher
from slabformer.surgery.batches import call_model, eval_mode, to_device

#: columns of metrics.csv; `blend_` is of the model with what is left of its norms
COLUMNS = (
    *("epoch", "step", "gamma", "lr", "train_loss", "images_per_second"),
    *("cosine", "agreement", "blend_cosine", "blend_agreement"),
)
#: of steps.csv, behind those of every run
PARTS = (*asdict(LossWeights()), "grad_norm")


@dataclass(frozen=True)
class ConvertResult:
    """What :func:`slabformer.converting.run.convert` leaves, beside the files.

    Attributes:
        output: Folder of the run.
        summary: What ``result.json`` holds: nearness to the teacher after each step, and what became of each norm.
        model: Fused, in eval mode; None on other ranks than the first, and where the run was finished before.
        already_finished: Nothing was trained: the run in ``output`` was complete.
    """

    output: Path
    summary: dict[str, Any]
    model: nn.Module | None
    already_finished: bool = False


@torch.no_grad()
def similarity(model: nn.Module, teacher: Teacher, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Mean cosine to the teacher's outputs, of tokens their mean; of logits also the share of equal first classes."""
    found: dict[str, list[Tensor]] = {}
    with eval_mode(model):
        for batch in batches:
            batch = to_device(batch, device)
            own = compared_outputs(call_model(model, batch), model)
            target = compared_outputs(teacher(batch), teacher.model)
            for place, (kind, ours) in own.items():
                theirs = target[place].tensor.to(ours.device)
                for name, values in _near(kind, ours, theirs, attention_mask(batch)).items():
                    found.setdefault(name, []).append(values.flatten().cpu())
    return {name: torch.cat(values).double().mean().item() for name, values in found.items()}


def _near(kind: Kind, own: Tensor, target: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    mask = mask_for(own, mask)
    vectors = (own, target) if own.ndim == 2 else (pooled(own, mask), pooled(target, mask))
    ours, theirs = (vector.float() for vector in vectors)
    near = {"cosine": F.cosine_similarity(ours, theirs, dim=-1)}
    if kind == "logits":
        equal = own.argmax(-1) == target.argmax(-1)
        near["agreement"] = (equal if mask is None else equal[mask > 0]).float()
    return near
