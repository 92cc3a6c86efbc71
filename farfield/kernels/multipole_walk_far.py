"""Backward of FMA on Hopper GPUs: the far field alone, for groups of so many rows that a walk has no room for the near
field beside them, in Gluon.

Roles as in multipole_walk: one group of four warps makes weights and dq, and two add up, each dk and dv of 64
or 128 far rows. What others have left in dq is added to. Rows stay in shared memory as long as the blocks of a run read
the same of them: those of a tile of higher levels for longer.
"""

from __future__ import annotations

from typing import NamedTuple

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

from farfield.kernels.hopper import LOG2E, sync
from farfield.kernels.multipole_tree import BLOCK, flush, leave_pieces
from farfield.kernels.multipole_walk import _add, _anew, _begin_at, _bias, _copy_rows, _finish

# kinds of barriers, four a kind
Q_FULL, Q_EMPTY, BIAS_FULL, BIAS_EMPTY = (gl.constexpr(4 * kind) for kind in range(4))
ROW_FULL, ROW_EMPTY, P_FULL, P_EMPTY = (gl.constexpr(4 * kind) for kind in range(4, 8))
BARRIERS = gl.constexpr(4 * 8)


@gluon.jit
def _run(item, runs, run_blocks, blocks):
    """Unit, and blocks first .. stop - 1 of a run."""
    first = item % runs * run_blocks
    return item // runs, first, gl.minimum(first + run_blocks, blocks)


@gluon.jit
def _same(TILE: gl.constexpr, RANK: gl.constexpr):
    """log2 of the blocks that read the same rows of a tile: two of its lowest level."""
    return TILE * 64 // (2 * RANK) + 1


