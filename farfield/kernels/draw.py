"""A token drawn from logits in one launch, where a sort, its cumulated shares and what surrounds them take twenty.

Which tokens stand before one is counted, not sorted out: for each all others are looked at, a few at a time. That takes
V^2 comparisons, so V is small.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import padded
from farfield.kernels.replay import start

AT_ONCE = 16  # tokens that each is compared with


@triton.jit(do_not_specialize=["apart", "top_k", "temperature", "top_p"])
def draw(
    logits, number, token, apart, top_k, temperature, top_p,
    V: tl.constexpr, V_TILE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The token of one row of logits.

    Args:
        apart: 0 where all rows have one number, else 1.
        temperature, top_p: the bits of a float64 each.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, V_TILE)
    here = logits + b * V
    temperature, top_p = temperature.to(tl.float64, bitcast=True), top_p.to(tl.float64, bitcast=True)
    own = tl.load(here + i, mask=i < V, other=float("-inf"))
    x = own.to(tl.float64) / temperature
    peak = tl.max(x, 0)
    each = tl.exp(x - peak)
    total = tl.sum(each, 0)
    share = each / total
    # how many stand before each token, and their shares: the likelier ones, and of equal ones those of lower id
    rank, mass = tl.zeros([V_TILE], tl.int32), tl.zeros([V_TILE], tl.float64)
    for begin in range(0, V, AT_ONCE):
        j = begin + tl.arange(0, AT_ONCE)
        other = tl.load(here + j, mask=j < V, other=float("-inf"))
        its = tl.exp(other.to(tl.float64) / temperature - peak) / total
        before = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & (j[None, :] < i[:, None]))
        before = before & (j < V)[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
        mass += tl.sum(tl.where(before, its[None, :], 0.0), 1)
    share = tl.where(rank < top_k, share, 0.0)
    kept = tl.sum(share, 0)
    share = tl.where(mass / kept < top_p, share / kept, 0.0)
    sums = tl.cumsum(share, 0)
    wanted = tl.load(number + b * apart) * tl.max(sums, 0)
    place = tl.sum(((sums <= wanted) & (i < V)).to(tl.int32), 0)
    # rounding may leave the sum of all below the number
    last = tl.max(tl.where(share > 0, i, 0), 0)
    tl.store(token + b, tl.minimum(place, last).to(tl.int64))


def drawn(logits: Tensor, number: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """[B] from logits [B, V] and numbers [B] or [1] in float64; top_k and top_p so large that they keep all, or not."""
    batch, tokens = logits.shape
    logits = logits.contiguous()
    token = torch.empty(batch, dtype=torch.int64, device=logits.device)
    # a kernel would be handed floats in 32 bits
    bits = (int.from_bytes(struct.pack("<d", x), "little") for x in (temperature, top_p))
    start(
        draw, (batch,), logits, number, token, int(len(number) > 1), top_k, *bits, tokens, padded(tokens), AT_ONCE,
        num_warps=4 if tokens <= 256 else 8,
    )  # fmt: skip
    return token
