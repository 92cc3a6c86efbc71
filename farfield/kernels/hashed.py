"""Buckets, sorted slots and moved rows on the GPU; the contracts are ops.hashed's.

Sorting by (bucket, position) is counting: how many tokens of each bucket every tile of tokens holds, and then, tile by
tile, where the next of each bucket goes. One launch counts, one places, one writes the lists and what stays empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import attend_sorted_backward_hopper, attend_sorted_hopper, replay
from farfield.kernels.attend import padded
from farfield.kernels.hopper import aligned, on_hopper
from farfield.ops.hashed import EVERY, Slots

TILE = 512  # tokens that a program counts or places
PROGRAMS = 33  # that hash the tokens of a head
KEPT = 64  # recordings
NUMBERS = 4096  # a program's tokens times buckets, at most


@triton.jit(do_not_specialize=["heads", "tokens", "tiles", "x_b", "x_h", "x_t"])
def bucket_rows(
    x, planes, found, heads, tokens, tiles, x_b, x_h, x_t,
    PARTS: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, D_UNIT: tl.constexpr, D_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1).to(tl.int64)
    b, h = unit // heads, unit % heads
    dims, lane = tl.arange(0, D_TILE), tl.arange(0, HALF_TILE)
    # [D, HALF_TILE] each
    at = planes + (h * D + dims)[:, None] * HALF_TILE + lane
    inside, part = (dims < D)[:, None], heads * D * HALF_TILE
    wide = tl.load(at, mask=inside, other=0.0)
    if PARTS == 3:
        rest = tl.load(at + part, mask=inside, other=0.0)
        last = tl.load(at + 2 * part, mask=inside, other=0.0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        t = (tile * BT + tl.arange(0, BT)).to(tl.int64)
        x_at = x + (b * x_b + h * x_h + t * x_t)[:, None] * D_UNIT + dims
        rows = tl.load(x_at, mask=(t < tokens)[:, None] & (dims < D), other=0.0)
        # [BT, HALF_TILE], 0 where there is no direction
        shares = tl.dot(rows, wide, input_precision="ieee")
        if PARTS == 3:
            shares = tl.dot(rows, rest, shares, input_precision="ieee")
            shares = tl.dot(rows, last, shares, input_precision="ieee")
        most = tl.max(tl.abs(shares), 1)[:, None]
        # the first of equal ones, directions before their opposites; NaN equals nothing, and goes to the last bucket
        which = tl.where(shares == most, lane, tl.where(-shares == most, HALF + lane, 2 * HALF - 1))
        tl.store(found + unit * tokens + t, tl.min(which, 1), mask=t < tokens)


@triton.jit
def _buckets_of(bucket, unit, t, first, tokens, bucket_b, bucket_h, heads):
    """The buckets of tokens t of a side whose first token is `first`; -1 for tokens that it has not."""
    at = bucket + unit // heads * bucket_b + unit % heads * bucket_h + t - first
    return tl.load(at, mask=(t >= first) & (t - first < tokens), other=-1)


VARIES = ["heads", "queries", "keys", "tiles", "q_b", "q_h", "k_b", "k_h", "q_room", "k_room"]


@triton.jit(do_not_specialize=VARIES)
def count_buckets(
    q_bucket, k_bucket, counts, heads, queries, keys, tiles, q_b, q_h, k_b, k_h, MANY: tl.constexpr, BT: tl.constexpr
):
    """counts [units, sides, tiles, MANY]: the keys' on side 0, the queries' on side 1."""
    unit, side = tl.program_id(1).to(tl.int64), tl.program_id(2)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    if side == 0:
        bucket = _buckets_of(k_bucket, unit, t, 0, keys, k_b, k_h, heads)
    else:
        bucket = _buckets_of(q_bucket, unit, t, keys - queries, queries, q_b, q_h, heads)
    which = tl.arange(0, MANY)
    found = tl.sum((bucket[:, None] == which).to(tl.int32), 0)
    tl.store(counts + ((unit * tl.num_programs(2) + side) * tiles + tl.program_id(0)) * MANY + which, found)


@triton.jit
def _before(counts, tile, tiles, MANY: tl.constexpr, STEP: tl.constexpr):
    """How many tokens of each bucket the tiles before this one hold, and all."""
    which = tl.arange(0, MANY)
    before = tl.zeros([MANY], tl.int32)
    total = tl.zeros([MANY], tl.int32)
    for start in range(0, tiles, STEP):
        at = start + tl.arange(0, STEP)
        found = tl.load(counts + at[:, None] * MANY + which, mask=(at < tiles)[:, None], other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((at < tile)[:, None], found, 0), 0)
    return before, total


@triton.jit
def _starts(total, block):
    """The first slot of each bucket."""
    sizes = (total + block - 1) // block * block
    return tl.cumsum(sizes, 0) - sizes


@triton.jit(do_not_specialize=VARIES)
def place_tokens(
    q_bucket, k_bucket, counts, totals, q_slot, q_token, k_slot, k_token, position,
    heads, queries, keys, tiles, q_b, q_h, k_b, k_h, q_room, k_room,
    BUCKETS: tl.constexpr, MANY: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr,
    STRICT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    SIDES: tl.constexpr = 1 if SHARED else 2
    unit, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    t = tile.to(tl.int64) * BT + tl.arange(0, BT)
    which = tl.arange(0, MANY)
    counts += unit * SIDES * tiles * MANY
    before, total = _before(counts, tile, tiles, MANY, STEP)
    if tile == 0:
        tl.store(totals + unit * SIDES * MANY + which, total)
    start = _starts(total, BLOCK)
    bucket = _buckets_of(k_bucket, unit, t, 0, keys, k_b, k_h, heads)
    kept = (bucket >= 0) & (bucket < BUCKETS)
    own = (bucket[:, None] == which) & (which < BUCKETS)
    # [BT, MANY]: keys of each bucket up to and with this token
    seen = tl.cumsum(own.to(tl.int32), 0) + before
    rank = tl.sum(tl.where(own, seen, 0), 1) - 1
    slot = tl.sum(tl.where(own, start, 0), 1) + rank
    there = t < keys
    tl.store(k_slot + unit * keys + t, tl.where(kept, slot, -1), mask=there)
    tl.store(k_token + unit * k_room + slot, t.to(tl.int32), mask=there & kept)
    if SHARED:
        follows = kept & (rank > 0)
        tl.store(q_slot + unit * keys + t, tl.where(follows, slot - 1, -1), mask=there)
        tl.store(q_token + unit * q_room + slot - 1, t.to(tl.int32), mask=there & follows)
    else:
        q_before, q_total = _before(counts + tiles * MANY, tile, tiles, MANY, STEP)
        if tile == 0:
            tl.store(totals + (unit * SIDES + 1) * MANY + which, q_total)
        i = t - (keys - queries)
        asking = _buckets_of(q_bucket, unit, t, keys - queries, queries, q_b, q_h, heads)
        asked = (asking >= 0) & (asking < BUCKETS)
        mine = (asking[:, None] == which) & (which < BUCKETS)
        q_rank = tl.sum(tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) + q_before, 0), 1) - 1
        q_at = tl.sum(tl.where(mine, _starts(q_total, BLOCK), 0), 1) + q_rank
        last = tl.sum(tl.where(mine, seen + start, 0), 1) - 1
        if STRICT:
            last -= (asking == bucket).to(tl.int32)
        there = (i >= 0) & (i < queries)
        tl.store(q_slot + unit * queries + i, tl.where(asked, q_at, -1), mask=there)
        tl.store(q_token + unit * q_room + q_at, i.to(tl.int32), mask=there & asked)
        tl.store(position + unit * q_room + q_at, last, mask=there & asked)


@triton.jit(do_not_specialize=["q_blocks", "k_blocks"])
def list_blocks(
    totals, q_token, k_token, position, index, count, q_blocks, k_blocks,
    BUCKETS: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TILE: tl.constexpr, SHARED: tl.constexpr,
    EVERY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The list of each block of queries, and what empty slots hold."""
    SIDES: tl.constexpr = 1 if SHARED else 2
    n, unit = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    which, lane = tl.arange(0, MANY), tl.arange(0, BLOCK_TILE)
    total = tl.load(totals + unit * SIDES * MANY + which)
    start = _starts(total, BLOCK)
    here, filled = _bucket_at(start, total, which, first, BUCKETS)
    own_slots = lane < BLOCK
    tl.store(k_token + (unit * k_blocks + n) * BLOCK + lane, -1, mask=own_slots & (lane >= filled) & (n < k_blocks))
    if SHARED:
        # queries lie one slot before their keys, and the first of a bucket has none
        asked = filled - 1
        high = tl.program_id(0)
    else:
        q_total = tl.load(totals + (unit * SIDES + 1) * MANY + which)
        here, asked = _bucket_at(_starts(q_total, BLOCK), q_total, which, first, BUCKETS)
        at = position + (unit * q_blocks + n) * BLOCK + lane
        inside = own_slots & (n < q_blocks)
        last = tl.load(at, mask=inside & (lane < asked), other=-1)
        # one before the first slot is block -1
        high = (tl.max(last, 0) + BLOCK) // BLOCK - 1
        tl.store(at, EVERY, mask=inside & (lane >= asked))
    tl.store(q_token + (unit * q_blocks + n) * BLOCK + lane, -1, mask=own_slots & (lane >= asked) & (n < q_blocks))
    low = tl.sum(tl.where(which == here, start, 0), 0) // BLOCK
    # runs of nothing ascend with the others: a block without queries starts where the next one does, or at the end
    nowhere = k_blocks
    if SHARED:
        nowhere = tl.where(filled > 0, tl.program_id(0) + 1, k_blocks)
    low = tl.where(asked > 0, low, nowhere)
    if n < q_blocks:
        many = tl.where(asked > 0, tl.maximum(high - low + 1, 0), 0)
        tl.store(count + unit * q_blocks + n, many)
        for p in range(0, k_blocks, WIDTH):
            entry = p + tl.arange(0, WIDTH)
            tl.store(index + (unit * q_blocks + n) * k_blocks + entry, low + entry, mask=entry < k_blocks)


