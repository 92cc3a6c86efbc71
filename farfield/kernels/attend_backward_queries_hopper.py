"""attend on Hopper GPUs, backward: delta and dq over lists of whole row blocks, by warps with roles, in Gluon.

A program stays on its multiprocessor and works through tiles of queries. One warp only copies: a tile's queries, dout
and out, then the rows of its list, in rings that run ahead into the next tile. Each group of four computing warps owns
64 queries: the two products of the next rows are under way together with the sum of the last ones while weights are
taken. dS goes from registers into the sum, so that only rows are ever read twice from shared memory.
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

from farfield.kernels.attend_hopper import _list, _place
from farfield.kernels.hopper import (
    EVERY,
    LOG2E,
    aligned,
    barriers,
    descriptor,
    fetch,
    on_hopper,
    processors,
    report,
    sync,
    token_of,
    wait_empty,
    wait_full,
)
from farfield.kernels.replay import start


@gluon.jit
def _load(
    given, rings,
    STACK: gl.constexpr, REPEAT: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, Q_BLOCK: gl.constexpr,
    K_BLOCK: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BK: gl.constexpr, Q_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, D_LSE: gl.constexpr,
):  # fmt: skip
    """Everything that the products take, by one warp."""
    q, d_out, out, k, v, lse, d_lse, index, count, picks, batch_lists, head_lists, items, blocks, heads, tokens = given
    (
        counts, block_rows, q_ring, d_ring, lse_ring, d_lse_ring, k_ring, v_ring, q_full, q_empty, stat_full, k_full,
        k_empty, v_full, v_empty,
    ) = rings  # fmt: skip
    BYTES: gl.constexpr = q.dtype.primitive_bitwidth // 8
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    # tiles of rows that may come before the queries, whose place may still be taken
    EARLY: gl.constexpr = 0 if Q_STAGES > 1 else V_STAGES - 1
    k_step, v_step, turn = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, n, tile = _place(item, blocks, heads, TILES)
        u = h // STACK
        g = u // REPEAT
        at = _list(b, u, n, batch_lists, head_lists)
        tiles = gl.load(count + at) * (K_BLOCK // BK)
        list_at = index + at * picks
        first = n * Q_BLOCK + tile * (GROUPS * 64)
        for j in range(tiles + 1):
            if j == gl.minimum(tiles, EARLY):
                p = wait_empty(q_empty, turn)
                counts.index(p).store(gl.full([1], tiles, gl.int32, ONE))
                sync()
                mbarrier.expect(q_full.index(p), GROUPS * 64 * (D + E) * BYTES)
                for group in gl.static_range(GROUPS):
                    i = first + group * 64
                    slot = p * GROUPS + group
                    tma.async_copy_global_to_shared(q, [b, h, i, 0], q_full.index(p), q_ring.index(slot))
                    tma.async_copy_global_to_shared(d_out, [b, h, i, 0], q_full.index(p), d_ring.index(slot))
                    line = i + gl.arange(0, 64, ONE)
                    stat = (b * heads + h).to(gl.int64) * tokens + line
                    async_copy.async_copy_global_to_shared(lse_ring.index(slot), lse + stat, mask=line < tokens)
                    if D_LSE:
                        async_copy.async_copy_global_to_shared(d_lse_ring.index(slot), d_lse + stat, mask=line < tokens)
                async_copy.mbarrier_arrive(stat_full.index(p), increment_count=False)
                turn += 1
            s = wait_empty(k_empty, k_step)
            if j == 0:
                # out of the queries takes the place of a tile of keys, the second group's that of a tile of values
                fetch(out, [b, h, first, 0], k_full, k_ring, s)
                if GROUPS == 2:
                    s = wait_empty(v_empty, v_step)
                    fetch(out, [b, h, first + 64, 0], v_full, v_ring, s)
                    v_step += 1
            else:
                row = gl.load(list_at + (j - 1) // (K_BLOCK // BK)) * K_BLOCK + (j - 1) % (K_BLOCK // BK) * BK
                block_rows.index(s).store(gl.full([1], row, gl.int32, ONE))
                sync()
                fetch(k, [b, g, row, 0], k_full, k_ring, s)
                s = wait_empty(v_empty, v_step)
                fetch(v, [b, g, row, 0], v_full, v_ring, s)
                v_step += 1
            k_step += 1


@gluon.jit
def _weigh(
    scores, shift, row, first, at, least, rows, factor, layout: gl.constexpr, BK: gl.constexpr, CAUSAL: gl.constexpr,
    POSITION: gl.constexpr, TOKENS: gl.constexpr = 64,
):  # fmt: skip
    """Products of 64 queries and BK rows as softmax weights; 0 where there is no row, or it is after the query.

    The queries are TOKENS of a head each, from `first` on.
    """
    weights = gl.exp2(scores * factor - shift[:, None])
    whole = row + BK <= rows
    if CAUSAL:
        whole &= row + BK <= least + 1
    if not whole:
        r = row + gl.arange(0, BK, gl.SliceLayout(0, layout))[None, :]
        seen = r < rows
        if CAUSAL:
            if POSITION:
                i = at[:, None]
            else:
                i = first + token_of(64, TOKENS, gl.SliceLayout(1, layout))[:, None]
            seen &= r <= i
        weights = gl.where(seen, weights, 0.0)
    return weights


@gluon.jit
def _multiply(
    queries, d_tile, block_rows, k_ring, v_ring, k_full, v_full, k_step, v_step, layout: gl.constexpr,
    BK: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """The products of q and keys and of dout and values, under way; the first row; the place of the values."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    s = wait_full(k_full, k_step)
    row = gl.max(block_rows.index(s).load(ONE), 0)
    keys = k_ring.index(s).reshape([BK, D]).permute((1, 0))
    # numbers that are not used, but the products of before would be waited for
    none = gl.zeros([64, BK], gl.float32, layout)
    product = warpgroup_mma(queries, keys, none, use_acc=False, is_async=True)
    t = wait_full(v_full, v_step)
    values = v_ring.index(t).reshape([BK, E]).permute((1, 0))
    d_product = warpgroup_mma(d_tile, values, none, use_acc=False, is_async=True)
    return product, d_product, row, t


