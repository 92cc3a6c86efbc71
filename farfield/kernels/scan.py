"""scan on the GPU: linear attention whose past fades by one factor a head, in as many launches at any length.

The sequence is cut into segments, as many as fill the GPU with the heads there are. `scan_walk` gives each program one
segment of one head: it walks the segment chunk by chunk, products inside a chunk on the left, the state on the right,
so that q, k and v are read once and out is written once. The state before its segment it adds up from the sums of
k v^T that `scan_sums` has left for the pieces before. One segment needs no sums. On Hopper GPUs `scan_join` adds the
sums up, and the walk is that of `scan_hopper`.

Sums cost a second reading of k and v, but only of tokens that still count: a head that fades by lambda is at 2^-64
after 64 / -log2(lambda) tokens, and what is further away from every later segment is skipped.

`BACK` turns the sequence round and decays k v^T once more before it is added, which is what gradients need:

    forward   out[t] = sum over s <= t of lambda^(t - s) (q[t] . k[s]) v[s] + lambda^(t + 1) q[t] S
    back      out[t] = sum over s >= t of lambda^(s - t) (q[t] . k[s]) v[s] + lambda^(T - 1 - t) q[t] S
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import scan_hopper
from farfield.kernels.attend import WIDEST, _dense, padded
from farfield.kernels.replay import constant, start
from farfield.ops.scan import Decays

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(64.0)  # what has faded to 2^-64 is below the rounding of all that is not 2^-40 of its size

# what varies with the length must not make another kernel
VARIES = ["q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "heads", "tokens", "piece", "pieces", "each"]
VARIES += ["g_b", "g_h", "g_t", "segments", "state", "skip"]


@triton.jit
def _power(rate, n):
    """2^(rate n), n >= 0; 1 for n = 0 though the rate be -inf."""
    return tl.exp2(tl.where(n > 0, rate * n, 0.0))


@triton.jit
def _reach(rate):
    """Tokens after which what is left counts as nothing."""
    reach = tl.where(rate < 0, LEAST / -rate, 1e9)
    return tl.minimum(reach, 1e9).to(tl.int32) + 1


@triton.jit
def _tile(
    x, at, stop, tokens, stride, cols, WIDTH: tl.constexpr, UNIT: tl.constexpr, BACK: tl.constexpr, C: tl.constexpr,
    skip=0,
):  # fmt: skip
    """[C, cols] of the tokens from `at` on, 0 from `stop` on and before `skip`."""
    r = tl.arange(0, C)
    row = tokens - 1 - at - r if BACK else at + r
    x += row.to(tl.int64)[:, None] * stride * UNIT + cols
    return tl.load(x, mask=((at + r < stop) & (at + r >= skip))[:, None] & (cols < WIDTH), other=0.0)


@triton.jit
def _store(
    x, tile, at, stop, tokens, cols, WIDTH: tl.constexpr, BACK: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    r = tl.arange(0, C)
    row = tokens - 1 - at - r if BACK else at + r
    x += row.to(tl.int64)[:, None] * WIDTH + cols
    tl.store(x, tile.to(x.dtype.element_ty), mask=(at + r < stop)[:, None] & (cols < WIDTH))


@triton.jit
def _add(acc, k_tile, v_tile, weight, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """acc + k^T diag(weight) v in float32."""
    # v is what is scaled: the tensor cores read k from shared memory as its transpose, and no other tile so
    if NARROW:
        return tl.dot(k_tile.T, (v_tile * weight[:, None]).to(v_tile.dtype), acc)
    else:
        # float16 does not hold what float32 does
        faded = v_tile.to(tl.float32) * weight[:, None]
        return tl.dot(k_tile.to(tl.float32).T, faded, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARIES)
def scan_sums(
    k, v, decay, sums, k_b, k_h, k_t, v_b, v_h, v_t, heads, tokens, skip, piece, pieces, each,
    REPEAT: tl.constexpr, V_REPEAT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr,
    BE: tl.constexpr, D_UNIT: tl.constexpr, E_UNIT: tl.constexpr, C: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """sums [B H, pieces, D, E]: a piece's k v^T, faded to the piece's end; each segment has `each` pieces. The first
    `skip` tokens are not there."""
    PARTS: tl.constexpr = (E + BE - 1) // BE
    NARROW: tl.constexpr = k.dtype.element_ty == tl.bfloat16
    PRECISION: tl.constexpr = "ieee" if k.dtype.element_ty == tl.float32 else "tf32x3"
    pid = tl.program_id(0)
    part, n, bh = pid % PARTS, pid // PARTS % pieces, pid // PARTS // pieces
    # int64: token * stride passes 2**31 at long context
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rate = tl.load(decay + h).to(tl.float32) * LOG2E
    # the next segment begins where its pieces do; what has faded before it is not read
    start, stop = n * piece, n * piece + piece
    needed = (n // each + 1) * each * piece - _reach(rate)
    if needed >= stop:
        return
    first = tl.maximum(start, start + (needed - start) // C * C)

    dims, values = tl.arange(0, D_TILE), part * BE + tl.arange(0, BE)
    k += (b * k_b + h // REPEAT * k_h) * D_UNIT
    v += (b * v_b + h // V_REPEAT * v_h) * E_UNIT
    k_stride, v_stride = k_t.to(tl.int64), v_t.to(tl.int64)
    r = tl.arange(0, C)
    weight = _power(rate, C - 1 - r + BACK)
    whole = _power(rate, C)
    acc = tl.zeros([D_TILE, BE], tl.float32)
    for at in range(first, stop, C):
        k_tile = _tile(k, at, stop, tokens, k_stride, dims, D, D_UNIT, BACK, C, skip)
        v_tile = _tile(v, at, stop, tokens, v_stride, values, E, E_UNIT, BACK, C, skip)
        acc = _add(acc * whole, k_tile, v_tile, weight, NARROW, PRECISION)
    sums += (bh.to(tl.int64) * pieces + n) * (D * E) + dims[:, None] * E + values
    tl.store(sums, acc, mask=(dims < D)[:, None] & (values < E))


@triton.jit(do_not_specialize=VARIES)
def scan_join(
    sums, state, decay, before, heads, skip, piece, pieces, each, segments, across, along,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """before [B H, segments, SIZE]: what the pieces before a segment and `state` have left. The state's rows and
    columns are `across` and `along` apart."""
    PARTS: tl.constexpr = SIZE // BLOCK
    pid = tl.program_id(0)
    part, bh = pid % PARTS, (pid // PARTS).to(tl.int64)
    rate = tl.load(decay + bh % heads).to(tl.float32) * LOG2E
    place = part * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    if state is not None:
        acc += tl.load(state + bh * SIZE + place // WIDTH * across + place % WIDTH * along)
    before += bh * segments * SIZE + place
    sums += bh * pieces * SIZE + place
    tl.store(before, acc)
    i = tl.arange(0, MOST)
    reach, length = _reach(rate), each * piece
    weight, fade = _power(rate, (each - 1 - i) * piece), _power(rate, length)
    for n in tl.range(0, segments - 1, num_stages=3):
        # what is beyond the reach of the next segment was not written
        there = (i < each) & (length - reach < (i + 1) * piece)
        more = tl.load(sums + (n * each + i)[:, None] * SIZE, mask=there[:, None], other=0.0)
        # the first segment is short where tokens are skipped
        acc = acc * (_power(rate, length - skip) if n == 0 else fade) + tl.sum(more * weight[:, None], 0)
        tl.store(before + (n + 1) * SIZE, acc)


@triton.jit
def _before(state, sums, rate, bh, n, start, piece, pieces, each, place, held, SIZE: tl.constexpr):
    """What the tokens before segment n, and the state before them all, have left."""
    acc = tl.zeros(place.shape, tl.float32)
    if state is not None:
        acc += tl.load(state + bh.to(tl.int64) * SIZE + place, mask=held, other=0.0) * _power(rate, start)
    if sums is not None:
        # pieces end 0, piece, 2 piece, ... tokens before the segment; those beyond reach were not written
        near = tl.minimum((_reach(rate) - 1) // piece + 1, n * each)
        sums += (bh.to(tl.int64) * pieces + n * each - near) * SIZE
        for i in tl.range(0, near, num_stages=3):
            more = tl.load(sums + place, mask=held, other=0.0)
            acc += more * _power(rate, (near - 1 - i) * piece)
            sums += SIZE
    return acc


@triton.jit(do_not_specialize=VARIES)
def scan_walk(
    q, k, v, decay, state, sums, out, end,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, heads, tokens, piece, pieces, each, segments,
    Q_REPEAT: tl.constexpr, REPEAT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr,
    BE: tl.constexpr, D_UNIT: tl.constexpr, E_UNIT: tl.constexpr, C: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (E + BE - 1) // BE
    NARROW: tl.constexpr = k.dtype.element_ty == tl.bfloat16
    PRECISION: tl.constexpr = "ieee" if k.dtype.element_ty == tl.float32 else "tf32x3"
    pid = tl.program_id(0)
    part, n, bh = pid % PARTS, pid // PARTS % segments, pid // PARTS // segments
    # int64: token * stride passes 2**31 at long context
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rate = tl.load(decay + h).to(tl.float32) * LOG2E
    start = n * each * piece
    stop = tl.minimum(start + each * piece, tokens)

    dims, values = tl.arange(0, D_TILE), part * BE + tl.arange(0, BE)
    held = (dims < D)[:, None] & (values < E)
    place = dims[:, None] * E + values
    acc = _before(state, sums, rate, bh, n, start, piece, pieces, each, place, held, D * E)
    q += (b * q_b + h // Q_REPEAT * q_h) * D_UNIT
    k += (b * k_b + h // REPEAT * k_h) * D_UNIT
    v += (b * v_b + h // REPEAT * v_h) * E_UNIT
    out += bh.to(tl.int64) * tokens * E
    q_stride, k_stride, v_stride = q_t.to(tl.int64), k_t.to(tl.int64), v_t.to(tl.int64)
    r = tl.arange(0, C)
    grown = _power(rate, r + 1 - BACK)
    # [C, C]: lambda^(t - s), 0 for the future
    lag = r[:, None] - r[None, :]
    fade = tl.where(lag >= 0, _power(rate, lag), 0.0)
    for at in range(start, stop, C):
        q_tile = _tile(q, at, stop, tokens, q_stride, dims, D, D_UNIT, BACK, C)
        k_tile = _tile(k, at, stop, tokens, k_stride, dims, D, D_UNIT, BACK, C)
        v_tile = _tile(v, at, stop, tokens, v_stride, values, E, E_UNIT, BACK, C)
        many = tl.minimum(stop - at, C)
        weight = _power(rate, tl.maximum(many - 1 - r, 0) + BACK)
        pairs = tl.dot(q_tile, k_tile.T, input_precision="ieee") * fade
        if NARROW:
            narrow = pairs.to(v_tile.dtype)
            o = tl.dot(q_tile, acc.to(q_tile.dtype)) * grown[:, None]
            o = tl.dot(narrow, v_tile, o)
        else:
            wide, wide_v = q_tile.to(tl.float32), v_tile.to(tl.float32)
            o = tl.dot(wide, acc, input_precision=PRECISION) * grown[:, None]
            o = tl.dot(pairs, wide_v, o, input_precision=PRECISION)
        acc = _add(acc * _power(rate, many), k_tile, v_tile, weight, NARROW, PRECISION)
        _store(out, o, at, stop, tokens, values, E, BACK, C)
    if n == segments - 1:
        tl.store(end + bh.to(tl.int64) * (D * E) + place, acc, mask=held)


@triton.jit(do_not_specialize=VARIES)
def scan_back(
    q, k, v, grad, decay, state, sums, d_k, d_v, end,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, heads, tokens, piece, pieces, each, segments,
    REPEAT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_UNIT: tl.constexpr, E_UNIT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v, which come of one state: that of the queries and the gradients of out, from the end on."""
    pid = tl.program_id(0)
    n, bh = pid % segments, pid // segments
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rate = tl.load(decay + h).to(tl.float32) * LOG2E
    start = n * each * piece
    stop = tl.minimum(start + each * piece, tokens)

    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    held = (dims < D)[:, None] & (values < E)
    place = dims[:, None] * E + values
    acc = _before(state, sums, rate, bh, n, start, piece, pieces, each, place, held, D * E)

    q += (b * q_b + h * q_h) * D_UNIT
    k += (b * k_b + h // REPEAT * k_h) * D_UNIT
    v += (b * v_b + h // REPEAT * v_h) * E_UNIT
    grad += (b * g_b + h * g_h) * E_UNIT
    d_k += bh.to(tl.int64) * tokens * D
    d_v += bh.to(tl.int64) * tokens * E
    q_stride, k_stride = q_t.to(tl.int64), k_t.to(tl.int64)
    v_stride, g_stride = v_t.to(tl.int64), g_t.to(tl.int64)
    r = tl.arange(0, C)
    grown = _power(rate, r)
    # [C, C]: lambda^(t - s), 0 for the future
    lag = r[:, None] - r[None, :]
    fade = tl.where(lag >= 0, _power(rate, lag), 0.0)
    for at in range(start, stop, C):
        q_tile = _tile(q, at, stop, tokens, q_stride, dims, D, D_UNIT, True, C)
        g_tile = _tile(grad, at, stop, tokens, g_stride, values, E, E_UNIT, True, C)
        k_tile = _tile(k, at, stop, tokens, k_stride, dims, D, D_UNIT, True, C)
        v_tile = _tile(v, at, stop, tokens, v_stride, values, E, E_UNIT, True, C)
        narrow = acc.to(k_tile.dtype)

        pairs = (tl.dot(k_tile, q_tile.T) * fade).to(g_tile.dtype)
        o = tl.dot(k_tile, narrow) * grown[:, None]
        o = tl.dot(pairs, g_tile, o)
        _store(d_v, o, at, stop, tokens, values, E, True, C)

        pairs = (tl.dot(v_tile, g_tile.T) * fade).to(q_tile.dtype)
        o = tl.dot(v_tile, narrow.T) * grown[:, None]
        o = tl.dot(pairs, q_tile, o)
        _store(d_k, o, at, stop, tokens, dims, D, True, C)

        many = tl.minimum(stop - at, C)
        weight = _power(rate, tl.maximum(many - 1 - r, 0) + 1)
        acc = _add(acc * _power(rate, many), q_tile, g_tile, weight, True, "ieee")
    if n == segments - 1:
        tl.store(end + bh.to(tl.int64) * (D * E) + place, acc, mask=held)


class Tiles(NamedTuple):
    """How a launch is cut.

    Args:
        chunk: tokens of a step.
        values: columns of v of a program.
        programs: that one multiprocessor holds at a time.
    """

    chunk: int
    values: int
    warps: int
    stages: int
    programs: int


def tiles(width: int, value_width: int, dtype: torch.dtype) -> Tiles:
    """By padded widths and dtype."""
    if dtype == torch.bfloat16:
        if width > 128:
            return Tiles(64, min(value_width, 32), 4, 2, 1)
        # eight warps on tiles of 64 tokens, or all of 128 columns of v at a time, are slower: they exchange or spill
        return Tiles(64, min(value_width, 64), 4, 3, 2 if width <= 64 else 1)
    if dtype == torch.float16:
        # products in three parts of tf32
        return Tiles(32 if width <= 64 else 16, min(value_width, 32 if width <= 128 else 16), 4, 1, 2)
    # products of float32 run on no tensor core, and their operands lie in registers
    if width > 128:
        return Tiles(16, min(value_width, 16), 8, 1, 1)
    return Tiles(16, min(value_width, 32 if width <= 64 else 16), 4, 1, 2)


# the states before segments on Hopper GPUs, by widths
SUMS = {
    (64, 64): Tiles(64, 64, 4, 6, 1),
    (64, 128): Tiles(64, 64, 4, 4, 1),
    (128, 64): Tiles(64, 64, 4, 4, 1),
    (128, 128): Tiles(64, 64, 4, 4, 1),
}
JOINED = 512  # numbers of a state that a program joins

# for gradients of k and v at once
BACK_TILES = Tiles(64, 64, 4, 3, 1)


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, None if they can."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {q.dtype}"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"takes widths up to {WIDEST}, got D={q.shape[3]} and E={v.shape[3]}"
    if not (q.numel() and v.numel()):
        return "takes no empty tensors"
    return None


def whole(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, made: Decays | None, keep: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    """forward, by launches alone: out, end and, where it is asked for and there is one, what gradient_of_queries can
    go by. No decay: they are what is `made`."""
    kept: list[Tensor] | None = [] if keep else None
    out, end = forward(q, k, v, _decays(q, decay, made), state, False, kept)
    return out, end, *(kept or ())


def whole_backward(
    d_out: Tensor, d_end: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    before: Tensor | None, made: Decays | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, of k and v for each query head, and of the state if there is one: three more recurrences."""
    decay = _decays(q, decay, made)
    d_q = gradient_of_queries(d_out, k, v, decay, before)
    if d_q is None:
        d_q, _ = forward(d_out, v, k, decay, None if state is None else state.mT, False)
    both = gradients(d_out, d_end, q, k, v, decay)
    if both is None:
        d_k, _ = forward(v, d_out, q, decay, None if d_end is None else d_end.mT, True)
        both = d_k, *forward(k, q, d_out, decay, d_end, True)
    d_k, d_v, d_state = both
    return (d_q, d_k, d_v) if state is None else (d_q, d_k, d_v, d_state)


def _decays(q: Tensor, decay: Tensor | None, made: Decays | None) -> Tensor:
    """[H]; what follows from numbers is made once for all calls."""
    if made is None:
        assert decay is not None
        return decay
    return constant(made.of, q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, back: bool,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, H, T, E] in q's dtype and end [B, H, D, E] in float32; the contract is ops.scan's. `kept` gets what
    gradient_of_queries can go by."""
    batch, _, tokens, width = q.shape
    heads, value_width = max(q.shape[1], k.shape[1]), v.shape[3]
    out = q.new_empty(batch, heads, tokens, value_width)
    end = q.new_empty(batch, heads, width, value_width, dtype=torch.float32)
    (q, q_at), (k, k_at), (v, v_at) = _dense(q), _dense(k), _dense(v)
    if scan_hopper.wants(q, k, v):
        cut = _whole(batch * heads, tokens, q.device)
        # as the state lies in the registers of the walk: [values, dims]
        before = _states(v, k, decay, heads, cut, state, True, back)
        if kept is not None and before is not None:
            kept.append(before)
        walk = scan_hopper.Walk(q, k, v, out)
        scan_hopper.walk([walk], decay, before, True, end, (cut.piece, cut.each, cut.segments), back)
        return out, end
    d_unit, e_unit = _unit(q, width, *q_at, *k_at), _unit(v, value_width, *v_at)
    tile = tiles(padded(width), padded(value_width), q.dtype)
    parts = -(-value_width // tile.values)
    cut = plan(batch * heads * parts, tokens, tile.chunk, tile.programs, q.device)
    constants = {
        "REPEAT": heads // k.shape[1], "D": width, "E": value_width, "D_TILE": padded(width), "BE": tile.values,
        "D_UNIT": d_unit, "E_UNIT": e_unit, "C": tile.chunk, "BACK": back, "num_warps": tile.warps,
        "num_stages": tile.stages,
    }  # fmt: skip
    q_at, k_at, v_at = [n // d_unit for n in q_at], [n // d_unit for n in k_at], [n // e_unit for n in v_at]
    sums = _sums(k, v, decay, heads, cut, k_at, v_at, constants)
    start(
        scan_walk, (parts * cut.segments * batch * heads,),
        q, k, v, decay, None if state is None else state.contiguous(), sums, out, end,
        *q_at, *k_at, *v_at, heads, tokens, *cut.numbers, Q_REPEAT=heads // q.shape[1], **constants,
    )  # fmt: skip
    return out, end


def gradient_of_queries(
    d_out: Tensor, k: Tensor, v: Tensor, decay: Tensor, before: Tensor | None
) -> Tensor | None:  # fmt: skip
    """For each query head, by the states that the forward has kept; None where there are none or they do not fit."""
    (d_out, _), (k, _), (v, _) = _dense(d_out), _dense(k), _dense(v)
    if before is None or not scan_hopper.wants(d_out, k, v):
        return None
    batch, heads, tokens, value_width = d_out.shape
    width = k.shape[3]
    cut = _whole(batch * heads, tokens, k.device)
    d_q, end = d_out.new_empty(batch, heads, tokens, width), before.new_empty(batch, heads, value_width, width)
    walk = scan_hopper.Walk(d_out, v, k, d_q)
    scan_hopper.walk([walk], decay, before, False, end, (cut.piece, cut.each, cut.segments), False)
    return d_q


def together(width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Whether one program holds a whole state and what both gradients need."""
    return dtype == torch.bfloat16 and max(width, value_width) <= 64


def gradients(
    d_out: Tensor, d_end: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of k and v, for each query head, and of the state; None where the tiles have no room for both at once."""
    batch, heads, tokens, width = q.shape
    value_width = v.shape[3]
    d_tile, e_tile = padded(width), padded(value_width)
    (q, q_at), (k, k_at), (v, v_at), (d_out, g_at) = _dense(q), _dense(k), _dense(v), _dense(d_out)
    if scan_hopper.wants(q, k, v, d_out):
        return _two(d_out, d_end, q, k, v, decay)
    if not together(d_tile, e_tile, q.dtype):
        return None
    d_k = q.new_empty(batch, heads, tokens, width)
    d_v = q.new_empty(batch, heads, tokens, value_width)
    end = q.new_empty(batch, heads, width, value_width, dtype=torch.float32)
    d_unit, e_unit = _unit(q, width, *q_at, *k_at), _unit(v, value_width, *v_at, *g_at)
    q_at, k_at = [n // d_unit for n in q_at], [n // d_unit for n in k_at]
    v_at, g_at = [n // e_unit for n in v_at], [n // e_unit for n in g_at]
    tile = BACK_TILES
    cut = plan(batch * heads, tokens, tile.chunk, tile.programs, q.device)
    constants = {
        "D": width, "E": value_width, "D_TILE": d_tile, "D_UNIT": d_unit, "E_UNIT": e_unit, "C": tile.chunk,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    sums = _sums(
        q, d_out, decay, heads, cut, q_at, g_at, {**constants, "REPEAT": 1, "BE": e_tile, "BACK": True}
    )  # fmt: skip
    start(
        scan_back, (cut.segments * batch * heads,),
        q, k, v, d_out, decay, None if d_end is None else d_end.contiguous(), sums, d_k, d_v, end,
        *q_at, *k_at, *v_at, *g_at, heads, tokens, *cut.numbers,
        REPEAT=heads // k.shape[1], E_TILE=e_tile, **constants,
    )  # fmt: skip
    return d_k, d_v, end


def _two(
    d_out: Tensor, d_end: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """gradients on Hopper GPUs: both walks go by the same states, and programs of both read the same at a time."""
    batch, heads, tokens, width = q.shape
    value_width = v.shape[3]
    d_k = q.new_empty(batch, heads, tokens, width)
    d_v = q.new_empty(batch, heads, tokens, value_width)
    end = q.new_empty(batch, heads, width, value_width, dtype=torch.float32)
    walks = [scan_hopper.Walk(k, q, d_out, d_v), scan_hopper.Walk(v, d_out, q, d_k)]
    many = 2 if width == value_width else 1
    cut = _whole(many * batch * heads, tokens, q.device)
    before = _states(d_out, q, decay, heads, cut, d_end, True, True)
    numbers = cut.piece, cut.each, cut.segments
    if many == 2:
        scan_hopper.walk(walks, decay, before, True, end, numbers, True)
    else:
        scan_hopper.walk(walks[:1], decay, before, True, end, numbers, True)
        scan_hopper.walk(walks[1:], decay, before, False, torch.empty_like(end), numbers, True)
    return d_k, d_v, end


def _whole(programs: int, tokens: int, device: torch.device) -> Cut:
    """The plan for whole chunks, one program a multiprocessor."""
    chunk = scan_hopper.CHUNK
    return plan(programs, -(-tokens // chunk) * chunk, chunk, 1, device, FINE)


def _states(
    k: Tensor, v: Tensor, decay: Tensor, heads: int, cut: Cut, state: Tensor | None, turned: bool, back: bool
) -> Tensor | None:
    """The state k v^T before each segment, [B H, segments, D, E]; the one given is [E, D] if it is `turned`."""
    if cut.segments == 1 and state is None:
        return None
    (batch, _, tokens, width), value_width = k.shape, v.shape[3]
    skip = -tokens % scan_hopper.CHUNK if back else 0
    before = torch.empty(batch * heads, cut.segments, width, value_width, dtype=torch.float32, device=k.device)
    k_at, v_at = ([n // 8 for n in x.stride()[:3]] for x in (k, v))
    sums = before
    if cut.segments > 1:
        tile = SUMS[width, value_width]
        sums = torch.empty(batch * heads, cut.pieces, width, value_width, dtype=torch.float32, device=k.device)
        start(
            scan_sums, (value_width // tile.values * cut.pieces * batch * heads,),
            k, v, decay, sums, *k_at, *v_at, heads, tokens + skip, skip, cut.piece, cut.pieces, cut.each,
            REPEAT=heads // k.shape[1], V_REPEAT=heads // v.shape[1], D=width, E=value_width, D_TILE=width,
            BE=tile.values, D_UNIT=8, E_UNIT=8, C=tile.chunk, BACK=back, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    apart = (1, width) if turned else (value_width, 1)
    start(
        scan_join, (width * value_width // JOINED * batch * heads,),
        sums, None if state is None else state.contiguous(), decay, before, heads, skip, cut.piece, cut.pieces,
        cut.each, cut.segments, *apart, SIZE=width * value_width, WIDTH=value_width, BLOCK=JOINED, MOST=FINE,
        num_warps=4,
    )  # fmt: skip
    return before


def _sums(
    k: Tensor, v: Tensor, decay: Tensor, heads: int, cut: Cut, k_at: list[int], v_at: list[int], constants: dict
) -> Tensor | None:
    if cut.segments == 1:
        return None
    (batch, _, tokens, width), value_width = k.shape, v.shape[3]
    sums = torch.empty(batch * heads, cut.pieces, width, value_width, dtype=torch.float32, device=k.device)
    start(
        scan_sums, (-(-value_width // constants["BE"]) * cut.pieces * batch * heads,), k, v, decay, sums,
        *k_at, *v_at, heads, tokens, 0, *cut.numbers[:3], V_REPEAT=constants["REPEAT"], **constants,
    )  # fmt: skip
    return sums


def _unit(x: Tensor, *sizes: int) -> int:
    """How many numbers are loaded at once: 16 bytes where all strides allow it.

    The widths keep this the same for all lengths.
    """
    return math.gcd(16 // x.element_size(), *sizes)


EACH = 4  # pieces of a segment: heads that fade fast leave the GPU to the others
FINE = 8  # the same where they are joined by a launch of their own


class Cut(NamedTuple):
    """How a sequence is cut: `segments` of `each` pieces of `piece` tokens, the last one short."""

    piece: int
    each: int
    segments: int

    @property
    def pieces(self) -> int:
        """Pieces that later segments need."""
        return (self.segments - 1) * self.each

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """As the kernels take them."""
        return self.piece, self.pieces, self.each, self.segments


def plan(programs: int, tokens: int, chunk: int, places: int, device: torch.device, each: int = EACH) -> Cut:
    """As many segments as fill the GPU, given so many programs a segment and places a multiprocessor; `each` pieces a
    segment at most."""
    places *= torch.cuda.get_device_properties(device).multi_processor_count
    segments = max(1, min(places // programs, -(-tokens // (2 * chunk))))
    if segments == 1:
        return Cut(tokens, 1, 1)
    length = -(-tokens // segments)
    piece = -(-length // (each * chunk)) * chunk
    each = -(-length // piece)
    return Cut(piece, each, -(-tokens // (piece * each)))
