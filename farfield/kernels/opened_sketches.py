"""Sketches of the groups of opened FMA, of all levels, and its means for keys and values in the same pass.

Rows of `select.opened`. A peak is one of the keys and stays in their dtype. A mean is two numbers of their dtype, of
which the second is what the first has lost, so that a score is off by at most 2^-16 of scale sum_c |q_c mean_c| in
bfloat16.

A row of a sketch of the lowest level is the mean of block / detail tokens, a far row of FMA that of block / rank: the
same sums, so many levels apart. So a program adds up a piece of the keys, or of the values, level by level without
passing anything on, and stores the means wherever they stand. Its own sum, in float32, is what a further launch goes on
from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import _dense, padded
from farfield.kernels.attend_listed import _unit
from farfield.kernels.replay import start
from farfield.ops.pool import Tree

LN2 = tl.constexpr(0.6931471805599453)
TILE, WARPS = 1024, 4  # numbers that a program of the lowest levels holds of each of them
LIFTS = 6  # levels that a program makes of what others have left


class Sketches(NamedTuple):
    """[B, G, R, D]: `detail` rows for each group of each level, level by level; `low` counts only where `twice`.

    In float32 for queries of 16 bits `high` is the whole of it, and becomes two numbers of theirs where it is read.
    """

    high: Tensor
    low: Tensor
    twice: bool


@triton.jit
def _counted(first, size, sinks):
    """Tokens of a segment that are no sinks."""
    return size - tl.minimum(tl.maximum(sinks - first, 0), size)


@triton.jit
def _leaf(k_at, k_r, first, there, wide, sinks, SEGMENT: tl.constexpr, D_UNIT: tl.constexpr):
    """Sums of SEGMENT keys."""
    UNROLL: tl.constexpr = 4 if SEGMENT >= 4 else SEGMENT
    total = tl.zeros(k_at.shape, tl.float32)
    for begin in range(0, SEGMENT, UNROLL):
        for t in tl.static_range(UNROLL):
            mask = there & (first + begin + t >= sinks)
            total += tl.load(k_at + (begin + t) * k_r * D_UNIT, mask=mask[:, None] & wide, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["segments", "sinks", "all_rows", "kv_heads", "k_b", "k_h", "k_r"])
def leaf_peaks(
    k, means, peaks, segments, sinks, all_rows, kv_heads, k_b, k_h, k_r,
    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, D_UNIT: tl.constexpr,
):  # fmt: skip
    """Level 1: of every segment of a block the mean and the key farthest from it."""
    UNROLL: tl.constexpr = 4 if SEGMENT >= 4 else SEGMENT
    unit = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    dims = tl.arange(0, D_TILE)
    wide = (dims < D)[None, :]
    first = row * SEGMENT
    k_at = k + (unit // kv_heads * k_b + unit % kv_heads * k_h) * D_UNIT + (first * k_r)[:, None] * D_UNIT + dims
    mean = tl.zeros([SEGMENTS, D_TILE], tl.float32)
    # the keys are read three times, from memory once
    for begin in range(0, SEGMENT, UNROLL):
        for t in tl.static_range(UNROLL):
            there = (row < segments) & (first + begin + t >= sinks)
            key = tl.load(k_at + (begin + t) * k_r * D_UNIT, mask=there[:, None] & wide, other=0.0)
            mean += key.to(tl.float32)
    number = _counted(first, SEGMENT, sinks).to(tl.float32)
    mean = mean / tl.where(number > 0, number, 1.0)[:, None]
    far = tl.zeros([SEGMENTS], tl.float32) - 1.0
    for begin in range(0, SEGMENT, UNROLL):
        for t in tl.static_range(UNROLL):
            there = (row < segments) & (first + begin + t >= sinks)
            key = tl.load(k_at + (begin + t) * k_r * D_UNIT, mask=there[:, None] & wide, other=0.0)
            apart = key.to(tl.float32) - mean
            far = tl.where(there, tl.maximum(far, tl.sum(apart * apart, 1)), far)
    # the first of several as far: of two tokens rounding would choose
    peak = tl.zeros([SEGMENTS, D_TILE], k.dtype.element_ty)
    open_ = far >= 0
    for begin in range(0, SEGMENT, UNROLL):
        for t in tl.static_range(UNROLL):
            there = (row < segments) & (first + begin + t >= sinks)
            key = tl.load(k_at + (begin + t) * k_r * D_UNIT, mask=there[:, None] & wide, other=0.0)
            apart = key.to(tl.float32) - mean
            take = open_ & there & (tl.sum(apart * apart, 1) >= 0.9999 * far)
            peak = tl.where(take[:, None], key, peak)
            open_ = open_ & (take == 0)
    to = (unit * all_rows + row)[:, None] * D + dims
    mask = (row < segments)[:, None] & wide
    tl.store(means + to, mean, mask=mask)
    tl.store(peaks + to, peak, mask=mask)


@triton.jit(do_not_specialize=["below", "above", "many", "size", "sinks", "all_rows"])
def parent_peaks(
    means, peaks, below, above, many, size, sinks, all_rows, D: tl.constexpr, D_TILE: tl.constexpr, ROWS: tl.constexpr
):
    """A further level: row i of it, from row `above`, is put together from rows 2i and 2i + 1 from row `below`."""
    unit = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D_TILE)
    mask = (row < many)[:, None] & (dims < D)
    left = (unit * all_rows + below + 2 * row)[:, None] * D + dims
    n0 = _counted(2 * row * size, size, sinks).to(tl.float32)
    n1 = _counted((2 * row + 1) * size, size, sinks).to(tl.float32)
    total = tl.where(n0 + n1 > 0, n0 + n1, 1.0)
    m0, m1 = tl.load(means + left, mask=mask, other=0.0), tl.load(means + left + D, mask=mask, other=0.0)
    p0, p1 = tl.load(peaks + left, mask=mask, other=0.0), tl.load(peaks + left + D, mask=mask, other=0.0)
    mean = m0 * (n0 / total)[:, None] + m1 * (n1 / total)[:, None]
    d0, d1 = p0.to(tl.float32) - mean, p1.to(tl.float32) - mean
    far0 = tl.where(n0 > 0, tl.sum(d0 * d0, 1), -1.0)
    far1 = tl.where(n1 > 0, tl.sum(d1 * d1, 1), -1.0)
    first = far0 >= 0.9999 * tl.maximum(far0, far1)
    to = (unit * all_rows + above + row)[:, None] * D + dims
    tl.store(means + to, mean, mask=mask)
    tl.store(peaks + to, tl.where(first[:, None], p0, p1), mask=mask)


@triton.jit
def _before(blocks, height, EACH: tl.constexpr):
    """Rows of all levels below one."""
    rows = 0
    for x in range(height):
        rows += (blocks >> x) * EACH
    return rows


@triton.jit
def _put(
    total, line, height, before, at, high, low, far, bias, unit, side, blocks, levels, sinks, all_rows, rows, dims,
    SEGMENT: tl.constexpr, DETAIL: tl.constexpr, RANK: tl.constexpr, SHIFT: tl.constexpr, FAR: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Rows `line` of a level of sketches, sums of SEGMENT << height tokens each: their means, wherever they stand.

    Args:
        before, at: rows of the levels below, of sketches and of far rows.
    """
    wide = (dims < D)[None, :]
    size = tl.full([], SEGMENT, tl.int64) << height
    number = _counted(line * size, size, sinks).to(tl.float32)
    # as kernels.pool has it, to the bit
    mean = total * (1.0 / tl.maximum(number, 1.0))[:, None]
    rounded = mean.to(high.dtype.element_ty)
    many = tl.where((height < levels) & (side == 0), (blocks >> height) * DETAIL, 0)
    to = (unit * all_rows + before + line)[:, None] * D + dims
    mask = (line < many)[:, None] & wide
    tl.store(high + to, rounded, mask=mask)
    tl.store(low + to, (mean - rounded.to(tl.float32)).to(low.dtype.element_ty), mask=mask)
    if FAR:  # noqa: SIM102 (a constant, which decides what is compiled)
        if height >= SHIFT:
            most = tl.where(height - SHIFT < levels, (blocks >> (height - SHIFT)) * RANK, 0)
            to = (unit * rows + at + line)[:, None] * D + dims
            tl.store(far + to, rounded, mask=(line < most)[:, None] & wide)
            if (unit == 0) & (side == 0):
                known = tl.where(number > 0, tl.log2(tl.maximum(number, 1.0)) * LN2, float("-inf"))
                tl.store(bias + at + line, known, mask=line < most)


