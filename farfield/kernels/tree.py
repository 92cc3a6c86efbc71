"""The tree search on the GPU: one program a query block and head takes all steps on chip and writes the list.

A step gathers the sampled keys of 2 * nodes halves, takes their products with the block's sampled queries, and keeps
the best half: score, place and size of each half are packed into one 64-bit number, of which the largest are sorted
out. Lengths within a step differ by one at most, so that a bit tells them apart.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import padded
from farfield.ops.tree import Search

WIDEST = 256  # key width
MOST = 1024  # nodes that are followed
# halves of a step -> warps
WARPS: dict[int, int] = {8: 1, 16: 1, 32: 1}

VARIES = ["heads", "blocks", "start", "held", "tokens", "q_b", "q_h", "q_t", "k_b", "k_h", "k_t"]


@triton.jit(do_not_specialize=VARIES)
def tree_search(
    q, k, index, count, heads, blocks, start, held, tokens, q_b, q_h, q_t, k_b, k_h, k_t,
    REPEAT: tl.constexpr, KEEP: tl.constexpr, FOLLOW: tl.constexpr, NODES: tl.constexpr, SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, PLACE: tl.constexpr,
    PICKS: tl.constexpr, QUERIES: tl.constexpr, ASKED: tl.constexpr, SAMPLES: tl.constexpr, SAMPLED: tl.constexpr,
    HALVES: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    # constants of the module would be compared at every launch, in Python
    LOWEST: tl.constexpr = -3.4028234663852886e38
    ABSENT: tl.constexpr = -(2**63)
    LOW: tl.constexpr = 2**31 - 1
    pid = tl.program_id(0)
    # the longest searches first
    n = blocks - 1 - pid % blocks
    # int64: token * stride passes 2**31 at long context
    unit = (pid // blocks).to(tl.int64)
    b, h = unit // heads, unit % heads
    list_at = unit * blocks + n
    first = (start + n) * Q_BLOCK
    window = tl.maximum(tl.maximum(first - WINDOW + 1, 0) // K_BLOCK, SINKS)
    stop = (tl.minimum(first + Q_BLOCK, tokens) - 1) // K_BLOCK + 1
    size = window - SINKS
    found, followed = tl.minimum(size, KEEP), tl.minimum(size, FOLLOW)

    # queries up to the first one of the block: what comes later must not choose
    dims = tl.arange(0, D_TILE)
    row = first - tl.minimum(tl.arange(0, QUERIES), ASKED - 1) * Q_STRIDE - (tokens - held)
    # the block's first query again where there is none: it changes no maximum, and a mask would cost more
    row = tl.where(row < 0, first - (tokens - held), row).to(tl.int64)
    q_at = q + (b * q_b + h * q_h + row * q_t)[None, :] * UNIT + dims[:, None]
    # [D, QUERIES]
    q_tile = _load(q_at, (dims < D)[:, None], D, D_TILE)
    keys = k + (b * k_b + h // REPEAT * k_h) * UNIT

    # node j begins at j * size // followed, in 32 bits; its place and size in one number, -1 where there is none
    node = tl.arange(0, NODES)
    many = tl.maximum(followed, 1)
    short, rest = size // many, size % many
    cut = SINKS + node * short + node * rest // many
    over = (node + 1) * rest // many - node * rest // many
    mine = tl.where(node < followed, cut * 2 + over, -1)
    longest = short + (rest > 0).to(tl.int32)
    # one step at least where there is a choice: it gives single blocks their scores
    going = size > KEEP
    while going:
        at, length = mine >> 1, short + (mine & 1)
        half = length // 2
        begin = tl.reshape(tl.join(at, at + half), [2 * NODES])
        length = tl.reshape(tl.join(half, length - half), [2 * NODES])
        there = (tl.reshape(tl.join(mine, mine), [2 * NODES]) >= 0) & (length > 0)
        if PLACE == 0:
            block = begin + length // 2
        elif PLACE == 1:
            block = begin
        else:
            block = begin + length - 1
        block = tl.where(there, block, 0)
        scores = _scores(
            q_tile, keys, block, k_t, dims, K_BLOCK, K_STRIDE, SAMPLES, SAMPLED, HALVES, 2 * NODES, D, D_TILE, UNIT,
        )  # fmt: skip
        # -0 as 0, and what has no place among numbers as the lowest
        scores = tl.where(scores != scores, LOWEST, tl.maximum(scores, LOWEST)) + 0.0
        bits = scores.to(tl.int32, bitcast=True)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        short = short // 2
        # of equal scores the earlier one
        name = LOW - (begin * 2 + length - short).to(tl.int64)
        best = tl.topk(tl.where(there, (order << 32) | name, ABSENT), NODES)
        mine = tl.where(best == ABSENT, -1, LOW - (best & 0xFFFFFFFF)).to(tl.int32)
        mine = tl.where(node < FOLLOW, mine, -1)
        longest = (longest + 1) // 2
        going = longest > 1

    # the best come first
    chosen = tl.sort(tl.where(node < found, mine >> 1, 0x7FFFFFFF))
    tl.store(index + list_at * PICKS + SINKS + node, chosen, mask=node < found)
    for at in range(0, PICKS, 128):
        slot = at + tl.arange(0, 128)
        behind = slot - SINKS - found
        listed = tl.where(behind >= 0, window + behind, slot)
        own = (slot >= SINKS) & (behind < 0)
        tl.store(index + list_at * PICKS + slot, listed.to(tl.int32), mask=(slot < PICKS) & ~own)
    total = tl.minimum(stop, SINKS) + found + tl.maximum(stop - window, 0)
    tl.store(count + list_at, total.to(tl.int32))


@triton.jit
def _scores(
    q_tile, keys, block, k_t, dims,
    K_BLOCK: tl.constexpr, K_STRIDE: tl.constexpr, SAMPLES: tl.constexpr, SAMPLED: tl.constexpr,
    HALVES: tl.constexpr, ALL: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """For each block the largest product of its sampled keys with the sampled queries, HALVES blocks at a time."""
    if HALVES == ALL:
        return _best(q_tile, keys, block, k_t, dims, K_BLOCK, K_STRIDE, SAMPLES, SAMPLED, HALVES, D, D_TILE, UNIT)
    TURNS: tl.constexpr = ALL // HALVES
    turns = tl.arange(0, TURNS)
    table = tl.reshape(block, [TURNS, HALVES])
    scores = tl.full([TURNS, HALVES], 0.0, tl.float32)
    for turn in range(TURNS):
        now = (turns == turn)[:, None]
        part = tl.sum(tl.where(now, table, 0), 0)
        got = _best(q_tile, keys, part, k_t, dims, K_BLOCK, K_STRIDE, SAMPLES, SAMPLED, HALVES, D, D_TILE, UNIT)
        scores = tl.where(now, got[None, :], scores)
    return tl.reshape(scores, [ALL])


@triton.jit
def _best(
    q_tile, keys, block, k_t, dims,
    K_BLOCK: tl.constexpr, K_STRIDE: tl.constexpr, SAMPLES: tl.constexpr, SAMPLED: tl.constexpr,
    HALVES: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    sample = tl.minimum(tl.arange(0, SAMPLES), SAMPLED - 1) * K_STRIDE
    rows = tl.reshape(block.to(tl.int64)[:, None] * K_BLOCK + sample[None, :], [HALVES * SAMPLES])
    k_tile = _load(keys + (rows * k_t)[:, None] * UNIT + dims, (dims < D)[None, :], D, D_TILE)
    # [HALVES * SAMPLES, QUERIES]
    products = tl.dot(k_tile, q_tile, input_precision="ieee")
    return tl.max(tl.reshape(tl.max(products, 1), [HALVES, SAMPLES]), 1)


@triton.jit
def _load(at, there, D: tl.constexpr, D_TILE: tl.constexpr):
    return tl.load(at) if D == D_TILE else tl.load(at, mask=there, other=0.0)


class Cut(NamedTuple):
    """The constants of a launch, in the kernel's order from KEEP on, and its warps."""

    constants: tuple[int, ...]
    warps: int


