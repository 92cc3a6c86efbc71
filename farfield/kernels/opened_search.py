"""Which groups each query of opened FMA opens, found down the tree: sketches of all levels, then two launches a level.

Sketches: rows of `select.opened`. A peak is one of the keys and stays in their dtype. A mean is two numbers of their
dtype, of which the second is what the first has lost, so that a score is off by at most 2^-16 of
scale sum_c |q_c mean_c| in bfloat16. A program adds up the segments of a piece of the sequence, and of these further
levels while there are rows; what is left is a launch or two for pieces of pieces.

Search, from the coarsest level whose groups cannot all be kept: a query's candidates are the children of the groups
that it has kept one level above, and of the first group behind these that is no far one. One launch scores them, a
program holding the children of one parent and going through the queries that look into it, 64 at a time, as many
products as there are candidates. One keeps each query's best, by looking for a number that as many scores reach as are
kept: no sort, and ties go to the lower group. Who looks into a parent is a bit for each query, set by an integer *or*,
which comes out the same in any order. A query's choice follows from its own scores alone.
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
from farfield.ops.opened import SCORES, Plan
from farfield.ops.pool import Tree

ROWS = 64  # queries that one parent's children meet at a time, the heads that choose together counted apart
WARPS, WORDS = 4, 256  # of a program that scores, and of bits that it looks at together
KEPT = 8  # queries of a warp that keeps the best
PROGRAMS = 2112  # that score at once, each with a list of its own in memory
REGISTERS = {128: 128}  # of a thread that scores, by width: a third program a multiprocessor
RUNS = 1 << 14  # queries of a search: their scores are in memory


class Sketches(NamedTuple):
    """[B, G, R, D]: `detail` rows for each group of each level, level by level; `low` counts only where `twice`."""

    high: Tensor
    low: Tensor
    twice: bool


@triton.jit
def _counted(first, size, sinks):
    """Tokens of a segment that are no sinks."""
    return size - tl.minimum(tl.maximum(sinks - first, 0), size)


@triton.jit
def _far(n, height, radius):
    """How many groups of a level lie before the neighbours of block n's."""
    return tl.maximum((n >> height) - ((radius + (1 << height) - 1) >> height), 0)


