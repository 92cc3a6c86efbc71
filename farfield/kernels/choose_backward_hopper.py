"""Backward of the attention over rows that end, on Hopper GPUs: the two kernels of kernels.choose_backward, in Gluon.

As in kernels.choose_hopper one warp copies tiles through the tensor memory accelerator and two groups of four warps
own 64 queries each, or 64 rows. A score is two products of one accumulator.
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

from farfield.kernels.choose_hopper import _ended
from farfield.kernels.hopper import (
    LOG2E,
    aligned,
    barriers,
    descriptor,
    on_hopper,
    processors,
    report,
    sync,
    wait_empty,
    wait_full,
)
from farfield.kernels.replay import start


@gluon.jit
def _load_for_queries(
    q, d_out, k, v, sizes, rings, REPEAT: gl.constexpr, BK: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Queries with their gradients, then both numbers of the rows, and values, by one warp."""
    items, tiles, batch, heads, tokens, rows, stride, span, first = sizes
    q_ring, d_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty = rings
    step, turn = 0, 0
    units = batch * heads
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = tiles - 1 - item // units
        b, h = item % units // heads, item % heads
        g = h // REPEAT
        stop = _ended(first + gl.minimum(tile * 128 + 128, tokens) - 1, rows, stride, span)
        for group in gl.static_range(2):
            mbarrier.wait(q_empty.index(group), turn & 1 ^ 1)
            mbarrier.expect(q_full.index(group), 2 * 64 * D * 2)
            at = tile * 128 + group * 64
            tma.async_copy_global_to_shared(q, [b, h, at, 0], q_full.index(group), q_ring.index(group))
            tma.async_copy_global_to_shared(d_out, [b, h, at, 0], q_full.index(group), d_ring.index(group))
        turn += 1
        for row in range(0, stop, BK):
            s = wait_empty(k_empty, step)
            mbarrier.expect(k_full.index(s), 3 * BK * D * 2)
            tma.async_copy_global_to_shared(k, [b, g, row, 0], k_full.index(s), k_ring.index(2 * s))
            tma.async_copy_global_to_shared(k, [batch + b, g, row, 0], k_full.index(s), k_ring.index(2 * s + 1))
            tma.async_copy_global_to_shared(v, [b, g, row, 0], k_full.index(s), v_ring.index(s))
            step += 1


