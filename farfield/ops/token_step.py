"""What a decoding step of a layer does between its products: a launch each where there are kernels."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from farfield.ops.eager import eager

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256


def convolved(
    x: Float[Tensor, "B 1 W"], recent: Float[Tensor, "B R W"], weight: Float[Tensor, "S W"]
) -> Float[Tensor, "B 1 W"]:
    """A depthwise convolution's output for one token x after its last inputs `recent`, R = S - 1, which take x."""
    alike = x.dtype in DTYPES and recent.dtype == x.dtype and x.is_contiguous() and recent.is_contiguous()
    if x.is_cuda and eager(x) and alike and weight.is_contiguous() and weight.dtype == x.dtype:
        from farfield.kernels.token_step import launch_convolve

        return launch_convolve(x, recent, weight)
    padded = torch.cat([recent, x], 1)
    recent.copy_(padded[:, 1:])
    return (padded * weight).sum(1, keepdim=True)


def placed(
    q: Float[Tensor, "B H 1 D"],
    k: Float[Tensor, "B G 1 D"],
    position: Int[Tensor, "B 1"],
    *,
    gain: Float[Tensor, " H"] | None,
    grown: int,
    turns: Float[Tensor, " pairs"],
) -> tuple[Float[Tensor, "B H 1 D"], Float[Tensor, "B G 1 D"]] | None:
    """Heads of one token a sequence as attention reads them, in one launch; None where there is no kernel.

    Args:
        gain: q and k come to unit RMS, and q is multiplied by it; None: neither.
        grown: q is multiplied by log(t + 1) / log(grown) from position t = grown on; 0: never.
        turns: turns a token of channels c and c + pairs, float64; empty: nothing is rotated.
    """
    whole = q.is_cuda and eager(q, k) and q.stride(3) == 1 and k.stride(3) == 1
    if not whole or q.dtype not in DTYPES or q.shape[3] > WIDEST:
        return None
    from farfield.kernels.token_step import launch_place

    return launch_place(q, k, gain, position, turns, grown, 1 / math.log(grown) if grown else 0.0)
