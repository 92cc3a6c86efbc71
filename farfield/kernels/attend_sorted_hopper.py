"""Attention between tokens that were sorted into slots, on Hopper GPUs, forward: rows are gathered on the way.

attend's kernel for Hopper (kernels.attend_hopper) over the slots of ops.hashed, but for where rows come from and go:
queries, keys and values are copied row by row from their tokens, 16 bytes a thread, into the rings in shared memory,
and a query's result is written to its token. So nothing is moved into slots and back. Lists are runs of blocks, some
much longer than others: a counter in memory deals the blocks of queries out.
"""

from __future__ import annotations

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

from farfield.kernels.attend_hopper import _hide
from farfield.kernels.hopper import ALIGNED, LN2, LOG2E, processors, report, soften_scaled, sync, wait_empty, wait_full
from farfield.kernels.replay import start

LOADERS = gl.constexpr(4)  # warps that copy
SAID = gl.constexpr(4)  # words about a block of queries
SEGMENT = gl.constexpr(1024)  # slots whose tokens are looked up at a time


@gluon.jit
def _places(token, stride):
    """Where the rows of tokens lie, in units of 8 numbers as all strides here; -1 for slots without one."""
    return gl.where(token < 0, -1, token * stride)


@gluon.jit
def _copy(ring, x, place):
    """Rows by their places, 0 for those without one; `x`: where the numbers of row 0 lie."""
    at = place[:, None]
    async_copy.async_copy_global_to_shared(ring, x + at.to(gl.int64) * 8, mask=at >= 0)


