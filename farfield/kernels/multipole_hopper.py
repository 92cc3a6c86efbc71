"""FMA's attention on Hopper GPUs, forward: warps with roles, in Gluon, as in attend_hopper, without lists.

Which blocks and which far rows a query block reads follows from its number, so one warp copies everything through the
tensor memory accelerator: 64 rows at a time, near or far, through one ring of keys and one of values. The groups of a
tile of far rows come as boxes of their own. One or two groups of four computing warps own 64 queries each. The product
for the next rows is under way while the softmax of these is taken, and at the end of a block of queries that for the
first rows of the next one.
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

from farfield.kernels.hopper import (
    LN2,
    LOG2E,
    barriers,
    by_lane,
    descriptor,
    faded,
    from_words,
    processors,
    report,
    soften_lazily,
    sync,
    wait_full,
    words,
)
from farfield.kernels.multipole_walk import _anew
from farfield.kernels.replay import start
from farfield.ops.multipole import reaches
from farfield.ops.pool import Tree


@gluon.jit
def _place(item, items, blocks, heads, TILES: gl.constexpr):
    """Item -> batch, head, query block, tile of the block: the last ones first, which pooling has read last.

    What is behind the last item is in no batch, or before the first block, and comes as 0.
    """
    item = items - 1 - item
    unit = item // TILES // blocks
    return unit // heads, unit % heads, item // TILES % blocks, item % TILES


@gluon.jit
def _far_tiles(n, most, RANK: gl.constexpr, RADIUS: gl.constexpr, CUT: gl.constexpr):
    """Tiles of 64 far rows that block n reads: on each level below that of its highest bit one group or two.

    Where two blocks before n are read one by one, it is one group less of the lowest level. CUT: `most` levels at most.
    """
    levels = 31 - gl.inline_asm_elementwise("clz.b32 $0, $1;", "=r,r", [n], dtype=gl.int32, is_pure=True, pack=1)
    below = n
    if CUT:
        levels = gl.minimum(levels, most)
        highest = 1 << gl.maximum(levels, 0)
        below = n & (highest - 1) | highest
    if RANK < 8:
        # both groups of a level are a box
        rows = gl.maximum(levels, 0) * (2 * RANK)
    else:
        ones = gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [below], dtype=gl.int32, is_pure=True, pack=1)
        rows = gl.maximum(levels + ones - RADIUS, 0) * RANK
    return (rows + 63) // 64


@gluon.jit
def _after(n, level, second, begin, size, RANK: gl.constexpr, RADIUS: gl.constexpr):
    """The group, or pair of groups, that block n reads next."""
    if RANK < 8:
        return level + 1, second, begin + size, size >> 1
    else:
        stays = (second == 0) & ((n >> level & 1) == 1) & (level >= RADIUS - 1)
        second = gl.where(stays, 1, 0)
        begin += gl.where(stays, 0, size)
        size = gl.where(stays, size, size >> 1)
        return level + gl.where(stays, 0, 1), second, begin, size


@gluon.jit
def _gather(far, tile, full, b, g, n, level, second, begin, size, far_rows, RANK: gl.constexpr, RADIUS: gl.constexpr):
    """64 far rows of block n from group `second` of a level on, which has `size` groups from `begin` on.

    Returns the same of the group after them. Groups that are not there come as 0.
    """
    D: gl.constexpr = tile.shape[3]
    BOX: gl.constexpr = 2 * RANK if RANK < 8 else RANK
    # halves of 64 columns lie one behind the other
    boxes = tile._reinterpret(tile.dtype, [D // BOX, 1, 1, BOX, 64], far.layout)
    for i in gl.static_range(64 // BOX):
        parent = (n >> (level + 1)) - 1
        row = gl.where(parent < 0, far_rows, (begin + 2 * parent + second) * RANK)
        for half in gl.static_range(D // 64):
            tma.async_copy_global_to_shared(far, [b, g, row, half * 64], full, boxes.index(half * (64 // BOX) + i))
        level, second, begin, size = _after(n, level, second, begin, size, RANK, RADIUS)
    return level, second, begin, size


@gluon.jit
def _counts(
    n, level, second, log_segment, most, column, RANK: gl.constexpr, RADIUS: gl.constexpr, CUT: gl.constexpr
):  # fmt: skip
    """log2 of the tokens that each of 64 far rows stands for; -inf for those that block n does not read."""
    if RANK < 8:
        of = level + column // (2 * RANK)
        there = (n >> (of + 1) > 0) & ((column % (2 * RANK) < RANK) | (n >> of & 1 == 1))
    else:
        of = column * 0
        for i in gl.static_range(64 // RANK):
            of = gl.where(column // RANK == i, level, of)
            level, second, _, _ = _after(n, level, second, 0, 0, RANK, RADIUS)
        there = n >> (of + 1) > 0
    if CUT:
        there = there & (of < most)
    return gl.where(there, (of + log_segment).to(gl.float32), float("-inf"))


@gluon.jit
def _load(
    q, k, v, far_k, far_v, rings, items, blocks, heads, done, far_rows, log_segment, most,
    REPEAT: gl.constexpr, BLOCK: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, RANK: gl.constexpr,
    RADIUS: gl.constexpr, CUT: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr,
):  # fmt: skip
    """Queries, keys and values, by one warp: the values of 64 rows after the keys of the next."""
    tiles, counts, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    D: gl.constexpr = tiles.shape[4]
    BYTES: gl.constexpr = 64 * D * 2
    K0: gl.constexpr = QS * GROUPS
    V0: gl.constexpr = K0 + KS
    flat: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    column = gl.arange(0, 64, flat)
    step, turn = 0, 0
    # where the values of the rows before are
    v_b, v_g, v_row, v_n, v_level, v_second, v_begin, v_size = 0, 0, 0, 0, 0, 0, 0, 0
    # the products of a last item begin together with those of one more, which is not there
    for item in range(gl.program_id(0), items + gl.num_programs(0), gl.num_programs(0)):
        b, h, n, tile = _place(item, items, blocks, heads, TILES)
        g = h // REPEAT
        for group in gl.static_range(GROUPS):
            slot = turn % QS * GROUPS + group
            mbarrier.wait(q_empty.index(slot), turn // QS & 1 ^ 1)
            mbarrier.expect(q_full.index(slot), BYTES)
            row = n * BLOCK + (tile * GROUPS + group) * 64
            tma.async_copy_global_to_shared(q, [b, h, row, 0], q_full.index(slot), tiles.index(slot))
        turn += 1
        # its own block up to its last query, the block before, far rows
        own = (tile + 1) * GROUPS
        near = own + gl.minimum(n, RADIUS) * (BLOCK // 64)
        count = near + _far_tiles(n, most, RANK, RADIUS, CUT)
        level, second, begin, size = 0, 0, 0, done
        if RADIUS == 2:
            # nor does an even block read any of it
            even = (n & 1) == 0
            level, begin, size = gl.where(even, 1, 0), gl.where(even, done, 0), gl.where(even, done >> 1, done)
        for t in range(gl.where(item < items, count, 1)):
            s = step % KS
            full = k_full.index(s)
            mbarrier.wait(k_empty.index(s), step // KS & 1 ^ 1)
            row = n * BLOCK + gl.where(t < own, t * 64, (t - own) * 64 - gl.minimum(n, RADIUS) * BLOCK)
            now_level, now_second, now_begin, now_size = level, second, begin, size
            if t < near:
                mbarrier.expect(full, BYTES)
                tma.async_copy_global_to_shared(k, [b, g, row, 0], full, tiles.index(K0 + s))
            else:
                told = _counts(n, level, second, log_segment, most, column, RANK, RADIUS, CUT)
                counts.index(s).store(told.to(counts.dtype))
                sync()
                mbarrier.expect(full, BYTES)
                level, second, begin, size = _gather(
                    far_k, tiles.index(K0 + s), full, b, g, n, level, second, begin, size, far_rows, RANK, RADIUS
                )
                row = -1
            if step > 0:
                s = (step - 1) % VS
                full = v_full.index(s)
                mbarrier.wait(v_empty.index(s), (step - 1) // VS & 1 ^ 1)
                mbarrier.expect(full, BYTES)
                place = tiles.index(V0 + s)
                if v_row >= 0:
                    tma.async_copy_global_to_shared(v, [v_b, v_g, v_row, 0], full, place)
                else:
                    _gather(
                        far_v, place, full, v_b, v_g, v_n, v_level, v_second, v_begin, v_size, far_rows, RANK, RADIUS
                    )
            v_b, v_g, v_row, v_n = b, g, row, n
            v_level, v_second, v_begin, v_size = now_level, now_second, now_begin, now_size
            step += 1


@gluon.jit
def _begin(
    queries, carried, acc, tiles, k_full, v_full, step, last,
    score: gl.constexpr, left: gl.constexpr, K0: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr,
):  # fmt: skip
    """Under way: the product with the keys of `step`, and the sums of weights times the values of `last`."""
    D: gl.constexpr = tiles.shape[4]
    wait_full(k_full, step)
    keys = tiles.index(K0 + step % KS).reshape([64, D]).permute((1, 0))
    zero = gl.zeros([64, 64], gl.float32, score)
    product = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
    wait_full(v_full, last)
    values = tiles.index(K0 + KS + last % VS).reshape([64, D])
    operand = from_words(carried, tiles.dtype, left)
    summed = warpgroup_mma(operand, values, acc, is_async=True)
    return product, summed, operand


@gluon.jit
def _skip(k_full, k_empty, v_full, v_empty, step, KS: gl.constexpr, VS: gl.constexpr):
    """Give 64 rows back that this group has no use for."""
    wait_full(k_full, step)
    wait_full(v_full, step)
    sync()
    mbarrier.arrive(k_empty.index(step % KS), count=1)
    mbarrier.arrive(v_empty.index(step % VS), count=1)


@gluon.jit
def _compute(
    out, lse, rings, items, blocks, heads, tokens, most, scale,
    GROUP: gl.constexpr, BLOCK: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, RANK: gl.constexpr,
    RADIUS: gl.constexpr, CUT: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr,
):  # fmt: skip
    tiles, counts, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    D: gl.constexpr = tiles.shape[4]
    K0: gl.constexpr = QS * GROUPS
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, value, 2)
    of_query: gl.constexpr = gl.SliceLayout(1, score)
    of_row: gl.constexpr = gl.SliceLayout(0, score)
    of_value: gl.constexpr = gl.SliceLayout(1, value)
    line, column = gl.arange(0, 64, of_query)[:, None], gl.arange(0, 64, of_row)[None, :]
    factor = scale * LOG2E
    step, turn = 0, 0
    mbarrier.wait(q_full.index(GROUP), 0)
    mbarrier.wait(k_full.index(0), 0)
    keys = tiles.index(K0).reshape([64, D]).permute((1, 0))
    zero = gl.zeros([64, 64], gl.float32, score)
    scores = warpgroup_mma(tiles.index(GROUP).reshape([64, D]), keys, zero, use_acc=False)
    report(k_empty, 0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, n, tile = _place(item, items, blocks, heads, TILES)
        # of a mask that it knows to be there the compiler puts a wait behind every product
        part = tile * GROUPS + GROUP + _anew(0)
        slot = turn % QS * GROUPS + GROUP
        queries = tiles.index(slot).reshape([64, D])
        # the first rows are those of its own block that every query sees some of
        if part == 0:
            scores = gl.where(column <= line, scores, float("-inf"))
        peak = gl.max(scores, 1) * factor
        weights = gl.exp2(scores * factor - peak[:, None])
        mass = by_lane(weights)
        carried = words(weights, tiles.dtype)
        acc = gl.zeros([64, D], gl.float32, value)
        # the result of the tile before has left
        tma.store_wait(0)
        sync()
        if turn > 0:
            mbarrier.arrive(q_empty.index((turn - 1) % QS * GROUPS + GROUP), count=1)
        last = step
        if GROUPS == 2 and GROUP == 0:
            # the second half of its own block is hidden from the first
            step += 1
            _skip(k_full, k_empty, v_full, v_empty, step, KS, VS)
        for t in range(1, part + 1 + gl.minimum(n, RADIUS) * (BLOCK // 64)):
            step += 1
            product, summed, operand = _begin(
                queries, carried, acc, tiles, k_full, v_full, step, last, score, left, K0, KS, VS
            )
            scores = warpgroup_mma_wait(1, deps=[product])
            sync()
            mbarrier.arrive(k_empty.index(step % KS), count=1)
            if BLOCK == 128 and not (GROUPS == 2 and GROUP == 0):  # noqa: SIM102 (known to the compiler)
                if (part == 1) & (t == 1):
                    scores = gl.where(column <= line, scores, float("-inf"))
            weights, peak, mass, fade = soften_lazily(scores, peak, mass, factor)
            acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
            sync()
            mbarrier.arrive(v_empty.index(last % VS), count=1)
            carried = words(weights, tiles.dtype)
            acc = faded(acc, fade)
            last = step
        for _ in range(_far_tiles(n, most, RANK, RADIUS, CUT)):
            step += 1
            product, summed, operand = _begin(
                queries, carried, acc, tiles, k_full, v_full, step, last, score, left, K0, KS, VS
            )
            scores = warpgroup_mma_wait(1, deps=[product])
            told = counts.index(step % KS).load(of_row)
            scores = scores * factor + told.to(gl.float32)[None, :]
            sync()
            mbarrier.arrive(k_empty.index(step % KS), count=1)
            weights, peak, mass, fade = soften_lazily(scores, peak, mass, 1.0)
            acc, operand = warpgroup_mma_wait(0, deps=[summed, operand])
            sync()
            mbarrier.arrive(v_empty.index(last % VS), count=1)
            carried = words(weights, tiles.dtype)
            acc = faded(acc, fade)
            last = step
        # the first rows of the next item go along with the last of this one
        step += 1
        turn += 1
        following = turn % QS * GROUPS + GROUP
        mbarrier.wait(q_full.index(following), turn // QS & 1)
        queries = tiles.index(following).reshape([64, D])
        product, summed, _ = _begin(queries, carried, acc, tiles, k_full, v_full, step, last, score, left, K0, KS, VS)
        scores, acc = warpgroup_mma_wait(0, deps=[product, summed])
        sync()
        mbarrier.arrive(k_empty.index(step % KS), count=1)
        mbarrier.arrive(v_empty.index(last % VS), count=1)
        mass = gl.convert_layout(gl.sum(mass, 1), of_query)
        # one division a query, not one a value
        acc = acc * gl.convert_layout(1.0 / mass, of_value)[:, None]
        # the queries are done with: their place in shared memory is where the result leaves from
        tiles.index(slot).reshape([64, D]).store(acc.to(tiles.dtype))
        fence_async_shared()
        sync()
        first = n * BLOCK + part * 64
        tma.async_copy_shared_to_global(out, [b, h, first, 0], tiles.index(slot))
        at = first + gl.arange(0, 64, of_query)
        gl.store(lse + (b.to(gl.int64) * heads + h) * tokens + at, (peak + gl.log2(mass)) * LN2, at < tokens)
    # shared memory must be there until everything has left it
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items", "blocks", "heads", "tokens", "done", "far_rows", "most"])
def multipole_hopper(
    q, k, v, far_k, far_v, out, lse, items, blocks, heads, tokens, done, far_rows, log_segment, most, scale,
    REPEAT: gl.constexpr, BLOCK: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, RANK: gl.constexpr,
    RADIUS: gl.constexpr, CUT: gl.constexpr, D: gl.constexpr, QS: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr,
    COMPUTING: gl.constexpr, LOADING: gl.constexpr,
):  # fmt: skip
    # queries, keys, values
    tiles = gl.allocate_shared_memory(q.dtype, [QS * GROUPS + KS + VS, 1, 1, 64, D], q.layout)
    # small whole numbers and -inf, of which 16 bits lose nothing
    counts = gl.allocate_shared_memory(q.dtype, [KS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # arrays of their own: the compiler orders what goes to one
    q_full, q_empty = barriers(QS * GROUPS, 1, 1)
    k_full, k_empty = barriers(KS, 1, GROUPS)
    v_full, v_empty = barriers(VS, 1, GROUPS)
    fence_async_shared()

    rings = tiles, counts, q_full, q_empty, k_full, k_empty, v_full, v_empty
    # constants stay constants only where they are written into the call
    if GROUPS == 1:
        gl.warp_specialize([
            (_compute, (
                out, lse, rings, items, blocks, heads, tokens, most, scale,
                0, BLOCK, TILES, GROUPS, RANK, RADIUS, CUT, QS, KS, VS,
            )),
            (_load, (
                q, k, v, far_k, far_v, rings, items, blocks, heads, done, far_rows, log_segment, most,
                REPEAT, BLOCK, TILES, GROUPS, RANK, RADIUS, CUT, QS, KS, VS,
            )),
        ], [1], [LOADING])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (
                out, lse, rings, items, blocks, heads, tokens, most, scale,
                0, BLOCK, TILES, GROUPS, RANK, RADIUS, CUT, QS, KS, VS,
            )),
            (_compute, (
                out, lse, rings, items, blocks, heads, tokens, most, scale,
                1, BLOCK, TILES, GROUPS, RANK, RADIUS, CUT, QS, KS, VS,
            )),
            (_load, (
                q, k, v, far_k, far_v, rings, items, blocks, heads, done, far_rows, log_segment, most,
                REPEAT, BLOCK, TILES, GROUPS, RANK, RADIUS, CUT, QS, KS, VS,
            )),
        ], [4, 1], [COMPUTING, LOADING])  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        groups: computing groups of 64 queries a program.
        k_stages, v_stages: tiles of 64 rows in flight.
        q_stages: tiles of queries, each with a place that its result leaves from.
        programs: programs a multiprocessor.
        registers: of a thread at the start of the kernel; None: all there are.
        loading: registers of a thread that loads. The computing ones get the rest.
    """

    groups: int
    k_stages: int
    v_stages: int
    q_stages: int = 2
    programs: int = 1
    registers: int | None = None
    loading: int = 40


