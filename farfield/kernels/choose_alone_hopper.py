"""The few best of blocks that one row each stands for, by heads that choose for themselves, on Hopper GPUs, in Gluon.

A program stays on its multiprocessor and works through tiles of 256 queries of a head, longest first: one warp copies
queries and rows, four groups of four warps own 64 queries each. A query's scores lie in four lanes. Each keeps the best
of the columns it sees, in their order, so that of equal scores the first stays; only when all rows have gone by do the
four put together what they have. Rows are two numbers of the queries' dtype, as in `choose_hopper`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from farfield.kernels.hopper import (
    aligned,
    barriers,
    descriptor,
    fetch,
    on_hopper,
    processors,
    report,
    wait_empty,
    wait_full,
)
from farfield.kernels.replay import start
from farfield.ops.choose import Scoring

GROUPS = 4  # of computing warps, with 64 queries each; `best_alone_hopper` starts so many
NONE = gl.constexpr(0x7FFFFFFF)


@gluon.jit
def _load(
    q, k, sizes, rings,
    REPEAT: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, BJ: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Queries, and both numbers of the rows of past blocks, by one warp."""
    items, tiles, batch, heads, tokens, first = sizes
    q_ring, k_ring, q_full, q_empty, k_full, k_empty = rings
    step, turn = 0, 0
    units = batch * heads
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = tiles - 1 - item // units
        b, h = item % units // heads, item % heads
        for group in gl.static_range(GROUPS):
            slot = wait_empty(q_empty, turn * GROUPS + group)
            fetch(q, [b, h, (tile * GROUPS + group) * 64, 0], q_full, q_ring, slot)
        turn += 1
        past = (first + gl.minimum((tile + 1) * (64 * GROUPS), tokens) - 1) // BLOCK
        for row in range(0, past, BJ):
            s = wait_empty(k_empty, step)
            mbarrier.expect(k_full.index(s), 2 * BJ * D * 2)
            tma.async_copy_global_to_shared(k, [b, h // REPEAT, row, 0], k_full.index(s), k_ring.index(2 * s))
            tma.async_copy_global_to_shared(
                k, [batch + b, h // REPEAT, row, 0], k_full.index(s), k_ring.index(2 * s + 1)
            )
            step += 1


@gluon.jit
def _columns(scores):
    """The columns of a tile of 64 that each of the four lanes of a row has, in their order: tensors [64, 4]."""
    found = (gl.permute(gl.reshape(scores, [64, 2, 2, 2, 4, 2]), [0, 4, 5, 3, 2, 1]),)
    for _bit in gl.static_range(4):
        halves = ()
        for n in gl.static_range(len(found)):
            halves += gl.split(found[n])
        found = halves
    return found


@gluon.jit
def _best(
    index, count, sizes, rings,
    GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, BJ: gl.constexpr, BEST: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    items, tiles, batch, heads, tokens, first = sizes
    q_ring, k_ring, q_full, q_empty, k_full, k_empty = rings
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BJ, 16])
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    kept: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    line: gl.constexpr = gl.SliceLayout(1, kept)
    step, turn = 0, 0
    units = batch * heads
    lane = 2 * gl.arange(0, 4, gl.SliceLayout(0, kept))[None, :]
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = tiles - 1 - item // units
        at = (tile * GROUPS + GROUP) * 64
        own = (first + at + gl.arange(0, 64, per_row)) // BLOCK
        least = (first + at) // BLOCK
        past = (first + gl.minimum((tile + 1) * (64 * GROUPS), tokens) - 1) // BLOCK
        best, place = (), ()
        for _p in gl.static_range(BEST):
            best += (gl.full([64, 4], float("-inf"), gl.float32, kept),)
            place += (gl.full([64, 4], NONE, gl.int32, kept),)
        slot = wait_full(q_full, turn * GROUPS + GROUP)
        queries = q_ring.index(slot).reshape([64, D])
        for begin in range(0, past, BJ):
            s = wait_full(k_full, step)
            scores = gl.zeros([64, BJ], gl.float32, score)
            # the smaller numbers first
            low = k_ring.index(2 * s + 1).reshape([BJ, D]).permute((1, 0))
            high = k_ring.index(2 * s).reshape([BJ, D]).permute((1, 0))
            scores = warpgroup_mma(queries, low, scores, use_acc=False, is_async=True)
            scores = warpgroup_mma(queries, high, scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            report(k_empty, s)
            step += 1
            # no nan among them
            scores = gl.maximum(scores, -3.0e38)
            if begin + BJ > least:
                j = begin + gl.arange(0, BJ, gl.SliceLayout(0, score))
                scores = gl.where(j[None, :] < own[:, None], scores, float("-inf"))
            columns = _columns(scores)
            for c in gl.static_range(BJ // 4):
                value, number = gl.convert_layout(columns[c], kept), begin + c // 2 * 8 + c % 2
                better, held, numbers = (), (), ()
                for p in gl.static_range(BEST):
                    better += (value > best[p],)
                for p in gl.static_range(BEST):
                    score_p, number_p = gl.where(better[p], value, best[p]), gl.where(better[p], number, place[p])
                    if p > 0:
                        # behind a better one all move down, so that of equal ones the later is lost
                        score_p = gl.where(better[p - 1], best[p - 1], score_p)
                        number_p = gl.where(better[p - 1], place[p - 1], number_p)
                    held += (score_p,)
                    numbers += (number_p,)
                best, place = held, numbers
        report(q_empty, slot)
        turn += 1

        marks = ()
        for p in gl.static_range(BEST):
            marks += (gl.where(place[p] == NONE, NONE, place[p] + lane),)
        chosen = ()
        for _n in gl.static_range(BEST):
            top = gl.max(best[0], 1)
            # of equal scores the lower block
            which = gl.min(gl.where(best[0] == top[:, None], marks[0], NONE), 1)
            chosen += (which,)
            mine = marks[0] == which[:, None]
            held, numbers = (), ()
            for p in gl.static_range(BEST):
                if p + 1 < BEST:
                    held += (gl.where(mine, best[p + 1], best[p]),)
                    numbers += (gl.where(mine, marks[p + 1], marks[p]),)
                else:
                    held += (gl.where(mine, float("-inf"), best[p]),)
                    numbers += (gl.where(mine, NONE, marks[p]),)
            best, marks = held, numbers
        # ascending, the own block behind them
        for _n in gl.static_range(BEST - 1):
            highest = chosen[0]
            ordered = ()
            for p in gl.static_range(1, BEST):
                ordered += (gl.minimum(highest, chosen[p]),)
                highest = gl.maximum(highest, chosen[p])
            ordered += (highest,)
            chosen = ordered
        token = at + gl.arange(0, 64, line)
        its = (first + token) // BLOCK
        filled = gl.minimum(its, BEST)
        row = item % units * tokens.to(gl.int64) + token
        for p in gl.static_range(BEST + 1):
            listed = gl.where(p == filled, its, 0)
            if p < BEST:
                listed = gl.where(p < filled, chosen[p], listed)
            gl.store(index + row * (BEST + 1) + p, listed, mask=token < tokens)
        gl.store(count + row, filled + 1, mask=token < tokens)


@gluon.jit(do_not_specialize=["items", "tiles", "batch", "heads", "tokens", "first"])
def best_alone_hopper(
    q, k, index, count, items, tiles, batch, heads, tokens, first,
    REPEAT: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, BJ: gl.constexpr, BEST: gl.constexpr,
    Q_STAGES: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    q_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES * GROUPS, 1, 1, 64, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES * 2, 1, 1, BJ, D], k.layout)
    q_full, q_empty = barriers(Q_STAGES * GROUPS, 1, 1)
    k_full, k_empty = barriers(STAGES, 1, GROUPS)
    fence_async_shared()

    sizes = items, tiles, batch, heads, tokens, first
    rings = q_ring, k_ring, q_full, q_empty, k_full, k_empty
    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_best, (index, count, sizes, rings, 0, BLOCK, D, BJ, BEST, GROUPS)),
        (_best, (index, count, sizes, rings, 1, BLOCK, D, BJ, BEST, GROUPS)),
        (_best, (index, count, sizes, rings, 2, BLOCK, D, BJ, BEST, GROUPS)),
        (_best, (index, count, sizes, rings, 3, BLOCK, D, BJ, BEST, GROUPS)),
        (_load, (q, k, sizes, rings, REPEAT, BLOCK, D, BJ, GROUPS)),
    ], [4, 4, 4, 1], [112, 112, 112, 24])  # fmt: skip


