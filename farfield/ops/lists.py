"""The lists of select.multipole on the GPU, for select.static, whose op they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tree_lists(
    start: int, blocks: int, radius: Sequence[int], starts: Sequence[int], causal: bool, first: int, sink_groups: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """near and far index and count in one launch."""
    from farfield.kernels.lists import build

    return build(start, blocks, radius, starts, causal, first, sink_groups, device)
