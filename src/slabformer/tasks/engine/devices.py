"""Device, precision and ranks of a run."""

from __future__ import annotations

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def create_accelerator(precision: str = "fp32", device: str = "auto") -> Accelerator:
    """accelerate's ``Accelerator`` as the loop needs it.

    Args:
        precision: "fp32", "bf16" or "fp16".
        device: "auto" takes the accelerator where there is one; "cpu" does not.

    Raises:
        ValueError: If the device cannot compute in ``precision``.
    """
    # accelerate keeps its first settings for the life of the process; a second run may want others
    AcceleratorState._reset_state(reset_partial_state=True)
    # norms share their statistics themselves, gamma is the same on all ranks: there is nothing to broadcast
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision=PRECISIONS[precision], cpu=device == "cpu", kwargs_handlers=[ddp])
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision 'fp16' needs an accelerator; use 'bf16' or 'fp32' on a CPU")
    return accelerator
