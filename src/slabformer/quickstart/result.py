"""What the main job finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from slabformer._moved import HasOldNames
from slabformer.bench.report import BenchReport
from slabformer.quickstart.config import QuickstartConfig
from slabformer.surgery.fuse import FuseReport
from slabformer.surgery.verify import VerifyResult
from slabformer.tasks.classification.train import TrainResult


@dataclass(frozen=True, kw_only=True)
class QuickstartResult(HasOldNames):
    """Everything that the report shows."""

    config: QuickstartConfig
    """What was asked for."""
    slab: TrainResult
    """SLA and PRepBN, recalibrated."""
    baseline: TrainResult
    """Softmax attention and LayerNorm, the same budget."""
    fused: nn.Module
    """The SLAB model without norms."""
    fuse_report: FuseReport
    """Where each norm went."""
    equality: VerifyResult
    """Fused against unfused on all 360 test images."""
    bench: BenchReport
    """Speeds."""
    images: Tensor
    """The test images ``(360, 3, H, W)``, normalised."""
    labels: Tensor
    """Their digits ``(360,)``."""
    fused_predictions: Tensor
    """The fused model's digits ``(360,)``."""
    baseline_predictions: Tensor
    """The baseline's digits ``(360,)``."""
    seconds: float
    """Of the whole job."""

    def summary(self) -> dict[str, Any]:
        """The figures of ``summary.json``; accuracies are shares of 1, speed-ups over the baseline in the same mode."""
        return {
            "slab_accuracy": _accuracy(self.fused_predictions, self.labels),
            "baseline_accuracy": _accuracy(self.baseline_predictions, self.labels),
            "fused_difference": self.equality.max_rel,
            "norms_total": self.fuse_report.num_folded + self.fuse_report.num_kept,
            "norms_folded": self.fuse_report.num_folded,
            "seconds": round(self.seconds, 1),
            "speeds": [asdict(row) for row in self.bench],
            "machine": self.bench.machine.to_dict(),
        }


def _accuracy(predictions: Tensor, labels: Tensor) -> float:
    return (predictions == labels).double().mean().item()
