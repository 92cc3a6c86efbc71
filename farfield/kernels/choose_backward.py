"""Backward of the attention over rows that end: queries first, then rows; no atomics, every sum in one order.

With p = exp(s - lse) recomputed:  dv = p' dout,  ds = p (dout v' - delta),  delta = sum(p dout v') - dlse,
dq = scale ds k,  dk = scale ds' q.

delta is made of the weights, not of the out that was kept in 16 bits. Gradients of what all rows share (the learned
places of a compression) are sums of dk over the rows, in which ds of a query cancels but for what is wrong with delta.
Queries go through the rows once all the same: with a delta' of the rounded out
dq = scale (sum(p (dout v' - delta') k) + (delta' - delta) sum(p k)).

The scores are made of float32 rows, as lse was: each row is two numbers of the queries' dtype. Rows that were rounded
once would give weights that do not fit lse, beyond all bounds where logits are large.

A row is read by all queries after its end and there are few rows, so that the queries of a tile of rows are cut into
PIECES of equal length, each a program, whose sums are added up afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import choose_backward_hopper as hopper
from farfield.kernels.attend import LOG2E, _dense, padded
from farfield.kernels.choose import _vector, split
from farfield.kernels.replay import start

PROGRAMS = 768  # so many at least, where the sequence is long enough
SHORTEST = 256  # queries of a piece

# queries, rows and warps of a program that makes dq, by width
QUERIES = {64: (128, 64, 8), 128: (64, 32, 8)}
ROWS = {64: (64, 64, 4), 128: (64, 32, 4)}  # rows, queries and warps of one that makes dk and dv

VARIES = ["heads", "tokens", "tiles", "rows", "stride", "span", "first", "plane", "q_b", "q_h", "q_t"]
VARIES += ["d_b", "d_h", "d_t"]


@triton.jit(do_not_specialize=VARIES)
def ended_queries(
    q, k, v, out, d_out, lse, d_lse, d_q, delta, shift, heads, tokens, tiles, rows, stride, span, first, plane,
    q_b, q_h, q_t, d_b, d_h, d_t, scale,
    REPEAT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_UNIT: tl.constexpr, E_UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dq, delta of the weights, and lse in units of log 2: inf where nothing was read, so that weights are 0."""
    pid = tl.program_id(0).to(tl.int64)
    bh = pid // tiles
    tile = tiles - 1 - pid % tiles
    b, h = bh // heads, bh % heads
    i = tile * BQ + tl.arange(0, BQ)
    asked = i < tokens
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    mask_d, mask_e = asked[:, None] & (dims < D), asked[:, None] & (values < E)
    q_tile = tl.load(q + (b * q_b + h * q_h + i * q_t)[:, None] * D_UNIT + dims, mask=mask_d, other=0.0)
    d_tile = tl.load(d_out + (b * d_b + h * d_h + i * d_t)[:, None] * E_UNIT + values, mask=mask_e, other=0.0)
    line = bh * tokens + i
    out_tile = tl.load(out + line[:, None] * E + values, mask=mask_e, other=0.0)
    less = tl.sum(out_tile.to(tl.float32) * d_tile.to(tl.float32), 1)
    total = tl.load(lse + line, mask=asked, other=float("-inf"))
    empty = total == float("-inf")
    total = tl.where(empty, float("inf"), total * LOG2E)
    tl.store(shift + line, total, mask=asked)
    exact = tl.zeros([BQ], tl.float32)
    if d_lse is not None:
        exact -= tl.where(empty, 0.0, tl.load(d_lse + line, mask=asked, other=0.0))
    less += exact

    at_head = (b * (heads // REPEAT) + h // REPEAT) * rows
    k += at_head * D
    v += at_head * E
    seen = tl.maximum(first + i + 1 - span + stride, 0) // stride
    last = tl.minimum(tl.maximum(first + tl.minimum(tile * BQ + BQ, tokens) - span + stride, 0) // stride, rows)
    whole = tl.minimum(tl.maximum(first + tile * BQ + 1 - span + stride, 0) // stride, last) // BK * BK
    acc = tl.zeros([BQ, D_TILE], tl.float32)
    mean = tl.zeros([BQ, D_TILE], tl.float32)
    for masked in tl.static_range(2):
        for begin in range(whole if masked else 0, last if masked else whole, BK):
            at = begin + tl.arange(0, BK)
            there = at < rows
            k_at = k + at[:, None] * D + dims
            hi = tl.load(k_at, mask=there[:, None] & (dims < D), other=0.0)
            lo = tl.load(k_at + plane.to(tl.int64), mask=there[:, None] & (dims < D), other=0.0)
            v_tile = tl.load(v + at[:, None] * E + values, mask=there[:, None] & (values < E), other=0.0)
            scores = tl.dot(q_tile, lo.T)
            scores = tl.dot(q_tile, hi.T, scores)
            weights = tl.exp2(scores * (scale * LOG2E) - total[:, None])
            if masked:
                weights = tl.where((at[None, :] < seen[:, None]) & there[None, :], weights, 0.0)
            d_weights = tl.dot(d_tile, v_tile.T)
            exact += tl.sum(weights * d_weights, 1)
            d_scores = weights * (d_weights - less[:, None])
            acc = tl.dot(d_scores.to(hi.dtype), hi, acc)
            mean = tl.dot(weights.to(hi.dtype), hi, mean)
    tl.store(delta + line, exact, mask=asked)
    acc += (less - exact)[:, None] * mean
    tl.store(d_q + line[:, None] * D + dims, (acc * scale).to(d_q.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=[*VARIES, "pieces", "length"])
def ended_rows(
    q, k, v, d_out, delta, shift, part_k, part_v, heads, tokens, tiles, rows, stride, span, first, plane, pieces,
    length, q_b, q_h, q_t, d_b, d_h, d_t, scale,
    REPEAT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_UNIT: tl.constexpr, E_UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What the queries of a piece add to dk and dv of BK rows: part_k [pieces, B, G, C, D], part_v likewise."""
    pid = tl.program_id(0).to(tl.int64)
    piece, tile, unit = pid % pieces, pid // pieces % tiles, pid // pieces // tiles
    kv_heads = heads // REPEAT
    b, g = unit // kv_heads, unit % kv_heads
    at = tile * BK + tl.arange(0, BK)
    there = at < rows
    # the first query that sees the first of the rows
    begin = tl.maximum(tile * BK * stride + span - 1 - first, piece * length)
    stop = tl.minimum(piece * length + length, tokens)
    if begin < stop:
        begin = begin // BQ * BQ
        dims, values, lanes = tl.arange(0, D_TILE), tl.arange(0, E_TILE), tl.arange(0, BQ)
        mask_k, mask_v = there[:, None] & (dims < D), there[:, None] & (values < E)
        line = (unit * rows + at)[:, None]
        hi = tl.load(k + line * D + dims, mask=mask_k, other=0.0)
        lo = tl.load(k + plane.to(tl.int64) + line * D + dims, mask=mask_k, other=0.0)
        v_tile = tl.load(v + line * E + values, mask=mask_v, other=0.0)
        ends = at * stride + span - 1 - first
        dk = tl.zeros([BK, D_TILE], tl.float32)
        dv = tl.zeros([BK, E_TILE], tl.float32)
        steps = (stop - begin + BQ - 1) // BQ
        for step in range(steps * REPEAT):
            h = g * REPEAT + step // steps
            i = begin + step % steps * BQ + lanes
            asked = i < stop
            q_at = q + (b * q_b + h * q_h + i * q_t)[:, None] * D_UNIT + dims
            q_tile = tl.load(q_at, mask=asked[:, None] & (dims < D), other=0.0)
            d_at = d_out + (b * d_b + h * d_h + i * d_t)[:, None] * E_UNIT + values
            d_tile = tl.load(d_at, mask=asked[:, None] & (values < E), other=0.0)
            stat = (b * heads + h) * tokens + i
            total = tl.load(shift + stat, mask=asked, other=float("inf"))
            less = tl.load(delta + stat, mask=asked, other=0.0)
            scores = tl.dot(lo, q_tile.T)
            scores = tl.dot(hi, q_tile.T, scores)
            weights = tl.exp2(scores * (scale * LOG2E) - total[None, :])
            weights = tl.where((ends[:, None] <= i[None, :]) & asked[None, :], weights, 0.0)
            dv = tl.dot(weights.to(d_tile.dtype), d_tile, dv)
            d_scores = weights * (tl.dot(v_tile, d_tile.T) - less[None, :])
            # two numbers each: what their rounding leaves of a sum over rows does not cancel either
            high = d_scores.to(q_tile.dtype)
            dk = tl.dot((d_scores - high.to(tl.float32)).to(q_tile.dtype), q_tile, dk)
            dk = tl.dot(high, q_tile, dk)
        to = piece * (tl.num_programs(0) // (pieces * tiles)) * rows + line
        tl.store(part_k + to * D + dims, dk, mask=mask_k)
        tl.store(part_v + to * E + values, dv, mask=mask_v)


@triton.jit(do_not_specialize=["units", "tokens", "rows", "stride", "span", "first", "pieces", "length"])
def join_rows(
    part_k, part_v, d_k, d_v, units, tokens, rows, stride, span, first, pieces, length, scale,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The pieces added up. A tile of BK rows has those that begin with its first row's end, or later."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = units.to(tl.int64) * rows
    there = at < total
    since = at % rows // BK * BK * stride + span - 1 - first
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    dk = tl.zeros([ROWS, D_TILE], tl.float32)
    dv = tl.zeros([ROWS, E_TILE], tl.float32)
    for piece in range(pieces):
        read = (there & (since < tl.minimum(piece * length + length, tokens)))[:, None]
        to = (piece * total + at)[:, None]
        dk += tl.load(part_k + to * D + dims, mask=read & (dims < D), other=0.0)
        dv += tl.load(part_v + to * E + values, mask=read & (values < E), other=0.0)
    at = at[:, None]
    tl.store(d_k + at * D + dims, dk * scale, mask=there[:, None] & (dims < D))
    tl.store(d_v + at * E + values, dv, mask=there[:, None] & (values < E))


def ended_backward(
    q: Tensor, keys: Tensor, values: Tensor, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor,
    stride: int, span: int, first: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, keys and values, the latter two float32, for calls that choose.attend_ended takes."""
    batch, heads, tokens, width = q.shape
    kv_heads, rows, value_width = keys.shape[1], keys.shape[2], values.shape[3]
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta, shift = torch.empty_like(lse), torch.empty_like(lse)
    q, q_at = _dense(q)
    d_out, d_at = _dense(d_out)
    keys = keys.contiguous()
    planes, v = split(keys, values, q.dtype)
    d_lse = None if d_lse is None else d_lse.contiguous()
    d_tile, e_tile = padded(width), padded(value_width)
    d_unit, e_unit = _vector(q, width, *q_at), _vector(d_out, value_width, *d_at)
    strides = *[n // d_unit for n in q_at], *[n // e_unit for n in d_at]
    sizes = heads // kv_heads, width, value_width, d_tile, e_tile, d_unit, e_unit

    wide, ends = 64 if max(d_tile, e_tile) <= 64 else 128, (stride, span, first)
    fast = hopper.wants(q, d_out, v, d_lse)
    step = hopper.ROWS if fast else ROWS[wide][0]
    tiles, units = -(-rows // step), batch * kv_heads
    pieces = max(1, min(-(-PROGRAMS // (units * tiles)), tokens // SHORTEST))
    length = -(-tokens // (pieces * 64)) * 64
    pieces = -(-tokens // length)
    part_k = torch.empty(pieces, *keys.shape, dtype=torch.float32, device=q.device)
    part_v = torch.empty(pieces, *values.shape, dtype=torch.float32, device=q.device)
    if fast:
        hopper.queries(q, d_out, planes, v, out.contiguous(), lse, d_q, delta, shift, *ends, scale)
        hopper.rows(q, d_out, planes, v, delta, shift, part_k, part_v, length, *ends, scale)
    else:
        plane = keys.numel()
        tile, across, warps = QUERIES[wide]
        blocks = -(-tokens // tile)
        start(
            ended_queries, (batch * heads * blocks,),
            q, planes, v, out.contiguous(), d_out, lse, d_lse, d_q, delta, shift, heads, tokens, blocks, rows, *ends,
            plane, *strides, scale, *sizes, tile, across, num_warps=warps, num_stages=2,
        )  # fmt: skip
        _, across, warps = ROWS[wide]
        start(
            ended_rows, (units * tiles * pieces,),
            q, planes, v, d_out, delta, shift, part_k, part_v, heads, tokens, tiles, rows, *ends, plane, pieces,
            length, *strides, scale, *sizes, across, step, num_warps=warps, num_stages=2,
        )  # fmt: skip
    d_k, d_v = torch.empty_like(keys), torch.empty(values.shape, dtype=torch.float32, device=q.device)
    some = max(1, 1024 // max(d_tile, e_tile))
    start(
        join_rows, (-(-units * rows // some),),
        part_k, part_v, d_k, d_v, units, tokens, rows, stride, span, first, pieces, length, scale, width, value_width,
        d_tile, e_tile, some, step, num_warps=4,
    )  # fmt: skip
    return d_q, d_k, d_v