@cache
def cut(
    nodes: int, beam: int, sinks: int, width: int, q_block: int, k_block: int, q_stride: int, k_stride: int, place: int,
    picks: int, d: int, dtype: torch.dtype,
) -> Cut:  # fmt: skip
    """From Search's fields but the first, its picks, the key width and the dtype."""
    asked, sampled = -(-q_block // q_stride), -(-k_block // k_stride)
    samples, wide = padded(sampled, 1), padded(d)
    # a product has 16 rows of keys at least
    branches = 2 * max(padded(nodes * beam, 1), 8 // samples)
    rows = branches * samples
    if dtype == torch.float32:
        # IEEE products run on no tensor core, and their operands lie in registers
        rows, warps = max(16, min(rows, 4096 // wide)), 4
    else:
        rows, warps = min(rows, 64), WARPS.get(branches, 4)
    halves = max(1, min(branches, rows // samples))
    return Cut(
        (nodes, nodes * beam, branches // 2, sinks, width, q_block, k_block, q_stride, k_stride, place, picks,
         padded(asked), asked, samples, sampled, halves, d, wide),
        warps,
    )  # fmt: skip


def refusal(q: Tensor, plan: Search) -> str | None:
    """Why the kernel cannot take a search, None if it can."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {q.dtype}"
    if q.shape[3] > WIDEST:
        return f"takes widths up to {WIDEST}, got D={q.shape[3]}"
    if plan.followed > MOST:
        return f"follows up to {MOST} nodes, got {plan.followed}"
    if max(-(-plan.q_block // plan.q_stride), -(-plan.k_block // plan.k_stride)) > 128:
        return "takes up to 128 samples of a block"
    return None


def search(q: Tensor, k: Tensor, plan: Search) -> tuple[Tensor, Tensor]:
    """index [B, H, N, P] and count [B, H, N]; the contract is ops.tree's."""
    batch, heads, held, width = q.shape
    kv_heads, tokens = k.shape[1:3]
    blocks = -(-tokens // plan.q_block) - plan.start
    index = torch.empty(batch, heads, blocks, plan.picks, dtype=torch.int32, device=q.device)
    count = torch.empty(batch, heads, blocks, dtype=torch.int32, device=q.device)
    if not batch:
        return index, count
    (q, q_at), (k, k_at) = _dense(q), _dense(k)
    # 16 bytes are loaded at once where all strides allow it
    unit = math.gcd(16 // q.element_size(), width, *q_at, *k_at)
    constants, warps = cut(*plan[1:], plan.picks, width, q.dtype)
    (q_b, q_h, q_t), (k_b, k_h, k_t) = q_at, k_at
    tree_search[(batch * heads * blocks,)](
        q, k, index, count, heads, blocks, plan.start, held, tokens,
        q_b // unit, q_h // unit, q_t // unit, k_b // unit, k_h // unit, k_t // unit,
        heads // kv_heads, *constants, unit, num_warps=warps,
    )  # fmt: skip
    return index, count


def _dense(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor whose elements lie next to each other, and its other strides."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, x.stride()[:3]