@triton.jit
def _bucket_at(start, total, which, first, BUCKETS: tl.constexpr):
    """The bucket that slot `first` belongs to, and how many tokens it has from there on."""
    own = tl.sum(((start <= first) & (which < BUCKETS)).to(tl.int32), 0) - 1
    return own, tl.sum(tl.where(which == own, start + total, 0), 0) - first


@triton.jit(do_not_specialize=["heads", "rows", "x_b", "x_h", "x_r"])
def take_rows(
    x, index, out, heads, rows, x_b, x_h, x_r,
    D: tl.constexpr, D_UNIT: tl.constexpr, D_TILE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    dims = tl.arange(0, D_TILE)
    row = tl.load(index + unit * rows + at, mask=at < rows, other=-1).to(tl.int64)
    from_ = x + (unit // heads * x_b + unit % heads * x_h + row * x_r)[:, None] * D_UNIT + dims
    tile = tl.load(from_, mask=(row >= 0)[:, None] & (dims < D), other=0.0)
    tl.store(out + (unit * rows + at)[:, None] * D + dims, tile, mask=(at < rows)[:, None] & (dims < D))


@triton.jit(do_not_specialize=["rows"])
def clear_rows(slot, x, y, queue, rows, D: tl.constexpr, BT: tl.constexpr, TWO: tl.constexpr):
    """0 in rows of x without a slot, with TWO also of y, and in the queues of those who write the others."""
    unit = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    absent = (tl.load(slot + unit * rows + at, mask=at < rows, other=0) < 0)[:, None]
    place = (unit * rows + at)[:, None] * D + tl.arange(0, D)
    nothing = tl.zeros([BT, D], x.dtype.element_ty)
    tl.store(x + place, nothing, mask=absent)
    if TWO:
        tl.store(y + place, nothing, mask=absent)
    tl.store(queue + tl.arange(0, 2), 0, mask=(tl.program_id(0) == 0) & (unit == 0))


@triton.jit(do_not_specialize=["q_blocks", "k_blocks", "steps"])
def find_readers(index, count, first, many, q_blocks, k_blocks, steps, SIZE: tl.constexpr):
    """Blocks of queries that read each block of keys: the first of them, and how many.

    Runs ascend, with their first and with their last block: key block m is read from the first run on that ends at m
    or later, up to the last that starts at m or before.
    """
    unit = tl.program_id(1).to(tl.int64)
    index += unit * q_blocks * k_blocks
    count += unit * q_blocks
    m = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    low, last = tl.zeros([SIZE], tl.int32), tl.zeros([SIZE], tl.int32)
    high, end = low + q_blocks, low + q_blocks
    for _step in range(steps):
        n = (low + high) // 2
        open_ = low < high
        starts = tl.load(index + n.to(tl.int64) * k_blocks, mask=open_, other=0)
        ends = starts + tl.load(count + n, mask=open_, other=0) - 1
        low = tl.where(open_ & (ends < m), n + 1, low)
        high = tl.where(open_ & (ends >= m), n, high)
        n = (last + end) // 2
        open_ = last < end
        starts = tl.load(index + n.to(tl.int64) * k_blocks, mask=open_, other=0)
        last = tl.where(open_ & (starts <= m), n + 1, last)
        end = tl.where(open_ & (starts > m), n, end)
    tl.store(first + unit * k_blocks + m, low, mask=m < k_blocks)
    tl.store(many + unit * k_blocks + m, tl.maximum(last - low, 0), mask=m < k_blocks)


def directions(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """[parts, H, D, 16 or more] directions for `bucket_rows`: numbers whose sum is a float32, of the rows' dtype.

    Products of 16-bit numbers are exact on tensor cores; three parts hold the 24 bits of a float32.
    """
    wide = planes.to(torch.float32)
    wide = torch.nn.functional.pad(wide, (0, padded(wide.shape[2]) - wide.shape[2]))
    if dtype == torch.float32:
        return wide[None].contiguous()
    parts = []
    for _ in range(3):
        parts.append(wide.to(dtype))
        wide = wide - parts[-1].float()
    return torch.stack(parts)


def recorded_buckets(x: Tensor, planes: Tensor, half: int) -> Tensor:
    """The bucket of each row; `planes` are those of `directions`."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return _replayed(buckets, (x, planes), half)


def buckets(x: Tensor, planes: Tensor, half: int) -> Tensor:
    """The same without gaps between the numbers of a row."""
    batch, heads, tokens, width = x.shape
    unit, strides = _units(x)
    found = torch.empty(batch, heads, tokens, dtype=torch.int32, device=x.device)
    bt = 128 if x.element_size() < 4 else 32
    tiles = -(-tokens // bt)
    replay.start(
        bucket_rows, (min(tiles, PROGRAMS), batch * heads),
        x, planes, found, heads, tokens, tiles, *strides,
        PARTS=planes.shape[0], HALF=half, D=width, D_UNIT=unit, D_TILE=padded(width), HALF_TILE=planes.shape[3],
        BT=bt, STAGES=3, num_warps=4,
    )  # fmt: skip
    return found


def recorded_slots(
    q_bucket: Tensor,
    k_bucket: Tensor,
    many: int,
    block: int,
    strict: bool,
    shared: bool,
    shapes: Sequence[tuple[int, ...]],
) -> tuple[Tensor, ...]:
    """The seven tensors of ops.hashed.Slots, of these shapes."""
    q_bucket, k_bucket = (x if x.stride(2) == 1 else x.contiguous() for x in (q_bucket, k_bucket))
    return _replayed(slots, (q_bucket, k_bucket), many, block, strict, shared, tuple(shapes))


def slots(
    q_bucket: Tensor,
    k_bucket: Tensor,
    many: int,
    block: int,
    strict: bool,
    shared: bool,
    shapes: Sequence[tuple[int, ...]],
) -> tuple[Tensor, ...]:
    """The same without gaps between the buckets of a head."""
    batch, heads, keys = k_bucket.shape
    queries, units, sides = q_bucket.shape[2], batch * heads, 1 if shared else 2
    found = tuple(torch.empty(shape, dtype=torch.int32, device=k_bucket.device) for shape in shapes)
    q_slot, q_token, k_slot, k_token, position, index, count = found
    wide = padded(many, 2)
    bt = max(16, min(TILE, NUMBERS // wide))
    tiles = -(-keys // bt)
    counts = torch.empty(units, sides, tiles, wide, dtype=torch.int32, device=k_bucket.device)
    totals = torch.empty(units, sides, wide, dtype=torch.int32, device=k_bucket.device)
    q_b, q_h, _ = q_bucket.stride()
    k_b, k_h, _ = k_bucket.stride()
    replay.start(
        count_buckets, (tiles, units, sides),
        q_bucket, k_bucket, counts, heads, queries, keys, tiles, q_b, q_h, k_b, k_h, MANY=wide, BT=bt, num_warps=4,
    )  # fmt: skip
    replay.start(
        place_tokens, (tiles, units),
        q_bucket, k_bucket, counts, totals, q_slot, q_token, k_slot, k_token, position,
        heads, queries, keys, tiles, q_b, q_h, k_b, k_h, q_token.shape[2], k_token.shape[2],
        BUCKETS=many, MANY=wide, BT=bt, BLOCK=block, SHARED=shared, STRICT=strict, STEP=max(1, 1024 // wide),
        num_warps=4,
    )  # fmt: skip
    _, _, q_blocks, k_blocks = index.shape
    replay.start(
        list_blocks, (max(q_blocks, k_blocks), units),
        totals, q_token, k_token, position, index, count, q_blocks, k_blocks,
        BUCKETS=many, MANY=wide, BLOCK=block, BLOCK_TILE=padded(block, 1), SHARED=shared, EVERY=EVERY, WIDTH=256,
        num_warps=2,
    )  # fmt: skip
    return found


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, H, S, D] by index [B, H, T], 0 where it is negative."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return _take(x, index.contiguous())


def _take(x: Tensor, index: Tensor) -> Tensor:
    batch, heads, rows = index.shape
    width = x.shape[3]
    unit, strides = _units(x)
    out = x.new_empty(batch, heads, rows, width)
    bt = max(1, 4096 // padded(width))
    replay.start(
        take_rows, (-(-rows // bt), batch * heads),
        x, index, out, heads, rows, *strides,
        D=width, D_UNIT=unit, D_TILE=padded(width, 1), BT=bt, num_warps=4,
    )  # fmt: skip
    return out


def wants(q: Tensor, v: Tensor, block: int, scale: float) -> bool:
    """Whether `forward` and `backward` take these: 16-bit numbers of the widths that the Hopper kernels know."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] == v.shape[3]
        and q.shape[3] in (64, 128)
        and block in (64, 128)
        and scale > 0
        and q.numel() > 0
        and on_hopper(q.device)
    )


class Kept(NamedTuple):
    """What the backward needs: queries, keys, values and outputs by token, lse by slot."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, slots: Slots, block: int, scale: float) -> tuple[Tensor, Kept]:
    """attend over the slots, by kernels that gather rows and scatter results, as one recorded call."""
    q, k, v = map(_readable, (q, k, v))
    inputs = q, k, v, slots.q_slot, slots.q_token, slots.k_token, slots.position, slots.index, slots.count
    out, lse = _replayed(_forward, inputs, block, scale)
    return out, Kept(q, k, v, out, lse)


def _readable(x: Tensor) -> Tensor:
    """The tensor, or a copy whose rows can be read by 16 bytes."""
    return x if aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_slot: Tensor, q_token: Tensor, k_token: Tensor, position: Tensor, index: Tensor,
    count: Tensor, block: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    queue = torch.empty(2, dtype=torch.int32, device=q.device)
    _clear(q_slot, queue, out)
    lse = attend_sorted_hopper.forward(q, k, v, out, queue, q_token, k_token, position, index, count, block, scale)
    return out, lse


def backward(d_out: Tensor, kept: Kept, slots: Slots, block: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    return _replayed(_backward, (_readable(d_out), *kept, *slots), block, scale)


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_slot: Tensor, q_token: Tensor,
    k_slot: Tensor, k_token: Tensor, position: Tensor, index: Tensor, count: Tensor, block: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    queue = torch.empty(2, dtype=torch.int32, device=q.device)
    _clear(q_slot, queue, d_q)
    _clear(k_slot, queue, d_k, d_v)
    first, many = readers(index, count)
    attend_sorted_backward_hopper.backward(
        d_out, q, k, v, out, lse, d_q, d_k, d_v, queue, q_token, k_token, position, index, count, first, many, block,
        scale,
    )  # fmt: skip
    return d_q, d_k, d_v


def _clear(slot: Tensor, queue: Tensor, x: Tensor, y: Tensor | None = None) -> None:
    batch, heads, rows, width = x.shape
    replay.start(
        clear_rows, (-(-rows // 256), batch * heads),
        slot, x, x if y is None else y, queue, rows, D=width, BT=256, TWO=y is not None, num_warps=4,
    )  # fmt: skip


def readers(index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Who reads each block of keys, by the lists of `slots` [B, H, N, P] and [B, H, N]: the first reader, and how many.

    They are runs, as the lists are.
    """
    batch, heads, q_blocks, picks = index.shape
    first, many = (torch.empty(batch, heads, picks, dtype=torch.int32, device=index.device) for _ in range(2))
    replay.start(
        find_readers, (-(-picks // 128), batch * heads),
        index, count, first, many, q_blocks, picks, q_blocks.bit_length(), SIZE=128, num_warps=4,
    )  # fmt: skip
    return first, many


def _replayed(function: Callable[..., Any], inputs: Sequence[Tensor], *options: Any) -> Any:
    """function(*inputs, *options), whose launches are recorded once for all calls of these shapes and options."""
    about = tuple([(x.shape, x.stride(), x.dtype) for x in inputs])
    return _recorded(function, options, inputs[0].device, about)(*inputs)


@lru_cache(maxsize=KEPT)
def _recorded(function: Callable[..., Any], options: tuple, device: torch.device, about: tuple) -> replay.Recorded:
    return replay.Recorded(function, *options)


def _units(x: Tensor) -> tuple[int, list[int]]:
    """How many elements are loaded at once, 16 bytes where all strides allow it, and the strides in these."""
    strides = x.stride()[:3]
    unit = math.gcd(16 // x.element_size(), x.shape[3], *strides)
    return unit, [n // unit for n in strides]
