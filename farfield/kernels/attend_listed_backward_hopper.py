"""attend for lists of a query's own on Hopper GPUs, backward: a program stays with 64 or 128 rows, in Gluon.

K and V of the rows stay in shared memory, dk and dv in registers. The queries that chose the rows come by in tiles of
32 or 64, gathered by asynchronous copies a tile or two ahead. S and dP are made once, rows down: P and dS go from
registers into the sums of dv and dk, and dS passes through shared memory into the tile's dq, which leaves through the
place where the queries were. What readers get is kept in the order of the transposed lists, so that a tile's is one
piece of memory; `join_places` finds the places of each query's entries.

Readers ascend, so that only the first tiles of a causal block need a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from farfield.kernels.hopper import EVERY, LOG2E, UNIT, aligned, on_hopper, sync


@triton.jit(do_not_specialize=["first", "picks", "total"])
def tokens_of(reader, token, first, picks, total, SIZE: tl.constexpr):
    """The token of each reader."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < total
    tl.store(token + at, first + tl.load(reader + at, mask=there, other=0) // picks, mask=there)


@triton.jit(do_not_specialize=["tokens", "bounds", "entries"])
def own_readers(
    start, token, tokens, bounds, entries, TILE: tl.constexpr, SPLIT: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Readers of tiles of rows by the queries of their block, those from the tile's first on: where they start, who.

    A block is SPLIT tiles. Of whole blocks all numbers follow from the place.
    """
    PER: tl.constexpr = TILE * SPLIT * (SPLIT + 1) // 2
    BLOCK: tl.constexpr = TILE * SPLIT
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    whole = tl.minimum(at // SPLIT, tokens // BLOCK)
    begin = whole * PER
    rest = tl.minimum(tokens - whole * BLOCK, BLOCK)
    inside = at % PER
    tile = tl.zeros([SIZE], tl.int32)
    skipped = tl.zeros([SIZE], tl.int32)
    # of the block that entry number `at` lies in
    many = tl.minimum(tokens - at // PER * BLOCK, BLOCK)
    passed = 0
    for j in tl.static_range(SPLIT):
        begin += tl.where((at // SPLIT > whole) | (at % SPLIT > j), tl.maximum(rest - j * TILE, 0), 0)
        tile = tl.where(inside >= passed, j, tile)
        skipped = tl.where(inside >= passed, passed, skipped)
        passed = passed + tl.maximum(many - j * TILE, 0)
    tl.store(start + at, begin, mask=at < bounds)
    tl.store(token + at, at // PER * BLOCK + tile * TILE + inside - skipped, mask=at < entries)


@gluon.jit
def _name(
    token_ring, slot, token, at, last, STACK: gl.constexpr, BQ: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Copy the tokens of a tile's rows."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    spot = at + gl.arange(0, BQ, flat) // STACK
    async_copy.async_copy_global_to_shared(token_ring.index(slot), token + spot, mask=spot < last)


@gluon.jit
def _gather(
    q_tile, d_tile, shift_place, delta_place, named, q, d_out, shift, delta, q_h, q_t, d_h, d_t, at, last,
    word_place, words, STACK: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """Copy the rows of a tile whose tokens are known; those past the last reader come as 0."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, across)
    columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
    row = gl.arange(0, BQ, down)
    token = named.load(down)
    there = (at + row // STACK < last)[:, None]
    head = row % STACK
    # in units, that 32 bits are enough
    q_at, d_at = head * q_h + token * q_t, head * d_h + token * d_t
    async_copy.async_copy_global_to_shared(
        q_tile, q + (q_at.to(gl.int64) * UNIT)[:, None] + columns, mask=there
    )  # fmt: skip
    async_copy.async_copy_global_to_shared(
        d_tile, d_out + (d_at.to(gl.int64) * UNIT)[:, None] + columns, mask=there
    )  # fmt: skip
    row = gl.arange(0, BQ, flat)
    there = at + row // STACK < last
    line = named.load(flat) * STACK + row % STACK
    async_copy.async_copy_global_to_shared(shift_place, shift + line, mask=there)
    async_copy.async_copy_global_to_shared(delta_place, delta + line, mask=there)
    if OWN:
        async_copy.async_copy_global_to_shared(word_place, words + at + row // STACK, mask=there)


VARIES = ["base", "seg_b", "seg_u", "most", "pieces", "units", "per", "all_tokens", "rows", "row_blocks", "part_rows"]
VARIES += ["q_b", "q_h", "q_t", "d_b", "d_h", "d_t", "k_b", "k_h", "k_r", "v_b", "v_h", "v_r"]


@gluon.jit(do_not_specialize=VARIES)
def read_blocks_backward_hopper(
    q, k, v, d_out, shift, delta, token, parts, loose, d_k, d_v, d_bias, piece_k, piece_v, piece_bias,
    start, key, words, bias,
    base, seg_b, seg_u, most, pieces, units, per, all_tokens, rows, row_blocks, part_rows,
    q_b, q_h, q_t, d_b, d_h, d_t, k_b, k_h, k_r, v_b, v_h, v_r, scale,
    STACK: gl.constexpr, REPEAT: gl.constexpr, K_BLOCK: gl.constexpr, ROWS: gl.constexpr, CAUSAL: gl.constexpr,
    D: gl.constexpr, BQ: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr, WARPS: gl.constexpr,
    OWN: gl.constexpr, EACH_ROWS: gl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS rows of a block, or of what a piece of its readers adds to them, and each reader's dq."""
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BQ, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    # fewer queries than a product has rows: their dq is made transposed
    TURNED: gl.constexpr = BQ < 64
    QUERY: gl.constexpr = BQ if TURNED else D // (WARPS // 4)
    own: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS if TURNED else 4, 1 if TURNED else WARPS // 4], [16, QUERY, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    of_query: gl.constexpr = gl.SliceLayout(0, score)
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    dtype: gl.constexpr = q.dtype.element_ty
    CUTS: gl.constexpr = K_BLOCK // ROWS
    EACH: gl.constexpr = BQ // STACK  # readers of a tile
    NAMES: gl.constexpr = 2 * STAGES - 1
    pid = gl.program_id(0)
    cut, pid = pid % CUTS, pid // CUTS
    unit, x = pid // (row_blocks + pieces), pid % (row_blocks + pieces)
    b, u = unit // units, unit % units
    segment = b * seg_b + u * seg_u
    start_at = start + segment * (row_blocks + 1)
    zero = gl.load(start_at)
    # as transpose.piece_of, but the pieces, which are the longest, go first
    piece = gl.where(x < pieces, x, -1)
    x -= pieces
    at = zero + (piece + 1) * (most // 2) - 1
    found = (piece >= 0) & (at < gl.load(start_at + row_blocks))
    owner = (gl.load(key + at, mask=found, other=0) - base).to(gl.int32) - segment * (row_blocks + 1)
    m = gl.where(piece >= 0, gl.where(found, owner, row_blocks), x)
    there = m < row_blocks
    first = gl.load(start_at + m, mask=there, other=0)
    last = gl.load(start_at + m + 1, mask=there, other=0)
    divided = last - first > most
    begin = gl.where(piece >= 0, first + (piece - (2 * (first - zero)) // most) * most, first)
    part = gl.where(divided & (begin < last), gl.minimum(last, begin + most), -1)
    last = gl.where(piece >= 0, part, gl.where(divided, -1, last))
    first = gl.where(divided | (piece < 0), begin, 0)
    if first <= last:
        rows_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        k_tile = gl.allocate_shared_memory(dtype, [ROWS, D], rows_shared)
        v_tile = gl.allocate_shared_memory(dtype, [ROWS, D], rows_shared)
        q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BQ, D], parts.layout)
        d_ring = gl.allocate_shared_memory(dtype, [STAGES, BQ, D], rows_shared)
        ds_tile = gl.allocate_shared_memory(dtype, [ROWS, BQ], gl.NVMMASharedLayout(2 * BQ, 16, 2))
        shift_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BQ], plain)
        delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BQ], plain)
        token_ring = gl.allocate_shared_memory(gl.int32, [NAMES, BQ], plain)
        # of those that read rows beside theirs
        word_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BQ], plain)

        g = u
        if STACK == 1:
            g = u // REPEAT
        row0 = m * K_BLOCK + cut * ROWS
        q += (b.to(gl.int64) * q_b + (u * STACK).to(gl.int64) * q_h) * UNIT
        d_out += (b.to(gl.int64) * d_b + (u * STACK).to(gl.int64) * d_h) * UNIT
        shift += unit.to(gl.int64) * all_tokens * STACK
        delta += unit.to(gl.int64) * all_tokens * STACK
        count = last - first
        tiles = (count + EACH - 1) // EACH

        for t in gl.static_range(STAGES - 1):
            _name(token_ring, t, token, first + t * EACH, last, STACK, BQ, WARPS)
        columns = gl.arange(0, D, gl.SliceLayout(0, across))[None, :]
        line = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, across))
        inside = (line < rows)[:, None]
        k += (b.to(gl.int64) * k_b + g.to(gl.int64) * k_h) * UNIT
        v += (b.to(gl.int64) * v_b + g.to(gl.int64) * v_h) * UNIT
        async_copy.async_copy_global_to_shared(
            k_tile, k + ((line.to(gl.int64) * k_r) * UNIT)[:, None] + columns, mask=inside
        )  # fmt: skip
        async_copy.async_copy_global_to_shared(
            v_tile, v + ((line.to(gl.int64) * v_r) * UNIT)[:, None] + columns, mask=inside
        )  # fmt: skip
        async_copy.commit_group()
        async_copy.wait_group(0)
        sync()
        for t in gl.static_range(STAGES - 1):
            _gather(
                q_ring.index(t).reshape([BQ, D]), d_ring.index(t), shift_ring.index(t), delta_ring.index(t),
                token_ring.index(t), q, d_out, shift, delta, q_h, q_t, d_h, d_t, first + t * EACH, last,
                word_ring.index(t), words, STACK, BQ, D, WARPS, OWN,
            )  # fmt: skip
            _name(token_ring, t + STAGES - 1, token, first + (t + STAGES - 1) * EACH, last, STACK, BQ, WARPS)
            async_copy.commit_group()

        acc_k = gl.zeros([ROWS, D], gl.float32, wide)
        acc_v = gl.zeros([ROWS, D], gl.float32, wide)
        acc_bias = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, score))
        number = cut * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, score))
        # all readers have bit 31
        bit = 1 << gl.where(number < OWN, 31, gl.minimum(gl.maximum(number - OWN, 0) // EACH_ROWS, 30))
        if OWN:
            more = gl.load(bias + (unit // (REPEAT if STACK == 1 else 1)).to(gl.int64) * rows + m * K_BLOCK + number)
        factor = scale * LOG2E
        # the first row that a query may stand before; readers ascend
        edge = gl.where(row0 + ROWS > rows, EVERY, row0 + ROWS - 1)
        masking = row0 + ROWS > rows
        if CAUSAL:
            masking = edge >= 0
        for t in range(tiles):
            s = t % STAGES
            async_copy.wait_group(STAGES - 2)
            # these copies were ordinary writes to shared memory; the tensor cores read it another way
            fence_async_shared()
            sync()
            q_tile = q_ring.index(s).reshape([BQ, D])
            d_tile = d_ring.index(s)
            scores = gl.zeros([ROWS, BQ], gl.float32, score)
            d_weights = gl.zeros([ROWS, BQ], gl.float32, score)
            product = warpgroup_mma(k_tile, q_tile.permute((1, 0)), scores, use_acc=False, is_async=True)
            d_product = warpgroup_mma(v_tile, d_tile.permute((1, 0)), d_weights, use_acc=False, is_async=True)
            lowered = shift_ring.index(s).load(of_query)
            scores = warpgroup_mma_wait(1, deps=[product])
            if OWN:
                scores += more[:, None]
            weights = gl.exp2(scores * factor - lowered[None, :])
            if OWN:
                word = word_ring.index(s).load(of_query) | -0x80000000
                weights = gl.where((word[None, :] & bit[:, None]) != 0, weights, 0.0)
            if masking:
                asking = token_ring.index(t % NAMES).load(of_query)
                each = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, score))
                seen = (each < rows)[:, None]
                if CAUSAL:
                    seen = seen & (each[:, None] <= asking[None, :])
                weights = gl.where(seen, weights, 0.0)
                masking = gl.min(asking, 0) < edge
            operand = gl.convert_layout(weights.to(dtype), left)
            sum_of_v = warpgroup_mma(operand, d_tile, acc_v, is_async=True)
            d_weights = warpgroup_mma_wait(1, deps=[d_product])
            less = delta_ring.index(s).load(of_query)
            d_scores = weights * (d_weights - less[None, :])
            if d_bias is not None:
                acc_bias += gl.sum(d_scores, 1)
            d_scores = d_scores.to(dtype)
            d_operand = gl.convert_layout(d_scores, left)
            sum_of_k = warpgroup_mma(d_operand, q_tile, acc_k, is_async=True)
            ds_tile.store(d_scores)
            fence_async_shared()
            # the dq of the tile before has left by now
            tma.store_wait(0)
            sync()
            ahead = t + STAGES - 1
            if ahead < tiles:
                to = ahead % STAGES
                _gather(
                    q_ring.index(to).reshape([BQ, D]), d_ring.index(to), shift_ring.index(to), delta_ring.index(to),
                    token_ring.index(ahead % NAMES), q, d_out, shift, delta, q_h, q_t, d_h, d_t,
                    first + ahead * EACH, last, word_ring.index(to), words, STACK, BQ, D, WARPS, OWN,
                )  # fmt: skip
                _name(
                    token_ring, (ahead + STAGES - 1) % NAMES, token, first + (ahead + STAGES - 1) * EACH, last, STACK,
                    BQ, WARPS,
                )  # fmt: skip
            async_copy.commit_group()
            acc_v, operand = warpgroup_mma_wait(1, deps=[sum_of_v, operand])
            acc_k, d_operand = warpgroup_mma_wait(0, deps=[sum_of_k, d_operand])
            if TURNED:
                d_queries = gl.zeros([D, BQ], gl.float32, own)
                d_queries = warpgroup_mma(k_tile.permute((1, 0)), ds_tile, d_queries, use_acc=False)
                place = q_tile.permute((1, 0))
            else:
                d_queries = gl.zeros([BQ, D], gl.float32, own)
                d_queries = warpgroup_mma(ds_tile.permute((1, 0)), k_tile, d_queries, use_acc=False)
                place = q_tile
            # the queries are done with: their place in shared memory is where dq leaves from
            sync()
            place.store(d_queries.to(dtype))
            to_row = cut * part_rows + (unit * per + first - zero + t * EACH) * STACK
            if (t + 1) * EACH <= count:
                fence_async_shared()
                sync()
                tma.async_copy_shared_to_global(parts, [0, 0, to_row, 0], q_ring.index(s))
            else:
                # what comes after these rows is not this piece's
                sync()
                spot = gl.arange(0, BQ, gl.SliceLayout(1, across))
                here = (t * EACH + spot // STACK < count)[:, None]
                gl.store(loose + ((to_row + spot).to(gl.int64) * D)[:, None] + columns, q_tile.load(across), mask=here)
        tma.store_wait(0)

        below = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
        of_row = gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
        acc_k = acc_k * scale
        if piece >= 0:
            to = ((unit * pieces + piece).to(gl.int64) * K_BLOCK - m * K_BLOCK + below)[:, None] * D + of_row
            gl.store(piece_k + to, acc_k)
            gl.store(piece_v + to, acc_v)
            if d_bias is not None:
                gl.store(piece_bias + (unit * pieces + piece).to(gl.int64) * K_BLOCK + number, acc_bias)
        else:
            to = (unit.to(gl.int64) * rows + below)[:, None] * D + of_row
            kept = (below < rows)[:, None]
            if ADD:
                acc_k += gl.load(d_k + to, mask=kept, other=0.0).to(gl.float32)
                acc_v += gl.load(d_v + to, mask=kept, other=0.0).to(gl.float32)
            gl.store(d_k + to, acc_k.to(d_k.dtype.element_ty), mask=kept)
            gl.store(d_v + to, acc_v.to(d_v.dtype.element_ty), mask=kept)
            if d_bias is not None:
                bias_at = d_bias + unit.to(gl.int64) * rows + m * K_BLOCK + number
                if ADD:
                    acc_bias += gl.load(bias_at)
                gl.store(bias_at, acc_bias)


JOIN_VARIES = ["units", "tokens", "first", "all_tokens", "picks", "row_blocks", "seg_b", "seg_u"]
JOIN_VARIES += ["part_rows", "total", "line", "per"]


@triton.jit(do_not_specialize=JOIN_VARIES)
def join_places(
    parts, place, start, count, own_parts, own_start, d_q, units, tokens, first, all_tokens, picks, row_blocks,
    seg_b, seg_u, part_rows, total, line, per, scale,
    STACK: tl.constexpr, CUTS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
    HEADS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dq: what each query got from its entries, added up in their order, and before it from its own block if HEADS."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < total
    r, query = row % STACK, row // STACK
    n, unit = query % tokens, query // tokens
    dims = tl.arange(0, D)
    segment = unit // units * seg_b + unit % units * seg_u
    nth = segment * tokens + n
    # the parts of a unit stand as the entries of its lists do
    base = unit * tokens * picks - tl.load(start + segment * (row_blocks + 1), mask=there, other=0)
    filled = tl.load(count + nth, mask=there, other=0)
    acc = tl.zeros([ROWS, D], tl.float32)
    if HEADS:
        # the heads lie one behind the other in a row of queries, and side by side in the parts
        head, token = (first + n) // line, (first + n) % line
        tile = token // TILE
        for o in tl.static_range(SPLIT):
            m = tile // SPLIT * SPLIT + o
            read = there & (m <= tile)
            spot = unit * per + tl.load(own_start + m, mask=read, other=0) + token - m * TILE
            part_at = own_parts + (spot * HEADS + head)[:, None] * D + dims
            acc += tl.load(part_at, mask=read[:, None], other=0.0).to(tl.float32)
    for begin in range(0, tl.max(filled, 0), AT_ONCE):
        # the loads of all of them are under way together
        for o in tl.static_range(AT_ONCE):
            used = begin + o < filled
            line_at = (base + tl.load(place + nth * picks + begin + o, mask=used, other=0)) * STACK + r
            for cut in tl.static_range(CUTS):
                part_at = parts + (cut * part_rows + line_at)[:, None] * D + dims
                acc += tl.load(part_at, mask=used[:, None], other=0.0).to(tl.float32)
    at = ((unit * STACK + r) * all_tokens + first + n)[:, None] * D + dims
    tl.store(d_q + at, (acc * scale).to(d_q.dtype.element_ty), mask=there[:, None])


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        rows: of a program, of which blocks may be several times as large.
        queries: of a tile, the heads of a unit counted apart.
        stages: tiles of queries in flight.
        warps: four for each 64 rows.
    """

    rows: int
    queries: int
    stages: int
    warps: int


# width, whether a block has more than 64 rows -> tiles
TILES = {
    (64, False): Tiles(64, 64, 3, 4),
    (128, False): Tiles(64, 32, 3, 4),
    (64, True): Tiles(128, 64, 3, 8),
    (128, True): Tiles(128, 64, 3, 8),
}


def wants(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, k_block: int, stack: int) -> bool:
    """Whether shapes and strides suit what attend_listed takes."""
    width = q.shape[3]
    return (
        (width, k_block > 64) in TILES
        and width == v.shape[3]
        and k_block >= 64
        and stack in (1, 2, 4, 8, 16, 32)
        and q.dtype in (torch.bfloat16, torch.float16)
        and on_hopper(q.device)
        and all(sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) < 1 << 33 for x in (q, d_out))
        and all(aligned(x) for x in (q, k, v, d_out))
    )


def tiles_of(width: int, k_block: int) -> Tiles:
    return TILES[width, k_block > 64]