@gluon.jit
def _load_tiles(
    q, d_out, d_q, shift, delta, tiles, numbers, bars, items, runs, run_blocks, blocks, heads,
    SPLIT: gl.constexpr, D: gl.constexpr, GIVEN: gl.constexpr, QS: gl.constexpr,
):  # fmt: skip
    """Queries, their gradients and statistics, and what there is of dq, by one warp."""
    EACH: gl.constexpr = 3 if GIVEN else 2
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    queries = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop = _run(item, runs, run_blocks, blocks)
        b, h = unit // heads, unit % heads
        for x in range(first * SPLIT, stop * SPLIT):
            s = queries % QS
            full = bars.index(Q_FULL + s)
            mbarrier.wait(bars.index(Q_EMPTY + s), queries // QS & 1 ^ 1)
            mbarrier.expect(full, EACH * 2 * BLOCK * D)
            tma.async_copy_global_to_shared(q, [b, h, x * BLOCK, 0], full, tiles.index(s))
            tma.async_copy_global_to_shared(d_out, [b, h, x * BLOCK, 0], full, tiles.index(QS + s))
            if GIVEN:
                tma.async_copy_global_to_shared(d_q, [b, h, x * BLOCK, 0], full, tiles.index(2 * QS + s))
            stat = (unit.to(gl.int64) * (blocks * SPLIT) + x) * BLOCK + gl.arange(0, BLOCK, flat)
            async_copy.async_copy_global_to_shared(numbers.index(s), shift + stat)
            async_copy.async_copy_global_to_shared(numbers.index(QS + s), delta + stat)
            async_copy.mbarrier_arrive(full, increment_count=False)
            queries += 1


@gluon.jit
def _load_rows(
    far_k, far_v, tiles, numbers, bars, items, runs, run_blocks, blocks, done, levels, far_count, log_segment,
    RANK: gl.constexpr, FIRST: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr, GIVEN: gl.constexpr,
    QS: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Far rows where other ones begin, and what is added to the scores of a block, by two warps."""
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [2, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    R0: gl.constexpr = (3 if GIVEN else 2) * QS
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    turn, phase = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop = _run(item, runs, run_blocks, blocks)
        base = unit.to(gl.int64) * far_count * D
        for n in range(first, stop):
            for tile in gl.static_range(TILES):
                same = _same(FIRST + tile, RANK)
                if (n == first) | ((n & ((1 << same) - 1)) == 0):
                    mbarrier.wait(bars.index(ROW_EMPTY + tile), phase >> tile & 1 ^ 1)
                    k_place = tiles.index(R0 + 2 * tile).reshape([64, D])
                    v_place = tiles.index(R0 + 2 * tile + 1).reshape([64, D])
                    # the last of the blocks that read them says which of the rows there are
                    last = n | ((1 << same) - 1)
                    for part in gl.static_range(64 // STEP):
                        slot = (FIRST + tile) * 64 + part * STEP + gl.arange(0, STEP, down)
                        _copy_rows(
                            far_k, far_v, k_place.slice(part * STEP, STEP), v_place.slice(part * STEP, STEP), base,
                            last, slot, done, levels, blocks - 1, columns, RANK, 1, D,
                        )  # fmt: skip
                    async_copy.mbarrier_arrive(bars.index(ROW_FULL + tile), increment_count=False)
                    phase = phase ^ (1 << tile)
            s = turn % 2
            mbarrier.wait(bars.index(BIAS_EMPTY + s), turn // 2 & 1 ^ 1)
            for tile in gl.static_range(TILES):
                slot = (FIRST + tile) * 64 + gl.arange(0, 64, flat)
                bias = _bias(n, slot, done, levels, blocks - 1, log_segment, RANK, 1)
                numbers.index(2 * QS + s * TILES + tile).store(bias)
            sync()
            mbarrier.arrive(bars.index(BIAS_FULL + s), count=1)
            turn += 1


@gluon.jit
def _begin_tile(
    tiles, bars, s, phase, score: gl.constexpr, TILE: gl.constexpr, D: gl.constexpr, QS: gl.constexpr, R0: gl.constexpr
):  # fmt: skip
    """The products of a tile, under way."""
    mbarrier.wait(bars.index(ROW_FULL + TILE), phase >> TILE & 1)
    # the copies were ordinary writes to shared memory; the tensor cores read it another way
    fence_async_shared()
    return _begin_at(tiles, s, R0 + 2 * TILE, R0 + 2 * TILE + 1, score, D, QS)


@gluon.jit
def _weights(
    d_q, tiles, numbers, squares, bars, items, runs, run_blocks, blocks, heads, scale,
    SPLIT: gl.constexpr, RANK: gl.constexpr, FIRST: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr,
    GIVEN: gl.constexpr, QS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """P and dS of all pairs, and dq."""
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    of_query: gl.constexpr = gl.SliceLayout(1, score)
    of_row: gl.constexpr = gl.SliceLayout(0, score)
    R0: gl.constexpr = (3 if GIVEN else 2) * QS
    factor = scale * LOG2E
    queries, turn, phase = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop = _run(item, runs, run_blocks, blocks)
        for x in range(first * SPLIT, stop * SPLIT):
            n = x // SPLIT
            s = queries % QS
            u = turn % 2
            mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
            shift = numbers.index(s).load(of_query)
            delta = numbers.index(QS + s).load(of_query)
            product, d_product = _begin_tile(tiles, bars, s, phase, score, 0, D, QS, R0)
            mbarrier.wait(bars.index(BIAS_FULL + u), turn // 2 & 1)
            for tile in gl.static_range(TILES):
                if tile + 1 < TILES and AHEAD:
                    following, d_following = _begin_tile(
                        tiles, bars, s, phase, score, tile + 1 if tile + 1 < TILES else 0, D, QS, R0
                    )
                bias = numbers.index(2 * QS + u * TILES + tile).load(of_row)
                scores = warpgroup_mma_wait(3 if AHEAD and tile + 1 < TILES else 1, deps=[product])
                weights = gl.exp2(scores * factor + (bias[None, :] - shift[:, None]))
                mbarrier.wait(bars.index(P_EMPTY + tile), queries & 1 ^ 1)
                _finish(
                    weights, d_product, delta, squares.index(2 * tile), squares.index(2 * tile + 1),
                    2 if AHEAD and tile + 1 < TILES else 0,
                )  # fmt: skip
                mbarrier.arrive(bars.index(P_FULL + tile), count=1)
                if tile + 1 < TILES:
                    if AHEAD:
                        product, d_product = following, d_following
                    else:
                        product, d_product = _begin_tile(
                            tiles, bars, s, phase, score, tile + 1 if tile + 1 < TILES else 0, D, QS, R0
                        )
            acc = gl.zeros([BLOCK, D], gl.float32, wide)
            for tile in gl.static_range(TILES):
                zero = _anew(0)
                k_tile = tiles.index(R0 + 2 * tile + zero).reshape([64, D])
                acc = warpgroup_mma(squares.index(2 * tile + 1 + zero), k_tile, acc, use_acc=tile > 0, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = acc * scale
            if GIVEN:
                acc = acc + tiles.index(2 * QS + s).reshape([BLOCK, D]).load(wide).to(gl.float32)
            sync()
            mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            if x % SPLIT == SPLIT - 1:
                mbarrier.arrive(bars.index(BIAS_EMPTY + u), count=1)
                turn += 1
                for tile in gl.static_range(TILES):
                    if (n == stop - 1) | (((n + 1) & ((1 << _same(FIRST + tile, RANK)) - 1)) == 0):
                        mbarrier.arrive(bars.index(ROW_EMPTY + tile), count=1)
                        phase = phase ^ (1 << tile)
            place = tiles.index(R0 + 2 * TILES)
            tma.store_wait(0)
            sync()
            place.reshape([BLOCK, D]).store(acc.to(tiles.dtype))
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(d_q, [unit // heads, unit % heads, x * BLOCK, 0], place)
            queries += 1
    # shared memory must be there until everything has left it
    tma.store_wait(0)


@gluon.jit
def _sums(
    d_far_k, d_far_v, piece_k, piece_v, tiles, squares, bars, items, runs, run_blocks, blocks, own_levels, done, levels,
    far_count, scale,
    GROUP: gl.constexpr, SPLIT: gl.constexpr, RANK: gl.constexpr, FIRST: gl.constexpr, TILES: gl.constexpr,
    D: gl.constexpr, QS: gl.constexpr, RUN: gl.constexpr,
):  # fmt: skip
    """dk and dv of half of the tiles: one or two."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PER: gl.constexpr = (TILES + 1) // 2
    T0: gl.constexpr = GROUP * PER
    # tiles from here on hold levels that are wider than any run
    WIDER: gl.constexpr = (RUN * 2 * RANK + 63) // 64
    queries = 0
    # a single tile leaves one of the groups nothing to do
    items = items if T0 < TILES else 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop = _run(item, runs, run_blocks, blocks)
        acc_k = gl.zeros([64, D], gl.float32, wide)
        acc_v = gl.zeros([64, D], gl.float32, wide)
        more_k, more_v = acc_k, acc_v
        for x in range(first * SPLIT, stop * SPLIT):
            n = x // SPLIT
            s = queries % QS
            mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
            p, ds = squares.index(2 * T0), squares.index(2 * T0 + 1)
            acc_k, acc_v = _add(acc_k, acc_v, tiles, p, ds, bars, s, queries, P_FULL + T0, P_EMPTY + T0, D, QS)
            if PER == 2:
                p, ds = squares.index(2 * T0 + 2), squares.index(2 * T0 + 3)
                more_k, more_v = _add(
                    more_k, more_v, tiles, p, ds, bars, s, queries, P_FULL + T0 + 1, P_EMPTY + T0 + 1, D, QS
                )
            mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            queries += 1
            if FIRST + T0 < WIDER:  # noqa: SIM102, a constant decides whether there is code
                if (x % (2 * SPLIT) == 2 * SPLIT - 1) | (x == stop * SPLIT - 1):
                    acc_k, acc_v = flush(
                        acc_k, acc_v, d_far_k, d_far_v, piece_k, piece_v, n, stop - 1, FIRST + T0, unit, item % runs,
                        runs, own_levels, done, levels, far_count, scale, wide, D, RANK, 1,
                    )  # fmt: skip
                    if PER == 2:
                        more_k, more_v = flush(
                            more_k, more_v, d_far_k, d_far_v, piece_k, piece_v, n, stop - 1, FIRST + T0 + 1, unit,
                            item % runs, runs, own_levels, done, levels, far_count, scale, wide, D, RANK, 1,
                        )  # fmt: skip
        if FIRST + T0 >= WIDER:
            leave_pieces(
                acc_k * scale, acc_v, piece_k, piece_v, FIRST + T0, unit, item % runs, runs, own_levels, levels, wide,
                D, RANK,
            )  # fmt: skip
            if PER == 2:
                leave_pieces(
                    more_k * scale, more_v, piece_k, piece_v, FIRST + T0 + 1, unit, item % runs, runs, own_levels,
                    levels, wide, D, RANK,
                )  # fmt: skip


VARIES = ["items", "runs", "run_blocks", "blocks", "heads", "tokens", "own_levels", "done", "levels", "far_count"]
VARIES += ["log_segment"]


@gluon.jit(do_not_specialize=VARIES)
def multipole_walk_far(
    q, d_out, shift, delta, far_k, far_v, d_q, d_far_k, d_far_v, piece_k, piece_v,
    items, runs, run_blocks, blocks, heads, tokens, own_levels, done, levels, far_count, log_segment, scale,
    SPLIT: gl.constexpr, RANK: gl.constexpr, FIRST: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr,
    GIVEN: gl.constexpr, RUN: gl.constexpr, QS: gl.constexpr, AHEAD: gl.constexpr, STEP: gl.constexpr,
    REGISTERS: gl.constexpr, LOADING: gl.constexpr,
):  # fmt: skip
    """Tiles FIRST .. FIRST + TILES - 1 of 64 far rows: one, two or four."""
    # queries, their gradients and dq as it is, far keys and far values, and where dq leaves from
    EACH: gl.constexpr = 3 if GIVEN else 2
    tiles = gl.allocate_shared_memory(q.dtype, [EACH * QS + 2 * TILES + 1, 1, 1, BLOCK, D], q.layout)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, 64], q.dtype)
    squares = gl.allocate_shared_memory(q.dtype, [2 * TILES, BLOCK, 64], square)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.float32, [2 * QS + 2 * TILES, 64], plain)
    bars = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(QS):
        # the tiles, and 32 threads that each report their own copies
        mbarrier.init(bars.index(Q_FULL + s), count=33)
        mbarrier.init(bars.index(Q_EMPTY + s), count=3 if TILES > 1 else 2)
    for s in gl.static_range(2):
        mbarrier.init(bars.index(BIAS_FULL + s), count=1)
        mbarrier.init(bars.index(BIAS_EMPTY + s), count=1)
    for tile in gl.static_range(TILES):
        mbarrier.init(bars.index(ROW_FULL + tile), count=64)
        mbarrier.init(bars.index(ROW_EMPTY + tile), count=1)
        mbarrier.init(bars.index(P_FULL + tile), count=1)
        mbarrier.init(bars.index(P_EMPTY + tile), count=1)
    fence_async_shared()

    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_weights, (
            d_q, tiles, numbers, squares, bars, items, runs, run_blocks, blocks, heads, scale,
            SPLIT, RANK, FIRST, TILES, D, GIVEN, QS, AHEAD,
        )),
        (_sums, (
            d_far_k, d_far_v, piece_k, piece_v, tiles, squares, bars, items, runs, run_blocks, blocks, own_levels, done,
            levels, far_count, scale, 0, SPLIT, RANK, FIRST, TILES, D, QS, RUN,
        )),
        (_sums, (
            d_far_k, d_far_v, piece_k, piece_v, tiles, squares, bars, items, runs, run_blocks, blocks, own_levels, done,
            levels, far_count, scale, 1, SPLIT, RANK, FIRST, TILES, D, QS, RUN,
        )),
        (_load_rows, (
            far_k, far_v, tiles, numbers, bars, items, runs, run_blocks, blocks, done, levels, far_count, log_segment,
            RANK, FIRST, TILES, D, GIVEN, QS, STEP,
        )),
        (_load_tiles, (
            q, d_out, d_q, shift, delta, tiles, numbers, bars, items, runs, run_blocks, blocks, heads,
            SPLIT, D, GIVEN, QS,
        )),
    ], [4, 4, 2, 1], [REGISTERS, REGISTERS, LOADING, LOADING])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        q_stages: places of queries.
        ahead: the products of a tile begin before the weights of the tile before.
        registers, loading: of a thread that adds up, and of one that loads. Those that make weights get the rest.
        step: far rows whose addresses are in registers at a time.
    """

    q_stages: int
    ahead: bool = True
    registers: int = 160
    loading: int = 24
    step: int = 8


# (width, tiles of 64 far rows) -> tiles
TILES = {
    (64, 1): Tiles(3),
    (64, 2): Tiles(3),
    (64, 4): Tiles(3),
    (128, 1): Tiles(3),
    (128, 2): Tiles(2),
}
MOST = {64: 4, 128: 2}  # tiles of a launch
