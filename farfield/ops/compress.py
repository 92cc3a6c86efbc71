"""compress: each block of rows made into one, keys and values together; on the GPU and without gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

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


def takes(k: Tensor, v: Tensor, mlp: MLP | None) -> bool:
    """Whether `compress` does: CUDA tensors of 16 bits and one width, float32 weights, nothing to differentiate."""
    if not (k.is_cuda and k.dtype in (torch.bfloat16, torch.float16) and k.shape[3] == v.shape[3]):
        return False
    given = mlp or ()
    if not eager(k, v, *given) or recorded(k, v, *given) or any(x.dtype != torch.float32 for x in given):
        return False
    from farfield.kernels.compress import WIDEST

    return k.shape[3] <= WIDEST


def compress(
    k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"], mlp: MLP | None, *, stride: int, span: int, rows: int
) -> tuple[Float[Tensor, "B G C D"], Float[Tensor, "B G C D"]]:
    """The first so many blocks of `span` tokens, one every `stride`: their means, plus the MLP. Float32."""
    from farfield.kernels import compress as on_gpu
    from farfield.kernels import plans

    given = [k, v, *[x.contiguous() for x in mlp or ()]]
    if rows < FEW:
        return on_gpu.compress(*given, stride, span, rows)
    return plans.plainly(on_gpu.compress, given, stride, span, rows)
