"""attend on the GPU, forward: one program a query tile, all its sources under one running softmax.

A program takes up to BQ of the stack * q_block queries that share a list (the query heads of one key head lie in one
tile) and walks the list's rows BK at a time. A list is read as count * k_block consecutive rows, so that one tile may
hold a part of a large block, one block, or many small ones: gathering single rows and reading blocks is one loop.

Where `parts` is given, the steps of all sources, one behind the other, are shared out over `splits` programs, and each
leaves a softmax of its own: float32 out and the log2 of its mass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.replay import start
from farfield.ops.attend import Call

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WIDEST = 256  # key and value width
SOURCES = 2

# What varies with the length or the step must not make another kernel, so nothing is specialised on it: strides are
# single numbers (a tuple's elements are always specialised), in units of so many elements as are loaded at once.
SIZES = ["heads", "tokens", "blocks", "splits"]
SIZES += ["q_b", "q_h", "q_t", "position_b", "position_h", "group_b", "group_h"]
PER_SOURCE = ["k{}_b", "k{}_h", "k{}_r", "v{}_b", "v{}_h", "v{}_r", "bias{}_b", "bias{}_h", "end{}_b", "end{}_h"]
PER_SOURCE += ["group{}_b", "group{}_h", "list{}_b", "list{}_h", "picks{}", "rows{}", "reach{}", "sinks{}"]
POINTERS = ["bias{}", "end{}", "group{}", "index{}", "count{}"]
VARIES = [*SIZES, *(name.format(s) for name in (*PER_SOURCE, *POINTERS) for s in (0, 1)), "position", "group"]


@triton.jit(do_not_specialize=VARIES)
def attend_forward(
    q, out, lse, parts, masses, position, group,
    k0, v0, bias0, end0, group0, index0, count0,
    k1, v1, bias1, end1, group1, index1, count1,
    heads, tokens, blocks, splits, q_b, q_h, q_t, position_b, position_h, group_b, group_h,
    k0_b, k0_h, k0_r, v0_b, v0_h, v0_r, bias0_b, bias0_h, end0_b, end0_h, group0_b, group0_h,
    list0_b, list0_h, picks0, rows0, reach0, sinks0,
    k1_b, k1_h, k1_r, v1_b, v1_h, v1_r, bias1_b, bias1_h, end1_b, end1_h, group1_b, group1_h,
    list1_b, list1_h, picks1, rows1, reach1, sinks1,
    scale,
    STACK: tl.constexpr, REPEAT: tl.constexpr, Q_BLOCK: tl.constexpr,
    K_BLOCK0: tl.constexpr, CAUSAL0: tl.constexpr, REACH0: tl.constexpr,
    K_BLOCK1: tl.constexpr, CAUSAL1: tl.constexpr, REACH1: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_UNIT: tl.constexpr, E_UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (STACK * Q_BLOCK + BQ - 1) // BQ
    # int64: token * stride passes 2**31 at long context
    pid = tl.program_id(0).to(tl.int64)
    split = pid * 0
    if parts is not None:
        split, pid = pid % splits, pid // splits
    tile, n, unit = pid % TILES, pid // TILES % blocks, pid // TILES // blocks
    units = heads // STACK
    b, u = unit // units, unit % units

    # row of the tile -> query head of the unit and token of the block
    row = tile * BQ + tl.arange(0, BQ)
    h = u * STACK + row // Q_BLOCK
    i = n * Q_BLOCK + row % Q_BLOCK
    asked = (row < STACK * Q_BLOCK) & (i < tokens)
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    # [BQ, D]
    q_at = q + (b * q_b + h * q_h + i * q_t)[:, None] * D_UNIT + dims
    q_tile = tl.load(q_at, mask=asked[:, None] & (dims < D), other=0.0)
    at = i
    if position is not None:
        at = tl.load(position + b * position_b + h * position_h + i, mask=asked, other=0).to(tl.int64)
    mine = tl.zeros([BQ], tl.int64)
    if group is not None:
        mine = tl.load(group + b * group_b + h * group_h + i, mask=asked, other=0).to(tl.int64)

    # the run of steps, through the first source and on through the second
    listed0 = tl.load(count0 + b * list0_b + u * list0_h + n) * K_BLOCK0
    steps0 = (listed0 + BK - 1) // BK
    steps, listed1 = steps0, 0
    if k1 is not None:
        listed1 = tl.load(count1 + b * list1_b + u * list1_h + n) * K_BLOCK1
        steps += (listed1 + BK - 1) // BK
    first, last = 0, steps
    if parts is not None:
        share = (steps + splits - 1) // splits
        first = split.to(tl.int32) * share
        last = tl.minimum(first + share, steps)

    peak = tl.full([BQ], float("-inf"), tl.float32)
    mass = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, E_TILE], tl.float32)
    g = u if STACK > 1 else u // REPEAT
    peak, mass, acc = _read(
        peak, mass, acc, q_tile, at, mine, scale, first, tl.minimum(last, steps0), listed0, rows0, reach0, sinks0,
        k0 + (b * k0_b + g * k0_h) * D_UNIT, v0 + (b * v0_b + g * v0_h) * E_UNIT, k0_r, v0_r,
        index0 + (b * list0_b + u * list0_h + n) * picks0, bias0, b * bias0_b + u * bias0_h,
        end0, b * end0_b + g * end0_h, group0, b * group0_b + g * group0_h, dims, values,
        D, E, D_UNIT, E_UNIT, K_BLOCK0, BK, CAUSAL0, REACH0,
    )  # fmt: skip
    if k1 is not None:
        peak, mass, acc = _read(
            peak, mass, acc, q_tile, at, mine, scale, tl.maximum(first, steps0) - steps0, last - steps0, listed1,
            rows1, reach1, sinks1,
            k1 + (b * k1_b + g * k1_h) * D_UNIT, v1 + (b * v1_b + g * v1_h) * E_UNIT, k1_r, v1_r,
            index1 + (b * list1_b + u * list1_h + n) * picks1, bias1, b * bias1_b + u * bias1_h,
            end1, b * end1_b + g * end1_h, group1, b * group1_b + g * group1_h, dims, values,
            D, E, D_UNIT, E_UNIT, K_BLOCK1, BK, CAUSAL1, REACH1,
        )  # fmt: skip

    acc /= tl.where(mass > 0, mass, 1.0)[:, None]
    # log2(0) = -inf is what a query that read nothing has
    total = peak + tl.log2(mass)
    place = (b * heads + h) * tokens + i
    if parts is None:
        out_at = out + place[:, None] * E + values
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=asked[:, None] & (values < E))
        tl.store(lse + place, total * LN2, mask=asked)
    else:
        place = place * splits + split
        tl.store(parts + place[:, None] * E + values, acc, mask=asked[:, None] & (values < E))
        tl.store(masses + place, total, mask=asked)


@triton.jit
def _read(
    peak, mass, acc, q_tile, at, mine, scale, first, last, listed, rows, reach, sinks,
    k, v, k_r, v_r, index, bias, bias_at, end, end_at, group, group_at, dims, values,
    D: tl.constexpr, E: tl.constexpr, D_UNIT: tl.constexpr, E_UNIT: tl.constexpr,
    K_BLOCK: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax over steps first .. last - 1 of the `listed` rows of one source."""
    for step in range(first, last):
        slot = step * BK + tl.arange(0, BK)
        row = tl.load(index + slot // K_BLOCK, mask=slot < listed, other=0).to(tl.int64) * K_BLOCK + slot % K_BLOCK
        # Triton 3.6 concludes that every row is a multiple of K_BLOCK, and shares comparisons between rows by it
        row = tl.multiple_of(row, 1)
        there = (slot < listed) & (row < rows)
        # [BK, D]
        k_tile = tl.load(k + (row * k_r)[:, None] * D_UNIT + dims, mask=there[:, None] & (dims < D), other=0.0)
        v_tile = tl.load(v + (row * v_r)[:, None] * E_UNIT + values, mask=there[:, None] & (values < E), other=0.0)
        # [BQ, BK], in units of log 2
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * (scale * LOG2E)
        if bias is not None:
            more = tl.load(bias + bias_at + row, mask=there, other=0.0).to(tl.float32)
            scores += (more * LOG2E)[None, :]
        seen = there[None, :]
        if CAUSAL or REACH:
            ends = row
            if end is not None:
                ends = tl.load(end + end_at + row, mask=there, other=0).to(tl.int64)
            if CAUSAL:
                seen = seen & (ends[None, :] <= at[:, None])
            if REACH:
                seen = seen & ((tl.abs(at[:, None] - ends[None, :]) < reach) | (row < sinks)[None, :])
        if group is not None:
            theirs = tl.load(group + group_at + row, mask=there, other=0)
            seen = seen & (theirs.to(tl.int64)[None, :] == mine[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        peak, mass, acc = soften(peak, mass, acc, scores, v_tile)
    return peak, mass, acc


@triton.jit
def soften(peak, mass, acc, scores, v_tile):
    """One step of the running softmax, in units of log 2: peak, mass and sum with these rows."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    # a query that has read nothing keeps peak = -inf, and -inf - -inf is nan
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(peak - base)
    mass = mass * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
    return higher, mass, acc


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        queries: of a program.
        rows: of a step.
        splits: programs that a list is shared out over.
        most: what splits would be at any length.
    """

    queries: int
    rows: int
    warps: int
    stages: int
    splits: int = 1
    most: int = 1


def lists_of(call: Call) -> tuple[int, int]:
    """Lists of one query block and batch element, and how many query heads share one.

    The query heads of one key head do unless their lists or biases differ.
    """
    heads, kv_heads = call.q.shape[1], call.k[0].shape[1]
    shared = all(x.shape[1] == 1 for x in call.index)
    shared = shared and all(x.dim() == 1 or x.shape[1] in (1, kv_heads) for x in call.bias)
    units = kv_heads if shared else heads
    return units, heads // units


def refusal(call: Call) -> str | None:
    """Why the Triton kernel cannot take a call of attend, None if it can."""
    q, k, v = call.q, call.k, call.v
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {q.dtype}"
    if max(q.shape[-1], v[0].shape[-1]) > WIDEST:
        return f"takes widths up to {WIDEST}, got D={q.shape[-1]} and E={v[0].shape[-1]}"
    if len(k) > SOURCES:
        return f"takes {SOURCES} sources, got {len(k)}"
    if len({x.shape[1] for x in k}) > 1:
        return "takes sources of one number of key heads"
    return None


def launch(
    call: Call, units: int, q_block: int, tiles: Tiles,
    out: Tensor | None, lse: Tensor | None, parts: Tensor | None = None, masses: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill out and lse, or with several splits parts and masses; all are contiguous."""
    q, k, v, bias, end, row_group, position, group, index, count, plans, scale = call
    batch, heads, tokens, width = q.shape
    _, kv_heads, _, value_width = v[0].shape
    blocks, stack = index[0].shape[2], heads // units
    q, q_at = _dense(q)
    k, v = [_dense(x) for x in k], [_dense(x) for x in v]
    # 16 bytes are loaded at once where all strides allow it; the widths keep this the same for all lengths
    vector = 16 // q.element_size()
    d_unit = math.gcd(vector, width, *q_at, *[n for _, at in k for n in at])
    e_unit = math.gcd(vector, value_width, *[n for _, at in v for n in at])

    tensors, numbers, constants = [], [], []
    for s, plan in enumerate(plans):
        (k_s, k_at), (v_s, v_at) = k[s], v[s]
        bias_s, *bias_at = _per_row(bias[s], units)
        end_s, *end_at = _per_row(end[s], kv_heads)
        group_s, *group_at = _per_row(row_group[s], kv_heads)
        batches, lists, _, picks = index[s].shape
        tensors += k_s, v_s, bias_s, end_s, group_s, index[s].contiguous(), count[s].contiguous()
        numbers += [n // d_unit for n in k_at]
        numbers += [n // e_unit for n in v_at]
        numbers += *bias_at, *end_at, *group_at
        numbers += 0 if batches == 1 else lists * blocks, 0 if lists == 1 else blocks, picks
        numbers += k_s.shape[2], plan.reach, plan.sinks
        constants += plan.k_block, bool(plan.causal), plan.reach >= 0
    if len(plans) == 1:
        tensors += [None] * len(tensors)
        numbers += [0] * len(numbers)
        constants += 1, False, False
    position, *position_at = _per_row(position, heads)
    group, *group_at = _per_row(group, heads)
    start(
        attend_forward, (-(-stack * q_block // tiles.queries) * tiles.splits * blocks * batch * units,),
        q, out, lse, parts, masses, position, group, *tensors,
        heads, tokens, blocks, tiles.splits, *[n // d_unit for n in q_at], *position_at, *group_at, *numbers, scale,
        stack, heads // kv_heads, q_block, *constants, width, value_width, padded(width), padded(value_width),
        d_unit, e_unit, BQ=tiles.queries, BK=tiles.rows, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def padded(size: int, least: int = 16) -> int:
    """The next power of two, as tiles have it, and at least what a matrix product takes."""
    # triton.next_power_of_2 takes microseconds
    return max(least, 1 << (size - 1).bit_length())


def _dense(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor whose elements lie next to each other, and its other strides."""
    strides = x.stride()
    if strides[3] != 1:
        x = x.contiguous()
        strides = x.stride()
    return x, strides[:3]


def _per_row(x: Tensor, heads: int) -> tuple[Tensor | None, int, int]:
    """A tensor [1|B, 1|heads, ...] and its strides over batch elements and heads; None if it is absent."""
    if x.dim() == 1:
        return None, 0, 0
    batches, given, _ = x.shape
    if given not in (1, heads):
        x = x.repeat_interleave(heads // given, 1)
    b, h, last = x.stride()
    if last != 1:
        x = x.contiguous()
        b, h, _ = x.stride()
    return x, 0 if batches == 1 else b, 0 if given == 1 else h
