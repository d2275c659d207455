"""The fade: what moves gamma from 1 to 0, when it waits, and when it gives up.

`schedule` writes gamma after every optimizer step; begin there. `guard` watches activations and gradients, so that
gamma waits while they explode. `optimizers` notices an optimizer that was built before the norms were converted.
"""

from slabformer.progressive.guard import DivergedError, Guard
from slabformer.progressive.schedule import ProgressiveSchedule, Shape

__all__ = ["DivergedError", "Guard", "ProgressiveSchedule", "Shape"]
