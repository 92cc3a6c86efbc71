"""averages: the softmax average of every prefix under one query a head, in one operation where the kernels take it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from farfield.ops.eager import eager, recorded
from farfield.ops.known import Known, Memory, form
from farfield.ops.scan import prefix_scores, prefix_softmax


def averages(
    q: Float[Tensor, "B H N D"], k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T E"], scale: float
) -> Float[Tensor, "B H T E"]:
    """prefix_softmax(prefix_scores(scale * q[:, :, 0], k), v), products in float32 or wider; tensors fit together.

    On the GPU each pass is one recording of launches, and autograd has one node.
    """
    if k.is_cuda and eager(q, k, v):
        from farfield.kernels import prefix

        if prefix.takes(q, k, v):
            keep = recorded(q, k, v)
            return _launched(q, k, v, scale, keep, _memory.of(_key(q, k, v, scale, keep)))
    query = q[:, :, 0].to(torch.promote_types(q.dtype, torch.float32))
    return prefix_softmax(prefix_scores(query * scale, k), v)[0]


def again(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | None:
    """`averages`, if the kernels have taken a call with these shapes, strides, dtypes and devices before; otherwise
    None. What was checked then need not be checked again. Default scale: 1 / sqrt(D)."""
    # the checks allow no other q; that of a call which has been taken may have been a learned one
    if not eager(q, k, v) or q.shape[-2] != k.shape[-2] or q.dtype != k.dtype:
        return None
    factor = float(k.shape[-1] ** -0.5) if scale is None else scale
    keep = recorded(q, k, v)
    known = _memory.find(_key(q, k, v, factor, keep))
    return None if known is None else _launched(q, k, v, factor, keep, known)


_memory = Memory(128)


def _key(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: bool) -> tuple[Any, ...]:
    return form(q), form(k), form(v), scale, keep


def _launched(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: bool, known: Known) -> Tensor:
    if keep:
        return _Averages.apply(q, k, v, scale, known)
    from farfield.kernels import plans, prefix

    return plans.run(known, prefix.averages, (q, k, v), scale, False)


class _Averages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, known):
        from farfield.kernels import plans, prefix

        out, *kept = plans.run(known, prefix.averages, (q, k, v), scale, True)
        ctx.scale, ctx.known = scale, known
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        from farfield.kernels import plans, prefix

        q, k, v, *kept = ctx.saved_tensors
        # what is copied is not recorded
        d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
        known = plans.after(ctx.known, d_out)
        d_q, d_k, d_v = plans.run(known, prefix.averages_backward, (d_out, q, k, v, *kept), ctx.scale)
        if d_v.shape[1] != v.shape[1]:
            d_v = d_v.unflatten(1, (v.shape[1], -1)).sum(2, dtype=torch.float32).to(v.dtype)
        return d_q, d_k, d_v, None, None
