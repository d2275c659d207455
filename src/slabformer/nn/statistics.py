"""Running statistics that no data has, and channels that never varied."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

logger = logging.getLogger(__name__)

#: of norms with constant channels in one warning
MOST_NAMES = 5


def check_statistics(found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse statistics that make a norm compute nonsense, and warn of channels without variance, all in one line.

    Args:
        found: Running mean and variance, ``(C,)`` each, by the name of their norm.

    Raises:
        ValueError: If a mean or variance is not finite, or a variance is negative; names the first norm.
    """
    constant = []
    for name, (mean, var) in found.items():
        for what, is_wrong in (
            ("not finite: the mean", ~mean.isfinite()),
            ("not finite: the variance", ~var.isfinite()),
            ("negative: the variance", var < 0),
        ):
            if wrong := int(is_wrong.sum()):
                raise ValueError(
                    f"statistics of {name} are {what} of {wrong} of {len(var)} channels (first: channel "
                    f"{int(is_wrong.int().argmax())}); check the data and recalibrate"
                )
        if still := int((var == 0).sum()):
            constant.append(f"{still} of {len(var)} channels of {name}")
    if constant:
        more = len(constant) - MOST_NAMES
        logger.warning(
            "running variance is 0 in %s%s: their input never varied, and weight / sqrt(eps) multiplies whatever "
            "differs from it; recalibrate on more data if it should vary",
            ", ".join(constant[:MOST_NAMES]),
            f" and of {more} more norms" if more > 0 else "",
        )
