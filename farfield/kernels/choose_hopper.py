"""Choices by score on Hopper GPUs: the attention over rows that end, and the best blocks; warps with roles, in Gluon.

As in kernels.attend_hopper one warp copies tiles through the tensor memory accelerator and two groups of four warps
own 64 queries each; a program stays on its multiprocessor and works through tiles of 128 queries, longest first. Rows
are two numbers of the queries' dtype, `planes` [2, B, G, C, D], and a score is two products into one accumulator.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from farfield.kernels.attend import padded
from farfield.kernels.hopper import (
    LN2,
    LOG2E,
    aligned,
    barriers,
    descriptor,
    fetch,
    on_hopper,
    processors,
    report,
    soften_scaled,
    sync,
    wait_empty,
    wait_full,
)
from farfield.kernels.replay import start
from farfield.ops.choose import Scoring


@gluon.jit
def _ended(token, rows, stride, span):
    """How many rows have ended at a token or before it."""
    return gl.minimum(gl.maximum(token + 1 - span + stride, 0) // stride, rows)


@gluon.jit
def _product(queries, k_ring, s, scores, BK: gl.constexpr, D: gl.constexpr):
    """Scores of a tile of rows, under way: the smaller numbers of the rows first."""
    scores = warpgroup_mma(
        queries, k_ring.index(2 * s + 1).reshape([BK, D]).permute((1, 0)), scores, use_acc=False, is_async=True
    )
    return warpgroup_mma(queries, k_ring.index(2 * s).reshape([BK, D]).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _load_ended(
    q, k, v, sizes, rings, REPEAT: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr,
    VALUES: gl.constexpr,
):  # fmt: skip
    """Queries, both numbers of the rows, and values, by one warp."""
    items, tiles, batch, heads, tokens, rows, stride, span, first = sizes
    q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    step, turn = 0, 0
    units = batch * heads
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = tiles - 1 - item // units
        b, h = item % units // heads, item % heads
        g = h // REPEAT
        stop = _ended(first + gl.minimum(tile * 128 + 128, tokens) - 1, rows, stride, span)
        for group in gl.static_range(2):
            slot = turn % Q_STAGES * 2 + group
            mbarrier.wait(q_empty.index(slot), turn // Q_STAGES & 1 ^ 1)
            mbarrier.expect(q_full.index(slot), 64 * D * 2)
            at = tile * 128 + group * 64
            tma.async_copy_global_to_shared(q, [b, h, at, 0], q_full.index(slot), q_ring.index(slot))
        turn += 1
        # where no row has ended one tile is read, and hidden
        for row in range(0, gl.maximum(stop, 1), BK):
            s = wait_empty(k_empty, step)
            mbarrier.expect(k_full.index(s), 2 * BK * D * 2)
            tma.async_copy_global_to_shared(k, [b, g, row, 0], k_full.index(s), k_ring.index(2 * s))
            tma.async_copy_global_to_shared(k, [batch + b, g, row, 0], k_full.index(s), k_ring.index(2 * s + 1))
            if VALUES:
                wait_empty(v_empty, step)
                fetch(v, [b, g, row, 0], v_full, v_ring, s)
            step += 1


@gluon.jit
def _soften(scores, peak, mass, factor, row, seen, least, layout: gl.constexpr, BK: gl.constexpr):
    """One step of the running softmax in units of log 2, from raw products; rows that have not ended are hidden."""
    if row + BK > least:
        r = row + gl.arange(0, BK, gl.SliceLayout(0, layout))
        scores = gl.where(r[None, :] < seen[:, None], scores, float("-inf"))
    return soften_scaled(scores, peak, mass, factor)


@gluon.jit
def _attend_ended(
    out, lse, scale, sizes, rings,
    GROUP: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, E: gl.constexpr, Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    items, tiles, batch, heads, tokens, rows, stride, span, first = sizes
    q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    of_value: gl.constexpr = gl.SliceLayout(1, value)
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    step, turn = 0, 0
    units = batch * heads
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = tiles - 1 - item // units
        b, h = item % units // heads, item % heads
        at = tile * 128 + GROUP * 64
        stop = gl.maximum(_ended(first + gl.minimum(tile * 128 + 128, tokens) - 1, rows, stride, span), 1)
        seen = _ended(first + at + gl.arange(0, 64, per_row), rows, stride, span)
        least = _ended(first + at, rows, stride, span)
        peak = gl.full([64], float("-inf"), gl.float32, per_row)
        mass = gl.zeros([64], gl.float32, per_row)
        acc = gl.zeros([64, E], gl.float32, value)
        scores = gl.zeros([64, BK], gl.float32, score)
        slot = turn % Q_STAGES * 2 + GROUP
        queries = q_ring.index(slot).reshape([64, D])
        mbarrier.wait(q_full.index(slot), turn // Q_STAGES & 1)
        s = wait_full(k_full, step)
        scores = warpgroup_mma_wait(0, deps=[_product(queries, k_ring, s, scores, BK, D)])
        report(k_empty, s)
        weights, peak, mass, fade = _soften(scores, peak, mass, factor, 0, seen, least, score, BK)
        if VALUES:
            operand = gl.convert_layout(weights.to(dtype), left)
        for row in range(BK, stop, BK):
            last = step % STAGES
            last_phase = step // STAGES & 1
            step += 1
            s = wait_full(k_full, step)
            product = _product(queries, k_ring, s, scores, BK, D)
            if VALUES:
                mbarrier.wait(v_full.index(last), last_phase)
                summed = warpgroup_mma(operand, v_ring.index(last).reshape([BK, E]), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[product])
            else:
                scores = warpgroup_mma_wait(0, deps=[product])
            report(k_empty, s)
            weights, peak, mass, fade = _soften(scores, peak, mass, factor, row, seen, least, score, BK)
            if VALUES:
                acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
                report(v_empty, last)
                acc = acc * gl.convert_layout(fade, of_value)[:, None]
                operand = gl.convert_layout(weights.to(dtype), left)
        if VALUES:
            last = wait_full(v_full, step)
            acc = warpgroup_mma(operand, v_ring.index(last).reshape([BK, E]), acc)
            report(v_empty, last)
        step += 1
        line = at + gl.arange(0, 64, per_row)
        lse_at = lse + (b.to(gl.int64) * heads + h) * tokens
        # log2(0) = -inf is what a query before the end of the first row has
        gl.store(lse_at + line, (peak + gl.log2(mass)) * LN2, line < tokens)
        if VALUES:
            share = 1.0 / gl.where(mass > 0, mass, 1.0)
            acc = acc * gl.convert_layout(share, of_value)[:, None]
            # the queries are done with: their place in shared memory is where the result leaves from
            q_ring.index(slot).reshape([64, D]).store(acc.to(dtype))
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(out, [b, h, at, 0], q_ring.index(slot))
            tma.store_wait(0)
        report(q_empty, slot)
        turn += 1


VARIES = ["items", "tiles", "batch", "heads", "tokens", "rows", "stride", "span", "first"]


@gluon.jit(do_not_specialize=VARIES)
def ended_hopper(
    q, k, v, out, lse, items, tiles, batch, heads, tokens, rows, stride, span, first, scale,
    REPEAT: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, E: gl.constexpr, Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES * 2, 1, 1, 64, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES * 2, 1, 1, BK, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BK, E], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES * 2, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES * 2, 1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for s in gl.static_range(Q_STAGES * 2):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_empty.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=2)
        mbarrier.init(v_empty.index(s), count=2)
    fence_async_shared()
    rings = q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty
    sizes = items, tiles, batch, heads, tokens, rows, stride, span, first
    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_attend_ended, (out, lse, scale, sizes, rings, 0, BK, D, E, Q_STAGES, STAGES, VALUES)),
        (_attend_ended, (out, lse, scale, sizes, rings, 1, BK, D, E, Q_STAGES, STAGES, VALUES)),
        (_load_ended, (q, k, v, sizes, rings, REPEAT, BK, D, Q_STAGES, VALUES)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _past(tile, tokens, first, local, BLOCK: gl.constexpr):
    """Blocks that some query of a tile may choose: those before the last query's local ones."""
    return gl.maximum((first + gl.minimum(tile * 128 + 128, tokens) - 1) // BLOCK - local + 1, 0)


@gluon.jit
def _load_scored(
    q, k, items, tiles, units, lists, tokens, first, local, rings,
    STACK: gl.constexpr, REPEAT: gl.constexpr, BLOCK: gl.constexpr, PER_BLOCK: gl.constexpr, D: gl.constexpr,
    BJ: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """The query heads of a list, and the rows of BJ blocks: the first of each, the second, and so on."""
    q_ring, k_ring, q_full, q_empty, k_full, k_empty = rings
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = tiles - 1 - item // units
        unit = item % units
        b, u = unit // lists, unit % lists
        source = unit
        if STACK == 1:
            source = unit // REPEAT
        for group in gl.static_range(2):
            slot = turn % Q_STAGES * 2 + group
            mbarrier.wait(q_empty.index(slot), turn // Q_STAGES & 1 ^ 1)
            mbarrier.expect(q_full.index(slot), STACK * 64 * D * 2)
            for r in gl.static_range(STACK):
                at = tile * 128 + group * 64
                tma.async_copy_global_to_shared(
                    q, [b, u * STACK + r, at, 0], q_full.index(slot), q_ring.index(slot * STACK + r)
                )
        turn += 1
        for begin in range(0, _past(tile, tokens, first, local, BLOCK), BJ):
            for o in range(PER_BLOCK):
                s = wait_empty(k_empty, step)
                fetch(k, [source, o, 0, begin, 0], k_full, k_ring, s)
                step += 1


def _shift(columns: int) -> str:
    """What a thread does that holds so many columns of a row, in the order of the lanes: each moves on by one."""
    n = columns
    lines = [f"mov.b32 t{i}, ${n + i};" for i in range(n)]
    lines += [f"shfl.sync.up.b32 t{n}, t{n - 1}, 1, 0, 0xffffffff;"]
    lines += [f"selp.b32 $0, ${2 * n}, t{n}, p;"] + [f"mov.b32 ${i}, t{i - 1};" for i in range(1, n)]
    head = f"{{ .reg .pred p; .reg .b32 l; .reg .b32 t<{n + 1}>; mov.u32 l, %laneid; and.b32 l, l, 3; "
    return head + "setp.eq.u32 p, l, 0; " + " ".join(lines) + " }"


SHIFT_16 = gl.constexpr(_shift(16))
REGISTERS_16 = gl.constexpr(",".join(["=r"] * 16 + ["r"] * 32))


@gluon.jit
def _best(
    index, count, others, free_count, named, lse, scale, sizes, rings,
    GROUP: gl.constexpr, STACK: gl.constexpr, BLOCK: gl.constexpr, PER_BLOCK: gl.constexpr, PER_ROW: gl.constexpr,
    D: gl.constexpr, BJ: gl.constexpr, BEST: gl.constexpr, PICKS: gl.constexpr, Q_STAGES: gl.constexpr,
    SHARES: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    items, tiles, units, lists, heads, tokens, early, first, initial, local, picks = sizes
    q_ring, k_ring, q_full, q_empty, k_full, k_empty = rings
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BJ, 16])
    both: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BJ, 16])
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    # a row of a tile lies in four lanes, and so does everything that is kept for its query
    wide: gl.constexpr = gl.BlockedLayout([1, BJ // 4], [8, 4], [4, 1], [1, 0])
    kept: gl.constexpr = gl.BlockedLayout([1, BEST // 4], [8, 4], [4, 1], [1, 0])
    listed_in: gl.constexpr = gl.BlockedLayout([1, PICKS // 4 if PICKS >= 4 else 1], [8, 4], [4, 1], [1, 0])
    line: gl.constexpr = gl.SliceLayout(1, wide)
    of_kept: gl.constexpr = gl.SliceLayout(1, kept)
    of_list: gl.constexpr = gl.SliceLayout(1, listed_in)
    # every warp holds all 64, so that nothing passes between warps but this
    everywhere: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    factor = scale * LOG2E
    scored = picks - initial - local
    columns = gl.arange(0, BJ, gl.SliceLayout(0, wide))
    slot = gl.arange(0, BEST, gl.SliceLayout(0, kept))
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = tiles - 1 - item // units
        unit = item % units
        b, u = unit // lists, unit % lists
        at = tile * 128 + GROUP * 64
        totals = ()
        if SHARES:
            n = at + gl.arange(0, 64, per_row)
            for r in gl.static_range(STACK):
                lse_at = lse + (b.to(gl.int64) * heads + u * STACK + r) * tokens
                totals += (gl.load(lse_at + n, mask=n < tokens, other=0.0) * LOG2E,)
        own = (first + at + gl.arange(0, 64, line)) // BLOCK
        free = own - local + 1  # blocks before the local ones
        best = gl.zeros([64, BEST], gl.float32, kept) + gl.where(slot < scored, float("-inf"), float("inf"))[None, :]
        place = gl.zeros([64, BEST], gl.int32, kept) + (0x3FFFFFFF + slot)[None, :]
        worst = gl.convert_layout(gl.min(best, 1), line)
        carry = gl.zeros([64], gl.float32, line)
        q_slot = turn % Q_STAGES * 2 + GROUP
        mbarrier.wait(q_full.index(q_slot), turn // Q_STAGES & 1)
        for begin in range(0, _past(tile, tokens, first, local, BLOCK), BJ):
            total = gl.zeros([64, BJ], gl.float32, score)
            after = gl.zeros([64, BJ], gl.float32, score)
            for o in range(PER_BLOCK):
                s = wait_full(k_full, step)
                keys = k_ring.index(s).reshape([2 * BJ, D]).permute((1, 0))
                mine = gl.minimum(PER_ROW, PER_BLOCK - o).to(gl.float32)
                found = gl.zeros([64, BJ], gl.float32, score)
                for r in gl.static_range(STACK):
                    queries = q_ring.index(q_slot * STACK + r).reshape([64, D])
                    pair = warpgroup_mma(queries, keys, gl.zeros([64, 2 * BJ], gl.float32, both), use_acc=False)
                    if r + 1 == STACK:
                        report(k_empty, s)
                    high, low = gl.split(gl.permute(gl.reshape(pair, [64, 2, BJ]), [0, 2, 1]))
                    share = gl.convert_layout(high + low, score)
                    if SHARES:
                        share = gl.exp2(share * factor - totals[r][:, None])
                    found += share
                total += found * mine
                if PER_ROW > 1:
                    after += found * (PER_ROW - mine)
                step += 1
            values = gl.convert_layout(total, wide)
            if PER_ROW > 1:
                # the last rows of a block reach into the next one
                spill = gl.convert_layout(after, wide)
                before = gl.zeros([64, BJ], gl.float32, wide) + carry[:, None]
                values += gl.inline_asm_elementwise(SHIFT_16, REGISTERS_16, [spill, before], gl.float32, True, 16)
                carry = gl.sum(gl.where((columns == BJ - 1)[None, :], spill, 0.0), 1)
            j = begin + columns
            candidate = (j >= initial)[None, :] & (j[None, :] < free[:, None])
            # no nan among them
            values = gl.where(candidate, gl.maximum(values, -3.0e38), float("-inf"))
            top = gl.max(values, 1)
            more = gl.max(gl.convert_layout((top > worst).to(gl.int32), everywhere), 0)
            while more > 0:
                # of equal scores the lower block comes first and the higher one goes first
                which = gl.min(gl.where(values == top[:, None], j[None, :], 0x7FFFFFFF), 1)
                low = gl.convert_layout(worst, of_kept)[:, None]
                high = gl.convert_layout(top, of_kept)[:, None]
                gone = gl.max(gl.where(best == low, place, -1), 1)
                better = (high > low) & (place == gone[:, None])
                best = gl.where(better, high, best)
                place = gl.where(better, gl.convert_layout(which, of_kept)[:, None], place)
                worst = gl.convert_layout(gl.min(best, 1), line)
                values = gl.where(j[None, :] == which[:, None], float("-inf"), values)
                top = gl.max(values, 1)
                more = gl.max(gl.convert_layout((top > worst).to(gl.int32), everywhere), 0)
        report(q_empty, q_slot)
        turn += 1

        # ascending: each block's place is how many of the chosen ones are below it
        token = at + gl.arange(0, 64, of_kept)
        own_k = (first + token) // BLOCK
        free_k = own_k - local + 1
        filled = gl.minimum(gl.maximum(free_k - initial, 0), scored)
        chosen = gl.where((place < 0x3FFFFFFF) & (slot < scored)[None, :], place, 0x7FFFFFFF)
        rank = gl.zeros([64, BEST], gl.int32, kept)
        for n in gl.static_range(BEST):
            other = gl.min(gl.where((slot == n)[None, :], chosen, 0x7FFFFFFF), 1)
            rank += (other[:, None] < chosen).to(gl.int32)
        base = (unit.to(gl.int64) * tokens + token) * picks
        gl.store(
            index + base[:, None] + initial + rank, chosen,
            mask=(token < tokens)[:, None] & (rank < filled[:, None]) & (chosen < 0x3FFFFFFF),
        )  # fmt: skip
        if APART:
            query = unit.to(gl.int64) * tokens + token
            gl.store(
                others + query[:, None] * scored + rank, chosen,
                mask=(token < tokens)[:, None] & (rank < filled[:, None]) & (chosen < 0x3FFFFFFF),
            )  # fmt: skip
            # early queries name their blocks by bits, and have no list
            bits = gl.sum(gl.where(chosen < 64, gl.full([64, BEST], 1, gl.int64, kept) << (chosen & 63), 0), 1)
            gl.store(named + unit.to(gl.int64) * early + token, bits, mask=token < early)
            gl.store(free_count + query, gl.where(token < early, 0, filled), mask=token < tokens)
        token = at + gl.arange(0, 64, of_list)
        own_l = (first + token) // BLOCK
        free_l = own_l - local + 1
        filled = gl.minimum(gl.maximum(free_l - initial, 0), scored)
        listed = gl.minimum(own_l + 1, initial + local + filled)
        p = gl.arange(0, PICKS, gl.SliceLayout(0, listed_in))[None, :]
        forced = gl.where(p < initial, p, gl.maximum(free_l, initial)[:, None] + p - initial - filled[:, None])
        forced = gl.where(p < listed[:, None], forced, 0)
        mine = (p < initial) | (p >= (initial + filled)[:, None])
        base = (unit.to(gl.int64) * tokens + token) * picks
        gl.store(index + base[:, None] + p, forced, mask=(token < tokens)[:, None] & mine & (p < picks))
        gl.store(count + unit.to(gl.int64) * tokens + token, listed, mask=token < tokens)


SCORED = ["items", "tiles", "units", "lists", "sources", "heads", "tokens", "early", "first", "initial", "local"]
SCORED += ["picks"]


@gluon.jit(do_not_specialize=SCORED)
def best_hopper(
    q, k, lse, index, count, others, free_count, named, items, tiles, units, lists, sources, heads, tokens, early,
    first, initial, local, picks, scale,
    STACK: gl.constexpr, REPEAT: gl.constexpr, BLOCK: gl.constexpr, PER_BLOCK: gl.constexpr, PER_ROW: gl.constexpr,
    D: gl.constexpr, BJ: gl.constexpr, BEST: gl.constexpr, PICKS: gl.constexpr, Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr, SHARES: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    q_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES * 2 * STACK, 1, 1, 64, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, 2, BJ, D], k.layout)
    q_full, q_empty = barriers(Q_STAGES * 2, 1, 1)
    k_full, k_empty = barriers(STAGES, 1, 2)
    fence_async_shared()
    rings = q_ring, k_ring, q_full, q_empty, k_full, k_empty
    sizes = items, tiles, units, lists, heads, tokens, early, first, initial, local, picks
    gl.warp_specialize([
        (_best, (
            index, count, others, free_count, named, lse, scale, sizes, rings,
            0, STACK, BLOCK, PER_BLOCK, PER_ROW, D, BJ, BEST, PICKS, Q_STAGES, SHARES, APART,
        )),
        (_best, (
            index, count, others, free_count, named, lse, scale, sizes, rings,
            1, STACK, BLOCK, PER_BLOCK, PER_ROW, D, BJ, BEST, PICKS, Q_STAGES, SHARES, APART,
        )),
        (_load_scored, (
            q, k, items, tiles, units, lists, tokens, first, local, rings,
            STACK, REPEAT, BLOCK, PER_BLOCK, D, BJ, Q_STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


class Tiles(NamedTuple):
    """Rows of a tile, and tiles of queries and of rows in flight."""

    rows: int
    q_stages: int
    stages: int


# by width: what fits into shared memory
ENDED = {64: Tiles(128, 2, 3), 128: Tiles(128, 1, 2)}
BEST = {64: Tiles(64, 1, 4), 128: Tiles(64, 1, 2)}
ALONE = {64: Tiles(64, 2, 4), 128: Tiles(64, 2, 2)}  # of heads that choose for themselves
STACKED = 4  # query heads that choose together
MOST = 32  # blocks by score


def wants_ended(q: Tensor, values: Tensor | None, scale: float) -> bool:
    """Whether ended_hopper takes such queries: 16 bits, widths that it has tiles for, aligned, on a Hopper GPU."""
    if q.dtype not in (torch.bfloat16, torch.float16) or scale <= 0 or not on_hopper(q.device):
        return False
    return q.shape[3] in ENDED and (values is None or values.shape[3] == q.shape[3]) and aligned(q)


def wants_best(q: Tensor, stack: int, scoring: Scoring) -> bool:
    """Whether best_hopper takes such a choice.

    All rows of a block that may be chosen have ended, and no row reaches further than into the next block.
    """
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[3] not in BEST or not on_hopper(q.device):
        return False
    late = scoring.span - scoring.stride > scoring.block * (scoring.local - 1)
    far = scoring.span > scoring.block + scoring.stride
    return not late and not far and stack <= STACKED and scoring.scored <= MOST and aligned(q)


def attend_ended(
    q: Tensor, planes: Tensor, rows: int, values: Tensor | None, stride: int, span: int, first: int, scale: float
) -> tuple[Tensor | None, Tensor]:
    """out, None without values, and lse; planes [2, B, G, C, D] of which `rows` are there, values [B, G, rows, E]."""
    batch, heads, tokens, width = q.shape
    out = None if values is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    tiles, sizes = -(-tokens // 128), ENDED[width]
    items = batch * heads * tiles
    both = planes.flatten(0, 1)
    start(
        ended_hopper, (min(items, processors(q.device)),),
        descriptor(q, 64), descriptor(both, sizes.rows), descriptor(both if values is None else values, sizes.rows),
        descriptor(q if out is None else out, 64), lse, items, tiles, batch, heads, tokens, rows, stride, span, first,
        scale, REPEAT=heads // planes.shape[2], BK=sizes.rows, D=width, E=width, Q_STAGES=sizes.q_stages,
        STAGES=sizes.stages, VALUES=values is not None, num_warps=4,
    )  # fmt: skip
    return out, lse


def choose(
    q: Tensor, planes: Tensor, lse: Tensor | None, scoring: Scoring, first: int, scale: float, early: int = -1
) -> tuple[Tensor, ...]:
    """index [B, lists, T, picks] and count [B, lists, T]; planes [2, B, G, C, D] with whole blocks of rows.

    `early` >= 0: also the lists of blocks chosen by score alone, [B, lists, T, scored], and how long these are. Queries
    before `early` have none: they get a bit for each block, int64 [B, lists, early].
    """
    batch, heads, tokens, width = q.shape
    kv_heads, rows = planes.shape[2:4]
    lists = kv_heads if scoring.shared else heads
    stack, per_block = heads // lists, scoring.block // scoring.stride
    index = torch.empty(batch, lists, tokens, scoring.picks, dtype=torch.int32, device=q.device)
    count = torch.empty(batch, lists, tokens, dtype=torch.int32, device=q.device)
    free = []
    if early >= 0:
        free = [index.new_empty(batch, lists, tokens, scoring.scored), torch.empty_like(count)]
        free += [torch.empty(batch, lists, early, dtype=torch.int64, device=q.device)]
    tiles, units, sizes = -(-tokens // 128), batch * lists, (BEST if stack > 1 else ALONE)[width]
    # both numbers of a row lie side by side in a tile: its columns are read once for two products
    by_row = planes.view(2, batch * kv_heads, rows // per_block, per_block, width).permute(1, 3, 0, 2, 4)
    start(
        best_hopper, (min(units * tiles, processors(q.device)),),
        descriptor(q, 64), _pairs(by_row, sizes.rows), index if lse is None else lse, index, count,
        *(free or (index, count, index)), units * tiles, tiles, units, lists, batch * kv_heads, heads, tokens, early,
        first, scoring.initial, scoring.local, scoring.picks, scale,
        STACK=stack, REPEAT=heads // kv_heads, BLOCK=scoring.block, PER_BLOCK=per_block,
        PER_ROW=scoring.span // scoring.stride, D=width, BJ=sizes.rows, BEST=padded(scoring.scored, 4),
        PICKS=padded(scoring.picks, 1), Q_STAGES=sizes.q_stages, STAGES=sizes.stages, SHARES=lse is not None,
        APART=early >= 0, num_warps=4,
    )  # fmt: skip
    return index, count, *free


def _pairs(x: Tensor, blocks: int) -> TensorDescriptor:
    """A descriptor of boxes of both numbers of one row of so many blocks; x [B G, row, 2, block, D]."""
    made = object.__new__(TensorDescriptor)
    # a dimension of one element may have any stride; the descriptor asks for an aligned one
    width = x.shape[-1]
    strides = [n if size > 1 else width for size, n in zip(x.shape[:-1], x.stride(), strict=False)]
    made.__dict__.update(_pair_template(blocks, width, x.dtype), base=x, shape=list(x.shape), strides=[*strides, 1])
    return made


@cache
def _pair_template(blocks: int, width: int, dtype: torch.dtype) -> dict:
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    box = [1, 1, 2, blocks, width]
    like = torch.empty(box, dtype=dtype, device="meta")
    return vars(TensorDescriptor.from_tensor(like, box, gl.NVMMASharedLayout.get_default_for(box, kind)))