@gluon.jit
def _compute(
    given, rings,
    GROUP: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, Q_BLOCK: gl.constexpr, D: gl.constexpr,
    E: gl.constexpr, BK: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, POSITION: gl.constexpr, D_LSE: gl.constexpr,
):  # fmt: skip
    d_q, delta, shift, position, position_b, position_h, items, blocks, heads, tokens, rows, scale = given
    (
        counts, block_rows, q_ring, d_ring, lse_ring, d_lse_ring, k_ring, v_ring, q_full, q_empty, stat_full, k_full,
        k_empty, v_full, v_empty,
    ) = rings  # fmt: skip
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    dtype: gl.constexpr = q_ring.dtype
    PAIR: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    factor = scale * LOG2E
    k_step, v_step, turn = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, n, tile = _place(item, blocks, heads, TILES)
        first = n * Q_BLOCK + (tile * GROUPS + GROUP) * 64
        at, least = first, first
        if POSITION:
            position_at = position + b.to(gl.int64) * position_b + h.to(gl.int64) * position_h
            spot = first + gl.arange(0, 64, per_row)
            at = gl.load(position_at + spot, mask=spot < tokens, other=EVERY)
            # every warp holds all of them, so that the least is found within a warp
            spot = first + gl.arange(0, 64, PAIR)
            least = gl.min(gl.load(position_at + spot, mask=spot < tokens, other=EVERY), 0)
        line = first + gl.arange(0, 64, per_row)
        p = turn % Q_STAGES
        slot = p * GROUPS + GROUP
        queries = q_ring.index(slot).reshape([64, D])
        d_tile = d_ring.index(slot).reshape([64, E])
        wait_full(q_full, turn)
        tiles = gl.max(counts.index(p).load(ONE), 0)
        wait_full(stat_full, turn)
        mass = gl.where(line < tokens, lse_ring.index(slot).load(per_row), float("-inf"))
        # a query that read nothing, and one that only fills up a tile, gets weights exp(s - inf) = 0
        empty = mass == float("-inf")
        shift_row = gl.where(empty, float("inf"), mass * LOG2E)
        if GROUP == 0:
            out = k_ring.index(wait_full(k_full, k_step)).reshape([64, E]).load(of_out)
        else:
            out = v_ring.index(wait_full(v_full, v_step)).reshape([64, E]).load(of_out)
        delta_row = gl.sum(out.to(gl.float32) * d_tile.load(of_out).to(gl.float32), 1)
        delta_row = gl.convert_layout(delta_row, per_row)
        if D_LSE:
            delta_row -= d_lse_ring.index(slot).load(per_row)
        delta_row = gl.where(empty, 0.0, delta_row)
        sync()
        # the first group has not waited for these values: rings of one length, and the keys last, keep it from freeing
        # a place twice before the second group has done so once
        if GROUPS == 2:
            mbarrier.arrive(v_empty.index(v_step % V_STAGES), count=1)
            v_step += 1
        mbarrier.arrive(k_empty.index(k_step % K_STAGES), count=1)
        k_step += 1
        # up to the end of the last block, so that whole tiles can be read back
        stat = (b * heads + h).to(gl.int64) * (blocks * Q_BLOCK) + line
        gl.store(shift + stat, shift_row)
        gl.store(delta + stat, delta_row)

        acc = gl.zeros([64, D], gl.float32, wide)
        if tiles > 0:
            product, d_product, row, t = _multiply(
                queries, d_tile, block_rows, k_ring, v_ring, k_full, v_full, k_step, v_step, score, BK, D, E
            )
            scores = warpgroup_mma_wait(1, deps=[product])
            weights = _weigh(scores, shift_row, row, first, at, least, rows, factor, score, BK, CAUSAL, POSITION)
            d_weights = warpgroup_mma_wait(0, deps=[d_product])
            report(v_empty, t)
            v_step += 1
            d_weights = weights * (d_weights - delta_row[:, None])
            d_scores = gl.convert_layout(d_weights.to(dtype), left)
            for _ in range(1, tiles):
                before = k_step % K_STAGES
                k_step += 1
                product, d_product, row, t = _multiply(
                    queries, d_tile, block_rows, k_ring, v_ring, k_full, v_full, k_step, v_step, score, BK, D, E
                )
                summed = warpgroup_mma(d_scores, k_ring.index(before).reshape([BK, D]), acc, is_async=True)
                scores = warpgroup_mma_wait(2, deps=[product])
                weights = _weigh(scores, shift_row, row, first, at, least, rows, factor, score, BK, CAUSAL, POSITION)
                d_weights = warpgroup_mma_wait(1, deps=[d_product])
                d_weights = weights * (d_weights - delta_row[:, None])
                acc, d_scores = warpgroup_mma_wait(0, deps=[summed, d_scores])
                sync()
                mbarrier.arrive(v_empty.index(t), count=1)
                mbarrier.arrive(k_empty.index(before), count=1)
                v_step += 1
                d_scores = gl.convert_layout(d_weights.to(dtype), left)
            before = k_step % K_STAGES
            k_step += 1
            summed = warpgroup_mma(d_scores, k_ring.index(before).reshape([BK, D]), acc, is_async=True)
            acc, d_scores = warpgroup_mma_wait(0, deps=[summed, d_scores])
            report(k_empty, before)
        # the queries are done with: their place in shared memory is where dq leaves from
        queries.store((acc * scale).to(dtype))
        fence_async_shared()
        sync()
        tma.async_copy_shared_to_global(d_q, [b, h, first, 0], q_ring.index(slot))
        tma.store_wait(0)
        report(q_empty, p)
        turn += 1


