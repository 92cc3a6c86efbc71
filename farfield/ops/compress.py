"""compress: each block of rows made into one, keys and values together; on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from farfield.ops import precision
from farfield.ops.eager import eager, recorded

FEW = 64  # rows: what makes fewer is decoding, of which no two calls are alike


class MLP(NamedTuple):
    """What is added to a mean: gelu(flat(block + place) inner) outer, for keys and for values.

    Shapes: inner [span D, D], place [G, span, D], outer [D, D].
    """

    inner_k: Tensor
    inner_v: Tensor
    place_k: Tensor
    place_v: Tensor
    outer_k: Tensor
    outer_v: Tensor


def takes(k: Tensor, v: Tensor, mlp: MLP | None, span: int) -> bool:
    """Whether `compress` does: CUDA tensors of 16 bits and one width, a block at least, float32 weights."""
    if not (k.is_cuda and k.dtype in (torch.bfloat16, torch.float16) and k.shape[3] == v.shape[3]):
        return False
    given = mlp or ()
    if k.shape[2] < span or not k.numel() or not eager(k, v, *given) or any(x.dtype != torch.float32 for x in given):
        return False
    from farfield.kernels.compress import WIDEST

    return k.shape[3] <= WIDEST


def compress(
    k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"], mlp: MLP | None, *, stride: int, span: int, rows: int
) -> tuple[Float[Tensor, "B G C D"], Float[Tensor, "B G C D"]]:
    """The first so many blocks of `span` tokens, one every `stride`: their means, plus the MLP. Float32.

    In the backward products of weights with gradients are made of numbers of the dtype of k, and added up in float32.
    """
    given = mlp or ()
    if recorded(k, v, *given):
        return _Compress.apply(stride, span, rows, k, v, *given)
    found_k, found_v, *_ = _compress(k, v, given, stride, span, rows, False)
    return found_k, found_v


def _compress(
    k: Tensor, v: Tensor, mlp: Sequence[Tensor], stride: int, span: int, rows: int, trained: bool
) -> tuple[Tensor, ...]:
    from farfield.kernels import compress as on_gpu
    from farfield.kernels import plans

    given = [k, v, *[x.contiguous() for x in mlp]]
    if rows < FEW:
        return on_gpu.compress(*given, stride, span, rows, trained)
    return plans.plainly(on_gpu.compress, given, stride, span, rows, trained)


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stride, span, rows, k, v, *mlp):
        found_k, found_v, *kept = _compress(k, v, mlp, stride, span, rows, True)
        ctx.save_for_backward(k, v, *mlp, *kept)
        ctx.plan = stride, span, bool(mlp)
        return found_k, found_v

    @staticmethod
    @once_differentiable
    def backward(ctx, d_k, d_v):
        stride, span, learned = ctx.plan
        k, v, *rest = ctx.saved_tensors
        grads: list[list[Tensor]] = []
        with precision.kept(k):
            for n, (x, d) in enumerate(((k, d_k), (v, d_v))):
                mlp = [*rest[n:6:2], rest[6][n]] if learned else None
                grads.append(gradients(x, d, mlp, stride, span))
        return None, None, None, *[x for pair in zip(*grads, strict=True) for x in pair]


def gradients(x: Tensor, d: Tensor, mlp: Sequence[Tensor] | None, stride: int, span: int) -> list[Tensor]:
    """Of the rows x [B, G, S, D], and of inner, place and outer if there are these and what goes into the gelu."""
    batch, heads, tokens, width = x.shape
    rows, parts = d.shape[2], span // stride
    pieces, units = rows + parts - 1, batch * heads

    def spread(y: Tensor) -> list[Tensor]:
        """What each piece of `stride` tokens gets from each of the blocks that it lies in."""
        return [torch.nn.functional.pad(y, (0, 0, n, parts - 1 - n)) for n in range(parts)]

    mean = torch.stack(spread(d)).sum(0) / span
    found = []
    if mlp is None:
        d_x = mean.to(x.dtype)[:, :, :, None].expand(-1, -1, -1, stride, -1).flatten(2, 3)
    else:
        inner, place, outer, hidden = mlp
        d_outer = gelu(hidden).flatten(0, 2).mT @ d.flatten(0, 2)
        d_hidden = torch.ops.aten.gelu_backward(d @ outer.mT, hidden)
        given = d_hidden.sum((0, 2))
        d_place = (given @ inner.mT).view_as(place)
        # float32 as two numbers of 16 bits each, side by side
        big = d_hidden.to(x.dtype)
        both = torch.cat([big, (d_hidden - big).to(x.dtype)], -1).flatten(0, 1)
        used = x[:, :, : pieces * stride].reshape(units, pieces, stride * width)
        d_inner = [_wide(used[:, n : n + rows].mT, both).sum(0) for n in range(parts)]
        d_inner = torch.cat(d_inner).unflatten(1, (2, width)).sum(1) + place.flatten(1).mT @ given
        # a piece's own rows get the same from the mean
        even = torch.eye(width, dtype=x.dtype, device=x.device).repeat(1, stride)
        weights = inner.to(x.dtype).view(parts, stride * width, width).mT.flatten(0, 1)
        sources = torch.cat([*spread(big), mean.to(x.dtype)], -1).flatten(0, 1)
        d_x = (sources @ torch.cat([weights, even])).view(batch, heads, pieces * stride, width)
        found = [d_inner, d_place, d_outer]
    return [torch.nn.functional.pad(d_x, (0, 0, 0, tokens - pieces * stride)), *found]


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
