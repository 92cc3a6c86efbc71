"""attend on the GPU, backward: queries first, then rows; no atomics, every sum in one order.

With p = exp(s - lse) recomputed:  dv = p' dout,  ds = p (dout v' - delta),  delta = sum(dout out) - dlse,
dq = scale ds k,  dk = scale ds' q.

1. One program a query tile: delta, then dq over the lists of all sources. Small row blocks (fewer than SMALL rows:
   gathered rows, the groups of a pyramid) are read by few query blocks or by nearly all of them, so their readers do
   not make even work; but s and ds are at hand here, and so is each row's share of dk and dv, which is written down
   entry by entry. They are added up over the transposed lists (attend_backward_sums), at most PIECE readers a program.
2. Large row blocks: one program a row block walks the transposed list, dk and dv in registers. Row blocks read far
   more often than the average are cut into pieces too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import attend_backward_hopper as hopper
from farfield.kernels import attend_backward_queries_hopper as hopper_queries
from farfield.kernels import attend_backward_runs_hopper as hopper_runs
from farfield.kernels import attend_listed, transpose
from farfield.kernels.attend import padded
from farfield.kernels.attend_backward_sums import Source, Three, add_up, join_pieces, pieces_of, shares_of, slices_of
from farfield.kernels.attend_listed_backward import attend_listed_backward
from farfield.kernels.replay import start
from farfield.kernels.transpose import Readers, clear, keys_of, piece_of, readers_of
from farfield.ops.attend import Call

LOG2E = tl.constexpr(1.4426950408889634)

SMALL = 32  # smaller row blocks leave shares
PIECE = 32  # readers of a small row block that are added up together; even
# entries of a list of row blocks beside small ones that make it long, and how such a list is read at widths up to 64
LONG, LONG_ROWS, LONG_REGISTERS = 8, 64, 168
READS = 32  # readers of a large row block that are never cut into pieces; even
MANY = 4096  # large row blocks for which programs have fifteen or more to do
FAR = 1 << 24  # elements from row to row; 128 times as many must fit 32 bits


# what varies with the length or the step must not make another kernel
VARIES = ["first", "heads", "tokens", "blocks", "rows0", "picks0", "reach0", "sinks0", "rows1", "picks1", "reach1"]
VARIES += ["sinks1", "position_b", "position_h", "group_b", "group_h"]
# single numbers: a tuple's elements are always specialised
VARIES += [f"{name}{s}_{d}" for name in ("bias", "end", "group", "list") for s in (0, 1) for d in "bh"]


@triton.jit(do_not_specialize=VARIES)
def attend_backward_queries(
    q, out, d_out, lse, d_lse, position, group, d_q, delta, shift,
    k0, v0, bias0, end0, group0, index0, count0, d_k0, d_v0, d_bias0,
    k1, v1, bias1, end1, group1, index1, count1, d_k1, d_v1, d_bias1,
    q_strides, d_out_strides, position_b, position_h, group_b, group_h,
    k0_strides, v0_strides, bias0_b, bias0_h, end0_b, end0_h, group0_b, group0_h, list0_b, list0_h,
    k1_strides, v1_strides, bias1_b, bias1_h, end1_b, end1_h, group1_b, group1_h, list1_b, list1_h,
    first, heads, tokens, blocks, rows0, picks0, reach0, sinks0, rows1, picks1, reach1, sinks1, scale,
    STACK: tl.constexpr, Q_BLOCK: tl.constexpr, BQ: tl.constexpr, SOURCES: tl.constexpr,
    REPEAT0: tl.constexpr, K_BLOCK0: tl.constexpr, BK0: tl.constexpr,
    REPEAT1: tl.constexpr, K_BLOCK1: tl.constexpr, BK1: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    POSITION: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL0: tl.constexpr, REACH0: tl.constexpr, BIAS0: tl.constexpr, END0: tl.constexpr, GROUP0: tl.constexpr,
    SHARES0: tl.constexpr, D_BIAS0: tl.constexpr,
    CAUSAL1: tl.constexpr, REACH1: tl.constexpr, BIAS1: tl.constexpr, END1: tl.constexpr, GROUP1: tl.constexpr,
    SHARES1: tl.constexpr, D_BIAS1: tl.constexpr, LONG: tl.constexpr, MORE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """LONG: the first source's lists are long. MORE: there is a dq, of other sources, to which this one's is added."""
    TILES: tl.constexpr = (STACK * Q_BLOCK + BQ - 1) // BQ
    # where registers are scarce, masks cost more than the look at the list that saves them
    SHORT: tl.constexpr = (SHARES0 or SHARES1) and max(D_TILE, E_TILE) <= 128 and q.dtype.element_ty != tl.float32
    # int64: token * stride passes 2**31 at long context
    pid = tl.program_id(0).to(tl.int64)
    # the last blocks of a causal sequence have the longest lists: they go first
    tile, n, local = pid % TILES, blocks - 1 - pid // TILES % blocks, pid // TILES // blocks
    units = heads // STACK
    b, u = (first + local) // units, (first + local) % units

    # everything waits for the lists, so they are asked for first
    nth0 = b * list0_b + u * list0_h + n
    index0 += nth0 * picks0
    listed0 = tl.load(count0 + nth0)
    entry0 = _entries(index0, 0, picks0, K_BLOCK0, BK0)
    if SOURCES > 1:
        nth1 = b * list1_b + u * list1_h + n
        index1 += nth1 * picks1
        listed1 = tl.load(count1 + nth1)
        entry1 = _entries(index1, 0, picks1, K_BLOCK1, BK1)

    row = tile * BQ + tl.arange(0, BQ)
    h = u * STACK + row // Q_BLOCK
    i = n * Q_BLOCK + row % Q_BLOCK
    asked = (row < STACK * Q_BLOCK) & (i < tokens)
    line = (b * heads + h) * tokens + i
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    # [BQ, D] and [BQ, E]
    q_at = q + b * q_strides[0] + h[:, None] * q_strides[1] + i[:, None] * q_strides[2] + dims
    q_tile = _load(q_at, asked, dims, D, D_TILE, False)
    d_at = d_out + b * d_out_strides[0] + h[:, None] * d_out_strides[1] + i[:, None] * d_out_strides[2] + values
    d_tile = _load(d_at, asked, values, E, E_TILE, False)
    out_tile = _load(out + line[:, None] * E + values, asked, values, E, E_TILE, False)
    mass = tl.load(lse + line, mask=asked, other=float("-inf"))
    empty = mass == float("-inf")
    # a query that read nothing, and one that only fills up a tile, gets weights exp(s - inf) = 0
    shift_row = tl.where(empty, float("inf"), mass * LOG2E)
    delta_row = tl.sum(out_tile.to(tl.float32) * d_tile.to(tl.float32), 1)
    if d_lse is not None:
        delta_row -= tl.load(d_lse + line, mask=asked, other=0.0)
    delta_row = tl.where(empty, 0.0, delta_row)
    # up to the end of the last block, so that whole tiles can be read back
    stat, owned = (b * heads + h) * (blocks * Q_BLOCK) + i, row < STACK * Q_BLOCK
    tl.store(shift + stat, shift_row, mask=owned)
    tl.store(delta + stat, delta_row, mask=owned)
    at = i
    if POSITION:
        at = tl.load(position + b * position_b + h * position_h + i, mask=asked, other=0).to(tl.int64)
    mine = tl.zeros([BQ], tl.int64)
    if GROUP:
        mine = tl.load(group + b * group_b + h * group_h + i, mask=asked, other=0).to(tl.int64)

    acc = tl.zeros([BQ, D_TILE], tl.float32)
    list0 = (local * blocks + n) * TILES + tile
    acc = _source(
        acc, q_tile, d_tile, at, mine, shift_row, delta_row, scale, b, u, n, list0, rows0, picks0, reach0, sinks0,
        dims, values, k0, v0, bias0, end0, group0, index0, listed0, entry0, d_k0, d_v0, d_bias0,
        k0_strides, v0_strides, bias0_b, bias0_h, end0_b, end0_h, group0_b, group0_h,
        D, E, D_TILE, E_TILE, Q_BLOCK, REPEAT0, K_BLOCK0, BK0, POSITION, CAUSAL0, REACH0, BIAS0, END0, GROUP0,
        SHARES0, D_BIAS0, SHORT and not LONG, PRECISION,
    )  # fmt: skip
    if SOURCES > 1:
        acc = _source(
            acc, q_tile, d_tile, at, mine, shift_row, delta_row, scale, b, u, n, list0, rows1, picks1, reach1, sinks1,
            dims, values, k1, v1, bias1, end1, group1, index1, listed1, entry1, d_k1, d_v1, d_bias1,
            k1_strides, v1_strides, bias1_b, bias1_h, end1_b, end1_h, group1_b, group1_h,
            D, E, D_TILE, E_TILE, Q_BLOCK, REPEAT1, K_BLOCK1, BK1, POSITION, CAUSAL1, REACH1, BIAS1, END1, GROUP1,
            SHARES1, D_BIAS1, SHORT, PRECISION,
        )  # fmt: skip
    kept = asked[:, None] & (dims < D)[None, :]
    acc *= scale
    if MORE:
        acc += tl.load(d_q + line[:, None] * D + dims, mask=kept, other=0.0).to(tl.float32)
    tl.store(d_q + line[:, None] * D + dims, acc.to(d_q.dtype.element_ty), mask=kept)


@triton.jit
def _entries(index, x, picks, K_BLOCK: tl.constexpr, BK: tl.constexpr):
    """The entries of a list that name its rows x .. x + BK - 1: one entry, where a tile is within a row block."""
    if K_BLOCK % BK == 0:
        entry = tl.load(index + x // K_BLOCK, mask=x // K_BLOCK < picks, other=0)
    else:
        slot = (x + tl.arange(0, BK)) // K_BLOCK
        entry = tl.load(index + slot, mask=slot < picks, other=0)
    return entry


@triton.jit
def _source(
    acc, q_tile, d_tile, at, mine, shift, delta, scale, b, u, n, list_, rows, picks, reach, sinks, dims, values,
    k, v, bias, end, group, index, listed, entry, d_k, d_v, d_bias,
    k_strides, v_strides, bias_b, bias_h, end_b, end_h, group_b, group_h,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr, Q_BLOCK: tl.constexpr,
    REPEAT: tl.constexpr, K_BLOCK: tl.constexpr, BK: tl.constexpr, POSITION: tl.constexpr,
    CAUSAL: tl.constexpr, REACH: tl.constexpr, BIAS: tl.constexpr, END: tl.constexpr, GROUP: tl.constexpr,
    SHARES: tl.constexpr, D_BIAS: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq what the rows of one source give, of which block n of unit (b, u) has a list; SHORT: a short one."""
    BLOCKED: tl.constexpr = K_BLOCK % BK == 0
    g = u // REPEAT
    k += b * k_strides[0] + g * k_strides[1]
    v += b * v_strides[0] + g * v_strides[1]
    bias += b * bias_b + u * bias_h
    end += b * end_b + g * end_h
    group += b * group_b + g * group_h
    d_k += list_ * picks * K_BLOCK * D
    d_v += list_ * picks * K_BLOCK * E
    d_bias += list_ * picks * K_BLOCK
    # whole row blocks that every query of the block sees come first, and need no mask: lists ascend; which those are
    # a short list is read sooner than told
    plain = listed * 0
    if BLOCKED and not (SHORT or REACH or GROUP or (CAUSAL and END)):
        plain = listed
        limit = n * 0 + rows
        if CAUSAL and POSITION:
            limit = tl.minimum(limit, tl.min(at, 0) + 1)
        elif CAUSAL:
            limit = tl.minimum(limit, n * Q_BLOCK + 1)
        stop = _stop(index, plain, K_BLOCK)
        while (plain > 0) & (stop > limit):
            plain -= 1
            stop = _stop(index, plain, K_BLOCK)
        acc = _walk(
            acc, q_tile, d_tile, at, mine, shift, delta, scale, entry, 0, plain * K_BLOCK, picks, rows, reach, sinks,
            dims, values, k, v, bias, end, group, index, d_k, d_v, d_bias, k_strides[2], v_strides[2],
            D, E, D_TILE, E_TILE, K_BLOCK, BK, False, False, BIAS, False, False, SHARES, D_BIAS, False, PRECISION,
        )  # fmt: skip
        entry = _entries(index, plain * K_BLOCK, picks, K_BLOCK, BK)
    return _walk(
        acc, q_tile, d_tile, at, mine, shift, delta, scale, entry, plain * K_BLOCK, listed * K_BLOCK, picks, rows,
        reach, sinks, dims, values, k, v, bias, end, group, index, d_k, d_v, d_bias, k_strides[2], v_strides[2],
        D, E, D_TILE, E_TILE, K_BLOCK, BK, CAUSAL, REACH, BIAS, END, GROUP, SHARES, D_BIAS, True, PRECISION,
    )  # fmt: skip


