"""attend for lists of a query's own, backward: a program stays with a block of rows, as in the forward.

With p = exp(s - lse) recomputed:  dv = p' dout,  ds = p (dout v' - delta),  delta = sum(dout out) - dlse,
dq = scale ds k,  dk = scale ds' q.

A block's dk and dv stay on the chip while its readers go by; what it adds to the dq of each reader goes to memory entry
by entry, and another launch adds up the entries of each query. Blocks wider than a tile are cut for dk and dv, and
read once more, whole, for dq. Blocks of many readers are cut into pieces, whose dk and dv are added up afterwards. No
atomics, every sum in one order. What attend_listed_backward_hopper takes is read there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import attend_listed_backward_hopper as hopper
from farfield.kernels.attend import LOG2E, _dense, lists_of, padded
from farfield.kernels.attend_listed import FEWEST, Beside, _unit, handed_out, piece_size, read_beside
from farfield.kernels.hopper import descriptor
from farfield.kernels.replay import start
from farfield.kernels.transpose import WHOLE, counted, counts, piece_of, placed, transpose
from farfield.ops.attend import Call

PARTS = 1 << 31  # bytes: with fewer at a time, blocks have too few readers to be worth a program


@triton.jit(do_not_specialize=["tokens", "total", "line"])
def prepare(
    out, d_out, lse, d_lse, delta, shift, own_delta, own_shift, tokens, total, line,
    STACK: tl.constexpr, E: tl.constexpr, E_TILE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """delta, and lse in units of log 2: inf where nothing was read, so that weights are exp(s - inf) = 0.

    They are kept query by query, the heads of a unit side by side, as they are read; with HEADS once more for so many
    heads that lie one behind the other in a row of queries.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < total
    values = tl.arange(0, E_TILE)
    at, mask = row[:, None] * E + values, there[:, None] & (values < E)
    a = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
    found = tl.sum(a * b, 1)
    if d_lse is not None:
        found -= tl.load(d_lse + row, mask=there, other=0.0)
    mass = tl.load(lse + row, mask=there, other=0.0)
    empty = mass == float("-inf")
    head = row // tokens
    to = (head // STACK * tokens + row % tokens) * STACK + head % STACK
    found = tl.where(empty, 0.0, found)
    mass = tl.where(empty, float("inf"), mass * LOG2E)
    tl.store(delta + to, found, mask=there)
    tl.store(shift + to, mass, mask=there)
    if HEADS:
        to = head * tokens + row % line * HEADS + row % tokens // line
        tl.store(own_delta + to, found, mask=there)
        tl.store(own_shift + to, mass, mask=there)


VARIES = ["base", "seg_b", "seg_u", "most", "pieces", "units", "tokens", "first", "all_tokens", "rows", "row_blocks"]
VARIES += ["picks", "q_b", "q_h", "q_t", "d_b", "d_h", "d_t", "k_b", "k_h", "k_r", "v_b", "v_h", "v_r"]


@triton.jit(do_not_specialize=VARIES)
def read_blocks_backward(
    q, k, v, d_out, delta, shift, parts, d_k, d_v, d_bias, piece_k, piece_v, piece_bias,
    start, reader, key, words, bias,
    base, seg_b, seg_u, most, pieces, units, tokens, first, all_tokens, rows, row_blocks, picks,
    q_b, q_h, q_t, d_b, d_h, d_t, k_b, k_h, k_r, v_b, v_h, v_r, scale,
    STACK: tl.constexpr, STACK_TILE: tl.constexpr, REPEAT: tl.constexpr, K_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_UNIT: tl.constexpr, E_UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ROWS_GRAD: tl.constexpr, QUERY_GRAD: tl.constexpr, ADD: tl.constexpr, OWN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """dk and dv of a part of BK rows of a block (ROWS_GRAD), or each reader's share of dq from all of it."""
    CUTS: tl.constexpr = K_BLOCK // BK if ROWS_GRAD else 1
    pid = tl.program_id(0).to(tl.int64)
    cut, pid = pid % CUTS, pid // CUTS
    unit, x = pid // (row_blocks + pieces), pid % (row_blocks + pieces)
    b, u = unit // units, unit % units
    segment = b * seg_b + u * seg_u
    m, low, high, piece = piece_of(
        start + segment * (row_blocks + 1), key, base + segment * (row_blocks + 1), x, row_blocks, most
    )
    g = u if STACK > 1 else u // REPEAT
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    k += (b * k_b + g * k_h) * D_UNIT
    v += (b * v_b + g * v_h) * E_UNIT
    q += (b * q_b + u * STACK * q_h) * D_UNIT
    d_out += (b * d_b + u * STACK * d_h) * E_UNIT
    row = tl.arange(0, BQ * STACK_TILE)
    head = row % STACK_TILE
    inside = tl.arange(0, BK)
    at = m * K_BLOCK + cut * BK + inside
    there = at < rows
    if ROWS_GRAD:
        k_tile = tl.load(k + (at * k_r)[:, None] * D_UNIT + dims, mask=there[:, None] & (dims < D), other=0.0)
        v_tile = tl.load(v + (at * v_r)[:, None] * E_UNIT + values, mask=there[:, None] & (values < E), other=0.0)
        dk = tl.zeros([BK, D_TILE], tl.float32)
        dv = tl.zeros([BK, E_TILE], tl.float32)
        db = tl.zeros([BK], tl.float32)
    if OWN:
        bias += unit // (REPEAT if STACK == 1 else 1) * rows
    for tile in range(low, high, BQ):
        spot = tile + row // STACK_TILE
        asked = (spot < high) & (head < STACK)
        entry = tl.load(reader + spot, mask=asked, other=0).to(tl.int64)
        token = first + entry // picks
        q_at = q + (head * q_h + token * q_t)[:, None] * D_UNIT + dims
        q_tile = tl.load(q_at, mask=asked[:, None] & (dims < D), other=0.0)
        d_at = d_out + (head * d_h + token * d_t)[:, None] * E_UNIT + values
        d_tile = tl.load(d_at, mask=asked[:, None] & (values < E), other=0.0)
        line = (unit * all_tokens + token) * STACK + head
        lowered = tl.load(shift + line, mask=asked, other=float("inf"))
        less = tl.load(delta + line, mask=asked, other=0.0)
        place = (unit * tokens * picks + entry) * STACK + head
        if OWN:
            word = tl.load(words + spot, mask=asked, other=0)
        if ROWS_GRAD:
            # [BK, BQ * STACK_TILE]: rows down, so that dv and dk are products of what lies in registers
            scores = tl.dot(k_tile, q_tile.T, input_precision="ieee")
            seen = there[:, None] & asked[None, :]
            if CAUSAL:
                seen = seen & (at[:, None] <= token[None, :])
            if OWN:
                scores += tl.load(bias + at, mask=there, other=0.0)[:, None]
                seen = seen & read_beside(word[None, :], (cut * BK + inside)[:, None], OWN, EACH)
            weights = tl.where(seen, tl.exp2(scores * (scale * LOG2E) - lowered[None, :]), 0.0)
            dv += tl.dot(weights.to(d_tile.dtype), d_tile, input_precision="ieee")
            d_scores = weights * (tl.dot(v_tile, d_tile.T, input_precision="ieee") - less[None, :])
            small = d_scores.to(q_tile.dtype)
            dk += tl.dot(small, q_tile, input_precision="ieee")
            if d_bias is not None:
                db += tl.sum(d_scores, 1)
            if QUERY_GRAD:
                share = tl.dot(tl.trans(small), k_tile, input_precision="ieee")
        else:
            share = tl.zeros([BQ * STACK_TILE, D_TILE], tl.float32)
            for begin in range(0, K_BLOCK, BK):
                at = m * K_BLOCK + begin + inside
                there = at < rows
                k_tile = tl.load(k + (at * k_r)[:, None] * D_UNIT + dims, mask=there[:, None] & (dims < D), other=0.0)
                v_tile = tl.load(
                    v + (at * v_r)[:, None] * E_UNIT + values, mask=there[:, None] & (values < E), other=0.0
                )
                scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")
                seen = there[None, :] & asked[:, None]
                if CAUSAL:
                    seen = seen & (at[None, :] <= token[:, None])
                if OWN:
                    scores += tl.load(bias + at, mask=there, other=0.0)[None, :]
                    seen = seen & read_beside(word[:, None], (begin + inside)[None, :], OWN, EACH)
                weights = tl.where(seen, tl.exp2(scores * (scale * LOG2E) - lowered[:, None]), 0.0)
                d_scores = weights * (tl.dot(d_tile, v_tile.T, input_precision="ieee") - less[:, None])
                share += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision="ieee")
        if QUERY_GRAD:
            part_at = parts + place[:, None] * D + dims
            tl.store(part_at, share.to(parts.dtype.element_ty), mask=asked[:, None] & (dims < D))
    if ROWS_GRAD and low <= high:
        dk *= scale
        if piece >= 0:
            to = ((unit * pieces + piece) * K_BLOCK + cut * BK + inside)[:, None]
            tl.store(piece_k + to * D + dims, dk, mask=dims < D)
            tl.store(piece_v + to * E + values, dv, mask=values < E)
            if d_bias is not None:
                tl.store(piece_bias + (unit * pieces + piece) * K_BLOCK + cut * BK + inside, db)
        else:
            to = (unit * rows + at)[:, None]
            if d_bias is not None:
                bias_at = d_bias + unit * rows + at
                if ADD:
                    db += tl.load(bias_at, mask=there, other=0.0)
                tl.store(bias_at, db, mask=there)
            if ADD:
                dk += tl.load(d_k + to * D + dims, mask=there[:, None] & (dims < D), other=0.0)
                dv += tl.load(d_v + to * E + values, mask=there[:, None] & (values < E), other=0.0)
            kept_k = there[:, None] & (dims < D)
            tl.store(d_k + to * D + dims, dk.to(d_k.dtype.element_ty), mask=kept_k)
            kept_v = there[:, None] & (values < E)
            tl.store(d_v + to * E + values, dv.to(d_v.dtype.element_ty), mask=kept_v)


@triton.jit(do_not_specialize=["seg_b", "seg_u", "most", "pieces", "units", "rows", "row_blocks"])
def join_pieces(
    d_k, d_v, d_bias, piece_k, piece_v, piece_bias, start, seg_b, seg_u, most, pieces, units, rows, row_blocks,
    K_BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    BK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk and dv of the blocks that were cut."""
    CUTS: tl.constexpr = K_BLOCK // BK
    pid = tl.program_id(0).to(tl.int64)
    cut, pid = pid % CUTS, pid // CUTS
    unit, m = pid // row_blocks, pid % row_blocks
    start += (unit // units * seg_b + unit % units * seg_u) * (row_blocks + 1)
    low, high = tl.load(start + m).to(tl.int64), tl.load(start + m + 1).to(tl.int64)
    if high - low > most:
        dims, values, inside = tl.arange(0, D_TILE), tl.arange(0, E_TILE), tl.arange(0, BK)
        at = m * K_BLOCK + cut * BK + inside
        there = at < rows
        to = (unit * rows + at)[:, None]
        mask_k, mask_v = there[:, None] & (dims < D), there[:, None] & (values < E)
        dk = tl.zeros([BK, D_TILE], tl.float32)
        dv = tl.zeros([BK, E_TILE], tl.float32)
        db = tl.zeros([BK], tl.float32)
        if ADD:
            dk += tl.load(d_k + to * D + dims, mask=mask_k, other=0.0)
            dv += tl.load(d_v + to * E + values, mask=mask_v, other=0.0)
            if d_bias is not None:
                db += tl.load(d_bias + unit * rows + at, mask=there, other=0.0)
        own = 2 * (low - tl.load(start)) // most
        for piece in range(own, own + (high - low + most - 1) // most):
            of = ((unit * pieces + piece) * K_BLOCK + cut * BK + inside)[:, None]
            dk += tl.load(piece_k + of * D + dims, mask=dims < D, other=0.0)
            dv += tl.load(piece_v + of * E + values, mask=values < E, other=0.0)
            if d_bias is not None:
                db += tl.load(piece_bias + (unit * pieces + piece) * K_BLOCK + cut * BK + inside)
        tl.store(d_k + to * D + dims, dk.to(d_k.dtype.element_ty), mask=mask_k)
        tl.store(d_v + to * E + values, dv.to(d_v.dtype.element_ty), mask=mask_v)
        if d_bias is not None:
            tl.store(d_bias + unit * rows + at, db, mask=there)


@triton.jit(do_not_specialize=["units", "tokens", "first", "all_tokens", "picks", "list_b", "list_u", "total"])
def join_queries(
    parts, count, d_q, units, tokens, first, all_tokens, picks, list_b, list_u, total, scale,
    STACK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq: the entries of each query added up."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < total
    r, query = row % STACK, row // STACK
    n, unit = query % tokens, query // tokens
    dims = tl.arange(0, D_TILE)
    filled = tl.load(count + unit // units * list_b + unit % units * list_u + n, mask=there, other=0)
    place = query * picks * STACK + r
    acc = tl.zeros([ROWS, D_TILE], tl.float32)
    for p in range(tl.max(filled, 0)):
        part_at = parts + (place + p * STACK)[:, None] * D + dims
        acc += tl.load(part_at, mask=(p < filled)[:, None] & (dims < D), other=0.0).to(tl.float32)
    at = ((unit * STACK + r) * all_tokens + first + n)[:, None] * D + dims
    tl.store(d_q + at, (acc * scale).to(d_q.dtype.element_ty), mask=there[:, None] & (dims < D))


def attend_listed_backward(
    call: Call, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, folded: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, for calls that attend_listed.wants.

    Args:
        folded: q holds so many query heads of a key head, one behind the other, of which each reads its own block up to
            itself too; for calls that attend_own.wants.
    """
    return gradients(call, d_out, d_lse, out, lse, folded)[:3]


def gradients(
    call: Call, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, folded: int = 0,
    beside: Beside | None = None, bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k and v, and of the biases of `beside` if they are asked for, not scaled.

    Args:
        folded: q holds so many query heads of a key head, one behind the other, of which each reads its own block up to
            itself too; for calls that attend_own.wants.
        beside: what blocks end with; their rows are all there.
    """
    q, (k,), (v,), _, _, _, _, _, (index,), (count,), (plan,), scale = call
    batch, heads, tokens, width = q.shape
    kv_heads, rows, value_width = k.shape[1], k.shape[2], v.shape[3]
    units, stack = lists_of(call)
    d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    picks, row_blocks = index.shape[3], -(-rows // plan.k_block)
    stack_tile, d_tile, e_tile = padded(stack, 1), padded(width), padded(value_width)

    q, q_at = _dense(q)
    k, k_at = _dense(k)
    v, v_at = _dense(v)
    d_out, d_at = _dense(d_out)
    d_unit, e_unit = _unit(q, width, *q_at, *k_at), _unit(q, value_width, *v_at, *d_at)
    delta, shift = torch.empty_like(lse), torch.empty_like(lse)
    own_delta, own_shift = (torch.empty_like(lse), torch.empty_like(lse)) if folded else (None, None)
    total, some = batch * heads * tokens, max(1, 2048 // e_tile)
    d_lse = None if d_lse is None else d_lse.contiguous()
    start(
        prepare, (-(-total // some),),
        out.contiguous(), d_out.contiguous(), lse, d_lse, delta, shift, own_delta, own_shift, tokens, total,
        tokens // max(1, folded), stack, value_width, e_tile, some, folded,
    )  # fmt: skip

    on_hopper = hopper.wants(q, k, v, d_out, plan.k_block, stack)
    tiles = hopper.tiles_of(width, plan.k_block) if on_hopper else None
    step = min(plan.k_block, 64) if tiles is None else tiles.rows
    # shares of dq that an entry leaves
    cuts = 1 if tiles is None else plan.k_block // step
    chunk = min(tokens, _chunk(call, cuts))
    part_rows = batch * heads * chunk * picks
    parts = q.new_empty(cuts * part_rows, width)
    # float32 where something is still to be added
    add = chunk < tokens
    # the readers of own blocks leave something everywhere
    made = torch.zeros if add and not folded else torch.empty
    dtype = torch.float32 if add or units != kv_heads else q.dtype
    d_k = made(batch, units, rows, width, dtype=dtype, device=q.device)
    d_v = made(batch, units, rows, value_width, dtype=dtype, device=q.device)
    d_bias = made(batch, units, rows, dtype=torch.float32, device=q.device) if bias_grad else None
    own, each = (beside.own, beside.each) if beside else (0, 1)
    own_parts = own_start = None
    line = split = per = 0
    if folded:
        line, split, add = tokens // folded, plan.k_block // tiles.rows, True
        per = line // plan.k_block * (tiles.rows * split * (split + 1) // 2)
        per += sum(max(0, line % plan.k_block - j * tiles.rows) for j in range(split))
        tile_rows = -(-rows // tiles.rows)
        own_start, token = (torch.empty(n, dtype=torch.int32, device=q.device) for n in (tile_rows + 1, per))
        own_parts = q.new_empty(batch * heads * folded * per, width)
        start(
            hopper.own_readers, (-(-max(per, tile_rows + 1) // 1024),),
            own_start, token, line, tile_rows + 1, per, tiles.rows, split, 1024,
        )  # fmt: skip
        start(
            hopper.read_blocks_backward_hopper, (batch * units * tile_rows,),
            q, k, v, d_out, own_shift, own_delta, token, descriptor(own_parts[None, None], tiles.queries), own_parts,
            d_k, d_v, None, own_shift, own_shift, None, own_start, token, None, None,
            0, 0, 0, WHOLE, 0, units, per, line, rows, tile_rows, 0,
            q_at[0] // 8, line * q_at[2] // 8, q_at[2] // 8, d_at[0] // 8, line * d_at[2] // 8, d_at[2] // 8,
            *[n // 8 for n in (*k_at, *v_at)], scale,
            STACK=folded, REPEAT=1, K_BLOCK=tiles.rows, ROWS=tiles.rows, CAUSAL=True, D=width, BQ=tiles.queries,
            STAGES=tiles.stages, ADD=False, WARPS=tiles.warps, OWN=0, EACH_ROWS=1, num_warps=tiles.warps,
        )  # fmt: skip
    whole = step == plan.k_block
    for first in range(0, tokens, chunk):
        many = min(chunk, tokens - first)
        listed, filled = index[:, :, first : first + many].contiguous(), count[:, :, first : first + many].contiguous()
        most = piece_size(many, picks, row_blocks)
        if counts(listed, row_blocks):
            found = counted(listed, filled, row_blocks, most)
        else:
            (found,) = transpose([listed], [filled], [row_blocks], [True], [most])
            found = placed(found, listed.shape, row_blocks) if tiles is not None else found
        words = None if beside is None else handed_out(beside.words, found, row_blocks, first)
        seg_b, seg_u = found.strides
        held = batch * units * found.pieces * plan.k_block
        piece_k, piece_v = (delta.new_empty(max(held, 1), n) for n in (width, value_width))
        piece_bias = delta.new_empty(max(held, 1)) if bias_grad else None
        if tiles is not None:
            token = torch.empty_like(found.reader)
            start(
                hopper.tokens_of, (-(-token.numel() // 1024),), found.reader, token, first, picks, token.numel(), 1024
            )  # fmt: skip
            start(
                hopper.read_blocks_backward_hopper, (cuts * batch * units * (row_blocks + found.pieces),),
                q, k, v, d_out, shift, delta, token, descriptor(parts[None, None], tiles.queries), parts, d_k, d_v,
                d_bias, piece_k, piece_v, piece_bias, found.start, found.key, words, beside and beside.bias,
                found.base, seg_b, seg_u, found.most, found.pieces, units,
                many * picks, tokens, rows, row_blocks, part_rows,
                *[n // 8 for n in (*q_at, *d_at, *k_at, *v_at)], scale,
                STACK=stack, REPEAT=heads // kv_heads, K_BLOCK=plan.k_block, ROWS=step, CAUSAL=bool(plan.causal),
                D=width, BQ=tiles.queries, STAGES=tiles.stages, ADD=add, WARPS=tiles.warps, OWN=own, EACH_ROWS=each,
                num_warps=tiles.warps,
            )  # fmt: skip
        else:
            tile = max(1, (64 if max(d_tile, e_tile) <= 64 else 32) // stack_tile)
            for of_rows, of_queries in ((True, True),) if whole else ((True, False), (False, True)):
                programs = batch * units * (row_blocks + found.pieces) * (plan.k_block // step if of_rows else 1)
                start(
                    read_blocks_backward, (programs,),
                    q, k, v, d_out, delta, shift, parts, d_k, d_v, d_bias, piece_k, piece_v, piece_bias,
                    found.start, found.reader, found.key, words, beside and beside.bias,
                    found.base, seg_b, seg_u, found.most, found.pieces, units,
                    many, first, tokens, rows, row_blocks, picks, *[n // d_unit for n in q_at],
                    *[n // e_unit for n in d_at], *[n // d_unit for n in k_at], *[n // e_unit for n in v_at], scale,
                    stack, stack_tile, heads // kv_heads, plan.k_block, bool(plan.causal), width, value_width, d_tile,
                    e_tile, d_unit, e_unit, BQ=tile, BK=step, ROWS_GRAD=of_rows, QUERY_GRAD=of_queries, ADD=add,
                    OWN=own, EACH=each, num_warps=8, num_stages=2,
                )  # fmt: skip
        if found.pieces:
            start(
                join_pieces, (plan.k_block // step * batch * units * row_blocks,),
                d_k, d_v, d_bias, piece_k, piece_v, piece_bias,
                found.start, seg_b, seg_u, found.most, found.pieces, units, rows,
                row_blocks, plan.k_block, width, value_width, d_tile, e_tile, step, ADD=add, num_warps=8,
            )  # fmt: skip
        total, some = batch * heads * many, max(1, 2048 // d_tile)
        if tiles is not None:
            start(
                hopper.join_places, (-(-total // some),),
                parts, found.place, found.start, filled, own_parts, own_start, d_q, units, many, first, tokens, picks,
                row_blocks, seg_b, seg_u, part_rows, total, line, per, scale, stack, cuts, width, some,
                AT_ONCE=min(max(1, 8 // cuts), padded(picks, 1)), HEADS=folded, TILE=tiles.rows, SPLIT=max(1, split),
                num_warps=4,
            )  # fmt: skip
        else:
            start(
                join_queries, (-(-total // some),),
                parts, filled, d_q, units, many, first, tokens, picks, seg_b * many, seg_u * many, total, scale,
                stack, width, d_tile, some, num_warps=4,
            )  # fmt: skip
    if units != kv_heads:
        d_k, d_v = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (d_k, d_v))
        d_bias = None if d_bias is None else d_bias.unflatten(1, (kv_heads, -1)).sum(2)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_bias


def at_once(call: Call) -> bool:
    """Whether gradients of a call that attend_listed.wants are launches alone: one chunk of queries, and no sort."""
    block = call.plans[0].k_block
    # no tile has fewer rows
    whole = call.index[0].shape[2] <= _chunk(call, max(1, block // 64))
    return whole and counts(call.index[0], -(-call.k[0].shape[2] // block))


def _chunk(call: Call, cuts: int) -> int:
    """Queries whose shares of dq, `cuts` an entry, take PARTS bytes."""
    q = call.q
    each = q.shape[0] * q.shape[1] * call.index[0].shape[3] * cuts * q.shape[3] * q.element_size()
    return max(FEWEST, PARTS // max(1, each))
