"""Buckets, sorted slots and moved rows on the GPU; the contracts are ops.hashed's.

Sorting by (bucket, position) is counting: how many tokens of each bucket every tile of tokens holds, and then, tile by
tile, where the next of each bucket goes. One launch counts, one places, one writes the lists and what stays empty.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import padded
from farfield.ops.hashed import EVERY

TILE = 512  # tokens that a program counts or places
NUMBERS = 4096  # a program's tokens times buckets, at most


@triton.jit(do_not_specialize=["heads", "tokens", "x_b", "x_h", "x_t"])
def bucket_rows(
    x, planes, found, heads, tokens, x_b, x_h, x_t,
    PARTS: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, D_UNIT: tl.constexpr, D_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1).to(tl.int64)
    b, h = unit // heads, unit % heads
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    dims, lane = tl.arange(0, D_TILE), tl.arange(0, HALF_TILE)
    x_at = x + (b * x_b + h * x_h + t * x_t)[:, None] * D_UNIT + dims
    rows = tl.load(x_at, mask=(t < tokens)[:, None] & (dims < D), other=0.0)
    # [BT, HALF_TILE]
    shares = tl.zeros([BT, HALF_TILE], tl.float32)
    for part in tl.static_range(PARTS):
        at = ((part * heads + h) * D + dims)[:, None] * HALF_TILE + lane
        shares = tl.dot(rows, tl.load(planes + at, mask=(dims < D)[:, None], other=0.0), shares, input_precision="ieee")
    up = tl.where(lane < HALF, shares, float("-inf"))
    down = tl.where(lane < HALF, -shares, float("-inf"))
    most, least = tl.max(up, 1), tl.max(down, 1)
    first_up = tl.min(tl.where(up == most[:, None], lane, HALF), 1)
    first_down = tl.min(tl.where(down == least[:, None], lane, HALF), 1)
    # NaN has no maximum, and goes to the last bucket
    bucket = tl.minimum(tl.where(most >= least, first_up, HALF + first_down), 2 * HALF - 1)
    tl.store(found + unit * tokens + t, bucket, mask=t < tokens)


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


def buckets(x: Tensor, planes: Tensor, half: int) -> Tensor:
    """The bucket of each row; `planes` are those of `directions`."""
    batch, heads, tokens, width = x.shape
    x, (x_b, x_h, x_t), unit = _rows(x)
    found = torch.empty(batch, heads, tokens, dtype=torch.int32, device=x.device)
    bt = 128 if x.element_size() < 4 else 32
    bucket_rows[(-(-tokens // bt), batch * heads)](
        x, planes, found, heads, tokens, x_b, x_h, x_t,
        PARTS=planes.shape[0], HALF=half, D=width, D_UNIT=unit, D_TILE=padded(width), HALF_TILE=planes.shape[3],
        BT=bt, num_warps=4,
    )  # fmt: skip
    return found


def slots(
    q_bucket: Tensor, k_bucket: Tensor, many: int, block: int, strict: bool, shared: bool, shapes: list
) -> tuple[Tensor, ...]:
    """The seven tensors of ops.hashed.Slots, of these shapes."""
    batch, heads, keys = k_bucket.shape
    queries, units, sides = q_bucket.shape[2], batch * heads, 1 if shared else 2
    found = tuple(torch.empty(shape, dtype=torch.int32, device=k_bucket.device) for shape in shapes)
    q_slot, q_token, k_slot, k_token, position, index, count = found
    wide = padded(many, 2)
    bt = max(16, min(TILE, NUMBERS // wide))
    tiles = -(-keys // bt)
    counts = torch.empty(units, sides, tiles, wide, dtype=torch.int32, device=k_bucket.device)
    totals = torch.empty(units, sides, wide, dtype=torch.int32, device=k_bucket.device)
    q_bucket, q_b, q_h = _flat(q_bucket)
    k_bucket, k_b, k_h = _flat(k_bucket)
    count_buckets[(tiles, units, sides)](
        q_bucket, k_bucket, counts, heads, queries, keys, tiles, q_b, q_h, k_b, k_h, MANY=wide, BT=bt, num_warps=4
    )
    place_tokens[(tiles, units)](
        q_bucket, k_bucket, counts, totals, q_slot, q_token, k_slot, k_token, position,
        heads, queries, keys, tiles, q_b, q_h, k_b, k_h, q_token.shape[2], k_token.shape[2],
        BUCKETS=many, MANY=wide, BT=bt, BLOCK=block, SHARED=shared, STRICT=strict, STEP=max(1, 1024 // wide),
        num_warps=4,
    )  # fmt: skip
    _, _, q_blocks, k_blocks = index.shape
    list_blocks[(max(q_blocks, k_blocks), units)](
        totals, q_token, k_token, position, index, count, q_blocks, k_blocks,
        BUCKETS=many, MANY=wide, BLOCK=block, BLOCK_TILE=padded(block, 1), SHARED=shared, EVERY=EVERY, WIDTH=256,
        num_warps=2,
    )  # fmt: skip
    return found


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, H, S, D] by index [B, H, T], 0 where it is negative."""
    batch, heads, rows = index.shape
    width = x.shape[3]
    x, (x_b, x_h, x_r), unit = _rows(x)
    out = x.new_empty(batch, heads, rows, width)
    bt = max(1, 4096 // padded(width))
    take_rows[(-(-rows // bt), batch * heads)](
        x, index.contiguous(), out, heads, rows, x_b, x_h, x_r,
        D=width, D_UNIT=unit, D_TILE=padded(width, 1), BT=bt, num_warps=4,
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> tuple[Tensor, list[int], int]:
    """A tensor whose last dimension has no gaps, its other strides, and the number of elements that these count."""
    x = x if x.stride(3) == 1 else x.contiguous()
    strides = x.stride()[:3]
    # 16 bytes are loaded at once where all strides allow it
    unit = math.gcd(16 // x.element_size(), x.shape[3], *strides)
    return x, [n // unit for n in strides], unit


def _flat(x: Tensor) -> tuple[Tensor, int, int]:
    x = x if x.stride(2) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)
