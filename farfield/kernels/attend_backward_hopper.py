"""attend on Hopper GPUs, backward: dk and dv of large row blocks, by warps with roles, in Gluon.

A program stays on its multiprocessor and works through row blocks and pieces of the readers of others, as
attend_backward_rows does; a counter in memory deals them out, since some are read far more often than others. One warp
only copies: rows of a block, then tile after tile the queries that read it with
their dout, shift and delta, in rings that run ahead into the next row block. Each group of four computing warps owns 64
rows, whose dk and dv stay in registers: the two products of the next tile are under way together with the two sums of
the last one while weights are taken.
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from farfield.kernels.hopper import (
    EVERY,
    LOG2E,
    aligned,
    barriers,
    descriptor,
    fetch,
    heads_on,
    in_tiles,
    on_hopper,
    processors,
    report,
    token_of,
    wait_empty,
    wait_full,
)
from farfield.kernels.replay import start
from farfield.kernels.transpose import Readers

TOLD = gl.constexpr(4)  # row blocks that the loading warp may run ahead, as long as most of them are nothing to do


@gluon.jit
def _load(
    given, rings, position_strides, segment_strides,
    STACK: gl.constexpr, REPEAT: gl.constexpr, GROUPS: gl.constexpr, Q_BLOCK: gl.constexpr, BQ: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, POSITION: gl.constexpr,
):  # fmt: skip
    """Everything that the products take, by one warp."""
    (
        q, d_out, k, v, shift, delta, position, start, reader, key, queue, items, heads, blocks, row_blocks, pieces,
        most, base,
    ) = given  # fmt: skip
    (
        told, q_ring, d_ring, k_ring, v_ring, shift_ring, delta_ring, place_ring, told_full, told_empty, k_full,
        k_empty, q_full, d_full, stat_full, empty,
    ) = rings  # fmt: skip
    BYTES: gl.constexpr = q.dtype.primitive_bitwidth // 8
    WORDS: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    # tiles of a reader: of one head each, or where its tokens are few, of several
    EACH: gl.constexpr = STACK * Q_BLOCK // BQ
    TILES: gl.constexpr = Q_BLOCK // BQ if Q_BLOCK > BQ else 1
    TOKENS: gl.constexpr = Q_BLOCK if Q_BLOCK < BQ else BQ
    units = heads // STACK
    step, turn, message = 0, 0, 0
    item = gl.program_id(0)
    while item < items:
        unit, x = item // (row_blocks + pieces), item % (row_blocks + pieces)
        b, u = unit // units, unit % units
        g = u // REPEAT
        segment = b * segment_strides[0] + u * segment_strides[1]
        start_at = start + segment * (row_blocks + 1)
        zero = gl.load(start_at)
        # as transpose.piece_of
        piece = x - row_blocks
        at = zero + (piece + 1) * (most // 2) - 1
        found = (piece >= 0) & (at < gl.load(start_at + row_blocks))
        owner = (gl.load(key + at, mask=found, other=0) - base).to(gl.int32) - segment * (row_blocks + 1)
        m = gl.where(piece >= 0, gl.where(found, owner, row_blocks), x)
        there = m < row_blocks
        first = gl.load(start_at + m, mask=there, other=0)
        last = gl.load(start_at + m + 1, mask=there, other=0)
        cut = last - first > most
        own = first + (piece - (2 * (first - zero)) // most) * most
        begin = gl.where(piece >= 0, own, first)
        part = gl.where(cut & (own < last), gl.minimum(last - own, most), -1)
        count = gl.where(piece >= 0, part, gl.where(cut, -1, last - first))

        slot = wait_empty(told_empty, message)
        which = gl.arange(0, 8, WORDS)
        word = gl.where(which == 0, count, gl.where(which == 1, m, gl.where(which == 2, piece, begin)))
        told.index(slot).store(gl.where(which == 4, item, word))
        report(told_full, slot)
        message += 1
        # who is done first takes the next one, whatever it is: what comes out does not depend on who makes it
        item = gl.num_programs(0) + gl.atomic_add(queue, 1, sem="relaxed")
        if count > 0:
            s = wait_empty(k_empty, turn)
            mbarrier.expect(k_full.index(s), GROUPS * 64 * (D + E) * BYTES)
            for group in gl.static_range(GROUPS):
                row = (m * GROUPS + group) * 64
                tma.async_copy_global_to_shared(k, [b, g, row, 0], k_full.index(s), k_ring.index(s * GROUPS + group))
                tma.async_copy_global_to_shared(v, [b, g, row, 0], k_full.index(s), v_ring.index(s * GROUPS + group))
            turn += 1
            for j in range(count * EACH):
                n = gl.load(reader + begin + j // EACH)
                h = u * STACK + j // TILES % (EACH // TILES) * (BQ // TOKENS)
                i = n * Q_BLOCK + j % TILES * BQ
                s = wait_empty(empty, step)
                fetch(q, [b, h, i, 0], q_full, q_ring, s)
                fetch(d_out, [b, h, i, 0], d_full, d_ring, s)
                stat = (b * heads + h).to(gl.int64) * (blocks * Q_BLOCK) + i + token_of(BQ, TOKENS, flat)
                stat = heads_on(stat, blocks * Q_BLOCK, BQ, TOKENS, flat)
                async_copy.async_copy_global_to_shared(shift_ring.index(s), shift + stat)
                async_copy.async_copy_global_to_shared(delta_ring.index(s), delta + stat)
                if POSITION:
                    place = b.to(gl.int64) * position_strides[0] + h.to(gl.int64) * position_strides[1]
                    place_at = position + place + i + token_of(BQ, TOKENS, flat)
                    place_at = heads_on(place_at, position_strides[1], BQ, TOKENS, flat)
                    async_copy.async_copy_global_to_shared(place_ring.index(s), place_at)
                async_copy.mbarrier_arrive(stat_full.index(s), increment_count=False)
                step += 1
    slot = wait_empty(told_empty, message)
    told.index(slot).store(gl.where(gl.arange(0, 8, WORDS) == 4, items, -1))
    report(told_full, slot)


@gluon.jit
def _hear(told, told_full, told_empty, message):
    """Readers (none to do: -1), row block, piece, first reader and number of the next item; `items` are no item."""
    WORDS: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    slot = wait_full(told_full, message)
    which = gl.arange(0, 8, WORDS)
    word = told.index(slot).load(WORDS)
    count = gl.sum(gl.where(which == 0, word, 0), 0)
    m = gl.sum(gl.where(which == 1, word, 0), 0)
    piece = gl.sum(gl.where(which == 2, word, 0), 0)
    begin = gl.sum(gl.where(which == 3, word, 0), 0)
    item = gl.sum(gl.where(which == 4, word, 0), 0)
    report(told_empty, slot)
    return count, m, piece, begin, item


@gluon.jit
def _weigh(
    scores, shift_ring, place_ring, s, row, i, factor, layout: gl.constexpr, BQ: gl.constexpr, CAUSAL: gl.constexpr,
    POSITION: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Products of 64 rows and BQ queries as softmax weights; 0 where the query is before the row."""
    shift_at, place_at = shift_ring.index(s), place_ring.index(s)
    weights = gl.exp2(scores * factor - shift_at.load(gl.SliceLayout(0, layout))[None, :])
    if CAUSAL:
        if POSITION:
            # every warp holds all of them, so that the least is found within a warp
            i = gl.min(place_at.load(gl.BlockedLayout([BQ // 32], [32], [4], [0])), 0)
        past = row + 63 <= i
        if not past:
            rows = row + gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
            if POSITION:
                queries = place_at.load(gl.SliceLayout(0, layout))[None, :]
            else:
                queries = i + token_of(BQ, TOKENS, gl.SliceLayout(0, layout))[None, :]
            weights = gl.where(rows <= queries, weights, 0.0)
    return weights


@gluon.jit
def _hold(x, row):
    """`x`, made before what follows: the assembler moves waits for products ahead of it, but not into another block.

    No row is below 0; a branch of few instructions would be made none.
    """
    if row < 0:
        x = gl.exp2(x)
    return x


@gluon.jit
def _query(
    reader, begin, j, Q_BLOCK: gl.constexpr, BQ: gl.constexpr, STACK: gl.constexpr, CAUSAL: gl.constexpr,
    SORTED: gl.constexpr,
):  # fmt: skip
    """The first query of a tile; without CAUSAL nobody asks."""
    i = 0
    if CAUSAL and SORTED:
        i = begin * Q_BLOCK + j * BQ
    elif CAUSAL:
        TILES: gl.constexpr = Q_BLOCK // BQ if Q_BLOCK > BQ else 1
        i = gl.load(reader + begin + j // (STACK * Q_BLOCK // BQ)) * Q_BLOCK + j % TILES * BQ
    return i


@gluon.jit
def _multiply(
    keys, values, q_ring, d_ring, q_full, d_full, step, layout: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr,
    E: gl.constexpr, SORTED: gl.constexpr,
):  # fmt: skip
    """The products of keys and q and of values and dout, under way, and the place of the queries."""
    # numbers that are not used; with those of the products before, every product would be waited for
    none = gl.zeros([64, BQ], gl.float32, layout)
    s = wait_full(q_full, step)
    if SORTED:
        # copies were ordinary writes to shared memory; the tensor cores read it another way
        fence_async_shared()
    queries = q_ring.index(s).reshape([BQ, D]).permute((1, 0))
    product = warpgroup_mma(keys, queries, none, use_acc=False, is_async=True)
    wait_full(d_full, step)
    d_tile = d_ring.index(s).reshape([BQ, E]).permute((1, 0))
    d_product = warpgroup_mma(values, d_tile, none, use_acc=False, is_async=True)
    return product, d_product, s


@gluon.jit
def _compute(
    given, rings,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STACK: gl.constexpr, Q_BLOCK: gl.constexpr, BQ: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, K_STAGES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    AHEAD: gl.constexpr, HOLD: gl.constexpr, POSITION: gl.constexpr, SORTED: gl.constexpr,
):  # fmt: skip
    """SORTED: readers are runs, not cut, from block `begin` on; row r is token[r] of `rows`, none where negative.

    The three barriers of a tile of queries are then one.
    """
    d_k, d_v, sum_k, sum_v, token, reader, items, rows, row_blocks, pieces, scale = given
    (
        told, q_ring, d_ring, k_ring, v_ring, shift_ring, delta_ring, place_ring, told_full, told_empty, k_full,
        k_empty, q_full, d_full, stat_full, empty,
    ) = rings  # fmt: skip
    # where positions are told, nobody asks which query a tile starts with
    FROM_LIST: gl.constexpr = CAUSAL and not POSITION
    TOKENS: gl.constexpr = Q_BLOCK if Q_BLOCK < BQ else BQ
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ, 16])
    of_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    of_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left_k: gl.constexpr = gl.DotOperandLayout(0, of_k, 2)
    left_v: gl.constexpr = gl.DotOperandLayout(0, of_v, 2)
    of_query: gl.constexpr = gl.SliceLayout(0, score)
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    step, turn, message, item = 0, 0, 0, 0
    while item < items:
        count, m, piece, begin, item = _hear(told, told_full, told_empty, message)
        message += 1
        if count >= 0:
            row = (m * GROUPS + GROUP) * 64
            acc_k = gl.zeros([64, D], gl.float32, of_k)
            acc_v = gl.zeros([64, E], gl.float32, of_v)
            if count > 0:
                own = turn % K_STAGES * GROUPS + GROUP
                keys = k_ring.index(own).reshape([64, D])
                values = v_ring.index(own).reshape([64, E])
                wait_full(k_full, turn)
                if AHEAD:
                    product, d_product, s = _multiply(
                        keys, values, q_ring, d_ring, q_full, d_full, step, score, BQ, D, E, SORTED
                    )
                    wait_full(stat_full, step)
                    i = _query(reader, begin, 0, Q_BLOCK, BQ, STACK, FROM_LIST, SORTED)
                    scores = warpgroup_mma_wait(1, deps=[product])
                    scores = _weigh(
                        scores, shift_ring, place_ring, s, row, i, factor, score, BQ, CAUSAL, POSITION, TOKENS
                    )
                    d_weights = warpgroup_mma_wait(0, deps=[d_product])
                    d_weights = scores * (d_weights - delta_ring.index(s).load(of_query)[None, :])
                    weights = gl.convert_layout(scores.to(dtype), left_v)
                    d_scores = gl.convert_layout(d_weights.to(dtype), left_k)
                    for j in range(1, count * (STACK * Q_BLOCK // BQ)):
                        before = step % STAGES
                        step += 1
                        product, d_product, s = _multiply(
                            keys, values, q_ring, d_ring, q_full, d_full, step, score, BQ, D, E, SORTED
                        )
                        sum_of_v = warpgroup_mma(weights, d_ring.index(before).reshape([BQ, E]), acc_v, is_async=True)
                        sum_of_k = warpgroup_mma(d_scores, q_ring.index(before).reshape([BQ, D]), acc_k, is_async=True)
                        wait_full(stat_full, step)
                        i = _query(reader, begin, j, Q_BLOCK, BQ, STACK, FROM_LIST, SORTED)
                        scores = warpgroup_mma_wait(3, deps=[product])
                        scores = _weigh(
                            scores, shift_ring, place_ring, s, row, i, factor, score, BQ, CAUSAL, POSITION, TOKENS
                        )
                        if HOLD and not CAUSAL:
                            scores = _hold(scores, row)
                        d_weights = warpgroup_mma_wait(2, deps=[d_product])
                        d_weights = scores * (d_weights - delta_ring.index(s).load(of_query)[None, :])
                        if HOLD:
                            d_weights = _hold(d_weights, row)
                        acc_v, weights = warpgroup_mma_wait(1, deps=[sum_of_v, weights])
                        acc_k, d_scores = warpgroup_mma_wait(0, deps=[sum_of_k, d_scores])
                        report(empty, before)
                        weights = gl.convert_layout(scores.to(dtype), left_v)
                        d_scores = gl.convert_layout(d_weights.to(dtype), left_k)
                    before = step % STAGES
                    step += 1
                    sum_of_v = warpgroup_mma(weights, d_ring.index(before).reshape([BQ, E]), acc_v, is_async=True)
                    sum_of_k = warpgroup_mma(d_scores, q_ring.index(before).reshape([BQ, D]), acc_k, is_async=True)
                    acc_v, weights = warpgroup_mma_wait(1, deps=[sum_of_v, weights])
                    acc_k, d_scores = warpgroup_mma_wait(0, deps=[sum_of_k, d_scores])
                    report(empty, before)
                else:
                    for j in range(count * (STACK * Q_BLOCK // BQ)):
                        product, d_product, s = _multiply(
                            keys, values, q_ring, d_ring, q_full, d_full, step, score, BQ, D, E, SORTED
                        )
                        wait_full(stat_full, step)
                        i = _query(reader, begin, j, Q_BLOCK, BQ, STACK, FROM_LIST, SORTED)
                        scores = warpgroup_mma_wait(1, deps=[product])
                        scores = _weigh(
                            scores, shift_ring, place_ring, s, row, i, factor, score, BQ, CAUSAL, POSITION, TOKENS
                        )
                        weights = gl.convert_layout(scores.to(dtype), left_v)
                        sum_of_v = warpgroup_mma(weights, d_ring.index(s).reshape([BQ, E]), acc_v, is_async=True)
                        d_weights = warpgroup_mma_wait(1, deps=[d_product])
                        d_weights = scores * (d_weights - delta_ring.index(s).load(of_query)[None, :])
                        d_scores = gl.convert_layout(d_weights.to(dtype), left_k)
                        sum_of_k = warpgroup_mma(d_scores, q_ring.index(s).reshape([BQ, D]), acc_k, is_async=True)
                        acc_v, weights = warpgroup_mma_wait(1, deps=[sum_of_v, weights])
                        acc_k, d_scores = warpgroup_mma_wait(0, deps=[sum_of_k, d_scores])
                        report(empty, s)
                        step += 1
                report(k_empty, turn % K_STAGES)
                turn += 1
            acc_k = acc_k * scale
            unit = (item // (row_blocks + pieces)).to(gl.int64)
            lanes_k = gl.arange(0, 64, gl.SliceLayout(1, of_k))
            lanes_v = gl.arange(0, 64, gl.SliceLayout(1, of_v))
            at_k = lanes_k[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, of_k))[None, :]
            at_v = lanes_v[:, None] * E + gl.arange(0, E, gl.SliceLayout(0, of_v))[None, :]
            if SORTED:
                slot = (unit * row_blocks * GROUPS + m * GROUPS + GROUP) * 64
                there_k = gl.load(token + slot + lanes_k)[:, None]
                there_v = gl.load(token + slot + lanes_v)[:, None]
                to_k = (unit * rows + there_k) * D + gl.arange(0, D, gl.SliceLayout(0, of_k))[None, :]
                to_v = (unit * rows + there_v) * E + gl.arange(0, E, gl.SliceLayout(0, of_v))[None, :]
                gl.store(d_k + to_k, acc_k.to(d_k.dtype.element_ty), mask=there_k >= 0)
                gl.store(d_v + to_v, acc_v.to(d_v.dtype.element_ty), mask=there_v >= 0)
            elif piece < 0:
                line = unit * rows + row
                gl.store(d_k + line * D + at_k, acc_k.to(d_k.dtype.element_ty), mask=(row + lanes_k < rows)[:, None])
                gl.store(d_v + line * E + at_v, acc_v.to(d_v.dtype.element_ty), mask=(row + lanes_v < rows)[:, None])
            else:
                line = (unit * pieces + piece) * (GROUPS * 64) + GROUP * 64
                gl.store(sum_k + line * D + at_k, acc_k)
                gl.store(sum_v + line * E + at_v, acc_v)


VARIES = [
    "position_strides",
    "segment_strides",
    "items",
    "heads",
    "blocks",
    "rows",
    "row_blocks",
    "pieces",
    "most",
    "base",
]


@gluon.jit(do_not_specialize=VARIES)
def attend_backward_rows_hopper(
    q, d_out, k, v, shift, delta, position, start, reader, key, queue, d_k, d_v, sum_k, sum_v,
    position_strides, segment_strides, items, heads, blocks, rows, row_blocks, pieces, most, base, scale,
    STACK: gl.constexpr, REPEAT: gl.constexpr, GROUPS: gl.constexpr, Q_BLOCK: gl.constexpr, BQ: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, K_STAGES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    AHEAD: gl.constexpr, HOLD: gl.constexpr, POSITION: gl.constexpr, LOADING: gl.constexpr,
):  # fmt: skip
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_ring = gl.allocate_shared_memory(k.dtype, [K_STAGES * GROUPS, 1, 1, 64, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [K_STAGES * GROUPS, 1, 1, 64, E], v.layout)
    TOKENS: gl.constexpr = Q_BLOCK if Q_BLOCK < BQ else BQ
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, BQ // TOKENS, TOKENS, D], q.layout)
    d_ring = gl.allocate_shared_memory(d_out.dtype, [STAGES, 1, BQ // TOKENS, TOKENS, E], d_out.layout)
    shift_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BQ], plain)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BQ], plain)
    place_ring = shift_ring
    if POSITION:
        place_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BQ], plain)
    told = gl.allocate_shared_memory(gl.int32, [TOLD, 8], plain)
    told_full, told_empty = barriers(TOLD, 1, GROUPS)
    k_full, k_empty = barriers(K_STAGES, 1, GROUPS)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    d_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    stat_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(d_full.index(s), count=1)
        # every loading thread reports its own copies
        mbarrier.init(stat_full.index(s), count=32)
        mbarrier.init(empty.index(s), count=GROUPS)
    fence_async_shared()

    rings = (
        told, q_ring, d_ring, k_ring, v_ring, shift_ring, delta_ring, place_ring, told_full, told_empty, k_full,
        k_empty, q_full, d_full, stat_full, empty,
    )  # fmt: skip
    computing = d_k, d_v, sum_k, sum_v, reader, reader, items, rows, row_blocks, pieces, scale
    loading = (
        q, d_out, k, v, shift, delta, position, start, reader, key, queue, items, heads, blocks, row_blocks, pieces,
        most, base,
    )  # fmt: skip
    # constants stay constants only where they are written into the call
    if GROUPS == 1:
        gl.warp_specialize([
            (_compute, (
                computing, rings,
                0, GROUPS, STACK, Q_BLOCK, BQ, D, E, K_STAGES, STAGES, CAUSAL, AHEAD, HOLD, POSITION, False,
            )),
            (_load, (
                loading, rings, position_strides, segment_strides, STACK, REPEAT, GROUPS, Q_BLOCK, BQ, D, E, POSITION,
            )),
        ], [1], [LOADING])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (
                computing, rings,
                0, GROUPS, STACK, Q_BLOCK, BQ, D, E, K_STAGES, STAGES, CAUSAL, AHEAD, HOLD, POSITION, False,
            )),
            (_compute, (
                computing, rings,
                1, GROUPS, STACK, Q_BLOCK, BQ, D, E, K_STAGES, STAGES, CAUSAL, AHEAD, HOLD, POSITION, False,
            )),
            (_load, (
                loading, rings, position_strides, segment_strides, STACK, REPEAT, GROUPS, Q_BLOCK, BQ, D, E, POSITION,
            )),
        ], [4, 1], [240, 24])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        queries: of a tile.
        k_stages, stages: row blocks and tiles of queries in flight.
        ahead: the products of a tile are under way while those of the tile before are added up; takes registers.
        programs: a multiprocessor.
        registers: of a thread at the start of the kernel; None: all there are.
        hold: with `ahead`, no product is waited for before the numbers of the ones before it are taken (see _hold).
    """

    queries: int
    k_stages: int
    stages: int
    ahead: bool
    programs: int = 1
    registers: int | None = None
    hold: bool = False


# width, rows of a block -> tiles
TILES = {
    (64, 128): Tiles(64, 2, 4, True, hold=True),
    (128, 128): Tiles(32, 2, 4, True),
    (64, 64): Tiles(64, 2, 4, False, programs=2, registers=128),
    (128, 64): Tiles(32, 1, 3, True, programs=2, registers=128),
}
LOADING = 40  # registers of the thread that loads, where one group computes


def rows_backward(
    q: Tensor, d_out: Tensor, k: Tensor, v: Tensor, shift: Tensor, delta: Tensor, readers: Readers, queue: Tensor,
    grads, sums,
    *, q_block: int, k_block: int, stack: int, repeat: int, blocks: int, causal: bool, scale: float,
    position: Tensor | None = None,
) -> None:  # fmt: skip
    """What attend_backward_rows computes, written into `grads` and, by pieces, into `sums`.

    `queue`: an int32 0, which counts the items that have been taken. `position` [1|B, 1|H, T] of the queries; None:
    they stand where they are.
    """
    batch, heads, _, width = q.shape
    rows = k.shape[2]
    row_blocks = -(-rows // k_block)
    items = batch * (heads // stack) * (row_blocks + readers.pieces)
    tiles = TILES[width, k_block]
    bounds = {} if tiles.registers is None else {"maxnreg": tiles.registers}
    box = {"rows": min(q_block, tiles.queries), "heads": max(tiles.queries // q_block, 1)}
    places, place_strides = delta, (0, 0)
    if position is not None:
        # whole blocks are read; rows are their own positions, and fewer than 2**30
        short = blocks * q_block - position.shape[2]
        places = torch.nn.functional.pad(position, (0, short), value=EVERY.value) if short else position
        places = (places if places.dtype == torch.int32 else places.clamp(-1, EVERY.value).int()).contiguous()
        place_strides = tuple(0 if n == 1 else x for n, x in zip(places.shape[:2], places.stride(), strict=False))
    start(
        attend_backward_rows_hopper, (min(items, processors(q.device) * tiles.programs),),
        descriptor(q, **box), descriptor(d_out, **box), descriptor(k, 64), descriptor(v, 64),
        shift, delta, places, readers.start, readers.reader, readers.key, queue, *grads,
        *sums,
        place_strides, readers.strides, items, heads, blocks, rows, row_blocks, readers.pieces, readers.most,
        readers.base, scale,
        STACK=stack, REPEAT=repeat, GROUPS=k_block // 64, Q_BLOCK=q_block, BQ=tiles.queries, D=width, E=v.shape[-1],
        K_STAGES=tiles.k_stages, STAGES=tiles.stages, CAUSAL=causal, AHEAD=tiles.ahead,
        HOLD=tiles.hold,
        POSITION=position is not None, LOADING=LOADING,
        num_warps=4, **bounds,
    )  # fmt: skip


def wants_rows(q: Tensor, d_out: Tensor, k: Tensor, v: Tensor, k_block: int, q_block: int, stack: int) -> bool:
    """Whether shapes and strides suit; nothing but a causal layout may ride along."""
    width = q.shape[-1]
    return (
        (width, k_block) in TILES
        and in_tiles(q_block, stack)
        and q.dtype in (torch.bfloat16, torch.float16)
        and width == v.shape[-1]
        and on_hopper(q.device)
        and aligned(q)
        and aligned(d_out)
        and aligned(k)
        and aligned(v)
    )
