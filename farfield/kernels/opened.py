"""The groups that each query opens, chosen on the GPU, and which summaries it reads beside them.

Peaks: the sketches of `select.opened`, score "peak", level by level; each row is a key, and stays in its dtype.

Search: a program stays with a tile of queries of one block on the way down the tree. The scores of a level are products
of the tile with all groups of the level that some query of it may look into, 64 at a time; of these each query keeps
those of its own candidates. They have fixed places, children in the order of their parents and then the far list, so
that the best are found by halving the range of scores until as many are above as are kept, and a row's order is that
of the groups. Levels where all groups that are far can be kept need no scores.

Masks: one bit for each query and group, words of 32 groups of one level, sinks first. A bit is set where the query
reads the summary: the group is listed or its parent is opened, and it is not opened itself. Beside them each tile's
list of the pieces of the far buffer that any of its queries reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import _dense, padded
from farfield.kernels.attend_listed import _unit
from farfield.ops.opened import list_widths
from farfield.ops.pool import Tree

TILE = 64  # queries of a tile of attention
# queries of a search, the heads that choose together counted apart, its warps, and the registers of a thread: four
# programs of a multiprocessor wait less than one that spills nothing
SEARCHED = 32, 4, 128
PROGRAMS = 1024  # that search at once, each with scratch memory of its own


@triton.jit
def _counted(first, size, sinks):
    """Tokens of a segment that are no sinks."""
    return size - tl.minimum(tl.maximum(sinks - first, 0), size)


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


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _best(q_tile, at, mask, j, size, sinks, scale, SINKS: tl.constexpr, DETAIL: tl.constexpr, D: tl.constexpr):
    """The best score of each group's segments, of `size` tokens each, less those that are sinks."""
    found = tl.full([q_tile.shape[0], at.shape[0]], float("-inf"), tl.float32)
    for part in range(DETAIL):
        rows = tl.load(at + part * D, mask=mask, other=0.0)
        logits = tl.dot(q_tile, rows.T, input_precision="ieee") * scale
        if SINKS:
            number = _counted((j * DETAIL + part) * size, size, sinks)
            share = number.to(tl.float32) / size.to(tl.float32)
            logits += tl.where(number > 0, tl.log(tl.where(number > 0, share, 1.0)), float("-inf"))[None, :]
        found = tl.maximum(found, logits)
    return found + tl.log(size.to(tl.float32))


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


VARIES = ["heads", "tokens", "runs", "hold", "tiles", "blocks", "radius", "sinks", "picks", "beam", "words", "all_rows"]
VARIES += ["total", "q_b", "q_h", "q_t"]


