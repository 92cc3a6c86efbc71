"""Backward of FMA on Hopper GPUs where heads are wide: the walk of multipole_backward with other roles, in Gluon.

Sums of 128 registers leave no room for what they are made of, so one group of four warps makes weights and the other
two add up. The first takes, for each query block, the pairs with the key tile before, with the far rows and with its
own key tile: S and dP, and from them P and dS, which it leaves in shared memory, and in the end dq from all dS. The
second has dk and dv of one key tile, the third those of 64 or 128 far rows. All of them multiply from shared memory.
Two loading roles keep rings filled: whole tiles by the tensor memory accelerator, far rows by asynchronous copies.
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
from farfield.kernels.multipole_tree import BLOCK, far_rows, leave_pieces, span

# Kinds of barriers, four a kind. They are one array, as tiles are: what a group of warps is handed lies in its
# registers, and of those there are few.
Q_FULL, Q_EMPTY, K_FULL, K_EMPTY, FAR_FULL = (gl.constexpr(4 * kind) for kind in range(5))
FAR_EMPTY, P_FULL, P_EMPTY, F_FULL, F_EMPTY = (gl.constexpr(4 * kind) for kind in range(5, 10))
BARRIERS = gl.constexpr(4 * 10)


@gluon.jit
def _load_tiles(
    q, d_out, k, v, shift, delta, tiles, numbers, bars, items, runs, run_blocks, blocks, heads,
    RADIUS: gl.constexpr, D: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr,
):  # fmt: skip
    """Queries, their gradients and statistics, keys and values, by one warp."""
    BYTES: gl.constexpr = 4 * BLOCK * D
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    queries, keys = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, low, end = span(item, runs, run_blocks, blocks, RADIUS)
        b, h = unit // heads, unit % heads
        for x in range(low, end):
            if x >= first:
                s = queries % QS
                full = bars.index(Q_FULL + s)
                mbarrier.wait(bars.index(Q_EMPTY + s), queries // QS & 1 ^ 1)
                mbarrier.expect(full, BYTES)
                tma.async_copy_global_to_shared(q, [b, h, x * BLOCK, 0], full, tiles.index(s))
                tma.async_copy_global_to_shared(d_out, [b, h, x * BLOCK, 0], full, tiles.index(QS + s))
                stat = (unit.to(gl.int64) * blocks + x) * BLOCK + gl.arange(0, BLOCK, flat)
                async_copy.async_copy_global_to_shared(numbers.index(s), shift + stat)
                async_copy.async_copy_global_to_shared(numbers.index(QS + s), delta + stat)
                async_copy.mbarrier_arrive(full, increment_count=False)
                queries += 1
            if x < stop:
                s = keys % KS
                full = bars.index(K_FULL + s)
                mbarrier.wait(bars.index(K_EMPTY + s), keys // KS & 1 ^ 1)
                mbarrier.expect(full, BYTES)
                tma.async_copy_global_to_shared(k, [b, h, x * BLOCK, 0], full, tiles.index(2 * QS + s))
                tma.async_copy_global_to_shared(v, [b, h, x * BLOCK, 0], full, tiles.index(2 * QS + KS + s))
                keys += 1


@gluon.jit
def _bias(n, slot, done, levels, last, log_segment, RANK: gl.constexpr, RADIUS: gl.constexpr):
    """log2 of the tokens that a far row stands for; -inf where block n does not read it."""
    level, group, _, there = far_rows(n, slot, done, levels, last, RANK, RADIUS)
    own = (RADIUS + (1 << level) - 1) >> level
    return gl.where(there & (group < (n >> level) - own), (level + log_segment).to(gl.float32), float("-inf"))


@gluon.jit
def _copy_rows(
    far_k, far_v, k_place, v_place, base, n, slot, done, levels, last, columns,
    RANK: gl.constexpr, RADIUS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The keys and values of some slots of block n; rows that are not there come as 0."""
    _, _, row, there = far_rows(n, slot, done, levels, last, RANK, RADIUS)
    at = row.to(gl.int64)[:, None] * D + columns + base
    async_copy.async_copy_global_to_shared(k_place, far_k + at, mask=there[:, None])
    async_copy.async_copy_global_to_shared(v_place, far_v + at, mask=there[:, None])


