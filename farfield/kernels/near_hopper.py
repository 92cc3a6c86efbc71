"""Of three branches those blocks that need no choice, on Hopper GPUs, in Gluon: the window, and what every query reads.

The latest blocks of a query's list lie in its window, so their softmax is a state that the window's goes through when
it begins with them. That state is set aside, the first block joined to it once the window is done, and both leave.
Early queries choose a good part of what there is: they go on through all blocks, and hide what they have not chosen.

As in kernels.attend_hopper one warp copies and two groups of four warps compute. Here both have the same 64 tokens, for
two query heads of a key head, and read the same tiles of 64 rows.
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

from farfield.kernels.hopper import (
    LN2,
    LOG2E,
    aligned,
    descriptor,
    fetch,
    on_hopper,
    processors,
    report,
    sync,
    wait_empty,
    wait_full,
)
from farfield.kernels.replay import start
from farfield.ops.choose import Scoring

GROUPS = gl.constexpr(2)  # of computing warps; `near_hopper` starts so many
TILE = gl.constexpr(64)  # queries of a group, rows of a tile, tokens of a block


@gluon.jit
def _near(item, units, heads, early, REPEAT: gl.constexpr):
    """Item -> batch, key head, first of the query heads, tile of queries: those with most to read come first."""
    pairs: gl.constexpr = REPEAT // GROUPS
    unit = item // pairs % units
    kv_heads = heads // REPEAT
    g = unit % kv_heads
    tile = item // pairs // units
    tile = gl.where(tile < early, early - 1 - tile, tile)
    return unit // kv_heads, g, g * REPEAT + item % pairs * GROUPS, tile


@gluon.jit
def _tiles(tile, window, LOCAL: gl.constexpr):
    """How many tiles the queries of a tile read from their own on; some may lie before the first row."""
    low = gl.maximum(tile * TILE - window + 1, 0) // TILE
    return gl.maximum(tile - low + 1, LOCAL + 1)


@gluon.jit
def _before(tile, early, LOCAL: gl.constexpr):
    """How many tiles from the first row on come after them, the first one even where it has been read."""
    return gl.where(tile < early, gl.maximum(tile - LOCAL + 1, 1), 1)


@gluon.jit
def _load_near(
    q, k, v, rings, items, units, heads, early, window,
    REPEAT: gl.constexpr, LOCAL: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, g, h, tile = _near(item, units, heads, early, REPEAT)
        for group in gl.static_range(GROUPS):
            slot = turn % Q_STAGES * GROUPS + group
            mbarrier.wait(q_empty.index(slot), turn // Q_STAGES & 1 ^ 1)
            fetch(q, [b, h + group, tile * TILE, 0], q_full, q_ring, slot)
        turn += 1
        many = _tiles(tile, window, LOCAL)
        for t in range(many + _before(tile, early, LOCAL)):
            row = gl.where(t < many, tile - t, t - many) * TILE
            s = wait_empty(k_empty, step)
            fetch(k, [b, g, row, 0], k_full, k_ring, s)
            wait_empty(v_empty, step)
            fetch(v, [b, g, row, 0], v_full, v_ring, s)
            step += 1


@gluon.jit
def _older(scores, row, at, window, layout: gl.constexpr):
    """-inf where the queries from `at` on do not see the rows from `row` on, all of them before the queries."""
    if row < gl.maximum(at + TILE - window, 0):
        r = row + gl.arange(0, TILE, gl.SliceLayout(0, layout))[None, :]
        i = at + gl.arange(0, TILE, gl.SliceLayout(1, layout))[:, None]
        scores = gl.where((r > i - window) & (r >= 0), scores, float("-inf"))
    return scores


@gluon.jit
def _advance(
    queries, operand, acc, scores, k_ring, v_ring, k_full, k_empty, v_full, step,
    D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The next tile's scores, and the sum with the values of the tile before, which is still under way."""
    last, s = step % STAGES, (step + 1) % STAGES
    mbarrier.wait(k_full.index(s), (step + 1) // STAGES & 1)
    keys = k_ring.index(s).reshape([TILE, D]).permute((1, 0))
    product = warpgroup_mma(queries, keys, scores, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), step // STAGES & 1)
    summed = warpgroup_mma(operand, v_ring.index(last).reshape([TILE, E]), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[product])
    report(k_empty, s)
    return scores, summed


@gluon.jit
def _settle(summed, operand, v_empty, step, STAGES: gl.constexpr):
    """The sum, once it is there, and the number of the next tile."""
    acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
    sync()
    mbarrier.arrive(v_empty.index(step % STAGES), count=1)
    return acc, step + 1


@gluon.jit
def _weigh(scores, peak, mass, factor):
    """One step of the running softmax: every query has seen a row."""
    higher = gl.maximum(peak, gl.max(scores, 1) * factor)
    weights = gl.exp2(scores * factor - higher[:, None])
    fade = gl.exp2(peak - higher)
    return weights, higher, mass * fade + gl.sum(weights, 1), fade


@gluon.jit
def _weigh_named(scores, peak, mass, here, factor):
    """The same of rows that queries see where they are `here`."""
    higher = gl.maximum(peak, gl.where(here, gl.max(scores, 1) * factor, float("-inf")))
    weights = gl.exp2(scores * factor - gl.where(here, higher, float("inf"))[:, None])
    fade = gl.exp2(peak - higher)
    return weights, higher, mass * fade + gl.sum(weights, 1), fade


@gluon.jit
def _attend_near(
    out, lse, begun, begun_lse, named, rings, aside, items, units, heads, tokens, early, window, scale,
    GROUP: gl.constexpr, REPEAT: gl.constexpr, LOCAL: gl.constexpr, INITIAL: gl.constexpr, D: gl.constexpr,
    E: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    of_value: gl.constexpr = gl.SliceLayout(1, value)
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    step, turn = 0, 0
    parked = aside.index(GROUP)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, g, h, tile = _near(item, units, heads, early, REPEAT)
        h += GROUP
        at = tile * TILE
        many = _tiles(tile, window, LOCAL)
        line = at + gl.arange(0, TILE, per_row)
        lines = (b.to(gl.int64) * heads + h) * tokens
        acc = gl.zeros([TILE, E], gl.float32, value)
        scores = gl.zeros([TILE, TILE], gl.float32, score)
        slot = turn % Q_STAGES * GROUPS + GROUP
        queries = q_ring.index(slot).reshape([TILE, D])
        mbarrier.wait(q_full.index(slot), turn // Q_STAGES & 1)
        s = wait_full(k_full, step)
        scores = warpgroup_mma(queries, k_ring.index(s).reshape([TILE, D]).permute((1, 0)), scores, use_acc=False)
        report(k_empty, s)
        # of its own tile a query sees itself at least
        before = gl.arange(0, TILE, gl.SliceLayout(0, score))[None, :] - gl.arange(0, TILE, per_row)[:, None]
        scores = gl.where((before <= 0) & (before > -window), scores, float("-inf"))
        peak = gl.max(scores, 1) * factor
        weights = gl.exp2(scores * factor - peak[:, None])
        mass = gl.sum(weights, 1)
        operand = gl.convert_layout(weights.to(dtype), left)
        # the tiles of the latest blocks
        for t in gl.static_range(1, LOCAL):
            scores, summed = _advance(
                queries, operand, acc, scores, k_ring, v_ring, k_full, k_empty, v_full, step, D, E, STAGES
            )
            scores = _older(scores, (tile - t) * TILE, at, window, score)
            weights, peak, mass, fade = _weigh(scores, peak, mass, factor)
            acc, step = _settle(summed, operand, v_empty, step, STAGES)
            acc = acc * gl.convert_layout(fade, of_value)[:, None]
            operand = gl.convert_layout(weights.to(dtype), left)
        # the one behind them: what came before it is set aside. A loop with a branch for it would do, but Triton's
        # common subexpressions of loops take what is kept from such a branch for what it was at first
        early_peak, early_mass = peak, mass
        scores, summed = _advance(
            queries, operand, acc, scores, k_ring, v_ring, k_full, k_empty, v_full, step, D, E, STAGES
        )
        scores = _older(scores, (tile - LOCAL) * TILE, at, window, score)
        weights, peak, mass, fade = _weigh(scores, peak, mass, factor)
        acc, step = _settle(summed, operand, v_empty, step, STAGES)
        parked.reshape([TILE, E]).store((acc * gl.convert_layout(1.0 / early_mass, of_value)[:, None]).to(dtype))
        acc = acc * gl.convert_layout(fade, of_value)[:, None]
        operand = gl.convert_layout(weights.to(dtype), left)
        for t in range(LOCAL + 1, many):
            scores, summed = _advance(
                queries, operand, acc, scores, k_ring, v_ring, k_full, k_empty, v_full, step, D, E, STAGES
            )
            scores = _older(scores, (tile - t) * TILE, at, window, score)
            weights, peak, mass, fade = _weigh(scores, peak, mass, factor)
            acc, step = _settle(summed, operand, v_empty, step, STAGES)
            acc = acc * gl.convert_layout(fade, of_value)[:, None]
            operand = gl.convert_layout(weights.to(dtype), left)
        # the first block goes with the last values of the window
        scores, summed = _advance(
            queries, operand, acc, scores, k_ring, v_ring, k_full, k_empty, v_full, step, D, E, STAGES
        )
        acc, step = _settle(summed, operand, v_empty, step, STAGES)
        # what was set aside comes back, and its place in shared memory is where the window's result leaves from
        done = (acc * gl.convert_layout(1.0 / mass, of_value)[:, None]).to(dtype)
        acc = parked.reshape([TILE, E]).load(value).to(gl.float32)
        sync()
        parked.reshape([TILE, E]).store(done)
        fence_async_shared()
        sync()
        tma.async_copy_shared_to_global(out, [b, h, at, 0], parked)
        gl.store(lse + lines + line, (peak + gl.log2(mass)) * LN2, line < tokens)
        # where the first block is among the latest ones it has been read
        read = gl.zeros([TILE], gl.int64, per_row) + gl.where(tile >= LOCAL, (1 << INITIAL) - 1, 0)
        if tile < early:
            read |= gl.load(named + (b.to(gl.int64) * (heads // REPEAT) + g) * (early * TILE) + line)
        weights, peak, mass, fade = _weigh_named(scores, early_peak, early_mass, (read & 1) != 0, factor)
        # what was set aside is an average
        acc = acc * gl.convert_layout(fade * early_mass, of_value)[:, None]
        operand = gl.convert_layout(weights.to(dtype), left)
        for j in range(1, _before(tile, early, LOCAL)):
            scores, summed = _advance(
                queries, operand, acc, scores, k_ring, v_ring, k_full, k_empty, v_full, step, D, E, STAGES
            )
            weights, peak, mass, fade = _weigh_named(scores, peak, mass, (read >> j & 1) != 0, factor)
            acc, step = _settle(summed, operand, v_empty, step, STAGES)
            acc = acc * gl.convert_layout(fade, of_value)[:, None]
            operand = gl.convert_layout(weights.to(dtype), left)
        last = wait_full(v_full, step)
        acc = warpgroup_mma(operand, v_ring.index(last).reshape([TILE, E]), acc)
        report(v_empty, last)
        step += 1
        # the queries are done with: the second result leaves through their place
        queries.store((acc * gl.convert_layout(1.0 / mass, of_value)[:, None]).to(dtype))
        fence_async_shared()
        sync()
        tma.async_copy_shared_to_global(begun, [b, h, at, 0], q_ring.index(slot))
        gl.store(begun_lse + lines + line, (peak + gl.log2(mass)) * LN2, line < tokens)
        tma.store_wait(0)
        report(q_empty, slot)
        turn += 1


@gluon.jit(do_not_specialize=["items", "units", "heads", "tokens", "early", "window"])
def near_hopper(
    q, k, v, out, lse, begun, begun_lse, named, items, units, heads, tokens, early, window, scale,
    REPEAT: gl.constexpr, LOCAL: gl.constexpr, INITIAL: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
    Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(q.dtype, [Q_STAGES * GROUPS, 1, 1, TILE, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, TILE, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, TILE, E], v.layout)
    aside = gl.allocate_shared_memory(v.dtype, [GROUPS, 1, 1, TILE, E], begun.layout)
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
    fence_async_shared()
    rings = q_ring, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty
    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_attend_near, (
            out, lse, begun, begun_lse, named, rings, aside, items, units, heads, tokens, early, window, scale,
            0, REPEAT, LOCAL, INITIAL, D, E, Q_STAGES, STAGES,
        )),
        (_attend_near, (
            out, lse, begun, begun_lse, named, rings, aside, items, units, heads, tokens, early, window, scale,
            1, REPEAT, LOCAL, INITIAL, D, E, Q_STAGES, STAGES,
        )),
        (_load_near, (
            q, k, v, rings, items, units, heads, early, window, REPEAT, LOCAL, Q_STAGES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


STAGES = {64: 6, 128: 4}  # width -> tiles of keys and of values in flight
EARLY = 24  # tiles of queries that go on through all blocks, 64 at most


def wants(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, window: int, scale: float) -> bool:
    """Whether near_hopper takes a call: 16 bits, an even number of query heads a key head, on a Hopper GPU.

    Blocks are tiles, and the window holds the latest ones.
    """
    if q.dtype not in (torch.bfloat16, torch.float16) or not on_hopper(q.device) or scale <= 0:
        return False
    if not q.shape[3] == v.shape[3] in STAGES or q.shape[1] // k.shape[1] % GROUPS.value:
        return False
    if scoring.block != TILE.value or scoring.initial > 1 or window < scoring.local * scoring.block:
        return False
    return all(aligned(x) for x in (q, k, v))


def attend_near(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, window: int, scale: float, named: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out and lse of the window; and of the blocks that are always read, for early queries of all that they read.

    Args:
        named: int64 [B, G, early * 64], a bit for each block that an early query has chosen.
    """
    batch, heads, tokens, width = q.shape
    (out, begun), (lse, begun_lse) = (
        [torch.empty(shape, dtype=dtype, device=q.device) for _ in range(2)]
        for shape, dtype in ((q.shape, q.dtype), (q.shape[:3], torch.float32))
    )
    units = batch * k.shape[1]
    items = batch * heads // GROUPS.value * -(-tokens // TILE.value)
    start(
        near_hopper, (min(items, processors(q.device)),),
        descriptor(q, 64), descriptor(k, 64), descriptor(v, 64), descriptor(out, 64), lse, descriptor(begun, 64),
        begun_lse, named, items, units, heads, tokens, named.shape[2] // TILE.value, window, scale,
        REPEAT=heads // k.shape[1], LOCAL=scoring.local, INITIAL=scoring.initial, D=width, E=width, Q_STAGES=2,
        STAGES=STAGES[width], num_warps=4,
    )  # fmt: skip
    return out, lse, begun, begun_lse
