"""fan: a tensor for several readers, whose gradients meet in float32 and are rounded once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farfield.ops.eager import eager, recorded


def fan(x: Tensor, readers: int) -> tuple[Tensor, ...]:
    """x for so many readers, two to four.

    Of 16 bits the gradients of all of them are added up together: autograd would round each sum of two.
    """
    if x.dtype in (torch.bfloat16, torch.float16) and eager(x) and recorded(x):
        return _Fan.apply(x, readers)
    return (x,) * readers


class _Fan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, readers):
        ctx.set_materialize_grads(False)
        return tuple([x.view_as(x) for _ in range(readers)])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        there = [x for x in grads if x is not None]
        if len(there) < 2:
            return (there[0] if there else None), None
        if there[0].is_cuda and there[0].numel():
            from farfield.kernels.fan import add

            return add(there), None
        return torch.stack(there).sum(0, dtype=torch.float32).to(there[0].dtype), None
