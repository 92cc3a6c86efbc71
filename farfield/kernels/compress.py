"""Compressed rows on the GPU: the mean of each block of rows, and what an MLP of the block adds to it.

One launch splits the weights of the MLP into two numbers of the rows' dtype each, whose products the tensor cores add
up in float32 (an element is off by at most 2^-16 of itself in bfloat16), and takes the products of the learned places
with them. A second goes through the rows of each block once, for keys and values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import _dense, padded
from farfield.kernels.choose import _vector
from farfield.kernels.replay import start

WIDEST = 128
LONG = 1024  # compressed rows from which on a program takes 128 of them instead of 64


@triton.jit(do_not_specialize=["heads", "spans"])
def split_weights(
    inner_k, inner_v, place_k, place_v, planes, places, heads, spans,
    D: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """The weights of one token of a block: planes [2 (k, v), 2, span, D, D]; places [2, span, G, D]."""
    pid = tl.program_id(0)
    which, t = pid // spans, pid % spans
    if which == 0:
        inner, place = inner_k, place_k
    else:
        inner, place = inner_v, place_v
    row, column = tl.arange(0, D_TILE), tl.arange(0, D_TILE)
    mask = (row < D)[:, None] & (column < D)
    at = (t * D + row)[:, None] * D + column
    weights = tl.load(inner + at, mask=mask, other=0.0)
    hi = weights.to(planes.dtype.element_ty)
    to = planes + which * 2 * spans * D * D
    tl.store(to + at, hi, mask=mask)
    tl.store(to + spans * D * D + at, (weights - hi.to(tl.float32)).to(planes.dtype.element_ty), mask=mask)
    for g in range(heads):
        where = tl.load(place + (g * spans + t) * D + row, mask=row < D, other=0.0)
        found = tl.sum(weights * where[:, None], 0)
        tl.store(places + ((which * spans + t) * heads + g) * D + column, found, mask=column < D)


@triton.jit(do_not_specialize=["heads", "rows", "tiles", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t"])
def compress_rows(
    k, v, planes, places, outer_k, outer_v, out_k, out_v, kept, heads, rows, tiles, k_b, k_h, k_t, v_b, v_h, v_t,
    STRIDE: tl.constexpr, SPAN: tl.constexpr, SPAN_TILE: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
    UNIT: tl.constexpr, BC: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """BC compressed rows of one head of k or of v, float32; what goes into the gelu is kept where it is asked for."""
    pid = tl.program_id(0).to(tl.int64)
    which, tile, unit = pid % 2, pid // 2 % tiles, pid // 2 // tiles
    b, g = unit // heads, unit % heads
    if which == 0:
        x, out, token = k + (b * k_b + g * k_h) * UNIT, out_k, k_t
    else:
        x, out, token = v + (b * v_b + g * v_h) * UNIT, out_v, v_t
    c = tile * BC + tl.arange(0, BC)
    dims = tl.arange(0, D_TILE)
    mask = (c < rows)[:, None] & (dims < D)
    x += (c * STRIDE * token)[:, None] * UNIT + dims
    to = out + (unit * rows + c)[:, None] * D + dims
    mean = tl.zeros([BC, D_TILE], tl.float32)
    # loads that are under way together
    for t in tl.range(SPAN, loop_unroll_factor=SPAN if not LEARNED else 1):
        mean += tl.load(x + t * token.to(tl.int64) * UNIT, mask=mask, other=0.0).to(tl.float32)
    # where there is more to come it waits there, not in registers
    tl.store(to, mean * (1.0 / SPAN), mask=mask)
    if LEARNED:
        inside = (dims < D)[:, None] & (dims < D)
        weights = planes + which * 2 * SPAN * D * D + dims[:, None] * D + dims
        hidden = tl.zeros([BC, D_TILE], tl.float32)
        for t in range(SPAN):
            x_tile = tl.load(x + t * token.to(tl.int64) * UNIT, mask=mask, other=0.0)
            lo = tl.load(weights + (SPAN + t) * D * D, mask=inside, other=0.0)
            hi = tl.load(weights + t * D * D, mask=inside, other=0.0)
            # tensor cores truncate when they add: a token at a time there, all of them here
            part = tl.dot(x_tile, lo)
            hidden += tl.dot(x_tile, hi, part)
        t = tl.arange(0, SPAN_TILE)
        at = ((which * SPAN + t) * heads + g)[:, None] * D + dims
        hidden += tl.sum(tl.load(places + at, mask=(t < SPAN)[:, None] & (dims < D), other=0.0), 0)[None, :]
        if kept is not None:
            lines = which * (tl.num_programs(0) // (2 * tiles)) + unit
            tl.store(kept + (lines * rows + c)[:, None] * D + dims, hidden, mask=mask)
        hidden = 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))
        if which == 0:
            outer = tl.load(outer_k + dims[:, None] * D + dims, mask=inside, other=0.0)
        else:
            outer = tl.load(outer_v + dims[:, None] * D + dims, mask=inside, other=0.0)
        # Triton 3.6 gets "tf32x3" wrong here with four warps
        big, outer_big = hidden.to(k.dtype.element_ty), outer.to(k.dtype.element_ty)
        small = (hidden - big.to(tl.float32)).to(k.dtype.element_ty)
        outer_small = (outer - outer_big.to(tl.float32)).to(k.dtype.element_ty)
        added = tl.dot(small, outer_big)
        added = tl.dot(big, outer_small, added)
        added = tl.dot(big, outer_big, added)
        tl.debug_barrier()
        tl.store(to, tl.load(to, mask=mask, other=0.0) + added, mask=mask)


def compress(*given) -> tuple[Tensor, ...]:
    """Compressions of k and v, float32 [B, G, rows, D].

    Args:
        given: k, v, and with an MLP the inner weights of both [span D, D], the places [G, span, D], the outer weights
            [D, D], float32 and dense; then stride, span, rows, and whether there will be a backward.

    Returns:
        for a backward through an MLP also what goes into its gelu, [2 (k, v), B, G, rows, D].
    """
    *tensors, stride, span, rows, trained = given
    k, v, *mlp = tensors
    batch, heads, _, width = k.shape
    out = [torch.empty(batch, heads, rows, width, dtype=torch.float32, device=k.device) for _ in range(2)]
    k, k_at = _dense(k)
    v, v_at = _dense(v)
    unit, d_tile = _vector(k, width, *k_at, *v_at), padded(width)
    planes = places = outer_k = outer_v = kept = None
    if mlp:
        inner_k, inner_v, place_k, place_v, outer_k, outer_v = mlp
        planes = torch.empty(2, 2, span, width, width, dtype=k.dtype, device=k.device)
        places = torch.empty(2, span, heads, width, dtype=torch.float32, device=k.device)
        if trained:
            kept = torch.empty(2, batch, heads, rows, width, dtype=torch.float32, device=k.device)
        start(
            split_weights, (2 * span,), inner_k, inner_v, place_k, place_v, planes, places, heads, span,
            D=width, D_TILE=d_tile, num_warps=8,
        )  # fmt: skip
    step = 128 if mlp and rows * heads * batch > LONG * 4 else 64 if mlp else 16
    tiles = -(-rows // step)
    start(
        compress_rows, (2 * batch * heads * tiles,),
        k, v, planes, places, outer_k, outer_v, *out, kept, heads, rows, tiles, *[n // unit for n in (*k_at, *v_at)],
        STRIDE=stride, SPAN=span, SPAN_TILE=padded(span, 1), D=width, D_TILE=d_tile, UNIT=unit, BC=step,
        LEARNED=bool(mlp), num_warps=8 if step == 128 else 4, num_stages=2,
    )  # fmt: skip
    return (*out,) if kept is None else (*out, kept)
