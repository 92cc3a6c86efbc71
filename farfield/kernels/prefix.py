"""prefix_softmax on the GPU: the softmax of every prefix in two launches each way.

The sequence is cut into segments, as many as fill the GPU. `prefix_sums` leaves the softmax sums of each; a program of
`prefix_walk` merges those before its own segment and walks it chunk by chunk: weights of the tokens inside the chunk
against each token's own largest score so far, one product with the chunk's values, and what came before, rescaled.

The backward goes the other way with p[i, t] = e^(s[i] - lse[t]), t >= i, which is at most 1:

    dv[i] = sum over t of p[i, t] g[t],    ds[i] = sum over t of p[i, t] (v[i] . g[t] - out[t] . g[t])

What later chunks add is p[i, t] = e^(s[i] - L) e^(L - lse[t]) with L = lse of the first token after the chunk: lse only
grows, so that both factors are at most 1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import WIDEST, _dense, padded
from farfield.kernels.replay import start

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# what varies with the length must not make another kernel
VARIES = ["s_b", "s_h", "s_t", "v_b", "v_h", "v_t", "g_b", "g_h", "g_t", "heads", "tokens", "length", "segments"]
VARIES += ["peak0", "mass0", "total0", "d_mass", "d_total", "mass1", "rest", "q_b", "q_h"]


DTYPES = torch.bfloat16, torch.float16, torch.float32


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _base(x):
    """-inf - -inf is nan: what has no tokens is measured from 0."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _scores(s, at, stop, stride, C: tl.constexpr):
    i = at + tl.arange(0, C)
    return tl.load(s + i.to(tl.int64) * stride, mask=i < stop, other=float("-inf"))


@triton.jit
def _rows(x, at, stop, stride, cols, WIDTH: tl.constexpr, C: tl.constexpr):
    i = at + tl.arange(0, C)
    return tl.load(x + i.to(tl.int64)[:, None] * stride + cols, mask=(i < stop)[:, None] & (cols < WIDTH), other=0.0)


@triton.jit
def _grow(peak, mass, total, s, x):
    """Softmax sums with the entries s, of mass 1 and values x, merged in."""
    higher = tl.maximum(peak, tl.max(s, 0))
    fade, weights = _exp(peak - _base(higher)), _exp(s - _base(higher))
    return higher, mass * fade + tl.sum(weights, 0), total * fade + tl.sum(weights[:, None] * x.to(tl.float32), 0)