# width -> rows of a tile, tiles of queries and of rows in flight
TILES = {64: (64, 2, 4), 128: (64, 2, 2)}
MOST = 3  # blocks by score


def wants(q: Tensor, scoring: Scoring) -> bool:
    """Whether `choose` takes such a choice."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[3] not in TILES or not on_hopper(q.device):
        return False
    if scoring.shared or scoring.initial or scoring.local != 1 or not scoring.block == scoring.stride == scoring.span:
        return False
    return 1 <= scoring.scored <= MOST and aligned(q)


def choose(q: Tensor, planes: Tensor, scoring: Scoring, first: int) -> tuple[Tensor, Tensor]:
    """index [B, H, T, picks] and count [B, H, T]; planes [2, B, G, C, D], a row for each complete block."""
    batch, heads, tokens, width = q.shape
    index = torch.empty(batch, heads, tokens, scoring.picks, dtype=torch.int32, device=q.device)
    count = torch.empty(batch, heads, tokens, dtype=torch.int32, device=q.device)
    rows, q_stages, stages = TILES[width]
    tiles = -(-tokens // (64 * GROUPS))
    items = batch * heads * tiles
    start(
        best_alone_hopper, (min(items, processors(q.device)),),
        descriptor(q, 64), descriptor(planes.flatten(0, 1), rows), index, count, items, tiles, batch, heads, tokens,
        first, REPEAT=heads // planes.shape[2], BLOCK=scoring.block, D=width, BJ=rows, BEST=scoring.scored,
        Q_STAGES=q_stages, STAGES=stages, GROUPS=GROUPS, num_warps=4, maxnreg=96,
    )  # fmt: skip
    return index, count
