"""What is computed in float32 or wider stays so, whatever autocast would make of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def kept(x: Tensor) -> AbstractContextManager[object]:
    """No autocast for operations on x's device. The meta device, which rounds nothing, has none to switch off."""
    device = x.device.type
    if x.is_meta or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)
