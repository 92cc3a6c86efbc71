"""A gated sum of branches on the GPU: every branch is read once, in the forward and in the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import _dense, padded
from farfield.kernels.choose import _vector
from farfield.kernels.replay import start

BRANCHES = 3
ROWS = 64  # queries of a program
WIDEST = 128


@triton.jit
def _gates(
    n: tl.constexpr, q_tile, gate, bias, shares, g, line, asked, dims,
    D: tl.constexpr, GIVEN: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """Gate n of each query, and its row of weights."""
    weights = tl.zeros([dims.shape[0]], tl.float32)
    if GIVEN:
        share = tl.load(shares + line * 3 + n, mask=asked, other=0.0).to(tl.float32)
    elif LEARNED:
        weights = tl.load(gate + (g * D + dims) * 3 + n, mask=dims < D, other=0.0).to(tl.float32)
        logit = tl.sum(q_tile * weights[None, :], 1) + tl.load(bias + g * 3 + n).to(tl.float32)
        share = 1.0 / (1.0 + tl.exp(-logit))
    else:
        share = tl.full([asked.shape[0]], 0.5, tl.float32)
    return share, weights


@triton.jit(do_not_specialize=["heads", "tokens", "tiles", "q_b", "q_h", "q_t"])
def mix_forward(
    part0, part1, part2, q, gate, bias, shares, out, heads, tokens, tiles, q_b, q_h, q_t,
    REPEAT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_UNIT: tl.constexpr, ROWS: tl.constexpr, GIVEN: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    bh, tile = pid // tiles, pid % tiles
    b, h = bh // heads, bh % heads
    g = h // REPEAT
    i = tile * ROWS + tl.arange(0, ROWS)
    asked = i < tokens
    line = bh * tokens + i
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    q_tile = tl.zeros([ROWS, D_TILE], tl.float32)
    if LEARNED:
        q_at = q + (b * q_b + h * q_h + i * q_t)[:, None] * D_UNIT + dims
        q_tile = tl.load(q_at, mask=asked[:, None] & (dims < D), other=0.0).to(tl.float32)
    at, mask = line[:, None] * E + values, asked[:, None] & (values < E)
    acc = tl.zeros([ROWS, E_TILE], tl.float32)
    for n in tl.static_range(3):
        part = part0 if n == 0 else part1 if n == 1 else part2
        share, _ = _gates(n, q_tile, gate, bias, shares, g, line, asked, dims, D, GIVEN, LEARNED)
        acc += share[:, None] * tl.load(part + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads", "tokens", "tiles", "q_b", "q_h", "q_t", "d_b", "d_h", "d_t"])
def mix_backward(
    part0, part1, part2, q, gate, bias, shares, d_out, d_part0, d_part1, d_part2, d_q, d_gate, d_bias, d_shares,
    heads, tokens, tiles, q_b, q_h, q_t, d_b, d_h, d_t,
    REPEAT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_UNIT: tl.constexpr, E_UNIT: tl.constexpr, ROWS: tl.constexpr, GIVEN: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """Gradients of the branches, and of q or the gates; those of the weights as one sum a program."""
    pid = tl.program_id(0).to(tl.int64)
    bh, tile = pid // tiles, pid % tiles
    b, h = bh // heads, bh % heads
    g = h // REPEAT
    i = tile * ROWS + tl.arange(0, ROWS)
    asked = i < tokens
    line = bh * tokens + i
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    mask_d, mask_e = asked[:, None] & (dims < D), asked[:, None] & (values < E)
    q_tile = tl.zeros([ROWS, D_TILE], tl.float32)
    if LEARNED:
        q_at = q + (b * q_b + h * q_h + i * q_t)[:, None] * D_UNIT + dims
        q_tile = tl.load(q_at, mask=mask_d, other=0.0).to(tl.float32)
    d_at = d_out + (b * d_b + h * d_h + i * d_t)[:, None] * E_UNIT + values
    d_tile = tl.load(d_at, mask=mask_e, other=0.0).to(tl.float32)
    at = line[:, None] * E + values
    found = tl.zeros([ROWS, D_TILE], tl.float32)
    for n in tl.static_range(3):
        part = part0 if n == 0 else part1 if n == 1 else part2
        d_part = d_part0 if n == 0 else d_part1 if n == 1 else d_part2
        share, weights = _gates(n, q_tile, gate, bias, shares, g, line, asked, dims, D, GIVEN, LEARNED)
        tl.store(d_part + at, (share[:, None] * d_tile).to(d_part.dtype.element_ty), mask=mask_e)
        if GIVEN or LEARNED:
            d_share = tl.sum(d_tile * tl.load(part + at, mask=mask_e, other=0.0).to(tl.float32), 1)
            if GIVEN:
                tl.store(d_shares + line * 3 + n, d_share.to(d_shares.dtype.element_ty), mask=asked)
            else:
                d_logit = tl.where(asked, d_share * share * (1.0 - share), 0.0)
                found += d_logit[:, None] * weights[None, :]
                tl.store(d_gate + (pid * D + dims) * 3 + n, tl.sum(q_tile * d_logit[:, None], 0), mask=dims < D)
                tl.store(d_bias + pid * 3 + n, tl.sum(d_logit, 0))
    if LEARNED:
        tl.store(d_q + line[:, None] * D + dims, found.to(d_q.dtype.element_ty), mask=mask_d)


def mixed(*given) -> Tensor:
    """`mix` of tensors that are all there: q, the branches and what the last three, bools, say of the others."""
    q, part0, part1, part2, *rest = given[:-3]
    there = iter(rest)
    return mix((part0, part1, part2), q, *[next(there) if some else None for some in given[-3:]])


def mix(
    parts: tuple[Tensor, Tensor, Tensor], q: Tensor, gate: Tensor | None, bias: Tensor | None, shares: Tensor | None
) -> Tensor:
    """out [B, H, T, E] in q's dtype; the contract is ops.mix's."""
    batch, heads, tokens, width = q.shape
    value_width, kv_heads = parts[0].shape[3], 1 if gate is None else gate.shape[0]
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    q, q_at = _dense(q)
    unit, tiles = _vector(q, width, *q_at), -(-tokens // ROWS)
    start(
        mix_forward, (batch * heads * tiles,),
        *[x.contiguous() for x in parts], q, *_weights(gate, bias, shares), out, heads, tokens, tiles,
        *[n // unit for n in q_at], heads // kv_heads, width, value_width, padded(width), padded(value_width), unit,
        ROWS, shares is not None, gate is not None, num_warps=8,
    )  # fmt: skip
    return out


def mix_gradients(
    parts: tuple[Tensor, Tensor, Tensor], q: Tensor, gate: Tensor | None, bias: Tensor | None, shares: Tensor | None,
    d_out: Tensor,
) -> tuple[list[Tensor], Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Of the branches, q, gate and bias (float32), and the gates that were given; None of what has none."""
    batch, heads, tokens, width = q.shape
    value_width, kv_heads = parts[0].shape[3], 1 if gate is None else gate.shape[0]
    parts = [x.contiguous() for x in parts]
    d_parts = [torch.empty_like(x) for x in parts]
    q, q_at = _dense(q)
    d_out, d_at = _dense(d_out)
    d_unit, e_unit, tiles = _vector(q, width, *q_at), _vector(d_out, value_width, *d_at), -(-tokens // ROWS)
    d_q = d_gate = d_bias = d_shares = None
    if shares is not None:
        d_shares = torch.empty(shares.shape, dtype=shares.dtype, device=q.device)
    elif gate is not None:
        d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        d_gate = torch.empty(batch, kv_heads, heads // kv_heads * tiles, width, BRANCHES, device=q.device)
        d_bias = d_gate.new_empty(*d_gate.shape[:3], BRANCHES)
    start(
        mix_backward, (batch * heads * tiles,),
        *parts, q, *_weights(gate, bias, shares), d_out, *d_parts, d_q, d_gate, d_bias, d_shares, heads, tokens, tiles,
        *[n // d_unit for n in q_at], *[n // e_unit for n in d_at], heads // kv_heads, width, value_width,
        padded(width), padded(value_width), d_unit, e_unit, ROWS, shares is not None, gate is not None, num_warps=8,
    )  # fmt: skip
    if d_gate is not None and d_bias is not None:
        d_gate, d_bias = d_gate.sum((0, 2)), d_bias.sum((0, 2))
    return d_parts, d_q, d_gate, d_bias, d_shares


def _weights(*given: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in given]
