"""means: of each whole block of rows, in one launch on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from farfield.ops.eager import eager

BLOCKS = 64, 4096  # tokens of a block that is worth a program, and of one that a program goes through
WIDEST = 256


def means(x: Tensor, block: int) -> Tensor:
    """The mean of each complete block of rows, float32 or wider; no gradient.

    Args:
        x: [B, G, S, D].
    """
    x = x.detach()
    large = BLOCKS[0] <= block <= BLOCKS[1] and x.shape[3] <= WIDEST
    if x.is_cuda and x.dtype != torch.float64 and large and eager(x):
        from farfield.kernels.means import means

        return means(x, block)
    blocks = x.shape[2] // block
    whole = x[:, :, : blocks * block].unflatten(2, (blocks, block))
    return whole.mean(3, dtype=torch.promote_types(x.dtype, torch.float32))