@gluon.jit
def _differentiate_queries(
    out, lse, d_q, delta, shift, scale, sizes, rings, GROUP: gl.constexpr, BK: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    items, tiles, batch, heads, tokens, rows, stride, span, first = sizes
    q_ring, d_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty = rings
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    step, turn = 0, 0
    units = batch * heads
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = tiles - 1 - item // units
        b, h = item % units // heads, item % heads
        at = tile * 128 + GROUP * 64
        stop = _ended(first + gl.minimum(tile * 128 + 128, tokens) - 1, rows, stride, span)
        line = at + gl.arange(0, 64, per_row)
        seen = _ended(first + line, rows, stride, span)
        least = _ended(first + at, rows, stride, span)
        plane = (b.to(gl.int64) * heads + h) * tokens
        total = gl.load(lse + plane + line, mask=line < tokens, other=float("-inf"))
        total = gl.where(total == float("-inf"), float("inf"), total * LOG2E)
        queries = q_ring.index(GROUP).reshape([64, D])
        d_outs = d_ring.index(GROUP).reshape([64, D])
        mbarrier.wait(q_full.index(GROUP), turn & 1)
        n = at + gl.arange(0, 64, down)
        kept = gl.load(out + (plane + n)[:, None] * D + columns, mask=(n < tokens)[:, None], other=0.0)
        less = gl.convert_layout(gl.sum(kept.to(gl.float32) * d_outs.load(across).to(gl.float32), 1), per_row)
        exact = gl.zeros([64], gl.float32, per_row)
        acc = gl.zeros([64, D], gl.float32, value)
        for row in range(0, stop, BK):
            s = wait_full(k_full, step)
            high = k_ring.index(2 * s).reshape([BK, D])
            low = k_ring.index(2 * s + 1).reshape([BK, D])
            values = v_ring.index(s).reshape([BK, D])
            zeros = gl.zeros([64, BK], gl.float32, score)
            scores = warpgroup_mma(queries, low.permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma(queries, high.permute((1, 0)), scores, is_async=True)
            zeros = gl.zeros([64, BK], gl.float32, score)
            d_weights = warpgroup_mma(d_outs, values.permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            weights = gl.exp2(scores * factor - total[:, None])
            if row + BK > least:
                r = row + gl.arange(0, BK, gl.SliceLayout(0, score))
                weights = gl.where(r[None, :] < seen[:, None], weights, 0.0)
            d_weights = warpgroup_mma_wait(0, deps=[d_weights])
            exact += gl.sum(weights * d_weights, 1)
            operand = gl.convert_layout((weights * (d_weights - less[:, None])).to(dtype), left)
            acc = warpgroup_mma(operand, high, acc)
            report(k_empty, s)
            step += 1
        gl.store(delta + plane + line, exact, line < tokens)
        gl.store(shift + plane + line, total, line < tokens)
        # the queries are done with: their place in shared memory is where the result leaves from
        q_ring.index(GROUP).reshape([64, D]).store((acc * scale).to(dtype))
        fence_async_shared()
        sync()
        tma.async_copy_shared_to_global(d_q, [b, h, at, 0], q_ring.index(GROUP))
        tma.store_wait(0)
        report(q_empty, GROUP)
        turn += 1


VARIES = ["tiles", "batch", "heads", "tokens", "rows", "stride", "span", "first"]


@gluon.jit(do_not_specialize=["items", *VARIES])
def ended_queries_hopper(
    q, d_out, k, v, d_q, out, lse, delta, shift, items, tiles, batch, heads, tokens, rows, stride, span, first, scale,
    REPEAT: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq, from a delta of the out that was kept; delta of the weights; lse in units of log 2, inf where it is -inf."""
    q_ring = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, D], q.layout)
    d_ring = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, D], d_out.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES * 2, 1, 1, BK, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BK, D], v.layout)
    q_full, q_empty = barriers(2, 1, 1)
    k_full, k_empty = barriers(STAGES, 1, 2)
    fence_async_shared()
    rings = q_ring, d_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty
    sizes = items, tiles, batch, heads, tokens, rows, stride, span, first
    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_differentiate_queries, (out, lse, d_q, delta, shift, scale, sizes, rings, 0, BK, D)),
        (_differentiate_queries, (out, lse, d_q, delta, shift, scale, sizes, rings, 1, BK, D)),
        (_load_for_queries, (q, d_out, k, v, sizes, rings, REPEAT, BK, D)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _steps_of(tokens, stride, span, first, pieces, length, ROWS: gl.constexpr, BQ: gl.constexpr, tiles):
    """Of this program: unit, first row, piece, first query, end of the queries, and tiles of queries of a head."""
    pid = gl.program_id(0)
    piece, tile, unit = pid % pieces, pid // pieces % tiles, pid // pieces // tiles
    row = tile * ROWS
    # the first query that sees the first of the rows
    begin = gl.maximum(row * stride + span - 1 - first, piece * length) // BQ * BQ
    stop = gl.minimum(piece * length + length, tokens)
    return unit, row, piece, begin, stop, gl.maximum(stop - begin + BQ - 1, 0) // BQ


@gluon.jit
def _load_for_rows(
    q, d_out, k, v, tiles, batch, heads, tokens, stride, span, first, pieces, length, rings,
    REPEAT: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    q_ring, d_ring, k_ring, v_ring, q_full, q_empty, k_full = rings
    unit, row, _, begin, _, steps = _steps_of(tokens, stride, span, first, pieces, length, 128, BQ, tiles)
    kv_heads = heads // REPEAT
    b, g = unit // kv_heads, unit % kv_heads
    if steps > 0:
        for group in gl.static_range(2):
            mbarrier.expect(k_full.index(group), 3 * 64 * D * 2)
            at = row + group * 64
            tma.async_copy_global_to_shared(k, [b, g, at, 0], k_full.index(group), k_ring.index(2 * group))
            tma.async_copy_global_to_shared(k, [batch + b, g, at, 0], k_full.index(group), k_ring.index(2 * group + 1))
            tma.async_copy_global_to_shared(v, [b, g, at, 0], k_full.index(group), v_ring.index(group))
        for step in range(steps * REPEAT):
            h, i = g * REPEAT + step // steps, begin + step % steps * BQ
            s = wait_empty(q_empty, step)
            mbarrier.expect(q_full.index(s), 2 * BQ * D * 2)
            tma.async_copy_global_to_shared(q, [b, h, i, 0], q_full.index(s), q_ring.index(s))
            tma.async_copy_global_to_shared(d_out, [b, h, i, 0], q_full.index(s), d_ring.index(s))


@gluon.jit
def _differentiate_rows(
    delta, shift, part_k, part_v, tiles, batch, heads, tokens, rows, stride, span, first, pieces, length, scale, rings,
    GROUP: gl.constexpr, REPEAT: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_ring, d_ring, k_ring, v_ring, q_full, q_empty, k_full = rings
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    per_query: gl.constexpr = gl.SliceLayout(0, score)
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    unit, row, piece, begin, stop, steps = _steps_of(tokens, stride, span, first, pieces, length, 128, BQ, tiles)
    kv_heads = heads // REPEAT
    b, g = unit // kv_heads, unit % kv_heads
    if steps > 0:
        ends = (row + GROUP * 64 + gl.arange(0, 64, per_row)) * stride + span - 1 - first
        latest = (row + GROUP * 64 + 63) * stride + span - 1 - first
        dk = gl.zeros([64, D], gl.float32, value)
        dv = gl.zeros([64, D], gl.float32, value)
        high = k_ring.index(2 * GROUP).reshape([64, D])
        low = k_ring.index(2 * GROUP + 1).reshape([64, D])
        values = v_ring.index(GROUP).reshape([64, D])
        mbarrier.wait(k_full.index(GROUP), 0)
        for step in range(steps * REPEAT):
            h, i = g * REPEAT + step // steps, begin + step % steps * BQ
            s = step % STAGES
            n = i + gl.arange(0, BQ, per_query)
            stat = (b.to(gl.int64) * heads + h) * tokens + n
            total = gl.load(shift + stat, mask=n < stop, other=float("inf"))
            less = gl.load(delta + stat, mask=n < stop, other=0.0)
            mbarrier.wait(q_full.index(s), step // STAGES & 1)
            queries = q_ring.index(s).reshape([BQ, D])
            d_outs = d_ring.index(s).reshape([BQ, D])
            zeros = gl.zeros([64, BQ], gl.float32, score)
            scores = warpgroup_mma(low, queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma(high, queries.permute((1, 0)), scores, is_async=True)
            zeros = gl.zeros([64, BQ], gl.float32, score)
            d_weights = warpgroup_mma(values, d_outs.permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            weights = gl.exp2(scores * factor - total[None, :])
            if i < latest:
                weights = gl.where(ends[:, None] <= n[None, :], weights, 0.0)
            operand = gl.convert_layout(weights.to(dtype), left)
            d_weights = warpgroup_mma_wait(0, deps=[d_weights])
            summed = warpgroup_mma(operand, d_outs, dv, is_async=True)
            d_operand = gl.convert_layout((weights * (d_weights - less[None, :])).to(dtype), left)
            product = warpgroup_mma(d_operand, queries, dk, is_async=True)
            dv, dk, operand, d_operand = warpgroup_mma_wait(0, deps=[summed, product, operand, d_operand])
            report(q_empty, s)
        r = row + GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, value))
        units = batch * kv_heads
        columns = gl.arange(0, D, gl.SliceLayout(0, value))[None, :]
        to = ((piece.to(gl.int64) * units + unit) * rows + r)[:, None] * D + columns
        gl.store(part_k + to, dk, mask=(r < rows)[:, None])
        gl.store(part_v + to, dv, mask=(r < rows)[:, None])


@gluon.jit(
    do_not_specialize=["tiles", "batch", "heads", "tokens", "rows", "stride", "span", "first", "pieces", "length"]
)
def ended_rows_hopper(
    q, d_out, k, v, delta, shift, part_k, part_v, tiles, batch, heads, tokens, rows, stride, span, first, pieces,
    length, scale, REPEAT: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the queries of a piece add to dk and dv of 128 rows: part_k and part_v [pieces, B, G, C, D]."""
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BQ, D], q.layout)
    d_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BQ, D], d_out.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [4, 1, 1, 64, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [2, 1, 1, 64, D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for s in gl.static_range(2):
        mbarrier.init(k_full.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_empty.index(s), count=2)
    fence_async_shared()
    rings = q_ring, d_ring, k_ring, v_ring, q_full, q_empty, k_full
    gl.warp_specialize([
        (_differentiate_rows, (
            delta, shift, part_k, part_v, tiles, batch, heads, tokens, rows, stride, span, first, pieces, length, scale,
            rings, 0, REPEAT, BQ, D, STAGES,
        )),
        (_differentiate_rows, (
            delta, shift, part_k, part_v, tiles, batch, heads, tokens, rows, stride, span, first, pieces, length, scale,
            rings, 1, REPEAT, BQ, D, STAGES,
        )),
        (_load_for_rows, (
            q, d_out, k, v, tiles, batch, heads, tokens, stride, span, first, pieces, length, rings, REPEAT, BQ, D,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


STAGES = {64: 4, 128: 3}  # by width: tiles of rows in flight
ROW_STAGES = {64: 4, 128: 3}  # tiles of queries in flight
ACROSS = 64  # rows that meet a tile of queries
BQ = {64: 64, 128: 32}  # by width: queries that meet a tile of rows
ROWS = 128  # of a program
FEWEST = 1024  # queries: dq of few rows needs a delta of the weights


def wants(q: Tensor, d_out: Tensor, values: Tensor, d_lse: Tensor | None) -> bool:
    """Whether the kernels take a call: 16 bits, one width, aligned, many queries, no gradient of lse, a Hopper GPU."""
    if q.dtype not in (torch.bfloat16, torch.float16) or d_lse is not None:
        return False
    if q.device.type == "cpu" or not on_hopper(q.device):
        return False
    if q.shape[3] not in STAGES or values.shape[3] != q.shape[3] or q.shape[2] < FEWEST:
        return False
    return aligned(q) and aligned(d_out)


def queries(
    q: Tensor, d_out: Tensor, planes: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_q: Tensor, delta: Tensor,
    shift: Tensor, stride: int, span: int, first: int, scale: float,
) -> None:  # fmt: skip
    """d_q, delta and shift; planes [2, B, G, C, D], v [B, G, C, D]."""
    batch, heads, tokens, width = q.shape
    tiles = -(-tokens // 128)
    items = batch * heads * tiles
    start(
        ended_queries_hopper, (min(items, processors(q.device)),),
        descriptor(q, 64), descriptor(d_out, 64), descriptor(planes.flatten(0, 1), ACROSS), descriptor(v, ACROSS),
        descriptor(d_q, 64), out, lse, delta, shift, items, tiles, batch, heads, tokens, v.shape[2], stride, span,
        first, scale, REPEAT=heads // v.shape[1], BK=ACROSS, D=width, STAGES=STAGES[width], num_warps=4,
    )  # fmt: skip


def rows(
    q: Tensor, d_out: Tensor, planes: Tensor, v: Tensor, delta: Tensor, shift: Tensor, part_k: Tensor, part_v: Tensor,
    length: int, stride: int, span: int, first: int, scale: float,
) -> None:  # fmt: skip
    """part_k and part_v, of pieces of so many queries."""
    batch, heads, tokens, width = q.shape
    pieces, _, kv_heads, many, _ = part_k.shape
    tiles = -(-many // ROWS)
    box = BQ[width]
    start(
        ended_rows_hopper, (batch * kv_heads * tiles * pieces,),
        descriptor(q, box), descriptor(d_out, box), descriptor(planes.flatten(0, 1), 64), descriptor(v, 64),
        delta, shift, part_k, part_v, tiles, batch, heads, tokens, many, stride, span, first, pieces, length, scale,
        REPEAT=heads // kv_heads, BQ=box, D=width, STAGES=ROW_STAGES[width], num_warps=4,
    )  # fmt: skip
