"""Means of whole blocks of rows: a program a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import _dense, padded
from farfield.kernels.choose import _vector
from farfield.kernels.replay import start

ROWS = 64  # at a time


@triton.jit(do_not_specialize=["heads", "blocks", "x_b", "x_h", "x_t"])
def mean_rows(
    x, means, heads, blocks, x_b, x_h, x_t,
    BLOCK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    unit, m = pid // blocks, pid % blocks
    b, g = unit // heads, unit % heads
    dims = tl.arange(0, D_TILE)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, D_TILE], tl.float32)
    # loads that are under way together
    for begin in tl.static_range(0, BLOCK, ROWS):
        at = (b * x_b + g * x_h + (m * BLOCK + begin + row) * x_t)[:, None] * UNIT + dims
        there = (begin + row < BLOCK)[:, None] & (dims < D)
        total += tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    tl.store(means + pid * D + dims, tl.sum(total, 0) * (1.0 / BLOCK), mask=dims < D)


def means(x: Tensor, block: int) -> Tensor:
    """float32 [B, G, S // block, D]."""
    batch, heads, rows, width = x.shape
    blocks = rows // block
    found = torch.empty(batch, heads, blocks, width, dtype=torch.float32, device=x.device)
    x, x_at = _dense(x)
    unit = _vector(x, width, *x_at)
    if found.numel():
        start(
            mean_rows, (batch * heads * blocks,),
            x, found, heads, blocks, *[n // unit for n in x_at], BLOCK=block, D=width, D_TILE=padded(width), UNIT=unit,
            ROWS=ROWS, num_warps=8,
        )  # fmt: skip
    return found
