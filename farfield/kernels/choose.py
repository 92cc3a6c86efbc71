"""choose on the GPU: scores tile by tile, never in memory, and the attention over the rows that they come from.

Rows are float32, queries have 16 bits: a row is split into two numbers of the queries' dtype, and the tensor cores add
up the products. What is lost of each element of a row is at most 2^-16 of it (bfloat16; 2^-22 in float16), so that a
logit is off by at most 2^-16 * scale * sum_d |q_d row_d|. The first launch goes through the rows of each query for the
log-sum-exp of its softmax, and for its output where there are values. The second goes through them once more, makes
shares of the logits, adds up what belongs to a block and the query heads of a key head, and keeps the best blocks of
each query on the chip.

The kernels here take all widths and dtypes; on Hopper GPUs those of `choose_hopper` take the usual ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import choose_alone_hopper, choose_hopper
from farfield.kernels.attend import LN2, LOG2E, _dense, padded
from farfield.kernels.replay import start
from farfield.ops.choose import Scoring

# numbers that a float32 row is split into: 2 * 8 bits of bfloat16, 2 * 11 bits of float16
PLANES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 1}
WIDEST = 128
MOST = 64  # blocks by score
SCORED = 128, 64, 8  # rows of queries and blocks of a tile of scores, warps


@triton.jit(do_not_specialize=["many", "total", "rows", "room"])
def split_rows(x, y, planes, low, many, total, rows, room, D: tl.constexpr, PLANES: tl.constexpr, SIZE: tl.constexpr):
    """x [N, C, D] as a sum of numbers of the dtype of planes [PLANES, N, room, D], the largest first; y rounded."""
    pid = tl.program_id(0).to(tl.int64)
    steps = (many + SIZE - 1) // SIZE
    if pid < steps:
        at = pid * SIZE + tl.arange(0, SIZE)
        there = at < many
        rest = tl.load(x + at, mask=there, other=0.0)
        to = at + at // (rows * D) * ((room - rows) * D)
        plane = many // rows * room
        for p in tl.static_range(PLANES):
            part = rest.to(planes.dtype.element_ty)
            tl.store(planes + p * plane.to(tl.int64) + to, part, mask=there)
            rest -= part.to(tl.float32)
    elif y is not None:
        at = (pid - steps) * SIZE + tl.arange(0, SIZE)
        there = at < total
        tl.store(low + at, tl.load(y + at, mask=there, other=0.0).to(low.dtype.element_ty), mask=there)


VARIES = ["heads", "tokens", "tiles", "rows", "room", "stride", "span", "first", "plane", "q_b", "q_h", "q_t"]


@triton.jit
def _logits(q_tile, k, at, there, plane, dims, D: tl.constexpr, PLANES: tl.constexpr):
    """q . rows from all the numbers that a row is split into, the small ones first."""
    mask = there[:, None] & (dims < D)
    found = tl.zeros([q_tile.shape[0], at.shape[0]], tl.float32)
    for p in tl.static_range(PLANES):
        k_tile = tl.load(k + (PLANES - 1 - p) * plane.to(tl.int64) + at[:, None] * D + dims, mask=mask, other=0.0)
        found = tl.dot(q_tile, k_tile.T, found, input_precision="ieee")
    return found


@triton.jit(do_not_specialize=VARIES)
def ended_forward(
    q, k, v, out, lse, heads, tokens, tiles, rows, stride, span, first, plane, q_b, q_h, q_t, scale, room,
    REPEAT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_UNIT: tl.constexpr, PLANES: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Attention of each query over the rows that have ended. k [PLANES, B, G, C, D], v [B, G, C, E] or None."""
    pid = tl.program_id(0).to(tl.int64)
    # the last queries have the most to read and start first
    bh = pid // tiles
    tile = tiles - 1 - pid % tiles
    b, h = bh // heads, bh % heads
    i = tile * BQ + tl.arange(0, BQ)
    asked = i < tokens
    dims = tl.arange(0, D_TILE)
    q_at = q + (b * q_b + h * q_h + i * q_t)[:, None] * D_UNIT + dims
    q_tile = tl.load(q_at, mask=asked[:, None] & (dims < D), other=0.0)
    at_head = (b * (heads // REPEAT) + h // REPEAT) * rows
    k += (b * (heads // REPEAT) + h // REPEAT) * room * D
    # rows that have ended for each query, for the first and for the last
    seen = tl.maximum(first + i + 1 - span + stride, 0) // stride
    last = tl.minimum(tl.maximum(first + tl.minimum(tile * BQ + BQ, tokens) - span + stride, 0) // stride, rows)
    peak = tl.full([BQ], float("-inf"), tl.float32)
    mass = tl.zeros([BQ], tl.float32)
    if v is not None:
        values = tl.arange(0, E_TILE)
        v += at_head * E
        acc = tl.zeros([BQ, E_TILE], tl.float32)
    # steps that all queries see whole, then those that they do not
    whole = tl.minimum(tl.maximum(first + tile * BQ + 1 - span + stride, 0) // stride, last) // BK * BK
    for masked in tl.static_range(2):
        for begin in range(whole if masked else 0, last if masked else whole, BK):
            at = begin + tl.arange(0, BK)
            scores = _logits(q_tile, k, at, at < (last if masked else rows), plane, dims, D, PLANES)
            if masked:
                scores = tl.where((at[None, :] < seen[:, None]) & (at < last)[None, :], scores, float("-inf"))
            # the factor is positive
            higher = tl.maximum(peak, tl.max(scores, 1) * (scale * LOG2E))
            floor = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores * (scale * LOG2E) - floor[:, None])
            fade = tl.exp2(peak - floor)
            mass = mass * fade + tl.sum(weights, 1)
            if v is not None:
                there = at < (last if masked else rows)
                v_tile = tl.load(v + at[:, None] * E + values, mask=there[:, None] & (values < E), other=0.0)
                acc = acc * fade[:, None]
                acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
            peak = higher
    place = bh * tokens + i
    tl.store(lse + place, (peak + tl.log2(mass)) * LN2, mask=asked)
    if v is not None:
        acc *= (1.0 / tl.where(mass > 0, mass, 1.0))[:, None]
        out_at = out + place[:, None] * E + values
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=asked[:, None] & (values < E))


@triton.jit(do_not_specialize=[*VARIES, "picks", "initial", "local"])
def best_blocks(
    q, k, lse, index, count, heads, tokens, tiles, rows, stride, span, first, plane, q_b, q_h, q_t,
    picks, initial, local, scale, room,
    STACK: tl.constexpr, STACK_TILE: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr,
    PER_BLOCK: tl.constexpr, PER_ROW: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, D_UNIT: tl.constexpr,
    PLANES: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BEST: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    """The lists of BT queries: STACK heads with one list each query. Without lse the score is the logit itself."""
    pid = tl.program_id(0).to(tl.int64)
    unit = pid // tiles
    tile = tiles - 1 - pid % tiles
    units = heads // STACK
    b, u = unit // units, unit % units
    row = tl.arange(0, BT * STACK_TILE)
    i, r = tile * BT + row // STACK_TILE, row % STACK_TILE
    asked = (i < tokens) & (r < STACK)
    dims = tl.arange(0, D_TILE)
    h = u * STACK + r
    q_at = q + (b * q_b + h * q_h + i * q_t)[:, None] * D_UNIT + dims
    q_tile = tl.load(q_at, mask=asked[:, None] & (dims < D), other=0.0)
    g = u if STACK > 1 else u // REPEAT
    k += (b * (heads // REPEAT) + g) * room * D
    seen = tl.where(asked, tl.maximum(first + i + 1 - span + stride, 0) // stride, 0)
    if lse is not None:
        total = tl.load(lse + (b * heads + h) * tokens + i, mask=asked, other=0.0) * LOG2E
    n = tile * BT + tl.arange(0, BT)
    own = (first + n) // BLOCK
    free = own - local + 1  # blocks before the local ones
    most = (first + tl.minimum(tile * BT + BT, tokens) - 1) // BLOCK - local + 1

    scored = picks - initial - local
    slot = tl.arange(0, BEST)
    # places that hold nothing yet differ, so that one at a time is filled; those past `scored` never are
    NONE: tl.constexpr = -(1 << 62)
    FULL: tl.constexpr = (1 << 62) - 1
    empty = slot.to(tl.int64) + NONE
    best = tl.zeros([BT, BEST], tl.int64) + tl.where(slot < scored, empty, FULL)[None, :]
    worst = tl.min(best, 1)
    for begin in range(0, most, BJ):
        j = begin + tl.arange(0, BJ)
        score = tl.zeros([BT * STACK_TILE, BJ], tl.float32)
        for o in range(PER_BLOCK + PER_ROW - 1):
            c = j * PER_BLOCK + o - (PER_ROW - 1)
            there = (c >= 0) & (c < rows)
            logits = _logits(q_tile, k, c, there, plane, dims, D, PLANES)
            if lse is not None:
                share = tl.exp2(logits * (scale * LOG2E) - total[:, None])
                share = tl.where((c[None, :] < seen[:, None]) & there[None, :], share, 0.0)
                # pieces that the row and the block share
                shared = tl.minimum(tl.minimum(o + 1, PER_BLOCK), tl.minimum(PER_ROW, PER_BLOCK + PER_ROW - 1 - o))
                score += share * shared.to(tl.float32)
            else:
                score = logits
        score = tl.sum(tl.reshape(score, [BT, STACK_TILE, BJ]), 1)
        # as whole numbers in the same order, and of equal ones the lower block first
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        ranked = (bits.to(tl.int64) << 30) + (0x3FFFFFFF - j).to(tl.int64)[None, :]
        candidate = (j >= initial)[None, :] & (j[None, :] < free[:, None])
        ranked = tl.where(candidate, ranked, NONE)
        # few blocks beat what is kept once some are: they take the place of the worst, one after the other
        top = tl.max(ranked, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            better = (top > worst)[:, None] & (best == worst[:, None])
            best = tl.where(better, top[:, None], best)
            worst = tl.min(best, 1)
            ranked = tl.where(ranked == top[:, None], NONE, ranked)
            top = tl.max(ranked, 1)
    chosen = 0x3FFFFFFF - (best & 0x3FFFFFFF).to(tl.int32)
    chosen = tl.where((best >= NONE + BEST) & (slot < scored)[None, :], chosen, 0x7FFFFFFF)
    chosen = tl.sort(chosen, 1)
    filled = tl.minimum(tl.maximum(free - initial, 0), scored)
    listed = tl.minimum(own + 1, initial + local + filled)
    inside = n < tokens
    at = (unit * tokens + n) * picks
    tl.store(
        index + at[:, None] + initial + slot[None, :], chosen, mask=inside[:, None] & (slot[None, :] < filled[:, None])
    )
    p = tl.arange(0, PICKS)[None, :]
    forced = tl.where(p < initial, p, tl.maximum(free, initial)[:, None] + p - initial - filled[:, None])
    forced = tl.where(p < listed[:, None], forced, 0)
    mine = (p < initial) | (p >= initial + filled[:, None])
    tl.store(index + at[:, None] + p, forced.to(tl.int32), mask=inside[:, None] & mine & (p < picks))
    tl.store(count + unit * tokens + n, listed.to(tl.int32), mask=inside)


def takes(q: Tensor, keys: Tensor) -> bool:
    """Whether the kernels take such queries and rows."""
    return q.dtype in PLANES and keys.dtype == torch.float32 and q.shape[3] <= WIDEST and q.numel() > 0


def split(keys: Tensor, values: Tensor | None, dtype: torch.dtype, whole: int = 1) -> tuple[Tensor, Tensor | None]:
    """Rows for queries of a dtype, with room for a multiple of `whole`.

    Args:
        keys, values: float32 [B, G, C, D] and [B, G, C, E].

    Returns:
        planes [PLANES, B, G, C', D] and values of the dtype. What no row is in is not set.
    """
    if dtype == torch.float32:
        return keys.contiguous()[None], None if values is None else values.contiguous()
    batch, heads, rows, width = keys.shape
    room, size = -(-rows // whole) * whole, 1024
    planes = torch.empty(PLANES[dtype], batch, heads, room, width, dtype=dtype, device=keys.device)
    low = None if values is None else torch.empty(values.shape, dtype=dtype, device=keys.device)
    many, total = keys.numel(), 0 if values is None else values.numel()
    if many:
        start(
            split_rows, (-(-many // size) + -(-total // size),),
            keys.contiguous(), None if values is None else values.contiguous(), planes, low, many, total, rows, room,
            width, PLANES[dtype], size,
        )  # fmt: skip
    return planes, low


def run(
    q: Tensor, keys: Tensor, values: Tensor | None, lse: Tensor | None, scoring: Scoring | None, stride: int,
    span: int, first: int, scale: float, early: int = -1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The attention over the rows if there are values, the choice if there is a scoring, or both of the same rows.

    Returns:
        out and lse, if there are values; index and count, if there is a scoring; of a choice that `choose_hopper` makes
        also what it returns with `early` >= 0.
    """
    stack = 1 if scoring is None or not scoring.shared else q.shape[1] // keys.shape[1]
    fast = scoring is not None and keys.shape[2] > 0 and choose_hopper.wants_best(q, stack, scoring)
    whole = scoring.block // scoring.stride if scoring is not None and fast else 1
    planes, low = split(keys, values, q.dtype, whole)
    rows, out, found = keys.shape[2], None, ()
    if values is not None or (scoring is not None and scoring.shared and lse is None):
        if rows and choose_hopper.wants_ended(q, low, scale):
            out, lse = choose_hopper.attend_ended(q, planes, rows, low, stride, span, first, scale)
        else:
            out, lse = attend_ended(q, planes, rows, low, stride, span, first, scale)
        found = () if out is None else (out, lse)
    if scoring is None:
        return found
    known = lse if scoring.shared else None
    if fast and choose_alone_hopper.wants(q, scoring):
        return *found, *choose_alone_hopper.choose(q, planes, scoring, first)
    if fast:
        return *found, *choose_hopper.choose(q, planes, known, scoring, first, scale, early)
    return *found, *choose(q, planes, rows, known, scoring, first, scale)


def alone(q: Tensor, keys: Tensor, scoring: Scoring, first: int, scale: float) -> tuple[Tensor, Tensor]:
    """index and count."""
    index, count = run(q, keys, None, None, scoring, scoring.stride, scoring.span, first, scale)
    return index, count


def both(
    q: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, first: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, index and count."""
    out, lse, index, count = run(q, keys, values, None, scoring, scoring.stride, scoring.span, first, scale)
    return out, lse, index, count


def attend_ended(
    q: Tensor, planes: Tensor, rows: int, values: Tensor | None, stride: int, span: int, first: int, scale: float
) -> tuple[Tensor | None, Tensor]:
    """out in q's dtype, None without values, and lse: over the rows that have ended at each query."""
    batch, heads, tokens, width = q.shape
    value_width = 16 if values is None else values.shape[3]
    out = None if values is None else q.new_empty(batch, heads, tokens, value_width)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    q, q_at = _dense(q)
    unit = _vector(q, width, *q_at)
    wide, exact = max(padded(width), padded(value_width)), q.dtype == torch.float32
    # IEEE products keep their operands in registers
    queries, step = (16 if wide > 64 else 32, 32) if exact else (128, 64)
    tiles = -(-tokens // queries)
    start(
        ended_forward, (tiles * batch * heads,),
        q, planes, values, out, lse, heads, tokens, tiles, rows, stride, span, first, planes[0].numel(),
        *[n // unit for n in q_at], scale, planes.shape[3], heads // planes.shape[2], width, value_width,
        padded(width), padded(value_width), unit, planes.shape[0], queries, step,
        num_warps=4 if values is None and wide <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return out, lse


def choose(
    q: Tensor, planes: Tensor, rows: int, lse: Tensor | None, scoring: Scoring, first: int, scale: float
) -> tuple[Tensor, Tensor]:
    """index [B, lists, T, picks] and count [B, lists, T]; lse as of `attend_ended`, with `shared` only."""
    batch, heads, tokens, width = q.shape
    kv_heads = planes.shape[2]
    lists = kv_heads if scoring.shared else heads
    stack = heads // lists
    index = torch.empty(batch, lists, tokens, scoring.picks, dtype=torch.int32, device=q.device)
    count = torch.empty(batch, lists, tokens, dtype=torch.int32, device=q.device)
    q, q_at = _dense(q)
    unit, stack_tile = _vector(q, width, *q_at), padded(stack, 1)
    size, step, warps = (16 if padded(width) > 64 else 32, 32, 8) if q.dtype == torch.float32 else SCORED
    queries = max(1, size // stack_tile)
    tiles, best = -(-tokens // queries), padded(scoring.scored, 2)
    start(
        best_blocks, (tiles * batch * lists,),
        q, planes, lse, index, count, heads, tokens, tiles, rows, scoring.stride, scoring.span, first,
        planes[0].numel(), *[n // unit for n in q_at], scoring.picks, scoring.initial, scoring.local, scale,
        planes.shape[3], stack, stack_tile, heads // kv_heads, scoring.block, scoring.block // scoring.stride,
        scoring.span // scoring.stride, width, padded(width), unit, planes.shape[0], queries,
        step, best, padded(scoring.picks, 1), num_warps=warps, num_stages=2,
    )  # fmt: skip
    return index, count


def _vector(q: Tensor, *sizes: int) -> int:
    """Elements of q that are loaded at once: what all of these are multiples of, 16 bytes at most."""
    unit = 16 // q.element_size()
    while any(n % unit for n in sizes):
        unit //= 2
    return unit
