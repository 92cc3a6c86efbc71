"""Attention between tokens that were sorted into slots, on Hopper GPUs, backward: rows are gathered on the way.

attend's two kernels for Hopper over the slots of ops.hashed: queries with their lists of rows (delta, dq; as
kernels.attend_backward_queries_hopper), and rows with their readers (dk, dv; the computing groups are those of
kernels.attend_backward_hopper). Rows are copied one by one from their tokens into shared memory, gradients are written
to their tokens, and a counter in memory deals blocks out, as in the forward (kernels.attend_sorted_hopper).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from farfield.kernels.attend_backward_hopper import TOLD
from farfield.kernels.attend_backward_hopper import _compute as _compute_rows
from farfield.kernels.attend_backward_queries_hopper import _weigh
from farfield.kernels.attend_sorted_hopper import LOADERS, LOADING, SAID, SEGMENT, _asked, _copy, _places, _told
from farfield.kernels.hopper import ALIGNED, LOG2E, barriers, processors, report, sync, wait_empty, wait_full
from farfield.kernels.replay import start


@gluon.jit
def _gather_for_queries(given, rings, GROUPS: gl.constexpr, D: gl.constexpr, BK: gl.constexpr):
    """Everything that the products take, by warps of their own."""
    (
        q, d_out, out, k, v, lse, k_named, v_named, q_token, k_token, index, count, queue, q_b, q_h, q_t, d_b, d_h, d_t,
        o_b, o_h, o_t, k_b, k_h, k_t, v_b, v_h, v_t, items, blocks, heads, rows, picks,
    ) = given  # fmt: skip
    said, q_ring, d_ring, lse_ring, k_ring, v_ring, q_full, q_empty, full, k_empty, v_empty = rings
    BLOCK: gl.constexpr = GROUPS * 64
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [LOADERS, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [LOADERS], [0])
    WORDS: gl.constexpr = gl.BlockedLayout([SAID], [32], [LOADERS], [0])
    LOOKED: gl.constexpr = k_named.shape[0]
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    k_places = k_named._reinterpret(gl.int32, [LOOKED // BK, BK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    v_places = v_named._reinterpret(gl.int32, [LOOKED // BK, BK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    word = gl.arange(0, SAID, WORDS)
    step, turn = 0, 0
    units = items // blocks
    item = gl.program_id(0)
    while item < items:
        unit, n = item % units, blocks - 1 - item // units
        b, h = (unit // heads).to(gl.int64), (unit % heads).to(gl.int64)
        list_at = unit.to(gl.int64) * blocks + n
        tiles = gl.load(count + list_at) * (BLOCK // BK)
        low = gl.load(index + list_at * picks) * BLOCK
        p = wait_empty(q_empty, turn)
        said.index(p).store(gl.where(word == 0, unit * blocks + n, gl.where(word == 1, tiles, low)))
        q_at, d_at = q + (b * q_b + h * q_h) * 8 + columns, d_out + (b * d_b + h * d_h) * 8 + columns
        for group in gl.static_range(GROUPS):
            line = list_at * BLOCK + group * 64
            token = gl.load(q_token + line + gl.arange(0, 64, down))
            _copy(q_ring.index(p * GROUPS + group), q_at, _places(token, q_t))
            _copy(d_ring.index(p * GROUPS + group), d_at, _places(token, d_t))
            lse_from = lse + line + gl.arange(0, 64, flat)
            async_copy.async_copy_global_to_shared(lse_ring.index(p * GROUPS + group), lse_from)
        async_copy.mbarrier_arrive(q_full.index(p), increment_count=False)
        report(q_full, p)
        turn += 1
        # out of the queries takes the place of a tile of keys, the second group's that of a tile of values
        s = wait_empty(k_empty, step)
        wait_empty(v_empty, step)
        out_at = out + (b * o_b + h * o_h) * 8 + columns
        token = gl.load(q_token + list_at * BLOCK + gl.arange(0, 64, down))
        _copy(k_ring.index(s), out_at, _places(token, o_t))
        if GROUPS == 2:
            token = gl.load(q_token + list_at * BLOCK + 64 + gl.arange(0, 64, down))
            _copy(v_ring.index(s), out_at, _places(token, o_t))
        async_copy.mbarrier_arrive(full.index(s), increment_count=False)
        step += 1
        # who is done first takes the next one: what comes out does not depend on who makes it
        item = gl.num_programs(0) + gl.atomic_add(queue, 1, sem="relaxed")
        k_at, v_at = k + (b * k_b + h * k_h) * 8 + columns, v + (b * v_b + h * v_h) * 8 + columns
        for begin in range(0, tiles, LOOKED // BK):
            # the tokens of several tiles: one wait for them instead of one a tile
            slot = low + begin * BK + gl.arange(0, LOOKED, flat)
            held = gl.load(k_token + unit.to(gl.int64) * rows + slot, mask=slot < rows, other=-1)
            k_named.store(_places(held, k_t))
            v_named.store(_places(held, v_t))
            for c in range(gl.minimum(LOOKED // BK, tiles - begin)):
                s = wait_empty(v_empty, step)
                _copy(v_ring.index(s), v_at, v_places.index(c).load(down))
                wait_empty(k_empty, step)
                _copy(k_ring.index(s), k_at, k_places.index(c).load(down))
                async_copy.mbarrier_arrive(full.index(s), increment_count=False)
                step += 1
    p = wait_empty(q_empty, turn)
    said.index(p).store(gl.where(word == 0, items, 0))
    async_copy.mbarrier_arrive(q_full.index(p), increment_count=False)
    report(q_full, p)


@gluon.jit
def _compute_queries(
    given, rings,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, BK: gl.constexpr, POSITION: gl.constexpr,
):  # fmt: skip
    d_q, delta, shift, q_token, position, items, blocks, tokens, rows, scale = given
    said, q_ring, d_ring, lse_ring, k_ring, v_ring, q_full, q_empty, full, k_empty, v_empty = rings
    STAGES: gl.constexpr = k_ring.shape[0]
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    step, turn, item = 0, 0, 0
    while item < items:
        p = wait_full(q_full, turn)
        item, tiles, row = _told(said, p)
        if item < items:
            unit, first, line, asks, at, least = _asked(
                item, q_token, position, blocks, GROUP, GROUPS, across, per_row, POSITION
            )  # fmt: skip
            queries = q_ring.index(p * GROUPS + GROUP)
            d_tile = d_ring.index(p * GROUPS + GROUP)
            mass = lse_ring.index(p * GROUPS + GROUP).load(per_row)
            # a query that read nothing gets weights exp(s - inf) = 0
            empty = mass == float("-inf")
            shift_row = gl.where(empty, float("inf"), mass * LOG2E)
            s = wait_full(full, step)
            if GROUP == 0:
                out = k_ring.index(s).load(wide)
            else:
                out = v_ring.index(s).load(wide)
            delta_row = gl.sum(out.to(gl.float32) * d_tile.load(wide).to(gl.float32), 1)
            delta_row = gl.where(empty, 0.0, gl.convert_layout(delta_row, per_row))
            sync()
            mbarrier.arrive(v_empty.index(s), count=1)
            mbarrier.arrive(k_empty.index(s), count=1)
            step += 1
            gl.store(shift + line + gl.arange(0, 64, per_row), shift_row)
            gl.store(delta + line + gl.arange(0, 64, per_row), delta_row)

            acc = gl.zeros([64, D], gl.float32, wide)
            if tiles > 0:
                s = wait_full(full, step)
                # copies were ordinary writes to shared memory; the tensor cores read it another way
                fence_async_shared()
                # numbers that are not used, but the products of before would be waited for
                none = gl.zeros([64, BK], gl.float32, score)
                product = warpgroup_mma(
                    queries, k_ring.index(s).permute((1, 0)), none, use_acc=False, is_async=True
                )  # fmt: skip
                d_product = warpgroup_mma(
                    d_tile, v_ring.index(s).permute((1, 0)), none, use_acc=False, is_async=True
                )  # fmt: skip
                scores = warpgroup_mma_wait(1, deps=[product])
                weights = _weigh(scores, shift_row, row, first, at, least, rows, factor, score, BK, True, POSITION)
                d_weights = warpgroup_mma_wait(0, deps=[d_product])
                report(v_empty, s)
                d_weights = weights * (d_weights - delta_row[:, None])
                d_scores = gl.convert_layout(d_weights.to(dtype), left)
                for j in range(1, tiles):
                    before = step % STAGES
                    step += 1
                    s = wait_full(full, step)
                    fence_async_shared()
                    none = gl.zeros([64, BK], gl.float32, score)
                    product = warpgroup_mma(
                        queries, k_ring.index(s).permute((1, 0)), none, use_acc=False, is_async=True
                    )  # fmt: skip
                    d_product = warpgroup_mma(
                        d_tile, v_ring.index(s).permute((1, 0)), none, use_acc=False, is_async=True
                    )  # fmt: skip
                    summed = warpgroup_mma(d_scores, k_ring.index(before), acc, is_async=True)
                    scores = warpgroup_mma_wait(2, deps=[product])
                    weights = _weigh(
                        scores, shift_row, row + j * BK, first, at, least, rows, factor, score, BK, True, POSITION
                    )  # fmt: skip
                    d_weights = warpgroup_mma_wait(1, deps=[d_product])
                    d_weights = weights * (d_weights - delta_row[:, None])
                    acc, d_scores = warpgroup_mma_wait(0, deps=[summed, d_scores])
                    sync()
                    mbarrier.arrive(v_empty.index(s), count=1)
                    mbarrier.arrive(k_empty.index(before), count=1)
                    d_scores = gl.convert_layout(d_weights.to(dtype), left)
                before = step % STAGES
                step += 1
                summed = warpgroup_mma(d_scores, k_ring.index(before), acc, is_async=True)
                acc, d_scores = warpgroup_mma_wait(0, deps=[summed, d_scores])
                report(k_empty, before)
            # the queries are done with: in their place dq comes into the order of whole rows
            queries.store((acc * scale).to(dtype))
            sync()
            columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
            d_q_at = d_q + (unit.to(gl.int64) * tokens + asks) * D + columns
            gl.store(d_q_at, queries.load(across), mask=asks >= 0)
        report(q_empty, p)
        turn += 1


STRIDES = ["q_b", "q_h", "q_t", "d_b", "d_h", "d_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t"]
VARIES = [*STRIDES, "o_b", "o_h", "o_t", "items", "blocks", "heads", "tokens", "rows", "picks"]


@gluon.jit(do_not_specialize=VARIES)
def attend_sorted_queries_hopper(
    q, d_out, out, k, v, d_q, delta, shift, lse, q_token, k_token, position, index, count, queue,
    q_b, q_h, q_t, d_b, d_h, d_t, o_b, o_h, o_t, k_b, k_h, k_t, v_b, v_h, v_t,
    items, blocks, heads, tokens, rows, picks, scale,
    GROUPS: gl.constexpr, D: gl.constexpr, BK: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
    POSITION: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = q.dtype.element_ty
    of_q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    of_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, D], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [Q_STAGES * GROUPS, 64, D], of_q)
    d_ring = gl.allocate_shared_memory(dtype, [Q_STAGES * GROUPS, 64, D], of_q)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BK, D], of_k)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BK, D], of_k)
    lse_ring = gl.allocate_shared_memory(gl.float32, [Q_STAGES * GROUPS, 64], plain)
    # block of queries, how many tiles of rows it reads, the first of these rows
    said = gl.allocate_shared_memory(gl.int32, [Q_STAGES, SAID], plain)
    k_named = gl.allocate_shared_memory(gl.int32, [16384 // D], plain)
    v_named = gl.allocate_shared_memory(gl.int32, [16384 // D], plain)
    # every copying thread reports its own copies, and one what is said
    q_full, q_empty = barriers(Q_STAGES, LOADERS * 32 + 1, GROUPS)
    full, k_empty = barriers(STAGES, LOADERS * 32, GROUPS)
    _, v_empty = barriers(STAGES, LOADERS * 32, GROUPS)
    fence_async_shared()

    rings = said, q_ring, d_ring, lse_ring, k_ring, v_ring, q_full, q_empty, full, k_empty, v_empty
    computing = d_q, delta, shift, q_token, position, items, blocks, tokens, rows, scale
    loading = (
        q, d_out, out, k, v, lse, k_named, v_named, q_token, k_token, index, count, queue, q_b, q_h, q_t, d_b, d_h, d_t,
        o_b, o_h, o_t, k_b, k_h, k_t, v_b, v_h, v_t, items, blocks, heads, rows, picks,
    )  # fmt: skip
    # constants stay constants only where they are written into the call
    if GROUPS == 1:
        gl.warp_specialize([
            (_compute_queries, (computing, rings, 0, GROUPS, D, BK, POSITION)),
            (_gather_for_queries, (loading, rings, GROUPS, D, BK)),
        ], [LOADERS], [REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute_queries, (computing, rings, 0, GROUPS, D, BK, POSITION)),
            (_compute_queries, (computing, rings, 1, GROUPS, D, BK, POSITION)),
            (_gather_for_queries, (loading, rings, GROUPS, D, BK)),
        ], [4, LOADERS], [(504 - REGISTERS) // 16 * 8, REGISTERS])  # fmt: skip


@gluon.jit
def _gather_for_rows(
    given, rings, GROUPS: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, POSITION: gl.constexpr
):  # fmt: skip
    (
        q, d_out, k, v, shift, delta, q_token, k_token, position, first, many, queue, q_named, d_named,
        q_b, q_h, q_t, d_b, d_h, d_t, k_b, k_h, k_t, v_b, v_h, v_t, items, heads, slots, row_blocks,
    ) = given  # fmt: skip
    (
        told, q_ring, d_ring, k_ring, v_ring, shift_ring, delta_ring, place_ring, told_full, told_empty, k_full,
        k_empty, full, _, _, empty,
    ) = rings  # fmt: skip
    BLOCK: gl.constexpr = GROUPS * 64
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [LOADERS, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [LOADERS], [0])
    WORDS: gl.constexpr = gl.BlockedLayout([8], [32], [LOADERS], [0])
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    q_places = q_named._reinterpret(gl.int32, [SEGMENT // BQ, BQ], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    d_places = d_named._reinterpret(gl.int32, [SEGMENT // BQ, BQ], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    word = gl.arange(0, 8, WORDS)
    step, turn, message = 0, 0, 0
    units = items // row_blocks
    item = gl.program_id(0)
    while item < items:
        unit, m = item % units, item // units
        b, h = (unit // heads).to(gl.int64), (unit % heads).to(gl.int64)
        own = unit * row_blocks + m
        readers = gl.load(many + own)
        n = gl.load(first + own)
        slot = wait_empty(told_empty, message)
        # no block is cut into pieces
        about = gl.where(word == 0, readers, gl.where(word == 1, m, gl.where(word == 2, -1, n)))
        told.index(slot).store(gl.where(word == 4, own, about))
        report(told_full, slot)
        message += 1
        item = gl.num_programs(0) + gl.atomic_add(queue + 1, 1, sem="relaxed")
        if readers > 0:
            s = wait_empty(k_empty, turn)
            k_at, v_at = k + (b * k_b + h * k_h) * 8 + columns, v + (b * v_b + h * v_h) * 8 + columns
            for group in gl.static_range(GROUPS):
                row = own.to(gl.int64) * BLOCK + group * 64
                held = gl.load(k_token + row + gl.arange(0, 64, down))
                _copy(k_ring.index(s * GROUPS + group), k_at, _places(held, k_t))
                _copy(v_ring.index(s * GROUPS + group), v_at, _places(held, v_t))
            async_copy.mbarrier_arrive(k_full.index(s), increment_count=False)
            turn += 1
            q_at, d_at = q + (b * q_b + h * q_h) * 8 + columns, d_out + (b * d_b + h * d_h) * 8 + columns
            line = unit.to(gl.int64) * slots + n * BLOCK
            for begin in range(0, readers * BLOCK, SEGMENT):
                # the tokens of several tiles: one wait for them instead of one a tile
                at = begin + gl.arange(0, SEGMENT, flat)
                token = gl.load(q_token + line + at, mask=at < readers * BLOCK, other=-1)
                q_named.store(_places(token, q_t))
                d_named.store(_places(token, d_t))
                for c in range(gl.minimum(SEGMENT, readers * BLOCK - begin) // BQ):
                    s = wait_empty(empty, step)
                    _copy(q_ring.index(s), q_at, q_places.index(c).load(down))
                    _copy(d_ring.index(s), d_at, d_places.index(c).load(down))
                    stat = line + begin + c * BQ + gl.arange(0, BQ, flat)
                    async_copy.async_copy_global_to_shared(shift_ring.index(s), shift + stat)
                    async_copy.async_copy_global_to_shared(delta_ring.index(s), delta + stat)
                    if POSITION:
                        async_copy.async_copy_global_to_shared(place_ring.index(s), position + stat)
                    async_copy.mbarrier_arrive(full.index(s), increment_count=False)
                    step += 1
    slot = wait_empty(told_empty, message)
    told.index(slot).store(gl.where(word == 4, items, -1))
    report(told_full, slot)


@gluon.jit(do_not_specialize=[*STRIDES, "items", "heads", "slots", "tokens", "row_blocks"])
def attend_sorted_rows_hopper(
    q, d_out, k, v, shift, delta, q_token, k_token, position, first, many, queue, d_k, d_v,
    q_b, q_h, q_t, d_b, d_h, d_t, k_b, k_h, k_t, v_b, v_h, v_t, items, heads, slots, tokens, row_blocks, scale,
    GROUPS: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, K_STAGES: gl.constexpr, STAGES: gl.constexpr,
    HOLD: gl.constexpr, POSITION: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = q.dtype.element_ty
    of_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    of_q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BQ, D], dtype)
    k_ring = gl.allocate_shared_memory(dtype, [K_STAGES * GROUPS, 64, D], of_k)
    v_ring = gl.allocate_shared_memory(dtype, [K_STAGES * GROUPS, 64, D], of_k)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, BQ, D], of_q)
    d_ring = gl.allocate_shared_memory(dtype, [STAGES, BQ, D], of_q)
    shift_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BQ], plain)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BQ], plain)
    place_ring = shift_ring
    if POSITION:
        place_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BQ], plain)
    told = gl.allocate_shared_memory(gl.int32, [TOLD, 8], plain)
    q_named = gl.allocate_shared_memory(gl.int32, [SEGMENT], plain)
    d_named = gl.allocate_shared_memory(gl.int32, [SEGMENT], plain)
    told_full, told_empty = barriers(TOLD, 1, GROUPS)
    # every copying thread reports its own copies
    k_full, k_empty = barriers(K_STAGES, LOADERS * 32, GROUPS)
    full, empty = barriers(STAGES, LOADERS * 32, GROUPS)
    fence_async_shared()

    rings = (
        told, q_ring, d_ring, k_ring, v_ring, shift_ring, delta_ring, place_ring, told_full, told_empty, k_full,
        k_empty, full, full, full, empty,
    )  # fmt: skip
    computing = d_k, d_v, k_token, k_token, k_token, first, items, tokens, row_blocks, 0, scale
    loading = (
        q, d_out, k, v, shift, delta, q_token, k_token, position, first, many, queue, q_named, d_named,
        q_b, q_h, q_t, d_b, d_h, d_t, k_b, k_h, k_t, v_b, v_h, v_t, items, heads, slots, row_blocks,
    )  # fmt: skip
    # constants stay constants only where they are written into the call
    if GROUPS == 1:
        gl.warp_specialize([
            (_compute_rows, (
                computing, rings,
                0, GROUPS, 1, GROUPS * 64, BQ, D, D, K_STAGES, STAGES, True, True, HOLD, POSITION, True,
            )),
            (_gather_for_rows, (loading, rings, GROUPS, BQ, D, POSITION)),
        ], [LOADERS], [REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute_rows, (
                computing, rings,
                0, GROUPS, 1, GROUPS * 64, BQ, D, D, K_STAGES, STAGES, True, True, HOLD, POSITION, True,
            )),
            (_compute_rows, (
                computing, rings,
                1, GROUPS, 1, GROUPS * 64, BQ, D, D, K_STAGES, STAGES, True, True, HOLD, POSITION, True,
            )),
            (_gather_for_rows, (loading, rings, GROUPS, BQ, D, POSITION)),
        ], [4, LOADERS], [(504 - REGISTERS) // 16 * 8, REGISTERS])  # fmt: skip


class Tiles(NamedTuple):
    """Tiles of 64 rows in flight for queries; queries of a tile and such tiles in flight for rows; see HOLD there."""

    stages: int
    queries: int
    q_stages: int
    hold: bool


# by width
TILES = {64: Tiles(6, 64, 4, True), 128: Tiles(3, 32, 4, False)}
ROWS_LOADING = 56  # registers of a thread that copies for rows, of which more would be taken from the sums


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    queue: Tensor, q_token: Tensor, k_token: Tensor, position: Tensor, index: Tensor, count: Tensor, first: Tensor,
    many: Tensor, block: int, scale: float,
) -> None:  # fmt: skip
    """The rows of dq, dk and dv whose tokens have a slot; all three lie without gaps.

    `queue`: two int32, 0. `first`, `many`: the readers of each block of keys.
    """
    batch, heads, tokens, width = q.shape
    blocks, picks = index.shape[2:]
    units, slots, rows = batch * heads, q_token.shape[2], k_token.shape[2]
    tiles, groups = TILES[width], block // 64
    delta, shift = (torch.empty(q_token.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    of_q, of_d, of_out, of_k, of_v = ([n // ALIGNED for n in x.stride()[:3]] for x in (q, d_out, out, k, v))
    positioned = position.numel() > 0
    places = position if positioned else q_token
    programs = processors(q.device)
    start(
        attend_sorted_queries_hopper, (min(units * blocks, programs),),
        q, d_out, out, k, v, d_q, delta, shift, lse, q_token, k_token, places, index, count, queue,
        *of_q, *of_d, *of_out, *of_k, *of_v, units * blocks, blocks, heads, tokens, rows, picks, scale,
        GROUPS=groups, D=width, BK=64, Q_STAGES=2, STAGES=tiles.stages, POSITION=positioned, REGISTERS=LOADING,
        num_warps=4,
    )  # fmt: skip
    start(
        attend_sorted_rows_hopper, (min(units * (rows // block), programs),),
        q, d_out, k, v, shift, delta, q_token, k_token, places, first, many, queue, d_k, d_v,
        *of_q, *of_d, *of_k, *of_v, units * (rows // block), heads, slots, k.shape[2], rows // block, scale,
        GROUPS=groups, BQ=tiles.queries, D=width, K_STAGES=2, STAGES=tiles.q_stages, HOLD=tiles.hold,
        POSITION=positioned, REGISTERS=ROWS_LOADING, num_warps=4,
    )  # fmt: skip
