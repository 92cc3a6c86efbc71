"""attend on Hopper GPUs, forward: warps with roles, in Gluon.

A program stays on its multiprocessor and works through query tiles. Its loading warps only copy: they walk the lists
and keep rings of keys and values filled, running ahead into the next tile; whole blocks come through the tensor memory
accelerator, single rows and small groups through asynchronous copies. One or two groups of four computing warps own 64
queries each: the product for the next rows is under way while the softmax of these is taken. Barriers in shared memory
are all that passes between them.
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
    LN2,
    LOG2E,
    aligned,
    by_lane,
    descriptor,
    faded,
    fetch,
    from_words,
    on_hopper,
    processors,
    report,
    soften,
    soften_lazily,
    soften_scaled,
    sync,
    wait_empty,
    wait_full,
    words,
)
from farfield.kernels.replay import start
from farfield.ops.attend import Call


@gluon.jit
def _place(item, blocks, heads, TILES: gl.constexpr):
    """Item -> batch, head, query block, tile of the block."""
    unit = item // TILES // blocks
    return unit // heads, unit % heads, item // TILES % blocks, item % TILES


@gluon.jit
def _list(b, h, n, batch_lists, head_lists):
    """Number of this list; its lists are 0 apart where batches or heads share them."""
    return b.to(gl.int64) * batch_lists + h * head_lists + n


@gluon.jit
def _rows_of(index, count, at, picks, rows, K_BLOCK: gl.constexpr):
    """How many rows list `at` names: whole blocks, but for the end of a short last one."""
    listed = gl.load(count + at)
    named = listed * K_BLOCK
    if (rows % K_BLOCK != 0) & (listed > 0):
        last = gl.load(index + at * picks + listed - 1)
        named -= gl.maximum((last + 1) * K_BLOCK - rows, 0)
    return named


@gluon.jit
def _load_blocks(
    given, rings,
    REPEAT: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, Q_BLOCK: gl.constexpr, BK: gl.constexpr,
    SPLIT: gl.constexpr, Q_STAGES: gl.constexpr, CAUSAL: gl.constexpr, FAR: gl.constexpr, K_BLOCK: gl.constexpr,
):  # fmt: skip
    """Queries and the blocks of the first source, SPLIT tiles of each, by one warp.

    CAUSAL: rows behind the last query are not read, in the last block of a list at least.
    """
    (
        q, k, v, index, count, picks, batch_lists, head_lists, far_index, far_count, far_picks, far_batch_lists,
        far_head_lists, far_rows, rows, items, blocks, heads,
    ) = given  # fmt: skip
    counts, block_rows, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    PAIR: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, n, tile = _place(item, blocks, heads, TILES)
        g = h // REPEAT
        at = _list(b, h, n, batch_lists, head_lists)
        list_at = index + at * picks
        named = gl.load(count + at)
        filled = named * SPLIT
        if SPLIT > 1 and CAUSAL:
            end = gl.load(list_at + named - 1, mask=named > 0, other=0) * (BK * SPLIT) + BK * SPLIT
            behind = end - (n * Q_BLOCK + (tile + 1) * GROUPS * 64)
            filled -= gl.where(named > 0, gl.minimum(gl.maximum(behind // BK, 0), SPLIT), 0)
        # an empty list reads one block behind the last row, which is hidden: with a branch around these products
        # (Triton 3.6, sm_90) those of the second source read from outside shared memory
        listed = gl.maximum(filled, 1)
        far_listed = 0
        if FAR:
            far_at = _list(b, h, n, far_batch_lists, far_head_lists)
            far_listed = _rows_of(far_index, far_count, far_at, far_picks, far_rows, K_BLOCK)
        for group in gl.static_range(GROUPS):
            mbarrier.wait(q_empty.index(turn % Q_STAGES * GROUPS + group), turn // Q_STAGES & 1 ^ 1)
        which = gl.arange(0, 2, PAIR)
        counts.index(turn % Q_STAGES).store(gl.where(which == 0, listed, far_listed))
        sync()
        for group in gl.static_range(GROUPS):
            slot = turn % Q_STAGES * GROUPS + group
            first = n * Q_BLOCK + (tile * GROUPS + group) * 64
            fetch(q, [b, h, first, 0], q_full, q_ring, slot)
        turn += 1
        for j in range(listed):
            block = gl.load(list_at + j // SPLIT, mask=j < filled, other=0)
            row = gl.where(j < filled, block * (BK * SPLIT) + j % SPLIT * BK, rows)
            s = wait_empty(k_empty, step)
            block_rows.index(s).store(gl.full([1], row, gl.int32, ONE))
            sync()
            fetch(k, [b, g, row, 0], k_full, k_ring, s)
            wait_empty(v_empty, step)
            fetch(v, [b, g, row, 0], v_full, v_ring, s)
            step += 1


@gluon.jit
def _load_rows(
    given, rings, named, far_k_strides, far_v_strides,
    REPEAT: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr, K_BLOCK: gl.constexpr, BF: gl.constexpr,
    BIAS: gl.constexpr, SEGMENT: gl.constexpr,
):  # fmt: skip
    """The rows of the second source, gathered by two warps."""
    (
        far_k, far_v, far_bias, far_index, far_count, bias_batch, bias_head, far_picks, far_batch_lists,
        far_head_lists, far_rows, items, blocks, heads,
    ) = given  # fmt: skip
    fk_ring, fv_ring, bias_ring, far_full, far_empty = rings
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [2, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    tiles = named._reinterpret(gl.int32, [SEGMENT // BF, BF], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    far_step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, n, _ = _place(item, blocks, heads, TILES)
        g = h // REPEAT
        at = _list(b, h, n, far_batch_lists, far_head_lists)
        listed = _rows_of(far_index, far_count, at, far_picks, far_rows, K_BLOCK)
        far_at = far_index + at * far_picks
        k_at = far_k + b.to(gl.int64) * far_k_strides[0] + g.to(gl.int64) * far_k_strides[1]
        v_at = far_v + b.to(gl.int64) * far_v_strides[0] + g.to(gl.int64) * far_v_strides[1]
        bias_at = far_bias + b.to(gl.int64) * bias_batch + g.to(gl.int64) * bias_head
        for segment in range(0, listed, SEGMENT):
            # the rows that many tiles' worth of the list names: one wait for them instead of one a tile
            spot = segment + gl.arange(0, SEGMENT, flat)
            place = gl.load(far_at + spot // K_BLOCK, mask=spot < listed, other=0) * K_BLOCK + spot % K_BLOCK
            named.store(place)
            for c in range(gl.minimum(SEGMENT, listed - segment + BF - 1) // BF):
                start = segment + c * BF
                row = tiles.index(c).load(down).to(gl.int64)[:, None]
                there = (start + gl.arange(0, BF, down) < listed)[:, None]
                f = wait_empty(far_empty, far_step)
                # rows that are not there come as 0
                k_from = k_at + row * far_k_strides[2] + columns
                async_copy.async_copy_global_to_shared(fk_ring.index(f), k_from, mask=there)
                v_from = v_at + row * far_v_strides[2] + columns
                async_copy.async_copy_global_to_shared(fv_ring.index(f), v_from, mask=there)
                if BIAS:
                    there_b = start + gl.arange(0, BF, flat) < listed
                    b_from = bias_at + tiles.index(c).load(flat)
                    async_copy.async_copy_global_to_shared(bias_ring.index(f), b_from, mask=there_b)
                async_copy.mbarrier_arrive(far_full.index(f), increment_count=False)
                far_step += 1


@gluon.jit
def _hide(
    scores, row, first, at, least, rows, reach, sinks, layout: gl.constexpr, BK: gl.constexpr,
    CAUSAL: gl.constexpr, REACH: gl.constexpr, POSITION: gl.constexpr,
):  # fmt: skip
    """-inf where the queries from `first` on, or at positions `at`, must not see the rows from `row` on."""
    whole = row + BK <= rows
    if CAUSAL:
        whole &= row + BK <= least + 1
    if REACH:
        whole &= (first + 64 - row <= reach) & (row + BK - first <= reach)
    if not whole:
        if POSITION:
            i = at[:, None]
        else:
            i = first + gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
        r = row + gl.arange(0, BK, gl.SliceLayout(0, layout))[None, :]
        seen = r < rows
        if CAUSAL:
            seen &= r <= i
        if REACH:
            seen &= ((i - r < reach) & (r - i < reach)) | (r < sinks)
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def _weigh(scores, bias_at, start, listed, factor, layout: gl.constexpr, BF: gl.constexpr, BIAS: gl.constexpr):
    """Products as logits in units of log 2: scaled, with the rows' bias, -inf where no row was listed."""
    scores = scores * factor
    if BIAS:
        scores += (bias_at.load(gl.SliceLayout(0, layout)) * LOG2E)[None, :]
    if start + BF > listed:
        there = start + gl.arange(0, BF, gl.SliceLayout(0, layout)) < listed
        scores = gl.where(there[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _soften(scores, peak, mass, factor, LAZILY: gl.constexpr):
    """One step of the running softmax; LAZILY: `mass` is kept as `by_lane` has it."""
    if LAZILY:
        found = soften_lazily(scores, peak, mass, factor)
    else:
        found = soften_scaled(scores, peak, mass, factor)
    return found


@gluon.jit
def _operand(carried, dtype: gl.constexpr, left: gl.constexpr, LAZILY: gl.constexpr):
    """The weights that a loop has carried, as a product's left operand."""
    if LAZILY:
        carried = from_words(carried, dtype, left)
    return carried


@gluon.jit
def _compute(
    given, rings, far_rings,
    GROUP: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, Q_BLOCK: gl.constexpr,
    BK: gl.constexpr, D: gl.constexpr, E: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, REACH: gl.constexpr, POSITION: gl.constexpr,
    FAR: gl.constexpr, BF: gl.constexpr, FAR_STAGES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    (
        out, lse, position, position_b, position_h, items, blocks, heads, tokens, rows, reach, sinks, scale,
    ) = given  # fmt: skip
    counts, block_rows, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    fk_ring, fv_ring, bias_ring, far_full, far_empty = far_rings
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    of_value: gl.constexpr = gl.SliceLayout(1, value)
    dtype: gl.constexpr = q_ring.dtype
    # in tiles of 128 rows weights are carried whole as they are, and the rest was slower; others were not timed
    LAZILY: gl.constexpr = BK == 64 and GROUPS == 1 and not FAR
    PAIR: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    factor = scale * LOG2E
    step, far_step, turn = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, n, tile = _place(item, blocks, heads, TILES)
        inside = (tile * GROUPS + GROUP) * 64
        first = n * Q_BLOCK + inside
        at, least = first, first
        if POSITION:
            position_at = position + b.to(gl.int64) * position_b + h.to(gl.int64) * position_h
            line = first + gl.arange(0, 64, per_row)
            at = gl.load(position_at + line, mask=line < tokens, other=EVERY)
            # every warp holds all of them, so that the least is found within a warp
            line = first + gl.arange(0, 64, PAIR)
            least = gl.min(gl.load(position_at + line, mask=line < tokens, other=EVERY), 0)

        peak = gl.full([64], float("-inf"), gl.float32, per_row)
        acc = gl.zeros([64, E], gl.float32, value)
        scores = gl.zeros([64, BK], gl.float32, score)
        if LAZILY:
            mass = by_lane(scores)
        else:
            mass = gl.zeros([64], gl.float32, per_row)
        slot = turn % Q_STAGES * GROUPS + GROUP
        queries = q_ring.index(slot).reshape([64, D])
        mbarrier.wait(q_full.index(slot), turn // Q_STAGES & 1)
        which = gl.arange(0, 2, PAIR)
        pair = counts.index(turn % Q_STAGES).load(PAIR)
        listed = gl.sum(gl.where(which == 0, pair, 0), 0)
        far_listed = gl.sum(gl.where(which == 1, pair, 0), 0)
        s = wait_full(k_full, step)
        row = gl.max(block_rows.index(s).load(ONE), 0)
        keys = k_ring.index(s).reshape([BK, D]).permute((1, 0))
        scores = warpgroup_mma(queries, keys, scores, use_acc=False)
        report(k_empty, s)
        scores = _hide(scores, row, first, at, least, rows, reach, sinks, score, BK, CAUSAL, REACH, POSITION)
        weights, peak, mass, fade = _soften(scores, peak, mass, factor, LAZILY)
        if LAZILY:
            carried = words(weights, dtype)
        else:
            carried = gl.convert_layout(weights.to(dtype), left)
        for _ in range(1, listed):
            last = step % STAGES
            last_phase = step // STAGES & 1
            step += 1
            s = wait_full(k_full, step)
            row = gl.max(block_rows.index(s).load(ONE), 0)
            keys = k_ring.index(s).reshape([BK, D]).permute((1, 0))
            product = warpgroup_mma(queries, keys, scores, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(last), last_phase)
            operand = _operand(carried, dtype, left, LAZILY)
            summed = warpgroup_mma(operand, v_ring.index(last).reshape([BK, E]), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[product])
            report(k_empty, s)
            scores = _hide(scores, row, first, at, least, rows, reach, sinks, score, BK, CAUSAL, REACH, POSITION)
            weights, peak, mass, fade = _soften(scores, peak, mass, factor, LAZILY)
            acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
            report(v_empty, last)
            if LAZILY:
                carried = words(weights, dtype)
                acc = faded(acc, fade)
            else:
                acc = acc * gl.convert_layout(fade, of_value)[:, None]
                carried = gl.convert_layout(weights.to(dtype), left)
        last = wait_full(v_full, step)
        acc = warpgroup_mma(_operand(carried, dtype, left, LAZILY), v_ring.index(last).reshape([BK, E]), acc)
        report(v_empty, last)
        step += 1
        if LAZILY:
            mass = gl.convert_layout(gl.sum(mass, 1), per_row)
        if FAR:
            far_score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BF, 16])
            of_far: gl.constexpr = gl.SliceLayout(1, far_score)
            peak = gl.convert_layout(peak, of_far)
            mass = gl.convert_layout(mass, of_far)
            far_scores = gl.zeros([64, BF], gl.float32, far_score)
            if far_listed > 0:
                f = wait_full(far_full, far_step)
                # these copies were ordinary writes to shared memory; the tensor cores read it another way
                fence_async_shared()
                far_scores = warpgroup_mma(queries, fk_ring.index(f).permute((1, 0)), far_scores, use_acc=False)
                far_scores = _weigh(far_scores, bias_ring.index(f), 0, far_listed, factor, far_score, BF, BIAS)
                far_weights, peak, mass, far_fade = soften(far_scores, peak, mass)
                acc = acc * gl.convert_layout(far_fade, of_value)[:, None]
                far_operand = gl.convert_layout(far_weights.to(dtype), left)
                for start in range(BF, far_listed, BF):
                    before = far_step % FAR_STAGES
                    far_step += 1
                    f = wait_full(far_full, far_step)
                    fence_async_shared()
                    product = warpgroup_mma(
                        queries, fk_ring.index(f).permute((1, 0)), far_scores, use_acc=False, is_async=True
                    )
                    summed = warpgroup_mma(far_operand, fv_ring.index(before), acc, is_async=True)
                    far_scores = warpgroup_mma_wait(1, deps=[product])
                    far_scores = _weigh(far_scores, bias_ring.index(f), start, far_listed, factor, far_score, BF, BIAS)
                    far_weights, peak, mass, far_fade = soften(far_scores, peak, mass)
                    acc, far_operand = warpgroup_mma_wait(0, deps=[summed, far_operand])
                    report(far_empty, before)
                    acc = acc * gl.convert_layout(far_fade, of_value)[:, None]
                    far_operand = gl.convert_layout(far_weights.to(dtype), left)
                f = far_step % FAR_STAGES
                acc = warpgroup_mma(far_operand, fv_ring.index(f), acc)
                report(far_empty, f)
                far_step += 1
            peak = gl.convert_layout(peak, per_row)
            mass = gl.convert_layout(mass, per_row)
        # one division a query, not one a value
        share = 1.0 / gl.where(mass > 0, mass, 1.0)
        acc = acc * gl.convert_layout(share, of_value)[:, None]
        # the queries are done with: their place in shared memory is where the result leaves from
        q_ring.index(slot).reshape([64, D]).store(acc.to(dtype))
        fence_async_shared()
        sync()
        tma.async_copy_shared_to_global(out, [b, h, first, 0], q_ring.index(slot))
        at = first + gl.arange(0, 64, per_row)
        lse_at = lse + (b.to(gl.int64) * heads + h) * tokens
        # log2(0) = -inf is what a query that read nothing has
        gl.store(lse_at + at, (peak + gl.log2(mass)) * LN2, at < tokens)
        tma.store_wait(0)
        report(q_empty, slot)
        turn += 1


# what varies with the length or the step must not make another kernel. Inside a tuple it would: the strides of the far
# rows are multiples of their width at any length
VARIES = ["items", "blocks", "heads", "tokens", "rows", "reach", "sinks", "picks", "batch_lists", "head_lists"]
VARIES += ["bias_batch", "bias_head", "far_picks", "far_batch_lists", "far_head_lists", "far_rows"]
VARIES += ["position_b", "position_h"]


@gluon.jit(do_not_specialize=VARIES)
def attend_hopper(
    q, k, v, out, lse, index, count, far_k, far_v, far_bias, far_index, far_count, far_k_strides, far_v_strides,
    position, position_b, position_h, picks, batch_lists, head_lists, bias_batch, bias_head, far_picks,
    far_batch_lists, far_head_lists, far_rows,
    items, blocks, heads, tokens, rows, reach, sinks, scale,
    REPEAT: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, Q_BLOCK: gl.constexpr,
    BK: gl.constexpr, SPLIT: gl.constexpr, D: gl.constexpr, E: gl.constexpr, Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, REACH: gl.constexpr, POSITION: gl.constexpr,
    FAR: gl.constexpr, K_BLOCK: gl.constexpr, BF: gl.constexpr, FAR_STAGES: gl.constexpr, BIAS: gl.constexpr,
    SEGMENT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES * GROUPS, 1, 1, 64, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BK, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BK, E], v.layout)
    # how many entries the two lists of a tile have
    counts = gl.allocate_shared_memory(gl.int32, [Q_STAGES, 2], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # where the block of a stage begins
    block_rows = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES * GROUPS, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES * GROUPS, 1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for s in gl.static_range(Q_STAGES * GROUPS):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_empty.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=GROUPS)
        mbarrier.init(v_empty.index(s), count=GROUPS)
    fk_ring, fv_ring, bias_ring, far_full, far_empty = q_ring, q_ring, q_ring, q_full, q_empty
    if FAR:
        # the next tile's keys are waited for while this one's values hold their place
        gl.static_assert(FAR_STAGES > 1)
        rows_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BF, D], q.dtype)
        rows_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BF, E], q.dtype)
        fk_ring = gl.allocate_shared_memory(q.dtype, [FAR_STAGES, BF, D], rows_k)
        fv_ring = gl.allocate_shared_memory(q.dtype, [FAR_STAGES, BF, E], rows_v)
        bias_ring = gl.allocate_shared_memory(gl.float32, [FAR_STAGES, BF], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        named = gl.allocate_shared_memory(gl.int32, [SEGMENT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        far_full = gl.allocate_shared_memory(gl.int64, [FAR_STAGES, 1], bars)
        far_empty = gl.allocate_shared_memory(gl.int64, [FAR_STAGES, 1], bars)
        for s in gl.static_range(FAR_STAGES):
            # every loading thread reports its own copies
            mbarrier.init(far_full.index(s), count=64)
            mbarrier.init(far_empty.index(s), count=GROUPS)
    fence_async_shared()

    rings = counts, block_rows, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty
    far_rings = fk_ring, fv_ring, bias_ring, far_full, far_empty
    computing = out, lse, position, position_b, position_h, items, blocks, heads, tokens, rows, reach, sinks, scale
    gathering = (
        far_k, far_v, far_bias, far_index, far_count, bias_batch, bias_head, far_picks, far_batch_lists,
        far_head_lists, far_rows, items, blocks, heads,
    )  # fmt: skip
    loading = (
        q, k, v, index, count, picks, batch_lists, head_lists, far_index, far_count, far_picks, far_batch_lists,
        far_head_lists, far_rows, rows, items, blocks, heads,
    )  # fmt: skip
    # constants stay constants only where they are written into the call
    if GROUPS == 1 and FAR:
        gl.warp_specialize([
            (_compute, (
                computing, rings, far_rings, 0, TILES, GROUPS, Q_BLOCK, BK, D, E, Q_STAGES, STAGES, CAUSAL, REACH,
                POSITION, FAR, BF, FAR_STAGES, BIAS,
            )),
            (_load_rows, (
                gathering, far_rings, named, far_k_strides, far_v_strides, REPEAT, TILES, D, K_BLOCK, BF, BIAS, SEGMENT,
            )),
            (_load_blocks, (
                loading, rings, REPEAT, TILES, GROUPS, Q_BLOCK, BK, SPLIT, Q_STAGES, CAUSAL and not POSITION,
                FAR, K_BLOCK,
            )),
        ], [2, 1], [REGISTERS, REGISTERS])  # fmt: skip
    elif GROUPS == 1:
        gl.warp_specialize([
            (_compute, (
                computing, rings, far_rings, 0, TILES, GROUPS, Q_BLOCK, BK, D, E, Q_STAGES, STAGES, CAUSAL, REACH,
                POSITION, FAR, BF, FAR_STAGES, BIAS,
            )),
            (_load_blocks, (
                loading, rings, REPEAT, TILES, GROUPS, Q_BLOCK, BK, SPLIT, Q_STAGES, CAUSAL and not POSITION,
                FAR, K_BLOCK,
            )),
        ], [1], [24])  # fmt: skip
    elif FAR:
        gl.warp_specialize([
            (_compute, (
                computing, rings, far_rings, 0, TILES, GROUPS, Q_BLOCK, BK, D, E, Q_STAGES, STAGES, CAUSAL, REACH,
                POSITION, FAR, BF, FAR_STAGES, BIAS,
            )),
            (_compute, (
                computing, rings, far_rings, 1, TILES, GROUPS, Q_BLOCK, BK, D, E, Q_STAGES, STAGES, CAUSAL, REACH,
                POSITION, FAR, BF, FAR_STAGES, BIAS,
            )),
            (_load_rows, (
                gathering, far_rings, named, far_k_strides, far_v_strides, REPEAT, TILES, D, K_BLOCK, BF, BIAS, SEGMENT,
            )),
            (_load_blocks, (
                loading, rings, REPEAT, TILES, GROUPS, Q_BLOCK, BK, SPLIT, Q_STAGES, CAUSAL and not POSITION,
                FAR, K_BLOCK,
            )),
        ], [4, 2, 1], [(504 - REGISTERS) // 16 * 8, REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (
                computing, rings, far_rings, 0, TILES, GROUPS, Q_BLOCK, BK, D, E, Q_STAGES, STAGES, CAUSAL, REACH,
                POSITION, FAR, BF, FAR_STAGES, BIAS,
            )),
            (_compute, (
                computing, rings, far_rings, 1, TILES, GROUPS, Q_BLOCK, BK, D, E, Q_STAGES, STAGES, CAUSAL, REACH,
                POSITION, FAR, BF, FAR_STAGES, BIAS,
            )),
            (_load_blocks, (
                loading, rings, REPEAT, TILES, GROUPS, Q_BLOCK, BK, SPLIT, Q_STAGES, CAUSAL and not POSITION,
                FAR, K_BLOCK,
            )),
        ], [4, 1], [240, 24])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        groups: computing groups of 64 queries a program.
        q_stages, stages, far_stages: tiles of queries, blocks, and tiles of gathered rows (two at least) in flight.
        far_rows: rows of a gathered tile.
        programs: programs a multiprocessor.
        registers: of a thread at the start of the kernel; None: all there are.
        loading: registers of a thread that loads. The computing ones get the rest.
        split: tiles of a block of the first source.
    """

    groups: int
    stages: int
    programs: int = 1
    registers: int | None = None
    q_stages: int = 2
    far_rows: int = 64
    far_stages: int = 2
    loading: int = 24
    split: int = 1


# (width, queries of a block, rows of a block, second source) -> tiles, by measurements on an H200; 64 stands for the
# queries of blocks that do not split into 128
TILES = {
    (64, 128, 128, False): Tiles(2, 2),
    (128, 128, 128, False): Tiles(2, 2),
    (64, 64, 64, False): Tiles(1, 2, programs=3, registers=80),
    (128, 64, 64, False): Tiles(1, 2, programs=2, registers=128),
    (64, 64, 64, True): Tiles(1, 1, programs=3, registers=80, loading=40),
    (128, 64, 64, True): Tiles(1, 1, programs=2, registers=128, far_rows=32, loading=40),
    (64, 128, 128, True): Tiles(1, 1, programs=3, registers=80, loading=40, split=2),
    (128, 128, 128, True): Tiles(2, 1, q_stages=1, far_stages=3, loading=56),
    # not measured: they fit
    (64, 64, 128, False): Tiles(1, 2, programs=2, registers=128),
    (128, 64, 128, False): Tiles(1, 2),
    (64, 128, 64, False): Tiles(2, 3),
    (128, 128, 64, False): Tiles(2, 3),
    (64, 64, 128, True): Tiles(1, 1, programs=2, registers=128, loading=40),
    (128, 64, 128, True): Tiles(1, 1, far_rows=32, loading=40),
    (64, 128, 64, True): Tiles(2, 2, loading=56),
    (128, 128, 64, True): Tiles(2, 2, loading=56),
}
SEGMENT = 256  # gathered rows whose numbers are looked up at a time


def wants(call: Call) -> bool:
    """Whether this kernel takes the call: whole blocks and gathered rows of 16-bit numbers, on a Hopper GPU."""
    return not call.plans[0].q_block % 64 and suits(call)


def suits(call: Call) -> bool:
    """Whether kernels for Hopper GPUs can read such rows and blocks, for tiles of queries of any kind."""
    q, k, v, bias, end, row_group, position, group, _, _, plans, scale = call
    if q.dtype not in (torch.bfloat16, torch.float16) or not on_hopper(q.device):
        return False
    if not q.shape[-1] == v[0].shape[-1] in (64, 128) or scale <= 0 or not k[0].shape[2]:
        return False
    if any(x.dim() > 1 for x in (group, *end, *row_group, bias[0])):
        return False
    if position.dim() > 1 and (len(k) > 1 or plans[0].reach >= 0):
        return False
    if plans[0].k_block not in (64, 128):
        return False
    if not all(aligned(x) for x in (q, *k, *v)):
        return False
    if len(k) == 1:
        return True
    far, near_heads = plans[1], k[0].shape[1]
    if far.causal or far.reach >= 0 or far.k_block not in (1, 2, 4, 8, 16, 32) or not k[1].shape[2]:
        return False
    return k[1].shape[1] == near_heads and (bias[1].dim() == 1 or bias[1].shape[1] in (1, near_heads))


def forward(call: Call, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T], written into `lse` if given; the contract is ops.attend's."""
    q, k, v, bias, _, _, position, _, index, count, plans, scale = call
    batch, heads, tokens, width = q.shape
    near, far, two = plans[0], plans[-1], len(k) > 1
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32) if lse is None else lse
    blocks = index[0].shape[2]
    tiles = TILES[width, 64 if near.q_block % 128 else 128, near.k_block, two]
    parts = near.q_block // (64 * tiles.groups)
    items = batch * heads * blocks * parts
    tile_rows = near.k_block // tiles.split
    near_lists = _lists(index[0], count[0])
    far_lists = _lists(index[1], count[1]) if two else near_lists
    positioned = position.dim() > 1 and bool(near.causal)
    if positioned:
        # rows are their own positions, and fewer than 2**30
        position = position.contiguous() if position.dtype == torch.int32 else position.clamp(-1, EVERY.value).int()
    at = [0 if n == 1 else s for n, s in zip(position.shape[:2], position.stride(), strict=False)]
    weighted = bias[-1].dim() > 1
    far_bias = bias[-1].float().contiguous() if weighted else lse
    bias_strides = [0 if n == 1 else s for n, s in zip(far_bias.shape[:2], far_bias.stride(), strict=False)]
    bounds = {} if tiles.registers is None else {"maxnreg": tiles.registers}
    start(
        attend_hopper, (min(items, processors(q.device) * tiles.programs),),
        descriptor(q, 64), descriptor(k[0], tile_rows), descriptor(v[0], tile_rows), descriptor(out, 64),
        lse, *near_lists[:2], k[-1], v[-1], far_bias, *far_lists[:2],
        k[-1].stride(), v[-1].stride(), position if positioned else lse, *(at if positioned else (0, 0)),
        *near_lists[2:], *bias_strides, *far_lists[2:], k[-1].shape[2],
        items, blocks, heads, tokens, k[0].shape[2], near.reach, near.sinks, scale,
        REPEAT=heads // k[0].shape[1], TILES=parts, GROUPS=tiles.groups, Q_BLOCK=near.q_block, BK=tile_rows,
        SPLIT=tiles.split, D=width, E=width, Q_STAGES=tiles.q_stages, STAGES=tiles.stages, CAUSAL=bool(near.causal),
        REACH=near.reach >= 0, POSITION=positioned, FAR=two, K_BLOCK=far.k_block if two else 1, BF=tiles.far_rows,
        FAR_STAGES=tiles.far_stages, BIAS=weighted, SEGMENT=SEGMENT, REGISTERS=tiles.loading,
        num_warps=4, **bounds,
    )  # fmt: skip
    return out, lse


def _lists(index: Tensor, count: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """Lists [1|B, 1|H, N, P] one behind the other, how long each is, how far those of batches and heads are apart."""
    batches, heads, blocks, picks = index.shape
    apart = 0 if batches == 1 else heads * blocks, 0 if heads == 1 else blocks
    return index.contiguous(), count.contiguous(), picks, *apart
