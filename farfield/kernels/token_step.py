"""What a decoding step does between its products, a launch each: a short convolution, norms and rotations of the heads,
and a token's way into a ring of tokens. Positions are read on the device, so that a CUDA graph serves every token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.append import HIDDEN, _halves, _turn

CHANNELS = 256  # that a program squares
ROWS = 1024  # of a block whose positions are hidden at a time


@triton.jit
def _placed(x, gain, factor, NORM: tl.constexpr, GROWN: tl.constexpr, D: tl.constexpr, mean, dtype: tl.constexpr):
    if NORM:
        x = (x * tl.rsqrt(mean + 1e-6) * gain).to(dtype).to(tl.float32)
    if GROWN:
        x = (x * factor).to(dtype).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["grown", "inverse"])
def place(
    q, k, gain, position, turns, q_out, k_out, q_strides, k_strides, grown, inverse,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, PAIRS: tl.constexpr,
    NORM: tl.constexpr, GROWN: tl.constexpr,
):  # fmt: skip
    """A head of q or k of one token: unit RMS, gain, growth with the position, rotation.

    Args:
        turns: turns a token of each rotated pair of channels, float64.
        grown, inverse: n and 1 / log(n) of queries that grow from position n on.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // (HEADS + KV_HEADS), pid % (HEADS + KV_HEADS)
    t = tl.load(position + b)
    if h < HEADS:
        scale = tl.load(gain + h).to(tl.float32) if NORM else 1.0
        factor = tl.log(tl.maximum(t + 1, grown).to(tl.float32)) * inverse if GROWN else 1.0
        _place_head(
            q + b * q_strides[0] + h * q_strides[1], q_out + (b * HEADS + h) * D, t, scale, factor, turns, D, D_TILE,
            PAIRS, NORM, GROWN,
        )  # fmt: skip
    else:
        g = h - HEADS
        _place_head(
            k + b * k_strides[0] + g * k_strides[1], k_out + (b * KV_HEADS + g) * D, t, 1.0, 1.0, turns, D, D_TILE,
            PAIRS, NORM, False,
        )  # fmt: skip


@triton.jit
def _place_head(
    x, out, t, scale, factor, turns,
    D: tl.constexpr, D_TILE: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, GROWN: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, D_TILE)
    held = dims < D
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.load(x + dims, mask=held, other=0.0).to(tl.float32)
    mean = tl.sum(row * row, 0) / D
    row = _placed(row, scale, factor, NORM, GROWN, D, mean, dtype)
    if PAIRS:
        partner, rate, side = _halves(dims, turns, PAIRS)
        other = tl.load(x + partner, mask=held, other=0.0).to(tl.float32)
        other = _placed(other, scale, factor, NORM, GROWN, D, mean, dtype)
        row = _turn(row, other, t.to(tl.float64), rate, side)
    tl.store(out + dims, row.to(dtype), mask=held)


