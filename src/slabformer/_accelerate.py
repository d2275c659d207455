"""Every private name of accelerate that this package uses: the settings that it keeps for the whole process."""

from __future__ import annotations

from typing import Any

from slabformer._private import private

CHECKED_WITH = ("1.10", "1.15")


def forget_settings() -> None:
    """Let the next ``Accelerator`` take settings of its own; accelerate keeps the first for the life of the process."""
    private("accelerate.state.AcceleratorState", CHECKED_WITH)._reset_state(reset_partial_state=True)


def shared_settings() -> list[dict[str, Any]]:
    """The settings of every ``Accelerator`` of this process; a write is seen by all of them."""
    holders = ("PartialState", "AcceleratorState", "GradientState")
    return [private(f"accelerate.state.{holder}._shared_state", CHECKED_WITH) for holder in holders]
