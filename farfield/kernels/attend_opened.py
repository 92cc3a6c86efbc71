"""Opened FMA's attention on the GPU: near tokens and summaries by tiles, opened groups by their readers, one softmax.

The opened groups go through attend_listed: out and lse. The kernel here begins its running softmax with that result, so
that what it leaves is the softmax over everything; a tile of 64 queries reads its near tokens, and those pieces of the
far buffer that any of its queries reads, each query hiding what its bits (kernels.opened) do not name.

Backward: with out and lse of the whole, each part has the gradients of its own rows without knowing of the other:
p = exp(s - lse), ds = p (dout v' - delta), delta = sum(dout out). dq and the tokens' dk and dv begin with those of the
opened groups. A piece of the far buffer is held by one program, which goes through the tiles that read it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import LN2, LOG2E, _dense, padded, soften
from farfield.kernels.attend_listed import _unit, attend_listed
from farfield.kernels.attend_listed_backward import attend_listed_backward
from farfield.kernels.opened import TILE, masks
from farfield.ops.attend import Call, Plan
from farfield.ops.pool import Tree

PIECE = 64  # rows of the far buffer that are read at once

STRIDES = ["q_b", "q_h", "q_t", "k_b", "k_h", "k_r", "v_b", "v_h", "v_r", "far_b", "bias_b", "bias_h"]
VARIES = ["heads", "lists", "tokens", "tiles", "radius", "far_rows", "words", "entries", *STRIDES]


@triton.jit
def _piece(
    q_tile, far_k, far_v, bias, entry_row, entry_bit, bits, asked, tokens, far_rows, scale, dims,
    D: tl.constexpr, RANK: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Scores [queries, FAR] of a piece of the far buffer, its keys and values, and which query reads which row."""
    row = tl.load(entry_row) + tl.arange(0, FAR)
    code = tl.load(entry_bit)
    there = row < far_rows
    mask = there[:, None] & (dims < D)
    k_tile = tl.load(far_k + row[:, None] * D + dims, mask=mask, other=0.0)
    v_tile = tl.load(far_v + row[:, None] * D + dims, mask=mask, other=0.0)
    more = tl.load(bias + row, mask=there, other=0.0)
    # the bit of the piece's first group
    word = tl.load(bits + (code // 32) * tokens.to(tl.int64), mask=asked, other=0)
    seen = ((word[:, None] >> (code % 32 + tl.arange(0, FAR) // RANK)[None, :]) & 1) != 0
    scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * (scale * LOG2E) + (more * LOG2E)[None, :]
    return scores, k_tile, v_tile, seen


@triton.jit(do_not_specialize=VARIES)
def near_far_forward(
    q, k, v, far_k, far_v, bias, bits, entry_row, entry_bit, entry_count, opened, opened_lse, out, lse,
    heads, lists, tokens, tiles, radius, far_rows, words, entries,
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
    n = tile * BQ // BLOCK
    dims = tl.arange(0, D_TILE)
    wide = dims < D
    i = tile * BQ + tl.arange(0, BQ)
    asked = i < tokens
    q_tile = tl.load(
        q + (b * q_b + h * q_h + i * q_t.to(tl.int64))[:, None] * UNIT + dims, mask=asked[:, None] & wide, other=0.0
    )
    place = (b * heads + h) * tokens + i
    before = tl.load(opened_lse + place, mask=asked, other=float("-inf")) * LOG2E
    acc = tl.load(opened + place[:, None] * D + dims, mask=asked[:, None] & wide, other=0.0).to(tl.float32)
    mass = tl.where(before == float("-inf"), 0.0, 1.0)
    peak = before
    k_at, v_at = k + (b * k_b + g * k_h) * UNIT, v + (b * v_b + g * v_h) * UNIT
    for begin in range(tl.maximum(n - radius, 0) * BLOCK, tile * BQ + BQ, BK):
        at = begin + tl.arange(0, BK)
        there = (at < tokens)[:, None] & wide
        k_tile = tl.load(k_at + (at * k_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
        v_tile = tl.load(v_at + (at * v_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(at[None, :] <= i[:, None], scores, float("-inf"))
        peak, mass, acc = soften(peak, mass, acc, scores, v_tile)
    far_at = (b * (heads // REPEAT) + g) * far_b
    listed = (unit * tiles + tile) * entries
    bits_at = bits + unit * words * tokens + i
    for step in range(tl.load(entry_count + unit * tiles + tile)):
        scores, k_tile, v_tile, seen = _piece(
            q_tile, far_k + far_at, far_v + far_at, bias + b * bias_b + g * bias_h, entry_row + listed + step,
            entry_bit + listed + step, bits_at, asked, tokens, far_rows, scale, dims, D, RANK, FAR,
        )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        peak, mass, acc = soften(peak, mass, acc, scores, v_tile)
    acc *= (1.0 / tl.where(mass > 0, mass, 1.0))[:, None]
    tl.store(out + place[:, None] * D + dims, acc.to(out.dtype.element_ty), mask=asked[:, None] & wide)
    tl.store(lse + place, (peak + tl.log2(mass)) * LN2, mask=asked)


@triton.jit(do_not_specialize=[*VARIES, "d_b", "d_h", "d_t"])
def near_far_queries(
    q, k, v, far_k, far_v, bias, bits, entry_row, entry_bit, entry_count, out, lse, d_out, d_q, delta,
    heads, lists, tokens, tiles, radius, far_rows, words, entries,
    q_b, q_h, q_t, k_b, k_h, k_r, v_b, v_h, v_r, far_b, bias_b, bias_h, d_b, d_h, d_t, scale,
    REPEAT: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
    UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """delta, and dq added to what d_q holds."""
    pid = tl.program_id(0).to(tl.int64)
    many = tl.num_programs(0) // tiles
    tile, b, h = tiles - 1 - (pid // many).to(tl.int32), pid % many // heads, pid % many % heads
    g = h // REPEAT
    unit = b * lists + h // (heads // lists)
    n = tile * BQ // BLOCK
    dims = tl.arange(0, D_TILE)
    wide = dims < D
    i = tile * BQ + tl.arange(0, BQ)
    asked = i < tokens
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
    for begin in range(tl.maximum(n - radius, 0) * BLOCK, tile * BQ + BQ, BK):
        at = begin + tl.arange(0, BK)
        there = (at < tokens)[:, None] & wide
        k_tile = tl.load(k_at + (at * k_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
        v_tile = tl.load(v_at + (at * v_r.to(tl.int64))[:, None] * UNIT + dims, mask=there, other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * (scale * LOG2E)
        weights = tl.where(at[None, :] <= i[:, None], tl.exp2(scores - total[:, None]), 0.0)
        d_scores = weights * (tl.dot(d_tile, v_tile.T, input_precision="ieee") - less[:, None])
        acc = tl.dot(d_scores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    far_at = (b * (heads // REPEAT) + g) * far_b
    listed = (unit * tiles + tile) * entries
    bits_at = bits + unit * words * tokens + i
    for step in range(tl.load(entry_count + unit * tiles + tile)):
        scores, k_tile, v_tile, seen = _piece(
            q_tile, far_k + far_at, far_v + far_at, bias + b * bias_b + g * bias_h, entry_row + listed + step,
            entry_bit + listed + step, bits_at, asked, tokens, far_rows, scale, dims, D, RANK, FAR,
        )  # fmt: skip
        weights = tl.where(seen, tl.exp2(scores - total[:, None]), 0.0)
        d_scores = weights * (tl.dot(d_tile, v_tile.T, input_precision="ieee") - less[:, None])
        acc = tl.dot(d_scores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    to = d_q + place[:, None] * D + dims
    acc = acc * scale + tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, acc.to(d_q.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*VARIES, "d_b", "d_h", "d_t"])
def near_rows(
    q, k, v, lse, delta, d_out, d_k, d_v,
    heads, tokens, tiles, radius,
    q_b, q_h, q_t, k_b, k_h, k_r, v_b, v_h, v_r, d_b, d_h, d_t, scale,
    REPEAT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
    UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dk and dv of BK tokens from the queries that read them as near, added to what d_k and d_v hold."""
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
    to = (unit * tokens + at)[:, None] * D + dims
    dk = dk * scale + tl.load(d_k + to, mask=there, other=0.0).to(tl.float32)
    dv += tl.load(d_v + to, mask=there, other=0.0).to(tl.float32)
    tl.store(d_k + to, dk.to(d_k.dtype.element_ty), mask=there)
    tl.store(d_v + to, dv.to(d_v.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*VARIES, "blocks", "levels", "sinks", "d_b", "d_h", "d_t"])
def far_gradients(
    q, far_k, far_v, bias, bits, touched, readers, lse, delta, d_out, d_k, d_v, d_bias,
    heads, lists, tokens, tiles, radius, far_rows, words, entries, blocks, levels, sinks,
    q_b, q_h, q_t, far_b, bias_b, bias_h, d_b, d_h, d_t, scale,
    REPEAT: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, D_TILE: tl.constexpr, UNIT: tl.constexpr, BQ: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """dk, dv and the bias' gradient of one piece of the far buffer, from all tiles that read it."""
    pid = tl.program_id(0).to(tl.int64)
    # the pieces of the coarsest levels have the most readers and start first
    many = tl.num_programs(0) // entries
    piece, unit = entries - 1 - (pid // many).to(tl.int32), pid % many
    kv_heads = heads // REPEAT
    b, g = unit // kv_heads, unit % kv_heads

    # the level of the piece; the sinks are one too
    level, first, base = 0, 0, 0
    groups = (sinks + RANK - 1) // RANK
    left = piece
    while left >= (groups + GROUPS - 1) // GROUPS:
        left -= (groups + GROUPS - 1) // GROUPS
        first += groups
        base += (groups + 31) // 32
        groups = blocks >> level
        level += 1
    j = left * GROUPS
    height = tl.maximum(level - 1, 0)
    # the first block that reads it
    n = tl.where(level == 0, radius + 1, (j + ((radius + (1 << height) - 1) >> height) + 1) << height)
    word_at = base + j // 32
    bit = j % 32
    readers += pid * tiles
    MANY: tl.constexpr = 128

    dims = tl.arange(0, D_TILE)
    wide = dims < D
    inside = tl.arange(0, FAR)
    row = (first + j) * RANK + inside
    # what follows belongs to the next level
    mine = (row < far_rows) & (j + inside // RANK < groups)
    far_at = unit * far_b
    k_tile = tl.load(far_k + far_at + row[:, None] * D + dims, mask=mine[:, None] & wide, other=0.0)
    v_tile = tl.load(far_v + far_at + row[:, None] * D + dims, mask=mine[:, None] & wide, other=0.0)
    more = tl.load(bias + b * bias_b + g * bias_h + row, mask=mine, other=0.0) * LOG2E
    dk = tl.zeros([FAR, D_TILE], tl.float32)
    dv = tl.zeros([FAR, D_TILE], tl.float32)
    db = tl.zeros([FAR], tl.float32)
    for r in range(REPEAT):
        h = g * REPEAT + r
        owner = b * lists + h // (heads // lists)
        # the tiles that read it, one behind the other
        tl.debug_barrier()
        filled = 0
        for begin in range(n * BLOCK // BQ, tiles, MANY):
            t = begin + tl.arange(0, MANY)
            some = tl.load(touched + (owner * words + word_at) * tiles + t, mask=t < tiles, other=0)
            reads = (((some >> bit) & (-1 if GROUPS == 32 else (1 << GROUPS) - 1)) != 0).to(tl.int32)
            tl.store(readers + filled + tl.cumsum(reads, 0) - 1, t, mask=reads != 0)
            filled += tl.sum(reads, 0)
        tl.debug_barrier()
        for step in range(filled):
            i = tl.load(readers + step) * BQ + tl.arange(0, BQ)
            asked = i < tokens
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
            word = tl.load(bits + (owner * words + word_at) * tokens + i, mask=asked, other=0)
            seen = ((word[None, :] >> (bit + inside // RANK)[:, None]) & 1) != 0
            scores = tl.dot(k_tile, q_tile.T, input_precision="ieee") * (scale * LOG2E) + more[:, None]
            weights = tl.where(seen, tl.exp2(scores - total[None, :]), 0.0)
            dv = tl.dot(weights.to(d_tile.dtype), d_tile, dv, input_precision="ieee")
            d_scores = weights * (tl.dot(v_tile, d_tile.T, input_precision="ieee") - less[None, :])
            dk = tl.dot(d_scores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
            if d_bias is not None:
                db += tl.sum(d_scores, 1)
    to = (unit * far_rows + row)[:, None] * D + dims
    tl.store(d_k + to, (dk * scale).to(d_k.dtype.element_ty), mask=mine[:, None] & wide)
    tl.store(d_v + to, dv.to(d_v.dtype.element_ty), mask=mine[:, None] & wide)
    if d_bias is not None:
        tl.store(d_bias + unit * far_rows + row, db, mask=mine)


class Masks(NamedTuple):
    """What kernels.opened.masks leaves; bits [B, lists, words, T], all else for each tile."""

    bits: Tensor
    touched: Tensor
    entry_row: Tensor
    entry_bit: Tensor
    entry_count: Tensor
    words: int
    entries: int


def _masks(leaves: Tensor, count: Tensor, tree: Tree, near: int) -> Masks:
    batch, lists, tokens, picks = leaves.shape
    leaves, count = leaves.contiguous(), count.contiguous()
    tiles, groups = -(-tokens // TILE), _groups(tree.rank)
    levels = [tree.lead // tree.rank, *tree.groups]
    words, entries = sum(-(-n // 32) for n in levels), sum(-(-n // groups) for n in levels)
    new = leaves.new_empty
    bits, touched = new(batch, lists, words, tokens), new(batch, lists, words, tiles)
    row, bit, filled = (new(batch * lists * tiles, n) for n in (entries, entries, 1))
    masks[(batch * lists * tiles,)](
        leaves, count, bits, touched, row, bit, filled,
        tokens, tiles, tree.blocks, near // tree.block, tree.lo, tree.levels, picks, words, entries,
        tree.block, tree.rank, groups, padded(picks, 1), TILE, num_warps=4,
    )  # fmt: skip
    return Masks(bits, touched, row, bit, filled, words, entries)


def _groups(rank: int) -> int:
    """Groups of a piece of the far buffer."""
    return min(32, max(PIECE // rank, 1))


def _listed(q: Tensor, k: Tensor, v: Tensor, leaves: Tensor, count: Tensor, block: int, scale: float) -> Call:
    """The opened groups, where lists are shared with each key head a batch element of its own."""
    batch, heads, tokens, width = q.shape
    kv_heads, rows = k.shape[1:3]
    if leaves.shape[1] == kv_heads:
        q = q.reshape(batch * kv_heads, heads // kv_heads, tokens, width)
        k, v = (x.reshape(batch * kv_heads, 1, rows, width) for x in (k, v))
        leaves, count = (x.flatten(0, 1)[:, None] for x in (leaves, count))
    none = q.new_empty(0)
    plan = Plan(1, block, 0, -1, 0)
    return Call(q, [k], [v], [none], [none], [none], none, none, [leaves], [count], [plan], scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, bias: Tensor, leaves: Tensor, count: Tensor,
    tree: Tree, near: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, H, T, D] and lse [B, H, T]."""
    batch, heads, tokens, width = q.shape
    found = _masks(leaves, count, tree, near)
    opened, opened_lse = attend_listed(_listed(q, k, v, leaves, count, tree.block, scale))
    q, k, v, far_k, far_v, bias, at, unit = _readable(q, k, v, far_k, far_v, bias)
    out, lse = q.new_empty(q.shape), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tiles = -(-tokens // TILE)
    near_far_forward[(tiles * batch * heads,)](
        q, k, v, far_k, far_v, bias, found.bits, found.entry_row, found.entry_bit, found.entry_count,
        opened.view(q.shape), opened_lse, out, lse,
        heads, leaves.shape[1], tokens, tiles, near // tree.block, far_k.shape[2], found.words, found.entries,
        *at, scale, heads // k.shape[1], tree.block, tree.rank, width, padded(width), unit,
        TILE, TILE, _groups(tree.rank) * tree.rank, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, bias: Tensor, leaves: Tensor,
    count: Tensor, out: Tensor, lse: Tensor, tree: Tree, near: int, scale: float, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, those of the far rows, and of the bias [B, G, R], empty unless asked for."""
    batch, heads, tokens, width = q.shape
    kv_heads, lists = k.shape[1], leaves.shape[1]
    found = _masks(leaves, count, tree, near)
    call = _listed(q, k, v, leaves, count, tree.block, scale)
    split = call.q.shape[:3]
    d_q, d_k, d_v = attend_listed_backward(
        call, d_out.reshape(call.q.shape), None, out.view(call.q.shape), lse.view(split)
    )
    d_q, d_k, d_v = d_q.view(q.shape), d_k.view(k.shape), d_v.view(k.shape)
    q, k, v, far_k, far_v, bias, at, unit = _readable(q, k, v, far_k, far_v, bias, d_out)
    d_out, d_at = _dense(d_out)
    d_at = [n // unit for n in d_at]
    tiles, repeat = -(-tokens // TILE), heads // kv_heads
    delta = torch.empty_like(lse)
    numbers = heads, lists, tokens, tiles, near // tree.block, far_k.shape[2], found.words, found.entries
    wide, groups = padded(width), _groups(tree.rank)
    near_far_queries[(tiles * batch * heads,)](
        q, k, v, far_k, far_v, bias, found.bits, found.entry_row, found.entry_bit, found.entry_count,
        out, lse, d_out, d_q, delta, *numbers, *at, *d_at, scale,
        repeat, tree.block, tree.rank, width, wide, unit, TILE, TILE, groups * tree.rank, num_warps=4, num_stages=2,
    )  # fmt: skip
    near_rows[(tiles * batch * kv_heads,)](
        q, k, v, lse, delta, d_out, d_k, d_v, heads, tokens, tiles, near // tree.block, *at[:9], *d_at, scale,
        repeat, tree.block, width, wide, unit, TILE, TILE, num_warps=4, num_stages=2,
    )  # fmt: skip
    d_far_k, d_far_v = far_k.new_empty(far_k.shape), far_v.new_empty(far_v.shape)
    d_bias = bias.new_empty((batch, kv_heads, far_k.shape[2]) if bias_grad else 0)
    readers = leaves.new_empty(found.entries * batch * kv_heads, tiles)
    far_gradients[(found.entries * batch * kv_heads,)](
        q, far_k, far_v, bias, found.bits, found.touched, readers, lse, delta, d_out, d_far_k, d_far_v,
        d_bias if bias_grad else None, *numbers, tree.blocks, tree.levels, tree.lo, *at[:3], *at[9:], *d_at, scale,
        repeat, tree.block, tree.rank, groups, width, wide, unit, TILE, groups * tree.rank, num_warps=4, num_stages=2,
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
