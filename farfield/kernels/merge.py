"""Attention over some rows joined with attention over others, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import padded
from farfield.kernels.replay import start

NUMBERS = 2048  # of each of the two results that a program of four warps holds


@triton.jit(do_not_specialize=["total"])
def join(
    out0, lse0, out1, lse1, out, lse, total, D: tl.constexpr, D_TILE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D_TILE)
    there = row < total
    at, mask = row[:, None] * D + dims, there[:, None] & (dims < D)
    log0 = tl.load(lse0 + row, mask=there, other=float("-inf"))
    log1 = tl.load(lse1 + row, mask=there, other=float("-inf"))
    x0, x1 = tl.load(out0 + at, mask=mask, other=0.0), tl.load(out1 + at, mask=mask, other=0.0)
    peak = tl.maximum(log0, log1)
    # who has read nothing is measured from 0
    base = tl.where(peak == float("-inf"), 0.0, peak)
    mass0, mass1 = tl.exp(log0 - base), tl.exp(log1 - base)
    mass = mass0 + mass1
    some = mass > 0
    mass = tl.where(some, mass, 1.0)
    one = 1.0 / mass
    joined = x0.to(tl.float32) * (mass0 * one)[:, None] + x1.to(tl.float32) * (mass1 * one)[:, None]
    tl.store(out + at, joined.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + row, tl.where(some, base + tl.log(mass), float("-inf")), mask=there)


def merge(out0: Tensor, lse0: Tensor, out1: Tensor, lse1: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of both; contiguous, lse in float32."""
    out, lse = torch.empty_like(out0), torch.empty_like(lse0)
    width, total = out.shape[-1], lse.numel()
    rows = max(1, NUMBERS // padded(width))
    start(join, (-(-total // rows),), out0, lse0, out1, lse1, out, lse, total, width, padded(width), rows, num_warps=4)
    return out, lse
