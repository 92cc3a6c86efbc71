"""Pooling on the GPU: k and v are read once, and every level of the pyramid comes out.

Rows of all levels are numbered from the start of the sequence: row r of height h stands for the tokens
r * SEG << h .. (r + 1) * (SEG << h) - 1, SEG = block / rank, so that rows 2r and 2r + 1 have the mean r one height up.
Learned filters make the `RANK` rows of a group of the 2 RANK rows of its two children, a product with a matrix that
has the filter along its diagonal.

Forward: a program sums the segments of CHUNK rows over BD columns of k or v, and lifts them LIFTS heights in
registers, in float32; `pool_climb` makes what is above. Backward: what the far rows of all heights over a token hold
is added to the gradient that the token got from being read itself. Means need no order of the heights: one launch.
Filters go down height by height: `pool_descend` where the forward climbs, then the chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.ops.pool import Tree

LN2 = tl.constexpr(0.6931471805599453)

# what varies with the length must not make another kernel
VARIES = ["kv_heads", "tokens", "lo", "hi", "lead", "blocks", "levels", "rows", "chunks", "tops"]


@triton.jit
def _count(row, width, lo, hi):
    """Tokens in lo .. hi - 1 of each row of so many tokens."""
    start = row * width
    return tl.maximum(tl.minimum(start + width, hi) - tl.maximum(start, lo), 0)


@triton.jit
def _level(lead, blocks, RANK: tl.constexpr, UP: tl.constexpr, height):
    """First row of a level in the buffer of all levels, and how many groups it has."""
    at, groups = lead, blocks
    for _ in range(height):
        at += groups * RANK
        groups = (groups + UP) >> 1
    return at.to(tl.int64), groups


@triton.jit
def _weights(filters, row, width, parents, lo, hi, RANK: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """[OUT, IN]: what row `row` + c of `width` tokens gives its group's parent row i, of so many parents."""
    i, c = tl.arange(0, OUT)[:, None], tl.arange(0, IN)[None, :]
    pair = i // RANK
    own = (pair == c // (2 * RANK)) & (i < parents) & (c < 2 * parents)
    f = tl.load(filters + (i % RANK) * (2 * RANK) + c % (2 * RANK), mask=own, other=0.0)
    # a group that lacks some of its rows is not what the filter has learned: its mean
    first, last = row + pair * (2 * RANK), row + pair * (2 * RANK) + 2 * RANK - 1
    whole = (_count(first, width, lo, hi) > 0) & (_count(last, width, lo, hi) > 0)
    total = _count(row + 2 * i, width, lo, hi) + _count(row + 2 * i + 1, width, lo, hi)
    share = _count(row + c, width, lo, hi).to(tl.float32) / tl.maximum(total, 1).to(tl.float32)
    return tl.where(whole, f, tl.where((c // 2 == i) & own, share, 0.0))


@triton.jit
def _taught(row, width, parents, lo, hi, RANK: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr):
    """[OUT, IN]: where `_weights` took the filter."""
    i, c = tl.arange(0, OUT)[:, None], tl.arange(0, IN)[None, :]
    pair = i // RANK
    first, last = row + pair * (2 * RANK), row + pair * (2 * RANK) + 2 * RANK - 1
    whole = (_count(first, width, lo, hi) > 0) & (_count(last, width, lo, hi) > 0)
    return whole & (pair == c // (2 * RANK)) & (i < parents) & (c < 2 * parents)


@triton.jit
def _store(
    x, far, bias, span, row, valid, at, width, cols, lo, hi, rows, D: tl.constexpr, LEARNED: tl.constexpr, about
):  # fmt: skip
    """Rows of one height, from the sums of their tokens or (learned) as they are; `about`: and what they stand for."""
    count = _count(row, width, lo, hi)
    if not LEARNED:
        x = x / tl.maximum(count, 1).to(tl.float32)[:, None]
    tl.store(far + (at + row)[:, None] * D + cols, x.to(far.dtype.element_ty), mask=valid[:, None] & (cols < D))
    if about:
        # a row of no tokens is hidden
        known = tl.log2(tl.maximum(count, 1).to(tl.float32)) * LN2
        tl.store(bias + at + row, tl.where(count > 0, known, float("-inf")), mask=valid)
        tl.store(span + at + row, row * width, mask=valid)
        tl.store(span + rows + at + row, (row + 1) * width - 1, mask=valid)


@triton.jit
def _lift(x, filters, row, width, parents, lo, hi, RANK: tl.constexpr, LEARNED: tl.constexpr, PRECISION: tl.constexpr):
    """One height up. Products take tiles of 16 rows at least: what is beyond the parents is 0."""
    if LEARNED:
        OUT: tl.constexpr = x.shape[0] // 2 if x.shape[0] > 32 else 16
        w = _weights(filters, row, width, parents, lo, hi, RANK, OUT, x.shape[0])
        return tl.dot(w, x, input_precision=PRECISION)
    else:
        return tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), 1)


@triton.jit
def _chunk_forward(
    x, far, filters, bias, span, scratch, chunk, column, lo, hi, lead, blocks, levels, rows, token_stride, about,
    width: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, CHUNK: tl.constexpr,
    LIFTS: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr, UP: tl.constexpr, LEARNED: tl.constexpr,
    MORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = column * BD + tl.arange(0, BD)
    inside = cols < D
    TILE: tl.constexpr = 16 if LEARNED and CHUNK < 16 else CHUNK
    slot = tl.arange(0, TILE)
    row = chunk * CHUNK + slot
    acc = tl.zeros([TILE, BD], tl.float32)
    for t in tl.range(0, SEG, loop_unroll_factor=UNROLL):
        token = row * SEG + t
        there = (token >= lo) & (token < hi) & (slot < CHUNK)
        acc += tl.load(x + token[:, None] * token_stride + cols, mask=there[:, None] & inside, other=0.0).to(tl.float32)
    if LEARNED:
        acc = acc / tl.maximum(_count(row, SEG, lo, hi), 1).to(tl.float32)[:, None]

    at, groups = lead.to(tl.int64), blocks
    for h in tl.static_range(0, LIFTS + 1):
        if h > 0:
            below = chunk * (CHUNK >> (h - 1))
            acc = _lift(acc, filters, below, SEG << (h - 1), CHUNK >> h, lo, hi, RANK, LEARNED, PRECISION)
        slot = tl.arange(0, acc.shape[0])
        row = chunk * (CHUNK >> h) + slot
        valid = (slot < (CHUNK >> h)) & (row < groups * RANK) & (h < levels)
        _store(acc, far, bias, span, row, valid, at, SEG << h, cols, lo, hi, rows, D, LEARNED, about)
        at += groups * RANK
        groups = (groups + UP) >> 1
    if MORE:
        slot = tl.arange(0, acc.shape[0])
        row = chunk * (CHUNK >> LIFTS) + slot
        tl.store(scratch + row[:, None] * width + cols, acc, mask=(slot < (CHUNK >> LIFTS))[:, None] & inside)

    if chunk == 0:
        # the tokens before lo as they are, filled up with 0 to whole groups
        for start in range(0, lead, 16):
            sink = start + tl.arange(0, 16)
            copied = (sink < lo)[:, None] & inside
            tile = tl.load(x + sink.to(tl.int64)[:, None] * token_stride + cols, mask=copied, other=0.0)
            tl.store(far + sink[:, None] * D + cols, tile, mask=(sink < lead)[:, None] & inside)
            if about:
                tl.store(bias + sink, tl.where(sink < lo, 0.0, float("-inf")), mask=sink < lead)
                tl.store(span + sink, sink.to(tl.int64), mask=sink < lead)
                tl.store(span + rows + sink, sink.to(tl.int64), mask=sink < lead)


@triton.jit(do_not_specialize=VARIES)
def pool_forward(
    k, v, filters, far_k, far_v, bias, span, scratch, k_strides, v_strides,
    kv_heads, lo, hi, lead, blocks, levels, rows, chunks, tops,
    D: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, CHUNK: tl.constexpr, LIFTS: tl.constexpr,
    BD: tl.constexpr, UNROLL: tl.constexpr, UP: tl.constexpr, LEARNED: tl.constexpr, MORE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    K_SLICES: tl.constexpr = (D + BD - 1) // BD
    SLICES: tl.constexpr = K_SLICES + (E + BD - 1) // BD
    # int64: token * stride passes 2**31 at long context; the columns of one token side by side
    pid = tl.program_id(0).to(tl.int64)
    part, chunk, unit = pid % SLICES, pid // SLICES % chunks, pid // SLICES // chunks
    b, g = unit // kv_heads, unit % kv_heads
    scratch += unit * tops * (D + E)
    filters += g * (2 * RANK * RANK)
    if part < K_SLICES:
        _chunk_forward(
            k + b * k_strides[0] + g * k_strides[1], far_k + unit * rows * D, filters, bias, span, scratch,
            chunk, part, lo, hi, lead, blocks, levels, rows, k_strides[2], (unit == 0) & (part == 0),
            D + E, D, RANK, SEG, CHUNK, LIFTS, BD, UNROLL, UP, LEARNED, MORE, PRECISION,
        )  # fmt: skip
    else:
        _chunk_forward(
            v + b * v_strides[0] + g * v_strides[1], far_v + unit * rows * E,
            filters + kv_heads * (2 * RANK * RANK), bias, span, scratch + D,
            chunk, part - K_SLICES, lo, hi, lead, blocks, levels, rows, v_strides[2], False,
            D + E, E, RANK, SEG, CHUNK, LIFTS, BD, UNROLL, UP, LEARNED, MORE, PRECISION,
        )  # fmt: skip


@triton.jit
def _climb(
    far, filters, bias, span, scratch, column, lo, hi, lead, blocks, levels, rows, chunks, about,
    width: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, LIFTS: tl.constexpr,
    TILE: tl.constexpr, BD: tl.constexpr, UP: tl.constexpr, LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # rows that the chunks left for each of them
    UNIT: tl.constexpr = RANK if LEARNED else 1
    cols = column * BD + tl.arange(0, BD)
    inside = cols < D
    at, groups = _level(lead, blocks, RANK, UP, LIFTS + 1)
    n, below = chunks * UNIT, 0
    tokens = tl.full([], SEG << LIFTS, tl.int64)
    for _ in range(LIFTS + 1, levels):
        above = (n // UNIT + 1) // 2 * UNIT
        for start in range(0, above, TILE):
            child = 2 * start + tl.arange(0, 2 * TILE)
            source = scratch + (below + child).to(tl.int64)[:, None] * width + cols
            x = tl.load(source, mask=(child < n)[:, None] & inside, other=0.0)
            x = _lift(x, filters, tl.full([], 2, tl.int64) * start, tokens, TILE, lo, hi, RANK, LEARNED, PRECISION)
            row = start + tl.arange(0, TILE)
            target = scratch + (below + n + row).to(tl.int64)[:, None] * width + cols
            tl.store(target, x, mask=(row < above)[:, None] & inside)
            row = row.to(tl.int64)
            _store(x, far, bias, span, row, row < groups * RANK, at, 2 * tokens, cols, lo, hi, rows, D, LEARNED, about)
        # the next height reads what other threads have just written
        tl.debug_barrier()
        below += n
        n = above
        at += groups * RANK
        groups = (groups + UP) >> 1
        tokens *= 2


@triton.jit(do_not_specialize=VARIES)
def pool_climb(
    filters, far_k, far_v, bias, span, scratch, kv_heads, lo, hi, lead, blocks, levels, rows, chunks, tops,
    D: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, LIFTS: tl.constexpr, TILE: tl.constexpr,
    BD: tl.constexpr, UP: tl.constexpr, LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The heights above LIFTS, one program for all rows of some columns."""
    K_SLICES: tl.constexpr = (D + BD - 1) // BD
    SLICES: tl.constexpr = K_SLICES + (E + BD - 1) // BD
    pid = tl.program_id(0).to(tl.int64)
    part, unit = pid % SLICES, pid // SLICES
    scratch += unit * tops * (D + E)
    filters += unit % kv_heads * (2 * RANK * RANK)
    if part < K_SLICES:
        _climb(
            far_k + unit * rows * D, filters, bias, span, scratch, part, lo, hi, lead, blocks, levels, rows, chunks,
            (unit == 0) & (part == 0), D + E, D, RANK, SEG, LIFTS, TILE, BD, UP, LEARNED, PRECISION,
        )  # fmt: skip
    else:
        _climb(
            far_v + unit * rows * E, filters + kv_heads * (2 * RANK * RANK), bias, span, scratch + D, part - K_SLICES,
            lo, hi, lead, blocks, levels, rows, chunks,
            False, D + E, E, RANK, SEG, LIFTS, TILE, BD, UP, LEARNED, PRECISION,
        )  # fmt: skip


@triton.jit
def _grad_rows(d_far, at, row, valid, cols, D: tl.constexpr):
    """Gradients of far rows of one height, 0 where there are none."""
    mask = valid[:, None] & (cols < D)
    return tl.load(d_far + (at + row)[:, None] * D + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _outer(x, far, at, row, valid, taught, cols, D: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """[RANK, 2 RANK]: the gradient of a filter from parents' gradients x and their children, summed over the pairs."""
    child = _grad_rows(far, at, row, valid, cols, D)
    each = tl.where(taught, tl.dot(x, tl.trans(child), input_precision=PRECISION), 0.0)
    pairs = tl.reshape(each, [x.shape[0] // RANK, RANK, child.shape[0] // (2 * RANK), 2 * RANK])
    return tl.sum(tl.sum(pairs, 2), 0)


@triton.jit
def _lower(
    x, d_far, far, filters, chunk, cols, lo, hi, lead, blocks, levels,
    D: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr, UP: tl.constexpr,
    LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's gradients of height H from those of height H + 1, and of the filter; means: divided by the tokens."""
    ROWS: tl.constexpr = CHUNK >> H
    TILE: tl.constexpr = 16 if LEARNED and ROWS < 16 else ROWS
    slot = tl.arange(0, TILE)
    row = chunk * ROWS + slot
    at, groups = _level(lead, blocks, RANK, UP, H)
    valid = (slot < ROWS) & (row < groups * RANK) & (levels > H)
    own = _grad_rows(d_far, at, row, valid, cols, D)
    if LEARNED:
        OUT: tl.constexpr = x.shape[0]
        w = _weights(filters, chunk * ROWS, SEG << H, ROWS // 2, lo, hi, RANK, OUT, TILE)
        taught = _taught(chunk * ROWS, SEG << H, ROWS // 2, lo, hi, RANK, OUT, TILE)
        more = _outer(x, far, at, row, valid, taught, cols, D, RANK, PRECISION)
        return own + tl.dot(tl.trans(w), x, input_precision=PRECISION), more
    else:
        x = tl.reshape(tl.broadcast_to(x[:, None, :], [ROWS // 2, 2, x.shape[1]]), [ROWS, x.shape[1]])
        return x + own / tl.maximum(_count(row, SEG << H, lo, hi), 1).to(tl.float32)[:, None], 0.0


@triton.jit
def _chunk_backward(
    near, d_far, far, filters, out, part, scratch, chunk, column, tokens, lo, hi, lead, blocks, levels, token_stride,
    width: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, CHUNK: tl.constexpr,
    LIFTS: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, UP: tl.constexpr, LEARNED: tl.constexpr,
    MORE: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = column * BD + tl.arange(0, BD)
    inside = cols < D
    if LEARNED:
        TOP: tl.constexpr = CHUNK >> LIFTS
        TILE: tl.constexpr = TOP if TOP > 16 else 16
        slot = tl.arange(0, TILE)
        row = chunk * TOP + slot
        if MORE:
            x = tl.load(scratch + row[:, None] * width + cols, mask=(slot < TOP)[:, None] & inside, other=0.0)
        else:
            at, groups = _level(lead, blocks, RANK, UP, LIFTS)
            x = _grad_rows(d_far, at, row, (slot < TOP) & (row < groups * RANK) & (levels > LIFTS), cols, D)
        taken = tl.zeros([RANK, 2 * RANK], tl.float32)
    else:
        # one row of each height from LIFTS on lies over the whole chunk: all at once
        height = tl.arange(0, 32)
        groups = (blocks.to(tl.int64) + UP * ((tl.full([32], 1, tl.int64) << height) - 1)) >> height
        at = lead + RANK * (tl.cumsum(groups, 0) - groups)
        row = chunk >> tl.maximum(height - LIFTS, 0)
        count = _count(row, tl.full([32], SEG, tl.int64) << height, lo, hi)
        valid = (height >= LIFTS) & (height < levels) & (row < groups * RANK)
        x = _grad_rows(d_far, at, row, valid, cols, D) / tl.maximum(count, 1).to(tl.float32)[:, None]
        x = tl.sum(x, 0)[None, :]

    for down in tl.static_range(0, LIFTS):
        x, more = _lower(
            x, d_far, far, filters, chunk, cols, lo, hi, lead, blocks, levels,
            D, RANK, SEG, CHUNK, LIFTS - 1 - down, UP, LEARNED, PRECISION,
        )  # fmt: skip
        if LEARNED:
            taken += more

    slot = tl.arange(0, x.shape[0])
    row = chunk * CHUNK + slot
    if LEARNED:
        x = x / tl.maximum(_count(row, SEG, lo, hi), 1).to(tl.float32)[:, None]
        i, c = tl.arange(0, RANK)[:, None], tl.arange(0, 2 * RANK)[None, :]
        tl.store(part + i * (2 * RANK) + c, taken)
    x = x[:, None, :]
    for t in range(0, SEG, STEP):
        step = t + tl.arange(0, STEP)
        token = row[:, None] * SEG + step[None, :]
        there = ((slot < CHUNK)[:, None] & (step < SEG)[None, :] & (token < tokens))[:, :, None] & inside[None, None, :]
        counted = (token >= lo) & (token < hi)
        grad = tl.where(counted[:, :, None], x, 0.0)
        if NEAR:
            source = near + token[:, :, None] * token_stride + cols[None, None, :]
            grad += tl.load(source, mask=there, other=0.0).to(tl.float32)
        if lead > 0:
            sink = there & (token < lo)[:, :, None]
            grad += tl.load(d_far + token[:, :, None] * D + cols[None, None, :], mask=sink, other=0.0).to(tl.float32)
        target = out + token[:, :, None] * D + cols[None, None, :]
        tl.store(target, grad.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=VARIES)
def pool_backward(
    near_k, near_v, d_far_k, d_far_v, far_k, far_v, filters, d_k, d_v, part, scratch, near_k_strides, near_v_strides,
    kv_heads, tokens, lo, hi, lead, blocks, levels, rows, chunks, tops,
    D: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, CHUNK: tl.constexpr, LIFTS: tl.constexpr,
    BD: tl.constexpr, STEP: tl.constexpr, UP: tl.constexpr, LEARNED: tl.constexpr, MORE: tl.constexpr,
    NEAR_K: tl.constexpr, NEAR_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K_SLICES: tl.constexpr = (D + BD - 1) // BD
    SLICES: tl.constexpr = K_SLICES + (E + BD - 1) // BD
    pid = tl.program_id(0).to(tl.int64)
    piece, chunk, unit = pid % SLICES, pid // SLICES % chunks, pid // SLICES // chunks
    b, g = unit // kv_heads, unit % kv_heads
    scratch += unit * tops * (D + E)
    filters += g * (2 * RANK * RANK)
    # [unit, chunk, slice]: the last chunk of a unit is what pool_descend adds
    part += ((unit * (chunks + 1) + chunk) * SLICES + piece) * (2 * RANK * RANK)
    if piece < K_SLICES:
        _chunk_backward(
            near_k + b * near_k_strides[0] + g * near_k_strides[1], d_far_k + unit * rows * D, far_k + unit * rows * D,
            filters, d_k + unit * tokens * D, part, scratch,
            chunk, piece, tokens, lo, hi, lead, blocks, levels, near_k_strides[2],
            D + E, D, RANK, SEG, CHUNK, LIFTS, BD, STEP, UP, LEARNED, MORE, NEAR_K, PRECISION,
        )  # fmt: skip
    else:
        _chunk_backward(
            near_v + b * near_v_strides[0] + g * near_v_strides[1], d_far_v + unit * rows * E, far_v + unit * rows * E,
            filters + kv_heads * (2 * RANK * RANK), d_v + unit * tokens * E, part, scratch + D,
            chunk, piece - K_SLICES, tokens, lo, hi, lead, blocks, levels, near_v_strides[2],
            D + E, E, RANK, SEG, CHUNK, LIFTS, BD, STEP, UP, LEARNED, MORE, NEAR_V, PRECISION,
        )  # fmt: skip


@triton.jit
def _descend(
    d_far, far, filters, part, scratch, column, lo, hi, lead, blocks, levels, chunks,
    width: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, LIFTS: tl.constexpr,
    TILE: tl.constexpr, BD: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = column * BD + tl.arange(0, BD)
    inside = cols < D
    taken = tl.zeros([RANK, 2 * RANK], tl.float32)
    for down in range(levels - LIFTS - 1):
        # from parents of height h + 1 to children of height h
        h = levels - 2 - down
        n, below = chunks, 0
        for _ in range(LIFTS, h):
            below += n * RANK
            n = (n + 1) // 2
        at, groups = _level(lead, blocks, RANK, UP, h)
        at_above, groups_above = at + groups * RANK, (groups + UP) >> 1
        tokens = tl.full([], SEG, tl.int64) << h
        above = (n + 1) // 2 * RANK
        n = n * RANK
        for start in range(0, above, TILE):
            row = start + tl.arange(0, TILE)
            if down == 0:
                x = _grad_rows(d_far, at_above, row, row < groups_above * RANK, cols, D)
            else:
                source = scratch + (below + n + row).to(tl.int64)[:, None] * width + cols
                x = tl.load(source, mask=(row < above)[:, None] & inside, other=0.0)
            first = tl.full([], 2, tl.int64) * start
            child = first + tl.arange(0, 2 * TILE)
            valid = child < groups * RANK
            w = _weights(filters, first, tokens, TILE, lo, hi, RANK, TILE, 2 * TILE)
            taught = _taught(first, tokens, TILE, lo, hi, RANK, TILE, 2 * TILE)
            taken += _outer(x, far, at, child, valid, taught, cols, D, RANK, PRECISION)
            x = _grad_rows(d_far, at, child, valid, cols, D) + tl.dot(tl.trans(w), x, input_precision=PRECISION)
            tl.store(scratch + (below + child)[:, None] * width + cols, x, mask=(child < n)[:, None] & inside)
        # the next height reads what other threads have just written
        tl.debug_barrier()
    i, c = tl.arange(0, RANK)[:, None], tl.arange(0, 2 * RANK)[None, :]
    tl.store(part + i * (2 * RANK) + c, taken)


@triton.jit(do_not_specialize=VARIES)
def pool_descend(
    d_far_k, d_far_v, far_k, far_v, filters, part, scratch, kv_heads, lo, hi, lead, blocks, levels, rows, chunks, tops,
    D: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, LIFTS: tl.constexpr, TILE: tl.constexpr,
    BD: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Learned filters: gradients of the heights from the top to LIFTS, one program for all rows of some columns."""
    K_SLICES: tl.constexpr = (D + BD - 1) // BD
    SLICES: tl.constexpr = K_SLICES + (E + BD - 1) // BD
    pid = tl.program_id(0).to(tl.int64)
    piece, unit = pid % SLICES, pid // SLICES
    scratch += unit * tops * (D + E)
    filters += unit % kv_heads * (2 * RANK * RANK)
    part += ((unit * (chunks + 1) + chunks) * SLICES + piece) * (2 * RANK * RANK)
    if piece < K_SLICES:
        _descend(
            d_far_k + unit * rows * D, far_k + unit * rows * D, filters, part, scratch, piece,
            lo, hi, lead, blocks, levels, chunks, D + E, D, RANK, SEG, LIFTS, TILE, BD, UP, PRECISION,
        )  # fmt: skip
    else:
        _descend(
            d_far_v + unit * rows * E, far_v + unit * rows * E, filters + kv_heads * (2 * RANK * RANK), part,
            scratch + D, piece - K_SLICES,
            lo, hi, lead, blocks, levels, chunks, D + E, E, RANK, SEG, LIFTS, TILE, BD, UP, PRECISION,
        )  # fmt: skip


def forward(k: Tensor, v: Tensor, filters: Tensor, tree: Tree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Far keys and values, bias and span; the contract is ops.pool's."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, _, width = k.shape
    value_width, rows, units = v.shape[3], tree.rows, batch * heads
    far_k, far_v = k.new_empty(batch, heads, rows, width), v.new_empty(batch, heads, rows, value_width)
    bias = k.new_empty(1, 1, rows, dtype=torch.float32)
    span = k.new_empty(2, rows, dtype=torch.int64)
    learned = filters.dim() > 1
    tile = tiles(k, v, tree, learned)
    # the last group of the top level may lie beyond the last block: its rows are written as well
    blocks = tree.blocks if tree.complete else tree.groups[-1] << (tree.levels - 1)
    chunks = -(-blocks * tree.rank // tile["CHUNK"])
    tops, more = _tops(tree, tile, chunks, learned)
    scratch = k.new_empty(units * tops * (width + value_width) if more else 1, dtype=torch.float32)
    slices = -(-width // tile["BD"]) - (-value_width // tile["BD"])
    lengths = (heads, tree.lo, tree.hi, tree.lead, tree.blocks, tree.levels, rows, chunks, tops)
    same = {"D": width, "E": value_width, "RANK": tree.rank, "SEG": tree.block // tree.rank, "LEARNED": learned}
    same |= {"UP": int(not tree.complete), "PRECISION": precision(k), "LIFTS": tile["LIFTS"], "BD": tile["BD"]}
    pool_forward[(units * chunks * slices,)](
        k, v, filters, far_k, far_v, bias, span, scratch, k.stride()[:3], v.stride()[:3], *lengths,
        CHUNK=tile["CHUNK"], UNROLL=tile["UNROLL"], MORE=more, num_warps=tile["WARPS"], **same,
    )  # fmt: skip
    if more:
        pool_climb[(units * slices,)](
            filters, far_k, far_v, bias, span, scratch, *lengths, TILE=max(32, tree.rank), num_warps=4, **same
        )
    return far_k, far_v, bias, span


def backward(
    near_k: Tensor, near_v: Tensor, d_far_k: Tensor, d_far_v: Tensor, far_k: Tensor, far_v: Tensor, filters: Tensor,
    tokens: int, tree: Tree,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k, v and the filters; the contract is ops.pool's."""
    d_far_k, d_far_v = d_far_k.contiguous(), d_far_v.contiguous()
    batch, heads, rows, width = d_far_k.shape
    value_width, units = d_far_v.shape[3], batch * heads
    d_k, d_v = d_far_k.new_empty(batch, heads, tokens, width), d_far_v.new_empty(batch, heads, tokens, value_width)
    near = [x if x.dim() == 1 or x.stride(-1) == 1 else x.contiguous() for x in (near_k, near_v)]
    strides = [(0, 0, 0) if x.dim() == 1 else x.stride()[:3] for x in near]
    learned = filters.dim() > 1
    tile = tiles(d_far_k, d_far_v, tree, learned, down=True)
    chunks = -(-tokens * tree.rank // (tree.block * tile["CHUNK"]))
    tops, more = _tops(tree, tile, chunks, learned)
    more &= learned
    wide = {"dtype": torch.float32}
    scratch = d_far_k.new_empty(units * tops * (width + value_width) if more else 1, **wide)
    k_slices = -(-width // tile["BD"])
    slices = k_slices - (-value_width // tile["BD"])
    part = d_far_k.new_empty((batch, heads, chunks + 1, slices, tree.rank, 2 * tree.rank) if learned else 1, **wide)
    lengths = (tree.lo, tree.hi, tree.lead, tree.blocks, tree.levels, rows, chunks, tops)
    same = {"D": width, "E": value_width, "RANK": tree.rank, "SEG": tree.block // tree.rank, "BD": tile["BD"]}
    same |= {"UP": int(not tree.complete), "PRECISION": precision(d_far_k), "LIFTS": tile["LIFTS"]}
    if more:
        pool_descend[(units * slices,)](
            d_far_k, d_far_v, far_k, far_v, filters, part, scratch, heads, *lengths,
            TILE=max(16, tree.rank), num_warps=4, **same,
        )  # fmt: skip
    pool_backward[(units * chunks * slices,)](
        *near, d_far_k, d_far_v, far_k, far_v, filters, d_k, d_v, part, scratch, *strides, heads, tokens, *lengths,
        CHUNK=tile["CHUNK"], STEP=tile["STEP"], LEARNED=learned, MORE=more,
        NEAR_K=near_k.dim() > 1, NEAR_V=near_v.dim() > 1, num_warps=tile["WARPS"], **same,
    )  # fmt: skip
    if not learned:
        return d_k, d_v, torch.empty_like(filters)
    part = part[:, :, : chunks + more]
    return d_k, d_v, torch.stack([x.sum((0, 2, 3)) for x in (part[:, :, :, :k_slices], part[:, :, :, k_slices:])])


def tiles(k: Tensor, v: Tensor, tree: Tree, learned: bool, down: bool = False) -> dict[str, int]:
    """Tile sizes: rows of a chunk and how often they are lifted, columns, tokens at a time, warps.

    Columns are a line of 128 bytes where the widths divide into them; a chunk is as many rows as keep sums, and a few
    loads of 16 bytes each, in registers.
    """
    width, value_width = k.shape[3], v.shape[3]
    seg = tree.block // tree.rank
    columns = 32
    if k.element_size() == 2 and width % 64 == 0 and value_width % 64 == 0:
        columns = 64
    if max(width, value_width) <= 16:
        columns = 16
    chunk = 64 if learned or down else 128
    lifts = (chunk // tree.rank if learned else chunk).bit_length() - 1
    step, unroll = min(2, seg), min(4, seg)
    return {"CHUNK": chunk, "LIFTS": lifts, "BD": columns, "STEP": step, "UNROLL": unroll, "WARPS": 8}


def _tops(tree: Tree, tile: dict[str, int], chunks: int, learned: bool) -> tuple[int, bool]:
    """Rows of all heights from LIFTS on, and whether there are any above LIFTS."""
    each = tree.rank if learned else 1
    tops = 0
    for _ in range(tile["LIFTS"], tree.levels):
        tops += chunks * each
        chunks = (chunks + 1) // 2
    return tops, tree.levels > tile["LIFTS"] + 1


def precision(x: Tensor) -> str:
    """Products of float32 with float32 numbers: exact, or three of tensor cores, which is more than x has to give."""
    return "ieee" if x.dtype == torch.float32 else "tf32x3"
