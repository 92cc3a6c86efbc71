"""Which groups each query of opened FMA opens, found down the tree by sketches of all levels, in a few launches.

Search, from the coarsest level whose groups cannot all be kept, or where the tree ends early, from there: a query's
candidates are the children of the groups that it has kept one level above, and of the first group behind these that is
no far one. On the upper levels, where groups are few, one launch scores all of them for every query, and one finds each
query's best, level by level. Of the levels below two launches each do so. One scores candidates only, a program holding
the children of one parent and going through the queries that look into it: as many products as there are candidates.
One keeps each query's best, by looking for a number that as many scores reach as are kept: no sort, and ties go to the
lower group. Who looks into a parent is a bit for each query, set by an integer *or*, which comes out the same in any
order. A query's choice follows from its own scores alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import _dense, padded
from farfield.kernels.attend_listed import _unit
from farfield.kernels.opened_sketches import Sketches, _counted, sketches_of
from farfield.kernels.replay import start
from farfield.kernels.transpose import clear
from farfield.ops.opened import SCORES, Plan
from farfield.ops.pool import Tree

# queries that meet groups at a time, the heads that choose together counted apart, and warps of a program: where all
# are scored, and where those that look into one parent are
ROWS, WARPS = 64, 4
ASKERS, FEWER = 64, 4
STACKED, SEVERAL = 128, 4  # in the place of ASKERS, of so many heads and more that choose together
WORDS = 256  # of bits that are looked at together
KEPT = 128  # pairs of candidates of a warp that keeps the best, of 32 queries at most
# pairs of groups of a level that all are scored, whoever asks for them, for a beam of 16, in proportion for others;
# where queries are few, up to MANY
FEW, MANY, SCORED = 64, 2048, 1 << 19
COLUMNS = 128  # rows of sketches that queries meet at a time there
CLEARED = 4096
PROGRAMS = 2112  # that score at once, each with a list of its own in memory
RUNS = 1 << 14  # queries of a search: their scores are in memory
WIDEST = 256  # groups of the coarsest level up to which as many queries are searched for


@triton.jit
def _far(n, height, radius):
    """How many groups of a level lie before the neighbours of block n's."""
    return tl.maximum((n >> height) - ((radius + (1 << height) - 1) >> height), 0)


@triton.jit
def _low(n, height, levels, radius):
    """The first group of a level that block n reads anything of: the tree ends at `levels`."""
    return _far(n, levels, radius) << (levels - height)


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
def _share(number):
    """The logarithm of a number of tokens, -inf of none."""
    number = number.to(tl.float32)
    return tl.where(number > 0, tl.log(tl.maximum(number, 1.0)), float("-inf"))


