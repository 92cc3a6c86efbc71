"""Gradients of several readers added up in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import padded
from farfield.kernels.replay import start

Pair = tuple[Tensor, Tensor]

MOST = 4
SIZE = 2048  # elements of a program


@triton.jit(do_not_specialize=["total"])
def add_up(x0, x1, x2, x3, out, total, factor, MANY: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < total
    found = tl.load(x0 + at, mask=there, other=0.0).to(tl.float32)
    found += tl.load(x1 + at, mask=there, other=0.0).to(tl.float32)
    if MANY > 2:
        found += tl.load(x2 + at, mask=there, other=0.0).to(tl.float32)
    if MANY > 3:
        found += tl.load(x3 + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, (found * factor).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens", "tiles", "rows"])
def spread_rows(
    a_k, a_v, b_k, b_v, rows_k, rows_v, out_k, out_v, tokens, tiles, rows, factor,
    STRIDE: tl.constexpr, SPAN: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradients of tokens: two that are there, and a share of that of each row that is a mean of the token."""
    pid = tl.program_id(0).to(tl.int64)
    which, tile, unit = pid % 2, pid // 2 % tiles, pid // 2 // tiles
    if which == 0:
        a, b, means, out = a_k, b_k, rows_k, out_k
    else:
        a, b, means, out = a_v, b_v, rows_v, out_v
    i = tile * TOKENS + tl.arange(0, TOKENS)
    dims = tl.arange(0, D_TILE)
    asked = (i < tokens)[:, None] & (dims < D)
    at = (unit * tokens + i)[:, None] * D + dims
    found = tl.zeros([TOKENS, D_TILE], tl.float32)
    for n in tl.static_range(SPAN // STRIDE):
        c = i // STRIDE - n
        there = asked & ((c >= 0) & (c < rows))[:, None]
        found += tl.load(means + (unit * rows + c)[:, None] * D + dims, mask=there, other=0.0)
    found *= 1.0 / SPAN
    found += tl.load(a + at, mask=asked, other=0.0).to(tl.float32)
    found += tl.load(b + at, mask=asked, other=0.0).to(tl.float32)
    tl.store(out + at, (found * factor).to(out.dtype.element_ty), mask=asked)


def add(grads: Sequence[Tensor], factor: float = 1.0) -> Tensor:
    """The sum of two to four tensors of one shape and dtype, times a factor."""
    grads = [x.contiguous() for x in grads]
    out = torch.empty_like(grads[0])
    total, more = out.numel(), [out] * (MOST - len(grads))
    start(
        add_up, (-(-total // SIZE),),
        *grads, *more, out, total, factor, MANY=len(grads), SIZE=SIZE, num_warps=8,
    )  # fmt: skip
    return out


def spread(a: Pair, b: Pair, means: Pair, stride: int, span: int, factor: float) -> Pair:
    """Gradients of keys and values: a + b, and those of means of `span` tokens, one every `stride`; times a factor.

    Args:
        a, b: of so many elements, in the order [B, G, T, D].
        means: float32 [B, G, C, D].
    """
    (a_k, a_v), (b_k, b_v) = a, b
    batch, heads, tokens, width = a_k.shape
    out_k, out_v = torch.empty_like(a_k), torch.empty_like(a_v)
    some = max(1, SIZE // padded(width))
    tiles = -(-tokens // some)
    start(
        spread_rows, (2 * batch * heads * tiles,),
        a_k, a_v, b_k, b_v, *means, out_k, out_v, tokens, tiles, means[0].shape[2], factor,
        STRIDE=stride, SPAN=span, D=width, D_TILE=padded(width), TOKENS=some, num_warps=8,
    )  # fmt: skip
    return out_k, out_v