@gluon.jit
def _load_rows(
    far_k, far_v, tiles, numbers, bars, items, runs, run_blocks, blocks, done, levels, far_count,
    log_segment,
    RADIUS: gl.constexpr, RANK: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr,
    QS: gl.constexpr, KS: gl.constexpr, FS: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """The far rows of two query blocks at a time and what is added to their scores, by two warps."""
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [2, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, _low, _end = span(item, runs, run_blocks, blocks, RADIUS)
        base = unit.to(gl.int64) * far_count * D
        for n in range(first, stop, 2):
            s = step % FS
            mbarrier.wait(bars.index(FAR_EMPTY + s), step // FS & 1 ^ 1)
            for tile in gl.static_range(TILES):
                at = 2 * (QS + KS + s * TILES + tile)
                k_place, v_place = tiles.index(at).reshape([64, D]), tiles.index(at + 1).reshape([64, D])
                for part in gl.static_range(64 // STEP):
                    _copy_rows(
                        far_k, far_v, k_place.slice(part * STEP, STEP), v_place.slice(part * STEP, STEP), base, n,
                        tile * 64 + part * STEP + gl.arange(0, STEP, down), done, levels, blocks - 1, columns,
                        RANK, RADIUS, D,
                    )  # fmt: skip
            async_copy.mbarrier_arrive(bars.index(FAR_FULL + s), increment_count=False)
            for odd in gl.static_range(2):
                for tile in gl.static_range(TILES):
                    slot = tile * 64 + gl.arange(0, 64, flat)
                    bias = _bias(n + odd, slot, done, levels, blocks - 1, log_segment, RANK, RADIUS)
                    numbers.index(2 * QS + (2 * s + odd) * TILES + tile).store(bias)
            sync()
            mbarrier.arrive(bars.index(FAR_FULL + s), count=1)
            step += 1


@gluon.jit
def _far_p(tiles, zero, QS: gl.constexpr, KS: gl.constexpr, FS: gl.constexpr, TILES: gl.constexpr):
    """Where P of the first far rows lies: in a tile from which dq and low far rows leave."""
    D: gl.constexpr = tiles.shape[4]
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, 64], tiles.dtype)
    FIRST: gl.constexpr = 2 * (QS + KS + FS * TILES)
    if D == 64:
        return tiles.index(FIRST + zero).reshape([BLOCK, 64])
    else:
        return tiles.index(FIRST + zero)._reinterpret(tiles.dtype, [D // 64, BLOCK, 64], square).index(0)


@gluon.jit
def _anew(x):
    """x, of which the compiler does not know that it has made addresses of it before."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _begin(q_tile, d_tile, key_tile, value_tile, score: gl.constexpr, N: gl.constexpr):
    """Queries times keys and gradients times values, under way."""
    zero = gl.zeros([BLOCK, N], gl.float32, score)
    product = warpgroup_mma(q_tile, key_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    d_product = warpgroup_mma(d_tile, value_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    return product, d_product


@gluon.jit
def _begin_at(tiles, s, k_at, v_at, score: gl.constexpr, D: gl.constexpr, QS: gl.constexpr):
    """The same of tiles by their places."""
    zero = _anew(0)
    q_tile, d_tile = tiles.index(s + zero).reshape([BLOCK, D]), tiles.index(QS + s + zero).reshape([BLOCK, D])
    k_tile, v_tile = tiles.index(k_at + zero).reshape([64, D]), tiles.index(v_at + zero).reshape([64, D])
    return _begin(q_tile, d_tile, k_tile, v_tile, score, 64)


@gluon.jit
def _begin_far(tiles, bars, s, at, f, phase, score: gl.constexpr, D: gl.constexpr, QS: gl.constexpr):
    """The same of the first far rows of a block."""
    mbarrier.wait(bars.index(FAR_FULL + f), phase)
    # the copies were ordinary writes to shared memory; the tensor cores read it another way
    fence_async_shared()
    return _begin_at(tiles, s, at, at + 1, score, D, QS)


@gluon.jit
def _finish(weights, d_product, delta, p_place, ds_place, LATER: gl.constexpr):
    """P and dS to where the others and dq take them from; LATER: products begun since."""
    p_place.store(weights.to(p_place.dtype))
    d_weights = warpgroup_mma_wait(LATER, deps=[d_product])
    ds_place.store((weights * (d_weights - delta[:, None])).to(ds_place.dtype))
    fence_async_shared()
    sync()


@gluon.jit
def _weights(
    d_q, tiles, numbers, squares, bars, items, runs, run_blocks, blocks, heads, scale,
    RADIUS: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr, QS: gl.constexpr,
    KS: gl.constexpr, FS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """P and dS of all pairs, and dq."""
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    of_query: gl.constexpr = gl.SliceLayout(1, score)
    of_row: gl.constexpr = gl.SliceLayout(0, score)
    K0: gl.constexpr = 2 * QS
    F0: gl.constexpr = 2 * QS + 2 * KS
    factor = scale * LOG2E
    queries, keys, pairs, turns, steps = 0, 0, 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, low, end = span(item, runs, run_blocks, blocks, RADIUS)
        for i in range(first, stop):
            s = queries % QS
            mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
            shift = numbers.index(s).load(of_query)
            delta = numbers.index(QS + s).load(of_query)

            # The key tile before, far rows, its own key tile; where AHEAD, products of the next begin before the
            # weights of one. The first block has no key tile before it, and is given its own with weights of 0.
            LATER: gl.constexpr = 2 if AHEAD else 0
            number = keys + gl.maximum(i - 1, low) - low
            before = number % KS
            mbarrier.wait(bars.index(K_FULL + before), number // KS & 1)
            product, d_product = _begin_at(tiles, s, K0 + before, K0 + KS + before, score, D, QS)
            f = steps % FS
            far_at = F0 + 2 * f * TILES
            if AHEAD:
                next_product, next_d = _begin_far(tiles, bars, s, far_at, f, steps // FS & 1, score, D, QS)
            scores = warpgroup_mma_wait(1 + LATER, deps=[product])
            weights = gl.exp2(scores * factor - gl.where(shift * 0 + i > 0, shift, float("inf"))[:, None])
            mbarrier.wait(bars.index(P_EMPTY), pairs & 1 ^ 1)
            _finish(weights, d_product, delta, squares.index(0), squares.index(1), LATER)
            # a key tile of the run before is another program's
            if i > first:
                mbarrier.arrive(bars.index(P_FULL), count=1)
                pairs += 1

            number = keys + i - low
            own = number % KS
            for tile in gl.static_range(TILES):
                if AHEAD:
                    product, d_product = next_product, next_d
                    if tile + 1 < TILES:
                        next_product, next_d = _begin_at(tiles, s, far_at + 2, far_at + 3, score, D, QS)
                    else:
                        mbarrier.wait(bars.index(K_FULL + own), number // KS & 1)
                        next_product, next_d = _begin_at(tiles, s, K0 + own, K0 + KS + own, score, D, QS)
                elif tile == 0:
                    product, d_product = _begin_far(tiles, bars, s, far_at, f, steps // FS & 1, score, D, QS)
                else:
                    product, d_product = _begin_at(tiles, s, far_at + 2, far_at + 3, score, D, QS)
                bias = numbers.index(2 * QS + (2 * f + i % 2) * TILES + tile).load(of_row)
                scores = warpgroup_mma_wait(1 + LATER, deps=[product])
                weights = gl.exp2(scores * factor + (bias[None, :] - shift[:, None]))
                mbarrier.wait(bars.index(F_EMPTY + tile), turns & 1 ^ 1)
                if tile == 0:
                    # dq of the block before leaves from here
                    tma.store_wait(0)
                    sync()
                    p_place = _far_p(tiles, 0, QS, KS, FS, TILES)
                    _finish(weights, d_product, delta, p_place, squares.index(3), LATER)
                else:
                    _finish(weights, d_product, delta, squares.index(4), squares.index(5), LATER)
                mbarrier.arrive(bars.index(F_FULL + tile), count=1)
            turns += 1

            if AHEAD:
                product, d_product = next_product, next_d
            else:
                mbarrier.wait(bars.index(K_FULL + own), number // KS & 1)
                product, d_product = _begin_at(tiles, s, K0 + own, K0 + KS + own, score, D, QS)
            scores = warpgroup_mma_wait(1, deps=[product])
            weights = gl.exp2(scores * factor - shift[:, None])
            line = gl.arange(0, BLOCK, of_query)[:, None]
            weights = gl.where(gl.arange(0, 64, of_row)[None, :] <= line, weights, 0.0)
            mbarrier.wait(bars.index(P_EMPTY), pairs & 1 ^ 1)
            _finish(weights, d_product, delta, squares.index(0), squares.index(2), 0)
            mbarrier.arrive(bars.index(P_FULL), count=1)
            pairs += 1

            zero = _anew(0)
            acc = gl.zeros([BLOCK, D], gl.float32, wide)
            k_tile = tiles.index(K0 + before + zero).reshape([BLOCK, D])
            acc = warpgroup_mma(squares.index(1 + zero), k_tile, acc, use_acc=False, is_async=True)
            k_tile = tiles.index(far_at + zero).reshape([64, D])
            acc = warpgroup_mma(squares.index(3 + zero), k_tile, acc, is_async=True)
            if TILES == 2:
                k_tile = tiles.index(far_at + 2 + zero).reshape([64, D])
                acc = warpgroup_mma(squares.index(5 + zero), k_tile, acc, is_async=True)
            k_tile = tiles.index(K0 + own + zero).reshape([BLOCK, D])
            acc = warpgroup_mma(squares.index(2 + zero), k_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            sync()
            mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            if (i % 2 == 1) | (i == stop - 1):
                mbarrier.arrive(bars.index(FAR_EMPTY + f), count=1)
                steps += 1
            if i > low:
                mbarrier.arrive(bars.index(K_EMPTY + before), count=1)
            if (i == stop - 1) & (end == stop):
                mbarrier.arrive(bars.index(K_EMPTY + own), count=1)
            # dq leaves from where P of far rows was, once it has been added up
            mbarrier.wait(bars.index(F_EMPTY), turns & 1 ^ 1)
            place = tiles.index(F0 + 2 * FS * TILES)
            place.reshape([BLOCK, D]).store((acc * scale).to(tiles.dtype))
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(d_q, [unit // heads, unit % heads, i * BLOCK, 0], place)
            queries += 1

        # queries after the run that read its last key tile
        for _ in range(stop, end):
            s = queries % QS
            mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
            own = (keys + stop - 1 - low) % KS
            shift = numbers.index(s).load(of_query)
            delta = numbers.index(QS + s).load(of_query)
            product, d_product = _begin(
                tiles.index(s).reshape([BLOCK, D]), tiles.index(QS + s).reshape([BLOCK, D]),
                tiles.index(K0 + own).reshape([BLOCK, D]), tiles.index(K0 + KS + own).reshape([BLOCK, D]), score, 64,
            )  # fmt: skip
            scores = warpgroup_mma_wait(1, deps=[product])
            weights = gl.exp2(scores * factor - shift[:, None])
            mbarrier.wait(bars.index(P_EMPTY), pairs & 1 ^ 1)
            _finish(weights, d_product, delta, squares.index(0), squares.index(1), 0)
            mbarrier.arrive(bars.index(P_FULL), count=1)
            mbarrier.arrive(bars.index(K_EMPTY + own), count=1)
            mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            pairs += 1
            queries += 1
        keys += stop - low
    # shared memory must be there until everything has left it
    tma.store_wait(0)


@gluon.jit
def _add(
    acc_k, acc_v, tiles, p, ds, bars, s, turn, FULL: gl.constexpr, EMPTY: gl.constexpr, D: gl.constexpr,
    QS: gl.constexpr,
):  # fmt: skip
    """The next tile's part of dk and dv."""
    mbarrier.wait(bars.index(FULL), turn & 1)
    s = s + _anew(0)
    d_tile = tiles.index(QS + s).reshape([BLOCK, D])
    acc_v = warpgroup_mma(p.permute((1, 0)), d_tile, acc_v, is_async=True)
    q_tile = tiles.index(s).reshape([BLOCK, D])
    acc_k = warpgroup_mma(ds.permute((1, 0)), q_tile, acc_k, is_async=True)
    acc_v, acc_k = warpgroup_mma_wait(0, deps=[acc_v, acc_k])
    sync()
    if EMPTY >= 0:
        mbarrier.arrive(bars.index(EMPTY), count=1)
    return acc_k, acc_v


@gluon.jit
def _near(
    d_k, d_v, tiles, squares, bars, items, runs, run_blocks, blocks, heads, scale,
    RADIUS: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr, FS: gl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile after the other."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = tiles.dtype
    queries, keys, pairs = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        _unit, first, stop, low, end = span(item, runs, run_blocks, blocks, RADIUS)
        # the key tile before the run is another program's
        keys += first - low
        for j in range(first, stop):
            acc_k = gl.zeros([BLOCK, D], gl.float32, wide)
            acc_v = gl.zeros([BLOCK, D], gl.float32, wide)
            for i in range(j, gl.minimum(j + RADIUS + 1, end)):
                number = queries + i - j
                s = number % QS
                mbarrier.wait(bars.index(Q_FULL + s), number // QS & 1)
                # of its own queries, and of those of the block after
                ds = squares.index(2 + j - i)
                acc_k, acc_v = _add(acc_k, acc_v, tiles, squares.index(0), ds, bars, s, pairs, P_FULL, P_EMPTY, D, QS)
                pairs += 1
                if (i == j) | (i == stop):
                    mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
                if (i == j) & (j > low):
                    # not before this: then the others are through with it as well, or with the run before
                    tma.store_wait(0)
                    sync()
                    mbarrier.arrive(bars.index(K_EMPTY + (keys - 1) % KS), count=1)
            queries += 1
            # dv leaves from where the values were: weights have been made of them
            unit = item // runs
            b, h = unit // heads, unit % heads
            place = tiles.index(2 * QS + KS + keys % KS)
            other = tiles.index(2 * (QS + KS + FS * TILES) + 1)
            place.reshape([BLOCK, D]).store(acc_v.to(dtype))
            other.reshape([BLOCK, D]).store((acc_k * scale).to(dtype))
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(d_v, [b, h, j * BLOCK, 0], place)
            tma.async_copy_shared_to_global(d_k, [b, h, j * BLOCK, 0], other)
            keys += 1
        tma.store_wait(0)
        sync()
        mbarrier.arrive(bars.index(K_EMPTY + (keys - 1) % KS), count=1)
        queries += end - stop


@gluon.jit
def _leave(
    acc, grad, place, n, last, unit, own_levels, done, levels, far_count, RANK: gl.constexpr, RADIUS: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """Store the rows of low levels that no later block of the run reads, 16 at a time, by way of shared memory."""
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    place.store(acc.to(place.dtype))
    sync()
    for part in gl.static_range(4):
        lowest = part * 16 // (2 * RANK)
        if (lowest < own_levels) & ((((n + 1) & ((2 << lowest) - 1)) == 0) | (n == last)):
            zero = _anew(0)
            slot = part * 16 + zero + gl.arange(0, 16, gl.SliceLayout(1, across))
            columns = zero + gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
            level, group, row, _ = far_rows(n, slot, done, levels, n, RANK, RADIUS)
            whole = (((n + 1) & ((2 << level) - 1)) == 0) | (n == last)
            leaving = whole & (level < own_levels) & (level < levels) & (group >= 0) & (group < (done >> level))
            at = (unit.to(gl.int64) * far_count + row)[:, None] * D + columns
            gl.store(grad + at, place.slice(part * 16, 16).load(across), mask=leaving[:, None])
    sync()


@gluon.jit
def _far(
    d_far_k, d_far_v, piece_k, piece_v, tiles, squares, bars, items, runs, run_blocks, blocks, own_levels, done, levels,
    far_count, scale,
    RADIUS: gl.constexpr, RANK: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr, QS: gl.constexpr,
    KS: gl.constexpr, FS: gl.constexpr,
):  # fmt: skip
    """dk and dv of 64 or 128 far rows."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    queries, turns = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, _low, end = span(item, runs, run_blocks, blocks, RADIUS)
        acc_k = gl.zeros([64, D], gl.float32, wide)
        acc_v = gl.zeros([64, D], gl.float32, wide)
        more_k, more_v = acc_k, acc_v
        for n in range(first, stop):
            s = queries % QS
            mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
            p, ds = _far_p(tiles, _anew(0), QS, KS, FS, TILES), squares.index(3 + _anew(0))
            acc_k, acc_v = _add(acc_k, acc_v, tiles, p, ds, bars, s, turns, F_FULL, -1, D, QS)
            if (n % 2 == 1) | (n == stop - 1):
                place = tiles.index(2 * (QS + KS + FS * TILES)).reshape([64, D])
                _leave(
                    acc_k * scale,
                    d_far_k,
                    place,
                    n,
                    stop - 1,
                    unit,
                    own_levels,
                    done,
                    levels,
                    far_count,
                    RANK,
                    RADIUS,
                    D,
                )
                _leave(acc_v, d_far_v, place, n, stop - 1, unit, own_levels, done, levels, far_count, RANK, RADIUS, D)
                level = (_anew(0) + gl.arange(0, 64, gl.SliceLayout(1, wide))) // (2 * RANK)
                kept = (((n + 1) & ((2 << level) - 1)) != 0) | (level >= own_levels)
                acc_k = gl.where(kept[:, None], acc_k, 0.0)
                acc_v = gl.where(kept[:, None], acc_v, 0.0)
            mbarrier.arrive(bars.index(F_EMPTY), count=1)
            if TILES == 2:
                more_k, more_v = _add(
                    more_k, more_v, tiles, squares.index(4), squares.index(5), bars, s, turns, F_FULL + 1, F_EMPTY + 1,
                    D, QS,
                )  # fmt: skip
            mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            turns += 1
            queries += 1
        leave_pieces(
            acc_k * scale, acc_v, piece_k, piece_v, 0, unit, item % runs, runs, own_levels, levels, wide, D, RANK
        )
        if TILES == 2:
            # levels that are wider than any run
            leave_pieces(
                more_k * scale, more_v, piece_k, piece_v, 1, unit, item % runs, runs, own_levels, levels, wide, D, RANK
            )
        # queries that only the near field asks
        for _ in range(stop, end):
            s = queries % QS
            mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
            sync()
            mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            queries += 1


VARIES = ["items", "runs", "run_blocks", "blocks", "heads", "tokens", "own_levels", "done", "levels", "far_count"]
VARIES += ["log_segment"]


@gluon.jit(do_not_specialize=VARIES)
def multipole_walk(
    q, d_out, k, v, shift, delta, far_k, far_v, d_q, d_k, d_v, d_far_k, d_far_v, piece_k, piece_v,
    items, runs, run_blocks, blocks, heads, tokens, own_levels, done, levels, far_count, log_segment, scale,
    RADIUS: gl.constexpr, RANK: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr,
    QS: gl.constexpr, KS: gl.constexpr, FS: gl.constexpr, AHEAD: gl.constexpr, STEP: gl.constexpr,
    NEAR_REGISTERS: gl.constexpr, FAR_REGISTERS: gl.constexpr, LOADING: gl.constexpr,
):  # fmt: skip
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # queries, their gradients, keys, values, far keys and far values; where P of the first far rows lies and dq leaves
    # from; where dk leaves from
    tiles = gl.allocate_shared_memory(q.dtype, [2 * (QS + KS + FS * TILES) + 2, 1, 1, BLOCK, D], q.layout)
    # P of near pairs, dS of the key tile before, of the block's own and of the first far rows; P and dS of further ones
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, 64], q.dtype)
    squares = gl.allocate_shared_memory(q.dtype, [4 + 2 * (TILES - 1), BLOCK, 64], square)
    # shift and delta, and what is added to the scores of far rows, of those of an even block and of the odd one
    numbers = gl.allocate_shared_memory(gl.float32, [2 * QS + 2 * FS * TILES, 64], plain)
    bars = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(QS):
        # the tiles, and 32 threads that each report their own copies
        mbarrier.init(bars.index(Q_FULL + s), count=33)
        mbarrier.init(bars.index(Q_EMPTY + s), count=3)
    for s in gl.static_range(KS):
        mbarrier.init(bars.index(K_FULL + s), count=1)
        mbarrier.init(bars.index(K_EMPTY + s), count=2)
    for s in gl.static_range(FS):
        mbarrier.init(bars.index(FAR_FULL + s), count=65)
        mbarrier.init(bars.index(FAR_EMPTY + s), count=1)
    mbarrier.init(bars.index(P_FULL), count=1)
    mbarrier.init(bars.index(P_EMPTY), count=1)
    for tile in gl.static_range(TILES):
        mbarrier.init(bars.index(F_FULL + tile), count=1)
        mbarrier.init(bars.index(F_EMPTY + tile), count=1)
    fence_async_shared()

    # constants stay constants only where they are written into the call
    gl.warp_specialize([
        (_weights, (
            d_q, tiles, numbers, squares, bars, items, runs, run_blocks, blocks, heads, scale,
            RADIUS, TILES, D, QS, KS, FS, AHEAD,
        )),
        (_near, (
            d_k, d_v, tiles, squares, bars, items, runs, run_blocks, blocks, heads, scale,
            RADIUS, TILES, D, QS, KS, FS,
        )),
        (_far, (
            d_far_k, d_far_v, piece_k, piece_v, tiles, squares, bars, items, runs, run_blocks, blocks, own_levels, done,
            levels, far_count, scale, RADIUS, RANK, TILES, D, QS, KS, FS,
        )),
        (_load_rows, (
            far_k, far_v, tiles, numbers, bars, items, runs, run_blocks, blocks, done, levels, far_count,
            log_segment, RADIUS, RANK, TILES, D, QS, KS, FS, STEP,
        )),
        (_load_tiles, (
            q, d_out, k, v, shift, delta, tiles, numbers, bars, items, runs, run_blocks, blocks, heads,
            RADIUS, D, QS, KS,
        )),
    ], [4, 4, 2, 1], [NEAR_REGISTERS, FAR_REGISTERS, LOADING, LOADING])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        q_stages, k_stages, far_stages: places of queries, of keys and values, and of far rows.
        ahead: the products of a tile begin before the weights of the tile before.
        near, far, loading: registers of a thread. The warps that make weights get the rest.
        step: far rows whose addresses are in registers at a time.
    """

    q_stages: int = 2
    k_stages: int = 2
    far_stages: int = 1
    ahead: bool = True
    near: int = 160
    far: int = 160
    loading: int = 24
    step: int = 8


# width, tiles of 64 far rows -> tiles
TILES = {
    (128, 1): Tiles(),
    (64, 1): Tiles(3, 3, 2, near=104, far=112),
    (64, 2): Tiles(3, 3, near=104, far=168),
}
