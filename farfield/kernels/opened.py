"""What each query of opened FMA reads beside the groups that it opens, from the choice of kernels.opened_search.

Masks: one bit for each query and group, words of 32 groups of one level, sinks first. A bit is set where the query
reads the summary: the group is listed or its parent is opened, and it is not opened itself. Beside them each tile's
list of the pieces of the far buffer that any of its queries reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import padded
from farfield.kernels.opened_search import _below, _far
from farfield.kernels.replay import start
from farfield.ops.opened import Plan, list_widths
from farfield.ops.pool import Tree

TILE = 64  # queries of a tile of attention


@triton.jit
def _or(a, b):
    return a | b


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


@triton.jit(
    do_not_specialize=["run", "runs", "hold", "radius", "sinks", "levels", "blocks", "picks", "width", "far_width"]
)
def run_lists(
    leaves, count, near, near_count, far, far_count,
    run, runs, hold, radius, sinks, levels, blocks, picks, width, far_width,
    BLOCK: tl.constexpr, RANK: tl.constexpr, PICKS: tl.constexpr, LOCAL: tl.constexpr, BT: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """The near and far list of each run of queries, of which the first is number `run`."""
    unit = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BT + tl.arange(0, BT)
    slot = tl.arange(0, PICKS)[None, :]
    asked = i < runs
    n = (run + i) * hold // BLOCK
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


def lists_of_runs(
    leaves: Tensor, count: Tensor, tree: Tree, plan: Plan, first: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Near and far lists of the runs first, first + 1, ..., index [B, lists, runs, P] and count of each."""
    batch, lists, runs, picks = leaves.shape
    near, hold = plan.near, plan.hold
    radius, sinks = near // tree.block, tree.lead // tree.rank
    width, far_width = list_widths(tree, near, picks)
    new = leaves.new_empty
    near_index, far_index = new(batch, lists, runs, width), new(batch, lists, runs, far_width)
    near_count, far_count = new(batch, lists, runs), new(batch, lists, runs)
    size = 32
    start(
        run_lists, (-(-runs // size), batch * lists),
        leaves, count, near_index, near_count, far_index, far_count,
        first, runs, hold, radius, tree.lo, tree.levels, tree.blocks, picks, width, far_width,
        tree.block, tree.rank, padded(picks, 1), padded(radius + 1, 1), size, padded(sinks, 1), num_warps=4,
    )  # fmt: skip
    return near_index, near_count, far_index, far_count
