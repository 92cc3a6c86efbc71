"""The gated sum of three branches, one of which is still in parts: chosen blocks are joined where they are summed up.

A query reads what it got from each block once, all blocks at a time: their masses tell what each is worth, and the
gates, which follow from q, what the three branches are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import LN2, LOG2E, padded
from farfield.kernels.choose import _vector
from farfield.kernels.replay import start

ELEMENTS = 1024  # of a part, that a program of four warps reads at a time


@triton.jit
def _gate(n: tl.constexpr, q_row, gate, bias, g, dims, there, D: tl.constexpr, LEARNED: tl.constexpr):
    if LEARNED:
        mask = there[:, None] & (dims < D)
        weights = tl.load(gate + (g[:, None] * D + dims) * 3 + n, mask=mask, other=0.0)
        logit = tl.sum(q_row * weights, 1) + tl.load(bias + g * 3 + n, mask=there, other=0.0)
        share = 1.0 / (1.0 + tl.exp(-logit))
    else:
        share = tl.full([there.shape[0]], 0.5, tl.float32)
    return share


@triton.jit(do_not_specialize=["heads", "tokens", "first", "many", "total", "q_b", "q_h", "q_t"])
def join_branches(
    parts, masses, place, count, begun, begun_lse, far, near, q, gate, bias, out, chosen, chosen_lse,
    heads, tokens, first, many, total, q_b, q_h, q_t,
    STACK: tl.constexpr, PICKS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, D_UNIT: tl.constexpr,
    ROWS: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """Queries first .. first + many - 1. A row is a key head of a batch element, a query, and one of its heads.

    parts [B G many PICKS STACK, D], masses of them, log2; place [B G many, PICKS], count [B G, many].
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < total
    r, query = row % STACK, row // STACK
    n, unit = query % many, query // many
    dims = tl.arange(0, D_TILE)[None, :]
    inside = there[:, None] & (dims < D)
    line = (unit * STACK + r) * tokens + first + n
    at = line[:, None] * D + dims
    filled = tl.load(count + query, mask=there, other=0)
    # all loads are under way before the first result is asked for
    read, logs = (), ()
    for p in tl.static_range(PICKS):
        one = p < filled
        spot = tl.load(place + query * PICKS + p, mask=one, other=0).to(tl.int64) * STACK + r
        logs += (tl.load(masses + spot, mask=one, other=float("-inf")),)
        read += (tl.load(parts + spot[:, None] * D + dims, mask=one[:, None] & (dims < D), other=0.0),)
    already = tl.load(begun + at, mask=inside, other=0.0)
    begun_log = tl.load(begun_lse + line, mask=there, other=0.0) * LOG2E
    far_row = tl.load(far + at, mask=inside, other=0.0)
    near_row = tl.load(near + at, mask=inside, other=0.0)
    q_row = tl.zeros([ROWS, D_TILE], tl.float32)
    g = unit % (heads // STACK)
    if LEARNED:
        h = g * STACK + r
        from_ = (unit // (heads // STACK) * q_b + h * q_h + (first + n) * q_t)[:, None] * D_UNIT + dims
        q_row = tl.load(q + from_, mask=inside, other=0.0).to(tl.float32)
    # every query has read its own block: the peak is finite
    peak = begun_log
    for p in tl.static_range(PICKS):
        peak = tl.maximum(peak, logs[p])
    weight = tl.exp2(begun_log - peak)
    mass = weight
    acc = already.to(tl.float32) * weight[:, None]
    for p in tl.static_range(PICKS):
        weight = tl.exp2(logs[p] - peak)
        mass += weight
        acc += read[p].to(tl.float32) * weight[:, None]
    acc *= (1.0 / mass)[:, None]
    if chosen is not None:
        tl.store(chosen + at, acc.to(chosen.dtype.element_ty), mask=inside)
        tl.store(chosen_lse + line, (peak + tl.log2(mass)) * LN2, mask=there)
    total_row = far_row.to(tl.float32) * _gate(0, q_row, gate, bias, g, dims, there, D, LEARNED)[:, None]
    total_row += acc * _gate(1, q_row, gate, bias, g, dims, there, D, LEARNED)[:, None]
    total_row += near_row.to(tl.float32) * _gate(2, q_row, gate, bias, g, dims, there, D, LEARNED)[:, None]
    tl.store(out + at, total_row.to(out.dtype.element_ty), mask=inside)


def join(
    parts: Tensor, masses: Tensor, place: Tensor, count: Tensor, begun: tuple[Tensor, Tensor], far: Tensor,
    near: Tensor, q: Tensor, gate: Tensor | None, bias: Tensor | None, out: Tensor,
    chosen: tuple[Tensor, Tensor] | tuple[None, None], first: int,
) -> None:  # fmt: skip
    """Of queries first .. first + many - 1 what follows from the parts of their chosen blocks.

    Args:
        place: of the entries of the lists, by list, [B G, many, picks]; count: entries of each list, [B G, 1, many].
        begun: out and lse of the blocks that are always read.
        chosen: where out and lse of all chosen blocks go, if they are asked for.
    """
    batch, heads, tokens, width = q.shape
    units, _, many = count.shape
    stack, picks = batch * heads // units, place.numel() // (units * many)
    total, tile = batch * heads * many, padded(width)
    rows = max(1, ELEMENTS // tile)
    q_at = q.stride()[:3]
    unit = _vector(q, width, *q_at)
    start(
        join_branches, (-(-total // rows),),
        parts, masses, place, count, *begun, far, near, q, gate, bias, out, *chosen, heads, tokens, first, many,
        total, *[n // unit for n in q_at], STACK=stack, PICKS=picks, D=width, D_TILE=tile, D_UNIT=unit, ROWS=rows,
        LEARNED=gate is not None, num_warps=4,
    )  # fmt: skip