@triton.jit
def _rise(
    x, first, height, before, at, high, low, far, bias, unit, side, blocks, levels, sinks, all_rows, rows, dims,
    LIFTS: tl.constexpr, SEGMENT: tl.constexpr, DETAIL: tl.constexpr, RANK: tl.constexpr, SHIFT: tl.constexpr,
    FAR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sums of a level from row `first` on, lifted level by level, to the one row that is left."""
    for i in tl.static_range(1, LIFTS + 1):
        x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), 1)
        line = (first >> i) + tl.arange(0, x.shape[0])
        before += (blocks >> (height + i - 1)) * DETAIL
        if height + i > SHIFT:
            at += (blocks >> (height + i - 1 - SHIFT)) * RANK
        _put(
            x, line, height + i, before, at, high, low, far, bias, unit, side, blocks, levels, sinks, all_rows, rows,
            dims, SEGMENT, DETAIL, RANK, SHIFT, FAR, D,
        )  # fmt: skip
    return x


@triton.jit
def _lead(x, stride, far, bias, unit, side, sinks, lead, rows, dims, D: tl.constexpr, D_UNIT: tl.constexpr):
    """The sinks as they are, filled up with zeros to `lead` rows."""
    wide = (dims < D)[None, :]
    for begin in range(0, lead, 16):
        sink = begin + tl.arange(0, 16)
        from_ = x + (sink * stride)[:, None] * D_UNIT + dims
        tile = tl.load(from_, mask=(sink < sinks)[:, None] & wide, other=0.0)
        tl.store(far + (unit * rows + sink)[:, None] * D + dims, tile, mask=(sink < lead)[:, None] & wide)
        if (unit == 0) & (side == 0):
            tl.store(bias + sink, tl.where(sink < sinks, 0.0, float("-inf")), mask=sink < lead)


_NUMBERS = ["blocks", "levels", "sinks", "lead", "all_rows", "rows"]


@triton.jit(do_not_specialize=[*_NUMBERS, "kv_heads", "k_b", "k_h", "k_r", "v_b", "v_h", "v_r"])
def mean_leaves(
    k, v, high, low, far_k, far_v, bias, above,
    blocks, levels, sinks, lead, all_rows, rows, kv_heads, k_b, k_h, k_r, v_b, v_h, v_r,
    SEGMENT: tl.constexpr, DETAIL: tl.constexpr, RANK: tl.constexpr, SHIFT: tl.constexpr, FAR: tl.constexpr,
    ROWS: tl.constexpr, LIFTS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, D_UNIT: tl.constexpr,
):  # fmt: skip
    """The levels up to 3 + LIFTS, of 8 << LIFTS rows of the lowest one. FAR: far rows too, of both sides."""
    chunk, unit, side = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = chunk * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D_TILE)
    wide = (dims < D)[None, :]
    b, g = unit // kv_heads, unit % kv_heads
    if side == 0:
        x, stride, far = k + (b * k_b + g * k_h) * D_UNIT, k_r.to(tl.int64), far_k
    else:
        x, stride, far = v + (b * v_b + g * v_h) * D_UNIT, v_r.to(tl.int64), far_v
    before1, before2, before3 = blocks * DETAIL, _before(blocks, 2, DETAIL), _before(blocks, 3, DETAIL)
    at1, at2 = lead + _before(blocks, 1 - SHIFT, RANK), lead + _before(blocks, 2 - SHIFT, RANK)
    at3 = lead + _before(blocks, 3 - SHIFT, RANK)
    # rows that become one lie in the same registers, those of each of the eight places in a tile of their own
    total3 = tl.zeros([ROWS, D_TILE], tl.float32)
    for c in tl.static_range(2):
        total2 = tl.zeros([ROWS, D_TILE], tl.float32)
        for d in tl.static_range(2):
            total1 = tl.zeros([ROWS, D_TILE], tl.float32)
            for e in tl.static_range(2):
                line = 8 * row + (4 * c + 2 * d + e)
                first = line * SEGMENT
                from_ = x + (first * stride)[:, None] * D_UNIT + dims
                total = _leaf(from_, stride, first, line < blocks * DETAIL, wide, sinks, SEGMENT, D_UNIT)
                _put(
                    total, line, 0, 0, lead, high, low, far, bias, unit, side, blocks, levels, sinks, all_rows, rows,
                    dims, SEGMENT, DETAIL, RANK, SHIFT, FAR, D,
                )  # fmt: skip
                total1 += total
            _put(
                total1, 4 * row + (2 * c + d), 1, before1, at1, high, low, far, bias, unit, side, blocks, levels,
                sinks, all_rows, rows, dims, SEGMENT, DETAIL, RANK, SHIFT, FAR, D,
            )  # fmt: skip
            total2 += total1
        _put(
            total2, 2 * row + c, 2, before2, at2, high, low, far, bias, unit, side, blocks, levels, sinks, all_rows,
            rows, dims, SEGMENT, DETAIL, RANK, SHIFT, FAR, D,
        )  # fmt: skip
        total3 += total2
    _put(
        total3, row, 3, before3, at3, high, low, far, bias, unit, side, blocks, levels, sinks, all_rows, rows, dims,
        SEGMENT, DETAIL, RANK, SHIFT, FAR, D,
    )  # fmt: skip
    left = _rise(
        total3, chunk * ROWS, 3, before3, at3, high, low, far, bias, unit, side, blocks, levels, sinks, all_rows, rows,
        dims, LIFTS, SEGMENT, DETAIL, RANK, SHIFT, FAR, D,
    )  # fmt: skip
    to = ((unit * tl.num_programs(2) + side) * tl.num_programs(0) + chunk) * D + dims
    tl.store(above + to[None, :], left, mask=wide)
    if FAR:  # noqa: SIM102
        if chunk == 0:
            _lead(x, stride, far, bias, unit, side, sinks, lead, rows, dims, D, D_UNIT)


@triton.jit(do_not_specialize=["height", "up", "many", *_NUMBERS])
def mean_parents(
    below, above, high, low, far_k, far_v, bias, height, up, many, blocks, levels, sinks, lead, all_rows, rows,
    SEGMENT: tl.constexpr, DETAIL: tl.constexpr, RANK: tl.constexpr, SHIFT: tl.constexpr, FAR: tl.constexpr,
    LIFTS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """LIFTS levels above `height`, of which there are `many` sums for each key head and side.

    Args:
        up: height - SHIFT, that of the same sums among far rows.
    """
    ROWS: tl.constexpr = 1 << LIFTS
    chunk, unit, side = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = chunk * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D_TILE)
    wide = (dims < D)[None, :]
    if side == 0:
        far = far_k
    else:
        far = far_v
    unit_side = unit * tl.num_programs(2) + side
    from_ = (unit_side * many + row)[:, None] * D + dims
    x = tl.load(below + from_, mask=(row < many)[:, None] & wide, other=0.0)
    left = _rise(
        x, chunk * ROWS, height, _before(blocks, height, DETAIL), lead + _before(blocks, up, RANK), high, low, far,
        bias, unit, side, blocks, levels, sinks, all_rows, rows, dims, LIFTS, SEGMENT, DETAIL, RANK, SHIFT, FAR, D,
    )  # fmt: skip
    to = (unit_side * tl.num_programs(0) + chunk) * D + dims
    tl.store(above + to[None, :], left, mask=wide)


def sketches_of(k: Tensor, tree: Tree, detail: int, score: str) -> Sketches:
    """`detail` rows for each group of each level, by score "peak" or "mean"."""
    batch, kv_heads, _, width = k.shape
    many = [n * detail for n in tree.groups]
    shape = batch, kv_heads, sum(many), width
    if score == "mean":
        high, low = k.new_empty(shape), k.new_empty(shape)
        _means(k, k, high, low, (high, high, high), tree, detail, far=False)
        return Sketches(high, low, True)
    k, k_at = _dense(k)
    unit, segment, wide = _unit(k, width, *k_at), tree.block // detail, padded(width)
    k_at = [n // unit for n in k_at]
    kept = torch.empty(shape, dtype=torch.float32, device=k.device)
    peaks = k.new_empty(shape)
    size = max(1, 1024 // wide)
    start(
        leaf_peaks, (-(-many[0] // size), batch * kv_heads),
        k, kept, peaks, many[0], tree.lo, sum(many), kv_heads, *k_at, segment, size, width, wide, unit, num_warps=4,
    )  # fmt: skip
    below, rows = 0, 32
    for height in range(1, tree.levels):
        start(
            parent_peaks, (-(-many[height] // rows), batch * kv_heads),
            kept, peaks, below, below + many[height - 1], many[height], segment << (height - 1), tree.lo, sum(many),
            width, wide, rows, num_warps=4,
        )  # fmt: skip
        below += many[height - 1]
    return Sketches(peaks, peaks, False)


def pooled(k: Tensor, v: Tensor, tree: Tree, detail: int) -> tuple[Tensor, Tensor, Tensor, Sketches]:
    """Far rows (keys and values [B, G, R, D], biases [1, 1, R]) and sketches, all means; `takes` says of what."""
    batch, kv_heads, _, width = k.shape
    high, low = (k.new_empty(batch, kv_heads, sum(tree.groups) * detail, width) for _ in range(2))
    far_k, far_v = (k.new_empty(batch, kv_heads, tree.rows, width) for _ in range(2))
    bias = k.new_empty(1, 1, tree.rows, dtype=torch.float32)
    _means(k, v, high, low, (far_k, far_v, bias), tree, detail, far=True)
    return far_k, far_v, bias, Sketches(high, low, True)


def takes(tree: Tree, detail: int) -> bool:
    """Whether the far rows are to come from `pooled`: where they are sums that sketches pass through, of all tokens.

    It makes them with sinks as well, which only the interpreter has seen.
    """
    all_count = not tree.lo and tree.hi == tree.blocks * tree.block
    return tree.complete and all_count and tree.rank <= detail <= 8 * tree.rank


def _means(
    k: Tensor, v: Tensor, high: Tensor, low: Tensor, into: tuple[Tensor, Tensor, Tensor], tree: Tree, detail: int,
    *, far: bool,
) -> None:  # fmt: skip
    batch, kv_heads, _, width = k.shape
    (k, k_at), (v, v_at) = _dense(k), _dense(v)
    unit, wide, sides = _unit(k, width, *k_at, *v_at), padded(width), 1 + far
    rank = tree.rank if far else detail
    shift, rows = (detail // rank).bit_length() - 1, TILE // wide
    lifts = rows.bit_length() - 1
    lead = tree.lead if far else 0
    numbers = tree.blocks, tree.levels, tree.lo, lead, high.shape[2], into[0].shape[2]
    same = tree.block // detail, detail, rank, shift, far
    chunks, height = -(-tree.blocks * detail // (8 * rows)), 3 + lifts
    above = k.new_empty(batch * kv_heads, sides, chunks, width, dtype=torch.float32)
    start(
        mean_leaves, (chunks, batch * kv_heads, sides),
        k, v, high, low, *into, above, *numbers, kv_heads, *(n // unit for n in (*k_at, *v_at)),
        *same, rows, lifts, width, wide, unit, num_warps=WARPS,
    )  # fmt: skip
    # the highest far rows stand for as many tokens as sketches of `shift` levels more would
    while height < tree.levels - 1 + shift:
        below, many = above, chunks
        chunks = -(-many // (1 << LIFTS))
        above = k.new_empty(batch * kv_heads, sides, chunks, width, dtype=torch.float32)
        start(
            mean_parents, (chunks, batch * kv_heads, sides),
            below, above, high, low, *into, height, height - shift, many, *numbers,
            *same, LIFTS, width, wide, num_warps=4,
        )  # fmt: skip
        height += LIFTS