@gluon.jit
def _gather(
    q, k, v, said, k_named, v_named, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    q_token, k_token, index, count, queue, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, items, blocks, heads, rows,
    picks,
    GROUPS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Everything that the products take."""
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [LOADERS, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [LOADERS], [0])
    WORDS: gl.constexpr = gl.BlockedLayout([SAID], [32], [LOADERS], [0])
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    k_places = k_named._reinterpret(gl.int32, [SEGMENT // BLOCK, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    v_places = v_named._reinterpret(gl.int32, [SEGMENT // BLOCK, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    word = gl.arange(0, SAID, WORDS)
    step, turn = 0, 0
    units = items // blocks
    item = gl.program_id(0)
    while item < items:
        # the last blocks of all heads first, so that those of the first buckets, whose runs are short, end it
        unit, n = item % units, blocks - 1 - item // units
        b, h = (unit // heads).to(gl.int64), (unit % heads).to(gl.int64)
        list_at = unit.to(gl.int64) * blocks + n
        listed = gl.load(count + list_at)
        low = gl.load(index + list_at * picks)
        # an empty run reads one block behind the last one, which is hidden
        low = gl.where(listed > 0, low, rows // BLOCK)
        listed = gl.maximum(listed, 1)
        p = wait_empty(q_empty, turn)
        said.index(p).store(gl.where(word == 0, unit * blocks + n, gl.where(word == 1, listed, low)))
        q_at = q + (b * q_b + h * q_h) * 8 + columns
        for group in gl.static_range(GROUPS):
            asks = gl.load(q_token + list_at * BLOCK + group * 64 + gl.arange(0, 64, down))
            _copy(q_ring.index(p * GROUPS + group), q_at, _places(asks, q_t))
        async_copy.mbarrier_arrive(q_full.index(p), increment_count=False)
        report(q_full, p)
        turn += 1
        # who is done first takes the next one: what comes out does not depend on who makes it
        item = gl.num_programs(0) + gl.atomic_add(queue, 1, sem="relaxed")
        k_at = k + (b * k_b + h * k_h) * 8 + columns
        v_at = v + (b * v_b + h * v_h) * 8 + columns
        for begin in range(0, listed, SEGMENT // BLOCK):
            # the tokens of several blocks: one wait for them instead of one a block
            slot = (low + begin) * BLOCK + gl.arange(0, SEGMENT, flat)
            token = gl.load(k_token + unit.to(gl.int64) * rows + slot, mask=slot < rows, other=-1)
            k_named.store(_places(token, k_t))
            v_named.store(_places(token, v_t))
            for c in range(gl.minimum(SEGMENT // BLOCK, listed - begin)):
                s = wait_empty(k_empty, step)
                _copy(k_ring.index(s), k_at, k_places.index(c).load(down))
                async_copy.mbarrier_arrive(k_full.index(s), increment_count=False)
                wait_empty(v_empty, step)
                _copy(v_ring.index(s), v_at, v_places.index(c).load(down))
                async_copy.mbarrier_arrive(v_full.index(s), increment_count=False)
                step += 1
    p = wait_empty(q_empty, turn)
    said.index(p).store(gl.where(word == 0, items, 0))
    async_copy.mbarrier_arrive(q_full.index(p), increment_count=False)
    report(q_full, p)


@gluon.jit
def _told(said, p):
    """What place p says: a number of a block of queries, how many tiles of rows it reads, and where these begin."""
    WORDS: gl.constexpr = gl.BlockedLayout([SAID], [32], [4], [0])
    which = gl.arange(0, SAID, WORDS)
    word = said.index(p).load(WORDS)
    item = gl.sum(gl.where(which == 0, word, 0), 0)
    tiles = gl.sum(gl.where(which == 1, word, 0), 0)
    low = gl.sum(gl.where(which == 2, word, 0), 0)
    return item, tiles, low


@gluon.jit
def _asked(
    item, q_token, position, blocks,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, across: gl.constexpr, per_row: gl.constexpr, POSITION: gl.constexpr,
):  # fmt: skip
    """Of a group of queries: batch and head, the first slot and its place in memory, tokens, positions, the least."""
    PAIR: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    unit, n = item // blocks, item % blocks
    first = n * (GROUPS * 64) + GROUP * 64
    line = unit.to(gl.int64) * (blocks * (GROUPS * 64)) + first
    # asked for early: they are needed at the end
    asks = gl.load(q_token + line + gl.arange(0, 64, gl.SliceLayout(1, across)))[:, None]
    at, least = first, first
    if POSITION:
        at = gl.load(position + line + gl.arange(0, 64, per_row))
        # every warp holds all of them, so that the least is found within a warp
        least = gl.min(gl.load(position + line + gl.arange(0, 64, PAIR)), 0)
    return unit, first, line, asks, at, least


@gluon.jit
def _compute(
    out, lse, said, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty, q_token, position,
    out_b, out_h, out_t, items, blocks, heads, rows, scale,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    POSITION: gl.constexpr,
):  # fmt: skip
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    of_value: gl.constexpr = gl.SliceLayout(1, value)
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    step, turn, item = 0, 0, 0
    while item < items:
        p = wait_full(q_full, turn)
        item, listed, low = _told(said, p)
        if item < items:
            unit, first, line, asks, at, least = _asked(
                item, q_token, position, blocks, GROUP, GROUPS, across, per_row, POSITION
            )  # fmt: skip
            peak = gl.full([64], float("-inf"), gl.float32, per_row)
            mass = gl.zeros([64], gl.float32, per_row)
            acc = gl.zeros([64, D], gl.float32, value)
            scores = gl.zeros([64, BLOCK], gl.float32, score)
            queries = q_ring.index(p * GROUPS + GROUP)
            s = wait_full(k_full, step)
            # copies were ordinary writes to shared memory; the tensor cores read it another way
            fence_async_shared()
            scores = warpgroup_mma(queries, k_ring.index(s).permute((1, 0)), scores, use_acc=False)
            report(k_empty, s)
            scores = _hide(
                scores, low * BLOCK, first, at, least, rows, 0, 0, score, BLOCK, True, False, POSITION
            )  # fmt: skip
            weights, peak, mass, fade = soften_scaled(scores, peak, mass, factor)
            operand = gl.convert_layout(weights.to(dtype), left)
            for j in range(1, listed):
                last = step % STAGES
                last_phase = step // STAGES & 1
                step += 1
                s = wait_full(k_full, step)
                mbarrier.wait(v_full.index(last), last_phase)
                fence_async_shared()
                product = warpgroup_mma(
                    queries, k_ring.index(s).permute((1, 0)), scores, use_acc=False, is_async=True
                )  # fmt: skip
                summed = warpgroup_mma(operand, v_ring.index(last), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[product])
                report(k_empty, s)
                scores = _hide(
                    scores, (low + j) * BLOCK, first, at, least, rows, 0, 0, score, BLOCK, True, False, POSITION
                )  # fmt: skip
                weights, peak, mass, fade = soften_scaled(scores, peak, mass, factor)
                acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
                report(v_empty, last)
                acc = acc * gl.convert_layout(fade, of_value)[:, None]
                operand = gl.convert_layout(weights.to(dtype), left)
            last = wait_full(v_full, step)
            fence_async_shared()
            acc = warpgroup_mma(operand, v_ring.index(last), acc)
            report(v_empty, last)
            step += 1
            # one division a query, not one a value
            share = 1.0 / gl.where(mass > 0, mass, 1.0)
            acc = acc * gl.convert_layout(share, of_value)[:, None]
            # log2(0) = -inf is what a query that read nothing has
            gl.store(lse + line + gl.arange(0, 64, per_row), (peak + gl.log2(mass)) * LN2)
            # the queries are done with: in their place the result comes into the order of whole rows
            queries.store(acc.to(dtype))
            sync()
            b, h = (unit // heads).to(gl.int64), (unit % heads).to(gl.int64)
            columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
            out_at = out + (b * out_b + h * out_h) * 8 + asks.to(gl.int64) * out_t * 8 + columns
            gl.store(out_at, queries.load(across), mask=asks >= 0)
        report(q_empty, p)
        turn += 1


VARIES = ["q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "out_b", "out_h", "out_t"]
VARIES += ["items", "blocks", "heads", "rows", "picks"]


@gluon.jit(do_not_specialize=VARIES)
def attend_sorted_hopper(
    q, k, v, out, lse, q_token, k_token, position, index, count, queue,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, items, blocks, heads, rows, picks, scale,
    GROUPS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
    POSITION: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q.dtype.element_ty
    of_q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    of_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [Q_STAGES * GROUPS, 64, D], of_q)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], of_k)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], of_k)
    # block of queries, how many blocks of keys it reads, the first of them
    said = gl.allocate_shared_memory(gl.int32, [Q_STAGES, SAID], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_named = gl.allocate_shared_memory(gl.int32, [SEGMENT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    v_named = gl.allocate_shared_memory(gl.int32, [SEGMENT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for s in gl.static_range(Q_STAGES):
        # every copying thread reports its own copies, and one what is said
        mbarrier.init(q_full.index(s), count=LOADERS * 32 + 1)
        mbarrier.init(q_empty.index(s), count=GROUPS)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=LOADERS * 32)
        mbarrier.init(v_full.index(s), count=LOADERS * 32)
        mbarrier.init(k_empty.index(s), count=GROUPS)
        mbarrier.init(v_empty.index(s), count=GROUPS)
    fence_async_shared()

    # constants stay constants only where they are written into the call
    if GROUPS == 1:
        gl.warp_specialize([
            (_compute, (
                out, lse, said, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty, q_token,
                position, out_b, out_h, out_t, items, blocks, heads, rows, scale,
                0, GROUPS, BLOCK, D, STAGES, POSITION,
            )),
            (_gather, (
                q, k, v, said, k_named, v_named, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, q_token, k_token, index, count, queue, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, items,
                blocks, heads, rows, picks, GROUPS, BLOCK, D,
            )),
        ], [LOADERS], [REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (
                out, lse, said, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty, q_token,
                position, out_b, out_h, out_t, items, blocks, heads, rows, scale,
                0, GROUPS, BLOCK, D, STAGES, POSITION,
            )),
            (_compute, (
                out, lse, said, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty, q_token,
                position, out_b, out_h, out_t, items, blocks, heads, rows, scale,
                1, GROUPS, BLOCK, D, STAGES, POSITION,
            )),
            (_gather, (
                q, k, v, said, k_named, v_named, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, q_token, k_token, index, count, queue, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, items,
                blocks, heads, rows, picks, GROUPS, BLOCK, D,
            )),
        ], [4, LOADERS], [(504 - REGISTERS) // 16 * 8, REGISTERS])  # fmt: skip


# width, block -> blocks of keys in flight
STAGES = {(64, 128): 4, (128, 128): 2, (64, 64): 4, (128, 64): 4}
LOADING = 88  # registers of a thread that copies


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, queue: Tensor, q_token: Tensor, k_token: Tensor, position: Tensor,
    index: Tensor, count: Tensor, block: int, scale: float,
) -> Tensor:  # fmt: skip
    """lse [B, H, M] of the query slots of ops.hashed.Slots; written are the rows of `out` whose tokens have one.

    `queue`: an int32 0, which counts the blocks of queries that have been taken.
    """
    batch, heads, _, width = q.shape
    blocks, picks = index.shape[2:]
    lse = torch.empty(q_token.shape, dtype=torch.float32, device=q.device)
    strides = [n // ALIGNED for x in (q, k, v, out) for n in x.stride()[:3]]
    positioned = position.numel() > 0
    items = batch * heads * blocks
    start(
        attend_sorted_hopper, (min(items, processors(q.device)),),
        q, k, v, out, lse, q_token, k_token, position if positioned else q_token, index, count, queue, *strides,
        items, blocks, heads, k_token.shape[2], picks, scale,
        GROUPS=block // 64, BLOCK=block, D=width, Q_STAGES=2, STAGES=STAGES[width, block], POSITION=positioned,
        REGISTERS=LOADING, num_warps=4,
    )  # fmt: skip
    return lse
