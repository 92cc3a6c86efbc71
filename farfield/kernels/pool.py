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

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import replay
from farfield.ops.pool import Tree

LN2 = tl.constexpr(0.6931471805599453)
WARPS = 4  # of a program of the forward
LOADS = 16  # of 16 bytes, by each of its threads

# what varies with the length must not make another kernel
VARIES = [
    "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token", "kv_heads", "tokens", "lo", "hi", "blocks",
    "levels", "rows", "chunks", "tops", "many", "height",
]  # fmt: skip


@triton.jit
def _count(row, width, lo, hi):
    """Tokens in lo .. hi - 1 of each row of so many tokens."""
    start = row * width
    return tl.maximum(tl.minimum(start + width, hi) - tl.maximum(start, lo), 0)


@triton.jit
def _within(lo, hi, first, tokens):
    """lo and hi counted from token `first`, at most so many."""
    low, high = tl.maximum(lo - first, 0), tl.maximum(hi - first, 0)
    return tl.minimum(low, tokens).to(tl.int32), tl.minimum(high, tokens).to(tl.int32)


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
    x, far, bias, span, first, most, at, tokens, low, high, cols, width, rows, about, LEARNED: tl.constexpr
):  # fmt: skip
    """At most so many rows of one height from row `first` on: sums of tokens, or (learned) as they are.

    low, high: what tokens count, from the first one of row `first`. `about`: store what the rows stand for as well.
    """
    slot = tl.arange(0, x.shape[0])
    count = _count(slot, tokens, low, high)
    if not LEARNED:
        x = x * (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
    far += (at + first) * width
    mask = (slot < most)[:, None] & (cols < width)
    tl.store(far + slot[:, None] * width + cols, x.to(far.dtype.element_ty), mask=mask)
    if about:
        row = first + slot
        # a row of no tokens is hidden
        known = tl.log2(tl.maximum(count, 1).to(tl.float32)) * LN2
        tl.store(bias + at + row, tl.where(count > 0, known, float("-inf")), mask=slot < most)
        tl.store(span + at + row, row * tokens, mask=slot < most)
        tl.store(span + rows + at + row, (row + 1) * tokens - 1, mask=slot < most)


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
def _rise(
    x, far, filters, bias, span, chunk, height, low, high, cols, width, lo, hi, lead, blocks, levels, rows, about,
    RANK: tl.constexpr, SEG: tl.constexpr, CHUNK: tl.constexpr, LIFTS: tl.constexpr, UP: tl.constexpr,
    LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's rows of a height lifted LIFTS times, all that come out stored; the last ones."""
    at, groups = _level(lead, blocks, RANK, UP, height)
    tokens = tl.full([], SEG, low.dtype) << height
    for i in tl.static_range(1, LIFTS + 1):
        x = _lift(x, filters, chunk * (CHUNK >> (i - 1)), tokens, CHUNK >> i, lo, hi, RANK, LEARNED, PRECISION)
        at += groups * RANK
        groups = (groups + UP) >> 1
        tokens *= 2
        first = chunk * (CHUNK >> i)
        most = tl.where(height + i < levels, tl.minimum(groups * RANK - first, CHUNK >> i), 0)
        _store(x, far, bias, span, first, most, at, tokens, low, high, cols, width, rows, about, LEARNED)
    return x


@triton.jit(do_not_specialize=VARIES)
def pool_forward(
    k, v, filters, far_k, far_v, bias, span, scratch, k_batch, k_head, k_token, v_batch, v_head, v_token,
    kv_heads, lo, hi, blocks, levels, rows, chunks,
    D: tl.constexpr, E: tl.constexpr, PIECE: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, CHUNK: tl.constexpr,
    LIFTS: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, UP: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """CHUNK rows of some columns, and the LIFTS heights above them; strides are in pieces of PIECE numbers."""
    TILE: tl.constexpr = 16 if LEARNED and CHUNK < 16 else CHUNK
    K_SLICES: tl.constexpr = (D + BD - 1) // BD
    SLICES: tl.constexpr = K_SLICES + (E + BD - 1) // BD
    # rows that a chunk leaves for the heights above it
    UNIT: tl.constexpr = RANK if LEARNED else 1
    PRECISION: tl.constexpr = "ieee" if k.dtype.element_ty == tl.float32 else "tf32x3"
    # the columns of one token side by side; int64: token * stride passes 2**31 at long context
    pid = tl.program_id(0)
    part, chunk, unit = pid % SLICES, pid // SLICES % chunks, pid // SLICES // chunks
    chunk, unit = chunk.to(tl.int64), unit.to(tl.int64)
    b, g = unit // kv_heads, unit % kv_heads
    about = (unit == 0) & (part == 0)
    filters += g * (2 * RANK * RANK)
    scratch += (unit * chunks + chunk) * (UNIT * (D + E))
    if part < K_SLICES:
        x, token_stride = k + (b * k_batch + g * k_head) * PIECE, k_token.to(tl.int64) * PIECE
        far, column = far_k + unit * rows * D, part
    else:
        x, token_stride = v + (b * v_batch + g * v_head) * PIECE, v_token.to(tl.int64) * PIECE
        far, column = far_v + unit * rows * E, part - K_SLICES
        filters += kv_heads * (2 * RANK * RANK)
        scratch += D
    if D == E:
        width = D
    else:
        width = tl.where(part < K_SLICES, D // PIECE, E // PIECE) * PIECE
    cols = column * BD + tl.arange(0, BD)
    lead = (lo + RANK - 1) // RANK * RANK

    low, high = _within(lo, hi, chunk * (CHUNK * SEG), CHUNK * SEG)
    slot = tl.arange(0, TILE)
    acc = tl.zeros([TILE, BD], tl.float32)
    source = x + chunk * (CHUNK * SEG) * token_stride + (slot * SEG).to(tl.int64)[:, None] * token_stride + cols
    # token t of a row counts where begin <= t < end
    begin, end = low - slot * SEG, tl.minimum(high - slot * SEG, SEG)
    for t in tl.range(0, SEG, STEP):
        for u in tl.static_range(STEP):
            there = (t + u >= begin) & (t + u < end)
            acc += tl.load(source, mask=there[:, None] & (cols < width), other=0.0).to(tl.float32)
            source += token_stride
    if LEARNED:
        acc = acc * (1.0 / tl.maximum(_count(slot, SEG, low, high), 1).to(tl.float32))[:, None]
    most = tl.minimum(blocks * RANK - chunk * CHUNK, CHUNK)
    _store(acc, far, bias, span, chunk * CHUNK, most, lead, SEG, low, high, cols, width, rows, about, LEARNED)
    acc = _rise(
        acc, far, filters, bias, span, chunk, 0, low, high, cols, width, lo, hi, lead, blocks, levels, rows, about,
        RANK, SEG, CHUNK, LIFTS, UP, LEARNED, PRECISION,
    )  # fmt: skip
    if levels > LIFTS + 1:
        left = tl.arange(0, acc.shape[0])[:, None]
        tl.store(scratch + left * (D + E) + cols, acc, mask=(left < UNIT) & (cols < width))

    if chunk == 0:
        # the tokens before lo as they are, filled up with 0 to whole groups
        for start in range(0, lead, 16):
            sink = start + tl.arange(0, 16)
            there = (sink < lo)[:, None] & (cols < width)
            tile = tl.load(x + sink.to(tl.int64)[:, None] * token_stride + cols, mask=there, other=0.0)
            target = far + sink.to(tl.int64)[:, None] * width + cols
            tl.store(target, tile, mask=(sink < lead)[:, None] & (cols < width))
            if about:
                tl.store(bias + sink, tl.where(sink < lo, 0.0, float("-inf")), mask=sink < lead)
                tl.store(span + sink, sink.to(tl.int64), mask=sink < lead)
                tl.store(span + rows + sink, sink.to(tl.int64), mask=sink < lead)


@triton.jit(do_not_specialize=VARIES)
def pool_climb(
    below, above, filters, far_k, far_v, bias, span, kv_heads, lo, hi, blocks, levels, rows, chunks, many, height,
    D: tl.constexpr, E: tl.constexpr, PIECE: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, CHUNK: tl.constexpr,
    LIFTS: tl.constexpr, BD: tl.constexpr, UP: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """CHUNK of the `many` rows of a height that each unit has in `below`, lifted; the last ones into `above`."""
    K_SLICES: tl.constexpr = (D + BD - 1) // BD
    SLICES: tl.constexpr = K_SLICES + (E + BD - 1) // BD
    UNIT: tl.constexpr = RANK if LEARNED else 1
    PRECISION: tl.constexpr = "ieee" if far_k.dtype.element_ty == tl.float32 else "tf32x3"
    pid = tl.program_id(0)
    part, chunk, unit = pid % SLICES, pid // SLICES % chunks, pid // SLICES // chunks
    filters += unit % kv_heads * (2 * RANK * RANK)
    chunk, unit = chunk.to(tl.int64), unit.to(tl.int64)
    below += unit * many * (D + E)
    above += (unit * chunks + chunk) * (UNIT * (D + E))
    if part < K_SLICES:
        far, column = far_k + unit * rows * D, part
    else:
        far, column = far_v + unit * rows * E, part - K_SLICES
        filters += kv_heads * (2 * RANK * RANK)
        below += D
        above += D
    if D == E:
        width = D
    else:
        width = tl.where(part < K_SLICES, D // PIECE, E // PIECE) * PIECE
    cols = column * BD + tl.arange(0, BD)
    lead = (lo + RANK - 1) // RANK * RANK
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(below + row[:, None] * (D + E) + cols, mask=(row < many)[:, None] & (cols < width), other=0.0)
    first = chunk * CHUNK * (tl.full([], SEG, tl.int64) << height)
    x = _rise(
        x, far, filters, bias, span, chunk, height, tl.maximum(lo - first, 0), tl.maximum(hi - first, 0), cols, width,
        lo, hi, lead, blocks, levels, rows, (unit == 0) & (part == 0), RANK, SEG, CHUNK, LIFTS, UP, LEARNED, PRECISION,
    )  # fmt: skip
    if levels > height + LIFTS + 1:
        left = tl.arange(0, x.shape[0])[:, None]
        tl.store(above + left * (D + E) + cols, x, mask=(left < UNIT) & (cols < width))


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
    NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cols = column * BD + tl.arange(0, BD)
    inside = cols < D
    if LEARNED:
        TOP: tl.constexpr = CHUNK >> LIFTS
        TILE: tl.constexpr = TOP if TOP > 16 else 16
        slot = tl.arange(0, TILE)
        row = chunk * TOP + slot
        if levels > LIFTS + 1:
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
    near_k, near_v, d_far_k, d_far_v, far_k, far_v, filters, d_k, d_v, part, scratch,
    k_batch, k_head, k_token, v_batch, v_head, v_token, kv_heads, tokens, lo, hi, blocks, levels, rows, chunks, tops,
    D: tl.constexpr, E: tl.constexpr, PIECE: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, CHUNK: tl.constexpr,
    LIFTS: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr, UP: tl.constexpr, LEARNED: tl.constexpr,
    NEAR_K: tl.constexpr, NEAR_V: tl.constexpr,
):  # fmt: skip
    K_SLICES: tl.constexpr = (D + BD - 1) // BD
    SLICES: tl.constexpr = K_SLICES + (E + BD - 1) // BD
    PRECISION: tl.constexpr = "ieee" if d_k.dtype.element_ty == tl.float32 else "tf32x3"
    pid = tl.program_id(0)
    piece, chunk, unit = pid % SLICES, pid // SLICES % chunks, pid // SLICES // chunks
    lead = (lo + RANK - 1) // RANK * RANK
    chunk, unit = chunk.to(tl.int64), unit.to(tl.int64)
    b, g = unit // kv_heads, unit % kv_heads
    scratch += unit * tops * (D + E)
    filters += g * (2 * RANK * RANK)
    # [unit, chunk, slice]: the last chunk of a unit is what pool_descend adds
    part += ((unit * (chunks + 1) + chunk) * SLICES + piece) * (2 * RANK * RANK)
    if piece < K_SLICES:
        _chunk_backward(
            near_k + (b * k_batch + g * k_head) * PIECE, d_far_k + unit * rows * D, far_k + unit * rows * D,
            filters, d_k + unit * tokens * D, part, scratch,
            chunk, piece, tokens, lo, hi, lead, blocks, levels, k_token.to(tl.int64) * PIECE,
            D + E, D, RANK, SEG, CHUNK, LIFTS, BD, STEP, UP, LEARNED, NEAR_K, PRECISION,
        )  # fmt: skip
    else:
        _chunk_backward(
            near_v + (b * v_batch + g * v_head) * PIECE, d_far_v + unit * rows * E, far_v + unit * rows * E,
            filters + kv_heads * (2 * RANK * RANK), d_v + unit * tokens * E, part, scratch + D,
            chunk, piece - K_SLICES, tokens, lo, hi, lead, blocks, levels, v_token.to(tl.int64) * PIECE,
            D + E, E, RANK, SEG, CHUNK, LIFTS, BD, STEP, UP, LEARNED, NEAR_V, PRECISION,
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
    d_far_k, d_far_v, far_k, far_v, filters, part, scratch, kv_heads, lo, hi, blocks, levels, rows, chunks, tops,
    D: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, SEG: tl.constexpr, LIFTS: tl.constexpr, TILE: tl.constexpr,
    BD: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Learned filters: gradients of the heights from the top to LIFTS, one program for all rows of some columns."""
    K_SLICES: tl.constexpr = (D + BD - 1) // BD
    SLICES: tl.constexpr = K_SLICES + (E + BD - 1) // BD
    PRECISION: tl.constexpr = "ieee" if d_far_k.dtype.element_ty == tl.float32 else "tf32x3"
    lead = (lo + RANK - 1) // RANK * RANK
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


def forward(
    k: Tensor, v: Tensor, filters: Tensor, tree: Tree, into: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Far keys and values, bias and span; the contract is ops.pool's. `into`: the first three, contiguous."""
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        k, v = k.contiguous(), v.contiguous()
    batch, heads, _, width = k.shape
    value_width, units, learned = v.shape[3], batch * heads, filters.dim() > 1
    blocks, rank, levels, lo, hi = tree.blocks, tree.rank, tree.levels, tree.lo, tree.hi
    groups, lead = tree.groups, -(-lo // rank) * rank
    rows = lead + rank * sum(groups)
    if into is None:
        far_k, far_v = k.new_empty((batch, heads, rows, width)), v.new_empty((batch, heads, rows, value_width))
        bias = k.new_empty((1, 1, rows), dtype=torch.float32)
    else:
        far_k, far_v, bias = into
    span = k.new_empty((2, rows), dtype=torch.int64)
    strides, piece = _strides(k, v, width, value_width)
    tile, climb = tiles(width, value_width, k.element_size(), tree.block // rank, rank, learned)
    slices = -(-width // tile["BD"]) - (-value_width // tile["BD"])
    unit = rank if learned else 1
    # the last group of the top level may lie beyond the last block: its rows are written as well
    covered = blocks if tree.complete else groups[-1] << (levels - 1)
    chunks, height = -(-covered * rank // tile["CHUNK"]), tile["LIFTS"]
    # a tensor that is not written, where there is nothing above
    above = bias
    if levels > height + 1:
        above = k.new_empty(units * chunks * unit * (width + value_width), dtype=torch.float32)
    same = {"D": width, "E": value_width, "PIECE": piece, "RANK": rank, "SEG": tree.block // rank}
    same |= {"UP": int(not tree.complete), "LEARNED": learned}
    replay.start(
        pool_forward, (units * chunks * slices,),
        k, v, filters, far_k, far_v, bias, span, above, *strides, heads, lo, hi, blocks, levels, rows, chunks,
        **tile, **same,
    )  # fmt: skip
    slices = -(-width // climb["BD"]) - (-value_width // climb["BD"])
    while levels > height + 1:
        below, many = above, chunks * unit
        chunks = -(-many // climb["CHUNK"])
        top = height + climb["LIFTS"]
        above = bias
        if levels > top + 1:
            above = k.new_empty(units * chunks * unit * (width + value_width), dtype=torch.float32)
        replay.start(
            pool_climb, (units * chunks * slices,),
            below, above, filters, far_k, far_v, bias, span, heads, lo, hi, blocks, levels, rows, chunks, many, height,
            **climb, **same,
        )  # fmt: skip
        height = top
    return far_k, far_v, bias, span


def backward(
    near_k: Tensor, near_v: Tensor, d_far_k: Tensor, d_far_v: Tensor, far_k: Tensor, far_v: Tensor, filters: Tensor,
    tokens: int, tree: Tree,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k, v and the filters; the contract is ops.pool's."""
    d_far_k, d_far_v = d_far_k.contiguous(), d_far_v.contiguous()
    d_k, d_v, part = launches(near_k, near_v, d_far_k, d_far_v, far_k, far_v, filters, tokens, tree)
    return d_k, d_v, added_up(part, d_k, d_v, tree)


def launches(
    near_k: Tensor, near_v: Tensor, d_far_k: Tensor, d_far_v: Tensor, far_k: Tensor, far_v: Tensor, filters: Tensor,
    tokens: int, tree: Tree,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k and v, and what is `added_up` to the filters': an empty tensor without filters.

    The far rows' gradients are contiguous.
    """
    batch, heads, rows, width = d_far_k.shape
    value_width, units, learned = d_far_v.shape[3], batch * heads, filters.dim() > 1
    block, rank, levels = tree.block, tree.rank, tree.levels
    d_k, d_v = d_far_k.new_empty((batch, heads, tokens, width)), d_far_v.new_empty((batch, heads, tokens, value_width))
    near_k, near_v = (x if x.dim() == 1 or x.stride(-1) == 1 else x.contiguous() for x in (near_k, near_v))
    strides, piece = _strides(near_k, near_v, width, value_width)
    tile = tiles_down(width, value_width, d_far_k.element_size(), block // rank, rank, learned)
    chunks = -(-tokens * rank // (block * tile["CHUNK"]))
    k_slices = -(-width // tile["BD"])
    slices = k_slices - (-value_width // tile["BD"])
    same = {"D": width, "E": value_width, "RANK": rank, "SEG": block // rank, "UP": int(not tree.complete)}
    lengths = (tree.lo, tree.hi, tree.blocks, levels, rows, chunks)
    part = scratch = filters
    tops, more = 0, False
    if learned:
        part = filters.new_empty((batch, heads, chunks + 1, slices, rank, 2 * rank))
        tops, more = _tops(chunks, rank, tile["LIFTS"], levels), levels > tile["LIFTS"] + 1
    if more:
        scratch = filters.new_empty(units * tops * (width + value_width))
        replay.start(
            pool_descend, (units * slices,),
            d_far_k, d_far_v, far_k, far_v, filters, part, scratch, heads, *lengths, tops,
            LIFTS=tile["LIFTS"], BD=tile["BD"], TILE=max(16, rank), num_warps=4, **same,
        )  # fmt: skip
    replay.start(
        pool_backward, (units * chunks * slices,),
        near_k, near_v, d_far_k, d_far_v, far_k, far_v, filters, d_k, d_v, part, scratch, *strides, heads, tokens,
        *lengths, tops, PIECE=piece, LEARNED=learned, NEAR_K=near_k.dim() > 1, NEAR_V=near_v.dim() > 1, **tile, **same,
    )  # fmt: skip
    return d_k, d_v, part if learned else torch.empty_like(filters)


def added_up(part: Tensor, d_k: Tensor, d_v: Tensor, tree: Tree) -> Tensor:
    """The gradient of the filters."""
    if part.dim() == 1:
        return part
    width, value_width, seg = d_k.shape[3], d_v.shape[3], tree.block // tree.rank
    tile = tiles_down(width, value_width, d_k.element_size(), seg, tree.rank, True)
    # the last chunk is that of pool_descend
    part = part if tree.levels > tile["LIFTS"] + 1 else part[:, :, :-1]
    k_slices = -(-width // tile["BD"])
    return torch.stack([x.sum((0, 2, 3)) for x in (part[:, :, :, :k_slices], part[:, :, :, k_slices:])])


@functools.cache
def tiles(
    width: int, value_width: int, size: int, seg: int, rank: int, learned: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes of pool_forward and of pool_climb; `size`: bytes of a number, `seg`: tokens of a row.

    Rows of up to 256 bytes are read whole. A program of means is as many segments as its threads take with LOADS loads
    each, which do not wait for each other, and as keep their sums in 64 registers. Filters are products with tiles of
    16 rows at least.
    """
    columns = min(256 // size, max(16, triton.next_power_of_2(max(width, value_width))))
    if learned:
        columns, chunk = min(columns, 32), 64 if rank < 16 else 128
        both = {"CHUNK": chunk, "LIFTS": (chunk // rank).bit_length() - 1, "BD": columns, "num_warps": 8}
        return both | {"STEP": min(4, seg)}, both
    chunk = WARPS * LOADS * 512 // (columns * size * seg)
    chunk = min(max(1, triton.next_power_of_2(chunk + 1) // 2), WARPS * 2048 // columns, 128)
    tile = {"CHUNK": chunk, "LIFTS": chunk.bit_length() - 1, "BD": columns, "num_warps": WARPS}
    return tile | {"STEP": min(seg, LOADS)}, {"CHUNK": 256, "LIFTS": 8, "BD": min(columns, 32), "num_warps": 4}


@functools.cache
def tiles_down(width: int, value_width: int, size: int, seg: int, rank: int, learned: bool) -> dict[str, int]:
    """Tile sizes of pool_backward: columns are a line of 128 bytes where the widths divide into them."""
    columns = 32
    if size == 2 and width % 64 == 0 and value_width % 64 == 0:
        columns = 64
    if max(width, value_width) <= 16:
        columns = 16
    lifts = (64 // rank if learned else 64).bit_length() - 1
    return {"CHUNK": 64, "LIFTS": lifts, "BD": columns, "STEP": min(2, seg), "num_warps": 8}


def _strides(k: Tensor, v: Tensor, width: int, value_width: int) -> tuple[tuple[int, ...], int]:
    """Strides of batch, head and token of k and of v (0 if absent) in pieces of 16 bytes where these divide all."""
    k_batch, k_head, k_token, _ = k.stride() if k.dim() > 1 else (0, 0, 0, 0)
    v_batch, v_head, v_token, _ = v.stride() if v.dim() > 1 else (0, 0, 0, 0)
    piece = 16 // k.element_size()
    # a power of 2 divides each of them if it divides what any has a bit of
    if (k_batch | k_head | k_token | v_batch | v_head | v_token | width | value_width) % piece:
        piece = 1
    found = k_batch // piece, k_head // piece, k_token // piece, v_batch // piece, v_head // piece, v_token // piece
    return found, piece


def _tops(chunks: int, rank: int, lifts: int, levels: int) -> int:
    """Rows of all heights from `lifts` on, of so many chunks at that height."""
    tops = 0
    for _ in range(lifts, levels):
        tops += chunks * rank
        chunks = (chunks + 1) // 2
    return tops
