"""attend on Hopper GPUs, forward, of lists of many blocks with gathered rows behind them: one ring for both.

As kernels.attend_hopper, where blocks and rows have places apart: those for rows stand empty while the blocks of a
long list go by. Here tiles of 64 rows, blocks first, take turns in the same ring, filled by one role: blocks through
the tensor memory accelerator, rows through asynchronous copies. The softmax goes on from the last block to the first
rows without waiting for the sum.
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

from farfield.kernels import attend_hopper
from farfield.kernels.attend import lists_of
from farfield.kernels.attend_hopper import _list, _lists, _place, _rows_of, _weigh
from farfield.kernels.hopper import (
    LN2,
    LOG2E,
    by_lane,
    descriptor,
    faded,
    fetch,
    from_words,
    heads_on,
    in_tiles,
    processors,
    report,
    soften_lazily,
    sync,
    token_of,
    wait_empty,
    wait_full,
    words,
)
from farfield.kernels.replay import start
from farfield.ops.attend import Call


@gluon.jit
def _tile(item, blocks, heads, TOKENS: gl.constexpr):
    """Item -> batch, first of 64 / TOKENS heads, query block."""
    HEADS: gl.constexpr = 64 // TOKENS
    b, h, n, _ = _place(item, blocks, heads // HEADS, 1)
    return b, h * HEADS, n


@gluon.jit
def _load(
    q, k, v, far_k, far_v, far_bias, counts, block_rows, named, q_ring, k_ring, v_ring, bias_ring, q_full, q_empty,
    k_full, k_empty, v_full, v_empty, index, count, picks, batch_lists, head_lists, far_index, far_count,
    far_k_strides, far_v_strides, bias_batch, bias_head, far_picks, far_batch_lists, far_head_lists, far_rows,
    rows, items, blocks, heads,
    REPEAT: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BK: gl.constexpr, K_BLOCK: gl.constexpr,
    BIAS: gl.constexpr, SEGMENT: gl.constexpr, WARPS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Queries, blocks and gathered rows, by WARPS warps, each thread of which reports once for every tile."""
    PAIR: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    tiles = named._reinterpret(gl.int32, [SEGMENT // BK, BK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, n = _tile(item, blocks, heads, TOKENS)
        g = h // REPEAT
        at = _list(b, h, n, batch_lists, head_lists)
        list_at = index + at * picks
        filled = gl.load(count + at)
        # an empty list reads one block behind the last row, which is hidden
        listed = gl.maximum(filled, 1)
        far_at = _list(b, h, n, far_batch_lists, far_head_lists)
        far_listed = _rows_of(far_index, far_count, far_at, far_picks, far_rows, K_BLOCK)
        p = wait_empty(q_empty, turn)
        which = gl.arange(0, 2, PAIR)
        counts.index(p).store(gl.where(which == 0, listed, far_listed))
        sync()
        fetch(q, [b, h, n * TOKENS, 0], q_full, q_ring, p)
        turn += 1
        for j in range(listed):
            block = gl.load(list_at + j, mask=j < filled, other=0)
            row = gl.where(j < filled, block * BK, rows)
            s = wait_empty(k_empty, step)
            block_rows.index(s).store(gl.full([1], row, gl.int32, ONE))
            sync()
            mbarrier.arrive(k_full.index(s), count=32 * WARPS - 1)
            fetch(k, [b, g, row, 0], k_full, k_ring, s)
            wait_empty(v_empty, step)
            mbarrier.arrive(v_full.index(s), count=32 * WARPS - 1)
            fetch(v, [b, g, row, 0], v_full, v_ring, s)
            step += 1
        far_at = far_index + far_at * far_picks
        k_at = far_k + b.to(gl.int64) * far_k_strides[0] + g.to(gl.int64) * far_k_strides[1]
        v_at = far_v + b.to(gl.int64) * far_v_strides[0] + g.to(gl.int64) * far_v_strides[1]
        bias_at = far_bias + b.to(gl.int64) * bias_batch + g.to(gl.int64) * bias_head
        for segment in range(0, far_listed, SEGMENT):
            # the rows that many tiles' worth of the list names: one wait for them instead of one a tile
            spot = segment + gl.arange(0, SEGMENT, ONE)
            place = gl.load(far_at + spot // K_BLOCK, mask=spot < far_listed, other=0) * K_BLOCK + spot % K_BLOCK
            sync()
            named.store(place)
            sync()
            for c in range(gl.minimum(SEGMENT, far_listed - segment + BK - 1) // BK):
                first = segment + c * BK
                row = tiles.index(c).load(down).to(gl.int64)[:, None]
                there = (first + gl.arange(0, BK, down) < far_listed)[:, None]
                s = wait_empty(k_empty, step)
                # rows that are not there come as 0
                k_to = k_ring.index(s).reshape([BK, D])
                async_copy.async_copy_global_to_shared(k_to, k_at + row * far_k_strides[2] + columns, mask=there)
                if BIAS:
                    there_b = first + gl.arange(0, BK, ONE) < far_listed
                    b_from = bias_at + tiles.index(c).load(ONE)
                    async_copy.async_copy_global_to_shared(bias_ring.index(s), b_from, mask=there_b)
                async_copy.mbarrier_arrive(k_full.index(s), increment_count=False)
                wait_empty(v_empty, step)
                v_to = v_ring.index(s).reshape([BK, E])
                async_copy.async_copy_global_to_shared(v_to, v_at + row * far_v_strides[2] + columns, mask=there)
                async_copy.mbarrier_arrive(v_full.index(s), increment_count=False)
                step += 1


@gluon.jit
def _hide(
    scores, row, first, rows, layout: gl.constexpr, BK: gl.constexpr, CAUSAL: gl.constexpr, TOKENS: gl.constexpr
):  # fmt: skip
    """-inf where the queries from `first` on must not see the rows from `row` on."""
    whole = row + BK <= rows
    if CAUSAL:
        whole &= row + BK <= first + 1
    if not whole:
        r = row + gl.arange(0, BK, gl.SliceLayout(0, layout))[None, :]
        seen = r < rows
        if CAUSAL:
            seen &= r <= first + token_of(64, TOKENS, gl.SliceLayout(1, layout))[:, None]
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def _compute(
    out, lse, counts, block_rows, q_ring, k_ring, v_ring, bias_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    items, blocks, heads, tokens, rows, scale,
    D: gl.constexpr, E: gl.constexpr, BK: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, BIAS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    asking: gl.constexpr = gl.DotOperandLayout(0, score, 2)
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    of_value: gl.constexpr = gl.SliceLayout(1, value)
    dtype: gl.constexpr = q_ring.dtype
    PAIR: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    factor = scale * LOG2E
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, n = _tile(item, blocks, heads, TOKENS)
        first = n * TOKENS
        peak = gl.full([64], float("-inf"), gl.float32, per_row)
        acc = gl.zeros([64, E], gl.float32, value)
        scores = gl.zeros([64, BK], gl.float32, score)
        mass = by_lane(scores)
        p = turn % Q_STAGES
        queries = q_ring.index(p).reshape([64, D])
        mbarrier.wait(q_full.index(p), turn // Q_STAGES & 1)
        asked = queries.load(asking)
        which = gl.arange(0, 2, PAIR)
        pair = counts.index(p).load(PAIR)
        listed = gl.sum(gl.where(which == 0, pair, 0), 0)
        far_listed = gl.sum(gl.where(which == 1, pair, 0), 0)
        s = wait_full(k_full, step)
        row = gl.max(block_rows.index(s).load(ONE), 0)
        keys = k_ring.index(s).reshape([BK, D]).permute((1, 0))
        scores = warpgroup_mma(asked, keys, scores, use_acc=False)
        report(k_empty, s)
        scores = _hide(scores, row, first, rows, score, BK, CAUSAL, TOKENS)
        weights, peak, mass, fade = soften_lazily(scores, peak, mass, factor)
        carried = words(weights, dtype)
        for _ in range(1, listed):
            last = step % STAGES
            last_phase = step // STAGES & 1
            step += 1
            s = wait_full(k_full, step)
            row = gl.max(block_rows.index(s).load(ONE), 0)
            keys = k_ring.index(s).reshape([BK, D]).permute((1, 0))
            none = gl.zeros([64, BK], gl.float32, score)
            product = warpgroup_mma(asked, keys, none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(last), last_phase)
            operand = from_words(carried, dtype, left)
            summed = warpgroup_mma(operand, v_ring.index(last).reshape([BK, E]), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[product])
            report(k_empty, s)
            scores = _hide(scores, row, first, rows, score, BK, CAUSAL, TOKENS)
            weights, peak, mass, fade = soften_lazily(scores, peak, mass, factor)
            acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
            report(v_empty, last)
            acc = faded(acc, fade)
            carried = words(weights, dtype)
        for filled in range(0, far_listed, BK):
            last = step % STAGES
            last_phase = step // STAGES & 1
            step += 1
            s = wait_full(k_full, step)
            mbarrier.wait(v_full.index(last), last_phase)
            # these copies were ordinary writes to shared memory; the tensor cores read it another way
            fence_async_shared()
            keys = k_ring.index(s).reshape([BK, D]).permute((1, 0))
            none = gl.zeros([64, BK], gl.float32, score)
            product = warpgroup_mma(asked, keys, none, use_acc=False, is_async=True)
            operand = from_words(carried, dtype, left)
            summed = warpgroup_mma(operand, v_ring.index(last).reshape([BK, E]), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[product])
            scores = _weigh(scores, bias_ring.index(s), filled, far_listed, factor, score, BK, BIAS)
            report(k_empty, s)
            weights, peak, mass, fade = soften_lazily(scores, peak, mass, 1.0)
            acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
            report(v_empty, last)
            acc = faded(acc, fade)
            carried = words(weights, dtype)
        last = wait_full(v_full, step)
        fence_async_shared()
        acc = warpgroup_mma(from_words(carried, dtype, left), v_ring.index(last).reshape([BK, E]), acc)
        report(v_empty, last)
        step += 1
        mass = gl.convert_layout(gl.sum(mass, 1), per_row)
        # one division a query, not one a value
        share = 1.0 / gl.where(mass > 0, mass, 1.0)
        acc = acc * gl.convert_layout(share, of_value)[:, None]
        # the queries are done with: their place in shared memory is where the result leaves from
        queries.store(acc.to(dtype))
        fence_async_shared()
        sync()
        tma.async_copy_shared_to_global(out, [b, h, first, 0], q_ring.index(p))
        at = first + token_of(64, TOKENS, per_row)
        lse_at = heads_on(lse + (b.to(gl.int64) * heads + h) * tokens, tokens, 64, TOKENS, per_row)
        # log2(0) = -inf is what a query that read nothing has
        gl.store(lse_at + at, (peak + gl.log2(mass)) * LN2, at < tokens)
        tma.store_wait(0)
        report(q_empty, p)
        turn += 1


VARIES = ["items", "blocks", "heads", "tokens", "rows", "picks", "batch_lists", "head_lists"]
VARIES += ["bias_batch", "bias_head", "far_picks", "far_batch_lists", "far_head_lists", "far_rows"]


@gluon.jit(do_not_specialize=VARIES)
def attend_hopper_runs(
    q, k, v, out, lse, index, count, far_k, far_v, far_bias, far_index, far_count, far_k_strides, far_v_strides,
    picks, batch_lists, head_lists, bias_batch, bias_head, far_picks, far_batch_lists, far_head_lists, far_rows,
    items, blocks, heads, tokens, rows, scale,
    REPEAT: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, E: gl.constexpr, Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, K_BLOCK: gl.constexpr, BIAS: gl.constexpr, SEGMENT: gl.constexpr,
    LOADERS: gl.constexpr, REGISTERS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES, 1, 64 // TOKENS, TOKENS, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BK, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BK, E], v.layout)
    bias_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BK], plain)
    named = gl.allocate_shared_memory(gl.int32, [SEGMENT], plain)
    # how many entries the two lists of a tile have
    counts = gl.allocate_shared_memory(gl.int32, [Q_STAGES, 2], plain)
    # where the block of a stage begins
    block_rows = gl.allocate_shared_memory(gl.int32, [STAGES, 1], plain)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for s in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_empty.index(s), count=1)
    for s in gl.static_range(STAGES):
        # every loading thread reports its own copies
        mbarrier.init(k_full.index(s), count=32 * LOADERS)
        mbarrier.init(v_full.index(s), count=32 * LOADERS)
        mbarrier.init(k_empty.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=1)
    fence_async_shared()

    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_compute, (
            out, lse, counts, block_rows, q_ring, k_ring, v_ring, bias_ring, q_full, q_empty, k_full, k_empty, v_full,
            v_empty, items, blocks, heads, tokens, rows, scale,
            D, E, BK, Q_STAGES, STAGES, CAUSAL, BIAS, TOKENS,
        )),
        (_load, (
            q, k, v, far_k, far_v, far_bias, counts, block_rows, named, q_ring, k_ring, v_ring, bias_ring, q_full,
            q_empty, k_full, k_empty, v_full, v_empty, index, count, picks, batch_lists, head_lists, far_index,
            far_count, far_k_strides, far_v_strides, bias_batch, bias_head, far_picks, far_batch_lists, far_head_lists,
            far_rows, rows, items, blocks, heads,
            REPEAT, D, E, BK, K_BLOCK, BIAS, SEGMENT, LOADERS, TOKENS,
        )),
    ], [LOADERS], [REGISTERS])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        q_stages, stages: tiles of queries, and of rows of either kind, in flight.
        programs: a multiprocessor.
        registers: of a thread at the start of the kernel.
        loading: registers of a thread that loads. The computing ones get the rest.
        loaders: warps that load.
    """

    q_stages: int
    stages: int
    programs: int
    registers: int
    loading: int = 40
    loaders: int = 4


# width -> tiles
TILES = {64: Tiles(2, 3, 3, 80, 32), 128: Tiles(2, 2, 2, 128, 56)}
ROWS = 64  # of a tile, and of a block
SEGMENT = 256  # gathered rows whose numbers are looked up at a time
LEAST = 6  # blocks of a list


def wants(call: Call) -> bool:
    """Whether this kernel takes a call: two sources, blocks of 64, and long lists or few queries to a list."""
    near = call.plans[0]
    if len(call.k) != 2 or near.k_block != ROWS or near.q_block > ROWS:
        return False
    if near.q_block < ROWS:
        # queries of several heads that share a list in a tile: no other kernel for Hopper has them
        suits = in_tiles(near.q_block, lists_of(call)[1])
    else:
        suits = call.index[0].shape[3] >= LEAST
    return suits and near.reach < 0 and not (call.position.dim() > 1 and near.causal) and attend_hopper.suits(call)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T]; the contract is ops.attend's."""
    q, k, v, bias, _, _, _, _, index, count, plans, scale = call
    batch, heads, tokens, width = q.shape
    near, far = plans
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    blocks = index[0].shape[2]
    tiles = TILES[width]
    # rows of a tile: tokens of one head, or fewer tokens of several that share their list
    size = near.q_block
    items = batch * heads * blocks * size // 64
    near_lists, far_lists = _lists(index[0], count[0]), _lists(index[1], count[1])
    weighted = bias[1].dim() > 1
    far_bias = bias[1].float().contiguous() if weighted else lse
    bias_strides = [0 if n == 1 else s for n, s in zip(far_bias.shape[:2], far_bias.stride(), strict=False)]
    start(
        attend_hopper_runs, (min(items, processors(q.device) * tiles.programs),),
        descriptor(q, size, heads=64 // size), descriptor(k[0], ROWS), descriptor(v[0], ROWS),
        descriptor(out, size, heads=64 // size),
        lse, *near_lists[:2], k[1], v[1], far_bias, *far_lists[:2], k[1].stride(), v[1].stride(),
        *near_lists[2:], *bias_strides, *far_lists[2:], k[1].shape[2],
        items, blocks, heads, tokens, k[0].shape[2], scale,
        REPEAT=heads // k[0].shape[1], BK=ROWS, D=width, E=width, Q_STAGES=tiles.q_stages, STAGES=tiles.stages,
        CAUSAL=bool(near.causal), K_BLOCK=far.k_block, BIAS=weighted, SEGMENT=SEGMENT, LOADERS=tiles.loaders,
        REGISTERS=tiles.loading, TOKENS=size, num_warps=4, maxnreg=tiles.registers,
    )  # fmt: skip
    return out, lse