@triton.jit
def _of_groups(
    products, scale, more, group_more,
    ROWS: tl.constexpr, DETAIL: tl.constexpr, GROUPS: tl.constexpr, SUM: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """The scores of GROUPS groups by products with their first segments, their second ones, and so on.

    The best segment of a group is that of the largest product where all hold as many tokens (ALIKE).
    """
    if SUM:
        found = _added(tl.reshape(products * scale + more[None, :], [ROWS, DETAIL, GROUPS]))
    elif ALIKE:
        found = tl.max(tl.reshape(products, [ROWS, DETAIL, GROUPS]), 1) * scale + group_more[None, :]
    else:
        found = tl.max(tl.reshape(products * scale + more[None, :], [ROWS, DETAIL, GROUPS]), 1)
    return found


VARIES = ["heads", "runs", "begin", "hold", "words", "height", "blocks", "levels", "radius", "sinks", "beam"]


@triton.jit(do_not_specialize=[*VARIES, "parents", "below", "split", "all_rows", "total", "q_b", "q_h", "q_t"])
def score_children(
    q, high, low, kept, bits, next_bits, scores, readers,
    heads, runs, begin, hold, words, height, blocks, levels, radius, sinks, beam, parents, below, split, all_rows,
    total, q_b, q_h, q_t, scale,
    STACK: tl.constexpr, STACK_TILE: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr, DETAIL: tl.constexpr,
    D: tl.constexpr, D_TILE: tl.constexpr, D_UNIT: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    STEPS: tl.constexpr, TWICE: tl.constexpr, SUM: tl.constexpr, ALIKE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The scores of the children of each parent, for the queries that look into it; and the next bits are cleared.

    Args:
        q: of the queries that choose, one a run.
        begin: number of the first of `runs` runs of `hold` queries.
        below: how many groups of `height` have bits in `next_bits`, 0 for none.
        split: queries of a program, a multiple of 32.
        ALIKE: all segments hold as many tokens, and the scale is positive.
    """
    BT: tl.constexpr = ROWS // STACK_TILE
    PARTS: tl.constexpr = 2 * DETAIL if DETAIL > 8 else 16
    # means in float32, which become two numbers here
    WHOLE: tl.constexpr = TWICE and high.dtype.element_ty != q.dtype.element_ty
    CHILDREN: tl.constexpr = PARTS // DETAIL
    pid = tl.program_id(0)
    parts = (runs + split - 1) // split
    line, dims, part = tl.arange(0, ROWS), tl.arange(0, D_TILE), tl.arange(0, PARTS)
    child, span = tl.arange(0, CHILDREN), tl.arange(0, WORDS)
    spot, r = line // STACK_TILE, line % STACK_TILE
    # what only fills up a tile reads what is there, and writes nothing
    own_head, head = r < STACK, tl.minimum(r, STACK - 1)
    lists = heads // STACK
    kv_heads = heads // REPEAT
    readers += pid.to(tl.int64) * 2 * split
    size = (BLOCK // DETAIL) << height
    before = 0
    for x in range(height):
        before += (blocks >> x) * DETAIL
    reach = (radius + (1 << height) - 1) >> height
    reach_above = (radius + (2 << height) - 1) >> (height + 1)
    for work in range(pid, total, tl.num_programs(0)):
        # the first groups have the most queries behind them and start first
        # unit by unit: what queries of one look up again and again stays in the cache
        parent, unit, piece = work // parts % parents, (work // (parts * parents)).to(tl.int64), work % parts
        b, u = unit // lists, unit % lists
        g = u if STACK > 1 else u // REPEAT
        # of these queries
        low_run = piece * split
        high_run = tl.minimum(low_run + split, runs)
        stop = (high_run + 31) // 32
        # queries first .. own - 1 have it as a neighbour, whose children are far; those behind may have kept it
        first = tl.maximum(((2 * parent + 1 + reach) << height) * (BLOCK // hold) - begin, low_run)
        own = ((parent + reach_above + 1) << (height + 1)) * (BLOCK // hold) - begin
        own = tl.maximum(tl.minimum(own, high_run), first)
        for one in tl.static_range(2):
            row = 2 * parent + one
            if row < below:
                for w in range(low_run // 32, stop, WORDS):
                    at = next_bits + (unit * below + row) * words + w + span
                    tl.store(at, tl.zeros([WORDS], tl.int32), mask=w + span < stop)
        # the neighbours, and behind them who has kept it, one behind the other
        neighbours = own - first
        filled = neighbours
        tl.debug_barrier()
        # those from `ends` on do not reach back to it
        ends = ((parent >> (levels - height - 1)) + ((radius + (1 << levels) - 1) >> levels) + 1) << levels
        ends = tl.minimum(stop, (tl.maximum(ends * (BLOCK // hold) - begin, 0) + 31) // 32)
        # the last one is nobody's but as a neighbour, and has no bits
        for w in range(own // 32, tl.where(parent + 1 < parents, ends, 0), WORDS):
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
        # and which of the groups that each of them has kept this one is, of all of them at once
        for some in range(neighbours, filled, WORDS):
            inside = some + span < filled
            i = tl.load(readers + some + span, mask=inside, other=0)
            n = (begin + i) * hold // BLOCK
            known = tl.minimum(_far(n, height + 1, radius) - _low(n, height + 1, levels, radius), beam)
            slot = tl.zeros([WORDS], tl.int32)
            for half in tl.static_range(STEPS):
                probe = slot + (SLOTS >> (half + 1))
                at = (unit * runs + i) * SLOTS + probe - 1
                it = tl.load(kept + at, mask=inside & (probe <= known), other=parent)
                slot = tl.where(it < parent, probe, slot)
            tl.store(readers + split + some + span, slot, mask=inside)
        tl.debug_barrier()
        if filled > 0:
            # the children's first segments, their second ones, and so on
            own_child = part % CHILDREN
            rows = (2 * parent + own_child) * DETAIL + part // CHILDREN
            there = (own_child < 2) & (rows < (blocks >> height) * DETAIL)
            at = ((b * kv_heads + g) * all_rows + before + rows)[:, None] * D + dims
            wide = (dims < D)[None, :]
            sketch = tl.load(high + at, mask=there[:, None] & wide, other=0.0)
            if WHOLE:
                whole = sketch
                sketch = whole.to(q.dtype.element_ty)
                rest = (whole - sketch.to(tl.float32)).to(q.dtype.element_ty)
            elif TWICE:
                rest = tl.load(low + at, mask=there[:, None] & wide, other=0.0)
            more = _share(tl.where(there, _counted(rows * size, size, sinks), 0))
            group_more = _share(tl.where((child < 2) & (2 * parent + child < (blocks >> height)), size, 0))
            q_own = q + (b * q_b + (u * STACK + head) * q_h)[:, None] * D_UNIT + dims
            to = scores + ((unit * STACK + head) * (SLOTS + 1) * runs * 2)[:, None] + child[None, :]
            for step in range(0, filled, BT):
                asked = (step + spot < filled) & own_head
                t = tl.minimum(step + spot, filled - 1)
                i = tl.where(t < neighbours, first + t, tl.load(readers + t))
                slot = tl.where(t < neighbours, SLOTS, tl.load(readers + split + t))
                q_at = q_own + (i.to(tl.int64) * q_t)[:, None] * D_UNIT
                if D == D_TILE:
                    q_tile = tl.load(q_at)
                else:
                    q_tile = tl.load(q_at, mask=wide, other=0.0)
                logits = tl.dot(q_tile, sketch.T, input_precision="ieee")
                if TWICE:
                    logits = tl.dot(q_tile, rest.T, logits, input_precision="ieee")
                found = _of_groups(logits, scale, more, group_more, ROWS, DETAIL, CHILDREN, SUM, ALIKE)
                tl.store(to + ((slot * runs + i) * 2)[:, None], found, mask=asked[:, None] & (child < 2)[None, :])


@triton.jit(
    do_not_specialize=[
        "heads",
        "runs",
        "begin",
        "hold",
        "bottom",
        "top",
        "blocks",
        "levels",
        "radius",
        "sinks",
        "width",
        "tiles",
        "units",
        "all_rows",
        "q_b",
        "q_h",
        "q_t",
    ]
)
def score_every(
    q, high, low, scores,
    heads, runs, begin, hold, bottom, top, blocks, levels, radius, sinks, width, tiles, units, all_rows,
    q_b, q_h, q_t, scale,
    STACK: tl.constexpr, STACK_TILE: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr, DETAIL: tl.constexpr,
    D: tl.constexpr, D_TILE: tl.constexpr, D_UNIT: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    TWICE: tl.constexpr, SUM: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """The scores of all groups of levels bottom .. top - 1 that any of `runs` queries may keep, GROUPS a program.

    Args:
        width: pairs of groups of these levels.
    """
    BT: tl.constexpr = ROWS // STACK_TILE
    COLUMNS: tl.constexpr = GROUPS * DETAIL
    # means in float32, which become two numbers here
    WHOLE: tl.constexpr = TWICE and high.dtype.element_ty != q.dtype.element_ty
    pid = tl.program_id(0)
    unit = (pid % units).to(tl.int64)
    lists, kv_heads = heads // STACK, heads // REPEAT
    b, u = unit // lists, unit % lists
    g = u if STACK > 1 else u // REPEAT
    # the level of this program's groups, the first of them, and how many pairs and rows come before the level's
    last = (begin + runs - 1) * hold // BLOCK
    chunk, height, base, before = pid // units, bottom, 0, 0
    for x in range(bottom):
        before += (blocks >> x) * DETAIL
    many = (_far(last, height + 1, radius) + 1) * 2
    while (chunk * GROUPS >= many) & (height + 1 < top):
        chunk -= (many + GROUPS - 1) // GROUPS
        base += many // 2
        before += (blocks >> height) * DETAIL
        height += 1
        many = (_far(last, height + 1, radius) + 1) * 2
    group = chunk * GROUPS
    line, dims, column = tl.arange(0, ROWS), tl.arange(0, D_TILE), tl.arange(0, COLUMNS)
    spot, r = line // STACK_TILE, line % STACK_TILE
    # the groups' first segments, their second ones, and so on: a thread has all of a group's, or many of them
    j, own = group + column % GROUPS, group + tl.arange(0, GROUPS)
    there = j < (blocks >> height)
    wide = (dims < D)[None, :]
    row = j * DETAIL + column // GROUPS
    at = ((b * kv_heads + g) * all_rows + before + row)[:, None] * D + dims
    sketch = tl.load(high + at, mask=there[:, None] & wide, other=0.0)
    if WHOLE:
        whole = sketch
        sketch = whole.to(q.dtype.element_ty)
        rest = (whole - sketch.to(tl.float32)).to(q.dtype.element_ty)
    elif TWICE:
        rest = tl.load(low + at, mask=there[:, None] & wide, other=0.0)
    size = (BLOCK // DETAIL) << height
    more = _share(tl.where(there, _counted(row * size, size, sinks), 0))
    group_more = _share(tl.where(own < (blocks >> height), size, 0))
    # of groups that are far for none of a tile's queries, or too far for all, nobody asks
    reach = (radius + (1 << height) - 1) >> height
    first = tl.maximum(((group + reach + 1) << height) * BLOCK // hold - begin, 0) // BT
    ends = ((group + GROUPS - 1) >> (levels - height)) + ((radius + (1 << levels) - 1) >> levels) + 1
    ends = (tl.maximum((ends << levels) * BLOCK // hold - begin, 0) + BT - 1) // BT
    # what only fills up a tile reads what is there, and writes nothing
    own_head, head = r < STACK, tl.minimum(r, STACK - 1)
    q_own = q + (b * q_b + (u * STACK + head) * q_h)[:, None] * D_UNIT + dims
    place = ((unit * STACK + head) * width + base)[:, None] + (own // 2)[None, :]
    to = scores + place * runs * 2 + (own % 2)[None, :]
    for tile in range(first + tl.program_id(1), tl.minimum(tiles, ends), tl.num_programs(1)):
        asked = (tile * BT + spot < runs) & own_head
        i = tl.minimum(tile * BT + spot, runs - 1)
        q_at = q_own + (i.to(tl.int64) * q_t)[:, None] * D_UNIT
        if D == D_TILE:
            q_tile = tl.load(q_at)
        else:
            q_tile = tl.load(q_at, mask=wide, other=0.0)
        logits = tl.dot(q_tile, sketch.T, input_precision="ieee")
        if TWICE:
            logits = tl.dot(q_tile, rest.T, logits, input_precision="ieee")
        found = _of_groups(logits, scale, more, group_more, ROWS, DETAIL, GROUPS, SUM, ALIKE)
        tl.store(to + (i * 2)[:, None], found, mask=asked[:, None] & (own < many)[None, :])


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


@triton.jit
def _plus(x, y):
    """log(e^x + e^y), and x where y is -inf."""
    peak = tl.maximum(x, y)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak + tl.log(tl.exp(x - peak) + tl.exp(y - peak))


@triton.jit
def _best(
    scores, parent, unit, runs, i, inside, valid, kept_now, above, listed, most, width, base,
    STACK: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """Which children of what each query has kept are its best, and their ranks; and so of the two that are listed.

    A lane has a query, and its candidates in registers.
    """
    NONE: tl.constexpr = -(1 << 31)
    slot = tl.arange(0, SLOTS)[:, None]
    place, near_place = slot + tl.zeros([SLOTS, BT], tl.int32), tl.zeros([BT], tl.int32) + SLOTS
    if EVERY:
        place, near_place = parent, above
    candidates = 2 * kept_now + listed
    score0 = tl.full([SLOTS, BT], float("-inf"), tl.float32)
    score1, near0 = score0, tl.full([BT], float("-inf"), tl.float32)
    near1 = near0
    for r in range(STACK):
        from_ = scores + ((unit * STACK + r) * width + base) * runs * 2
        at = from_ + (place * runs + i[None, :]) * 2
        x0 = tl.load(at, mask=valid, other=float("-inf"))
        x1 = tl.load(at + 1, mask=valid, other=float("-inf"))
        at = from_ + (near_place * runs + i) * 2
        y0 = tl.load(at, mask=inside & (listed > 0), other=float("-inf"))
        y1 = tl.load(at + 1, mask=inside & (listed > 1), other=float("-inf"))
        if STACK > 1:
            # shares of a softmax for each head, added up over the heads; as logarithms
            peak = tl.maximum(tl.maximum(tl.max(x0, 0), tl.max(x1, 0)), tl.maximum(y0, y1))
            peak = tl.where(peak == float("-inf"), 0.0, peak)
            mass = tl.sum(tl.exp(x0 - peak[None, :]) + tl.exp(x1 - peak[None, :]), 0)
            mass += tl.exp(y0 - peak) + tl.exp(y1 - peak)
            total = peak + tl.log(tl.where(mass > 0, mass, 1.0))
            score0, score1 = _plus(score0, x0 - total[None, :]), _plus(score1, x1 - total[None, :])
            near0, near1 = _plus(near0, y0 - total), _plus(near1, y1 - total)
        else:
            score0, score1, near0, near1 = x0, x1, y0, y1
    # as whole numbers in the same order
    key0 = tl.where(valid, _ordered(score0.to(tl.int32, bitcast=True)), NONE)
    key1 = tl.where(valid, _ordered(score1.to(tl.int32, bitcast=True)), NONE)
    key2 = tl.where(listed > 0, _ordered(near0.to(tl.int32, bitcast=True)), NONE)
    key3 = tl.where(listed > 1, _ordered(near1.to(tl.int32, bitcast=True)), NONE)
    # so many are >= low: enough; >= high: too few. By the numbers at both ends where between to look, by halves at
    # every third look
    low = tl.min(tl.where(valid, tl.minimum(key0, key1), 0x7FFFFFFE), 0)
    low = tl.where(listed > 0, tl.minimum(low, key2), low)
    low = tl.where(listed > 1, tl.minimum(low, key3), low)
    high = tl.maximum(tl.max(tl.maximum(key0, key1), 0), tl.maximum(key2, key3)) + 1
    many, fewer = candidates, tl.zeros([BT], tl.int32)
    look = 0
    unsure = (many != most) & (high > low + 1) & inside
    while tl.max(unsure.to(tl.int32), 0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        if look % 3 != 2:
            least = _ordered(low).to(tl.float32, bitcast=True)
            reach = _ordered(high).to(tl.float32, bitcast=True) - least
            share = (many - most).to(tl.float32) + 0.5
            guess = least + reach * (share / tl.maximum(many - fewer, 1).to(tl.float32))
            guess = _ordered(guess.to(tl.int32, bitcast=True))
            middle = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        look += 1
        enough = tl.sum((key0 >= middle[None, :]).to(tl.int32) + (key1 >= middle[None, :]).to(tl.int32), 0)
        enough += (key2 >= middle).to(tl.int32) + (key3 >= middle).to(tl.int32)
        many = tl.where(unsure & (enough >= most), enough, many)
        low = tl.where(unsure & (enough >= most), middle, low)
        fewer = tl.where(unsure & (enough < most), enough, fewer)
        high = tl.where(unsure & (enough < most), middle, high)
        unsure = unsure & (many != most) & (high > low + 1)
    over0, over1 = key0 > low[None, :], key1 > low[None, :]
    equal0, equal1 = (key0 == low[None, :]) & valid, (key1 == low[None, :]) & valid
    wanted = most - tl.sum(over0.to(tl.int32) + over1.to(tl.int32), 0) - (key2 > low).to(tl.int32)
    wanted -= (key3 > low).to(tl.int32)
    # of equal scores the lower groups: children stand first, then what is listed
    both = equal0.to(tl.int32) + equal1.to(tl.int32)
    tie = tl.cumsum(both, 0)
    real = inside[None, :]
    chosen0 = (over0 | (equal0 & (tie - equal1.to(tl.int32) <= wanted[None, :]))) & (score0 > float("-inf")) & real
    chosen1 = (over1 | (equal1 & (tie <= wanted[None, :]))) & (score1 > float("-inf")) & real
    left = wanted - tl.sum(both, 0)
    chosen2 = (listed > 0) & ((key2 > low) | ((key2 == low) & (left > 0))) & (near0 > float("-inf")) & inside
    left -= ((listed > 0) & (key2 == low)).to(tl.int32)
    chosen3 = (listed > 1) & ((key3 > low) | ((key3 == low) & (left > 0))) & (near1 > float("-inf")) & inside
    both = chosen0.to(tl.int32) + chosen1.to(tl.int32)
    rank1 = tl.cumsum(both, 0) - 1
    rank0 = rank1 - chosen1.to(tl.int32)
    rank2 = tl.sum(both, 0)
    rank3 = rank2 + chosen2.to(tl.int32)
    return chosen0, chosen1, chosen2, chosen3, rank0, rank1, rank2, rank3


@triton.jit
def _pick(
    leaves, count, at, inside, picks, parent, above, chosen0, chosen1, chosen2, chosen3, rank0, rank1, rank2, rank3
):  # fmt: skip
    """The leaves of runs `at`."""
    leaves += at * picks
    tl.store(leaves[None, :] + rank0, 2 * parent, mask=chosen0)
    tl.store(leaves[None, :] + rank1, 2 * parent + 1, mask=chosen1)
    tl.store(leaves + rank2, 2 * above, mask=chosen2)
    tl.store(leaves + rank3, 2 * above + 1, mask=chosen3)
    tl.store(count + at, rank3 + chosen3.to(tl.int32), mask=inside)


@triton.jit
def _keep(kept, parent, above, chosen0, chosen1, chosen2, chosen3, rank0, rank1, rank2, rank3):
    """The next parents, from `kept` on."""
    tl.store(kept[None, :] + rank0, 2 * parent, mask=chosen0)
    tl.store(kept[None, :] + rank1, 2 * parent + 1, mask=chosen1)
    tl.store(kept + rank2, 2 * above, mask=chosen2)
    tl.store(kept + rank3, 2 * above + 1, mask=chosen3)


@triton.jit
def _mark(bits, parents, words, unit, i, parent, above, chosen0, chosen1, chosen2, chosen3):
    """Their bits. Several queries share a word; an or comes out the same in any order."""
    bits += unit * parents * words + i // 32
    bit, far = 1 << (i % 32), words.to(tl.int64)
    each = tl.zeros_like(parent) + bit[None, :]
    tl.atomic_or(bits[None, :] + 2 * parent * far, each, mask=chosen0, sem="relaxed")
    tl.atomic_or(bits[None, :] + (2 * parent + 1) * far, each, mask=chosen1, sem="relaxed")
    tl.atomic_or(bits + 2 * above * far, bit, mask=chosen2, sem="relaxed")
    tl.atomic_or(bits + (2 * above + 1) * far, bit, mask=chosen3, sem="relaxed")


DOWN = ["runs", "begin", "hold", "words", "top", "bottom", "levels", "radius", "beam", "all_runs", "picks", "tiles"]


@triton.jit(do_not_specialize=[*DOWN, "parents", "width"])
def descend(
    scores, kept, bits, leaves, count,
    runs, begin, hold, words, top, bottom, levels, radius, beam, all_runs, picks, tiles, parents, width,
    STACK: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Each query's best groups level by level where all are scored: the parents below, or at the end the leaves.

    Args:
        parents: how many groups of level `bottom` have `bits`.
        width: pairs of scores a query.
    """
    pid = tl.program_id(0)
    tile, unit = pid % tiles, (pid // tiles).to(tl.int64)
    slot, i = tl.arange(0, SLOTS)[:, None], tile * BT + tl.arange(0, BT)
    inside = i < runs
    n, last = (begin + i) * hold // BLOCK, (begin + runs - 1) * hold // BLOCK
    kept += (unit * runs + i) * SLOTS
    # at first whatever is far is kept
    tl.store(kept[None, :] + slot, slot + _low(n, top, levels, radius)[None, :], mask=inside[None, :])
    base = width
    for turn in range(top - bottom):
        height = top - 1 - turn
        base -= _far(last, height + 1, radius) + 1
        here, above = _far(n, height, radius), _far(n, height + 1, radius)
        kept_now, listed = tl.minimum(above - _low(n, height + 1, levels, radius), beam), here - 2 * above
        valid = (slot < kept_now[None, :]) & inside[None, :]
        tl.debug_barrier()
        parent = tl.load(kept[None, :] + slot, mask=valid, other=0)
        tl.debug_barrier()
        most = tl.where(height == 0, picks, beam)
        most = tl.minimum(2 * kept_now + listed, most)
        c0, c1, c2, c3, r0, r1, r2, r3 = _best(
            scores, parent, unit, runs, i, inside, valid, kept_now, above, listed, most, width, base,
            STACK, BT, SLOTS, True,
        )  # fmt: skip
        if LAST and height == 0:
            _pick(leaves, count, unit * all_runs + i, inside, picks, parent, above, c0, c1, c2, c3, r0, r1, r2, r3)
        else:
            _keep(kept, parent, above, c0, c1, c2, c3, r0, r1, r2, r3)
        if not LAST and height == bottom:
            _mark(bits, parents, words, unit, i, parent, above, c0, c1, c2, c3)


@triton.jit(do_not_specialize=[*VARIES, "all_runs", "picks", "tiles", "parents"])
def keep_best(
    scores, kept, next_kept, next_bits, leaves, count,
    heads, runs, begin, hold, words, height, blocks, levels, radius, sinks, beam, all_runs, picks, tiles, parents,
    STACK: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Each query's best children by their scores, ascending: the next parents, or at the end the leaves.

    Args:
        parents: how many groups of `height` have bits in `next_bits`.
    """
    pid = tl.program_id(0)
    tile, unit = pid % tiles, (pid // tiles).to(tl.int64)
    slot, i = tl.arange(0, SLOTS)[:, None], tile * BT + tl.arange(0, BT)
    inside = i < runs
    n = (begin + i) * hold // BLOCK
    here, above = _far(n, height, radius), _far(n, height + 1, radius)
    kept_now, listed = tl.minimum(above - _low(n, height + 1, levels, radius), beam), here - 2 * above
    valid = (slot < kept_now[None, :]) & inside[None, :]
    parent = tl.load(kept + ((unit * runs + i) * SLOTS)[None, :] + slot, mask=valid, other=0)
    most = tl.minimum(2 * kept_now + listed, picks if LAST else beam)
    c0, c1, c2, c3, r0, r1, r2, r3 = _best(
        scores, parent, unit, runs, i, inside, valid, kept_now, above, listed, most, SLOTS + 1, 0,
        STACK, BT, SLOTS, False,
    )  # fmt: skip
    if LAST:
        _pick(leaves, count, unit * all_runs + i, inside, picks, parent, above, c0, c1, c2, c3, r0, r1, r2, r3)
    else:
        _keep(next_kept + (unit * runs + i) * SLOTS, parent, above, c0, c1, c2, c3, r0, r1, r2, r3)
        _mark(next_bits, parents, words, unit, i, parent, above, c0, c1, c2, c3)


def chosen(q: Tensor, k: Tensor, tree: Tree, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """leaves [B, lists, T / hold, picks] ascending and how many there are, int32, for each run of queries."""
    sketches = sketches_of(k, tree, plan.detail, SCORES[plan.score])
    return choose(q[:, :, :: plan.hold], sketches, tree, plan, scale)


def sketched(rows: Tensor, dtype: torch.dtype, score: str) -> Sketches:
    """Rows [B, G, R, D] in float32 as the search reads them, in memory without gaps."""
    if score != "mean":
        # keys as they are
        rows = rows.to(dtype)
    rows = rows.contiguous()
    # a mean becomes two numbers where it is read
    return Sketches(rows, rows, score == "mean")


def choose(
    asking: Tensor, sketches: Sketches, tree: Tree, plan: Plan, scale: float, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The same for runs first, first + 1, ... of which `asking` [B, H, runs, D] holds the queries that choose."""
    batch, heads, runs, width = asking.shape
    kv_heads = sketches.high.shape[1]
    lists = kv_heads if plan.shared else heads
    leaves = torch.empty(batch, lists, runs, plan.picks, dtype=torch.int32, device=asking.device)
    count = torch.empty(batch, lists, runs, dtype=torch.int32, device=asking.device)
    asking, q_at = _dense(asking)
    unit = _unit(asking, width, *q_at)
    about = [n // unit for n in q_at], unit, kv_heads
    # of a tree that ends early many groups are the coarsest, each with a score for every query
    step = -(-RUNS // min(max((tree.blocks >> tree.levels) // WIDEST, 1), 16))
    for begin in range(0, runs, step):
        here, *found = (x[:, :, begin : begin + step] for x in (asking, leaves, count))
        _search(here, sketches, tree, plan, scale, first + begin, *about, *found, runs)
    return leaves, count


def _search(
    q: Tensor, sketches: Sketches, tree: Tree, plan: Plan, scale: float, begin: int, q_at: list[int],
    unit: int, kv_heads: int, leaves: Tensor, count: Tensor, all_runs: int,
) -> None:  # fmt: skip
    """The leaves of runs begin, begin + 1, ..., to where `leaves` and `count` begin."""
    near, detail, picks, beam, _, hold, _, summed = plan
    batch, heads, runs, width = q.shape
    lists = leaves.shape[1]
    stack, radius, units = heads // lists, near // tree.block, batch * lists
    stack_tile, slots, words = padded(stack, 1), padded(beam), -(-runs // 32)
    last = (begin + runs - 1) * hold // tree.block
    far = [max((last >> h) - ((radius + (1 << h) - 1) >> h), 0) for h in range(tree.levels + 1)]
    # the far groups of a level that a query reads anything of are no more than `seen`
    reach = radius + (1 << tree.levels) - 1 >> tree.levels
    seen = [((reach + 1) << tree.levels - h) - (radius + (1 << h) - 1 >> h) - 1 for h in range(tree.levels + 1)]
    top = next(h for h in range(1, tree.levels + 1) if min(far[h], seen[h]) <= beam)
    new = leaves.new_empty
    kept = [new(units, runs, slots) for _ in range(2)]
    stacked = max(ROWS, stack_tile)
    shape = width, padded(width), unit, stacked
    alike = not tree.lo and scale > 0
    askers = STACKED if stack >= SEVERAL else ASKERS
    few = max(FEW * slots // 16, min(MANY, SCORED // runs))
    # where the tree ends early: a higher level has fewer groups, though none of them is kept
    top = next(h for h in range(top, tree.levels + 1) if far[h] < few or far[h] <= beam or h == tree.levels)
    pairs = [far[h + 1] + 1 for h in range(top)]
    bottom = next(h for h in range(top) if pairs[h] <= few or h == top - 1)
    every = new((units, stack, sum(pairs[bottom:]), runs, 2), dtype=torch.float32)
    groups = max(2, COLUMNS // detail)
    tiles, chunks = -(-runs // (stacked // stack_tile)), sum(-(-2 * n // groups) for n in pairs[bottom:])
    start(
        score_every, (chunks * units, max(1, min(tiles, PROGRAMS // (chunks * units)))),
        q, sketches.high, sketches.low, every, heads, runs, begin, hold, bottom, top, tree.blocks, tree.levels,
        radius, tree.lo, every.shape[2], tiles, units, sketches.high.shape[2], *q_at, scale,
        stack, stack_tile, heads // kv_heads, tree.block, detail, *shape, groups, sketches.twice, bool(summed), alike,
        num_warps=WARPS, num_stages=2,
    )  # fmt: skip
    size = max(1, min(32, KEPT // slots))
    tiles = -(-runs // size)
    below, bits = far[bottom] + 1 if bottom else 0, [leaves, leaves]
    if bottom:
        # of what is kept there; score_children clears those of the levels below
        bits[1] = new(units, below, words)
        many = bits[1].numel()
        start(clear, (-(-many // CLEARED),), bits[1], many, SIZE=CLEARED)
    start(
        descend, (tiles * units,),
        every, kept[0], bits[1], leaves, count, runs, begin, hold, words, top, bottom, tree.levels, radius, beam,
        all_runs, picks, tiles, below, every.shape[2], stack, tree.block, size, slots, LAST=bottom == 0, num_warps=1,
    )  # fmt: skip
    scores = new((units, stack, slots + 1, runs, 2), dtype=torch.float32) if bottom else every
    for turn, height in enumerate(reversed(range(bottom))):
        parents, below = pairs[height], far[height] + 1 if height else 0
        bits = [bits[1], new(units, below, words) if height else leaves]
        total = parents * units
        # where parents are few, each program takes a part of the queries
        split = -(-runs // max(1, min(PROGRAMS // total, runs // 64)))
        split = -(-split // 32) * 32
        total *= -(-runs // split)
        programs = min(PROGRAMS, total)
        numbers = heads, runs, begin, hold, words, height, tree.blocks, tree.levels, radius, tree.lo, beam
        start(
            score_children, (programs,),
            q, sketches.high, sketches.low, kept[turn % 2], bits[0], bits[1], scores, new(programs, 2 * split),
            *numbers, parents, below, split, sketches.high.shape[2], total, *q_at, scale,
            stack, stack_tile, heads // kv_heads, tree.block, detail, *shape[:3], max(askers, stack_tile), slots,
            slots.bit_length() - 1, sketches.twice, bool(summed), alike, WORDS, num_warps=FEWER, num_stages=3,
        )  # fmt: skip
        start(
            keep_best, (tiles * units,),
            scores, kept[turn % 2], kept[1 - turn % 2], bits[1], leaves, count, *numbers, all_runs, picks, tiles, below,
            stack, tree.block, size, slots, LAST=height == 0, num_warps=1,
        )  # fmt: skip
