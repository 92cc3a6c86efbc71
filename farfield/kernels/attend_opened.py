"""Opened FMA's attention on the GPU: near tokens and listed summaries by tiles, what is opened by its readers.

The opened groups, with the summaries beside them (kernels.opened), go through attend_listed: out and lse. The kernel
here begins its running softmax with that result, so that what it leaves is the softmax over everything; a tile of 64
queries reads its near tokens, and the summaries that its block lists, each query hiding what it has opened of them.

Backward: with out and lse of the whole, each part has the gradients of its own rows without knowing of the other:
p = exp(s - lse), ds = p (dout v' - delta), delta = sum(dout out). dq and the tokens' dk and dv begin with those of the
opened groups. What summaries get comes in parts, one for each opened block and one for each tile of queries, and is
added up in one order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import LN2, LOG2E, _dense, padded, soften
from farfield.kernels.attend_listed import Beside, _unit, attend_listed
from farfield.kernels.attend_listed_backward import gradients
from farfield.kernels.opened import listed, paths, set_beside
from farfield.kernels.replay import start
from farfield.ops.attend import Call, Plan
from farfield.ops.pool import Tree

TILE = 64  # queries of a tile
PIECE = 64  # rows that are read at once

STRIDES = ["q_b", "q_h", "q_t", "k_b", "k_h", "k_r", "v_b", "v_h", "v_r", "far_b", "bias_b", "bias_h"]
VARIES = ["heads", "lists", "begin", "tokens", "keys", "tiles", "radius", "blocks", "levels", "sinks", "slots"]
VARIES += STRIDES


@triton.jit
def _summaries(
    q_tile, far_k, far_v, bias, word, step, n, radius, blocks, levels, sinks, scale, dims,
    D: tl.constexpr, RANK: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Scores [queries, FAR] of a piece of block n's listed summaries, their keys and values, and who reads which."""
    inside = step * FAR + tl.arange(0, FAR)
    group, there, bit = listed(inside // RANK, n, radius, blocks, levels, sinks, RANK)
    row = group.to(tl.int64) * RANK + inside % RANK
    mask = there[:, None] & (dims < D)
    k_tile = tl.load(far_k + row[:, None] * D + dims, mask=mask, other=0.0)
    v_tile = tl.load(far_v + row[:, None] * D + dims, mask=mask, other=0.0)
    more = tl.load(bias + row, mask=there, other=0.0)
    seen = there[None, :] & (((word[:, None] >> bit[None, :]) & 1) == 0)
    scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * (scale * LOG2E) + (more * LOG2E)[None, :]
    return scores, k_tile, v_tile, seen


@triton.jit(do_not_specialize=VARIES)
def near_far_forward(
    q, k, v, far_k, far_v, bias, words, opened, opened_lse, out, lse,
    heads, lists, begin, tokens, keys, tiles, radius, blocks, levels, sinks, slots,
    q_b, q_h, q_t, k_b, k_h, k_r, v_b, v_h, v_r, far_b, bias_b, bias_h, scale,
    REPEAT: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
    UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    # the last queries have the most to read and start first
    many = tl.num_programs(0) // tiles
    tile, b, h = tiles - 1 - (pid // many).to(tl.int32), pid % many // heads, pid % many % heads
    g = h // REPEAT
    unit = b * lists + h // (heads // lists)
    n = (begin + tile * BQ) // BLOCK
    dims = tl.arange(0, D_TILE)
    wide = dims < D
    i = tile * BQ + tl.arange(0, BQ)
    asked = i < tokens
    word = tl.load(words + unit * tokens + i, mask=asked, other=0)
    q_tile = tl.load(
        q + (b * q_b + h * q_h + i * q_t.to(tl.int64))[:, None] * UNIT + dims, mask=asked[:, None] & wide, other=0.0
    )
    place = (b * heads + h) * tokens + i
    before = tl.load(opened_lse + place, mask=asked, other=float("-inf")) * LOG2E
    acc = tl.load(opened + place[:, None] * D + dims, mask=asked[:, None] & wide, other=0.0).to(tl.float32)
    mass = tl.where(before == float("-inf"), 0.0, 1.0)
    peak = before
    k_at, v_at = k + (b * k_b + g * k_h) * UNIT, v + (b * v_b + g * v_h) * UNIT
    for first in range(tl.maximum(n - radius, 0) * BLOCK, begin + tile * BQ + BQ, BK):
        at = first + tl.arange(0, BK)
        there = (at < keys)[:, None] & wide
        k_tile = tl.load(k_at + (at * k_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
        v_tile = tl.load(v_at + (at * v_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(at[None, :] <= (begin + i)[:, None], scores, float("-inf"))
        peak, mass, acc = soften(peak, mass, acc, scores, v_tile)
    far_at = (b * (heads // REPEAT) + g) * far_b
    for step in range(tl.where(n > radius, (slots * RANK + FAR - 1) // FAR, 0)):
        scores, k_tile, v_tile, seen = _summaries(
            q_tile, far_k + far_at, far_v + far_at, bias + b * bias_b + g * bias_h, word, step, n, radius, blocks,
            levels, sinks, scale, dims, D, RANK, FAR,
        )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        peak, mass, acc = soften(peak, mass, acc, scores, v_tile)
    acc *= (1.0 / tl.where(mass > 0, mass, 1.0))[:, None]
    tl.store(out + place[:, None] * D + dims, acc.to(out.dtype.element_ty), mask=asked[:, None] & wide)
    tl.store(lse + place, (peak + tl.log2(mass)) * LN2, mask=asked)


@triton.jit(do_not_specialize=[*VARIES, "d_b", "d_h", "d_t"])
def near_far_queries(
    q, k, v, far_k, far_v, bias, words, out, lse, d_out, d_q, delta, parts_k, parts_v, parts_bias,
    heads, lists, begin, tokens, keys, tiles, radius, blocks, levels, sinks, slots,
    q_b, q_h, q_t, k_b, k_h, k_r, v_b, v_h, v_r, far_b, bias_b, bias_h, d_b, d_h, d_t, scale,
    REPEAT: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
    UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """delta, dq added to what d_q holds, and what each listed summary gets from the tile."""
    pid = tl.program_id(0).to(tl.int64)
    many = tl.num_programs(0) // tiles
    tile, b, h = tiles - 1 - (pid // many).to(tl.int32), pid % many // heads, pid % many % heads
    g = h // REPEAT
    unit = b * lists + h // (heads // lists)
    n = (begin + tile * BQ) // BLOCK
    dims = tl.arange(0, D_TILE)
    wide = dims < D
    i = tile * BQ + tl.arange(0, BQ)
    asked = i < tokens
    word = tl.load(words + unit * tokens + i, mask=asked, other=0)
    mask = asked[:, None] & wide
    q_tile = tl.load(q + (b * q_b + h * q_h + i * q_t.to(tl.int64))[:, None] * UNIT + dims, mask=mask, other=0.0)
    d_tile = tl.load(d_out + (b * d_b + h * d_h + i * d_t.to(tl.int64))[:, None] * UNIT + dims, mask=mask, other=0.0)
    place = (b * heads + h) * tokens + i
    found = tl.load(out + place[:, None] * D + dims, mask=mask, other=0.0).to(tl.float32)
    less = tl.sum(found * d_tile.to(tl.float32), 1)
    tl.store(delta + place, less, mask=asked)
    total = tl.load(lse + place, mask=asked, other=0.0) * LOG2E
    acc = tl.zeros([BQ, D_TILE], tl.float32)
    k_at, v_at = k + (b * k_b + g * k_h) * UNIT, v + (b * v_b + g * v_h) * UNIT
    for first in range(tl.maximum(n - radius, 0) * BLOCK, begin + tile * BQ + BQ, BK):
        at = first + tl.arange(0, BK)
        there = (at < keys)[:, None] & wide
        k_tile = tl.load(k_at + (at * k_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
        v_tile = tl.load(v_at + (at * v_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * (scale * LOG2E)
        weights = tl.where(at[None, :] <= (begin + i)[:, None], tl.exp2(scores - total[:, None]), 0.0)
        d_scores = weights * (tl.dot(d_tile, v_tile.T, input_precision="ieee") - less[:, None])
        acc = tl.dot(d_scores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    far_at = (b * (heads // REPEAT) + g) * far_b
    width = (slots * RANK + FAR - 1) // FAR * FAR
    for step in range(tl.where(n > radius, (slots * RANK + FAR - 1) // FAR, 0)):
        scores, k_tile, v_tile, seen = _summaries(
            q_tile, far_k + far_at, far_v + far_at, bias + b * bias_b + g * bias_h, word, step, n, radius, blocks,
            levels, sinks, scale, dims, D, RANK, FAR,
        )  # fmt: skip
        weights = tl.where(seen, tl.exp2(scores - total[:, None]), 0.0)
        d_scores = weights * (tl.dot(d_tile, v_tile.T, input_precision="ieee") - less[:, None])
        small = d_scores.to(k_tile.dtype)
        acc = tl.dot(small, k_tile, acc, input_precision="ieee")
        part = ((b * heads + h) * tiles + tile) * width + step * FAR + tl.arange(0, FAR)
        part_at = part[:, None] * D + dims
        dk = tl.dot(small.T, q_tile, input_precision="ieee") * scale
        tl.store(parts_k + part_at, dk.to(parts_k.dtype.element_ty), mask=wide[None, :])
        dv = tl.dot(weights.to(d_tile.dtype).T, d_tile, input_precision="ieee")
        tl.store(parts_v + part_at, dv.to(parts_v.dtype.element_ty), mask=wide[None, :])
        if parts_bias is not None:
            tl.store(parts_bias + part, tl.sum(d_scores, 0))
    to = d_q + place[:, None] * D + dims
    acc = acc * scale + tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, acc.to(d_q.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*VARIES, "d_b", "d_h", "d_t"])
def near_rows(
    q, k, v, lse, delta, d_out, opened_k, opened_v, d_k, d_v,
    heads, tokens, tiles, radius, blocks,
    q_b, q_h, q_t, k_b, k_h, k_r, v_b, v_h, v_r, d_b, d_h, d_t, scale,
    REPEAT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
    UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """dk and dv of BK tokens from the queries that read them as near, and from those that opened their block."""
    pid = tl.program_id(0).to(tl.int64)
    tile, unit = (pid % tiles).to(tl.int32), pid // tiles
    kv_heads = heads // REPEAT
    b, g = unit // kv_heads, unit % kv_heads
    dims = tl.arange(0, D_TILE)
    wide = dims < D
    at = tile * BK + tl.arange(0, BK)
    there = (at < tokens)[:, None] & wide
    k_tile = tl.load(k + (b * k_b + g * k_h + at * k_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
    v_tile = tl.load(v + (b * v_b + g * v_h + at * v_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
    dk = tl.zeros([BK, D_TILE], tl.float32)
    dv = tl.zeros([BK, D_TILE], tl.float32)
    stop = tl.minimum((tile * BK // BLOCK + radius + 1) * BLOCK, tokens)
    for r in range(REPEAT):
        h = g * REPEAT + r
        for begin in range(tile * BK, stop, BQ):
            i = begin + tl.arange(0, BQ)
            asked = i < stop
            mask = asked[:, None] & wide
            q_tile = tl.load(
                q + (b * q_b + h * q_h + i * q_t.to(tl.int64))[:, None] * UNIT + dims, mask=mask, other=0.0
            )
            d_tile = tl.load(
                d_out + (b * d_b + h * d_h + i * d_t.to(tl.int64))[:, None] * UNIT + dims, mask=mask, other=0.0
            )
            place = (b * heads + h) * tokens + i
            total = tl.load(lse + place, mask=asked, other=0.0) * LOG2E
            less = tl.load(delta + place, mask=asked, other=0.0)
            scores = tl.dot(k_tile, q_tile.T, input_precision="ieee") * (scale * LOG2E)
            seen = (at[:, None] <= i[None, :]) & asked[None, :]
            weights = tl.where(seen, tl.exp2(scores - total[None, :]), 0.0)
            dv = tl.dot(weights.to(d_tile.dtype), d_tile, dv, input_precision="ieee")
            d_scores = weights * (tl.dot(v_tile, d_tile.T, input_precision="ieee") - less[None, :])
            dk = tl.dot(d_scores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    leaf = at // BLOCK
    from_ = ((unit * blocks + leaf) * ALL + at % BLOCK)[:, None] * D + dims
    given = (leaf < blocks)[:, None] & there
    dk = dk * scale + tl.load(opened_k + from_, mask=given, other=0.0).to(tl.float32)
    dv += tl.load(opened_v + from_, mask=given, other=0.0).to(tl.float32)
    to = (unit * tokens + at)[:, None] * D + dims
    tl.store(d_k + to, dk.to(d_k.dtype.element_ty), mask=there)
    tl.store(d_v + to, dv.to(d_v.dtype.element_ty), mask=there)


@triton.jit
def _first(height, group, radius):
    """The first block that a group of a level is far from."""
    return (group + ((radius + (1 << height) - 1) >> height) + 1) << height


SUMMING = ["heads", "tiles", "radius", "blocks", "levels", "sinks", "slots", "far_rows", "groups"]


@triton.jit(do_not_specialize=SUMMING)
def far_gradients(
    beside_k, beside_v, beside_bias, parts_k, parts_v, parts_bias, d_k, d_v, d_bias,
    heads, tiles, radius, blocks, levels, sinks, slots, far_rows, groups,
    REPEAT: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
    ALL: tl.constexpr, FAR: tl.constexpr, TILES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """dk, dv and the bias' gradient of a group's rows: from its sibling's blocks and tiles that list it."""
    pid = tl.program_id(0).to(tl.int64)
    # the coarsest groups have the most parts and start first
    many = tl.num_programs(0) // groups
    place, unit = groups - 1 - (pid // many).to(tl.int32), pid % many
    kv_heads = heads // REPEAT
    b, g = unit // kv_heads, unit % kv_heads
    lead = (sinks + RANK - 1) // RANK
    height, group, left = 0, place - lead, place - lead
    while left >= (blocks >> height) and height < levels:
        left -= blocks >> height
        height += 1
    group = left
    sink = place < lead
    each, dims, rest = tl.arange(0, AT_ONCE), tl.arange(0, D_TILE), tl.arange(0, RANK)
    # [parts, rows, D]
    wide = (dims < D)[None, None, :]
    dk = tl.zeros([AT_ONCE, RANK, D_TILE], tl.float32)
    dv = tl.zeros([AT_ONCE, RANK, D_TILE], tl.float32)
    db = tl.zeros([AT_ONCE, RANK], tl.float32)

    # as a sibling
    first = (group ^ 1) << height
    stop = tl.where(sink, first, tl.minimum(first + (1 << height), blocks))
    for begin in range(first, stop, AT_ONCE):
        leaf = begin + each
        row = ((unit * blocks + leaf) * ALL + BLOCK + height * RANK)[:, None] + rest[None, :]
        mask = (leaf < stop)[:, None, None] & wide
        at = row[:, :, None] * D + dims[None, None, :]
        dk += tl.load(beside_k + at, mask=mask, other=0.0).to(tl.float32)
        dv += tl.load(beside_v + at, mask=mask, other=0.0).to(tl.float32)
        if d_bias is not None:
            db += tl.load(beside_bias + row, mask=(leaf < stop)[:, None], other=0.0)

    # as one of a list
    slot = tl.where(sink, place, lead + 2 * height + group % 2)
    first = tl.where(sink, radius + 1, _first(height, group, radius)) * TILES
    stop = tl.where(sink, tiles, _first(height + 1, group >> 1, radius) * TILES)
    stop = tl.minimum(stop, tiles)
    width = (slots * RANK + FAR - 1) // FAR * FAR
    for r in range(REPEAT):
        head = b * heads + g * REPEAT + r
        for begin in range(first, stop, AT_ONCE):
            tile = begin + each
            row = ((head * tiles + tile) * width + slot * RANK)[:, None] + rest[None, :]
            mask = (tile < stop)[:, None, None] & wide
            at = row[:, :, None] * D + dims[None, None, :]
            dk += tl.load(parts_k + at, mask=mask, other=0.0).to(tl.float32)
            dv += tl.load(parts_v + at, mask=mask, other=0.0).to(tl.float32)
            if d_bias is not None:
                db += tl.load(parts_bias + row, mask=(tile < stop)[:, None], other=0.0)
    row = unit * far_rows + place.to(tl.int64) * RANK + rest
    to = row[:, None] * D + dims
    tl.store(d_k + to, tl.sum(dk, 0).to(d_k.dtype.element_ty), mask=(dims < D)[None, :])
    tl.store(d_v + to, tl.sum(dv, 0).to(d_v.dtype.element_ty), mask=(dims < D)[None, :])
    if d_bias is not None:
        tl.store(d_bias + row, tl.sum(db, 0))


class Opened(NamedTuple):
    """The call of attend_listed for opened groups with what is beside them, and each query's own word."""

    call: Call
    beside: Beside
    words: Tensor


def _opened(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, bias: Tensor, leaves: Tensor, count: Tensor,
    tree: Tree, near: int, scale: float, begin: int, used: int,
) -> Opened:  # fmt: skip
    batch, heads, tokens, width = q.shape
    kv_heads, lists, picks = k.shape[1], *leaves.shape[1::2]
    leaves, count = leaves.contiguous(), count.contiguous()
    words, own, total = torch.empty_like(leaves), torch.empty_like(count), count.numel()
    start(
        paths, (-(-total // 64),),
        leaves, count, words, own, begin, tokens, near // tree.block, tree.levels, picks, total,
        tree.block, padded(picks, 1), 64, num_warps=4,
    )  # fmt: skip
    rows = _rows(tree)
    beside_k, beside_v = (x.new_empty(batch, kv_heads, used * rows, width) for x in (k, v))
    more = torch.empty(batch, kv_heads, used * rows, dtype=torch.float32, device=q.device)
    _, k, v, far_k, far_v, bias, at, unit = _readable(q, k, v, far_k, far_v, bias)
    start(
        set_beside, (used * (rows // 64), batch * kv_heads),
        k, v, far_k, far_v, bias, beside_k, beside_v, more,
        kv_heads, k.shape[2], used, tree.blocks, tree.levels, tree.lead, *at[3:], scale,
        tree.block, tree.rank, width, padded(width), unit, rows, 64, num_warps=4,
    )  # fmt: skip
    # lists that heads share: each key head a batch element of its own
    if lists == kv_heads != heads:
        q = q.reshape(batch * kv_heads, heads // kv_heads, tokens, width)
        beside_k, beside_v = (x.flatten(0, 1)[:, None] for x in (beside_k, beside_v))
        leaves, count, words = (x.flatten(0, 1)[:, None] for x in (leaves, count, words))
    none = q.new_empty(0)
    call = Call(
        q, [beside_k], [beside_v], [none], [none], [none], none, none, [leaves], [count], [Plan(1, rows, 0, -1, 0)],
        scale,
    )  # fmt: skip
    return Opened(call, Beside(words, more, tree.block, tree.rank), own)


def _rows(tree: Tree) -> int:
    """Rows of a block with those beside it; Hopper's kernels take 128 at a time."""
    return -(-(tree.block + tree.levels * tree.rank) // 128) * 128


def _slots(tree: Tree) -> int:
    return tree.lead // tree.rank + 2 * tree.levels


def _piece(rank: int) -> int:
    """Rows of a tile of summaries."""
    return max(PIECE, rank)


def forward(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, bias: Tensor, leaves: Tensor, count: Tensor,
    tree: Tree, near: int, scale: float, begin: int = 0, used: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, H, T, D] and lse [B, H, T] of queries begin .. begin + T - 1, `begin` a multiple of 64.

    used: how many of the tree's blocks there are, default all.
    """
    batch, heads, tokens, width = q.shape
    used = tree.blocks if used is None else used
    opened = _opened(q, k, v, far_k, far_v, bias, leaves, count, tree, near, scale, begin, used)
    found, found_lse = attend_listed(opened.call, beside=opened.beside)
    q, k, v, far_k, far_v, bias, at, unit = _readable(q, k, v, far_k, far_v, bias)
    out, lse = q.new_empty(q.shape), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tiles = -(-tokens // TILE)
    start(
        near_far_forward, (tiles * batch * heads,),
        q, k, v, far_k, far_v, bias, opened.words, found, found_lse, out, lse,
        heads, leaves.shape[1], begin, tokens, k.shape[2], tiles, near // tree.block, tree.blocks, tree.levels, tree.lo,
        _slots(tree), *at, scale, heads // k.shape[1], tree.block, tree.rank, width, padded(width), unit,
        TILE, TILE, _piece(tree.rank), num_warps=4, num_stages=3 if width <= 64 else 2,
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, bias: Tensor, leaves: Tensor,
    count: Tensor, out: Tensor, lse: Tensor, tree: Tree, near: int, scale: float, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, those of the far rows, and of the bias [B, G, R], empty unless asked for."""
    batch, heads, tokens, width = q.shape
    kv_heads, lists = k.shape[1], leaves.shape[1]
    opened = _opened(q, k, v, far_k, far_v, bias, leaves, count, tree, near, scale, 0, tree.blocks)
    call = opened.call
    d_q, opened_k, opened_v, opened_bias = gradients(
        call, d_out.reshape(call.q.shape), None, out.view(call.q.shape), lse.view(call.q.shape[:3]),
        beside=opened.beside, bias_grad=bias_grad,
    )  # fmt: skip
    d_q, d_k, d_v = d_q.view(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    q, k, v, far_k, far_v, bias, at, unit = _readable(q, k, v, far_k, far_v, bias, d_out)
    d_out, d_at = _dense(d_out)
    d_at = [n // unit for n in d_at]
    tiles, repeat, radius = -(-tokens // TILE), heads // kv_heads, near // tree.block
    delta, wide, piece, slots = torch.empty_like(lse), padded(width), _piece(tree.rank), _slots(tree)
    parts = torch.empty(batch * heads * tiles, -(-slots * tree.rank // piece) * piece, dtype=lse.dtype, device=q.device)
    parts_k, parts_v = (q.new_empty(*parts.shape, width) for _ in range(2))
    start(
        near_far_queries, (tiles * batch * heads,),
        q, k, v, far_k, far_v, bias, opened.words, out, lse, d_out, d_q, delta, parts_k, parts_v,
        parts if bias_grad else None,
        heads, lists, 0, tokens, tokens, tiles, radius, tree.blocks, tree.levels, tree.lo, slots, *at, *d_at, scale,
        repeat, tree.block, tree.rank, width, wide, unit, TILE, TILE, piece,
        num_warps=4 if wide <= 64 else 8, num_stages=3 if wide <= 64 else 2,
    )  # fmt: skip
    start(
        near_rows, (tiles * batch * kv_heads,),
        q, k, v, lse, delta, d_out, opened_k, opened_v, d_k, d_v, heads, tokens, tiles, radius, tree.blocks, *at[:9],
        *d_at, scale, repeat, tree.block, width, wide, unit, TILE, TILE, _rows(tree), num_warps=4,
        num_stages=3 if wide <= 64 else 2,
    )  # fmt: skip
    d_far_k, d_far_v = far_k.new_empty(far_k.shape), far_v.new_empty(far_v.shape)
    d_bias = bias.new_empty((batch, kv_heads, far_k.shape[2]) if bias_grad else 0)
    groups = tree.rows // tree.rank
    start(
        far_gradients, (groups * batch * kv_heads,),
        opened_k, opened_v, opened_bias, parts_k, parts_v, parts, d_far_k, d_far_v, d_bias if bias_grad else None,
        heads, tiles, radius, tree.blocks, tree.levels, tree.lo, slots, far_k.shape[2], groups,
        repeat, tree.block, tree.rank, width, wide, _rows(tree), piece, tree.block // TILE,
        max(1, 4096 // (wide * tree.rank)), num_warps=4,
    )  # fmt: skip
    return d_q, d_k, d_v, d_far_k, d_far_v, d_bias


def _readable(q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, bias: Tensor, *more: Tensor):
    """The tensors as the kernels read them, their strides in units of so many elements, and that unit."""
    width = q.shape[3]
    (q, q_at), (k, k_at), (v, v_at) = (_dense(x) for x in (q, k, v))
    unit = _unit(q, width, *q_at, *k_at, *v_at, *(n for x in more for n in _dense(x)[1]))
    far_k, far_v, bias = far_k.contiguous(), far_v.contiguous(), bias.contiguous()
    at = [n // unit for n in (*q_at, *k_at, *v_at)]
    at += far_k.stride(1), 0 if bias.shape[0] == 1 else bias.stride(0), 0 if bias.shape[1] == 1 else bias.stride(1)
    return q, k, v, far_k, far_v, bias, at, unit