@triton.jit
def _ones(x):
    """How many bits of a word are set."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _below(x):
    """A word with bits 0 .. x - 1 set."""
    return tl.where(x >= 32, -1, (1 << tl.minimum(tl.maximum(x, 0), 31)) - 1)


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
def _store_means(high, low, to, total, number, mask):
    """Sums over so many tokens as means, in two numbers of 16 bits."""
    mean = total / tl.where(number > 0, number, 1.0)[:, None]
    rounded = mean.to(high.dtype.element_ty)
    tl.store(high + to, rounded, mask=mask)
    tl.store(low + to, (mean - rounded.to(tl.float32)).to(low.dtype.element_ty), mask=mask)


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


@triton.jit(do_not_specialize=["height", "blocks", "levels", "sinks", "all_rows", "kv_heads", "k_b", "k_h", "k_r"])
def means(
    k, high, low, height, blocks, levels, sinks, all_rows, kv_heads, k_b, k_h, k_r,
    SEGMENT: tl.constexpr, DETAIL: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_TILE: tl.constexpr, D_UNIT: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Three levels above `height` for ROWS rows of the last; LEAF: `height` itself too, read from the tokens.

    Rows that become one lie in the same registers, those of each of the eight places in a tile of their own.
    """
    unit, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D_TILE)
    wide = (dims < D)[None, :]
    size0, before0 = tl.full([], SEGMENT, tl.int64) << height, unit * all_rows
    for x in range(height):
        before0 += (blocks >> x) * DETAIL
    many0, many1 = (blocks >> height) * DETAIL, (blocks >> (height + 1)) * DETAIL
    many2, many3 = (blocks >> (height + 2)) * DETAIL, (blocks >> (height + 3)) * DETAIL
    before1 = before0 + many0
    before2 = before1 + many1
    before3 = before2 + many2
    many1 = tl.where(height + 1 < levels, many1, 0)
    many2 = tl.where(height + 2 < levels, many2, 0)
    many3 = tl.where(height + 3 < levels, many3, 0)
    k_at = k + (unit // kv_heads * k_b + unit % kv_heads * k_h) * D_UNIT
    total3 = tl.zeros([ROWS, D_TILE], tl.float32)
    for c in tl.static_range(2):
        total2 = tl.zeros([ROWS, D_TILE], tl.float32)
        for b in tl.static_range(2):
            total1 = tl.zeros([ROWS, D_TILE], tl.float32)
            for a in tl.static_range(2):
                line = 8 * row + (4 * c + 2 * b + a)
                there = line < many0
                number = _counted(line * size0, size0, sinks).to(tl.float32)
                to = (before0 + line)[:, None] * D + dims
                if LEAF:
                    first = line * SEGMENT
                    at = k_at + (first * k_r)[:, None] * D_UNIT + dims
                    total = _leaf(at, k_r, first, there, wide, sinks, SEGMENT, D_UNIT)
                    _store_means(high, low, to, total, number, there[:, None] & wide)
                else:
                    mean = tl.load(high + to, mask=there[:, None] & wide, other=0.0).to(tl.float32)
                    mean += tl.load(low + to, mask=there[:, None] & wide, other=0.0).to(tl.float32)
                    total = mean * number[:, None]
                total1 += total
            line = 4 * row + (2 * c + b)
            number = _counted(line * (2 * size0), 2 * size0, sinks).to(tl.float32)
            to = (before1 + line)[:, None] * D + dims
            _store_means(high, low, to, total1, number, (line < many1)[:, None] & wide)
            total2 += total1
        line = 2 * row + c
        number = _counted(line * (4 * size0), 4 * size0, sinks).to(tl.float32)
        to = (before2 + line)[:, None] * D + dims
        _store_means(high, low, to, total2, number, (line < many2)[:, None] & wide)
        total3 += total2
    number = _counted(row * (8 * size0), 8 * size0, sinks).to(tl.float32)
    to = (before3 + row)[:, None] * D + dims
    _store_means(high, low, to, total3, number, (row < many3)[:, None] & wide)


VARIES = ["heads", "runs", "begin", "hold", "words", "height", "blocks", "radius", "sinks", "beam"]


@triton.jit(do_not_specialize=[*VARIES, "parents", "below", "split", "all_rows", "total", "q_b", "q_h", "q_t"])
def score_children(
    q, high, low, kept, bits, next_bits, scores, readers,
    heads, runs, begin, hold, words, height, blocks, radius, sinks, beam, parents, below, split, all_rows, total,
    q_b, q_h, q_t, scale,
    STACK: tl.constexpr, STACK_TILE: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr, DETAIL: tl.constexpr,
    D: tl.constexpr, D_TILE: tl.constexpr, D_UNIT: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    TWICE: tl.constexpr, SUM: tl.constexpr, WORDS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The scores of the children of each parent, for the queries that look into it; and the next bits are cleared.

    Args:
        begin: number of the first of `runs` queries.
        below: how many groups of `height` have bits in `next_bits`, 0 for none.
        split: queries of a program, a multiple of 32.
        FIRST: whatever is far one level above is kept; `bits` and `kept` are not read.
    """
    BT: tl.constexpr = ROWS // STACK_TILE
    PARTS: tl.constexpr = DETAIL if DETAIL > 16 else 16
    pid = tl.program_id(0)
    parts = (runs + split - 1) // split
    units = total // parts // parents
    line, dims, part = tl.arange(0, ROWS), tl.arange(0, D_TILE), tl.arange(0, PARTS)
    slots, span = tl.arange(0, SLOTS), tl.arange(0, WORDS)
    spot, r = line // STACK_TILE, line % STACK_TILE
    lists = heads // STACK
    kv_heads = heads // REPEAT
    readers += pid.to(tl.int64) * split
    size = (BLOCK // DETAIL) << height
    before = 0
    for x in range(height):
        before += (blocks >> x) * DETAIL
    reach = (radius + (1 << height) - 1) >> height
    reach_above = (radius + (2 << height) - 1) >> (height + 1)
    for work in range(pid, total, tl.num_programs(0)):
        # the first groups have the most queries behind them and start first
        parent, unit = work // (units * parts), (work % units).to(tl.int64)
        b, u = unit // lists, unit % lists
        g = u if STACK > 1 else u // REPEAT
        # of these queries
        low_run = work // units % parts * split
        high_run = tl.minimum(low_run + split, runs)
        stop = (high_run + 31) // 32
        # queries first .. own - 1 have it as a neighbour, whose children are far; those behind may have kept it
        first = tl.maximum(((2 * parent + 1 + reach) << height) * (BLOCK // hold) - begin, low_run)
        own = ((parent + reach_above + 1) << (height + 1)) * (BLOCK // hold) - begin
        own = tl.maximum(tl.minimum(own, high_run), first)
        for child in tl.static_range(2):
            row = 2 * parent + child
            if row < below:
                for w in range(low_run // 32, stop, WORDS):
                    at = next_bits + (unit * below + row) * words + w + span
                    tl.store(at, tl.zeros([WORDS], tl.int32), mask=w + span < stop)
        filled = tl.maximum(high_run - first, 0)
        if not FIRST:
            # the neighbours, and behind them who has kept it, one behind the other
            neighbours = own - first
            filled = neighbours
            tl.debug_barrier()
            # the last one is nobody's but as a neighbour, and has no bits
            for w in range(own // 32, tl.where(parent + 1 < parents, stop, 0), WORDS):
                at = w + span
                word = tl.load(bits + (unit * parents + parent) * words + at, mask=at < stop, other=0)
                many = _ones(word)
                to = filled + tl.cumsum(many, 0) - many
                filled += tl.sum(many, 0)
                while tl.max((word != 0).to(tl.int32), 0) > 0:
                    for _ in tl.static_range(4):
                        tl.store(readers + to, 32 * at + _ones((word & -word) - 1), mask=word != 0)
                        word &= word - 1
                        to += 1
            tl.debug_barrier()
        if filled > 0:
            j = 2 * parent
            rows = before + j * DETAIL + part
            there = (part < DETAIL) & (j < (blocks >> height))
            beside = (part < DETAIL) & (j + 1 < (blocks >> height))
            at = ((b * kv_heads + g) * all_rows + rows)[:, None] * D + dims
            wide = (dims < D)[None, :]
            high0 = tl.load(high + at, mask=there[:, None] & wide, other=0.0)
            high1 = tl.load(high + at + DETAIL * D, mask=beside[:, None] & wide, other=0.0)
            if TWICE:
                low0 = tl.load(low + at, mask=there[:, None] & wide, other=0.0)
                low1 = tl.load(low + at + DETAIL * D, mask=beside[:, None] & wide, other=0.0)
            number0 = tl.where(there, _counted((j * DETAIL + part) * size, size, sinks), 0).to(tl.float32)
            number1 = tl.where(beside, _counted(((j + 1) * DETAIL + part) * size, size, sinks), 0).to(tl.float32)
            more0 = tl.where(number0 > 0, tl.log(tl.maximum(number0, 1.0)), float("-inf"))
            more1 = tl.where(number1 > 0, tl.log(tl.maximum(number1, 1.0)), float("-inf"))
            for step in range(0, filled, BT):
                t = step + spot
                asked = (t < filled) & (r < STACK)
                i = first + t
                if not FIRST:
                    i = tl.where(
                        t < neighbours, i, tl.load(readers + t, mask=(t >= neighbours) & (t < filled), other=0)
                    )
                token = ((begin + i) * hold).to(tl.int64)
                q_at = (b * q_b + (u * STACK + r) * q_h + token * q_t)[:, None] * D_UNIT + dims
                q_tile = tl.load(q + q_at, mask=asked[:, None] & wide, other=0.0)
                slot = parent + 0 * i
                if not FIRST:
                    known = tl.minimum(_far((begin + i) * hold // BLOCK, height + 1, radius), beam)
                    held = asked[:, None] & (slots[None, :] < known[:, None])
                    ids = tl.load(kept + ((unit * runs + i) * SLOTS)[:, None] + slots[None, :], mask=held, other=parent)
                    slot = tl.sum((ids < parent).to(tl.int32), 1)
                slot = tl.where(i < own, SLOTS, slot)
                logits0 = tl.dot(q_tile, high0.T, input_precision="ieee")
                logits1 = tl.dot(q_tile, high1.T, input_precision="ieee")
                if TWICE:
                    logits0 = tl.dot(q_tile, low0.T, logits0, input_precision="ieee")
                    logits1 = tl.dot(q_tile, low1.T, logits1, input_precision="ieee")
                logits0 = logits0 * scale + more0[None, :]
                logits1 = logits1 * scale + more1[None, :]
                found0, found1 = tl.max(logits0, 1), tl.max(logits1, 1)
                if SUM:
                    found0, found1 = _added(logits0), _added(logits1)
                place = scores + ((unit * runs + i) * STACK + r) * (2 * SLOTS + 2) + 2 * slot
                tl.store(place, found0, mask=asked)
                tl.store(place + 1, found1, mask=asked)


@triton.jit
def _ordered(x):
    """Between a float32 and a whole number: the same order."""
    return tl.where(x < 0, x ^ 0x7FFFFFFF, x)


@triton.jit
def _added(x):
    """The logarithm of the sum of exponentials along dimension 1."""
    peak = tl.max(x, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    return base + tl.log(tl.sum(tl.exp(x - tl.expand_dims(base, 1)), 1))


@triton.jit(do_not_specialize=[*VARIES, "all_runs", "picks", "tiles", "parents"])
def keep_best(
    scores, kept, next_kept, next_bits, leaves, count,
    heads, runs, begin, hold, words, height, blocks, radius, sinks, beam, all_runs, picks, tiles, parents,
    STACK: tl.constexpr, STACK_TILE: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Each query's best children by their scores, ascending: the next parents, or at the end the leaves.

    Args:
        parents: how many groups of `height` have bits in `next_bits`.
    """
    ROWS: tl.constexpr = BT * STACK_TILE
    CHILDREN: tl.constexpr = 2 * SLOTS
    NONE: tl.constexpr = -(1 << 31)
    pid = tl.program_id(0)
    tile, unit = pid % tiles, (pid // tiles).to(tl.int64)
    line, row, slot = tl.arange(0, BT), tl.arange(0, ROWS), tl.arange(0, CHILDREN)
    i, i_row, r = tile * BT + line, tile * BT + row // STACK_TILE, row % STACK_TILE
    n, n_row = (begin + i) * hold // BLOCK, (begin + i_row) * hold // BLOCK
    here, above = _far(n, height, radius), _far(n, height + 1, radius)
    here_row, above_row = _far(n_row, height, radius), _far(n_row, height + 1, radius)
    kept_now, kept_row = tl.minimum(above, beam), tl.minimum(above_row, beam)
    listed, listed_row = here - 2 * above, here_row - 2 * above_row
    candidates = 2 * kept_now + listed
    most = tl.minimum(candidates, picks if LAST else beam)
    valid = slot[None, :] < 2 * kept_now[:, None]
    asked = (i_row < runs) & (r < STACK)
    score_at = scores + ((unit * runs + i_row) * STACK + r) * (CHILDREN + 2)
    mask = asked[:, None] & (slot[None, :] < 2 * kept_row[:, None])
    score = tl.load(score_at[:, None] + slot, mask=mask, other=float("-inf"))
    near0 = tl.load(score_at + CHILDREN, mask=asked & (listed_row > 0), other=float("-inf"))
    near1 = tl.load(score_at + CHILDREN + 1, mask=asked & (listed_row > 1), other=float("-inf"))
    if STACK > 1:
        # shares of a softmax for each head, added up over the heads; as logarithms
        peak = tl.maximum(tl.max(score, 1), tl.maximum(near0, near1))
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.sum(tl.exp(score - peak[:, None]), 1) + tl.exp(near0 - peak) + tl.exp(near1 - peak)
        total_mass = peak + tl.log(tl.where(mass > 0, mass, 1.0))
        score = _added(tl.reshape(score - total_mass[:, None], [BT, STACK_TILE, CHILDREN]))
        near0 = _added(tl.reshape(near0 - total_mass, [BT, STACK_TILE]))
        near1 = _added(tl.reshape(near1 - total_mass, [BT, STACK_TILE]))
    # as whole numbers in the same order
    key = tl.where(valid, _ordered(score.to(tl.int32, bitcast=True)), NONE)
    key0 = tl.where(listed > 0, _ordered(near0.to(tl.int32, bitcast=True)), NONE)
    key1 = tl.where(listed > 1, _ordered(near1.to(tl.int32, bitcast=True)), NONE)
    # so many are >= low: enough; >= high: too few. By the numbers at both ends where between to look, by halves at
    # every third look
    low = tl.min(tl.where(valid, key, 0x7FFFFFFE), 1)
    low = tl.where(listed > 0, tl.minimum(low, key0), low)
    low = tl.where(listed > 1, tl.minimum(low, key1), low)
    high = tl.maximum(tl.max(key, 1), tl.maximum(key0, key1)) + 1
    many, fewer = candidates, tl.zeros([BT], tl.int32)
    look = 0
    unsure = (many != most) & (high > low + 1) & (i < runs)
    while tl.max(unsure.to(tl.int32), 0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        if look % 3 != 2:
            bottom = _ordered(low).to(tl.float32, bitcast=True)
            reach = _ordered(high).to(tl.float32, bitcast=True) - bottom
            share = (many - most).to(tl.float32) + 0.5
            guess = bottom + reach * (share / tl.maximum(many - fewer, 1).to(tl.float32))
            guess = _ordered(guess.to(tl.int32, bitcast=True))
            middle = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        look += 1
        enough = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        enough += (key0 >= middle).to(tl.int32) + (key1 >= middle).to(tl.int32)
        many = tl.where(unsure & (enough >= most), enough, many)
        low = tl.where(unsure & (enough >= most), middle, low)
        fewer = tl.where(unsure & (enough < most), enough, fewer)
        high = tl.where(unsure & (enough < most), middle, high)
        unsure = unsure & (many != most) & (high > low + 1)
    over, equal = key > low[:, None], (key == low[:, None]) & valid
    wanted = most - tl.sum(over.to(tl.int32), 1) - (key0 > low).to(tl.int32) - (key1 > low).to(tl.int32)
    # of equal scores the lower groups: children stand first, then what is listed
    tie = tl.cumsum(equal.to(tl.int32), 1)
    inside = i < runs
    chosen = (over | (equal & (tie <= wanted[:, None]))) & (score > float("-inf")) & inside[:, None]
    left = wanted - tl.sum(equal.to(tl.int32), 1)
    chosen0 = (listed > 0) & ((key0 > low) | ((key0 == low) & (left > 0))) & (near0 > float("-inf")) & inside
    left -= ((listed > 0) & (key0 == low)).to(tl.int32)
    chosen1 = (listed > 1) & ((key1 > low) | ((key1 == low) & (left > 0))) & (near1 > float("-inf")) & inside
    rank = tl.cumsum(chosen.to(tl.int32), 1) - 1
    rank0 = tl.sum(chosen.to(tl.int32), 1)
    rank1 = rank0 + chosen0.to(tl.int32)
    group = tl.broadcast_to(slot[None, :], [BT, CHILDREN])
    if not FIRST:
        half = ((unit * runs + i) * SLOTS)[:, None] + (slot // 2)[None, :]
        group = 2 * tl.load(kept + half, mask=valid & inside[:, None], other=0) + (slot % 2)[None, :]
    if LAST:
        leaves += (unit * all_runs + begin + i) * picks
        tl.store(leaves[:, None] + rank, group, mask=chosen)
        tl.store(leaves + rank0, 2 * above, mask=chosen0)
        tl.store(leaves + rank1, 2 * above + 1, mask=chosen1)
        tl.store(count + unit * all_runs + begin + i, rank1 + chosen1.to(tl.int32), mask=inside)
    else:
        next_kept += (unit * runs + i) * SLOTS
        tl.store(next_kept[:, None] + rank, group, mask=chosen)
        tl.store(next_kept + rank0, 2 * above, mask=chosen0)
        tl.store(next_kept + rank1, 2 * above + 1, mask=chosen1)
        # several queries share a word; an or comes out the same in any order
        next_bits += unit * parents * words + i // 32
        bit = 1 << (i % 32)
        bits = tl.broadcast_to(bit[:, None], [BT, CHILDREN])
        tl.atomic_or(next_bits[:, None] + group * words.to(tl.int64), bits, mask=chosen, sem="relaxed")
        tl.atomic_or(next_bits + 2 * above * words.to(tl.int64), bit, mask=chosen0, sem="relaxed")
        tl.atomic_or(next_bits + (2 * above + 1) * words.to(tl.int64), bit, mask=chosen1, sem="relaxed")


def sketches_of(k: Tensor, tree: Tree, detail: int, score: str) -> Sketches:
    """`detail` rows for each group of each level, by score "peak" or "mean"."""
    batch, kv_heads, _, width = k.shape
    many = [n * detail for n in tree.groups]
    shape = batch, kv_heads, sum(many), width
    k, k_at = _dense(k)
    unit, segment, wide = _unit(k, width, *k_at), tree.block // detail, padded(width)
    k_at = [n // unit for n in k_at]
    if score == "mean":
        high, low = k.new_empty(shape), k.new_empty(shape)
        rows = 1024 // wide
        for height in range(0, max(tree.levels - 1, 1), 3):
            start(
                means, (-(-many[height] // (8 * rows)), batch * kv_heads),
                k, high, low, height, tree.blocks, tree.levels, tree.lo, sum(many), kv_heads, *k_at,
                segment, detail, rows, width, wide, unit, LEAF=height == 0, num_warps=4,
            )  # fmt: skip
        return Sketches(high, low, True)
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


def chosen(q: Tensor, k: Tensor, tree: Tree, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """leaves [B, lists, T / hold, picks] ascending and how many there are, int32, for each run of queries."""
    return choose(q, sketches_of(k, tree, plan.detail, SCORES[plan.score]), tree, plan, scale)


def choose(q: Tensor, sketches: Sketches, tree: Tree, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    kv_heads, runs = sketches.high.shape[1], -(-tokens // plan.hold)
    lists = kv_heads if plan.shared else heads
    leaves = torch.empty(batch, lists, runs, plan.picks, dtype=torch.int32, device=q.device)
    count = torch.empty(batch, lists, runs, dtype=torch.int32, device=q.device)
    q, q_at = _dense(q)
    unit = _unit(q, width, *q_at)
    about = [n // unit for n in q_at], unit, kv_heads, leaves, count
    for begin in range(0, runs, RUNS):
        _search(q, sketches, tree, plan, scale, begin, min(RUNS, runs - begin), *about)
    return leaves, count


def _search(
    q: Tensor, sketches: Sketches, tree: Tree, plan: Plan, scale: float, begin: int, runs: int, q_at: list[int],
    unit: int, kv_heads: int, leaves: Tensor, count: Tensor,
) -> None:  # fmt: skip
    """The leaves of runs begin .. begin + runs - 1."""
    near, detail, picks, beam, _, hold, _, summed = plan
    batch, heads, _, width = q.shape
    lists, all_runs = leaves.shape[1:3]
    stack, radius, units = heads // lists, near // tree.block, batch * lists
    stack_tile, slots, words = padded(stack, 1), padded(beam), -(-runs // 32)
    last = (begin + runs - 1) * hold // tree.block
    far = [max((last >> h) - ((radius + (1 << h) - 1) >> h), 0) for h in range(tree.levels + 1)]
    top = next(h for h in range(1, tree.levels + 1) if far[h] <= beam)
    new = leaves.new_empty
    scores = new((units, runs, stack, 2 * slots + 2), dtype=torch.float32)
    kept, bits = [new(units, runs, slots) for _ in range(2)], [leaves, leaves]
    for turn, height in enumerate(reversed(range(top))):
        parents, below = far[height + 1] + 1, far[height] + 1 if height else 0
        bits = [bits[1], new(units, below, words) if height else leaves]
        total = parents * units
        # where parents are few, each program takes a part of the queries
        split = -(-runs // max(1, min(PROGRAMS // total, runs // ROWS)))
        split = -(-split // 32) * 32
        total *= -(-runs // split)
        programs = min(PROGRAMS, total)
        numbers = heads, runs, begin, hold, words, height, tree.blocks, radius, tree.lo, beam
        start(
            score_children, (programs,),
            q, sketches.high, sketches.low, kept[turn % 2], bits[0], bits[1], scores, new(programs, split),
            *numbers, parents, below, split, sketches.high.shape[2], total, *q_at, scale,
            stack, stack_tile, heads // kv_heads, tree.block, detail, width, padded(width), unit, max(ROWS, stack_tile),
            slots, sketches.twice, bool(summed), WORDS, FIRST=turn == 0, num_warps=WARPS, num_stages=2,
            maxnreg=REGISTERS.get(width),
        )  # fmt: skip
        size = max(1, KEPT // stack_tile)
        tiles = -(-runs // size)
        start(
            keep_best, (tiles * units,),
            scores, kept[turn % 2], kept[1 - turn % 2], bits[1], leaves, count, *numbers, all_runs, picks, tiles, below,
            stack, stack_tile, tree.block, size, slots, FIRST=turn == 0, LAST=height == 0, num_warps=1,
        )  # fmt: skip
