"""One decoding step of opened FMA: what a token leaves behind, what its query opens, and blocks fetched from the host.

keep: a program for each sequence and key head copies the token that append has placed to where all tokens are, the
group that append has moved up to where all summaries are, and sketches that group.

open_step: a program for each sequence and list goes down the tree alone. On a level it scores the children of what it
has kept, and of the first group behind that is no far one, and sorts them by score, ties by the lower group. At the end
it writes the near and the far list. Where lists are few, many programs score all groups of the upper levels at once,
before it is known which of them are asked for (score_all), and the way down reads those scores; the levels below, which
have too many groups, take a launch each, whose programs share the candidates (open_level).

fetch: a program for each entry of a near list copies a block of keys and values, far ones from wherever all tokens
are, which may be pinned host memory, read through its device address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.append import _complete, _slot
from farfield.kernels.attend import padded
from farfield.kernels.opened_search import _counted, _far, _low, _plus
from farfield.ops.opened_step import Plan, Step

ROWS = 256  # of sketches that a program scores at a time
WARPS = 8
SHARED_ROWS, SHARED_WARPS = 128, 4  # where programs share a level
AT_ONCE = 20e6  # bytes of sketches, of all lists, that are scored before it is known which are asked for
# programs that all lists together are shared out over where there are few, and from how many a list on
PROGRAMS, FEWEST = 264, 3


@triton.jit(do_not_specialize=["capacity", "blocks", "far_rows", "all_rows"])
def keep(
    near_k, near_v, far_k, far_v, all_k, all_v, kept_k, kept_v, sketches, clock,
    capacity, blocks, far_rows, all_rows,
    HEADS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr,
    E_TILE: tl.constexpr, BLOCK: tl.constexpr, RADIUS: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr,
    SINKS: tl.constexpr, SINK_GROUPS: tl.constexpr, LEVELS: tl.constexpr, LEVEL_TILE: tl.constexpr,
    GROUPS: tl.constexpr, DETAIL: tl.constexpr, DETAIL_TILE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, g = pid // HEADS, pid % HEADS
    clock += b * PARTS + g
    t = tl.load(clock)
    n, r = t // BLOCK, t % BLOCK
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    near_k += pid * ((RADIUS + 1) * BLOCK) * D
    near_v += pid * ((RADIUS + 1) * BLOCK) * E
    row = t % ((RADIUS + 1) * BLOCK)
    key = tl.load(near_k + row * D + dims, mask=dims < D, other=0.0)
    value = tl.load(near_v + row * E + values, mask=values < E, other=0.0)
    # tokens past the capacity would be lost: say so as loudly as a kernel can
    at = pid * capacity + tl.minimum(t, capacity - 1)
    key, value = tl.where(t < capacity, key, float("nan")), tl.where(t < capacity, value, float("nan"))
    tl.store(all_k + at * D + dims, key, mask=dims < D)
    tl.store(all_v + at * E + values, value, mask=values < E)
    far_k += pid * GROUPS * RANK * D
    far_v += pid * GROUPS * RANK * E
    kept_k += pid * far_rows * D
    kept_v += pid * far_rows * E
    if t < SINKS:
        tl.store(kept_k + t * D + dims, key, mask=dims < D)
        tl.store(kept_v + t * E + values, value, mask=values < E)
    if _complete(n, r, LEVELS) & (t < capacity):
        group = (n >> r) - 1
        first, before = tl.full([], SINK_GROUPS, tl.int64), tl.full([], 0, tl.int64)
        for height in range(r):
            first += blocks >> height
            before += (blocks >> height) * DETAIL
        line = tl.arange(0, RANK_TILE)[:, None]
        slot = _slot(r, group, RADIUS, SINK_GROUPS, LEVEL_TILE)
        inside = (line < RANK) & (dims < D)[None, :]
        rows = tl.load(far_k + (slot * RANK + line) * D + dims, mask=inside, other=0.0)
        tl.store(kept_k + ((first + group) * RANK + line) * D + dims, rows, mask=inside)
        inside = (line < RANK) & (values < E)[None, :]
        rows = tl.load(far_v + (slot * RANK + line) * E + values, mask=inside, other=0.0)
        tl.store(kept_v + ((first + group) * RANK + line) * E + values, rows, mask=inside)
        sketches += pid * all_rows * D
        line = tl.arange(0, DETAIL_TILE)
        inside = (line < DETAIL)[:, None] & (dims < D)[None, :]
        to = sketches + (before + group * DETAIL + line)[:, None] * D + dims
        if r == 0:
            SEGMENT: tl.constexpr = BLOCK // DETAIL
            token = group * BLOCK + line * SEGMENT
            place = group % (RADIUS + 1) * BLOCK + line * SEGMENT
            total = tl.zeros([DETAIL_TILE, D_TILE], tl.float32)
            for j in range(SEGMENT):
                there = inside & (token + j >= SINKS)[:, None]
                total += tl.load(near_k + (place + j)[:, None] * D + dims, mask=there, other=0.0).to(tl.float32)
            count = _counted(token, SEGMENT, SINKS).to(tl.float32)
            tl.store(to, total / tl.where(count > 0, count, 1.0)[:, None], mask=inside)
        else:
            # rows 2 i and 2 i + 1 of the two children become row i
            size = tl.full([], BLOCK // DETAIL, tl.int64) << (r - 1)
            child = 2 * (group * DETAIL + line)
            left = sketches + (before - (blocks >> (r - 1)) * DETAIL + child)[:, None] * D + dims
            x = tl.load(left, mask=inside, other=0.0)
            y = tl.load(left + D, mask=inside, other=0.0)
            c0, c1 = _counted(child * size, size, SINKS), _counted((child + 1) * size, size, SINKS)
            share = c0.to(tl.float32) / tl.maximum(c0 + c1, 1).to(tl.float32)
            rest = c1.to(tl.float32) / tl.maximum(c0 + c1, 1).to(tl.float32)
            tl.store(to, x * share[:, None] + y * rest[:, None], mask=inside)
    # every thread has read the clock before one sets it
    tl.debug_barrier()
    tl.store(clock, t + 1)


@triton.jit
def _score(
    q, sketches, kept, scores, many, begin, before, here, size, q_h, scale,
    D: tl.constexpr, D_TILE: tl.constexpr, DETAIL: tl.constexpr, SINKS: tl.constexpr, STACK: tl.constexpr,
    SLOTS: tl.constexpr, PAIRS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The scores [STACK, 2 SLOTS] of the children of parents begin .. begin + PAIRS - 1 of those in `kept`.

    Args:
        kept: the groups that were kept and, as number `many`, the first behind them that is no far one.
        before, here, size: rows before the level's, its far groups, and the tokens of a row.
    """
    child, column = tl.arange(0, 2 * PAIRS), tl.arange(0, PAIRS * 2 * DETAIL)
    pair = begin + column // (2 * DETAIL)
    parent = tl.load(kept + pair, mask=pair <= many, other=0)
    row = 2 * parent * DETAIL + column % (2 * DETAIL)
    there = (pair <= many) & (row // DETAIL < here)
    _score_rows(
        q, sketches, scores, 2 * SLOTS, before + row, row * size, size, there, 2 * begin + child,
        2 * begin + child < 2 * SLOTS, q_h, scale, D, D_TILE, DETAIL, SINKS, STACK, 2 * PAIRS, SUM,
    )  # fmt: skip


@triton.jit
def _score_rows(
    q, sketches, scores, apart, row, token, size, there, to, inside, q_h, scale,
    D: tl.constexpr, D_TILE: tl.constexpr, DETAIL: tl.constexpr, SINKS: tl.constexpr, STACK: tl.constexpr,
    MANY: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The scores [STACK, apart] of MANY groups, each by DETAIL rows of sketches, at `to` where it is `inside`.

    Args:
        row, token, size, there: of each of the MANY * DETAIL rows its number, its first token, how many it has, and
            whether it is that of a group to be scored.
    """
    dims = tl.arange(0, D_TILE)
    at = row.to(tl.int64)[:, None] * D + dims
    tile = tl.load(sketches + at, mask=there[:, None] & (dims < D)[None, :], other=0.0)
    count = tl.where(there, _counted(token, size, SINKS), 0).to(tl.float32)
    more = tl.where(count > 0, tl.log(tl.maximum(count, 1.0)), float("-inf"))
    for r in tl.static_range(STACK):
        asked = tl.load(q + r * q_h + dims, mask=dims < D, other=0.0).to(tl.float32) * scale
        logits = tl.reshape(tl.sum(tile * asked[None, :], 1) + more, [MANY, DETAIL])
        best = tl.max(logits, 1)
        if SUM:
            base = tl.where(best == float("-inf"), 0.0, best)
            best = base + tl.log(tl.sum(tl.exp(logits - base[:, None]), 1))
        tl.store(scores + r * apart + to, best, mask=inside)


@triton.jit
def _joint(scores, apart, at, valid, N: tl.constexpr, STACK: tl.constexpr):
    """The scores [N] at `at` of [STACK, apart], -inf where not valid; of several heads what they ask for together."""
    score = tl.full([N], float("-inf"), tl.float32)
    for r in tl.static_range(STACK):
        mine = tl.load(scores + r * apart + at, mask=valid, other=float("-inf"))
        if STACK > 1:
            # shares of a softmax for each head, added up over the heads; as logarithms
            peak = tl.max(mine, 0)
            peak = tl.where(peak == float("-inf"), 0.0, peak)
            mass = tl.sum(tl.exp(mine - peak), 0)
            score = _plus(score, mine - peak - tl.log(tl.where(mass > 0, mass, 1.0)))
        else:
            score = mine
    return score


@triton.jit
def _best(score, group, valid, here, most, SLOTS: tl.constexpr):
    """The `most` best of 2 SLOTS groups, in any order, behind them `here`, then -1: [SLOTS]; and how many."""
    NONE: tl.constexpr = -0x8000000000000000
    valid = valid & (score > float("-inf"))
    # one number: the score, whose bits are ordered as those of an integer, and of equal ones the lower group first
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32 | (0x7FFFFFFF - group).to(tl.int64)
    order = tl.reshape(tl.sort(tl.where(valid, order, NONE), descending=True), [2, SLOTS])
    order = tl.sum(tl.where(tl.arange(0, 2)[:, None] == 0, order, 0), 0)
    slot = tl.arange(0, SLOTS)
    chosen = (order > NONE) & (slot < most)
    many = tl.sum(chosen.to(tl.int32), 0)
    held = 0x7FFFFFFF - (order & 0x7FFFFFFF).to(tl.int32)
    return tl.where(chosen, held, tl.where(slot == many, here, -1)), many


@triton.jit
def _keep_best(scores, kept, into, many, here, most, STACK: tl.constexpr, SLOTS: tl.constexpr):
    """The best children by their scores and the first group that is no far one: to `into`. How many."""
    c = tl.arange(0, 2 * SLOTS)
    group = 2 * tl.load(kept + c // 2, mask=c // 2 <= many, other=0) + c % 2
    valid = (c // 2 <= many) & (group < here)
    held, many = _best(_joint(scores, 2 * SLOTS, c, valid, 2 * SLOTS, STACK), group, valid, here, most, SLOTS)
    # what is read above may lie where this is written
    tl.debug_barrier()
    tl.store(into + tl.arange(0, SLOTS), held)
    tl.debug_barrier()
    return many


@triton.jit
def _go_down(
    scores, apart, kept, n, low, top, end, blocks, picks, beam,
    RADIUS: tl.constexpr, STACK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The same from level `top` down to level `end`, by the scores of all groups; between levels in registers.

    Args:
        scores: [STACK, apart], of all groups of level `end`, then of those of the level above it, and so on.
        low: the first far group of level `top`, of which all are kept.
    """
    slot = tl.arange(0, SLOTS)
    many = _far(n, top, RADIUS) - low
    held = tl.where(slot <= many, low + slot, -1)
    before = 0
    for below in range(end, top):
        before += blocks >> below
    for turn in range(top - end):
        level = top - 1 - turn
        before -= blocks >> level
        here, most = _far(n, level, RADIUS), tl.where(level == 0, picks, beam)
        group = tl.reshape(tl.join(2 * held, 2 * held + 1), [2 * SLOTS])
        valid = (group >= 0) & (group < here)
        score = _joint(scores, apart, before + group, valid, 2 * SLOTS, STACK)
        held, many = _best(score, group, valid, here, most, SLOTS)
    tl.store(kept + slot, held)
    tl.debug_barrier()
    return many


@triton.jit
def _list(
    kept, many, near, near_count, far, far_count, n, blocks,
    RADIUS: tl.constexpr, GROUPS: tl.constexpr, LEVELS: tl.constexpr, LEVEL_TILE: tl.constexpr,
    PICKS: tl.constexpr, LOCAL: tl.constexpr, SINK_TILE: tl.constexpr,
):  # fmt: skip
    """The near and the far list of a query in block n that opens the `many` groups in `kept`, put in order here."""
    slot, level = tl.arange(0, PICKS), tl.arange(0, LEVEL_TILE)
    there = slot < many
    leaf = tl.sort(tl.load(kept + slot, mask=there, other=0x7FFFFFFF))
    tl.debug_barrier()
    tl.store(kept + slot, leaf, mask=there)
    tl.debug_barrier()
    leaf = tl.where(there, leaf, 0)
    before = tl.load(kept + slot - 1, mask=there & (slot > 0), other=-1)
    after = tl.load(kept + slot + 1, mask=slot + 1 < many, other=-1)
    # what is opened lies before what is near
    tl.store(near + slot, leaf, mask=there)
    begin = tl.maximum(n - RADIUS, 0)
    local = tl.arange(0, LOCAL)
    tl.store(near + many + local, begin + local, mask=local < n - begin + 1)
    tl.store(near_count, many + n - begin + 1)

    closed = (n > RADIUS) & (tl.max((there & (leaf == 0)).to(tl.int32), 0) == 0)
    listed = tl.where(closed, GROUPS, 0)
    sink = tl.arange(0, SINK_TILE)
    tl.store(far + sink, sink, mask=sink < listed)
    # all levels at once: the siblings of opened groups, then the far list of the level
    here = tl.where(level < LEVELS, _far(n, level, RADIUS), 0)
    above = tl.where(level < LEVELS, _far(n, level + 1, RADIUS), 0)
    groups = blocks >> level
    first = GROUPS + tl.cumsum(groups, 0) - groups
    group = leaf[None, :] >> level[:, None]
    # of several leaves of one group that next to where the sibling's would stand
    other = tl.where((group & 1) != 0, before[None, :] >> level[:, None], after[None, :] >> level[:, None])
    sibling = group ^ 1
    reads = there[None, :] & (group >> 1 < above[:, None]) & (other != group) & (other != sibling)
    siblings = tl.sum(reads.to(tl.int32), 1)
    opened = there[None, :] & (group >> 1 == above[:, None])
    left = (2 * above < here) & (tl.max((opened & ((group & 1) == 0)).to(tl.int32), 1) == 0)
    right = (2 * above + 1 < here) & (tl.max((opened & ((group & 1) != 0)).to(tl.int32), 1) == 0)
    total = siblings + left.to(tl.int32) + right.to(tl.int32)
    to = listed + tl.cumsum(total, 0) - total
    rank = tl.cumsum(reads.to(tl.int32), 1) - 1
    tl.store(far + to[:, None] + rank, first[:, None] + sibling, mask=reads)
    tl.store(far + to + siblings, first + 2 * above, mask=left)
    tl.store(far + to + siblings + left.to(tl.int32), first + 2 * above + 1, mask=right)
    tl.store(far_count, listed + tl.sum(total, 0))


@triton.jit
def _top(n, beam, RADIUS: tl.constexpr, LEVELS: tl.constexpr):
    """The lowest level above the first of which all far groups can be kept."""
    top = 1
    while _far(n, top, RADIUS) - _low(n, top, LEVELS, RADIUS) > beam:
        top += 1
    return top


@triton.jit
def _rows_before(blocks, height, DETAIL: tl.constexpr):
    """Rows of the sketches of all levels below."""
    before = 0
    for below in range(height):
        before += (blocks >> below) * DETAIL
    return before


ALL_TAKES = (
    "HEADS", "PARTS", "LISTS", "STACK", "REPEAT", "BLOCK", "RADIUS", "SINKS", "LEVELS", "DETAIL", "D", "D_TILE", "SUM",
    "HOLD",
)  # fmt: skip
SIZES = ["capacity", "blocks", "all_rows", "q_b", "q_h", "picks", "beam", "width", "far_width"]


@triton.jit(do_not_specialize=SIZES)
def open_step(
    q, sketches, clock, kept, scores, near, near_count, far, far_count, position,
    capacity, blocks, all_rows, picks, beam, width, far_width, q_b, q_h, scale,
    HEADS: tl.constexpr, PARTS: tl.constexpr, LISTS: tl.constexpr, STACK: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr, RADIUS: tl.constexpr, RANK: tl.constexpr, SINKS: tl.constexpr, LEVELS: tl.constexpr,
    LEVEL_TILE: tl.constexpr, DETAIL: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, SLOTS: tl.constexpr,
    PICKS: tl.constexpr, PAIRS: tl.constexpr, LOCAL: tl.constexpr,
    SINK_TILE: tl.constexpr, SUM: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Lists of the newest token's query. PAIRS: parents whose children are scored at a time."""
    GROUPS: tl.constexpr = (SINKS + RANK - 1) // RANK
    pid = tl.program_id(0).to(tl.int64)
    b, u = pid // LISTS, pid % LISTS
    g = u if STACK > 1 else u // REPEAT
    clock += b * PARTS + HEADS + u
    t = tl.load(clock)
    # the first query of a run has chosen for the others, and all of a run read the same
    slot = tl.arange(0, SLOTS)
    if t % HOLD == 0:
        n = (tl.minimum(t, capacity - 1) // BLOCK).to(tl.int32)
        sketches += (b * HEADS + g) * all_rows * D
        q += b * q_b + u * STACK * q_h
        kept += pid * SLOTS
        scores += pid * STACK * (2 * SLOTS)
        # at first whatever is far is kept
        top = _top(n, beam, RADIUS, LEVELS)
        low = _low(n, top, LEVELS, RADIUS)
        many, before = _far(n, top, RADIUS) - low, _rows_before(blocks, top, DETAIL)
        tl.store(kept + slot, low + slot)
        tl.debug_barrier()
        for turn in range(top):
            height = top - 1 - turn
            before -= (blocks >> height) * DETAIL
            here = _far(n, height, RADIUS)
            for begin in range(0, many + 1, PAIRS):
                _score(
                    q, sketches, kept, scores, many, begin, before, here, (BLOCK // DETAIL) << height, q_h, scale,
                    D, D_TILE, DETAIL, SINKS, STACK, SLOTS, PAIRS, SUM,
                )  # fmt: skip
            tl.debug_barrier()
            most = tl.where(height == 0, picks, beam)
            many = _keep_best(scores, kept, kept, many, here, most, STACK, SLOTS)
        _list(
            kept, many, near + pid * width, near_count + pid, far + pid * far_width, far_count + pid, n, blocks,
            RADIUS, GROUPS, LEVELS, LEVEL_TILE, PICKS, LOCAL, SINK_TILE,
        )  # fmt: skip
    tl.store(position + pid, t)
    tl.debug_barrier()
    tl.store(clock, t + 1)


@triton.jit(do_not_specialize=["capacity", "blocks", "all_rows", "q_b", "q_h", "lowest", "groups", "parts"])
def score_all(
    q, sketches, clock, scores, capacity, blocks, all_rows, q_b, q_h, lowest, groups, parts, scale,
    HEADS: tl.constexpr, PARTS: tl.constexpr, LISTS: tl.constexpr, STACK: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr, RADIUS: tl.constexpr, SINKS: tl.constexpr, LEVELS: tl.constexpr, DETAIL: tl.constexpr,
    D: tl.constexpr, D_TILE: tl.constexpr, MANY: tl.constexpr, SUM: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Scores [STACK, groups] of all far groups of the levels from `lowest` on, MANY groups a program."""
    unit, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    b, u = unit // LISTS, unit % LISTS
    g = u if STACK > 1 else u // REPEAT
    t = tl.load(clock + b * PARTS + HEADS + u)
    if t % HOLD == 0:
        n = (tl.minimum(t, capacity - 1) // BLOCK).to(tl.int32)
        place, column = part * MANY + tl.arange(0, MANY), tl.arange(0, MANY * DETAIL)
        at = part * MANY + column // DETAIL
        # the level of each, which has so many groups before it
        group, height, before = at, tl.full([MANY * DETAIL], 0, tl.int32) + lowest, 0
        there = at < _far(n, lowest, RADIUS)
        for level in range(lowest + 1, LEVELS):
            before += blocks >> (level - 1)
            above = at >= before
            group, height = tl.where(above, at - before, group), tl.where(above, level, height)
            there = tl.where(above, at - before < _far(n, level, RADIUS), there)
        size = (BLOCK // DETAIL) << height
        row = _rows_before(blocks, lowest, DETAIL) + part * (MANY * DETAIL) + column
        _score_rows(
            q + b * q_b + u * STACK * q_h, sketches + (b * HEADS + g) * all_rows * D, scores + unit * STACK * groups,
            groups, row, (group * DETAIL + column % DETAIL) * size, size, there & (at < groups), place,
            place < groups, q_h, scale, D, D_TILE, DETAIL, SINKS, STACK, MANY, SUM,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "height", "parts", "room", "groups"])
def open_level(
    q, sketches, clock, kept, before_kept, scores, before_scores, all_scores, near, near_count, far, far_count,
    position, capacity, blocks, all_rows, picks, beam, width, far_width, q_b, q_h, height, parts, room, groups, scale,
    HEADS: tl.constexpr, PARTS: tl.constexpr, LISTS: tl.constexpr, STACK: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr, RADIUS: tl.constexpr, RANK: tl.constexpr, SINKS: tl.constexpr, LEVELS: tl.constexpr,
    LEVEL_TILE: tl.constexpr, DETAIL: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, SLOTS: tl.constexpr,
    PICKS: tl.constexpr, PAIRS: tl.constexpr, LOCAL: tl.constexpr,
    SINK_TILE: tl.constexpr, SUM: tl.constexpr, HOLD: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One level of the same, shared out over `parts` programs a list: each repeats the choice from the scores of the
    level above, and scores its part of level `height`. FIRST goes down to there by the scores of score_all, which
    begin with the level above; LAST writes the lists."""
    GROUPS: tl.constexpr = (SINKS + RANK - 1) // RANK
    unit, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    b, u = unit // LISTS, unit % LISTS
    g = u if STACK > 1 else u // REPEAT
    clock += b * PARTS + HEADS + u
    t = tl.load(clock)
    slot = tl.arange(0, SLOTS)
    if t % HOLD == 0:
        n = (tl.minimum(t, capacity - 1) // BLOCK).to(tl.int32)
        sketches += (b * HEADS + g) * all_rows * D
        q += b * q_b + u * STACK * q_h
        # every program has a copy of its own of what is kept; the last launch has one program a list
        kept += (unit * room + part) * (SLOTS + 1)
        before_kept += (unit * room + part) * (SLOTS + 1)
        scores += unit * STACK * (2 * SLOTS)
        before_scores += unit * STACK * (2 * SLOTS)
        all_scores += unit * STACK * groups
        top = _top(n, beam, RADIUS, LEVELS)
        if FIRST:
            low, end = _low(n, top, LEVELS, RADIUS), tl.minimum(top, height + 1)
            many = _go_down(
                all_scores, groups, kept, n, low, top, end, blocks, picks, beam, RADIUS, STACK, SLOTS
            )  # fmt: skip
        elif height + 1 < top:
            # the level above was scored
            many = tl.load(before_kept + SLOTS)
            here, most = _far(n, height + 1, RADIUS), tl.where(height < 0, picks, beam)
            many = _keep_best(before_scores, before_kept, kept, many, here, most, STACK, SLOTS)
        else:
            low = _low(n, height + 1, LEVELS, RADIUS)
            many = _far(n, height + 1, RADIUS) - low
            tl.store(kept + slot, low + slot)
            tl.debug_barrier()
        tl.store(kept + SLOTS, many)
        if LAST:
            _list(
                kept, many, near + unit * width, near_count + unit, far + unit * far_width, far_count + unit, n,
                blocks, RADIUS, GROUPS, LEVELS, LEVEL_TILE, PICKS, LOCAL, SINK_TILE,
            )  # fmt: skip
        elif height < top:
            here, before = _far(n, height, RADIUS), _rows_before(blocks, height, DETAIL)
            for begin in range(part * PAIRS, many + 1, parts * PAIRS):
                _score(
                    q, sketches, kept, scores, many, begin, before, here, (BLOCK // DETAIL) << height, q_h, scale,
                    D, D_TILE, DETAIL, SINKS, STACK, SLOTS, PAIRS, SUM,
                )  # fmt: skip
    if LAST:
        tl.store(position + unit, t)
        tl.debug_barrier()
        tl.store(clock, t + 1)


@triton.jit(do_not_specialize=["capacity", "entries"])
def fetch(
    all_k, all_v, near_k, near_v, near, near_count, position, held_k, held_v, end,
    capacity, entries,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr, BLOCK: tl.constexpr,
    RADIUS: tl.constexpr, BLOCK_TILE: tl.constexpr,
):  # fmt: skip
    """Entry by entry the blocks of near lists one behind the other, and where each row stands."""
    unit, entry = tl.program_id(0).to(tl.int64) // entries, tl.program_id(0) % entries
    if entry < tl.load(near_count + unit):
        block = tl.load(near + unit * entries + entry).to(tl.int64)
        line, dims, values = tl.arange(0, BLOCK_TILE), tl.arange(0, D_TILE), tl.arange(0, E_TILE)
        t = tl.load(position + unit)
        n = tl.minimum(t, capacity - 1) // BLOCK
        inside = (line < BLOCK)[:, None] & (dims < D)[None, :]
        inside_v = (line < BLOCK)[:, None] & (values < E)[None, :]
        if block < n - RADIUS:
            at = (unit * capacity + block * BLOCK + line)[:, None]
            keys = tl.load(all_k + at * D + dims, mask=inside, other=0.0)
            rows = tl.load(all_v + at * E + values, mask=inside_v, other=0.0)
        else:
            at = (unit * ((RADIUS + 1) * BLOCK) + block % (RADIUS + 1) * BLOCK + line)[:, None]
            keys = tl.load(near_k + at * D + dims, mask=inside, other=0.0)
            rows = tl.load(near_v + at * E + values, mask=inside_v, other=0.0)
        keys, rows = tl.where(t < capacity, keys, float("nan")), tl.where(t < capacity, rows, float("nan"))
        to = (unit * entries + entry) * BLOCK + line
        tl.store(held_k + to[:, None] * D + dims, keys, mask=inside)
        tl.store(held_v + to[:, None] * E + values, rows, mask=inside_v)
        tl.store(end + to, block * BLOCK + line, mask=line < BLOCK)


def launch_keep(step: Step) -> None:
    """The contract is ops.opened_step's; all buffers are contiguous."""
    plan, batch, kv_heads, width, value_width = _sizes(step)
    tile = triton.next_power_of_2
    keep[(batch * kv_heads,)](
        step.near_k, step.near_v, step.far_k, step.far_v, step.all_k, step.all_v, step.kept_k, step.kept_v,
        step.sketches, step.clock, plan.capacity, plan.blocks, step.kept_k.shape[2], step.sketches.shape[2],
        HEADS=kv_heads, PARTS=step.clock.shape[1], D=width, E=value_width, D_TILE=tile(width),
        E_TILE=tile(value_width), BLOCK=plan.block, RADIUS=plan.near // plan.block, RANK=plan.rank,
        RANK_TILE=tile(plan.rank), SINKS=plan.sinks, SINK_GROUPS=plan.sink_groups, LEVELS=plan.levels,
        LEVEL_TILE=tile(plan.levels), GROUPS=step.far_k.shape[2] // plan.rank, DETAIL=plan.detail,
        DETAIL_TILE=tile(plan.detail), num_warps=4,
    )  # fmt: skip


def launch_open(q: Tensor, step: Step, scale: float) -> None:
    plan, batch, kv_heads, width, _ = _sizes(step)
    lists, heads, radius = step.near.shape[1], q.shape[1], plan.near // plan.block
    units, slots, stack = batch * lists, padded(plan.beam + 1, 1), heads // lists
    q = q if q.stride(3) == 1 else q.contiguous()
    tile = triton.next_power_of_2

    def scored(rows: int) -> int:
        """Parents whose children are so many rows of sketches."""
        return max(1, min(slots, rows // (2 * plan.detail)))

    # what a program scores for several heads stays in registers too
    less = 1 if stack == 1 else 2
    pairs, warps = scored(ROWS // less), WARPS
    shared = PROGRAMS // units >= FEWEST
    if shared:
        pairs, warps = scored(SHARED_ROWS // less), SHARED_WARPS
    numbers = (
        plan.capacity, plan.blocks, step.sketches.shape[2], plan.picks, plan.beam, step.near.shape[3],
        step.far.shape[3], q.stride(0), q.stride(1),
    )  # fmt: skip
    lists_at = step.near, step.near_count, step.far, step.far_count, step.position
    constants = {
        "HEADS": kv_heads, "PARTS": step.clock.shape[1], "LISTS": lists, "STACK": stack, "REPEAT": heads // kv_heads,
        "BLOCK": plan.block, "RADIUS": radius, "RANK": plan.rank, "SINKS": plan.sinks, "LEVELS": plan.levels,
        "LEVEL_TILE": tile(plan.levels), "DETAIL": plan.detail, "D": width, "D_TILE": tile(width), "SLOTS": slots,
        "PICKS": padded(plan.picks, 1), "PAIRS": pairs, "LOCAL": padded(radius + 1, 1),
        "SINK_TILE": padded(max(plan.sink_groups, 1), 1), "SUM": bool(plan.summed), "HOLD": plan.hold,
    }  # fmt: skip
    parts = max(1, min(-(-(plan.beam + 1) // pairs), PROGRAMS // units))
    new = step.near.new_empty
    if not shared:
        open_step[(units,)](
            q, step.sketches, step.clock, new(units, slots), new((units, stack, 2 * slots), dtype=torch.float32),
            *lists_at, *numbers, scale, **constants, num_warps=warps,
        )  # fmt: skip
        return
    # the levels whose groups one program scores at once, and those below that all programs together do
    lowest = min(max(plan.blocks // (2 * plan.beam), 1).bit_length(), plan.levels)
    each, groups = units * plan.detail * width * step.sketches.element_size(), sum(plan.groups[lowest:])
    while lowest and (groups + plan.groups[lowest - 1]) * each <= AT_ONCE:
        lowest -= 1
        groups += plan.groups[lowest]
    all_scores = new((units, stack, groups), dtype=torch.float32)
    shares = -(-groups // (2 * pairs))
    score_all[(units * shares,)](
        q, step.sketches, step.clock, all_scores, plan.capacity, plan.blocks, step.sketches.shape[2], q.stride(0),
        q.stride(1), lowest, groups, shares, scale,
        **{name: constants[name] for name in ALL_TAKES}, MANY=2 * pairs, num_warps=warps,
    )  # fmt: skip
    kept = [new(units, parts, slots + 1) for _ in range(2)]
    scores = [new((units, stack, 2 * slots), dtype=torch.float32) for _ in range(2)]
    for turn in range(lowest + 1):
        now, last = turn % 2, turn == lowest
        open_level[(units if last else units * parts,)](
            q, step.sketches, step.clock, kept[now], kept[1 - now], scores[now], scores[1 - now], all_scores,
            *lists_at, *numbers, lowest - 1 - turn, 1 if last else parts, parts, groups, scale, **constants,
            FIRST=turn == 0, LAST=last, num_warps=warps,
        )  # fmt: skip


def launch_fetch(
    all_k: Tensor, all_v: Tensor, near_k: Tensor, near_v: Tensor, near: Tensor, near_count: Tensor, position: Tensor,
    plan: Plan, held: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    entries, width, value_width = near.shape[3], near_k.shape[3], near_v.shape[3]
    tile = triton.next_power_of_2
    fetch[(near_count.numel() * entries,)](
        all_k, all_v, near_k, near_v, near, near_count, position, *held, plan.capacity, entries,
        D=width, E=value_width, D_TILE=tile(width), E_TILE=tile(value_width),
        BLOCK=plan.block, RADIUS=plan.near // plan.block, BLOCK_TILE=tile(plan.block), num_warps=4,
    )  # fmt: skip


def _sizes(step: Step):
    batch, kv_heads, _, width = step.near_k.shape
    return step.plan, batch, kv_heads, width, step.near_v.shape[3]