VARIES = ["picks", "batch_lists", "head_lists", "position_b", "position_h", "items", "blocks", "heads", "tokens"]
VARIES += ["rows"]


@gluon.jit(do_not_specialize=VARIES)
def attend_backward_queries_hopper(
    q, d_out, out, k, v, d_q, delta, shift, lse, d_lse, index, count, position,
    picks, batch_lists, head_lists, position_b, position_h, items, blocks, heads, tokens, rows, scale,
    STACK: gl.constexpr, REPEAT: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, Q_BLOCK: gl.constexpr,
    K_BLOCK: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BK: gl.constexpr, Q_STAGES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, CAUSAL: gl.constexpr, POSITION: gl.constexpr,
    D_LSE: gl.constexpr, LOADING: gl.constexpr,
):  # fmt: skip
    gl.static_assert(GROUPS == 1 or K_STAGES == V_STAGES)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES * GROUPS, 1, 1, 64, D], q.layout)
    d_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES * GROUPS, 1, 1, 64, E], d_out.layout)
    k_ring = gl.allocate_shared_memory(q.dtype, [K_STAGES, 1, 1, BK, D], k.layout)
    v_ring = gl.allocate_shared_memory(q.dtype, [V_STAGES, 1, 1, BK, E], v.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [Q_STAGES * GROUPS, 64], plain)
    d_lse_ring = lse_ring
    if D_LSE:
        d_lse_ring = gl.allocate_shared_memory(gl.float32, [Q_STAGES * GROUPS, 64], plain)
    # how many tiles of rows a tile of queries reads, and where the tile of a stage begins
    counts = gl.allocate_shared_memory(gl.int32, [Q_STAGES, 1], plain)
    block_rows = gl.allocate_shared_memory(gl.int32, [K_STAGES, 1], plain)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    stat_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    for s in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(s), count=1)
        # every loading thread reports its own copies
        mbarrier.init(stat_full.index(s), count=32)
        mbarrier.init(q_empty.index(s), count=GROUPS)
    k_full, k_empty = barriers(K_STAGES, 1, GROUPS)
    v_full, v_empty = barriers(V_STAGES, 1, GROUPS)
    fence_async_shared()

    rings = (
        counts, block_rows, q_ring, d_ring, lse_ring, d_lse_ring, k_ring, v_ring, q_full, q_empty, stat_full, k_full,
        k_empty, v_full, v_empty,
    )  # fmt: skip
    computing = d_q, delta, shift, position, position_b, position_h, items, blocks, heads, tokens, rows, scale
    loading = (
        q, d_out, out, k, v, lse, d_lse, index, count, picks, batch_lists, head_lists, items, blocks, heads, tokens
    )  # fmt: skip
    # constants stay constants only where they are written into the call
    if GROUPS == 1:
        gl.warp_specialize([
            (_compute, (
                computing, rings,
                0, TILES, GROUPS, Q_BLOCK, D, E, BK, Q_STAGES, K_STAGES, V_STAGES, CAUSAL, POSITION, D_LSE,
            )),
            (_load, (
                loading, rings, STACK, REPEAT, TILES, GROUPS, Q_BLOCK, K_BLOCK, D, E, BK, Q_STAGES, V_STAGES, D_LSE,
            )),
        ], [1], [LOADING])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (
                computing, rings,
                0, TILES, GROUPS, Q_BLOCK, D, E, BK, Q_STAGES, K_STAGES, V_STAGES, CAUSAL, POSITION, D_LSE,
            )),
            (_compute, (
                computing, rings,
                1, TILES, GROUPS, Q_BLOCK, D, E, BK, Q_STAGES, K_STAGES, V_STAGES, CAUSAL, POSITION, D_LSE,
            )),
            (_load, (
                loading, rings, STACK, REPEAT, TILES, GROUPS, Q_BLOCK, K_BLOCK, D, E, BK, Q_STAGES, V_STAGES, D_LSE,
            )),
        ], [4, 1], [240, 24])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        groups: of 64 queries a program.
        q_stages, k_stages, v_stages: tiles of queries, keys and values in flight; with two groups as many of keys as of
            values.
        programs: a multiprocessor.
        registers: of a thread at the start of the kernel; None: all there are.
    """

    groups: int
    q_stages: int
    k_stages: int
    v_stages: int
    programs: int = 1
    registers: int | None = None


# width, queries of a block (128 for its multiples, 64 for all others) -> tiles. At a width of 64 a group alone is no
# faster than three programs of the general kernel.
TILES = {
    (64, 128): Tiles(2, 2, 6, 6),
    (128, 128): Tiles(2, 2, 3, 3),
    (128, 64): Tiles(1, 1, 3, 2, programs=2, registers=128),
}
ROWS = 64  # of a tile
LOADING = 40  # registers of the thread that loads, where one group computes


def queries_backward(
    q: Tensor, d_out: Tensor, out: Tensor, k: Tensor, v: Tensor, d_q: Tensor, delta: Tensor, shift: Tensor,
    lse: Tensor, d_lse: Tensor | None, index: Tensor, count: Tensor, lists: tuple[int, int],
    *, q_block: int, k_block: int, stack: int, repeat: int, causal: bool, scale: float,
    position: Tensor | None = None, position_strides: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    """dq, and `delta` and `shift` [B, H, blocks * q_block], which the row kernels read.

    `lists`: how far the lists [1|B, 1|units, blocks, P] of batches and of units are apart; `stack` query heads are one
    unit, `repeat` units read one key head. `position` [1|B, 1|H, T] of the queries; None: they stand where they are.
    """
    batch, heads, tokens, width = q.shape
    blocks, picks = index.shape[2:]
    tiles = TILES[key_of(width, q_block)]
    items = batch * heads * blocks * (q_block // (64 * tiles.groups))
    bounds = {} if tiles.registers is None else {"maxnreg": tiles.registers}
    start(
        attend_backward_queries_hopper, (min(items, processors(q.device) * tiles.programs),),
        descriptor(q, 64), descriptor(d_out, 64), descriptor(out, 64), descriptor(k, ROWS), descriptor(v, ROWS),
        descriptor(d_q, 64), delta, shift, lse, lse if d_lse is None else d_lse, index, count,
        lse if position is None else position, picks, *lists, *position_strides, items, blocks, heads, tokens,
        k.shape[2], scale,
        STACK=stack, REPEAT=repeat, TILES=q_block // (64 * tiles.groups), GROUPS=tiles.groups, Q_BLOCK=q_block,
        K_BLOCK=k_block, D=width, E=v.shape[-1], BK=ROWS, Q_STAGES=tiles.q_stages, K_STAGES=tiles.k_stages,
        V_STAGES=tiles.v_stages, CAUSAL=causal,
        POSITION=position is not None, D_LSE=d_lse is not None, LOADING=LOADING,
        num_warps=4, **bounds,
    )  # fmt: skip


def key_of(width: int, q_block: int) -> tuple[int, int]:
    """Where to look in TILES."""
    return width, 64 if q_block % 128 else 128


def wants_queries(q: Tensor, d_out: Tensor, out: Tensor, k: Tensor, v: Tensor, k_block: int, q_block: int) -> bool:
    """Whether shapes and strides suit; nothing but a causal layout may ride along."""
    width = q.shape[-1]
    return (
        q_block % 64 == 0
        and k_block in (64, 128)
        and key_of(width, q_block) in TILES
        and q.dtype in (torch.bfloat16, torch.float16)
        and width == v.shape[-1]
        and k.shape[2] > 0
        and on_hopper(q.device)
        and all(aligned(x) for x in (q, d_out, out, k, v))
    )
