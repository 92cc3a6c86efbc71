"""What the walks of FMA's backward know of the tree: which blocks a run has, and which far rows they read; in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLOCK = gl.constexpr(64)  # tokens of a query block and of a key tile
LEVELS = gl.constexpr(16)  # at most


@gluon.jit
def span(item, runs, run_blocks, blocks, RADIUS: gl.constexpr):
    """Unit; own blocks first .. stop - 1, keys low .. stop - 1 and queries first .. end - 1 of a run."""
    first = item % runs * run_blocks
    stop = gl.minimum(first + run_blocks, blocks)
    return item // runs, first, stop, gl.maximum(first - RADIUS, 0), gl.minimum(stop + RADIUS, blocks)


@gluon.jit
def far_rows(n, slot, done, levels, last, RANK: gl.constexpr, RADIUS: gl.constexpr):
    """What slots of block n's far tile stand for: level, group, row among all far rows, whether n or n + 1 reads it.

    Slots of a level: the groups below the neighbours of the parent's neighbours, two of RANK rows.
    """
    level = slot // (2 * RANK)
    above = (RADIUS + (2 << level) - 1) >> (level + 1)
    own = (RADIUS + (1 << level) - 1) >> level
    group = 2 * ((n >> (level + 1)) - above) + slot % (2 * RANK) // RANK
    start = level * 0
    for below in gl.static_range(LEVELS):
        start += gl.where(level > below, done >> below, 0)
    row = (start + group) * RANK + slot % RANK
    there = (level < levels) & (group >= 0) & (group < (gl.minimum(n | 1, last) >> level) - own)
    return level, group, row, there


@gluon.jit
def flush(
    acc_k, acc_v, d_far_k, d_far_v, piece_k, piece_v, n, last, tile, unit, run, runs, own_levels, done, levels,
    far_count, scale, wide: gl.constexpr, D: gl.constexpr, RANK: gl.constexpr, RADIUS: gl.constexpr,
):  # fmt: skip
    """Store the rows that no later block of the run reads, and begin them anew."""
    slot = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
    columns = gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
    level, group, row, _ = far_rows(n, slot, done, levels, n, RANK, RADIUS)
    whole = (((n + 1) & ((2 << level) - 1)) == 0) | (n == last)
    leaving = whole & (level < own_levels) & (level < levels) & (group >= 0) & (group < (done >> level))
    at = (unit.to(gl.int64) * far_count + row)[:, None] * D + columns
    gl.store(d_far_k + at, (acc_k * scale).to(d_far_k.dtype.element_ty), mask=leaving[:, None])
    gl.store(d_far_v + at, acc_v.to(d_far_v.dtype.element_ty), mask=leaving[:, None])
    if n == last:
        above = (level >= own_levels) & (level < levels)
        line = (unit.to(gl.int64) * runs + run) * ((levels - own_levels) * (2 * RANK)) + slot - own_levels * (2 * RANK)
        at = line[:, None] * D + columns
        gl.store(piece_k + at, acc_k * scale, mask=above[:, None])
        gl.store(piece_v + at, acc_v, mask=above[:, None])
    acc_k = gl.where(whole[:, None], 0.0, acc_k)
    acc_v = gl.where(whole[:, None], 0.0, acc_v)
    return acc_k, acc_v


@gluon.jit
def leave_pieces(
    acc_k, acc_v, piece_k, piece_v, tile, unit, run, runs, own_levels, levels, wide: gl.constexpr, D: gl.constexpr,
    RANK: gl.constexpr,
):  # fmt: skip
    """Store what a run gives the rows of levels that more than one run reads."""
    slot = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
    columns = gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
    level = slot // (2 * RANK)
    above = (level >= own_levels) & (level < levels)
    line = (unit.to(gl.int64) * runs + run) * ((levels - own_levels) * (2 * RANK)) + slot - own_levels * (2 * RANK)
    at = line[:, None] * D + columns
    gl.store(piece_k + at, acc_k, mask=above[:, None])
    gl.store(piece_v + at, acc_v, mask=above[:, None])
