"""The block that each query stands in, joined with what it got from other blocks, on Hopper GPUs, in Gluon.

Several programs a multiprocessor stay there and work through tiles of 64 queries, of which four computing warps hold
one: a tile reads few rows, and while one program waits for what it joins the others have products to make. One warp
copies queries and rows up to the last query; another looks up, an item or two ahead, which parts of other blocks the
queries have (attend_listed_hopper) and their log2 masses. What leaves is the softmax over everything.
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

from farfield.kernels.hopper import (
    LN2,
    LOG2E,
    barriers,
    descriptor,
    fetch,
    processors,
    report,
    soften_scaled,
    sync,
    wait_empty,
    wait_full,
)
from farfield.kernels.replay import start

TILE = gl.constexpr(64)  # queries, and rows, at a time
AHEAD = gl.constexpr(2)  # tiles in flight


@gluon.jit
def _place(item, heads, tiles, SPLIT: gl.constexpr):
    """Item -> batch, head, tile of queries.

    Tiles at the end of a block have the most to read. Where they stand among the block's items changes from block to
    block, so that no program gets only those.
    """
    unit, n = item // tiles, item % tiles
    block = n // SPLIT
    many = gl.minimum(tiles - block * SPLIT, SPLIT)
    return unit // heads, unit % heads, block * SPLIT + (n + block + unit) % many


@gluon.jit
def _load(
    q, k, v, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty, items, heads, tiles,
    REPEAT: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Queries, and the rows of their block up to them, by one warp."""
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, tile = _place(item, heads, tiles, SPLIT)
        fetch(q, [b, h, tile * TILE, 0], q_full, q_ring, wait_empty(q_empty, turn))
        turn += 1
        for row in range(tile // SPLIT * SPLIT * TILE, (tile + 1) * TILE, TILE):
            fetch(k, [b, h // REPEAT, row, 0], k_full, k_ring, wait_empty(k_empty, step))
            fetch(v, [b, h // REPEAT, row, 0], v_full, v_ring, wait_empty(v_empty, step))
            step += 1


@gluon.jit
def _look_up(
    masses, place, count, spot_ring, mass_ring, part_full, part_empty, items, heads, tiles, tokens,
    SPLIT: gl.constexpr, PICKS: gl.constexpr,
):  # fmt: skip
    """Where the queries' parts lie, -1 where there is none, and their log2 masses, by one warp."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, tile = _place(item, heads, tiles, SPLIT)
        n = tile * TILE + gl.arange(0, TILE, flat)
        line = (b * heads + h).to(gl.int64) * tokens + n
        # the last of the list is the block that is read here
        filled = gl.load(count + line, mask=n < tokens, other=1) - 1
        # all that is asked for is under way together
        spots, found = (), ()
        for p in gl.static_range(PICKS):
            spots += (gl.load(place + line * PICKS + p, mask=p < filled, other=-1),)
        for p in gl.static_range(PICKS):
            found += (gl.load(masses + spots[p], mask=spots[p] >= 0, other=float("-inf")),)
        slot = wait_empty(part_empty, turn)
        for p in gl.static_range(PICKS):
            spot_ring.index(slot * PICKS + p).store(spots[p])
            mass_ring.index(slot * PICKS + p).store(found[p])
        report(part_full, slot)
        turn += 1


@gluon.jit
def _compute(
    out, lse, parts, q_ring, k_ring, v_ring, part_ring, spot_ring, mass_ring, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, part_full, part_empty, items, heads, tiles, tokens, scale,
    SPLIT: gl.constexpr, D: gl.constexpr, PICKS: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    of_value: gl.constexpr = gl.SliceLayout(1, value)
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    i = gl.arange(0, TILE, per_row)
    r = gl.arange(0, TILE, gl.SliceLayout(0, score))
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, tile = _place(item, heads, tiles, SPLIT)
        slot = turn % AHEAD
        if COPY:
            wait_full(part_full, turn)
            for p in gl.static_range(PICKS):
                spot = spot_ring.index(slot * PICKS + p).load(down)
                # what is not there comes as 0
                async_copy.async_copy_global_to_shared(
                    part_ring.index(p), parts + spot.to(gl.int64)[:, None] * D + columns, mask=(spot >= 0)[:, None]
                )
            async_copy.commit_group()
        peak = gl.full([TILE], float("-inf"), gl.float32, per_row)
        mass = gl.zeros([TILE], gl.float32, per_row)
        acc = gl.zeros([TILE, D], gl.float32, value)
        scores = gl.zeros([TILE, TILE], gl.float32, score)
        queries = q_ring.index(slot).reshape([TILE, D])
        wait_full(q_full, turn)
        s = wait_full(k_full, step)
        keys = k_ring.index(s).reshape([TILE, D]).permute((1, 0))
        scores = warpgroup_mma(queries, keys, scores, use_acc=False)
        report(k_empty, s)
        steps = tile % SPLIT
        if steps == 0:
            scores = gl.where(r[None, :] <= i[:, None], scores, float("-inf"))
        weights, peak, mass, fade = soften_scaled(scores, peak, mass, factor)
        operand = gl.convert_layout(weights.to(dtype), left)
        for j in range(1, steps + 1):
            s = wait_full(k_full, step + 1)
            keys = k_ring.index(s).reshape([TILE, D]).permute((1, 0))
            product = warpgroup_mma(queries, keys, scores, use_acc=False, is_async=True)
            last = wait_full(v_full, step)
            summed = warpgroup_mma(operand, v_ring.index(last).reshape([TILE, D]), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[product])
            report(k_empty, s)
            if j == steps:
                scores = gl.where(r[None, :] <= i[:, None], scores, float("-inf"))
            weights, peak, mass, fade = soften_scaled(scores, peak, mass, factor)
            # ptxas moves the next wait in front of the exponentials, but nothing across a branch: this one has ended
            # long ago
            wait_full(v_full, step)
            acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
            report(v_empty, last)
            step += 1
            acc = acc * gl.convert_layout(fade, of_value)[:, None]
            operand = gl.convert_layout(weights.to(dtype), left)

        base = peak
        found = ()
        if not COPY:
            wait_full(part_full, turn)
        for p in gl.static_range(PICKS):
            base = gl.maximum(base, mass_ring.index(slot * PICKS + p).load(per_row))
            if not COPY:
                spot = spot_ring.index(slot * PICKS + p).load(down)
                # they come while the last product is under way
                at = parts + spot.to(gl.int64)[:, None] * D + columns
                found += (gl.load(at, mask=(spot >= 0)[:, None], other=0.0),)
        last = wait_full(v_full, step)
        acc = warpgroup_mma(operand, v_ring.index(last).reshape([TILE, D]), acc)
        report(v_empty, last)
        step += 1
        base = gl.where(base == float("-inf"), 0.0, base)
        own = gl.exp2(peak - base)
        total = mass * own
        for p in gl.static_range(PICKS):
            total += gl.exp2(mass_ring.index(slot * PICKS + p).load(per_row) - base)
        share = 1.0 / gl.where(total > 0, total, 1.0)
        acc = acc * gl.convert_layout(own * share, of_value)[:, None]
        # the queries are done with: their place in shared memory is where rows are put together
        queries.store(acc.to(dtype))
        for p in gl.static_range(PICKS):
            log = mass_ring.index(slot * PICKS + p).load(per_row)
            mass_ring.index(slot * PICKS + p).store(gl.exp2(log - base) * share)
        if COPY:
            async_copy.wait_group(0)
        sync()
        joined = queries.load(across).to(gl.float32)
        for p in gl.static_range(PICKS):
            if COPY:
                part = part_ring.index(p).load(across)
            else:
                part = found[p]
            joined += part.to(gl.float32) * mass_ring.index(slot * PICKS + p).load(down)[:, None]
        first = tile * TILE
        line = (b * heads + h).to(gl.int64) * tokens + first
        n = gl.arange(0, TILE, down)
        gl.store(out + (line + n)[:, None] * D + columns, joined.to(dtype), mask=(first + n < tokens)[:, None])
        gl.store(lse + line + i, (base + gl.log2(total)) * LN2, mask=first + i < tokens)
        # the next queries are written another way
        fence_async_shared()
        report(q_empty, slot)
        mbarrier.arrive(part_empty.index(slot), count=1)
        turn += 1


@gluon.jit(do_not_specialize=["items", "heads", "tiles", "tokens"])
def attend_own_hopper(
    q, k, v, out, lse, parts, masses, place, count, items, heads, tiles, tokens, scale,
    REPEAT: gl.constexpr, SPLIT: gl.constexpr, D: gl.constexpr, PICKS: gl.constexpr, COPY: gl.constexpr,
    LOADING: gl.constexpr,
):  # fmt: skip
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], q.dtype)
    q_ring = gl.allocate_shared_memory(q.dtype, [AHEAD, 1, 1, TILE, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [AHEAD, 1, 1, TILE, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [AHEAD, 1, 1, TILE, D], v.layout)
    part_ring = gl.allocate_shared_memory(q.dtype, [PICKS if COPY else 1, TILE if COPY else 8, D], rows)
    spot_ring = gl.allocate_shared_memory(gl.int32, [AHEAD * PICKS, TILE], plain)
    mass_ring = gl.allocate_shared_memory(gl.float32, [AHEAD * PICKS, TILE], plain)
    q_full, q_empty = barriers(AHEAD, 1, 1)
    k_full, k_empty = barriers(AHEAD, 1, 1)
    v_full, v_empty = barriers(AHEAD, 1, 1)
    part_full, part_empty = barriers(AHEAD, 1, 1)
    fence_async_shared()

    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_compute, (
            out, lse, parts, q_ring, k_ring, v_ring, part_ring, spot_ring, mass_ring, q_full, q_empty, k_full, k_empty,
            v_full, v_empty, part_full, part_empty, items, heads, tiles, tokens, scale, SPLIT, D, PICKS, COPY,
        )),
        (_load, (
            q, k, v, q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty, items, heads, tiles,
            REPEAT, SPLIT,
        )),
        (_look_up, (
            masses, place, count, spot_ring, mass_ring, part_full, part_empty, items, heads, tiles, tokens,
            SPLIT, PICKS,
        )),
    ], [1, 1], [LOADING, LOADING])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        programs: programs a multiprocessor.
        loading: registers of a thread that loads.
        copy: parts come to shared memory from the start of a tile on, where there is room; else to registers, from the
            last product on.
    """

    programs: int
    loading: int
    copy: bool


# by measurements on an H200
TILES = {64: Tiles(3, 32, True), 128: Tiles(2, 40, False)}
MOST = 3  # parts of a query
REGISTERS = 1 << 16  # of a multiprocessor


def attend_own(
    q: Tensor, k: Tensor, v: Tensor, parts: Tensor, masses: Tensor, place: Tensor, count: Tensor, block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, H, T, E] and lse [B, H, T] of each query over its block up to itself, and over its parts.

    Args:
        parts, masses: rows and log2 masses, in any order.
        place: [B * H * T * picks], the part of each entry.
        count: [B, H, T], one more than the entries of a query that have a part: the first ones.
    """
    batch, heads, tokens, width = q.shape
    tiles, size = TILES[width], TILE.value
    many = -(-tokens // size)
    items = batch * heads * many
    out, lse = q.new_empty(q.shape), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    start(
        attend_own_hopper, (min(items, processors(q.device) * tiles.programs),),
        descriptor(q, size), descriptor(k, size), descriptor(v, size), out, lse, parts, masses, place, count,
        items, heads, many, tokens, scale,
        REPEAT=heads // k.shape[1], SPLIT=block // size, D=width, PICKS=place.numel() // (batch * heads * tokens),
        COPY=tiles.copy, LOADING=tiles.loading, num_warps=4, maxnreg=REGISTERS // (256 * tiles.programs) // 8 * 8,
    )  # fmt: skip
    return out, lse
