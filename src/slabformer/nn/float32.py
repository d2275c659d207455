"""Buffers that half precision does not reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slabformer._torch import buffer_slots


class KeepsFloat32(nn.Module):
    """A module some of whose buffers are float32 at least, however its model is cast or loaded.

    ``.half()``, ``.to(dtype)`` and the like leave their values as they are; what is put in their place past these, by
    ``load_state_dict(assign=True)`` or by hand, is widened where :meth:`keep_float32` is called.
    """

    #: names of those buffers
    float32_buffers: ClassVar[tuple[str, ...]] = ()

    def keep_float32(self) -> None:
        """Widen buffers that someone has narrowed behind the module's back; reads nothing from a device."""
        for name in self.float32_buffers:
            buffer = buffer_slots(self)[name]
            if buffer is not None and _is_short(buffer):
                buffer_slots(self)[name] = buffer.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFloat32:
        before = {name: buffer_slots(self)[name] for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = buffer_slots(self)[name]
            if old is not None and new is not None and _is_short(new):
                buffer_slots(self)[name] = new.float() if old.is_meta else old.to(new.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.keep_float32()


def _is_short(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize < 4