@triton.jit(do_not_specialize=["capacity", "rows"])
def append_token(
    k, v, ring_k, ring_v, end, count, position, clock, k_strides, v_strides, capacity, rows,
    HEADS: tl.constexpr, HEAD_TILE: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr,
    E_TILE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TILE: tl.constexpr, SINKS: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """The contract is ops.append_token's; a program for each sequence."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.load(clock + b)
    span = (rows - SINKS).to(tl.int64)
    row = tl.where(t < SINKS, t, SINKS + t % span)
    heads, dims, values = tl.arange(0, HEAD_TILE), tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    full = t >= capacity
    held = (heads < HEADS)[:, None] & (dims < D)[None, :]
    x = tl.load(k + b * k_strides[0] + heads[:, None] * k_strides[1] + dims[None, :], mask=held, other=0.0)
    x = tl.where(full, float("nan"), x)
    to = (b * HEADS + heads).to(tl.int64) * rows + row
    tl.store(ring_k + to[:, None] * D + dims[None, :], x.to(ring_k.dtype.element_ty), mask=held)
    held = (heads < HEADS)[:, None] & (values < E)[None, :]
    x = tl.load(v + b * v_strides[0] + heads[:, None] * v_strides[1] + values[None, :], mask=held, other=0.0)
    x = tl.where(full, float("nan"), x)
    tl.store(ring_v + to[:, None] * E + values[None, :], x.to(ring_v.dtype.element_ty), mask=held)
    end += b * rows
    if t % BLOCK == 0:
        # what the block's rows held is forgotten
        first = SINKS + t % span
        for start in range(0, BLOCK, BLOCK_TILE):
            into = start + tl.arange(0, BLOCK_TILE)
            tl.store(end + first + into, tl.full([BLOCK_TILE], HIDDEN, tl.int64), mask=into < BLOCK)
        tl.debug_barrier()
    tl.store(end + row, t)
    tl.store(count + b, (tl.minimum(t + SINKS, rows - 1) // ENTRY + 1).to(tl.int32))
    tl.store(position + b, t)
    tl.debug_barrier()
    tl.store(clock + b, t + 1)


def launch_place(
    q: Tensor, k: Tensor, gain: Tensor | None, position: Tensor, turns: Tensor, grown: int, inverse: float
) -> tuple[Tensor, Tensor]:
    """The contract is ops.token_step's."""
    batch, heads, _, width = q.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    place[(batch * (heads + k.shape[1]),)](
        q, k, position if gain is None else gain, position, turns, q_out, k_out, q.stride()[:2], k.stride()[:2], grown,
        inverse, HEADS=heads, KV_HEADS=k.shape[1], D=width, D_TILE=triton.next_power_of_2(width), PAIRS=turns.numel(),
        NORM=gain is not None, GROWN=grown > 0, num_warps=1,
    )  # fmt: skip
    return q_out, k_out


def launch_append(
    k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, end: Tensor, count: Tensor, position: Tensor, clock: Tensor,
    block: int, sinks: int, capacity: int, entry: int,
) -> None:  # fmt: skip
    """The contract is ops.append_token's; the ring's buffers are contiguous."""
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    tile = triton.next_power_of_2
    append_token[(len(clock),)](
        k, v, ring_k, ring_v, end, count, position, clock, k.stride()[:2], v.stride()[:2], capacity, ring_k.shape[2],
        HEADS=k.shape[1], HEAD_TILE=tile(k.shape[1]), D=k.shape[3], E=v.shape[3], D_TILE=tile(k.shape[3]),
        E_TILE=tile(v.shape[3]), BLOCK=block, BLOCK_TILE=min(ROWS, tile(block)), SINKS=sinks, ENTRY=entry, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["epsilon"])
def norm(
    x, more, gain, recent, taps, x_out, out, epsilon,
    W: tl.constexpr, TILE: tl.constexpr, MORE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A sequence's x [W] + more, and its RMS norm, after a convolution of SIZE taps if there are any."""
    b = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, TILE)
    inside = channel < W
    row = tl.load(x + b * W + channel, mask=inside, other=0.0).to(tl.float32)
    if MORE:
        row += tl.load(more + b * W + channel, mask=inside, other=0.0).to(tl.float32)
        row = row.to(x_out.dtype.element_ty).to(tl.float32)
        tl.store(x_out + b * W + channel, row.to(x_out.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(row * row, 0) / W + epsilon)
    row = row * scale * tl.load(gain + channel, mask=inside, other=0.0).to(tl.float32)
    if SIZE:
        new = row.to(recent.dtype.element_ty)
        recent += b * (SIZE - 1) * W
        row = new.to(tl.float32) * tl.load(taps + (SIZE - 1) * W + channel, mask=inside, other=0.0).to(tl.float32)
        for j in tl.static_range(SIZE - 1):
            before = tl.load(recent + j * W + channel, mask=inside, other=0.0)
            row += before.to(tl.float32) * tl.load(taps + j * W + channel, mask=inside, other=0.0).to(tl.float32)
            if j:
                # each thread moves up what it alone reads
                tl.store(recent + (j - 1) * W + channel, before, mask=inside)
        if SIZE > 1:
            tl.store(recent + (SIZE - 2) * W + channel, new, mask=inside)
    tl.store(out + b * W + channel, row.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["many"])
def square(x, out, many, TILE: tl.constexpr):
    """relu(x)^2."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.maximum(tl.load(x + at, mask=at < many, other=0.0).to(tl.float32), 0.0)
    tl.store(out + at, (row * row).to(out.dtype.element_ty), mask=at < many)


def launch_norm(
    x: Tensor, more: Tensor | None, gain: Tensor, epsilon: float, recent: Tensor | None, taps: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [B, 1, W] and all others contiguous."""
    batch, _, width = x.shape
    x_out = x if more is None else torch.empty_like(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    tile = triton.next_power_of_2(width)
    norm[(batch,)](
        x, x if more is None else more, gain, x if recent is None else recent, x if taps is None else taps, x_out, out,
        epsilon, W=width, TILE=tile, MORE=more is not None, SIZE=0 if taps is None else len(taps),
        num_warps=max(1, min(8, tile // 128)),
    )  # fmt: skip
    return x_out, out


def launch_square(x: Tensor) -> Tensor:
    """A contiguous x."""
    out = torch.empty_like(x)
    square[(-(-x.numel() // CHANNELS),)](x, out, x.numel(), TILE=CHANNELS, num_warps=2)
    return out
