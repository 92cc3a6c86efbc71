"""Backward of FMA on Hopper GPUs: the near and the far field of a run of query blocks in one walk, in Gluon.

The tree says who reads what, so there are no lists. A group of level l is read by query blocks of one group of level
l + 1 only, and those are neighbours: a program that walks through 2**r query blocks in order keeps the gradients of the
rows that they read in registers, writes those of levels below r once and whole, and leaves one float32 piece for the
levels above, which `sum_runs` adds up in the order of the runs. The gradients of a near block are whole once the last
block that reads it has gone by; the blocks at the border of two runs are multiplied twice, by the run that owns the
queries for dq and by the run that owns the keys for dk and dv.

Three groups of four warps share the work: near (S, dP, dk and dv of 64 keys), far (the same of the far rows, 64 or 128
of them, of two query blocks at a time) and one that makes dq of the dS that the others leave in shared memory. Two
loading roles keep rings filled: whole tiles by the tensor memory accelerator, far rows by asynchronous copies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from farfield.kernels import pool
from farfield.kernels.attend_hopper import _descriptor, _processors, _template
from farfield.kernels.replay import start
from farfield.ops.pool import Tree

LOG2E = gl.constexpr(1.4426950408889634)
BLOCK = gl.constexpr(64)  # tokens of a query block and of a key tile

# Triton 3.7 has renamed it
_sync = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _span(item, runs, run_blocks, blocks, RADIUS: gl.constexpr):
    """Unit; own blocks first .. stop - 1, keys low .. stop - 1 and queries first .. end - 1 of a run."""
    first = item % runs * run_blocks
    stop = gl.minimum(first + run_blocks, blocks)
    return item // runs, first, stop, gl.maximum(first - RADIUS, 0), gl.minimum(stop + RADIUS, blocks)


@gluon.jit
def _far_rows(n, slot, done, levels, last, RANK: gl.constexpr, RADIUS: gl.constexpr):
    """What slots of block n's far tile stand for: level, group, row among all far rows, whether n or n + 1 reads it.

    Slots of a level: the groups below the neighbours of the parent's neighbours, two of RANK rows.
    """
    level = slot // (2 * RANK)
    above = (RADIUS + (2 << level) - 1) >> (level + 1)
    own = (RADIUS + (1 << level) - 1) >> level
    group = 2 * ((n >> (level + 1)) - above) + slot % (2 * RANK) // RANK
    start = level * 0
    for below in gl.static_range(64 // RANK):
        start += gl.where(level > below, done >> below, 0)
    row = (start + group) * RANK + slot % RANK
    there = (level < levels) & (group >= 0) & (group < (gl.minimum(n | 1, last) >> level) - own)
    return level, group, row, there


@gluon.jit
def _load_tiles(
    q, d_out, k, v, shift, delta, q_ring, d_ring, k_ring, v_ring, shift_ring, delta_ring,
    q_full, d_full, stat_full, q_empty, k_full, k_empty, v_full, v_empty, items, runs, run_blocks, blocks, heads,
    RADIUS: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):  # fmt: skip
    """Queries, their gradients and statistics, keys and values, by one warp."""
    BYTES: gl.constexpr = 2 * BLOCK * D
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    PARTS: gl.constexpr = BLOCK // BQ
    queries, keys = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, low, end = _span(item, runs, run_blocks, blocks, RADIUS)
        b, h = unit // heads, unit % heads
        for x in range(low, end):
            if x >= first:
                s = queries % Q_STAGES
                mbarrier.wait(q_empty.index(s), queries // Q_STAGES & 1 ^ 1)
                mbarrier.expect(q_full.index(s), BYTES)
                mbarrier.expect(d_full.index(s), BYTES)
                for part in gl.static_range(PARTS):
                    i = x * BLOCK + part * BQ
                    tma.async_copy_global_to_shared(q, [b, h, i, 0], q_full.index(s), q_ring.index(s * PARTS + part))
                    tma.async_copy_global_to_shared(
                        d_out, [b, h, i, 0], d_full.index(s), d_ring.index(s * PARTS + part)
                    )
                stat = (unit.to(gl.int64) * blocks + x) * BLOCK + gl.arange(0, BLOCK, flat)
                async_copy.async_copy_global_to_shared(shift_ring.index(s), shift + stat)
                async_copy.async_copy_global_to_shared(delta_ring.index(s), delta + stat)
                async_copy.mbarrier_arrive(stat_full.index(s), increment_count=False)
                queries += 1
            if x < stop:
                s = keys % K_STAGES
                mbarrier.wait(k_empty.index(s), keys // K_STAGES & 1 ^ 1)
                mbarrier.expect(k_full.index(s), BYTES)
                tma.async_copy_global_to_shared(k, [b, h, x * BLOCK, 0], k_full.index(s), k_ring.index(s))
                s = keys % V_STAGES
                mbarrier.wait(v_empty.index(s), keys // V_STAGES & 1 ^ 1)
                mbarrier.expect(v_full.index(s), BYTES)
                tma.async_copy_global_to_shared(v, [b, h, x * BLOCK, 0], v_full.index(s), v_ring.index(s))
                keys += 1


@gluon.jit
def _load_rows(
    far_k, far_v, fk_ring, fv_ring, far_full, far_empty, items, runs, run_blocks, blocks, done, levels, far_count,
    RADIUS: gl.constexpr, RANK: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr, FAR_STAGES: gl.constexpr,
):  # fmt: skip
    """The far rows of two query blocks at a time, by two warps."""
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [2, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, _low, _end = _span(item, runs, run_blocks, blocks, RADIUS)
        k_at = far_k + unit.to(gl.int64) * far_count * D
        v_at = far_v + unit.to(gl.int64) * far_count * D
        for n in range(first, stop, 2):
            s = step % FAR_STAGES
            mbarrier.wait(far_empty.index(s), step // FAR_STAGES & 1 ^ 1)
            for tile in gl.static_range(TILES):
                slot = tile * 64 + gl.arange(0, 64, down)
                _, _, row, there = _far_rows(n, slot, done, levels, blocks - 1, RANK, RADIUS)
                at = row.to(gl.int64)[:, None] * D + columns
                # rows that are not there come as 0
                async_copy.async_copy_global_to_shared(fk_ring.index(s * TILES + tile), k_at + at, mask=there[:, None])
                async_copy.async_copy_global_to_shared(fv_ring.index(s * TILES + tile), v_at + at, mask=there[:, None])
            async_copy.mbarrier_arrive(far_full.index(s), increment_count=False)
            step += 1


@gluon.jit
def _leave(
    x, place, tile, b, h, row, column, heads, tokens, D: gl.constexpr, layout: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Store a tile of x [B, H, T, D] by way of a ring of so many places; without any, from registers."""
    if STAGES:
        # not before what left from this place has been read
        tma.store_wait(STAGES - 1)
        _sync()
        place.reshape(tile.shape).store(tile.to(x.dtype))
        fence_async_shared()
        _sync()
        tma.async_copy_shared_to_global(x, [b, h, row, column], place)
    else:
        line = row + gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
        at = ((b * heads + h).to(gl.int64) * tokens + line)[:, None] * D + columns[None, :]
        gl.store(x + at, tile.to(x.dtype.element_ty), mask=(line < tokens)[:, None])