@triton.jit(do_not_specialize=VARIES)
def search(
    q, peaks, kept_words, kept_ids, scores, leaves, count,
    heads, tokens, runs, hold, tiles, blocks, radius, sinks, picks, beam, words, all_rows, total, q_b, q_h, q_t, scale,
    STACK: tl.constexpr, STACK_TILE: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr, DETAIL: tl.constexpr,
    D: tl.constexpr, D_TILE: tl.constexpr, D_UNIT: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The leaves of BT runs of queries, whose first ones choose together for STACK heads; one tile after another."""
    ROWS: tl.constexpr = BT * STACK_TILE
    GROUPS: tl.constexpr = 64
    NONE: tl.constexpr = -(1 << 31)
    pid = tl.program_id(0)
    line, row, slot, dims = tl.arange(0, BT), tl.arange(0, ROWS), tl.arange(0, SLOTS), tl.arange(0, D_TILE)
    spot, r = row // STACK_TILE, row % STACK_TILE
    kept_words += pid.to(tl.int64) * BT * words
    kept_ids += pid * (2 * BT * SLOTS)
    # children of what is kept, and the far list: two groups at most
    STRIDE: tl.constexpr = SLOTS + 2
    scores += pid * (ROWS * STRIDE)
    for work in range(pid, total, tl.num_programs(0)):
        # the last queries have the most to look into and start first
        all_units = total // tiles
        tile, unit = tiles - 1 - work // all_units, (work % all_units).to(tl.int64)
        units = heads // STACK
        b, u = unit // units, unit % units
        i = tile * BT + line
        leaf_at = leaves + (unit * runs + i)[:, None] * picks
        empty = (sinks >= BLOCK).to(tl.int32)
        # blocks of the queries, of the first and of the last
        n, n_row = i * hold // BLOCK, (tile * BT + spot) * hold // BLOCK
        least, last = tile * BT * hold // BLOCK, tl.minimum(tile * BT + BT - 1, runs - 1) * hold // BLOCK
        if _far(last, 0, radius) - empty <= picks:
            listed = tl.maximum(_far(n, 0, radius) - empty, 0)
            mask = (i < runs)[:, None] & (slot[None, :] < listed[:, None])
            tl.store(leaf_at + slot[None, :], tl.broadcast_to((empty + slot)[None, :], [BT, SLOTS]), mask=mask)
            tl.store(count + unit * runs + i, listed, mask=i < runs)
        else:
            token = (tile * BT + spot) * hold
            asked = (tile * BT + spot < runs) & (r < STACK)
            q_at = q + (b * q_b + (u * STACK + r) * q_h + token.to(tl.int64) * q_t)[:, None] * D_UNIT + dims
            q_tile = tl.load(q_at, mask=asked[:, None] & (dims < D), other=0.0)
            g = u if STACK > 1 else u // REPEAT
            peaks_at = peaks + (b * (heads // REPEAT) + g) * all_rows * D
            top = 1
            while _far(last, top, radius) > beam:
                top += 1
            kept, kept_row = _far(n, top, radius), _far(n_row, top, radius)
            own = line[:, None] * SLOTS + slot[None, :]
            tl.store(kept_ids + (top % 2) * (BT * SLOTS) + own, tl.broadcast_to(slot[None, :], [BT, SLOTS]))
            for w in range((_far(last, top, radius) + 31) // 32):
                tl.store(kept_words + w * BT + line, _below(kept - 32 * w))
            tl.debug_barrier()
            for step in range(top):
                height = top - 1 - step
                here, above = _far(n, height, radius), _far(n, height + 1, radius)
                here_row, above_row = _far(n_row, height, radius), _far(n_row, height + 1, radius)
                candidates, candidates_row = 2 * kept + here - 2 * above, 2 * kept_row + here_row - 2 * above_row
                listed, listed_row = here - 2 * above, here_row - 2 * above_row
                limit = tl.where(height > 0, beam, picks)
                most = tl.minimum(candidates, limit)
                first_far, stop = 2 * _far(least, height + 1, radius), _far(last, height, radius)
                held_words = (_far(last, height + 1, radius) + 31) // 32
                before = 0
                for x in range(height):
                    before += blocks >> x
                ranked = tl.zeros([ROWS], tl.int32)
                size = (BLOCK // DETAIL) << height
                for begin in range(0, stop, GROUPS):
                    j = begin + tl.arange(0, GROUPS)
                    # past the cache of the multiprocessor, where they may be older
                    word = tl.load(
                        kept_words + begin // 64 * BT + spot, mask=(spot >= 0) & (begin // 64 < held_words), other=0,
                        cache_modifier=".cg",
                    )  # fmt: skip
                    if (tl.max(_ones(word), 0) > 0) | (begin + GROUPS > first_far):
                        at = peaks_at + (before + j).to(tl.int64)[:, None] * DETAIL * D + dims
                        mask = (j < stop)[:, None] & (dims < D)
                        if (begin == 0) & (sinks > 0):
                            found = _best(q_tile, at, mask, j, size, sinks, scale, True, DETAIL, D)
                        else:
                            found = _best(q_tile, at, mask, j, size, sinks, scale, False, DETAIL, D)
                        bit = (j % 64) // 2
                        child = ((word[:, None] >> bit[None, :]) & 1) != 0
                        lower = _ones(word[:, None] & ((1 << bit) - 1)[None, :])
                        place = 2 * (ranked[:, None] + lower) + (j % 2)[None, :]
                        is_far = (j[None, :] >= 2 * above_row[:, None]) & (j[None, :] < here_row[:, None])
                        place = tl.where(is_far, j[None, :] + (SLOTS - 2 * above_row)[:, None], place)
                        tl.store(scores + row[:, None] * STRIDE + place, found, mask=child | is_far)
                        ranked += _ones(word)
                tl.debug_barrier()
                valid = slot[None, :] < 2 * kept[:, None]
                mask = slot[None, :] < 2 * kept_row[:, None]
                score_at = scores + row[:, None] * STRIDE + slot
                score = tl.load(score_at, mask=mask, other=float("-inf"))
                near0 = tl.load(scores + row * STRIDE + SLOTS, mask=listed_row > 0, other=float("-inf"))
                near1 = tl.load(scores + row * STRIDE + SLOTS + 1, mask=listed_row > 1, other=float("-inf"))
                if STACK > 1:
                    # shares of a softmax for each head, added up over the heads; as logarithms
                    there = r < STACK
                    score = tl.where(there[:, None], score, float("-inf"))
                    near0, near1 = tl.where(there, near0, float("-inf")), tl.where(there, near1, float("-inf"))
                    peak = tl.maximum(tl.max(score, 1), tl.maximum(near0, near1))
                    peak = tl.where(peak == float("-inf"), 0.0, peak)
                    mass = tl.sum(tl.exp(score - peak[:, None]), 1) + tl.exp(near0 - peak) + tl.exp(near1 - peak)
                    total_mass = peak + tl.log(tl.where(mass > 0, mass, 1.0))
                    score = _added(tl.reshape(score - total_mass[:, None], [BT, STACK_TILE, SLOTS]))
                    near0 = _added(tl.reshape(near0 - total_mass, [BT, STACK_TILE]))
                    near1 = _added(tl.reshape(near1 - total_mass, [BT, STACK_TILE]))
                # as whole numbers in the same order
                key = tl.where(valid, _ordered(score.to(tl.int32, bitcast=True)), NONE)
                key0 = tl.where(listed > 0, _ordered(near0.to(tl.int32, bitcast=True)), NONE)
                key1 = tl.where(listed > 1, _ordered(near1.to(tl.int32, bitcast=True)), NONE)
                # so many are >= low: enough; >= high: too few. By the numbers at both ends where between to look, by
                # halves at every third look
                low = tl.min(tl.where(valid, key, 0x7FFFFFFE), 1)
                low = tl.where(listed > 0, tl.minimum(low, key0), low)
                low = tl.where(listed > 1, tl.minimum(low, key1), low)
                high = tl.maximum(tl.max(key, 1), tl.maximum(key0, key1)) + 1
                many, fewer = candidates, tl.zeros([BT], tl.int32)
                look = 0
                unsure = (many != most) & (high > low + 1)
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
                    unsure = (many != most) & (high > low + 1)
                over, equal = key > low[:, None], (key == low[:, None]) & valid
                wanted = most - tl.sum(over.to(tl.int32), 1) - (key0 > low).to(tl.int32) - (key1 > low).to(tl.int32)
                # of equal scores the lower groups: children stand first, then the far list
                tie = tl.cumsum(equal.to(tl.int32), 1)
                chosen = (over | (equal & (tie <= wanted[:, None]))) & (score > float("-inf"))
                left = wanted - tl.sum(equal.to(tl.int32), 1)
                chosen0 = (listed > 0) & ((key0 > low) | ((key0 == low) & (left > 0))) & (near0 > float("-inf"))
                left -= ((listed > 0) & (key0 == low)).to(tl.int32)
                chosen1 = (listed > 1) & ((key1 > low) | ((key1 == low) & (left > 0))) & (near1 > float("-inf"))
                rank = tl.cumsum(chosen.to(tl.int32), 1) - 1
                rank0 = tl.sum(chosen.to(tl.int32), 1)
                rank1 = rank0 + chosen0.to(tl.int32)
                half = line[:, None] * SLOTS + (slot // 2)[None, :]
                parent = tl.load(kept_ids + ((height + 1) % 2) * (BT * SLOTS) + half, mask=valid)
                group = 2 * parent + (slot % 2)[None, :]
                if height == 0:
                    inside = i < runs
                    tl.store(leaf_at + rank, group, mask=chosen & inside[:, None])
                    leaves_at = leaves + (unit * runs + i) * picks
                    tl.store(leaves_at + rank0, 2 * above, mask=chosen0 & inside)
                    tl.store(leaves_at + rank1, 2 * above + 1, mask=chosen1 & inside)
                    tl.store(count + unit * runs + i, rank1 + chosen1.to(tl.int32), mask=inside)
                else:
                    to = kept_ids + (height % 2) * (BT * SLOTS) + line * SLOTS
                    tl.store(to[:, None] + rank, group, mask=chosen)
                    tl.store(to + rank0, 2 * above, mask=chosen0)
                    tl.store(to + rank1, 2 * above + 1, mask=chosen1)
                    for w in range((stop + 31) // 32):
                        tl.store(kept_words + w * BT + line, tl.zeros([BT], tl.int32))
                    tl.debug_barrier()
                    tl.atomic_or(kept_words + group // 32 * BT + line[:, None], 1 << (group % 32), mask=chosen)
                    first_word = kept_words + 2 * above // 32 * BT + line
                    # both in one word: the first of them is even
                    both = (chosen0.to(tl.int32) << (2 * above % 32)) | (chosen1.to(tl.int32) << (2 * above % 32 + 1))
                    tl.atomic_or(first_word, both, mask=chosen0 | chosen1)
                kept, kept_row = most, tl.minimum(candidates_row, limit)
                tl.debug_barrier()


@triton.jit(do_not_specialize=["tokens", "tiles", "blocks", "radius", "sinks", "levels", "picks", "words", "entries"])
def masks(
    leaves, count, bits, touched, entry_row, entry_bit, entry_count,
    tokens, tiles, blocks, radius, sinks, levels, picks, words, entries,
    BLOCK: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr, PICKS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The bits of a tile's queries, those that any of them has, and a list of the pieces of GROUPS groups with any."""
    pid = tl.program_id(0).to(tl.int64)
    tile, unit = (pid % tiles).to(tl.int32), pid // tiles
    n = tile * BT // BLOCK
    line, slot = tl.arange(0, BT), tl.arange(0, PICKS)
    i = tile * BT + line
    at = unit * tokens + i
    number = tl.load(count + at, mask=i < tokens, other=0)
    there = slot[None, :] < number[:, None]
    leaf = tl.load(leaves + at[:, None] * picks + slot[None, :], mask=there, other=0)
    bits_at = bits + unit * words * tokens + i
    touched += unit * words * tiles + tile
    entry_row += pid * entries
    entry_bit += pid * entries
    filled, first, base = 0, 0, 0
    for level in range(levels + 1):
        # the sinks first, as if they were a level
        height = level - 1
        if level == 0:
            here = tl.where(n > radius, (sinks + RANK - 1) // RANK, 0)
            groups = (sinks + RANK - 1) // RANK
            above = 0
        else:
            here, above = _far(n, height, radius), _far(n, height + 1, radius)
            groups = blocks >> height
        for w in range((here + 31) // 32):
            listed = _below(here - 32 * w) & ~_below(2 * above - 32 * w)
            if level == 0:
                zero = tl.max((there & (leaf == 0)).to(tl.int32), 1)
                seen = tl.where((zero == 0) & (i < tokens), listed, 0)
            else:
                own, parent = leaf >> height, leaf >> (height + 1)
                mine = tl.where(there & (own // 32 == w), 1 << (own % 32), 0)
                mine = tl.reduce(mine, 1, _or)
                theirs = there & (parent // 16 == w) & (parent < above)
                halves = tl.reduce(tl.where(theirs, 1 << (parent % 16), 0), 1, _or)
                # every bit twice
                halves = (halves | (halves << 8)) & 0x00FF00FF
                halves = (halves | (halves << 4)) & 0x0F0F0F0F
                halves = (halves | (halves << 2)) & 0x33333333
                halves = (halves | (halves << 1)) & 0x55555555
                seen = ((halves | (halves << 1)) | listed) & ~mine
                seen = tl.where(i < tokens, seen, 0)
            tl.store(bits_at + (base + w) * tokens.to(tl.int64), seen, mask=i < tokens)
            some = tl.reduce(seen, 0, _or)
            tl.store(touched + (base + w) * tiles, some)
            for s in range(32 // GROUPS):
                field = (some >> (s * GROUPS)) & (-1 if GROUPS == 32 else (1 << GROUPS) - 1)
                if field != 0:
                    tl.store(entry_row + filled, (first + 32 * w + s * GROUPS) * RANK)
                    tl.store(entry_bit + filled, (base + w) * 32 + s * GROUPS)
                    filled += 1
        first += groups
        base += (groups + 31) // 32
    tl.store(entry_count + pid, filled)


def peaks_of(k: Tensor, tree: Tree, detail: int) -> Tensor:
    """[B, G, R, D]: `detail` keys for each group of each level, level by level."""
    batch, kv_heads, _, width = k.shape
    many = [n * detail for n in tree.groups]
    means = torch.empty(batch, kv_heads, sum(many), width, dtype=torch.float32, device=k.device)
    peaks = torch.empty(means.shape, dtype=k.dtype, device=k.device)
    k, k_at = _dense(k)
    unit, segment, wide = _unit(k, width, *k_at), tree.block // detail, padded(width)
    size = max(1, 1024 // wide)
    leaf_peaks[(-(-many[0] // size), batch * kv_heads)](
        k, means, peaks, many[0], tree.lo, sum(many), kv_heads, *[n // unit for n in k_at],
        segment, size, width, wide, unit, num_warps=4,
    )  # fmt: skip
    below = 0
    for height in range(1, tree.levels):
        rows = 32
        parent_peaks[(-(-many[height] // rows), batch * kv_heads)](
            means, peaks, below, below + many[height - 1], many[height], segment << (height - 1), tree.lo, sum(many),
            width, wide, rows, num_warps=4,
        )  # fmt: skip
        below += many[height - 1]
    return peaks


@triton.jit(
    do_not_specialize=["tokens", "runs", "hold", "radius", "sinks", "levels", "blocks", "picks", "width", "far_width"]
)
def run_lists(
    leaves, count, near, near_count, far, far_count,
    tokens, runs, hold, radius, sinks, levels, blocks, picks, width, far_width,
    BLOCK: tl.constexpr, RANK: tl.constexpr, PICKS: tl.constexpr, LOCAL: tl.constexpr, BT: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """The near and far list of each run of queries."""
    unit = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BT + tl.arange(0, BT)
    slot = tl.arange(0, PICKS)[None, :]
    asked = i < runs
    n = i * hold // BLOCK
    at = unit * runs + i
    filled = tl.load(count + at, mask=asked, other=0)
    there = slot < filled[:, None]
    leaf_at = leaves + at[:, None] * picks + slot
    leaf = tl.load(leaf_at, mask=there, other=0)
    more = slot + 1 < filled[:, None]
    before, after = tl.load(leaf_at - 1, mask=there & (slot > 0), other=-1), tl.load(leaf_at + 1, mask=more, other=-1)

    # what is opened lies before what is near
    tl.store(near + at[:, None] * width + slot, leaf, mask=there)
    local = tl.arange(0, LOCAL)[None, :]
    begin = tl.maximum(n - radius, 0)
    own = n - begin + 1
    to = near + at[:, None] * width + filled[:, None] + local
    tl.store(to, begin[:, None] + local, mask=asked[:, None] & (local < own[:, None]))
    tl.store(near_count + at, filled + own, mask=asked)

    far += at * far_width
    groups = (sinks + RANK - 1) // RANK
    closed = (n > radius) & (tl.max((there & (leaf == 0)).to(tl.int32), 1) == 0)
    sink = tl.arange(0, SINKS)[None, :]
    tl.store(far[:, None] + sink, tl.broadcast_to(sink, [BT, SINKS]), mask=(asked & closed)[:, None] & (sink < groups))
    listed = tl.where(closed, groups, 0)
    first = groups
    for height in range(levels):
        here, above = _far(n, height, radius), _far(n, height + 1, radius)
        group = leaf >> height
        odd = (group & 1) != 0
        # the siblings of opened groups: of several leaves of one group the one next to where the sibling's would stand
        other = tl.where(odd, tl.where(slot > 0, before >> height, -1), tl.where(more, after >> height, -1))
        sibling = group ^ 1
        reads = there & (group >> 1 < above[:, None]) & (other != group) & (other != sibling)
        rank = tl.cumsum(reads.to(tl.int32), 1) - 1
        tl.store(far[:, None] + listed[:, None] + rank, first + sibling, mask=reads)
        listed += tl.sum(reads.to(tl.int32), 1)
        # and the far list of the level
        for x in range(2):
            j = 2 * above + x
            opened = tl.max((there & (group == j[:, None])).to(tl.int32), 1) != 0
            reads_it = asked & (j < here) & (opened == 0)
            tl.store(far + listed, first + j, mask=reads_it)
            listed += reads_it.to(tl.int32)
        first += blocks >> height
    tl.store(far_count + at, listed, mask=asked)


def choose(
    q: Tensor, peaks: Tensor, tree: Tree, near: int, detail: int, picks: int, beam: int, shared: bool, scale: float,
    hold: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """leaves [B, lists, T / hold, picks] ascending and how many there are, int32, for each run of `hold` queries."""
    batch, heads, tokens, width = q.shape
    kv_heads, runs = peaks.shape[1], -(-tokens // hold)
    lists = kv_heads if shared else heads
    stack = heads // lists
    leaves = torch.empty(batch, lists, runs, picks, dtype=torch.int32, device=q.device)
    count = torch.empty(batch, lists, runs, dtype=torch.int32, device=q.device)
    stack_tile = padded(stack, 1)
    size, warps, registers = SEARCHED
    queries = max(1, size // stack_tile)
    tiles = -(-runs // queries)
    total = batch * lists * tiles
    programs = min(PROGRAMS, total)
    words, slots = -(-max(tree.blocks // 2, 64) // 32), padded(2 * beam)
    kept_words = torch.empty(programs, words, queries, dtype=torch.int32, device=q.device)
    kept_ids = torch.empty(programs, 2, queries, slots, dtype=torch.int32, device=q.device)
    scores = torch.empty(programs, queries * stack_tile, slots + 2, dtype=torch.float32, device=q.device)
    q, q_at = _dense(q)
    unit = _unit(q, width, *q_at)
    search[(programs,)](
        q, peaks, kept_words, kept_ids, scores, leaves, count,
        heads, tokens, runs, hold, tiles, tree.blocks, near // tree.block, tree.lo, picks, beam, words,
        peaks.shape[2], total, *[n // unit for n in q_at], scale, stack, stack_tile, heads // kv_heads, tree.block,
        detail, width, padded(width), unit, queries, slots, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return leaves, count


def lists_of_runs(
    leaves: Tensor, count: Tensor, tree: Tree, near: int, hold: int, tokens: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Near and far lists of the runs, index [B, lists, runs, P] and count."""
    batch, lists, runs, picks = leaves.shape
    radius, sinks = near // tree.block, tree.lead // tree.rank
    width, far_width = list_widths(tree, near, picks)
    new = leaves.new_empty
    near_index, far_index = new(batch, lists, runs, width), new(batch, lists, runs, far_width)
    near_count, far_count = new(batch, lists, runs), new(batch, lists, runs)
    size = 32
    run_lists[(-(-runs // size), batch * lists)](
        leaves, count, near_index, near_count, far_index, far_count,
        tokens, runs, hold, radius, tree.lo, tree.levels, tree.blocks, picks, width, far_width,
        tree.block, tree.rank, padded(picks, 1), padded(radius + 1, 1), size, padded(sinks, 1), num_warps=4,
    )  # fmt: skip
    return (near_index, near_count), (far_index, far_count)
