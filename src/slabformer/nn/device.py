"""Where a module's parameters are made."""

from __future__ import annotations

import torch

from slabformer.settings import DeviceName

Device = torch.device | DeviceName | None