@gluon.jit
def _near(
    d_k, d_v, out_ring, q_ring, d_ring, k_ring, v_ring, shift_ring, delta_ring, ds_ring,
    q_full, d_full, stat_full, q_empty, k_full, k_empty, v_full, v_empty, ds_full, ds_empty,
    items, runs, run_blocks, blocks, heads, tokens, scale,
    RADIUS: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, DS_STAGES: gl.constexpr, OUT_STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile after the other, over the query blocks that read it."""
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    of_query: gl.constexpr = gl.SliceLayout(0, score)
    dtype: gl.constexpr = q_ring.dtype
    PARTS: gl.constexpr = BLOCK // BQ
    factor = scale * LOG2E
    queries, keys, pairs = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, low, end = _span(item, runs, run_blocks, blocks, RADIUS)
        b, h = unit // heads, unit % heads
        if first == 0:
            # the first blocks have fewer near blocks before them: what the others say of those is that there is nothing
            for i in gl.static_range(RADIUS):
                for t in gl.static_range(i + 1, RADIUS + 1):
                    if i < stop:
                        y = pairs + i * (RADIUS + 1) + t
                        mbarrier.wait(ds_empty.index(y % DS_STAGES), y // DS_STAGES & 1 ^ 1)
                        mbarrier.arrive(ds_full.index(y % DS_STAGES), count=1)
        for j in range(low, stop):
            number = keys + j - low
            ks, vs = number % K_STAGES, number % V_STAGES
            mbarrier.wait(k_full.index(ks), number // K_STAGES & 1)
            mbarrier.wait(v_full.index(vs), number // V_STAGES & 1)
            key_tile = k_ring.index(ks).reshape([BLOCK, D])
            value_tile = v_ring.index(vs).reshape([BLOCK, D])
            acc_k = gl.zeros([BLOCK, D], gl.float32, wide)
            acc_v = gl.zeros([BLOCK, D], gl.float32, wide)
            for i in range(gl.maximum(j, first), gl.minimum(j + RADIUS + 1, end)):
                number_q = queries + i - first
                s = number_q % Q_STAGES
                phase = number_q // Q_STAGES & 1
                mbarrier.wait(q_full.index(s), phase)
                mbarrier.wait(d_full.index(s), phase)
                mbarrier.wait(stat_full.index(s), phase)
                y = pairs + (i - first) * (RADIUS + 1) + i - j
                given = i < stop
                if given:
                    mbarrier.wait(ds_empty.index(y % DS_STAGES), y // DS_STAGES & 1 ^ 1)
                for part in gl.static_range(PARTS):
                    q_tile = q_ring.index(s * PARTS + part).reshape([BQ, D])
                    d_tile = d_ring.index(s * PARTS + part).reshape([BQ, D])
                    scores = gl.zeros([BLOCK, BQ], gl.float32, score)
                    d_weights = gl.zeros([BLOCK, BQ], gl.float32, score)
                    product = warpgroup_mma(key_tile, q_tile.permute((1, 0)), scores, use_acc=False, is_async=True)
                    d_product = warpgroup_mma(
                        value_tile, d_tile.permute((1, 0)), d_weights, use_acc=False, is_async=True
                    )
                    shift = shift_ring.index(s).slice(part * BQ, BQ).load(of_query)
                    delta = delta_ring.index(s).slice(part * BQ, BQ).load(of_query)
                    scores = warpgroup_mma_wait(1, deps=[product])
                    weights = gl.exp2(scores * factor - shift[None, :])
                    if i == j:
                        row = gl.arange(0, BLOCK, gl.SliceLayout(1, score))[:, None]
                        column = part * BQ + gl.arange(0, BQ, of_query)[None, :]
                        weights = gl.where(row <= column, weights, 0.0)
                    operand = gl.convert_layout(weights.to(dtype), left)
                    sum_of_v = warpgroup_mma(operand, d_tile, acc_v, is_async=True)
                    d_weights = warpgroup_mma_wait(1, deps=[d_product])
                    d_scores = (weights * (d_weights - delta[None, :])).to(dtype)
                    d_operand = gl.convert_layout(d_scores, left)
                    sum_of_k = warpgroup_mma(d_operand, q_tile, acc_k, is_async=True)
                    if given:
                        ds_ring.index(y % DS_STAGES).slice(part * BQ, BQ, 1).store(d_scores)
                    acc_v, operand = warpgroup_mma_wait(1, deps=[sum_of_v, operand])
                    acc_k, d_operand = warpgroup_mma_wait(0, deps=[sum_of_k, d_operand])
                fence_async_shared()
                _sync()
                if given:
                    mbarrier.arrive(ds_full.index(y % DS_STAGES), count=1)
                if (i == j) | (j == stop - 1):
                    mbarrier.arrive(q_empty.index(s), count=1)
            mbarrier.arrive(k_empty.index(ks), count=1)
            mbarrier.arrive(v_empty.index(vs), count=1)
            if j >= first:
                at = b, h, j * BLOCK, 0, heads, tokens
                _leave(d_k, out_ring.index(0), acc_k * scale, *at, D, wide, OUT_STAGES)
                _leave(d_v, out_ring.index(OUT_STAGES // 2), acc_v, *at, D, wide, OUT_STAGES)
        queries += end - first
        keys += stop - low
        pairs += (stop - first) * (RADIUS + 1)
    if OUT_STAGES:
        # shared memory must be there until everything has left it
        tma.store_wait(0)


@gluon.jit
def _far_step(
    key_tile, value_tile, q_tile, d_tile, shift, delta, bias, acc_k, acc_v, ds, factor,
    score: gl.constexpr, left: gl.constexpr, BQ: gl.constexpr,
):  # fmt: skip
    """One tile of 64 far rows and BQ queries: adds to dk and dv, leaves dS."""
    scores = gl.zeros([64, BQ], gl.float32, score)
    d_weights = gl.zeros([64, BQ], gl.float32, score)
    product = warpgroup_mma(key_tile, q_tile.permute((1, 0)), scores, use_acc=False, is_async=True)
    d_product = warpgroup_mma(value_tile, d_tile.permute((1, 0)), d_weights, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[product])
    weights = gl.exp2(scores * factor + (bias[:, None] - shift[None, :]))
    operand = gl.convert_layout(weights.to(ds.dtype), left)
    sum_of_v = warpgroup_mma(operand, d_tile, acc_v, is_async=True)
    d_weights = warpgroup_mma_wait(1, deps=[d_product])
    d_scores = (weights * (d_weights - delta[None, :])).to(ds.dtype)
    d_operand = gl.convert_layout(d_scores, left)
    sum_of_k = warpgroup_mma(d_operand, q_tile, acc_k, is_async=True)
    ds.store(d_scores)
    acc_v, operand = warpgroup_mma_wait(1, deps=[sum_of_v, operand])
    acc_k, d_operand = warpgroup_mma_wait(0, deps=[sum_of_k, d_operand])
    return acc_k, acc_v


@gluon.jit
def _flush(
    acc_k, acc_v, d_far_k, d_far_v, piece_k, piece_v, n, last, tile, unit, run, runs, own_levels, done, levels,
    far_count, scale, wide: gl.constexpr, D: gl.constexpr, RANK: gl.constexpr, RADIUS: gl.constexpr,
):  # fmt: skip
    """Store the rows that no later block of the run reads, and begin them anew."""
    slot = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
    columns = gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
    level, group, row, _ = _far_rows(n, slot, done, levels, n, RANK, RADIUS)
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
def _far(
    d_far_k, d_far_v, piece_k, piece_v, q_ring, d_ring, fk_ring, fv_ring, shift_ring, delta_ring, df_ring,
    q_full, d_full, stat_full, q_empty, far_full, far_empty, df_full, df_empty,
    items, runs, run_blocks, blocks, own_levels, done, levels, far_count, scale, log_segment,
    RADIUS: gl.constexpr, RANK: gl.constexpr, TILES: gl.constexpr, BQ: gl.constexpr, BF: gl.constexpr, D: gl.constexpr,
    Q_STAGES: gl.constexpr, FAR_STAGES: gl.constexpr, DF_STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of the far rows, of all query blocks of a run; BF queries at a time, in tiles of BQ."""
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BF, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    of_query: gl.constexpr = gl.SliceLayout(0, score)
    PARTS: gl.constexpr = BLOCK // BQ
    PER: gl.constexpr = BQ // BF
    factor = scale * LOG2E
    queries, steps, turns = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, _low, end = _span(item, runs, run_blocks, blocks, RADIUS)
        acc_k0 = gl.zeros([64, D], gl.float32, wide)
        acc_v0 = gl.zeros([64, D], gl.float32, wide)
        acc_k1, acc_v1 = acc_k0, acc_v0
        for n in range(first, stop):
            f = steps % FAR_STAGES
            mbarrier.wait(far_full.index(f), steps // FAR_STAGES & 1)
            # these copies were ordinary writes to shared memory; the tensor cores read it another way
            fence_async_shared()
            slot = gl.arange(0, 64, per_row)
            level, group, _, there = _far_rows(n, slot, done, levels, blocks - 1, RANK, RADIUS)
            own = (RADIUS + (1 << level) - 1) >> level
            bias0 = gl.where(there & (group < (n >> level) - own), (level + log_segment).to(gl.float32), float("-inf"))
            bias1 = bias0
            if TILES == 2:
                level, group, _, there = _far_rows(n, slot + 64, done, levels, blocks - 1, RANK, RADIUS)
                own = (RADIUS + (1 << level) - 1) >> level
                bias1 = gl.where(
                    there & (group < (n >> level) - own), (level + log_segment).to(gl.float32), float("-inf")
                )
            s = queries % Q_STAGES
            phase = queries // Q_STAGES & 1
            mbarrier.wait(q_full.index(s), phase)
            mbarrier.wait(d_full.index(s), phase)
            mbarrier.wait(stat_full.index(s), phase)
            mbarrier.wait(df_empty.index(turns % DF_STAGES), turns // DF_STAGES & 1 ^ 1)
            for part in gl.static_range(BLOCK // BF):
                box = s * PARTS + part // PER
                q_tile = q_ring.index(box).reshape([BQ, D]).slice(part % PER * BF, BF, 0)
                d_tile = d_ring.index(box).reshape([BQ, D]).slice(part % PER * BF, BF, 0)
                shift = shift_ring.index(s).slice(part * BF, BF).load(of_query)
                delta = delta_ring.index(s).slice(part * BF, BF).load(of_query)
                acc_k0, acc_v0 = _far_step(
                    fk_ring.index(f * TILES), fv_ring.index(f * TILES), q_tile, d_tile, shift, delta, bias0, acc_k0,
                    acc_v0, df_ring.index(turns % DF_STAGES * TILES).slice(part * BF, BF, 1), factor, score, left, BF,
                )  # fmt: skip
                if TILES == 2:
                    acc_k1, acc_v1 = _far_step(
                        fk_ring.index(f * TILES + 1), fv_ring.index(f * TILES + 1), q_tile, d_tile, shift, delta, bias1,
                        acc_k1, acc_v1, df_ring.index(turns % DF_STAGES * TILES + 1).slice(part * BF, BF, 1), factor,
                        score, left, BF,
                    )  # fmt: skip
            fence_async_shared()
            _sync()
            mbarrier.arrive(df_full.index(turns % DF_STAGES), count=1)
            mbarrier.arrive(q_empty.index(s), count=1)
            turns += 1
            queries += 1
            if (n % 2 == 1) | (n == stop - 1):
                mbarrier.arrive(far_empty.index(f), count=1)
                steps += 1
                acc_k0, acc_v0 = _flush(
                    acc_k0, acc_v0, d_far_k, d_far_v, piece_k, piece_v, n, stop - 1, 0, unit, item % runs, runs,
                    own_levels, done, levels, far_count, scale, wide, D, RANK, RADIUS,
                )  # fmt: skip
        if TILES == 2:
            # levels that are wider than any run
            _flush(
                acc_k1, acc_v1, d_far_k, d_far_v, piece_k, piece_v, stop - 1, stop - 1, 1, unit, item % runs, runs,
                own_levels, done, levels, far_count, scale, wide, D, RANK, RADIUS,
            )  # fmt: skip
        # queries that only the near field asks
        for _ in range(stop, end):
            s = queries % Q_STAGES
            mbarrier.wait(q_full.index(s), queries // Q_STAGES & 1)
            _sync()
            mbarrier.arrive(q_empty.index(s), count=1)
            queries += 1


@gluon.jit
def _queries(
    d_q, place, k_ring, fk_ring, ds_ring, df_ring, k_full, k_empty, far_full, far_empty, ds_full, ds_empty,
    df_full, df_empty,
    items, runs, run_blocks, blocks, heads, tokens, scale,
    RADIUS: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr, K_STAGES: gl.constexpr, FAR_STAGES: gl.constexpr,
    DS_STAGES: gl.constexpr, DF_STAGES: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """dq of one query block after the other, 64 columns at a time."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    HALVES: gl.constexpr = D // 64
    keys, pairs, steps, turns = 0, 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, low, _end = _span(item, runs, run_blocks, blocks, RADIUS)
        b, h = unit // heads, unit % heads
        for i in range(first, stop):
            y = pairs + (i - first) * (RADIUS + 1)
            if i < RADIUS:
                for t in range(i + 1, RADIUS + 1):
                    mbarrier.wait(ds_full.index((y + t) % DS_STAGES), (y + t) // DS_STAGES & 1)
                    _sync()
                    mbarrier.arrive(ds_empty.index((y + t) % DS_STAGES), count=1)
            f = steps % FAR_STAGES
            for half in gl.static_range(HALVES):
                acc = gl.zeros([BLOCK, 64], gl.float32, wide)
                for j in range(gl.maximum(i - RADIUS, 0), i + 1):
                    x = y + i - j
                    number = keys + j - low
                    mbarrier.wait(k_full.index(number % K_STAGES), number // K_STAGES & 1)
                    mbarrier.wait(ds_full.index(x % DS_STAGES), x // DS_STAGES & 1)
                    key_tile = k_ring.index(number % K_STAGES).reshape([BLOCK, D]).slice(half * 64, 64, 1)
                    acc = warpgroup_mma(ds_ring.index(x % DS_STAGES).permute((1, 0)), key_tile, acc)
                    if half == HALVES - 1:
                        _sync()
                        mbarrier.arrive(ds_empty.index(x % DS_STAGES), count=1)
                        if (j == i - RADIUS) | (i == stop - 1):
                            mbarrier.arrive(k_empty.index(number % K_STAGES), count=1)
                mbarrier.wait(far_full.index(f), steps // FAR_STAGES & 1)
                mbarrier.wait(df_full.index(turns % DF_STAGES), turns // DF_STAGES & 1)
                fence_async_shared()
                for tile in gl.static_range(TILES):
                    d_scores = df_ring.index(turns % DF_STAGES * TILES + tile).permute((1, 0))
                    acc = warpgroup_mma(d_scores, fk_ring.index(f * TILES + tile).slice(half * 64, 64, 1), acc)
                if half == HALVES - 1:
                    _sync()
                    mbarrier.arrive(df_empty.index(turns % DF_STAGES), count=1)
                    if (i % 2 == 1) | (i == stop - 1):
                        mbarrier.arrive(far_empty.index(f), count=1)
                _leave(d_q, place, acc * scale, b, h, i * BLOCK, half * 64, heads, tokens, D, wide, PLACES)
            turns += 1
            if (i % 2 == 1) | (i == stop - 1):
                steps += 1
        keys += stop - low
        pairs += (stop - first) * (RADIUS + 1)
    if PLACES:
        tma.store_wait(0)


VARIES = ["items", "runs", "run_blocks", "blocks", "heads", "tokens", "own_levels", "done", "levels", "far_count"]
VARIES += ["log_segment"]


@gluon.jit(do_not_specialize=VARIES)
def multipole_backward(
    q, d_out, k, v, shift, delta, far_k, far_v, d_q, d_k, d_v, d_far_k, d_far_v, piece_k, piece_v,
    items, runs, run_blocks, blocks, heads, tokens, own_levels, done, levels, far_count, log_segment, scale,
    RADIUS: gl.constexpr, RANK: gl.constexpr, TILES: gl.constexpr, BQ: gl.constexpr, BF: gl.constexpr, D: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, FAR_STAGES: gl.constexpr,
    DS_STAGES: gl.constexpr, DF_STAGES: gl.constexpr, OUT_STAGES: gl.constexpr, FAR_REGISTERS: gl.constexpr,
    QUERY_REGISTERS: gl.constexpr, LOADING: gl.constexpr,
):  # fmt: skip
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PARTS: gl.constexpr = BLOCK // BQ
    q_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES * PARTS, 1, 1, BQ, D], q.layout)
    d_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES * PARTS, 1, 1, BQ, D], d_out.layout)
    k_ring = gl.allocate_shared_memory(q.dtype, [K_STAGES, 1, 1, BLOCK, D], k.layout)
    v_ring = gl.allocate_shared_memory(q.dtype, [V_STAGES, 1, 1, BLOCK, D], v.layout)
    shift_ring = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK], plain)
    delta_ring = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK], plain)
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], q.dtype)
    fk_ring = gl.allocate_shared_memory(q.dtype, [FAR_STAGES * TILES, 64, D], rows)
    fv_ring = gl.allocate_shared_memory(q.dtype, [FAR_STAGES * TILES, 64, D], rows)
    # dS, transposed: [rows, queries], written BQ or BF queries at a time
    near_ds: gl.constexpr = gl.NVMMASharedLayout(2 * BQ, 16, 2)
    far_ds: gl.constexpr = gl.NVMMASharedLayout(2 * BF, 16, 2)
    ds_ring = gl.allocate_shared_memory(q.dtype, [DS_STAGES, BLOCK, BLOCK], near_ds)
    df_ring = gl.allocate_shared_memory(q.dtype, [DF_STAGES * TILES, 64, BLOCK], far_ds)
    out_ring, place = q_ring, q_ring
    if OUT_STAGES:
        # where dk and dv, and dq, leave from
        out_ring = gl.allocate_shared_memory(q.dtype, [OUT_STAGES, 1, 1, BLOCK, D], d_k.layout)
        place = gl.allocate_shared_memory(q.dtype, [1, 1, BLOCK, 64], d_q.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    d_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    stat_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], bars)
    far_full = gl.allocate_shared_memory(gl.int64, [FAR_STAGES, 1], bars)
    far_empty = gl.allocate_shared_memory(gl.int64, [FAR_STAGES, 1], bars)
    ds_full = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], bars)
    ds_empty = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], bars)
    df_full = gl.allocate_shared_memory(gl.int64, [DF_STAGES, 1], bars)
    df_empty = gl.allocate_shared_memory(gl.int64, [DF_STAGES, 1], bars)
    for s in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(d_full.index(s), count=1)
        # every loading thread reports its own copies
        mbarrier.init(stat_full.index(s), count=32)
        mbarrier.init(q_empty.index(s), count=2)
    for s in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=2)
    for s in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=1)
    for s in gl.static_range(FAR_STAGES):
        mbarrier.init(far_full.index(s), count=64)
        mbarrier.init(far_empty.index(s), count=2)
    for s in gl.static_range(DS_STAGES):
        mbarrier.init(ds_full.index(s), count=1)
        mbarrier.init(ds_empty.index(s), count=1)
    for s in gl.static_range(DF_STAGES):
        mbarrier.init(df_full.index(s), count=1)
        mbarrier.init(df_empty.index(s), count=1)
    fence_async_shared()

    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_near, (
            d_k, d_v, out_ring, q_ring, d_ring, k_ring, v_ring, shift_ring, delta_ring, ds_ring,
            q_full, d_full, stat_full, q_empty, k_full, k_empty, v_full, v_empty, ds_full, ds_empty,
            items, runs, run_blocks, blocks, heads, tokens, scale,
            RADIUS, BQ, D, Q_STAGES, K_STAGES, V_STAGES, DS_STAGES, OUT_STAGES,
        )),
        (_far, (
            d_far_k, d_far_v, piece_k, piece_v, q_ring, d_ring, fk_ring, fv_ring, shift_ring, delta_ring, df_ring,
            q_full, d_full, stat_full, q_empty, far_full, far_empty, df_full, df_empty,
            items, runs, run_blocks, blocks, own_levels, done, levels, far_count, scale, log_segment,
            RADIUS, RANK, TILES, BQ, BF, D, Q_STAGES, FAR_STAGES, DF_STAGES,
        )),
        (_queries, (
            d_q, place, k_ring, fk_ring, ds_ring, df_ring, k_full, k_empty, far_full, far_empty, ds_full, ds_empty,
            df_full, df_empty, items, runs, run_blocks, blocks, heads, tokens, scale,
            RADIUS, TILES, D, K_STAGES, FAR_STAGES, DS_STAGES, DF_STAGES, 1 if OUT_STAGES else 0,
        )),
        (_load_rows, (
            far_k, far_v, fk_ring, fv_ring, far_full, far_empty, items, runs, run_blocks, blocks, done, levels,
            far_count, RADIUS, RANK, TILES, D, FAR_STAGES,
        )),
        (_load_tiles, (
            q, d_out, k, v, shift, delta, q_ring, d_ring, k_ring, v_ring, shift_ring, delta_ring,
            q_full, d_full, stat_full, q_empty, k_full, k_empty, v_full, v_empty, items, runs, run_blocks, blocks,
            heads, RADIUS, BQ, D, Q_STAGES, K_STAGES, V_STAGES,
        )),
    ], [4, 4, 2, 1], [FAR_REGISTERS, QUERY_REGISTERS, LOADING, LOADING])  # fmt: skip


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


@triton.jit(do_not_specialize=["runs", "blocks", "own_levels", "done", "levels", "far_count", "groups", "radius"])
def sum_runs(
    piece_k, piece_v, d_far_k, d_far_v, runs, blocks, own_levels, done, levels, far_count, groups, radius,
    D: tl.constexpr, RANK: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """The gradient of one group from the pieces of the runs that read it; 0 where none did.

    Groups of the levels from `own_levels` on, and before them the last two of each lower level, which may lie where
    no block reads them.
    """
    SIZE: tl.constexpr = RANK * D
    pid = tl.program_id(0).to(tl.int64)
    unit, x = pid // groups, pid % groups
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


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        queries, far_queries: that the near and the far warps take at a time.
        q_stages, k_stages, v_stages, far_stages, ds_stages, df_stages: places of the rings.
        out_stages: places that dk and dv leave from; 0: from registers, where shared memory is full.
        far, query, loading: registers of a thread. The near warps get the rest.
    """

    queries: int
    far_queries: int
    q_stages: int
    k_stages: int
    v_stages: int
    far_stages: int
    ds_stages: int
    df_stages: int
    out_stages: int
    far: int
    query: int
    loading: int = 32


# tiles of 64 far rows -> tiles. Heads of 128 do not fit: sums of 128 registers a thread leave the compiler too few, and
# it makes the products wait for each other
TILES = {
    1: Tiles(64, 64, 3, 4, 3, 2, 4, 2, 2, far=200, query=80),
    2: Tiles(64, 32, 3, 4, 2, 2, 4, 2, 0, far=216, query=80),
}
RUN = 4  # log2 of the query blocks of a run at most


def wants(q: Tensor, k: Tensor, near: int, tree: Tree) -> bool:
    """Whether shapes suit what ops.multipole takes: heads of 64 that share no keys, blocks of 64, one near block.

    Of ranks, 4 is the one that has been measured.
    """
    return (
        q.shape[1:] == k.shape[1:]
        and q.shape[3] == 64
        and near == tree.block == 64
        and tree.lo == 0
        and tree.rank == 4
        and _far_tiles(tree) in TILES
    )


def _far_tiles(tree: Tree) -> int:
    """Tiles of 64 rows: on each level a block reads two groups at most."""
    return -(-2 * tree.rank * tree.levels // 64)


def _columns(x: Tensor) -> TensorDescriptor:
    """A descriptor of boxes of 64 rows and 64 columns."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_template(64, 64, x.dtype), base=x, shape=list(x.shape), strides=list(x.stride()))
    return made


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
    far_tiles = _far_tiles(tree)
    tiles = TILES[far_tiles]
    # long runs leave few pieces, many runs fill the GPU
    own_levels = min(RUN, levels)
    runs = -(-blocks >> own_levels)
    d_q, d_k, d_v = (torch.empty((batch, heads, tokens, width), dtype=q.dtype, device=q.device) for _ in range(3))
    d_far_k, d_far_v = torch.empty_like(far_k), torch.empty_like(far_v)
    shift, delta = (torch.empty(units * blocks * 64, dtype=torch.float32, device=q.device) for _ in range(2))
    pieces = units * runs * (levels - own_levels) * 2 * rank * width
    piece_k, piece_v = (torch.empty(max(pieces, 1), dtype=torch.float32, device=q.device) for _ in range(2))
    start(
        statistics, (units * blocks,), out, d_out, lse, shift, delta, *d_out.stride()[:3], heads, tokens, blocks * 64,
        D=width, ROWS=64, num_warps=4,
    )  # fmt: skip
    items = units * runs
    results = (_columns(d_q), _descriptor(d_k, 64), _descriptor(d_v, 64)) if tiles.out_stages else (d_q, d_k, d_v)
    start(
        multipole_backward, (min(items, _processors(q.device)),),
        _descriptor(q, tiles.queries), _descriptor(d_out, tiles.queries), _descriptor(k, 64), _descriptor(v, 64),
        shift, delta, far_k, far_v, *results, d_far_k, d_far_v, piece_k, piece_v,
        items, runs, 1 << own_levels, blocks, heads, tokens, own_levels, tree.blocks, levels, far_count,
        (64 // rank).bit_length() - 1, scale,
        RADIUS=1, RANK=rank, TILES=far_tiles, BQ=tiles.queries, BF=tiles.far_queries, D=width,
        Q_STAGES=tiles.q_stages, K_STAGES=tiles.k_stages, V_STAGES=tiles.v_stages, FAR_STAGES=tiles.far_stages,
        DS_STAGES=tiles.ds_stages, DF_STAGES=tiles.df_stages, OUT_STAGES=tiles.out_stages, FAR_REGISTERS=tiles.far,
        QUERY_REGISTERS=tiles.query, LOADING=tiles.loading, num_warps=4, maxnreg=128,
    )  # fmt: skip
    groups = 2 * own_levels + sum(tree.groups[own_levels:])
    start(
        sum_runs, (units * groups,), piece_k, piece_v, d_far_k, d_far_v, runs, blocks, own_levels, tree.blocks, levels,
        far_count, groups, 1, D=width, RANK=rank, MANY=16, num_warps=4,
    )  # fmt: skip
    return (d_q, d_k, d_v), (d_far_k, d_far_v)