@triton.jit
def _stop(index, listed, K_BLOCK: tl.constexpr):
    """The row after the last of so many entries."""
    return (tl.load(index + listed - 1, mask=listed > 0, other=0).to(tl.int64) + 1) * K_BLOCK


@triton.jit
def _walk(
    acc, q_tile, d_tile, at, mine, shift, delta, scale, entry, begin, listed, picks, rows, reach, sinks, dims, values,
    k, v, bias, end, group, index, d_k, d_v, d_bias, k_stride, v_stride,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr, K_BLOCK: tl.constexpr,
    BK: tl.constexpr, CAUSAL: tl.constexpr, REACH: tl.constexpr, BIAS: tl.constexpr, END: tl.constexpr,
    GROUP: tl.constexpr, SHARES: tl.constexpr, D_BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows begin .. listed - 1 of a list, BK at a time."""
    BLOCKED: tl.constexpr = K_BLOCK % BK == 0
    lanes = tl.arange(0, BK)
    k_lanes = lanes[:, None] * k_stride + dims[None, :]
    v_lanes = lanes[:, None] * v_stride + values[None, :]
    for x in range(begin, listed, BK):
        slot = x + lanes
        if BLOCKED:
            row0 = entry.to(tl.int64) * K_BLOCK + x % K_BLOCK
            row = row0 + lanes
            there = row < rows
            k_at = k + row0 * k_stride + k_lanes
            v_at = v + row0 * v_stride + v_lanes
        else:
            row = entry.to(tl.int64) * K_BLOCK + slot % K_BLOCK
            # Triton 3.6 concludes that every row is a multiple of K_BLOCK, and shares comparisons between rows by it
            row = tl.multiple_of(row, 1)
            there = (slot < listed) & (row < rows)
            k_at = k + row[:, None] * k_stride + dims
            v_at = v + row[:, None] * v_stride + values
        # read ahead: the rows of the next tile cannot be asked for before
        entry = _entries(index, x + BK, picks, K_BLOCK, BK)
        k_tile = _load(k_at, there, dims, D, D_TILE, not MASKED)
        v_tile = _load(v_at, there, values, E, E_TILE, not MASKED)
        # [BQ, BK], in units of log 2
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        d_weights = tl.dot(d_tile, v_tile.T, input_precision=PRECISION)
        scores = scores * (scale * LOG2E) - shift[:, None]
        if BIAS:
            scores += (tl.load(bias + row, mask=there, other=0.0) * LOG2E)[None, :]
        weights = tl.exp2(scores)
        if MASKED:
            seen = there[None, :]
            ends = row
            if END:
                ends = tl.load(end + row, mask=there, other=0).to(tl.int64)
            if CAUSAL:
                seen = seen & (ends[None, :] <= at[:, None])
            if REACH:
                seen = seen & ((tl.abs(at[:, None] - ends[None, :]) < reach) | (row < sinks)[None, :])
            if GROUP:
                theirs = tl.load(group + row, mask=there, other=0).to(tl.int64)
                seen = seen & (theirs[None, :] == mine[:, None])
            weights = tl.where(seen, weights, 0.0)
        d_scores = weights * (d_weights - delta[:, None])
        d_low = d_scores.to(k_tile.dtype)
        acc = tl.dot(d_low, k_tile, acc, input_precision=PRECISION)
        if SHARES:
            kept = (slot < listed)[:, None]
            d_k_tile = tl.dot(tl.trans(d_low), q_tile, input_precision=PRECISION) * scale
            d_k_at = d_k + slot[:, None] * D + dims
            tl.store(d_k_at, d_k_tile.to(d_k.dtype.element_ty), mask=kept & (dims < D)[None, :])
            d_v_tile = tl.dot(tl.trans(weights.to(d_tile.dtype)), d_tile, input_precision=PRECISION)
            d_v_at = d_v + slot[:, None] * E + values
            tl.store(d_v_at, d_v_tile.to(d_v.dtype.element_ty), mask=kept & (values < E)[None, :])
            if D_BIAS:
                tl.store(d_bias + slot, tl.sum(d_scores, 0), mask=slot < listed)
    return acc


@triton.jit
def _load(at, there, dims, WIDTH: tl.constexpr, TILE: tl.constexpr, ALL: tl.constexpr):
    """The rows of a tile that are there, the others 0; ALL: every row is."""
    if ALL and WIDTH == TILE:
        tile = tl.load(at)
    elif ALL:
        tile = tl.load(at, mask=(dims < WIDTH)[None, :], other=0.0)
    elif WIDTH == TILE:
        tile = tl.load(at, mask=there[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=there[:, None] & (dims < WIDTH)[None, :], other=0.0)
    return tile


ROWS_VARY = ["heads", "tokens", "blocks", "rows", "row_blocks", "pieces", "most", "base", "reach", "sinks"]
ROWS_VARY += [f"{name}_{d}" for name in ("position", "group", "bias", "end", "row_group", "segment") for d in "bh"]


@triton.jit(do_not_specialize=ROWS_VARY)
def attend_backward_rows(
    q, d_out, delta, shift, position, group, k, v, bias, end, row_group, start, reader, key,
    d_k, d_v, d_bias, sum_k, sum_v, sum_bias,
    q_strides, d_out_strides, position_b, position_h, group_b, group_h, k_strides, v_strides,
    bias_b, bias_h, end_b, end_h, row_group_b, row_group_h, segment_b, segment_h,
    heads, tokens, blocks, rows, row_blocks, pieces, most, base, reach, sinks, scale,
    STACK: tl.constexpr, Q_BLOCK: tl.constexpr, BQ: tl.constexpr,
    REPEAT: tl.constexpr, K_BLOCK: tl.constexpr, BK: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr, POSITION: tl.constexpr,
    CAUSAL: tl.constexpr, REACH: tl.constexpr, BIAS: tl.constexpr, END: tl.constexpr, GROUP: tl.constexpr,
    D_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of a row block, or of one piece of its readers."""
    TILES: tl.constexpr = (K_BLOCK + BK - 1) // BK
    SIZE: tl.constexpr = STACK * Q_BLOCK
    pid = tl.program_id(0).to(tl.int64)
    tile, x, unit = pid % TILES, pid // TILES % (row_blocks + pieces), pid // TILES // (row_blocks + pieces)
    units = heads // STACK
    b, u = unit // units, unit % units
    g = u // REPEAT
    segment = b * segment_b + u * segment_h
    start += segment * (row_blocks + 1)
    m, begin, stop, piece = piece_of(start, key, base + segment * (row_blocks + 1), x, row_blocks, most)
    if begin > stop:
        return

    inside = (tile * BK + tl.arange(0, BK)).to(tl.int32)
    row = m * K_BLOCK + inside
    there = (inside < K_BLOCK) & (row < rows)
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    # [BK, D] and [BK, E]
    k_at = k + b * k_strides[0] + g * k_strides[1] + row[:, None] * k_strides[2] + dims
    k_tile = _load(k_at, there, dims, D, D_TILE, False)
    v_at = v + b * v_strides[0] + g * v_strides[1] + row[:, None] * v_strides[2] + values
    v_tile = _load(v_at, there, values, E, E_TILE, False)
    more = tl.zeros([BK], tl.float32)
    if BIAS:
        more = tl.load(bias + b * bias_b + u * bias_h + row, mask=there, other=0.0) * LOG2E
    ends = row
    if END:
        ends = tl.load(end + b * end_b + g * end_h + row, mask=there, other=0).to(tl.int64)
    theirs = tl.zeros([BK], tl.int64)
    if GROUP:
        theirs_at = row_group + b * row_group_b + g * row_group_h + row
        theirs = tl.load(theirs_at, mask=there, other=0).to(tl.int64)

    q += b * q_strides[0]
    d_out += b * d_out_strides[0]
    position += b * position_b
    group += b * group_b
    acc_k = tl.zeros([BK, D_TILE], tl.float32)
    acc_v = tl.zeros([BK, E_TILE], tl.float32)
    acc_b = tl.zeros([BK], tl.float32)
    reader += begin
    size = (stop - begin).to(tl.int32) * SIZE
    # readers ascend: the first ones may not see all rows of a causal block, the others see them all
    masked = size
    if not (REACH or GROUP or (CAUSAL and (END or POSITION))):
        masked = size * 0
        if CAUSAL:
            last_row = m * K_BLOCK + tile * BK + BK - 1
            while (masked < size) & (
                tl.load(reader + masked // SIZE, mask=masked < size, other=0).to(tl.int64) * Q_BLOCK < last_row
            ):
                masked += SIZE
    if CAUSAL or REACH or GROUP:
        acc_k, acc_v, acc_b = _readers(
            acc_k, acc_v, acc_b, k_tile, v_tile, more, row, ends, theirs, scale, 0, masked, b, u, heads, tokens, blocks,
            reach, sinks, dims, values, q, d_out, delta, shift, position, group, reader,
            q_strides[1], q_strides[2], d_out_strides[1], d_out_strides[2], position_h, group_h,
            STACK, Q_BLOCK, BQ, D, E, D_TILE, E_TILE, POSITION, CAUSAL, REACH, BIAS, GROUP, D_BIAS, PRECISION,
        )  # fmt: skip
    if not (REACH or GROUP or (CAUSAL and (END or POSITION))):
        acc_k, acc_v, acc_b = _readers(
            acc_k, acc_v, acc_b, k_tile, v_tile, more, row, ends, theirs, scale, masked, size, b, u, heads, tokens,
            blocks, reach, sinks, dims, values, q, d_out, delta, shift, position, group, reader,
            q_strides[1], q_strides[2], d_out_strides[1], d_out_strides[2], position_h, group_h,
            STACK, Q_BLOCK, BQ, D, E, D_TILE, E_TILE, POSITION, False, False, BIAS, False, D_BIAS, PRECISION,
        )  # fmt: skip

    acc_k *= scale
    if piece < 0:
        line = unit * rows + row
        d_k_at, d_v_at = d_k + line[:, None] * D + dims, d_v + line[:, None] * E + values
        tl.store(d_k_at, acc_k.to(d_k.dtype.element_ty), mask=there[:, None] & (dims < D)[None, :])
        tl.store(d_v_at, acc_v.to(d_v.dtype.element_ty), mask=there[:, None] & (values < E)[None, :])
        if D_BIAS:
            tl.store(d_bias + line, acc_b, mask=there)
    else:
        line = (unit * pieces + piece) * K_BLOCK + inside
        kept = (inside < K_BLOCK)[:, None]
        tl.store(sum_k + line[:, None] * D + dims, acc_k, mask=kept & (dims < D)[None, :])
        tl.store(sum_v + line[:, None] * E + values, acc_v, mask=kept & (values < E)[None, :])
        if D_BIAS:
            tl.store(sum_bias + line, acc_b, mask=inside < K_BLOCK)


@triton.jit
def _readers(
    acc_k, acc_v, acc_b, k_tile, v_tile, more, row, ends, theirs, scale, begin, size, b, u, heads, tokens, blocks,
    reach, sinks, dims, values, q, d_out, delta, shift, position, group, reader,
    q_head, q_row, d_head, d_row, position_head, group_head,
    STACK: tl.constexpr, Q_BLOCK: tl.constexpr, BQ: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr, POSITION: tl.constexpr,
    CAUSAL: tl.constexpr, REACH: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr, D_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries begin .. size - 1 of the readers, STACK * Q_BLOCK a reader, BQ at a time."""
    SIZE: tl.constexpr = STACK * Q_BLOCK
    # a tile holds consecutive tokens of one head
    BLOCKED: tl.constexpr = Q_BLOCK % BQ == 0
    lanes = tl.arange(0, BQ)
    q_lanes = lanes[:, None] * q_row + dims[None, :]
    d_lanes = lanes[:, None] * d_row + values[None, :]
    if BLOCKED:
        n = tl.load(reader + begin // SIZE, mask=begin < size, other=0)
    else:
        n = tl.load(reader + (begin + lanes) // SIZE, mask=begin + lanes < size, other=0)
    for x in range(begin, size, BQ):
        if BLOCKED:
            h = u * STACK + x % SIZE // Q_BLOCK
            first = tl.multiple_of(n.to(tl.int64) * Q_BLOCK + x % Q_BLOCK, BQ)
            n = tl.load(reader + (x + BQ) // SIZE, mask=x + BQ < size, other=0)
            i = first + lanes
            asked = i < tokens
            stat = (b * heads + h) * (blocks * Q_BLOCK) + i
            shift_row, delta_row = tl.load(shift + stat), tl.load(delta + stat)
            q_at = q + (h * q_head + first * q_row) + q_lanes
            d_at = d_out + (h * d_head + first * d_row) + d_lanes
        else:
            slot = x + lanes
            h = u * STACK + slot % SIZE // Q_BLOCK
            i = n.to(tl.int64) * Q_BLOCK + slot % Q_BLOCK
            # as in _walk: not every i is a multiple of Q_BLOCK
            i = tl.multiple_of(i, 1)
            n = tl.load(reader + (slot + BQ) // SIZE, mask=slot + BQ < size, other=0)
            asked = (slot < size) & (i < tokens)
            stat = (b * heads + h) * (blocks * Q_BLOCK) + i
            shift_row = tl.load(shift + stat, mask=asked, other=float("inf"))
            delta_row = tl.load(delta + stat, mask=asked, other=0.0)
            q_at = q + h[:, None] * q_head + i[:, None] * q_row + dims
            d_at = d_out + h[:, None] * d_head + i[:, None] * d_row + values
        q_tile = _load(q_at, asked, dims, D, D_TILE, False)
        d_tile = _load(d_at, asked, values, E, E_TILE, False)
        # [BK, BQ], in units of log 2
        scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
        d_weights = tl.dot(v_tile, d_tile.T, input_precision=PRECISION)
        scores = scores * (scale * LOG2E) - shift_row[None, :]
        if BIAS:
            scores += more[:, None]
        weights = tl.exp2(scores)
        if CAUSAL or REACH or GROUP:
            at = i
            if POSITION:
                at = tl.load(position + h * position_head + i, mask=asked, other=0).to(tl.int64)
            seen = asked[None, :]
            if CAUSAL:
                seen = seen & (ends[:, None] <= at[None, :])
            if REACH:
                seen = seen & ((tl.abs(at[None, :] - ends[:, None]) < reach) | (row < sinks)[:, None])
            if GROUP:
                mine = tl.load(group + h * group_head + i, mask=asked, other=0).to(tl.int64)
                seen = seen & (theirs[:, None] == mine[None, :])
            weights = tl.where(seen, weights, 0.0)
        acc_v = tl.dot(weights.to(d_tile.dtype), d_tile, acc_v, input_precision=PRECISION)
        d_scores = weights * (d_weights - delta_row[None, :])
        acc_k = tl.dot(d_scores.to(q_tile.dtype), q_tile, acc_k, input_precision=PRECISION)
        if D_BIAS:
            acc_b += tl.sum(d_scores, 1)
    return acc_k, acc_v, acc_b


class Tiles(NamedTuple):
    """How one kernel cuts its work: queries and rows of a tile, warps, stages, registers a thread (None: any)."""

    queries: int
    rows: int
    warps: int
    stages: int
    registers: int | None = None


def _float32_tiles(wide: int, size: int) -> Tiles:
    """IEEE products run in registers, a whole row of D or E of either operand at a time: wide tiles spill."""
    if wide > 128:
        return Tiles(16, 16, 8, 1)
    return Tiles(min(size, 32), 32, 8, 1) if wide > 64 else Tiles(min(size, 32), 32, 4, 2)


@cache
def query_tiles(wide: int, size: int, dtype: torch.dtype, shares: bool) -> Tiles:
    """For attend_backward_queries: `size` queries share a list, `wide` is the wider of key and value tile."""
    if dtype == torch.float32:
        return _float32_tiles(wide, size)
    if wide > 128:
        return Tiles(min(size, 64), 32, 8 if size >= 64 else 4, 2)
    if shares:
        # bound by latency: small tiles, so that many programs are at work
        return Tiles(min(size, 128), 32, 8 if size >= 128 else 4, 2)
    if wide <= 64:
        # three programs a multiprocessor
        return Tiles(min(size, 64), 64, 4, 3, 168 if size >= 64 else None)
    return Tiles(min(size, 128), 64, 8 if size >= 64 else 4, 3)


@cache
def row_tiles(wide: int, k_block: int, size: int, dtype: torch.dtype) -> Tiles:
    """For attend_backward_rows: `size` queries read a block of `k_block` rows at a time."""
    if dtype == torch.float32:
        return _float32_tiles(wide, size)
    if wide > 128:
        return Tiles(min(size, 32), min(k_block, 64), 8 if k_block >= 64 else 4, 2)
    if k_block >= 128:
        return Tiles(min(size, 64 if wide <= 64 else 32), 128, 8, 3)
    return Tiles(min(size, 64 if wide <= 64 else 32), k_block, 8 if k_block == 64 and wide == 128 else 4, 2)


def attend_backward(
    call: Call, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> list[Tensor]:
    """Gradients of q, each k, each v and each bias (0 without `bias_grad`); the contract is cpu.attend.backward's.

    No `d_lse` stands for zeros.
    """
    if attend_listed.wants(call):
        return [*attend_listed_backward(call, d_out, d_lse, out, lse), torch.zeros_like(call.bias[0])]
    sources, d_q, grads = gradients(call, d_out, d_lse, out, lse, bias_grad)
    return gather(call, d_q, kept(sources, grads))


def gradients(
    call: Call, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool,
    read: Sequence[Readers] | None = None,
) -> tuple[list[Source], Tensor, list[Three]]:  # fmt: skip
    """The sources, dq, and each source's dk, dv and bias gradient unit by unit. `read`: the lists, transposed."""
    # the host is as slow as the GPU at short lengths: everything here is asked for once
    q, k, _, bias, _, _, position, group, index, _, plans, scale = call
    batch, heads, tokens, width = q.shape
    value_width = d_out.shape[-1]
    kv_heads = k[0].shape[1]
    # query heads of one key head share a tile unless their lists or biases differ
    shared = heads == kv_heads or (
        all(x.shape[1] == 1 for x in index)
        and all(x.dim() == 1 or x.shape[1] in (1, kv_heads) for x in bias)
        and all(x.shape[1] == kv_heads for x in k)
    )
    units = kv_heads if shared else heads
    stack, q_block = heads // units, min(plans[0].q_block, padded(tokens))
    blocks = index[0].shape[2]
    sources = [_source_of(call, s, units, bias_grad) for s in range(len(k))]
    dtype, device = q.dtype, q.device
    d_q = torch.empty(q.shape, dtype=dtype, device=device)
    delta = torch.empty(batch, heads, blocks * q_block, dtype=torch.float32, device=device)
    grads = [_empty(s, batch, units, delta) for s in sources]
    if not (batch and tokens and blocks):
        for grad in grads:
            for x in grad:
                x.zero_()
        return sources, d_q.zero_(), grads

    shift = torch.empty(batch, heads, blocks * q_block, dtype=torch.float32, device=device)
    size = padded(stack * q_block)
    d_tile, e_tile = padded(width), padded(value_width)
    wide = max(d_tile, e_tile)
    first, last = sources[0], sources[-1]
    (q, q_strides), (d_out, d_out_strides) = _dense(q), _dense(d_out)
    out, lse = out.contiguous(), lse.contiguous()
    if d_lse is not None:
        d_lse = d_lse.contiguous()
    position, position_strides = _per_head(position, heads)
    group, group_strides = _per_head(group, heads)
    positioned, grouped = position.dim() > 1, group.dim() > 1

    read = _readers_of(call) if read is None else read
    plain = not (first.reach or first.biased or first.ended or first.grouped or grouped)
    # beside few blocks a launch of their own would read the queries once more for little
    long = last.small and not first.small and first.picks >= LONG
    runs = long and not (positioned or grouped) and hopper_runs.wants_runs(q, d_out, out, first, last, q_block, stack)
    asked = list(zip(sources, grads, read, strict=True))
    hoppers = hopper_queries.wants_queries(q, d_out, out, first.k, first.v, first.plan.k_block, q_block)
    if runs:
        # dk and dv of the blocks are left to the row kernel
        asked, long = asked[1:], False
    elif plain and hoppers and (long or len(sources) == 1):
        hopper_queries.queries_backward(
            q, d_out, out, first.k, first.v, d_q, delta, shift, lse, d_lse, first.index, first.count, first.lists,
            q_block=q_block, k_block=first.plan.k_block, stack=stack, repeat=first.repeat, causal=first.causal,
            scale=scale, position=position if positioned and first.causal else None, position_strides=position_strides,
        )  # fmt: skip
        asked, long = asked[1:], False
    tiles = query_tiles(wide, size, dtype, first.small or last.small)
    lists = -(-stack * q_block // tiles.queries)
    rows = tiles.rows
    if long and wide <= 64 and dtype != torch.float32 and size == 64:
        rows, tiles = LONG_ROWS, tiles._replace(registers=LONG_REGISTERS)
    if runs:
        lists = stack * q_block // 64
    here = [s for s, _, _ in asked]
    for begin, stop in slices_of(sources, batch * units, lists * blocks) if here else ():
        count = (stop - begin) * blocks * lists
        shares = [shares_of(s, count, d_q, delta) for s in here]
        if runs:
            hopper_runs.runs_backward(
                q, d_out, out, d_q, delta, shift, lse, d_lse, first, last, shares[0], begin=begin, stop=stop,
                q_block=q_block, stack=stack, units=units, blocks=blocks, scale=scale,
            )  # fmt: skip
        else:
            start(
                attend_backward_queries, (count,),
                q, out, d_out, lse, d_lse, position, group, d_q, delta, shift,
                *here[0][:7], *shares[0], *last[:7], *shares[-1],
                q_strides, d_out_strides, *position_strides, *group_strides, *here[0].strides, *here[0].lists,
                *last.strides, *last.lists,
                begin, heads, tokens, blocks, here[0].rows, here[0].picks, here[0].plan.reach, here[0].plan.sinks,
                last.rows, last.picks, last.plan.reach, last.plan.sinks, scale,
                STACK=stack, Q_BLOCK=q_block, BQ=tiles.queries, SOURCES=len(here),
                REPEAT0=here[0].repeat, K_BLOCK0=here[0].plan.k_block, BK0=rows,
                REPEAT1=last.repeat, K_BLOCK1=last.plan.k_block, BK1=tiles.rows,
                D=width, E=value_width, D_TILE=d_tile, E_TILE=e_tile, POSITION=positioned, GROUP=grouped,
                CAUSAL0=here[0].causal, REACH0=here[0].reach, BIAS0=here[0].biased, END0=here[0].ended,
                GROUP0=here[0].grouped, SHARES0=here[0].small, D_BIAS0=here[0].small and here[0].d_bias,
                CAUSAL1=last.causal, REACH1=last.reach, BIAS1=last.biased, END1=last.ended, GROUP1=last.grouped,
                SHARES1=last.small, D_BIAS1=last.small and last.d_bias, LONG=long, MORE=len(here) < len(sources),
                PRECISION="ieee", num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
            )  # fmt: skip
        for (s, grad, readers), share in zip(asked, shares, strict=True):
            if s.small and s.rows:
                add_up(s, share, grad, readers, begin, stop, units, blocks, lists, delta)
    for s, grad, readers in zip(sources, grads, read, strict=True):
        if s.small or not s.rows:
            continue
        plan, k_block = s.plan, s.plan.k_block
        pieces = pieces_of(s, batch * units * readers.pieces, delta)
        plain = not (grouped or s.reach or s.biased or s.ended or s.grouped)
        if plain and hopper.wants_rows(q, d_out, s.k, s.v, k_block, q_block, stack):
            hopper.rows_backward(
                q, d_out, s.k, s.v, shift, delta, readers, _zero(delta), grad[:2], pieces[:2], q_block=q_block,
                k_block=k_block, stack=stack, repeat=s.repeat, blocks=blocks, causal=s.causal, scale=scale,
                position=position if positioned and s.causal else None,
            )  # fmt: skip
        else:
            tiles = row_tiles(wide, padded(k_block), size, dtype)
            k_tiles = -(-k_block // tiles.rows)
            start(
                attend_backward_rows, (batch * units * (s.row_blocks + readers.pieces) * k_tiles,),
                q, d_out, delta, shift, position, group, *s[:5], readers.start, readers.reader, readers.key,
                *grad, *pieces, q_strides, d_out_strides, *position_strides, *group_strides, *s.strides,
                *readers.strides, heads, tokens, blocks, s.rows, s.row_blocks, readers.pieces, readers.most,
                readers.base, plan.reach, plan.sinks, scale,
                STACK=stack, Q_BLOCK=q_block, BQ=tiles.queries, REPEAT=s.repeat, K_BLOCK=k_block, BK=tiles.rows,
                D=width, E=value_width, D_TILE=d_tile, E_TILE=e_tile, POSITION=positioned,
                CAUSAL=s.causal, REACH=s.reach, BIAS=s.biased, END=s.ended, GROUP=s.grouped, D_BIAS=s.d_bias,
                PRECISION="ieee", num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
            )  # fmt: skip
        join_pieces(s, pieces, grad, readers, 0, batch * units, units)
    return sources, d_q, grads


def _source_of(call: Call, s: int, units: int, bias_grad: bool) -> Source:
    plan, bias = call.plans[s], call.bias[s]
    _, kv_heads, rows, _ = call.k[s].shape
    biased = bias.dim() > 1
    if biased and bias.dtype != torch.float32:
        bias = bias.float()
    k, k_strides = _dense(call.k[s])
    v, v_strides = _dense(call.v[s])
    bias, bias_strides = _per_head(bias, units)
    end, end_strides = _per_head(call.end[s], kv_heads)
    group, group_strides = _per_head(call.row_group[s], kv_heads)
    index, count = call.index[s].contiguous(), call.count[s].contiguous()
    batches, lists, blocks, picks = index.shape
    return Source(
        k, v, bias, end, group, index, count,
        (_apart(k, k_strides), _apart(v, v_strides), *bias_strides, *end_strides, *group_strides),
        (lists * blocks if batches > 1 else 0, blocks if lists > 1 else 0),
        plan, rows, -(-rows // plan.k_block), picks, units // kv_heads, plan.k_block < SMALL,
        bool(plan.causal), plan.reach >= 0, biased, end.dim() > 1, group.dim() > 1, biased and bias_grad,
    )  # fmt: skip


def dense(x: Tensor) -> Tensor:
    """The tensor, or a copy that the kernels can read."""
    return _dense(x)[0]


def _dense(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Rows without gaps, near enough to each other for 32 bits within a tile, and their strides."""
    strides = x.stride()
    if (strides[3] == 1 or x.shape[3] == 1) and strides[2] < FAR:
        return x, strides
    x = x.contiguous()
    return x, x.stride()


def _per_head(x: Tensor, heads: int) -> tuple[Tensor, tuple[int, int]]:
    """A [1|B, 1|heads, ...] tensor, and strides over both to read it as [B, heads, ...]; an absent one stays as is."""
    if x.dim() == 1:
        return x, (0, 0)
    if x.shape[1] not in (1, heads):
        x = x.repeat_interleave(heads // x.shape[1], 1)
    strides = x.stride()
    if strides[-1] != 1:
        x = x.contiguous()
        strides = x.stride()
    return x, _apart(x, strides)[:2]


def _apart(x: Tensor, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, 0 where all batches or heads share one: those would change with the length, and with them the kernel."""
    batches, heads = x.shape[:2]
    if batches > 1 and heads > 1:
        return strides
    return (strides[0] if batches > 1 else 0, strides[1] if heads > 1 else 0, *strides[2:])


def _empty(source: Source, batch: int, units: int, delta: Tensor) -> Three:
    """Where dk, dv and the bias gradient of each unit go; float32 where units are still to be added up."""
    k, v, rows = source.k, source.v, source.rows
    dtype, device = k.dtype if source.repeat == 1 else torch.float32, k.device
    return (
        torch.empty(batch, units, rows, k.shape[3], dtype=dtype, device=device),
        torch.empty(batch, units, rows, v.shape[3], dtype=dtype, device=device),
        torch.empty(batch, units, rows, dtype=torch.float32, device=device) if source.d_bias else delta,
    )


def kept(sources: list[Source], grads: list[Three]) -> list[Sequence[Tensor]]:
    """dk, dv and, where it is asked for, the bias gradient of each source."""
    return [grad[: 2 + s.d_bias] for s, grad in zip(sources, grads, strict=True)]


def gather(call: Call, d_q: Tensor, grads: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What is `kept` in the shapes and dtypes of the inputs."""
    d_k, d_v, d_bias = [], [], []
    for (k, v, *bias), like_k, like_v, like in zip(grads, call.k, call.v, call.bias, strict=True):
        d_k.append(_added_up(k, like_k))
        d_v.append(_added_up(v, like_v))
        d_bias.append(_added_up(bias[0], like) if bias else torch.zeros_like(like))
    return [d_q, *d_k, *d_v, *d_bias]


def _added_up(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[1] != like.shape[1]:
        x = x.unflatten(1, (like.shape[1], -1)).sum(2)
    return (x.sum(0, keepdim=True) if x.shape[0] != like.shape[0] else x).to(like.dtype)


def counts(call: Call) -> bool:
    """Whether `gradients` finds the readers without a sort."""
    return all(m > 0 and transpose.counts(x, m) for x, m in zip(call.index, _row_blocks(call), strict=True))


def _readers_of(call: Call) -> list[Readers]:
    """The readers of every source."""
    if not counts(call):
        return sorted_readers(call, *list_keys(call).sort(stable=True))
    found = []
    for index, count, plan, row_blocks in zip(call.index, call.count, call.plans, _row_blocks(call), strict=True):
        small = plan.k_block < SMALL
        most = piece(small, index.shape, row_blocks)
        found.append(transpose.counted(index, count, row_blocks, most, by_entry=small, apart=True))
    return found


def list_keys(call: Call) -> Tensor:
    """What is to be sorted for the readers of the sources' row blocks."""
    return keys_of(call.index, call.count, _row_blocks(call))


def sorted_readers(call: Call, ordered: Tensor, order: Tensor) -> list[Readers]:
    """The readers of every source, once `list_keys` are sorted."""
    shapes, row_blocks = [x.shape for x in call.index], _row_blocks(call)
    small = [p.k_block < SMALL for p in call.plans]
    return readers_of(ordered, order, shapes, row_blocks, small, list(map(piece, small, shapes, row_blocks)))


def piece(small: bool, lists: Sequence[int], row_blocks: int) -> int:
    """Readers of a row block that are added up together, of lists [B, H, N, P] that name so many row blocks; even."""
    # a row block read twice as often as the average is no burden yet, and a larger one none where many others follow
    often = 2 if small else 2 * max(1, min(4, lists[0] * lists[1] * row_blocks // MANY))
    return max(PIECE if small else READS, often * -(-lists[2] * lists[3] // max(row_blocks, 1)))


def _row_blocks(call: Call) -> list[int]:
    return [-(-k.shape[2] // p.k_block) for k, p in zip(call.k, call.plans, strict=True)]


def _zero(delta: Tensor) -> Tensor:
    """An integer, 0; by a launch that can be recorded."""
    zero = torch.empty(1, dtype=torch.int32, device=delta.device)
    start(clear, (1,), zero, 1, SIZE=4096)
    return zero
