"""What each query of opened FMA reads beside the groups that it opens, from the choice of kernels.opened_search.

A query opens blocks, and with them all groups that they lie in and that are far. So it reads two kinds of summaries:

- siblings: of an opened group whose parent is far too, and so opened, the other half, unless that is opened itself.
  Whatever a query opens, the siblings that it reads with a block are among one for each level, those of the groups that
  the block lies in. They are kept as further rows of the block (`set_beside`), and which of them a query reads there is
  a word for each of its entries (`paths`), bit h for level h. What several blocks of a list share, one of them reads.
- listed groups: at most two a level, whose parent is no far group of the query's block, and the sinks. All queries of a
  block have the same (`listed`). One word a query says which of them it has opened: bit 2 h + x for group x of level h,
  bit 30 for the sinks. Every opened block lies in one of them.

So what is read, and what is in memory, grows as tokens times levels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import opened_search, opened_sketches
from farfield.kernels.attend import padded
from farfield.kernels.opened_search import _far
from farfield.kernels.replay import start
from farfield.ops.opened import Plan, list_widths
from farfield.ops.pool import Tree

TILE = 64  # queries of a tile of attention


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize=["begin", "tokens", "radius", "levels", "picks", "total"])
def paths(
    leaves, count, words, opened, begin, tokens, radius, levels, picks, total,
    BLOCK: tl.constexpr, PICKS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The words of each query's entries, and its own."""
    at = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    slot = tl.arange(0, PICKS)[None, :]
    n = ((begin + at % tokens) // BLOCK).to(tl.int32)
    filled = tl.load(count + at, mask=at < total, other=0)
    there = slot < filled[:, None]
    leaf_at = leaves + at[:, None] * picks + slot
    leaf = tl.load(leaf_at, mask=there, other=0)
    before = tl.load(leaf_at - 1, mask=there & (slot > 0), other=-1)
    after = tl.load(leaf_at + 1, mask=slot + 1 < filled[:, None], other=-1)
    # of several leaves of one group the one next to where the sibling's would stand
    before, after = leaf ^ before, leaf ^ after
    word = tl.zeros([BT, PICKS], tl.int32)
    stop = tl.zeros([BT, PICKS], tl.int32)
    for height in range(levels):
        far = leaf >> (height + 1) < _far(n, height + 1, radius)[:, None]
        alone = tl.where((leaf >> height) & 1 != 0, before, after) >> (height + 1) != 0
        word |= tl.where(far & alone, 1 << height, 0)
        stop += far.to(tl.int32)
    tl.store(words + at[:, None] * picks + slot, word, mask=there)
    # the one group of which it is a part that is far while its parent is not
    place = 2 * stop + (leaf >> stop) - 2 * _far(n[:, None], stop + 1, radius)
    mine = tl.where(there, tl.where(leaf == 0, 1 << 30, 0) | tl.where(stop < levels, 1 << (place & 31), 0), 0)
    tl.store(opened + at, tl.reduce(mine, 1, _or), mask=at < total)


@triton.jit
def listed(slot, n, radius, blocks, levels, sinks, RANK: tl.constexpr):
    """Of slots of block n's list: the group's number in the far buffer, whether there is one, and its bit.

    The groups of sinks come first, then two slots a level.
    """
    lead = (sinks + RANK - 1) // RANK
    height, x = tl.maximum(slot - lead, 0) >> 1, (slot - lead) & 1
    group = 2 * _far(n, height + 1, radius) + x
    there = (group < _far(n, height, radius)) & (height < levels)
    before = tl.zeros_like(slot)
    for h in range(levels):
        before += tl.where(h < height, blocks >> h, 0)
    sink = slot < lead
    row = tl.where(sink, slot, lead + before + group)
    return row, tl.where(sink, n > radius, there), tl.where(sink, 30, 2 * height + x)


SETTING = ["kv_heads", "keys", "used", "blocks", "levels", "lead"]
SETTING += ["k_b", "k_h", "k_r", "v_b", "v_h", "v_r", "far_b", "bias_b", "bias_h"]


@triton.jit(do_not_specialize=SETTING)
def set_beside(
    k, v, far_k, far_v, bias, to_k, to_v, to_bias,
    kv_heads, keys, used, blocks, levels, lead, k_b, k_h, k_r, v_b, v_h, v_r, far_b, bias_b, bias_h, scale,
    BLOCK: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, UNIT: tl.constexpr,
    ALL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ALL rows for each of `used` blocks: its tokens, and the siblings of the groups that it lies in, level by level.

    Args:
        blocks: for how many the far rows have room.
    """
    pid, unit = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = unit // kv_heads, unit % kv_heads
    leaf = pid // (ALL // ROWS)
    row = pid % (ALL // ROWS) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, D_TILE)
    wide = (dims < D)[None, :]
    height, rest = tl.maximum(row - BLOCK, 0) // RANK, tl.maximum(row - BLOCK, 0) % RANK
    token = leaf.to(tl.int64) * BLOCK + row
    own = row < BLOCK
    before = tl.zeros([ROWS], tl.int32)
    for h in range(levels):
        before += tl.where(h < height, blocks >> h, 0)
    group = (leaf >> height) ^ 1
    there = (own == 0) & (height < levels) & (group < (blocks >> height))
    from_ = lead + (before + group).to(tl.int64) * RANK + rest
    own_mask, far_mask = (own & (token < keys))[:, None] & wide, there[:, None] & wide
    k_at = k + (b * k_b + g * k_h) * UNIT + (token * k_r)[:, None] * UNIT + dims
    v_at = v + (b * v_b + g * v_h) * UNIT + (token * v_r)[:, None] * UNIT + dims
    far_at = unit * far_b + from_[:, None] * D + dims
    k_tile = tl.load(k_at, mask=own_mask, other=0.0) + tl.load(far_k + far_at, mask=far_mask, other=0.0)
    v_tile = tl.load(v_at, mask=own_mask, other=0.0) + tl.load(far_v + far_at, mask=far_mask, other=0.0)
    more = tl.load(bias + b * bias_b + g * bias_h + from_, mask=there, other=0.0).to(tl.float32) / scale
    to = (unit * used + leaf) * ALL + row
    tl.store(to_k + to[:, None] * D + dims, k_tile, mask=wide)
    tl.store(to_v + to[:, None] * D + dims, v_tile, mask=wide)
    tl.store(to_bias + to, more)


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
    size = 16
    start(
        run_lists, (-(-runs // size), batch * lists),
        leaves, count, near_index, near_count, far_index, far_count,
        first, runs, hold, radius, tree.lo, tree.levels, tree.blocks, picks, width, far_width,
        tree.block, tree.rank, padded(picks, 1), padded(radius + 1, 1), size, padded(sinks, 1), num_warps=4,
    )  # fmt: skip
    return near_index, near_count, far_index, far_count


def runs(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Far rows and their biases, and the near and far lists of each run of queries, index and count of each."""
    *far, sketches = opened_sketches.pooled(k, v, tree, plan.detail)
    chosen = opened_search.choose(q[:, :, :: plan.hold], sketches, tree, plan, scale)
    return *far, *lists_of_runs(*chosen, tree, plan)
