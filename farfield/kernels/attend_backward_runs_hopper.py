"""attend on Hopper GPUs, backward, of lists of many blocks with gathered rows behind them: delta, dq and shares.

A program stays on its multiprocessor and works through tiles of 64 queries. Warps that only copy fetch a tile's
queries, dout and out, then tiles of 64 rows through one ring of keys and one of values: blocks through the tensor
memory accelerator, gathered rows through asynchronous copies. Four computing warps take blocks as
attend_backward_queries_hopper does. Products with gathered rows they make rows by queries: weights then go from
registers into the shares of dv and dk, and only dS passes through shared memory, for dq. Shares leave from where the
rows were: that of dv from the values' place, that of dk from the keys'.
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

from farfield.kernels.attend_backward_queries_hopper import _multiply, _weigh
from farfield.kernels.attend_backward_sums import Source, Three
from farfield.kernels.attend_hopper import _list, _rows_of
from farfield.kernels.hopper import (
    LOG2E,
    aligned,
    barriers,
    descriptor,
    heads_on,
    in_tiles,
    on_hopper,
    processors,
    report,
    sync,
    token_of,
    wait_empty,
    wait_full,
)
from farfield.kernels.multipole_walk import _anew
from farfield.kernels.replay import start


@gluon.jit
def _place(item, first, blocks, units, Q_BLOCK: gl.constexpr, STACK: gl.constexpr):
    """Item, which is the number of its shares too -> batch, (first) query head, unit, query block, first query."""
    EACH: gl.constexpr = STACK * Q_BLOCK // 64
    TILES: gl.constexpr = Q_BLOCK // 64 if Q_BLOCK > 64 else 1
    HEADS: gl.constexpr = 64 // Q_BLOCK if Q_BLOCK < 64 else 1
    unit = first + item // EACH // blocks
    u = unit % units
    n = item // EACH % blocks
    h = u * STACK + item // TILES % (STACK // HEADS) * HEADS
    return unit // units, h, u, n, n * Q_BLOCK + item % TILES * 64


@gluon.jit
def _load(
    given, rings, far_strides,
    STACK: gl.constexpr, REPEAT: gl.constexpr, FAR_REPEAT: gl.constexpr, Q_BLOCK: gl.constexpr, D: gl.constexpr,
    K_BLOCK: gl.constexpr, FAR_BLOCK: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Everything that the products take, by WARPS warps, each thread of which reports once for every tile."""
    (
        q, d_out, out, k, v, far_k, far_v, index, count, far_index, far_count, picks, batch_lists, head_lists,
        far_picks, far_batch_lists, far_head_lists, far_rows, first, items, blocks, units,
    ) = given  # fmt: skip
    numbers, q_ring, k_ring, v_ring, q_bars, k_full, k_empty, v_full, v_empty = rings
    BYTES: gl.constexpr = 64 * D * 2
    TOKENS: gl.constexpr = Q_BLOCK if Q_BLOCK < 64 else 64
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    k_step, v_step, turn = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, u, n, i = _place(item, first, blocks, units, Q_BLOCK, STACK)
        at = _list(b, u, n, batch_lists, head_lists)
        listed = gl.load(count + at) * (K_BLOCK // 64)
        list_at = index + at * picks
        at = _list(b, u, n, far_batch_lists, far_head_lists)
        named = _rows_of(far_index, far_count, at, far_picks, far_rows, FAR_BLOCK)
        far_at = far_index + at * far_picks
        k_at = far_k + b.to(gl.int64) * far_strides[0] + (u // FAR_REPEAT).to(gl.int64) * far_strides[1]
        v_at = far_v + b.to(gl.int64) * far_strides[0] + (u // FAR_REPEAT).to(gl.int64) * far_strides[1]
        g = u // REPEAT
        tiles = listed + (named + 63) // 64
        for j in range(tiles + 1):
            if j == gl.minimum(tiles, EARLY):
                mbarrier.wait(q_bars.index(1), turn & 1 ^ 1)
                numbers.index(STAGES).store(gl.full([1], listed, gl.int32, ONE))
                numbers.index(STAGES + 1).store(gl.full([1], named, gl.int32, ONE))
                sync()
                mbarrier.expect(q_bars.index(0), 2 * BYTES)
                tma.async_copy_global_to_shared(q, [b, h, i, 0], q_bars.index(0), q_ring.index(0))
                tma.async_copy_global_to_shared(d_out, [b, h, i, 0], q_bars.index(0), q_ring.index(1))
                turn += 1
            if j <= listed:
                s = wait_empty(k_empty, k_step)
                if j == 0:
                    # out of the queries takes the place of a tile of keys
                    mbarrier.arrive(k_full.index(s), count=32 * WARPS - 1)
                    mbarrier.expect(k_full.index(s), BYTES)
                    to = k_ring.index(s)
                    if TOKENS < 64:
                        to = to.reshape([1, 64 // TOKENS, TOKENS, D])
                    tma.async_copy_global_to_shared(out, [b, h, i, 0], k_full.index(s), to)
                else:
                    row = gl.load(list_at + (j - 1) // (K_BLOCK // 64)) * K_BLOCK + (j - 1) % (K_BLOCK // 64) * 64
                    numbers.index(s).store(gl.full([1], row, gl.int32, ONE))
                    sync()
                    mbarrier.arrive(k_full.index(s), count=32 * WARPS - 1)
                    mbarrier.expect(k_full.index(s), BYTES)
                    tma.async_copy_global_to_shared(k, [b, g, row, 0], k_full.index(s), k_ring.index(s))
                    t = wait_empty(v_empty, v_step)
                    mbarrier.arrive(v_full.index(t), count=32 * WARPS - 1)
                    mbarrier.expect(v_full.index(t), BYTES)
                    tma.async_copy_global_to_shared(v, [b, g, row, 0], v_full.index(t), v_ring.index(t))
                    v_step += 1
                k_step += 1
            else:
                begin = (j - 1 - listed) * 64
                spot = begin + gl.arange(0, 64, down)
                there = spot < named
                row = gl.load(far_at + spot // FAR_BLOCK, mask=there, other=0) * FAR_BLOCK + spot % FAR_BLOCK
                row, there = row.to(gl.int64)[:, None], there[:, None]
                s = wait_empty(k_empty, k_step)
                # rows that are not there come as 0
                k_to = k_ring.index(s).reshape([64, D])
                async_copy.async_copy_global_to_shared(k_to, k_at + row * far_strides[2] + columns, mask=there)
                async_copy.mbarrier_arrive(k_full.index(s), increment_count=False)
                t = wait_empty(v_empty, v_step)
                v_to = v_ring.index(t).reshape([64, D])
                async_copy.async_copy_global_to_shared(v_to, v_at + row * far_strides[2] + columns, mask=there)
                async_copy.mbarrier_arrive(v_full.index(t), increment_count=False)
                # the place after it is that of dS
                k_step += 2
                v_step += 1


@gluon.jit
def _compute(
    given, rings,
    STACK: gl.constexpr, Q_BLOCK: gl.constexpr, D: gl.constexpr, FAR_BLOCK: gl.constexpr, STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, CAUSAL: gl.constexpr, D_LSE: gl.constexpr, BIAS: gl.constexpr, D_BIAS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    (
        d_q, share_k, share_v, share_bias, delta, shift, lse, d_lse, bias, far_index, bias_batch, bias_head, far_picks,
        far_batch_lists, far_head_lists, first_unit, items, blocks, heads, tokens, units, rows, scale,
    ) = given  # fmt: skip
    numbers, stats, q_ring, k_ring, v_ring, q_bars, k_full, k_empty, v_full, v_empty = rings
    TOKENS: gl.constexpr = Q_BLOCK if Q_BLOCK < 64 else 64
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    down: gl.constexpr = gl.SliceLayout(1, score)
    across: gl.constexpr = gl.SliceLayout(0, score)
    dtype: gl.constexpr = q_ring.dtype
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    square_of: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    factor = scale * LOG2E
    k_step, v_step, turn = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, u, n, first = _place(item, first_unit, blocks, units, Q_BLOCK, STACK)
        line = first + token_of(64, TOKENS, down)
        stat = heads_on((b * heads + h).to(gl.int64) * tokens + line, tokens, 64, TOKENS, down)
        mass = gl.load(lse + stat, mask=line < tokens, other=float("-inf"))
        d_mass = mass
        if D_LSE:
            d_mass = gl.load(d_lse + stat, mask=line < tokens, other=0.0)
        mbarrier.wait(q_bars.index(0), turn & 1)
        queries = q_ring.index(0).reshape([64, D])
        d_tile = q_ring.index(1).reshape([64, D])
        tiles = gl.max(numbers.index(STAGES).load(ONE), 0)
        named = gl.max(numbers.index(STAGES + 1).load(ONE), 0)
        # a query that read nothing, and one that only fills up a tile, gets weights exp(s - inf) = 0
        empty = mass == float("-inf")
        shift_row = gl.where(empty, float("inf"), mass * LOG2E)
        s = wait_full(k_full, k_step)
        out = k_ring.index(s).reshape([64, D]).load(wide)
        delta_row = gl.sum(out.to(gl.float32) * d_tile.load(wide).to(gl.float32), 1)
        delta_row = gl.convert_layout(delta_row, down)
        if D_LSE:
            delta_row -= d_mass
        delta_row = gl.where(empty, 0.0, delta_row)
        report(k_empty, s)
        k_step += 1
        # up to the end of the last block, so that whole tiles can be read back
        stat = (b * heads + h).to(gl.int64) * (blocks * Q_BLOCK) + line
        stat = heads_on(stat, blocks * Q_BLOCK, 64, TOKENS, down)
        gl.store(shift + stat, shift_row)
        gl.store(delta + stat, delta_row)
        # the gathered rows ask for them across
        stats.index(0).store(shift_row)
        stats.index(1).store(delta_row)

        acc = gl.zeros([64, D], gl.float32, wide)
        if tiles > 0:
            product, d_product, row, t = _multiply(
                queries, d_tile, numbers, k_ring, v_ring, k_full, v_full, k_step, v_step, score, 64, D, D
            )
            scores = warpgroup_mma_wait(1, deps=[product])
            weights = _weigh(
                scores, shift_row, row, first, first, first, rows, factor, score, 64, CAUSAL, False, TOKENS
            )
            d_weights = warpgroup_mma_wait(0, deps=[d_product])
            report(v_empty, t)
            v_step += 1
            d_weights = weights * (d_weights - delta_row[:, None])
            d_scores = gl.convert_layout(d_weights.to(dtype), left)
            for _ in range(1, tiles):
                before = k_step % STAGES
                k_step += 1
                product, d_product, row, t = _multiply(
                    queries, d_tile, numbers, k_ring, v_ring, k_full, v_full, k_step, v_step, score, 64, D, D
                )
                summed = warpgroup_mma(d_scores, k_ring.index(before).reshape([64, D]), acc, is_async=True)
                scores = warpgroup_mma_wait(2, deps=[product])
                weights = _weigh(
                    scores, shift_row, row, first, first, first, rows, factor, score, 64, CAUSAL, False, TOKENS
                )
                d_weights = warpgroup_mma_wait(1, deps=[d_product])
                d_weights = weights * (d_weights - delta_row[:, None])
                acc, d_scores = warpgroup_mma_wait(0, deps=[summed, d_scores])
                sync()
                mbarrier.arrive(v_empty.index(t), count=1)
                mbarrier.arrive(k_empty.index(before), count=1)
                v_step += 1
                d_scores = gl.convert_layout(d_weights.to(dtype), left)
            before = k_step % STAGES
            k_step += 1
            summed = warpgroup_mma(d_scores, k_ring.index(before).reshape([64, D]), acc, is_async=True)
            acc, d_scores = warpgroup_mma_wait(0, deps=[summed, d_scores])
            report(k_empty, before)
        sync()
        far_at = far_index + _list(b, u, n, far_batch_lists, far_head_lists) * far_picks
        bias_at = bias + b.to(gl.int64) * bias_batch + u.to(gl.int64) * bias_head
        for begin in range(0, named, 64):
            spot = begin + gl.arange(0, 64, down)
            there = spot < named
            more = gl.where(there, 0.0, float("-inf"))
            if BIAS:
                row = gl.load(far_at + spot // FAR_BLOCK, mask=there, other=0) * FAR_BLOCK + spot % FAR_BLOCK
                more = gl.load(bias_at + row, mask=there, other=float("-inf")) * LOG2E
            s = wait_full(k_full, k_step)
            # copies were ordinary writes to shared memory; the tensor cores read it another way
            fence_async_shared()
            keys = k_ring.index(s).reshape([64, D])
            none = gl.zeros([64, 64], gl.float32, score)
            zero = _anew(0)
            queries = q_ring.index(zero).reshape([64, D])
            d_tile = q_ring.index(1 + zero).reshape([64, D])
            product = warpgroup_mma(keys, queries.permute((1, 0)), none, use_acc=False, is_async=True)
            t = wait_full(v_full, v_step)
            fence_async_shared()
            values = v_ring.index(t).reshape([64, D])
            d_product = warpgroup_mma(values, d_tile.permute((1, 0)), none, use_acc=False, is_async=True)
            if begin > 0:
                # the shares of the rows before have left
                tma.store_wait(0)
                sync()
                # the keys' place before the values', which the loading warps wait for: so they know of both
                mbarrier.arrive(k_empty.index((k_step - 2) % STAGES), count=1)
                mbarrier.arrive(v_empty.index((v_step - 1) % V_STAGES), count=1)
            # nobody fills the place of dS
            spare = (k_step + 1) % STAGES
            mbarrier.arrive(k_full.index(spare), count=32 * WARPS)
            scores = warpgroup_mma_wait(1, deps=[product])
            weights = gl.exp2(scores * factor + more[:, None] - stats.index(0).load(across)[None, :])
            operand = gl.convert_layout(weights.to(dtype), left)
            d_weights = warpgroup_mma_wait(0, deps=[d_product])
            d_weights = weights * (d_weights - stats.index(1).load(across)[None, :])
            if D_BIAS:
                share_at = share_bias + item.to(gl.int64) * (far_picks * FAR_BLOCK)
                gl.store(share_at + spot, gl.sum(d_weights, 1), mask=there)
            d_low = d_weights.to(dtype)
            nothing = gl.zeros([64, D], gl.float32, wide)
            sum_v = warpgroup_mma(operand, d_tile, nothing, use_acc=False, is_async=True)
            if D == 64:
                square = k_ring.index(spare).reshape([64, 64])
            else:
                square = k_ring.index(spare)._reinterpret(dtype, [D // 64, 64, 64], square_of).index(0)
            square.store(d_low)
            d_operand = gl.convert_layout(d_low, left)
            fence_async_shared()
            sync()
            sum_q = warpgroup_mma(square.permute((1, 0)), keys, acc, is_async=True)
            d_v, operand = warpgroup_mma_wait(1, deps=[sum_v, operand])
            values.store(d_v.to(dtype))
            sum_k = warpgroup_mma(d_operand, queries, nothing, use_acc=False, is_async=True)
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(share_v, [0, item, begin, 0], v_ring.index(t))
            acc = warpgroup_mma_wait(1, deps=[sum_q])
            d_k, d_operand = warpgroup_mma_wait(0, deps=[sum_k, d_operand])
            sync()
            mbarrier.arrive(k_empty.index(spare), count=1)
            keys.store((d_k * scale).to(dtype))
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(share_k, [0, item, begin, 0], k_ring.index(s))
            k_step += 2
            v_step += 1
        if named > 0:
            tma.store_wait(0)
            sync()
            mbarrier.arrive(k_empty.index((k_step - 2) % STAGES), count=1)
            mbarrier.arrive(v_empty.index((v_step - 1) % V_STAGES), count=1)
        b, h, u, n, first = _place(_anew(item), first_unit, blocks, units, Q_BLOCK, STACK)
        # the queries are done with: their place in shared memory is where dq leaves from
        queries.store((acc * scale).to(dtype))
        fence_async_shared()
        sync()
        tma.async_copy_shared_to_global(d_q, [b, h, first, 0], q_ring.index(0))
        tma.store_wait(0)
        report(q_bars, 1)
        turn += 1


VARIES = ["bias_batch", "bias_head", "picks", "batch_lists", "head_lists", "far_picks", "far_batch_lists"]
VARIES += ["far_head_lists", "far_rows", "first", "items", "blocks", "heads", "tokens", "units", "rows"]


@gluon.jit(do_not_specialize=VARIES)
def attend_backward_runs_hopper(
    q, d_out, out, k, v, far_k, far_v, bias, lse, d_lse, index, count, far_index, far_count, d_q, share_k, share_v,
    share_bias, delta, shift, far_strides, bias_batch, bias_head, picks, batch_lists, head_lists, far_picks,
    far_batch_lists, far_head_lists, far_rows, first, items, blocks, heads, tokens, units, rows, scale,
    STACK: gl.constexpr, REPEAT: gl.constexpr, FAR_REPEAT: gl.constexpr, Q_BLOCK: gl.constexpr, D: gl.constexpr,
    K_BLOCK: gl.constexpr, FAR_BLOCK: gl.constexpr, STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, D_LSE: gl.constexpr, BIAS: gl.constexpr, D_BIAS: gl.constexpr, LOADERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TOKENS: gl.constexpr = Q_BLOCK if Q_BLOCK < 64 else 64
    # queries and dout
    q_ring = gl.allocate_shared_memory(q.dtype, [2, 1, 64 // TOKENS, TOKENS, D], q.layout)
    k_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, 64, D], k.layout)
    v_ring = gl.allocate_shared_memory(q.dtype, [V_STAGES, 1, 1, 64, D], v.layout)
    # the loading warps pass over the place of dS: that it has come back, they know from the values' place two tiles on
    gl.static_assert(V_STAGES == 2)
    # shift and delta
    stats = gl.allocate_shared_memory(gl.float32, [2, 64], plain)
    # where the block of a stage begins, and how many tiles of blocks and how many gathered rows a tile of queries reads
    numbers = gl.allocate_shared_memory(gl.int32, [STAGES + 2, 1], plain)
    # queries are there; their place is empty
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bars.index(0), count=1)
    mbarrier.init(q_bars.index(1), count=1)
    # every loading thread reports its own copies
    k_full, k_empty = barriers(STAGES, 32 * LOADERS, 1)
    v_full, v_empty = barriers(V_STAGES, 32 * LOADERS, 1)
    fence_async_shared()

    loading_rings = numbers, q_ring, k_ring, v_ring, q_bars, k_full, k_empty, v_full, v_empty
    computing_rings = numbers, stats, q_ring, k_ring, v_ring, q_bars, k_full, k_empty, v_full, v_empty
    computing = (
        d_q, share_k, share_v, share_bias, delta, shift, lse, d_lse, bias, far_index, bias_batch, bias_head, far_picks,
        far_batch_lists, far_head_lists, first, items, blocks, heads, tokens, units, rows, scale,
    )  # fmt: skip
    loading = (
        q, d_out, out, k, v, far_k, far_v, index, count, far_index, far_count, picks, batch_lists, head_lists,
        far_picks, far_batch_lists, far_head_lists, far_rows, first, items, blocks, units,
    )  # fmt: skip
    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_compute, (
            computing, computing_rings, STACK, Q_BLOCK, D, FAR_BLOCK, STAGES, V_STAGES, CAUSAL, D_LSE, BIAS, D_BIAS,
            LOADERS,
        )),
        (_load, (
            loading, loading_rings, far_strides,
            STACK, REPEAT, FAR_REPEAT, Q_BLOCK, D, K_BLOCK, FAR_BLOCK, LOADERS, STAGES, V_STAGES,
        )),
    ], [LOADERS], [REGISTERS])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        k_stages, v_stages: tiles of rows in flight; a tile of gathered rows takes two places of keys.
        programs: a multiprocessor.
        registers: of a thread at the start of the kernel.
        loading: registers of a thread that loads. The computing ones get the rest.
        loaders: warps that load.
    """

    k_stages: int
    v_stages: int
    programs: int
    registers: int
    loading: int
    loaders: int = 4


# at a width of 128 two programs leave no shared memory over: what the loading warps are handed takes some too
TILES = {64: Tiles(4, 2, 2, 128, 40), 128: Tiles(3, 2, 2, 128, 40)}  # width -> tiles


def runs_backward(
    q: Tensor, d_out: Tensor, out: Tensor, d_q: Tensor, delta: Tensor, shift: Tensor, lse: Tensor,
    d_lse: Tensor | None, near: Source, far: Source, shares: Three,
    *, begin: int, stop: int, q_block: int, stack: int, units: int, blocks: int, scale: float,
) -> None:  # fmt: skip
    """dq, `delta` and `shift` [B, H, blocks * q_block] and the shares of `far` of units begin .. stop - 1.

    A list has a share for every 64 queries of the heads that read it.
    """
    heads, tokens, width = q.shape[1:]
    tiles = TILES[width]
    items = (stop - begin) * blocks * (stack * q_block // 64)
    box = {"rows": min(q_block, 64), "heads": max(64 // q_block, 1)}
    share_k, share_v = (x.view(1, items, far.picks * far.plan.k_block, width) for x in shares[:2])
    start(
        attend_backward_runs_hopper, (min(items, processors(q.device) * tiles.programs),),
        *(descriptor(x, **box) for x in (q, d_out, out)), descriptor(near.k, 64), descriptor(near.v, 64),
        far.k, far.v, far.bias, lse, lse if d_lse is None else d_lse, near.index, near.count, far.index, far.count,
        descriptor(d_q, **box), descriptor(share_k, 64), descriptor(share_v, 64), shares[2], delta, shift,
        far.strides[0], *far.strides[2:4], near.picks, *near.lists, far.picks, *far.lists, far.rows, begin, items,
        blocks, heads, tokens, units, near.rows, scale,
        STACK=stack, REPEAT=near.repeat, FAR_REPEAT=far.repeat, Q_BLOCK=q_block, D=width, K_BLOCK=near.plan.k_block,
        FAR_BLOCK=far.plan.k_block, STAGES=tiles.k_stages, V_STAGES=tiles.v_stages, CAUSAL=near.causal,
        D_LSE=d_lse is not None, BIAS=far.biased, D_BIAS=far.d_bias, LOADERS=tiles.loaders, REGISTERS=tiles.loading,
        num_warps=4, maxnreg=tiles.registers,
    )  # fmt: skip


def wants_runs(q: Tensor, d_out: Tensor, out: Tensor, near: Source, far: Source, q_block: int, stack: int) -> bool:
    """Whether shapes and strides suit; nothing but a causal layout of blocks and a bias of rows may ride along."""
    width = q.shape[-1]
    return (
        width in TILES
        and in_tiles(q_block, stack)
        and near.plan.k_block in (64, 128)
        and far.small
        and far.rows > 0
        and near.rows > 0
        and far.plan.k_block & (far.plan.k_block - 1) == 0
        and not (near.reach or near.biased or near.ended or near.grouped)
        and not (far.causal or far.reach or far.ended or far.grouped)
        and q.dtype in (torch.bfloat16, torch.float16)
        and width == near.v.shape[-1] == far.v.shape[-1]
        and far.strides[0] == far.strides[1]
        and on_hopper(q.device)
        and all(aligned(x) for x in (q, d_out, out, near.k, near.v, far.k, far.v))
    )
