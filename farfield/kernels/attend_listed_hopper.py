"""attend for lists of a query's own on Hopper GPUs: what each reader of a block gets from it, in Gluon.

A program stays on its multiprocessor and works through runs of readers of one block. One warp copies keys and values of
the next runs by the tensor memory accelerator, where they stay while a run goes by. Two warps gather the readers' rows
of q by asynchronous copies, some tiles ahead. Groups of four computing warps take tiles of 64 rows in turn, and the
result leaves through the place where the queries were, as whole rows.

A run is a piece of the sorted entries of one block, cut where `RUN` divides: run number r belongs to the block of
number K with K + start[K] // RUN <= r < K + 1 + start[K + 1] // RUN, so that no prefix sum over the blocks is needed
and runs are of one size, but for the ends of blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
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
    ALIGNED,
    EVERY,
    LOG2E,
    UNIT,
    aligned,
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
from farfield.kernels.transpose import Readers
from farfield.ops.attend import Call

if TYPE_CHECKING:
    from farfield.kernels.attend_listed import Beside

TOLD = gl.constexpr(4)  # runs that the loading warp may be ahead of the computing ones, as long as most are empty
GROUPS = 2  # of computing warps, with tiles of 64 rows each; `read_blocks_hopper` starts so many
ROWS = 512  # of q in a run: readers, the heads of a unit counted apart


@triton.jit(do_not_specialize=["bounds", "numbers", "steps", "picks", "first", "rows", "row_blocks"])
def deal(
    start, reader, runs, bounds, numbers, steps, picks, first, rows, row_blocks,
    RUN: tl.constexpr, K_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Run -> how many readers, twice the block and 1 if something of it may be hidden, segment, first reader."""
    r = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    low = tl.zeros([SIZE], tl.int32)
    high = tl.zeros([SIZE], tl.int32) + bounds
    for _step in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        at = tl.load(start + middle, mask=open_, other=0)
        not_after = open_ & (middle + at // RUN <= r)
        low = tl.where(not_after, middle + 1, low)
        high = tl.where(open_ & (not_after == 0), middle, high)
    key = low - 1
    segment, m = key // (row_blocks + 1), key % (row_blocks + 1)
    there = (r < numbers) & (m < row_blocks)
    begin = tl.maximum(tl.load(start + key, mask=there, other=0), (r - key) * RUN)
    end = tl.minimum(tl.load(start + key + 1, mask=there, other=0), (r - key + 1) * RUN)
    count = tl.maximum(end - begin, 0)
    hidden = (m + 1) * K_BLOCK > rows
    if CAUSAL:
        token = first + tl.load(reader + begin, mask=there & (count > 0), other=0) // picks
        hidden = hidden | (token < (m + 1) * K_BLOCK - 1)
    at = runs + r * 4
    tl.store(at, count, mask=r < numbers)
    tl.store(at + 1, 2 * m + hidden.to(tl.int32), mask=r < numbers)
    tl.store(at + 2, segment, mask=r < numbers)
    tl.store(at + 3, begin, mask=r < numbers)


@gluon.jit
def _told(told, told_full, told_empty, message, FOUR: gl.constexpr):
    """The four numbers of a run."""
    slot = wait_full(told_full, message)
    which = gl.arange(0, 4, FOUR)
    word = told.index(slot).load(FOUR)
    count = gl.sum(gl.where(which == 0, word, 0), 0)
    block = gl.sum(gl.where(which == 1, word, 0), 0)
    segment = gl.sum(gl.where(which == 2, word, 0), 0)
    begin = gl.sum(gl.where(which == 3, word, 0), 0)
    return count, block, segment, begin


@gluon.jit
def _steps(
    reader, block, begin, count, last, first, picks, rows, STACK: gl.constexpr, K_BLOCK: gl.constexpr,
    BK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """How many tiles of a block there are to read for the rows of a run before `last`, at least one."""
    steps = gl.to_tensor(K_BLOCK // BK)
    if block % 2 == 1:
        end = rows - 1
        if CAUSAL:
            # readers stand in the order of their tokens
            at = gl.minimum((last + STACK - 1) // STACK, count) - 1
            end = gl.minimum(end, first + gl.load(reader + begin + at) // picks)
        steps = gl.minimum(gl.maximum(end - block // 2 * K_BLOCK, 0) // BK + 1, K_BLOCK // BK)
    return steps


@gluon.jit
def _look_up(
    told, wanted, told_full, told_empty, runs, reader, items, units, first, picks, q_b, q_h, q_t,
    STACK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The runs, and where their rows of q begin, in 16 bytes, by one warp some runs ahead of all others."""
    FOUR: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    message = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        which = gl.arange(0, 4, FOUR)
        word = gl.load(runs + item * 4 + which)
        count = gl.sum(gl.where(which == 0, word, 0), 0)
        segment = gl.sum(gl.where(which == 2, word, 0), 0)
        begin = gl.sum(gl.where(which == 3, word, 0), 0)
        row = gl.arange(0, ROWS, flat)
        # rows behind the run's end are some row: nobody looks at what comes of it
        token = first + gl.load(reader + begin + row // STACK, mask=row < count * STACK, other=0) // picks
        slot = wait_empty(told_empty, message)
        told.index(slot).store(word)
        wanted.index(slot).store(segment // units * q_b + (segment % units * STACK + row % STACK) * q_h + token * q_t)
        report(told_full, slot)
        message += 1


@gluon.jit
def _load(
    k, v, told, k_ring, v_ring, told_full, told_empty, k_full, v_full, k_empty, v_empty, reader, items, units,
    first, picks, rows,
    STACK: gl.constexpr, REPEAT: gl.constexpr, GROUPS: gl.constexpr, K_BLOCK: gl.constexpr, BK: gl.constexpr,
    CAUSAL: gl.constexpr, STREAM: gl.constexpr,
):  # fmt: skip
    """Keys and values of the runs, by one warp: a block that is one tile once, a larger one for every GROUPS tiles."""
    FOUR: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    message, turn = 0, 0
    for _item in range(gl.program_id(0), items, gl.num_programs(0)):
        count, block, segment, begin = _told(told, told_full, told_empty, message, FOUR)
        sync()
        mbarrier.arrive(told_empty.index(message % TOLD), count=1)
        message += 1
        b, g = segment // units, segment % units // REPEAT
        passes = gl.where(count > 0, 1, 0)
        if STREAM:
            passes = (count * STACK + 64 * GROUPS - 1) // (64 * GROUPS)
        for j in range(passes):
            steps = gl.to_tensor(1)
            if STREAM:
                steps = _steps(
                    reader, block, begin, count, (j + 1) * 64 * GROUPS, first, picks, rows, STACK, K_BLOCK, BK, CAUSAL
                )
            for n in range(steps):
                row = block // 2 * K_BLOCK + n * BK
                s = wait_empty(k_empty, turn)
                fetch(k, [b, g, row, 0], k_full, k_ring, s)
                wait_empty(v_empty, turn)
                fetch(v, [b, g, row, 0], v_full, v_ring, s)
                turn += 1


@gluon.jit
def _gather(
    q, told, wanted, q_ring, told_full, told_empty, q_full, q_empty, items,
    STACK: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """The readers' rows of q, in a multiple of TOGETHER tiles, by two warps."""
    FOUR: gl.constexpr = gl.BlockedLayout([4], [32], [2], [0])
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [2, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    tiles = wanted._reinterpret(gl.int32, [TOLD * (ROWS // 64), 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    message, turn = 0, 0
    for _item in range(gl.program_id(0), items, gl.num_programs(0)):
        count, _, _, _ = _told(told, told_full, told_empty, message, FOUR)
        for j in range((count * STACK + 64 * TOGETHER - 1) // (64 * TOGETHER) * TOGETHER):
            at = tiles.index(message % TOLD * (ROWS // 64) + j).load(down).to(gl.int64)[:, None] * UNIT
            s = wait_empty(q_empty, turn)
            async_copy.async_copy_global_to_shared(q_ring.index(s).reshape([64, D]), q + at + columns)
            async_copy.mbarrier_arrive(q_full.index(s), increment_count=False)
            turn += 1
        sync()
        mbarrier.arrive(told_empty.index(message % TOLD), count=1)
        message += 1


@gluon.jit
def _hide(scores, row, token, least, rows, layout: gl.constexpr, BK: gl.constexpr, CAUSAL: gl.constexpr):
    """-inf where readers must not see the rows from `row` on; `least` is the first of their tokens."""
    if row + BK > gl.minimum(rows, least + 1):
        at = row + gl.arange(0, BK, gl.SliceLayout(0, layout))[None, :]
        seen = at < rows
        if CAUSAL:
            seen &= at <= token[:, None]
        scores = gl.where(seen, scores, float("-inf"))
    return scores


@gluon.jit
def _biases(bias, row, layout: gl.constexpr, BK: gl.constexpr, OWN: gl.constexpr):
    """Biases of the rows from `row` of a block on; nothing is loaded or added where they are a block's own."""
    at = row + gl.arange(0, BK, gl.SliceLayout(0, layout))
    # x + -0.0 is x, which the compiler knows
    return gl.where(at < OWN, -0.0, gl.load(bias + at, mask=at >= OWN, other=-0.0))


@gluon.jit
def _choose(scores, word, more, row, layout: gl.constexpr, BK: gl.constexpr, OWN: gl.constexpr, EACH: gl.constexpr):
    """Scores of the rows from `row` of a block on with their biases, -inf where a reader does not read them."""
    at = row + gl.arange(0, BK, gl.SliceLayout(0, layout))
    bit = gl.minimum(gl.maximum(at - OWN, 0) // EACH, 31)
    seen = (at < OWN)[None, :] | (((word[:, None] >> bit[None, :]) & 1) != 0)
    return gl.where(seen, scores + more[None, :], float("-inf"))


@gluon.jit
def _take_turn(turns, number, GROUP: gl.constexpr):
    """Products of two groups come in turn, so that each takes the exponentials of the last while the other's run."""
    mbarrier.wait(turns.index(GROUP), (number + 1 - GROUP) & 1)


@gluon.jit
def _compute(
    given, rings,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STACK: gl.constexpr, K_BLOCK: gl.constexpr, BK: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    STREAM: gl.constexpr, REPEAT: gl.constexpr, OWN: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    parts, loose, masses, reader, words, bias, items, first, picks, rows, scale = given
    (
        told, q_ring, k_ring, v_ring, told_full, told_empty, q_full, q_empty, k_full, v_full, k_empty, v_empty, turns,
    ) = rings  # fmt: skip
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    of_value: gl.constexpr = gl.SliceLayout(1, value)
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    FOUR: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    TOGETHER: gl.constexpr = GROUPS if STREAM else 1
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    columns = gl.arange(0, E, gl.SliceLayout(0, across))[None, :]
    message, turn, subs = 0, 0, 0
    for _item in range(gl.program_id(0), items, gl.num_programs(0)):
        count, block, segment, begin = _told(told, told_full, told_empty, message, FOUR)
        sync()
        mbarrier.arrive(told_empty.index(message % TOLD), count=1)
        message += 1
        bias_at = bias
        if OWN:
            bias_at += (segment // REPEAT).to(gl.int64) * rows + block // 2 * K_BLOCK
        if count > 0:
            tiles = (count * STACK + 64 * TOGETHER - 1) // (64 * TOGETHER) * TOGETHER
            if not STREAM:
                s = wait_full(k_full, turn)
                mbarrier.wait(v_full.index(s), turn // STAGES & 1)
            for j in range(GROUP, tiles, GROUPS):
                steps = gl.to_tensor(1)
                if STREAM:
                    steps = _steps(
                        reader, block, begin, count, (j - GROUP + GROUPS) * 64, first, picks, rows, STACK, K_BLOCK,
                        BK, CAUSAL,
                    )  # fmt: skip
                # the first token decides which rows all see
                least = gl.to_tensor(EVERY)
                token = gl.zeros([64], gl.int32, per_row)
                if block % 2 == 1 and CAUSAL:
                    line = j * 64 + gl.arange(0, 64, per_row)
                    token = first + gl.load(reader + begin + line // STACK, mask=line < count * STACK, other=0) // picks
                    front = gl.minimum(j * 64, count * STACK - 1) // STACK
                    least = first + gl.load(reader + begin + front) // picks
                word = token
                if OWN:
                    reading = j * 64 + gl.arange(0, 64, per_row)
                    word = gl.load(words + begin + reading // STACK, mask=reading < count * STACK, other=0)
                    # asked for before the product, which takes as long
                    more = _biases(bias_at, 0, score, BK, OWN)
                slot = (subs + j) % SLOTS
                mbarrier.wait(q_full.index(slot), (subs + j) // SLOTS & 1)
                # the copies were ordinary writes to shared memory; the tensor cores read it another way
                fence_async_shared()
                s = turn % STAGES
                if STREAM:
                    mbarrier.wait(k_full.index(s), turn // STAGES & 1)
                row = block // 2 * K_BLOCK
                keys = k_ring.index(s).reshape([BK, D]).permute((1, 0))
                scores = gl.zeros([64, BK], gl.float32, score)
                acc = gl.zeros([64, E], gl.float32, value)
                queries = q_ring.index(slot).reshape([64, D])
                if STREAM:
                    _take_turn(turns, turn, GROUP)
                product = warpgroup_mma(queries, keys, scores, use_acc=False, is_async=True)
                if STREAM:
                    mbarrier.arrive(turns.index(1 - GROUP), count=1)
                scores = warpgroup_mma_wait(0, deps=[product])
                if STREAM:
                    report(k_empty, s)
                if j > GROUP:
                    # the result of the tile before has left by now
                    tma.store_wait(0)
                    sync()
                    mbarrier.arrive(q_empty.index((subs + j - GROUPS) % SLOTS), count=1)
                scores = _hide(scores, row, token, least, rows, score, BK, CAUSAL)
                if OWN:
                    scores = _choose(scores, word, more, 0, score, BK, OWN, EACH)
                peak = gl.max(scores, 1) * factor
                base = gl.where(peak == float("-inf"), 0.0, peak)
                weights = gl.exp2(scores * factor - base[:, None])
                mass = gl.sum(weights, 1)
                operand = gl.convert_layout(weights.to(dtype), left)
                if STREAM:
                    for n in range(1, steps):
                        last = turn % STAGES
                        last_phase = turn // STAGES & 1
                        turn += 1
                        s = wait_full(k_full, turn)
                        mbarrier.wait(v_full.index(last), last_phase)
                        keys = k_ring.index(s).reshape([BK, D]).permute((1, 0))
                        if OWN:
                            more = _biases(bias_at, n * BK, score, BK, OWN)
                        _take_turn(turns, turn, GROUP)
                        product = warpgroup_mma(queries, keys, scores, use_acc=False, is_async=True)
                        summed = warpgroup_mma(operand, v_ring.index(last).reshape([BK, E]), acc, is_async=True)
                        mbarrier.arrive(turns.index(1 - GROUP), count=1)
                        scores = warpgroup_mma_wait(1, deps=[product])
                        report(k_empty, s)
                        scores = _hide(scores, row + n * BK, token, least, rows, score, BK, CAUSAL)
                        if OWN:
                            scores = _choose(scores, word, more, n * BK, score, BK, OWN, EACH)
                        weights, peak, mass, fade = soften_scaled(scores, peak, mass, factor)
                        # ptxas moves the next wait in front of the exponentials, but nothing across a branch: this one
                        # has ended long ago
                        mbarrier.wait(v_full.index(last), last_phase)
                        acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
                        report(v_empty, last)
                        acc = acc * gl.convert_layout(fade, of_value)[:, None]
                        operand = gl.convert_layout(weights.to(dtype), left)
                    s = wait_full(v_full, turn)
                acc = warpgroup_mma(operand, v_ring.index(s).reshape([BK, E]), acc)
                if STREAM:
                    report(v_empty, s)
                    turn += 1
                share = 1.0 / gl.where(mass > 0, mass, 1.0)
                acc = acc * gl.convert_layout(share, of_value)[:, None]
                place = begin.to(gl.int64) * STACK + j * 64
                # the queries are done with: the result leaves through their place
                queries.store(acc.to(dtype))
                if (j + 1) * 64 <= count * STACK:
                    fence_async_shared()
                    sync()
                    tma.async_copy_shared_to_global(parts, [0, 0, begin * STACK + j * 64, 0], q_ring.index(slot))
                else:
                    # what comes after these rows is not this run's
                    sync()
                    line = gl.arange(0, 64, down)
                    out_at = loose + (place + line)[:, None] * E + columns
                    gl.store(out_at, queries.load(across), mask=(j * 64 + line < count * STACK)[:, None])
                # log2(0) = -inf is what a query that saw nothing of the block has
                spot = j * 64 + gl.arange(0, 64, per_row)
                gl.store(masses + place + gl.arange(0, 64, per_row), peak + gl.log2(mass), mask=spot < count * STACK)
            if tiles > GROUP:
                tma.store_wait(0)
                sync()
                end = (tiles - 1 - GROUP) // GROUPS * GROUPS + GROUP
                mbarrier.arrive(q_empty.index((subs + end) % SLOTS), count=1)
            subs += tiles
            if not STREAM:
                sync()
                mbarrier.arrive(k_empty.index(turn % STAGES), count=1)
                mbarrier.arrive(v_empty.index(turn % STAGES), count=1)
                turn += 1


@gluon.jit
def _compute_ahead(
    given, rings,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STACK: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
    SLOTS: gl.constexpr, STAGES: gl.constexpr, REPEAT: gl.constexpr, OWN: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """`_compute` for blocks of one tile with rows beside theirs: the next tile's product runs during the softmax."""
    parts, loose, masses, _reader, words, bias, items, _first, _picks, rows, scale = given
    (
        told, q_ring, k_ring, v_ring, told_full, told_empty, q_full, q_empty, k_full, v_full, k_empty, v_empty, _turns,
    ) = rings  # fmt: skip
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    per_row: gl.constexpr = gl.SliceLayout(1, score)
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    FOUR: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    dtype: gl.constexpr = q_ring.dtype
    factor = scale * LOG2E
    columns = gl.arange(0, E, gl.SliceLayout(0, across))[None, :]
    message, turn, subs = 0, 0, 0
    for _item in range(gl.program_id(0), items, gl.num_programs(0)):
        count, block, segment, begin = _told(told, told_full, told_empty, message, FOUR)
        sync()
        mbarrier.arrive(told_empty.index(message % TOLD), count=1)
        message += 1
        if count > 0:
            tiles = (count * STACK + 63) // 64
            s = wait_full(k_full, turn)
            if tiles > GROUP:
                bias_at = bias + (segment // REPEAT).to(gl.int64) * rows + block // 2 * BK
                last = (tiles - 1 - GROUP) // GROUPS * GROUPS + GROUP
                keys = k_ring.index(s).reshape([BK, D]).permute((1, 0))
                slot = wait_full(q_full, subs + GROUP)
                # the copies were ordinary writes to shared memory; the tensor cores read it another way
                fence_async_shared()
                more = _biases(bias_at, 0, score, BK, OWN)
                nothing = gl.zeros([64, BK], gl.float32, score)
                scores = warpgroup_mma(q_ring.index(slot).reshape([64, D]), keys, nothing, use_acc=False)
                mbarrier.wait(v_full.index(s), turn // STAGES & 1)
                for j in range(GROUP, tiles, GROUPS):
                    spot = j * 64 + gl.arange(0, 64, per_row)
                    word = gl.load(words + begin + spot // STACK, mask=spot < count * STACK, other=0)
                    slot = (subs + j) % SLOTS
                    # behind the last one comes the last one
                    ahead = wait_full(q_full, subs + gl.minimum(j + GROUPS, last))
                    fence_async_shared()
                    product = gl.zeros([64, BK], gl.float32, score)
                    product = warpgroup_mma(
                        q_ring.index(ahead).reshape([64, D]), keys, product, use_acc=False, is_async=True
                    )
                    scores = _choose(scores, word, more, 0, score, BK, OWN, EACH)
                    peak = gl.max(scores, 1) * factor
                    base = gl.where(peak == float("-inf"), 0.0, peak)
                    weights = gl.exp2(scores * factor - base[:, None])
                    mass = gl.sum(weights, 1)
                    operand = gl.convert_layout(weights.to(dtype), left)
                    acc = gl.zeros([64, E], gl.float32, value)
                    acc = warpgroup_mma(operand, v_ring.index(s).reshape([BK, E]), acc, use_acc=False, is_async=True)
                    if j > GROUP:
                        # the result of the tile before has left by now
                        tma.store_wait(0)
                        sync()
                        mbarrier.arrive(q_empty.index((subs + j - GROUPS) % SLOTS), count=1)
                    acc, operand, scores = warpgroup_mma_wait(0, deps=[acc, operand, product])
                    share = 1.0 / gl.where(mass > 0, mass, 1.0)
                    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, value))[:, None]
                    place = begin.to(gl.int64) * STACK + j * 64
                    # the queries are done with: the result leaves through their place
                    queries = q_ring.index(slot).reshape([64, D])
                    queries.store(acc.to(dtype))
                    if (j + 1) * 64 <= count * STACK:
                        fence_async_shared()
                        sync()
                        tma.async_copy_shared_to_global(parts, [0, 0, begin * STACK + j * 64, 0], q_ring.index(slot))
                    else:
                        # what comes after these rows is not this run's
                        sync()
                        line = gl.arange(0, 64, gl.SliceLayout(1, across))
                        out_at = loose + (place + line)[:, None] * E + columns
                        gl.store(out_at, queries.load(across), mask=(j * 64 + line < count * STACK)[:, None])
                    to = masses + place + gl.arange(0, 64, per_row)
                    gl.store(to, peak + gl.log2(mass), mask=spot < count * STACK)
                tma.store_wait(0)
                sync()
                mbarrier.arrive(q_empty.index((subs + last) % SLOTS), count=1)
            subs += tiles
            # whoever has no tile must not be a round behind the values
            mbarrier.wait(v_full.index(s), turn // STAGES & 1)
            sync()
            mbarrier.arrive(k_empty.index(s), count=1)
            mbarrier.arrive(v_empty.index(s), count=1)
            turn += 1


VARIES = ["items", "units", "first", "picks", "rows", "q_b", "q_h", "q_t"]


@gluon.jit(do_not_specialize=VARIES)
def read_blocks_hopper(
    q, k, v, parts, loose, masses, runs, reader, words, bias, items, units, first, picks, rows, q_b, q_h, q_t, scale,
    STACK: gl.constexpr, REPEAT: gl.constexpr, GROUPS: gl.constexpr, K_BLOCK: gl.constexpr, BK: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    STREAM: gl.constexpr, ROWS: gl.constexpr, TOGETHER: gl.constexpr, OWN: gl.constexpr, EACH: gl.constexpr,
    AHEAD: gl.constexpr, LOADING: gl.constexpr, COMPUTING: gl.constexpr,
):  # fmt: skip
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ring = gl.allocate_shared_memory(k.dtype, [SLOTS, 1, 1, 64, D], parts.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BK, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BK, E], v.layout)
    wanted = gl.allocate_shared_memory(gl.int32, [TOLD, ROWS], plain)
    told = gl.allocate_shared_memory(gl.int32, [TOLD, 4], plain)
    told_full = gl.allocate_shared_memory(gl.int64, [TOLD, 1], bars)
    told_empty = gl.allocate_shared_memory(gl.int64, [TOLD, 1], bars)
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], bars)
    for s in gl.static_range(GROUPS):
        mbarrier.init(turns.index(s), count=1)
    for s in gl.static_range(TOLD):
        mbarrier.init(told_full.index(s), count=1)
        # the groups, who gathers, and who loads
        mbarrier.init(told_empty.index(s), count=GROUPS + 2)
    for s in gl.static_range(SLOTS):
        # every gathering thread reports its own copies
        mbarrier.init(q_full.index(s), count=64)
        mbarrier.init(q_empty.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=GROUPS)
        mbarrier.init(v_empty.index(s), count=GROUPS)
    fence_async_shared()

    computing = parts, loose, masses, reader, words, bias, items, first, picks, rows, scale
    rings = (
        told, q_ring, k_ring, v_ring, told_full, told_empty, q_full, q_empty, k_full, v_full, k_empty, v_empty, turns
    )  # fmt: skip
    # constants stay constants only where they are written into the call
    if AHEAD:
        gl.warp_specialize([
            (_compute_ahead, (computing, rings, 0, GROUPS, STACK, BK, D, E, SLOTS, STAGES, REPEAT, OWN, EACH)),
            (_compute_ahead, (computing, rings, 1, GROUPS, STACK, BK, D, E, SLOTS, STAGES, REPEAT, OWN, EACH)),
            (_gather, (
                q, told, wanted, q_ring, told_full, told_empty, q_full, q_empty, items, STACK, D, ROWS, 1,
            )),
            (_load, (
                k, v, told, k_ring, v_ring, told_full, told_empty, k_full, v_full, k_empty, v_empty, reader, items,
                units, first, picks, rows, STACK, REPEAT, GROUPS, K_BLOCK, BK, CAUSAL, STREAM,
            )),
            (_look_up, (
                told, wanted, told_full, told_empty, runs, reader, items, units, first, picks, q_b, q_h, q_t,
                STACK, ROWS,
            )),
        ], [4, 2, 1, 1], [COMPUTING, LOADING, LOADING, LOADING])  # fmt: skip
        return
    gl.warp_specialize([
        (_compute, (
            computing, rings, 0, GROUPS, STACK, K_BLOCK, BK, D, E, SLOTS, STAGES, CAUSAL, STREAM, REPEAT, OWN, EACH,
        )),
        (_compute, (
            computing, rings, 1, GROUPS, STACK, K_BLOCK, BK, D, E, SLOTS, STAGES, CAUSAL, STREAM, REPEAT, OWN, EACH,
        )),
        (_gather, (
            q, told, wanted, q_ring, told_full, told_empty, q_full, q_empty, items,
            STACK, D, ROWS, TOGETHER,
        )),
        (_load, (
            k, v, told, k_ring, v_ring, told_full, told_empty, k_full, v_full, k_empty, v_empty, reader, items,
            units, first, picks, rows, STACK, REPEAT, GROUPS, K_BLOCK, BK, CAUSAL, STREAM,
        )),
        (_look_up, (
            told, wanted, told_full, told_empty, runs, reader, items, units, first, picks, q_b, q_h, q_t,
            STACK, ROWS,
        )),
    ], [4, 2, 1, 1], [COMPUTING, LOADING, LOADING, LOADING])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        slots: tiles of queries in flight.
        stages: tiles of blocks in flight.
        loading: registers of a thread that loads. The computing ones get the rest.
    """

    slots: int
    stages: int = 2
    loading: int = 40


# width, rows of a tile of a block, blocks of several tiles -> tiles
TILES = {
    **{(64, rows, False): Tiles(16) for rows in (16, 32, 64)},
    **{(128, rows, False): Tiles(9) for rows in (16, 32, 64)},
    (64, 128, False): Tiles(14),
    (128, 128, False): Tiles(5),
    (64, 128, True): Tiles(8, 3),
    (128, 128, True): Tiles(5),
}
TILE = {64: 128, 128: 128}  # width -> rows of a tile of blocks of more than 64
STACKS = 1, 2, 4, 8, 16, 32, 64
REGISTERS = 1 << 16  # of a multiprocessor


def wants(call: Call, units: int, stack: int) -> bool:
    """Whether `read` takes what attend_listed.wants."""
    q, k, v, index = call.q, call.k[0], call.v[0], call.index[0]
    if q.device.type == "cpu" or not on_hopper(q.device):
        return False
    if not q.shape[3] == v.shape[3] in (64, 128) or call.scale <= 0 or stack not in STACKS:
        return False
    # each unit has its own lists
    if index.shape[0] * index.shape[1] != q.shape[0] * units:
        return False
    # places of rows are numbers of 32 bits, in 16 bytes
    far = sum((n - 1) * stride for n, stride in zip(q.shape, q.stride(), strict=True))
    return far < ALIGNED << 31 and all(aligned(x) for x in (q, k, v))


def read(
    call: Call, found: Readers, parts: Tensor, masses: Tensor, units: int, stack: int, first: int, many: int,
    words: Tensor | None = None, beside: Beside | None = None,
) -> None:  # fmt: skip
    """What each reader of a block gets from it, of queries first .. first + many - 1.

    Args:
        words: those of `beside`, in the order of the sort.
    """
    q, k, v, index, plan = call.q, call.k[0], call.v[0], call.index[0], call.plans[0]
    batch, heads, _, width = q.shape
    rows, picks = k.shape[2], index.shape[3]
    row_blocks, tile = -(-rows // plan.k_block), plan.k_block if plan.k_block <= 64 else TILE[width]
    # where a block is one tile, it stays while its readers go by
    stream = plan.k_block > (tile if beside else 64)
    tiles = TILES[width, tile, stream]
    # where blocks are copied anew for every tile of queries anyway, short runs are shared out better
    lines = ROWS // 2 if stream else ROWS
    run = lines // stack
    entries, bounds = batch * units * many * picks, found.start.numel()
    items, size = bounds + entries // run, 128
    runs = torch.empty(items, 4, dtype=torch.int32, device=q.device)
    start(
        deal, (-(-items // size),),
        found.start, found.reader, runs, bounds, items, bounds.bit_length(), picks, first, rows, row_blocks,
        RUN=run, K_BLOCK=plan.k_block, CAUSAL=bool(plan.causal), SIZE=size, num_warps=4,
    )  # fmt: skip
    warps = 4 * (GROUPS + 1)
    each = REGISTERS // (32 * warps) // 8 * 8
    computing = min(240, (each * (GROUPS + 1) - tiles.loading) // (8 * GROUPS) * 8)
    start(
        read_blocks_hopper, (min(items, processors(q.device)),),
        q, descriptor(k, tile), descriptor(v, tile), descriptor(parts[None, None], 64), parts, masses, runs,
        found.reader, *((words, beside.bias) if beside else (found.reader, masses)), items, units, first, picks, rows,
        *[n // ALIGNED for n in q.stride()[:3]], call.scale,
        STACK=stack, REPEAT=heads // stack // k.shape[1], GROUPS=GROUPS, K_BLOCK=plan.k_block, BK=tile,
        D=width, E=width, SLOTS=tiles.slots, STAGES=tiles.stages, CAUSAL=bool(plan.causal), STREAM=stream, ROWS=lines,
        TOGETHER=GROUPS if stream else 1, OWN=beside.own if beside else 0, EACH=beside.each if beside else 1,
        AHEAD=bool(beside and not stream and width == 64), LOADING=tiles.loading, COMPUTING=computing,
        num_warps=4,
        maxnreg=each,
    )  # fmt: skip