@triton.jit(do_not_specialize=VARIES)
def prefix_sums(
    s, v, peaks, masses, totals, s_b, s_h, s_t, v_b, v_h, v_t, heads, tokens, length, segments,
    REPEAT: tl.constexpr, E: tl.constexpr, E_TILE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Softmax sums of each segment but the last: peaks and masses [B H, segments], totals [B H, segments, E]."""
    pid = tl.program_id(0)
    n, bh = pid % (segments - 1), pid // (segments - 1)
    # int64: token * stride passes 2**31 at long context
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    cols = tl.arange(0, E_TILE)
    s += b * s_b + h * s_h
    v += b * v_b + h // REPEAT * v_h
    s_stride, v_stride = s_t.to(tl.int64), v_t.to(tl.int64)
    peak, mass, total = float("-inf"), 0.0, tl.zeros([E_TILE], tl.float32)
    stop = n * length + length
    for at in range(n * length, stop, C):
        x = _rows(v, at, stop, v_stride, cols, E, C)
        peak, mass, total = _grow(peak, mass, total, _scores(s, at, stop, s_stride, C), x)
    place = bh.to(tl.int64) * segments + n
    tl.store(peaks + place, peak)
    tl.store(masses + place, mass)
    tl.store(totals + place * E + cols, total, mask=cols < E)


@triton.jit(do_not_specialize=VARIES)
def prefix_walk(
    s, v, peaks, masses, totals, peak0, mass0, total0, out, rest, lse, peak1, mass1, total1,
    s_b, s_h, s_t, v_b, v_h, v_t, heads, tokens, length, segments,
    REPEAT: tl.constexpr, E: tl.constexpr, E_TILE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n, bh = pid % segments, (pid // segments).to(tl.int64)
    b, h = bh // heads, bh % heads
    cols = tl.arange(0, E_TILE)
    peak, mass, total = float("-inf"), 0.0, tl.zeros([E_TILE], tl.float32)
    if peak0 is not None:
        peak, mass = tl.load(peak0 + bh), tl.load(mass0 + bh)
        total += tl.load(total0 + bh * E + cols, mask=cols < E, other=0.0)
    for first in range(0, n, 16):
        i = first + tl.arange(0, 16)
        theirs = tl.load(peaks + bh * segments + i, mask=i < n, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(theirs, 0))
        fade, weights = _exp(peak - _base(higher)), _exp(theirs - _base(higher))
        mass = mass * fade + tl.sum(weights * tl.load(masses + bh * segments + i, mask=i < n, other=0.0), 0)
        x = tl.load(totals + (bh * segments + i)[:, None] * E + cols, mask=(i < n)[:, None] & (cols < E), other=0.0)
        total = total * fade + tl.sum(weights[:, None] * x, 0)
        peak = higher

    s += b * s_b + h * s_h
    v += b * v_b + h // REPEAT * v_h
    out += bh * tokens * E
    if rest is not None:
        rest += bh * tokens * E
    lse += bh * tokens
    s_stride, v_stride = s_t.to(tl.int64), v_t.to(tl.int64)
    r = tl.arange(0, C)
    past = r[None, :] <= r[:, None]
    stop = tl.minimum(n * length + length, tokens)
    for at in range(n * length, stop, C):
        own = _scores(s, at, stop, s_stride, C)
        x = _rows(v, at, stop, v_stride, cols, E, C)
        # [C, C]: a row is a token, whose largest score so far is its own
        seen = tl.where(past, own[None, :], float("-inf"))
        base = _base(tl.maximum(tl.max(seen, 1), peak))
        weights, fade = _exp(seen - base[:, None]), _exp(peak - base)
        m = tl.sum(weights, 1) + fade * mass
        narrow = weights.to(x.dtype)
        o = tl.dot(narrow, x, fade[:, None] * total[None, :], input_precision="ieee")
        if x.dtype != tl.float32:
            # what rounding takes from the weights: the backward goes by more than out's digits
            o = tl.dot((weights - narrow.to(tl.float32)).to(x.dtype), x, o)
        o = o / tl.where(m > 0, m, 1.0)[:, None]
        i = at + r
        rounded, place, there = o.to(out.dtype.element_ty), i.to(tl.int64)[:, None] * E + cols, i < stop
        tl.store(out + place, rounded, mask=there[:, None] & (cols < E))
        if rest is not None:
            left = (o - rounded.to(tl.float32)).to(out.dtype.element_ty)
            tl.store(rest + place, left, mask=there[:, None] & (cols < E))
        # log2(0) = -inf is what a prefix of hidden tokens has
        tl.store(lse + i, base + tl.log2(m) * LN2, mask=i < stop)
        peak, mass, total = _grow(peak, mass, total, own, x)
    if n == segments - 1:
        tl.store(peak1 + bh, peak)
        tl.store(mass1 + bh, mass)
        tl.store(total1 + bh * E + cols, total, mask=cols < E)


@triton.jit
def _level(lse, at, tokens):
    """lse of the token after a stretch, by which what comes later is measured; after the last one, its own."""
    return tl.load(lse + tl.minimum(at, tokens - 1))


@triton.jit
def _shrink(level, later, delta, own_lse, g, d, first):
    """What tokens from here on give to those before: sums of e^(first - lse) g and of e^(first - lse) (out . g)."""
    # where a prefix is hidden there is nothing to give
    weights = tl.where(own_lse > float("-inf"), _exp(first - own_lse), 0.0)
    fade = tl.where(first > float("-inf"), _exp(first - level), 0.0)
    later = later * fade + tl.sum(weights[:, None] * g.to(tl.float32), 0)
    return later, delta * fade + tl.sum(weights * d, 0)


@triton.jit
def _deltas(g, out, rest, at, stop, cols, E: tl.constexpr, C: tl.constexpr):
    """out . g of each token."""
    o = _rows(out, at, stop, E, cols, E, C).to(tl.float32)
    if rest is not None:
        o += _rows(rest, at, stop, E, cols, E, C).to(tl.float32)
    return tl.sum(g.to(tl.float32) * o, 1)


@triton.jit
def _lse(lse, at, stop, C: tl.constexpr):
    i = at + tl.arange(0, C)
    return tl.load(lse + i, mask=i < stop, other=float("inf"))


@triton.jit(do_not_specialize=VARIES)
def prefix_back_sums(
    out, rest, lse, grad, later, deltas, g_b, g_h, g_t, heads, tokens, length, segments,
    E: tl.constexpr, E_TILE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What each segment but the first gives to those before it, by lse of its first token."""
    pid = tl.program_id(0)
    n, bh = pid % (segments - 1) + 1, (pid // (segments - 1)).to(tl.int64)
    cols = tl.arange(0, E_TILE)
    grad += bh // heads * g_b + bh % heads * g_h
    out += bh * tokens * E
    if rest is not None:
        rest += bh * tokens * E
    lse += bh * tokens
    g_stride = g_t.to(tl.int64)
    start = n * length
    stop = tl.minimum(start + length, tokens)
    level = tl.load(lse + start)
    acc, delta = tl.zeros([E_TILE], tl.float32), 0.0
    for at in range(start, stop, C):
        g = _rows(grad, at, stop, g_stride, cols, E, C)
        d = _deltas(g, out, rest, at, stop, cols, E, C)
        own = _lse(lse, at, stop, C)
        weights = tl.where(own > float("-inf"), _exp(level - own), 0.0)
        acc += tl.sum(weights[:, None] * g.to(tl.float32), 0)
        delta += tl.sum(weights * d, 0)
    place = bh * segments + n
    tl.store(later + place * E + cols, acc, mask=cols < E)
    tl.store(deltas + place, delta)


@triton.jit(do_not_specialize=VARIES)
def prefix_back(
    s, v, out, rest, lse, grad, later, deltas, d_mass, d_total, mass1, d_s, d_v, d_later, d_delta,
    s_b, s_h, s_t, v_b, v_h, v_t, g_b, g_h, g_t, heads, tokens, length, segments,
    REPEAT: tl.constexpr, E: tl.constexpr, E_TILE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n, bh = pid % segments, (pid // segments).to(tl.int64)
    b, h = bh // heads, bh % heads
    cols = tl.arange(0, E_TILE)
    lse += bh * tokens
    acc, delta = tl.zeros([E_TILE], tl.float32), 0.0
    if d_total is not None:
        # the last sums are read by whoever goes on: e^(s - peak) = e^(s - lse) mass
        mass = tl.load(mass1 + bh)
        acc += mass * tl.load(d_total + bh * E + cols, mask=cols < E, other=0.0)
        delta -= mass * tl.load(d_mass + bh)
    # what segments give is measured by lse of their first token
    base = _level(lse, n * length + length, tokens)
    fade = tl.where(base > float("-inf"), _exp(base - _level(lse, tokens, tokens)), 0.0)
    acc, delta = acc * fade, delta * fade
    for first in range(n + 1, segments, 16):
        m = first + tl.arange(0, 16)
        theirs = tl.load(lse + m * length, mask=m < segments, other=float("inf"))
        weights = tl.where(base > float("-inf"), _exp(base - theirs), 0.0)
        there = (m < segments)[:, None] & (cols < E)
        x = tl.load(later + (bh * segments + m)[:, None] * E + cols, mask=there, other=0.0)
        acc += tl.sum(weights[:, None] * x, 0)
        delta += tl.sum(weights * tl.load(deltas + bh * segments + m, mask=m < segments, other=0.0), 0)

    s += b * s_b + h * s_h
    v += b * v_b + h // REPEAT * v_h
    grad += b * g_b + h * g_h
    out += bh * tokens * E
    if rest is not None:
        rest += bh * tokens * E
    d_s += bh * tokens
    d_v += bh * tokens * E
    s_stride, v_stride, g_stride = s_t.to(tl.int64), v_t.to(tl.int64), g_t.to(tl.int64)
    r = tl.arange(0, C)
    after = r[None, :] >= r[:, None]
    start = n * length
    stop = tl.minimum(start + length, tokens)
    chunks = (stop - start + C - 1) // C
    for turn in range(chunks):
        at = start + (chunks - 1 - turn) * C
        own, own_lse = _scores(s, at, stop, s_stride, C), _lse(lse, at, stop, C)
        # loaded anew: Triton 3.6 loses what a loop carries from a load
        level = _level(lse, tl.minimum(at + C, stop), tokens)
        x = _rows(v, at, stop, v_stride, cols, E, C)
        g = _rows(grad, at, stop, g_stride, cols, E, C)
        d = _deltas(g, out, rest, at, stop, cols, E, C)
        # [C, C]: a row is a token that is read, a column one that reads it
        there = after & (own > float("-inf"))[:, None]
        p = tl.where(there, _exp(own[:, None] - own_lse[None, :]), 0.0)
        far = tl.where(own > float("-inf"), _exp(own - level), 0.0)
        products = tl.dot(x, g.T, input_precision="ieee")
        ds = tl.sum(p * (products - d[None, :]), 1)
        ds += far * (tl.sum(x.to(tl.float32) * acc[None, :], 1) - delta)
        dv = tl.dot(p.to(g.dtype), g, far[:, None] * acc[None, :], input_precision="ieee")
        i = at + r
        tl.store(d_s + i, ds, mask=i < stop)
        tl.store(d_v + i.to(tl.int64)[:, None] * E + cols, dv.to(d_v.dtype.element_ty),
                 mask=(i < stop)[:, None] & (cols < E))  # fmt: skip
        acc, delta = _shrink(level, acc, delta, own_lse, g, d, tl.load(lse + at))
    if n == 0:
        # times e^(peak - lse of the first token): the gradients of the sums before it
        tl.store(d_later + bh * E + cols, acc, mask=cols < E)
        tl.store(d_delta + bh, -delta)


@triton.jit(do_not_specialize=VARIES)
def prefix_scores(
    q, k, s, q_b, q_h, v_b, v_h, v_t, scale, heads, tokens, segments,
    REPEAT: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """s [B, H, T] = scale q . k[t], for all query heads of a key head: k is read once. k lies v_b, v_h, v_t apart."""
    pid = tl.program_id(0)
    n, unit = pid % segments, (pid // segments).to(tl.int64)
    groups = heads // REPEAT
    b, g = unit // groups, unit % groups
    i, cols = n * C + tl.arange(0, C), tl.arange(0, D_TILE)
    place = (b * v_b + g * v_h + i.to(tl.int64)[:, None] * v_t) * UNIT + cols
    keys = tl.load(k + place, mask=(i < tokens)[:, None] & (cols < D), other=0.0).to(tl.float32)
    for r in range(REPEAT):
        bh = b * heads + g * REPEAT + r
        query = tl.load(q + b * q_b + (g * REPEAT + r) * q_h + cols, mask=cols < D, other=0.0).to(tl.float32) * scale
        tl.store(s + bh * tokens + i, tl.sum(keys * query[None, :], 1), mask=i < tokens)


@triton.jit(do_not_specialize=VARIES)
def prefix_scores_back(
    q, k, d_s, parts, d_k, q_b, q_h, v_b, v_h, v_t, scale, heads, tokens, length, segments,
    REPEAT: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """d_k [B, G, T, D], and what each segment gives to the gradient of scale q, [B, H, segments, D]."""
    pid = tl.program_id(0)
    n, unit = pid % segments, (pid // segments).to(tl.int64)
    groups = heads // REPEAT
    b, g = unit // groups, unit % groups
    cols = tl.arange(0, D_TILE)
    q += b * q_b + g * REPEAT * q_h + cols
    d_s += (b * heads + g * REPEAT) * tokens
    parts += ((b * heads + g * REPEAT) * segments + n) * D + cols
    k += (b * v_b + g * v_h) * UNIT + cols
    d_k += unit * tokens * D + cols
    stride = v_t.to(tl.int64) * UNIT
    start = n * length
    stop = tl.minimum(start + length, tokens)
    for r in range(REPEAT):
        acc = tl.zeros([C, D_TILE], tl.float32)
        for at in range(start, stop, C):
            i = at + tl.arange(0, C)
            d = tl.load(d_s + tl.cast(r, tl.int64) * tokens + i, mask=i < stop, other=0.0)
            there = (i < stop)[:, None] & (cols < D)
            acc += d[:, None] * tl.load(k + i.to(tl.int64)[:, None] * stride, mask=there, other=0.0).to(tl.float32)
        tl.store(parts + tl.cast(r, tl.int64) * segments * D, tl.sum(acc, 0), mask=cols < D)
    for at in range(start, stop, C):
        i = at + tl.arange(0, C)
        total = tl.zeros([C, D_TILE], tl.float32)
        for r in range(REPEAT):
            d = tl.load(d_s + tl.cast(r, tl.int64) * tokens + i, mask=i < stop, other=0.0)
            query = tl.load(q + tl.cast(r, tl.int64) * q_h, mask=cols < D, other=0.0).to(tl.float32) * scale
            total += d[:, None] * query[None, :]
        there = (i < stop)[:, None] & (cols < D)
        tl.store(d_k + i.to(tl.int64)[:, None] * D, total.to(d_k.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=VARIES)
def prefix_scores_query(
    parts, d_q, scale, tokens, segments, D: tl.constexpr, D_TILE: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """d_q [B, H, tokens, D]: of the first token scale times the sum of what segments give, of the others 0."""
    pid, tiles = tl.program_id(0), (tokens + C - 1) // C
    n, bh = pid % tiles, (pid // tiles).to(tl.int64)
    r, cols = tl.arange(0, C), tl.arange(0, D_TILE)
    tile = tl.zeros([C, D_TILE], tl.float32)
    if n == 0:
        for first in range(0, segments, C):
            there = (first + r < segments)[:, None] & (cols < D)
            tile += tl.load(parts + (bh * segments + first + r)[:, None] * D + cols, mask=there, other=0.0)
        tile = tl.where((r == 0)[:, None], tl.sum(tile, 0)[None, :] * scale, 0.0)
    i = n * C + r
    place = (bh * tokens + i)[:, None] * D + cols
    tl.store(d_q + place, tile.to(d_q.dtype.element_ty), mask=(i < tokens)[:, None] & (cols < D))


def refusal(scores: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, None if they can."""
    if scores.dtype != torch.float32 or v.dtype not in DTYPES:
        return f"takes float32 scores and bfloat16, float16 or float32 values, not {scores.dtype} and {v.dtype}"
    if v.shape[3] > WIDEST:
        return f"takes values up to a width of {WIDEST}, got {v.shape[3]}"
    if not (scores.numel() and v.numel()):
        return "takes no empty tensors"
    return None


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `averages` takes these tensors."""
    if q.dtype not in DTYPES or k.dtype not in DTYPES or v.dtype not in DTYPES:
        return False
    return max(k.shape[3], v.shape[3]) <= WIDEST and bool(q.numel() and k.numel() and v.numel())


def averages(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: bool) -> Tensor | tuple[Tensor, ...]:
    """out [B, H, T, E] of scores scale q[0] . k[t]; where `keep`, also what averages_backward needs."""
    s = scores(q[:, :, 0], k, scale)
    out, rest, lse, *_ = forward(s, v, None, keep)
    if not keep:
        return out
    return (out, s, lse) if rest is None else (out, s, lse, rest)


def averages_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *more
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and, for each query head, v.

    Args:
        more: what `averages` has kept, and the scale.
    """
    s, lse, *rest, scale = more
    d_scores, d_v, _, _ = backward(d_out, None, None, s, v, out, rest[0] if rest else None, lse, None)
    return *scores_backward(d_scores, q[:, :, 0], k, scale, q.shape[2]), d_v


def scores(query: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    """scale query . k[t] in float32, [B, H, T], of query [B, H, D] and k [B, G, T, D]."""
    (batch, heads, width), tokens = query.shape, k.shape[2]
    (k, k_at), (query, query_at) = _dense(k), _rows_dense(query)
    unit = math.gcd(16 // k.element_size(), width, *k_at)
    out = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    blocks = -(-tokens // 64)
    start(
        prefix_scores, (blocks * batch * k.shape[1],), query, k, out, *query_at, *(n // unit for n in k_at), scale,
        heads, tokens, blocks,
        REPEAT=heads // k.shape[1], D=width, D_TILE=padded(width), UNIT=unit, C=64, num_warps=4,
    )  # fmt: skip
    return out


def scores_backward(
    d_scores: Tensor, query: Tensor, k: Tensor, scale: float = 1.0, queries: int = 1
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `queries` tokens, [B, H, queries, D], of which the first is the query, and of k."""
    (batch, heads, width), tokens, groups = query.shape, k.shape[2], k.shape[1]
    d_k, d_q = k.new_empty(batch, groups, tokens, width), query.new_empty(batch, heads, queries, width)
    (k, k_at), (query, query_at) = _dense(k), _rows_dense(query)
    unit = math.gcd(16 // k.element_size(), width, *k_at)
    length, segments = plan(batch * groups, tokens, 64, k.device)
    parts = query.new_empty(batch, heads, segments, width, dtype=torch.float32)
    start(
        prefix_scores_back, (segments * batch * groups,), query, k, d_scores.contiguous(), parts, d_k,
        *query_at, *(n // unit for n in k_at), scale, heads, tokens, length, segments,
        REPEAT=heads // groups, D=width, D_TILE=padded(width), UNIT=unit, C=32, num_warps=4,
    )  # fmt: skip
    start(
        prefix_scores_query, (-(-queries // 64) * batch * heads,), parts, d_q, scale, queries, segments,
        D=width, D_TILE=padded(width), C=64, num_warps=4,
    )  # fmt: skip
    return d_q, d_k


def _rows_dense(query: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """[B, H, D] whose rows have no gaps, and its other strides."""
    if query.stride(2) != 1:
        query = query.contiguous()
    return query, query.stride()[:2]


def forward(
    scores: Tensor, v: Tensor, state: tuple[Tensor, Tensor, Tensor] | None, recorded: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """out [B, H, T, E], what rounding took from it, lse [B, H, T], and peak, mass and total at the end; the contract is
    ops.scan's.

    recorded: gradients will be asked for; without it, or where nothing was rounded, there is no rest.
    """
    batch, heads, tokens = scores.shape
    width = v.shape[3]
    v, v_at = _dense(v)
    out = v.new_empty(batch, heads, tokens, width)
    rest = torch.empty_like(out) if recorded and v.dtype != torch.float32 else None
    lse, peak, mass = scores.new_empty(scores.shape), scores.new_empty(batch, heads), scores.new_empty(batch, heads)
    total = scores.new_empty(batch, heads, width)
    chunk, warps = tile(v, back=False)
    length, segments = plan(batch * heads, tokens, chunk, v.device)
    peaks, masses = (scores.new_empty(batch, heads, segments) for _ in range(2))
    totals = scores.new_empty(batch, heads, segments, width)
    numbers = *scores.stride(), *v_at, heads, tokens, length, segments
    constants = {"REPEAT": heads // v.shape[1], "E": width, "E_TILE": padded(width), "C": chunk, "num_warps": warps}
    if segments > 1:
        start(
            prefix_sums, ((segments - 1) * batch * heads,), scores, v, peaks, masses, totals, *numbers, **constants
        )  # fmt: skip
    before = (None, None, None) if state is None else [x.contiguous() for x in state]
    start(
        prefix_walk, (segments * batch * heads,), scores, v, peaks, masses, totals, *before, out, rest, lse, peak, mass,
        total, *numbers, **constants,
    )  # fmt: skip
    return out, rest, lse, peak, mass, total


def backward(
    d_out: Tensor, d_mass: Tensor | None, d_total: Tensor | None, scores: Tensor, v: Tensor, out: Tensor,
    rest: Tensor | None, lse: Tensor, mass: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of scores and, for each query head, of v; and of the mass and total before the first token, divided by
    e^(peak - lse of the first token). `mass`, at the end, is read where d_mass or d_total is there."""
    batch, heads, tokens = scores.shape
    width = v.shape[3]
    (v, v_at), (d_out, g_at) = _dense(v), _dense(d_out)
    d_scores, d_v = scores.new_empty(scores.shape), v.new_empty(batch, heads, tokens, width)
    d_first, d_first_total = scores.new_empty(batch, heads), scores.new_empty(batch, heads, width)
    chunk, warps = tile(v, back=True)
    length, segments = plan(batch * heads, tokens, chunk, v.device)
    later, deltas = scores.new_empty(batch, heads, segments, width), scores.new_empty(batch, heads, segments)
    numbers = heads, tokens, length, segments
    constants = {"E": width, "E_TILE": padded(width), "C": chunk, "num_warps": warps}
    if segments > 1:
        start(
            prefix_back_sums, ((segments - 1) * batch * heads,), out, rest, lse, d_out, later, deltas, *g_at, *numbers,
            **constants,
        )  # fmt: skip
    if d_total is not None or d_mass is not None:
        d_mass = torch.zeros_like(d_first) if d_mass is None else d_mass.contiguous()
        d_total = torch.zeros_like(d_first_total) if d_total is None else d_total.contiguous()
    start(
        prefix_back, (segments * batch * heads,), scores, v, out, rest, lse, d_out, later, deltas, d_mass, d_total,
        mass, d_scores, d_v, d_first_total, d_first,
        *scores.stride(), *v_at, *g_at, *numbers, REPEAT=heads // v.shape[1], **constants,
    )  # fmt: skip
    return d_scores, d_v, d_first, d_first_total


def tile(v: Tensor, back: bool) -> tuple[int, int]:
    """Tokens of a chunk and warps of a program."""
    wide = padded(v.shape[3])
    if v.dtype == torch.float32:
        # IEEE products run on no tensor core, and their operands lie in registers
        return (16, 8 if back and wide > 64 else 4) if back or wide > 128 else (32, 4)
    # one warp, whose sums pass through no shared memory
    return 16, 1 if wide <= 128 else 2


PLACES = 8  # programs of a multiprocessor


def plan(programs: int, tokens: int, chunk: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a segment, and segments, none below two chunks."""
    places = PLACES * torch.cuda.get_device_properties(device).multi_processor_count
    segments = max(1, min(places // programs, -(-tokens // (2 * chunk))))
    length = -(-tokens // (segments * chunk)) * chunk
    return length, -(-tokens // length)
