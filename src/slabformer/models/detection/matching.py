"""Which anchors and proposals stand for which objects."""

from __future__ import annotations

import torch
from torch import Tensor

from slabformer._torchvision import Matcher


class MaxIoUMatcher(Matcher):
    """Match to the object of the largest overlap; and every object to whatever overlaps it most, if it does enough.

    In the second step all candidates that tie for an object are taken, from other objects too, later objects winning.
    torchvision lets a candidate keep the object that it overlaps most, and knows no minimum.

    Args:
        high: Overlap from which a candidate is positive.
        low: Overlap below which it is negative; between the two it is left out.
        min_best: Overlap from which an object takes its best candidates, whatever ``high``.

    Shape:
        Overlaps ``(num_objects, num_candidates)`` to ``(num_candidates,)``: the object's index, or -1 for negative,
        or -2 for left out.

    Raises:
        ValueError: If there are no objects, or no candidates.
    """

    def __init__(self, high: float, low: float, min_best: float) -> None:
        super().__init__(high, low, allow_low_quality_matches=True)
        self.min_best = min_best

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Write each object's best candidates into ``matches``, in place."""
        best = match_quality_matrix.amax(1, keepdim=True)
        taken = (match_quality_matrix == best) & (best >= self.min_best)
        last = len(taken) - 1 - taken.flip(0).byte().argmax(0)  # of the objects that take a candidate
        matches.copy_(torch.where(taken.any(0), last, matches))
