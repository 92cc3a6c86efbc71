"""Backward of FMA on Hopper GPUs: the near field alone, for blocks of 128, in Gluon.

Roles as in multipole_walk: one group of four warps makes weights and dq, and two add up, each dk and dv of 64 keys of a
block. A block of queries meets the block of keys before it first, whose sums are then whole, and its own after that:
seven pairs of 64 x 64. At d = 64 dS of all of them stays in shared memory until dq is made; at d = 128 there is room
for two, and dq is added up pair by pair.
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

from farfield.kernels.hopper import LOG2E, report, sync
from farfield.kernels.multipole_tree import BLOCK, span
from farfield.kernels.multipole_walk import _add, _anew, _begin, _finish

# kinds of barriers, four a kind
Q_FULL, Q_EMPTY, K_FULL, K_EMPTY, P_FULL, P_EMPTY = (gl.constexpr(4 * kind) for kind in range(6))
BARRIERS = gl.constexpr(4 * 6)
PAIRS = gl.constexpr(7)
# heads of 128: queries, their gradients, keys and values take 12 places; P and dS of both adding groups
WIDE_P, WIDE_DS = gl.constexpr(12), gl.constexpr(13)


@gluon.jit
def _load(
    q, d_out, k, v, shift, delta, tiles, numbers, bars, items, runs, run_blocks, blocks, heads,
    D: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr,
):  # fmt: skip
    """Queries, their gradients and statistics, keys and values, a block of 128 at a time, by one warp."""
    BYTES: gl.constexpr = 2 * 2 * 2 * BLOCK * D
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    queries, keys = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, low, end = span(item, runs, run_blocks, blocks, 1)
        b, h = unit // heads, unit % heads
        for x in range(low, end):
            if x >= first:
                s = queries % QS
                full = bars.index(Q_FULL + s)
                mbarrier.wait(bars.index(Q_EMPTY + s), queries // QS & 1 ^ 1)
                mbarrier.expect(full, BYTES)
                for half in gl.static_range(2):
                    row, at = x * (2 * BLOCK) + half * BLOCK, 2 * s + half
                    tma.async_copy_global_to_shared(q, [b, h, row, 0], full, tiles.index(at))
                    tma.async_copy_global_to_shared(d_out, [b, h, row, 0], full, tiles.index(2 * QS + at))
                    stat = unit.to(gl.int64) * (blocks * (2 * BLOCK)) + row + gl.arange(0, BLOCK, flat)
                    async_copy.async_copy_global_to_shared(numbers.index(at), shift + stat)
                    async_copy.async_copy_global_to_shared(numbers.index(2 * QS + at), delta + stat)
                async_copy.mbarrier_arrive(full, increment_count=False)
                queries += 1
            if x < stop:
                s = keys % KS
                full = bars.index(K_FULL + s)
                mbarrier.wait(bars.index(K_EMPTY + s), keys // KS & 1 ^ 1)
                mbarrier.expect(full, BYTES)
                for half in gl.static_range(2):
                    row, at = x * (2 * BLOCK) + half * BLOCK, 4 * QS + 2 * s + half
                    tma.async_copy_global_to_shared(k, [b, h, row, 0], full, tiles.index(at))
                    tma.async_copy_global_to_shared(v, [b, h, row, 0], full, tiles.index(2 * KS + at))
                keys += 1


@gluon.jit
def _pair(tiles, s, before, own, score: gl.constexpr, T: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr):
    """The products of pair T of a block, under way.

    Four with the block before, then the first half of its own keys with both halves of the queries, and the second half
    with the second.
    """
    D: gl.constexpr = tiles.shape[4]
    HALF: gl.constexpr = 1 if T == 2 or T == 3 or T >= 5 else 0
    zero = _anew(0)
    s = s + zero
    at = 4 * QS + zero + (2 * before + T % 2 if T < 4 else 2 * own + (1 if T == 6 else 0))
    q_tile, d_tile = tiles.index(2 * s + HALF), tiles.index(2 * QS + 2 * s + HALF)
    k_tile, v_tile = tiles.index(at), tiles.index(2 * KS + at)
    return _begin(
        q_tile.reshape([BLOCK, D]), d_tile.reshape([BLOCK, D]), k_tile.reshape([BLOCK, D]), v_tile.reshape([BLOCK, D]),
        score, 64,
    )  # fmt: skip


@gluon.jit
def _weights(
    d_q, tiles, numbers, bars, items, runs, run_blocks, blocks, heads, scale, QS: gl.constexpr, KS: gl.constexpr
):
    """P and dS of all pairs, and dq."""
    D: gl.constexpr = tiles.shape[4]
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    of_query: gl.constexpr = gl.SliceLayout(1, score)
    of_row: gl.constexpr = gl.SliceLayout(0, score)
    K0: gl.constexpr = 4 * QS
    S0: gl.constexpr = 4 * QS + 4 * KS
    factor = scale * LOG2E
    queries, keys, first_pairs, second_pairs = 0, 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, low, end = span(item, runs, run_blocks, blocks, 1)
        b, h = unit // heads, unit % heads
        for x in range(first, stop):
            s = queries % QS
            mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
            # the first block has no keys before it, and is given its own with weights of 0
            number = keys + gl.maximum(x - 1, low) - low
            before = number % KS
            mbarrier.wait(bars.index(K_FULL + before), number // KS & 1)
            number = keys + x - low
            own = number % KS
            product, d_product = _pair(tiles, s, before, own, score, 0, QS, KS)
            # dq of the block before leaves from where dS goes
            tma.store_wait(0)
            for t in gl.static_range(PAIRS):
                if t == 3:
                    mbarrier.wait(bars.index(K_FULL + own), number // KS & 1)
                if t + 1 < PAIRS:
                    following, d_following = _pair(tiles, s, before, own, score, t + 1 if t + 1 < PAIRS else 0, QS, KS)
                half = 1 if t == 2 or t == 3 or t >= 5 else 0
                shift = numbers.index(2 * s + half).load(of_query)
                delta = numbers.index(2 * QS + 2 * s + half).load(of_query)
                scores = warpgroup_mma_wait(3 if t + 1 < PAIRS else 1, deps=[product])
                if t < 4:
                    shift = gl.where(shift * 0 + x > 0, shift, float("inf"))
                weights = gl.exp2(scores * factor - shift[:, None])
                if t == 4 or t == 6:
                    line = gl.arange(0, BLOCK, of_query)[:, None]
                    weights = gl.where(gl.arange(0, 64, of_row)[None, :] <= line, weights, 0.0)
                which = 1 if t == 1 or t == 3 or t == 6 else 0
                pairs = second_pairs if which else first_pairs
                mbarrier.wait(bars.index(P_EMPTY + which), pairs & 1 ^ 1)
                if t == 0:
                    sync()
                p_place = tiles.index(S0 + PAIRS + which).reshape([BLOCK, 64])
                ds_place = tiles.index(S0 + t).reshape([BLOCK, 64])
                _finish(weights, d_product, delta, p_place, ds_place, 2 if t + 1 < PAIRS else 0)
                # keys of the run before are another program's
                if (t >= 4) | (x > first):
                    mbarrier.arrive(bars.index(P_FULL + which), count=1)
                    if which:
                        second_pairs += 1
                    else:
                        first_pairs += 1
                if t + 1 < PAIRS:
                    product, d_product = following, d_following
            zero = gl.zeros([BLOCK, D], gl.float32, score)
            at = K0 + _anew(0)
            k0 = tiles.index(at + 2 * before).reshape([BLOCK, D])
            k1 = tiles.index(at + 2 * before + 1).reshape([BLOCK, D])
            k2 = tiles.index(at + 2 * own).reshape([BLOCK, D])
            k3 = tiles.index(at + 2 * own + 1).reshape([BLOCK, D])
            acc = warpgroup_mma(tiles.index(S0).reshape([BLOCK, 64]), k0, zero, use_acc=False, is_async=True)
            acc = warpgroup_mma(tiles.index(S0 + 1).reshape([BLOCK, 64]), k1, acc, is_async=True)
            acc = warpgroup_mma(tiles.index(S0 + 4).reshape([BLOCK, 64]), k2, acc, is_async=True)
            more = warpgroup_mma(tiles.index(S0 + 2).reshape([BLOCK, 64]), k0, zero, use_acc=False, is_async=True)
            more = warpgroup_mma(tiles.index(S0 + 3).reshape([BLOCK, 64]), k1, more, is_async=True)
            more = warpgroup_mma(tiles.index(S0 + 5).reshape([BLOCK, 64]), k2, more, is_async=True)
            more = warpgroup_mma(tiles.index(S0 + 6).reshape([BLOCK, 64]), k3, more, is_async=True)
            acc, more = warpgroup_mma_wait(0, deps=[acc, more])
            sync()
            mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            if x > low:
                mbarrier.arrive(bars.index(K_EMPTY + before), count=1)
            if (x == stop - 1) & (end == stop):
                mbarrier.arrive(bars.index(K_EMPTY + own), count=1)
            # these have been added to dk: the sums of pair 4 waited for it
            tiles.index(S0).reshape([BLOCK, D]).store((acc * scale).to(tiles.dtype))
            tiles.index(S0 + 2).reshape([BLOCK, D]).store((more * scale).to(tiles.dtype))
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(d_q, [b, h, x * (2 * BLOCK), 0], tiles.index(S0))
            tma.async_copy_shared_to_global(d_q, [b, h, x * (2 * BLOCK) + BLOCK, 0], tiles.index(S0 + 2))
            queries += 1

        # queries after the run that read its last keys
        for _ in range(stop, end):
            s = queries % QS
            mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
            own = (keys + stop - 1 - low) % KS
            tma.store_wait(0)
            for t in gl.static_range(4):
                product, d_product = _pair(tiles, s, own, own, score, t, QS, KS)
                half = t // 2
                shift = numbers.index(2 * s + half).load(of_query)
                delta = numbers.index(2 * QS + 2 * s + half).load(of_query)
                scores = warpgroup_mma_wait(1, deps=[product])
                weights = gl.exp2(scores * factor - shift[:, None])
                which = t % 2
                pairs = second_pairs if which else first_pairs
                mbarrier.wait(bars.index(P_EMPTY + which), pairs & 1 ^ 1)
                if t == 0:
                    sync()
                p_place = tiles.index(S0 + PAIRS + which).reshape([BLOCK, 64])
                _finish(weights, d_product, delta, p_place, tiles.index(S0 + t).reshape([BLOCK, 64]), 0)
                mbarrier.arrive(bars.index(P_FULL + which), count=1)
                if which:
                    second_pairs += 1
                else:
                    first_pairs += 1
            mbarrier.arrive(bars.index(K_EMPTY + own), count=1)
            mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            queries += 1
        keys += stop - low
    # shared memory must be there until everything has left it
    tma.store_wait(0)


@gluon.jit
def _square(tiles, at, half: gl.constexpr):
    """64 x 64 in one half of a place."""
    D: gl.constexpr = tiles.shape[4]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, 64], tiles.dtype)
    return tiles.index(at)._reinterpret(tiles.dtype, [D // 64, BLOCK, 64], layout).index(half)


@gluon.jit
def _weigh(
    acc, tiles, numbers, bars, x, k_at, turns, factor,
    HALF: gl.constexpr, G: gl.constexpr, BEFORE: gl.constexpr, DIAGONAL: gl.constexpr, ADDED: gl.constexpr,
    LEAVES: gl.constexpr, FIRST: gl.constexpr, DQ: gl.constexpr,
):  # fmt: skip
    """One pair of 64 queries and 64 keys: P and dS to adding group G, and what it adds to dq, under way.

    BEFORE: keys of the block before, DIAGONAL: the queries' own. ADDED: the group gets it. LEAVES: dq may be on its way
    from where P goes. FIRST: nothing of dq is under way. DQ: dq is wanted.
    """
    D: gl.constexpr = tiles.shape[4]
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    of_query: gl.constexpr = gl.SliceLayout(1, score)
    of_row: gl.constexpr = gl.SliceLayout(0, score)
    zero = _anew(0)
    q_tile, d_tile = tiles.index(HALF + zero).reshape([BLOCK, D]), tiles.index(2 + HALF + zero).reshape([BLOCK, D])
    k_tile, v_tile = tiles.index(k_at + zero).reshape([BLOCK, D]), tiles.index(k_at + 4 + zero).reshape([BLOCK, D])
    product, d_product = _begin(q_tile, d_tile, k_tile, v_tile, score, 64)
    shift = numbers.index(HALF).load(of_query)
    delta = numbers.index(2 + HALF).load(of_query)
    if BEFORE:
        shift = gl.where(shift * 0 + x > 0, shift, float("inf"))
    if FIRST:
        scores = warpgroup_mma_wait(1, deps=[product])
    else:
        # dS of the pair before has been read, too
        scores, acc = warpgroup_mma_wait(1, deps=[product, acc])
    weights = gl.exp2(scores * factor - shift[:, None])
    if DIAGONAL:
        line = gl.arange(0, BLOCK, of_query)[:, None]
        weights = gl.where(gl.arange(0, 64, of_row)[None, :] <= line, weights, 0.0)
    mbarrier.wait(bars.index(P_EMPTY + G), turns & 1 ^ 1)
    if LEAVES:
        tma.store_wait(0)
        sync()
    ds_place = _square(tiles, WIDE_DS + zero, G)
    if ADDED:
        _finish(weights, d_product, delta, _square(tiles, WIDE_P + zero, G), ds_place, 0)
    else:
        d_weights = warpgroup_mma_wait(0, deps=[d_product])
        ds_place.store((weights * (d_weights - delta[:, None])).to(ds_place.dtype))
        fence_async_shared()
        sync()
    if DQ:
        again = _anew(0)
        k_tile = tiles.index(k_at + again).reshape([BLOCK, D])
        acc = warpgroup_mma(_square(tiles, WIDE_DS + again, G), k_tile, acc, use_acc=not FIRST, is_async=True)
    return acc


@gluon.jit
def _leave(d_q, acc, tiles, bars, first_pairs, second_pairs, b, h, row):
    """dq of 64 queries leaves from where P was, once it has been added up."""
    D: gl.constexpr = tiles.shape[4]
    mbarrier.wait(bars.index(P_EMPTY), first_pairs & 1 ^ 1)
    mbarrier.wait(bars.index(P_EMPTY + 1), second_pairs & 1 ^ 1)
    place = tiles.index(WIDE_P)
    place.reshape([BLOCK, D]).store(acc.to(tiles.dtype))
    fence_async_shared()
    sync()
    tma.async_copy_shared_to_global(d_q, [b, h, row, 0], place)


@gluon.jit
def _weights_wide(d_q, tiles, numbers, bars, items, runs, run_blocks, blocks, heads, scale):
    """P and dS of all pairs, and dq, of one half of the queries after the other: there is no room for more.

    The pair of the first halves of queries and own keys is multiplied twice, first for dq; dk and dv of those keys
    begin when those of the block before are whole.
    """
    D: gl.constexpr = tiles.shape[4]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    factor = scale * LOG2E
    queries, keys, first_pairs, second_pairs = 0, 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, low, end = span(item, runs, run_blocks, blocks, 1)
        b, h = unit // heads, unit % heads
        for x in range(first, stop):
            mbarrier.wait(bars.index(Q_FULL), queries & 1)
            # the first block has no keys before it, and is given its own with weights of 0
            number = keys + gl.maximum(x - 1, low) - low
            before = number % 2
            mbarrier.wait(bars.index(K_FULL + before), number // 2 & 1)
            number = keys + x - low
            own = number % 2
            at, own_at = 4 + 2 * before, 4 + 2 * own
            # keys of the run before are another program's
            added = gl.where(x > first, 1, 0)

            acc = gl.zeros([BLOCK, D], gl.float32, wide)
            acc = _weigh(
                acc, tiles, numbers, bars, x, at, first_pairs, factor, 0, 0, True, False, True, True, True, True
            )
            if x > first:
                mbarrier.arrive(bars.index(P_FULL), count=1)
            first_pairs += added
            acc = _weigh(
                acc, tiles, numbers, bars, x, at + 1, second_pairs, factor, 0, 1, True, False, True, False, False, True
            )
            if x > first:
                mbarrier.arrive(bars.index(P_FULL + 1), count=1)
            second_pairs += added
            mbarrier.wait(bars.index(K_FULL + own), number // 2 & 1)
            acc = _weigh(
                acc, tiles, numbers, bars, x, own_at, first_pairs, factor, 0, 0, False, True, False, False, False, True
            )
            acc = warpgroup_mma_wait(0, deps=[acc])
            _leave(d_q, acc * scale, tiles, bars, first_pairs, second_pairs, b, h, x * (2 * BLOCK))

            acc = gl.zeros([BLOCK, D], gl.float32, wide)
            acc = _weigh(
                acc, tiles, numbers, bars, x, at, first_pairs, factor, 1, 0, True, False, True, True, True, True
            )
            if x > first:
                mbarrier.arrive(bars.index(P_FULL), count=1)
            first_pairs += added
            acc = _weigh(
                acc, tiles, numbers, bars, x, at + 1, second_pairs, factor, 1, 1, True, False, True, False, False, True
            )
            if x > first:
                mbarrier.arrive(bars.index(P_FULL + 1), count=1)
            second_pairs += added
            acc = _weigh(
                acc, tiles, numbers, bars, x, own_at, first_pairs, factor, 0, 0, False, True, True, False, False, False
            )
            mbarrier.arrive(bars.index(P_FULL), count=1)
            first_pairs += 1
            acc = _weigh(
                acc, tiles, numbers, bars, x, own_at, first_pairs, factor, 1, 0, False, False, True, False, False, True
            )
            mbarrier.arrive(bars.index(P_FULL), count=1)
            first_pairs += 1
            acc = _weigh(
                acc, tiles, numbers, bars, x, own_at + 1, second_pairs, factor, 1, 1, False, True, True, False, False,
                True,
            )  # fmt: skip
            mbarrier.arrive(bars.index(P_FULL + 1), count=1)
            second_pairs += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            report(bars, Q_EMPTY)
            if x > low:
                mbarrier.arrive(bars.index(K_EMPTY + before), count=1)
            if (x == stop - 1) & (end == stop):
                mbarrier.arrive(bars.index(K_EMPTY + own), count=1)
            _leave(d_q, acc * scale, tiles, bars, first_pairs, second_pairs, b, h, x * (2 * BLOCK) + BLOCK)
            queries += 1

        # queries after the run that read its last keys
        for x in range(stop, end):
            mbarrier.wait(bars.index(Q_FULL), queries & 1)
            own = (keys + stop - 1 - low) % 2
            acc = gl.zeros([BLOCK, D], gl.float32, wide)
            for half in gl.static_range(2):
                _weigh(
                    acc, tiles, numbers, bars, x, 4 + 2 * own, first_pairs, factor,
                    half, 0, False, False, True, half == 0, True, False,
                )  # fmt: skip
                mbarrier.arrive(bars.index(P_FULL), count=1)
                first_pairs += 1
                _weigh(
                    acc, tiles, numbers, bars, x, 5 + 2 * own, second_pairs, factor,
                    half, 1, False, False, True, False, True, False,
                )  # fmt: skip
                mbarrier.arrive(bars.index(P_FULL + 1), count=1)
                second_pairs += 1
            mbarrier.arrive(bars.index(K_EMPTY + own), count=1)
            mbarrier.arrive(bars.index(Q_EMPTY), count=1)
            queries += 1
        keys += stop - low
    # shared memory must be there until everything has left it
    tma.store_wait(0)


@gluon.jit
def _add_pair(
    acc_k, acc_v, tiles, bars, at, turn, T: gl.constexpr, G: gl.constexpr, QS: gl.constexpr, S0: gl.constexpr
):  # fmt: skip
    D: gl.constexpr = tiles.shape[4]
    if D == 64:
        p, ds = tiles.index(S0 + PAIRS + G).reshape([BLOCK, 64]), tiles.index(S0 + T).reshape([BLOCK, 64])
    else:
        p, ds = _square(tiles, WIDE_P + _anew(0), G), _square(tiles, WIDE_DS + _anew(0), G)
    return _add(acc_k, acc_v, tiles, p, ds, bars, at, turn, P_FULL + G, P_EMPTY + G, D, 2 * QS)


@gluon.jit
def _sums(
    d_k, d_v, tiles, bars, items, runs, run_blocks, blocks, heads, scale,
    G: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr,
):  # fmt: skip
    """dk and dv of one half of a block of keys after the other."""
    D: gl.constexpr = tiles.shape[4]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S0: gl.constexpr = 4 * QS + 4 * KS
    queries, keys, pairs = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        unit, first, stop, low, end = span(item, runs, run_blocks, blocks, 1)
        b, h = unit // heads, unit % heads
        # the keys before the run are another program's
        keys += first - low
        for j in range(first, stop):
            acc_k = gl.zeros([BLOCK, D], gl.float32, wide)
            acc_v = gl.zeros([BLOCK, D], gl.float32, wide)
            s = queries % QS
            mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
            if G == 0:
                acc_k, acc_v = _add_pair(acc_k, acc_v, tiles, bars, 2 * s, pairs, 4, G, QS, S0)
                acc_k, acc_v = _add_pair(acc_k, acc_v, tiles, bars, 2 * s + 1, pairs + 1, 5, G, QS, S0)
                pairs += 2
            else:
                acc_k, acc_v = _add_pair(acc_k, acc_v, tiles, bars, 2 * s + 1, pairs, 6, G, QS, S0)
                pairs += 1
            mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            if j > low:
                # not before this: then the others are through with it as well, or with the run before
                tma.store_wait(0)
                sync()
                mbarrier.arrive(bars.index(K_EMPTY + (keys - 1) % KS), count=1)
            queries += 1
            for i in range(j + 1, gl.minimum(j + 2, end)):
                s = queries % QS
                mbarrier.wait(bars.index(Q_FULL + s), queries // QS & 1)
                acc_k, acc_v = _add_pair(acc_k, acc_v, tiles, bars, 2 * s, pairs, G, G, QS, S0)
                acc_k, acc_v = _add_pair(acc_k, acc_v, tiles, bars, 2 * s + 1, pairs + 1, 2 + G, G, QS, S0)
                pairs += 2
                if i == stop:
                    mbarrier.arrive(bars.index(Q_EMPTY + s), count=1)
            # both leave from where the values were: weights have been made of them
            place = tiles.index(4 * QS + 2 * KS + 2 * (keys % KS) + G)
            row = j * (2 * BLOCK) + G * BLOCK
            place.reshape([BLOCK, D]).store(acc_v.to(tiles.dtype))
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(d_v, [b, h, row, 0], place)
            tma.store_wait(0)
            sync()
            place.reshape([BLOCK, D]).store((acc_k * scale).to(tiles.dtype))
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(d_k, [b, h, row, 0], place)
            keys += 1
        tma.store_wait(0)
        sync()
        mbarrier.arrive(bars.index(K_EMPTY + (keys - 1) % KS), count=1)
        queries += end - stop


@gluon.jit(do_not_specialize=["items", "runs", "run_blocks", "blocks", "heads"])
def multipole_walk_near(
    q, d_out, k, v, shift, delta, d_q, d_k, d_v, items, runs, run_blocks, blocks, heads, scale,
    D: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr, REGISTERS: gl.constexpr, LOADING: gl.constexpr,
):  # fmt: skip
    # queries, their gradients, keys and values, two a block; dS of seven pairs, from where dq leaves, and P of two
    MORE: gl.constexpr = PAIRS + 2 if D == 64 else 2
    tiles = gl.allocate_shared_memory(q.dtype, [4 * QS + 4 * KS + MORE, 1, 1, BLOCK, D], q.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.float32, [4 * QS, BLOCK], plain)
    bars = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(QS):
        # the tiles, and 32 threads that each report their own copies
        mbarrier.init(bars.index(Q_FULL + s), count=33)
        mbarrier.init(bars.index(Q_EMPTY + s), count=3)
    for s in gl.static_range(KS):
        mbarrier.init(bars.index(K_FULL + s), count=1)
        mbarrier.init(bars.index(K_EMPTY + s), count=3)
    for s in gl.static_range(2):
        mbarrier.init(bars.index(P_FULL + s), count=1)
        mbarrier.init(bars.index(P_EMPTY + s), count=1)
    fence_async_shared()

    # constants stay constants only where they are written into the call
    if D == 64:
        gl.warp_specialize([
            (_weights, (d_q, tiles, numbers, bars, items, runs, run_blocks, blocks, heads, scale, QS, KS)),
            (_sums, (d_k, d_v, tiles, bars, items, runs, run_blocks, blocks, heads, scale, 0, QS, KS)),
            (_sums, (d_k, d_v, tiles, bars, items, runs, run_blocks, blocks, heads, scale, 1, QS, KS)),
            (_load, (
                q, d_out, k, v, shift, delta, tiles, numbers, bars, items, runs, run_blocks, blocks, heads, D, QS, KS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, LOADING])  # fmt: skip
    else:
        gl.warp_specialize([
            (_weights_wide, (d_q, tiles, numbers, bars, items, runs, run_blocks, blocks, heads, scale)),
            (_sums, (d_k, d_v, tiles, bars, items, runs, run_blocks, blocks, heads, scale, 0, QS, KS)),
            (_sums, (d_k, d_v, tiles, bars, items, runs, run_blocks, blocks, heads, scale, 1, QS, KS)),
            (_load, (
                q, d_out, k, v, shift, delta, tiles, numbers, bars, items, runs, run_blocks, blocks, heads, D, QS, KS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, LOADING])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        q_stages, k_stages: blocks of queries, and of keys and values.
        registers, loading: of a thread that adds up, and of one that loads. Those that make weights get the rest.
    """

    q_stages: int = 2
    k_stages: int = 2
    registers: int = 112
    loading: int = 32


# width -> tiles
TILES = {64: Tiles(), 128: Tiles(1, 2, registers=160, loading=24)}
