"""Backward of FMA on Hopper GPUs: what is launched before, between and after the walks.

The tree says who reads what, so there are no lists. A group of level l is read by query blocks of one group of level
l + 1 only, and those are neighbours: a program that walks through 2**r query blocks in order keeps the gradients of the
rows that they read in registers, writes those of levels below r once and whole, and leaves one float32 piece for the
levels above, which `sum_runs` adds up in the order of the runs. The gradients of a near block are whole once the last
block that reads it has gone by; the blocks at the border of two runs are multiplied twice, by the run that owns the
queries for dq and by the run that owns the keys for dk and dv.

Blocks of 64 go through one walk (`multipole_walk`); far rows that it has no room for, and all those of blocks of 128,
go through walks of their own (`multipole_walk_far`), which add to dq.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import multipole_tree, pool
from farfield.kernels import multipole_walk as walk
from farfield.kernels import multipole_walk_far as far_field
from farfield.kernels import multipole_walk_near as near_field
from farfield.kernels.hopper import descriptor, processors
from farfield.kernels.replay import start
from farfield.ops.pool import Tree


@triton.jit(do_not_specialize=["d_batch", "d_head", "d_row", "heads", "tokens", "padded"])
def statistics(
    out, d_out, lse, shift, delta, d_batch, d_head, d_row, heads, tokens, padded, D: tl.constexpr, ROWS: tl.constexpr
):
    """delta = sum(dout out), and lse in units of log 2; inf up to the end of the last block: no weight."""
    chunks = (padded + ROWS - 1) // ROWS
    pid = tl.program_id(0).to(tl.int64)
    unit, chunk = pid // chunks, pid % chunks
    i = chunk * ROWS + tl.arange(0, ROWS)
    asked = i < tokens
    columns = tl.arange(0, D)
    base = d_out + unit // heads * d_batch + unit % heads * d_head
    d_tile = tl.load(base + i[:, None] * d_row + columns, mask=asked[:, None], other=0.0)
    o_tile = tl.load(out + (unit * tokens + i)[:, None] * D + columns, mask=asked[:, None], other=0.0)
    mass = tl.load(lse + unit * tokens + i, mask=asked, other=float("-inf"))
    empty = mass == float("-inf")
    own = i < padded
    tl.store(shift + unit * padded + i, tl.where(empty, float("inf"), mass * 1.4426950408889634), mask=own)
    total = tl.sum(o_tile.to(tl.float32) * d_tile.to(tl.float32), 1)
    tl.store(delta + unit * padded + i, tl.where(empty, 0.0, total), mask=own)


SUMS_VARY = ["units", "runs", "blocks", "own_levels", "done", "levels", "far_count", "groups", "radius"]


@triton.jit(do_not_specialize=SUMS_VARY)
def sum_runs(
    piece_k, piece_v, d_far_k, d_far_v, units, runs, blocks, own_levels, done, levels, far_count, groups, radius,
    D: tl.constexpr, RANK: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """The gradient of one group from the pieces of the runs that read it; 0 where none did.

    Groups of the levels from `own_levels` on, and before them the last two of each lower level, which may lie where
    no block reads them.
    """
    SIZE: tl.constexpr = RANK * D
    pid = tl.program_id(0).to(tl.int64)
    # those of the highest levels take longest: they go first
    unit, x = pid % units, groups - 1 - pid // units
    start = tl.full([], 0, tl.int64)
    size = done.to(tl.int64)
    level = 0
    if x < 2 * own_levels:
        # one of the last two groups of a level
        level = (x // 2).to(tl.int32)
        for _ in range(level):
            start += size
            size = size >> 1
        group = size - 1 - x % 2
    else:
        group = x - 2 * own_levels
        for _ in range(own_levels):
            start += size
            size = size >> 1
        level = own_levels
        while group >= size:
            group -= size
            start += size
            size = size >> 1
            level += 1
    above = (radius + (2 << level) - 1) >> (level + 1)
    parent = (group >> 1) + above
    begin = parent << (level + 1)
    at = tl.arange(0, SIZE)
    target = (unit * far_count + (start + group) * RANK) * D + at
    if level < own_levels:
        if (group >= 0) & (begin >= blocks):
            zero = tl.zeros([SIZE], d_far_k.dtype.element_ty)
            tl.store(d_far_k + target, zero)
            tl.store(d_far_v + target, zero)
    else:
        run = begin >> own_levels
        stop = tl.minimum((begin + (2 << level)) >> own_levels, runs)
        acc_k = tl.zeros([MANY, SIZE], tl.float32)
        acc_v = tl.zeros([MANY, SIZE], tl.float32)
        piece = (level - own_levels) * 2 + group % 2
        lanes = tl.arange(0, MANY)
        for y in range(run, stop, MANY):
            there = (y + lanes < stop)[:, None]
            line = (unit * runs + y + lanes) * ((levels - own_levels) * 2) + piece
            acc_k += tl.load(piece_k + line[:, None] * SIZE + at, mask=there, other=0.0)
            acc_v += tl.load(piece_v + line[:, None] * SIZE + at, mask=there, other=0.0)
        tl.store(d_far_k + target, tl.sum(acc_k, 0).to(d_far_k.dtype.element_ty))
        tl.store(d_far_v + target, tl.sum(acc_v, 0).to(d_far_v.dtype.element_ty))


LEVELS = multipole_tree.LEVELS.value  # at most
RUN = 4  # log2 of the query blocks of a run at most
WALKED = {64: 2, 128: 1}  # width -> tiles of 64 far rows of a query block that fit beside its near field


def wants(q: Tensor, k: Tensor, near: int, tree: Tree) -> bool:
    """Whether shapes suit what ops.multipole takes: heads that share no keys, blocks of 64, one near block.

    Of ranks, 4 is the one that has been measured.
    """
    return (
        q.shape[1:] == k.shape[1:]
        and near == tree.block == 64
        and tree.lo == 0
        and tree.rank == 4
        and tree.levels <= LEVELS
    )


def _far_tiles(tree: Tree) -> int:
    """Tiles of 64 rows: on each level a block reads two groups at most."""
    return -(-2 * tree.rank * tree.levels // 64)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, far_k: Tensor, far_v: Tensor, tree: Tree,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, pooling included; launches and allocations only, so that it can be recorded.

    Args:
        lse: natural log, [B, H, T], contiguous, as `out` is.
        far_k, far_v: the pyramid that `tree` names, contiguous.
    """
    (d_q, d_k, d_v), far = gradients(q, k, v, out, d_out, lse, far_k, far_v, tree, scale)
    none = q.new_empty(0, dtype=torch.float32)
    d_k, d_v, _ = pool.backward(d_k, d_v, *far, none, none, none, q.shape[2], tree)
    return d_q, d_k, d_v


def gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, far_k: Tensor, far_v: Tensor, tree: Tree,
    scale: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """Gradients of q, k and v as they are read one by one, and of the far keys and values."""
    batch, heads, tokens, width = q.shape
    rank, levels, blocks = tree.rank, tree.levels, -(-tokens // 64)
    units, far_count = batch * heads, far_k.shape[2]
    # long runs leave few pieces, many runs fill the GPU
    own_levels = min(RUN, levels)
    runs = -(-blocks >> own_levels)
    d_q, d_k, d_v = (torch.empty((batch, heads, tokens, width), dtype=q.dtype, device=q.device) for _ in range(3))
    d_far_k, d_far_v = torch.empty_like(far_k), torch.empty_like(far_v)
    shift, delta = statistics_of(out, d_out, lse, 64)
    pieces = units * runs * (levels - own_levels) * 2 * rank * width
    piece_k, piece_v = (torch.empty(max(pieces, 1), dtype=torch.float32, device=q.device) for _ in range(2))
    items = units * runs
    count = min(_far_tiles(tree), WALKED[width])
    tiles = walk.TILES[width, count]
    start(
        walk.multipole_walk, (min(items, processors(q.device)),),
        *(descriptor(x, 64) for x in (q, d_out, k, v)), shift, delta, far_k, far_v,
        *(descriptor(x, 64) for x in (d_q, d_k, d_v)), d_far_k, d_far_v, piece_k, piece_v,
        items, runs, 1 << own_levels, blocks, heads, tokens, own_levels, tree.blocks, levels, far_count,
        (64 // rank).bit_length() - 1, scale,
        RADIUS=1, RANK=rank, TILES=count, D=width, QS=tiles.q_stages, KS=tiles.k_stages, FS=tiles.far_stages,
        AHEAD=tiles.ahead, STEP=tiles.step, NEAR_REGISTERS=tiles.near, FAR_REGISTERS=tiles.far,
        LOADING=tiles.loading, num_warps=4, maxnreg=128,
    )  # fmt: skip
    _far_walks(q, d_out, shift, delta, far_k, far_v, d_q, d_far_k, d_far_v, piece_k, piece_v, tree, scale, count)
    _sum_runs(piece_k, piece_v, d_far_k, d_far_v, runs, blocks, own_levels, tree, units)
    return (d_q, d_k, d_v), (d_far_k, d_far_v)


def _sum_runs(piece_k, piece_v, d_far_k, d_far_v, runs: int, blocks: int, own_levels: int, tree: Tree, units: int):
    groups = 2 * own_levels + sum(tree.groups[own_levels:])
    far_count, width = d_far_k.shape[2:]
    start(
        sum_runs, (units * groups,), piece_k, piece_v, d_far_k, d_far_v, units, runs, blocks, own_levels, tree.blocks,
        tree.levels, far_count, groups, 1, D=width, RANK=tree.rank, MANY=min(16, 8192 // (tree.rank * width)),
        num_warps=4,
    )  # fmt: skip


def wants_halves(q: Tensor, k: Tensor, near: int, tree: Tree) -> bool:
    """Whether shapes suit the far field in a walk of its own: heads that share no keys, blocks of 128, one near block.

    Of ranks, 16 is the one that has been measured.
    """
    return (
        q.shape[1:] == k.shape[1:]
        and near == tree.block == 128
        and tree.lo == 0
        and tree.rank == 16
        and tree.levels <= LEVELS
    )


def near_gradients(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, shift: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v as they are read one by one, in blocks of 128."""
    batch, heads, tokens, width = q.shape
    blocks, tiles = -(-tokens // 128), near_field.TILES[width]
    runs = -(-blocks >> RUN)
    items = batch * heads * runs
    d_q, d_k, d_v = (torch.empty((batch, heads, tokens, width), dtype=q.dtype, device=q.device) for _ in range(3))
    start(
        near_field.multipole_walk_near, (min(items, processors(q.device)),),
        *(descriptor(x, 64) for x in (q, d_out, k, v)), shift, delta, *(descriptor(x, 64) for x in (d_q, d_k, d_v)),
        items, runs, 1 << RUN, blocks, heads, scale,
        D=width, QS=tiles.q_stages, KS=tiles.k_stages, REGISTERS=tiles.registers, LOADING=tiles.loading, num_warps=4,
        maxnreg=128,
    )  # fmt: skip
    return d_q, d_k, d_v


def far_gradients(
    q: Tensor, d_out: Tensor, shift: Tensor, delta: Tensor, far_k: Tensor, far_v: Tensor, d_q: Tensor, tree: Tree,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the far keys and values; what the queries get is added to d_q."""
    batch, heads, tokens, width = q.shape
    rank, levels, blocks = tree.rank, tree.levels, -(-tokens // tree.block)
    units, own_levels = batch * heads, min(RUN, tree.levels)
    runs = -(-blocks >> own_levels)
    d_far_k, d_far_v = torch.empty_like(far_k), torch.empty_like(far_v)
    pieces = units * runs * (levels - own_levels) * 2 * rank * width
    piece_k, piece_v = (torch.empty(max(pieces, 1), dtype=torch.float32, device=q.device) for _ in range(2))
    _far_walks(q, d_out, shift, delta, far_k, far_v, d_q, d_far_k, d_far_v, piece_k, piece_v, tree, scale, 0)
    _sum_runs(piece_k, piece_v, d_far_k, d_far_v, runs, blocks, own_levels, tree, units)
    return d_far_k, d_far_v


def _far_walks(
    q: Tensor, d_out: Tensor, shift: Tensor, delta: Tensor, far_k: Tensor, far_v: Tensor, d_q: Tensor, d_far_k: Tensor,
    d_far_v: Tensor, piece_k: Tensor, piece_v: Tensor, tree: Tree, scale: float, first: int,
) -> None:  # fmt: skip
    """The far rows from tile `first` on, in as many walks as they take."""
    batch, heads, tokens, width = q.shape
    rank, blocks, own_levels = tree.rank, -(-tokens // tree.block), min(RUN, tree.levels)
    runs = -(-blocks >> own_levels)
    items = batch * heads * runs
    while (left := _far_tiles(tree) - first) > 0:
        count = min(1 << (left - 1).bit_length(), far_field.MOST[width])
        tiles = far_field.TILES[width, count]
        start(
            far_field.multipole_walk_far, (min(items, processors(q.device)),),
            descriptor(q, 64), descriptor(d_out, 64), shift, delta, far_k, far_v, descriptor(d_q, 64),
            d_far_k, d_far_v, piece_k, piece_v, items, runs, 1 << own_levels, blocks, heads, tokens, own_levels,
            tree.blocks, tree.levels, far_k.shape[2], (tree.block // rank).bit_length() - 1, scale,
            SPLIT=tree.block // 64, RANK=rank, FIRST=first, TILES=count, D=width, GIVEN=True, RUN=RUN,
            QS=tiles.q_stages, AHEAD=tiles.ahead, STEP=tiles.step, REGISTERS=tiles.registers, LOADING=tiles.loading,
            num_warps=4, maxnreg=128,
        )  # fmt: skip
        first += count


def statistics_of(out: Tensor, d_out: Tensor, lse: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """shift and delta of each query, up to the end of the last block."""
    batch, heads, tokens, width = out.shape
    padded = -(-tokens // block) * block
    shift, delta = (torch.empty(batch * heads * padded, dtype=torch.float32, device=out.device) for _ in range(2))
    start(
        statistics, (batch * heads * (padded // 64),), out, d_out, lse, shift, delta, *d_out.stride()[:3], heads,
        tokens, padded, D=width, ROWS=64, num_warps=4,
    )  # fmt: skip
    return shift, delta