# (width, queries of a block, near field, rows of a group) -> tiles, by measurements on an H200
TILES = {
    (64, 64, 64, 4): Tiles(1, 4, 3, programs=3, registers=80),
    (128, 64, 64, 4): Tiles(1, 3, 2, programs=2, registers=128),
    (64, 128, 128, 16): Tiles(1, 4, 3, programs=3, registers=80),
    (128, 128, 128, 16): Tiles(2, 5, 5),
    (64, 64, 128, 16): Tiles(1, 4, 3, programs=3, registers=80),
    (128, 64, 128, 16): Tiles(1, 3, 2, programs=2, registers=128),
}


def wants(q: Tensor, near: int, tree: Tree) -> bool:
    """Whether this kernel takes what ops.multipole does: a near field and groups that have tiles, no sinks."""
    return tree.lo == 0 and (q.shape[3], tree.block, near, tree.rank) in TILES


def forward(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, lse: Tensor, near: int, tree: Tree, scale: float
) -> Tensor:
    """out; lse, [B, H, T], is written. The far rows are those of `tree`, contiguous."""
    batch, heads, tokens, width = q.shape
    block, rank = tree.block, tree.rank
    out = q.new_empty(q.shape)
    tiles = TILES[width, block, near, rank]
    parts, blocks = block // (64 * tiles.groups), -(-tokens // block)
    items = batch * heads * blocks * parts
    radius = near // block
    bounds = {} if tiles.registers is None else {"maxnreg": tiles.registers}
    start(
        multipole_hopper, (min(items, processors(q.device) * tiles.programs),),
        *(descriptor(x, 64) for x in (q, k, v)), *(_boxes(x, 2 * rank if rank < 8 else rank) for x in (far_k, far_v)),
        descriptor(out, 64), lse, items, blocks, heads, tokens, tree.blocks, far_k.shape[2],
        (block // rank).bit_length() - 1, tree.levels, scale,
        REPEAT=heads // k.shape[1], BLOCK=block, TILES=parts, GROUPS=tiles.groups, RANK=rank,
        RADIUS=radius, CUT=not reaches(tree.levels, blocks, radius), D=width,
        QS=tiles.q_stages, KS=tiles.k_stages, VS=tiles.v_stages,
        COMPUTING=(3 * (tiles.registers or 168) - tiles.loading) // 16 * 8, LOADING=tiles.loading,
        num_warps=4, **bounds,
    )  # fmt: skip
    return out


def _boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of boxes of `rows` rows and 64 columns of a contiguous tensor."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_box(rows, x.dtype), base=x, shape=list(x.shape), strides=list(x.stride()))
    return made


@cache
def _box(rows: int, dtype: torch.dtype) -> dict:
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    box = [1, 1, rows, 64]
    like = torch.empty(box, dtype=dtype, device="meta")
    return vars(TensorDescriptor.from_tensor(like, box, gl.NVMMASharedLayout.get_default_for(box, kind)))
