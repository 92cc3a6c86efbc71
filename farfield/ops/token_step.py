"""What a decoding step of a layer does between its products: a launch each where there are kernels."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from farfield.ops.eager import eager

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256
CHANNELS = 1 << 14  # of a norm


def normed(
    x: Float[Tensor, "B 1 W"],
    more: Float[Tensor, "B 1 W"] | None,
    gain: Float[Tensor, " W"],
    epsilon: float,
    dtype: torch.dtype,
    recent: Float[Tensor, "B R W"] | None = None,
    taps: Float[Tensor, "S W"] | None = None,
) -> tuple[Float[Tensor, "B 1 W"], Float[Tensor, "B 1 W"]]:
    """x + more, and its RMS norm in `dtype`, in one launch where there is a kernel.

    Args:
        recent, taps: the norm goes through a depthwise convolution of S taps after its last R = S - 1 inputs, which
            take the new one.
    """
    given = [y for y in (x, more, gain, recent, taps) if y is not None]
    fits = {*(y.dtype for y in given), dtype} <= {*DTYPES} and x.shape[2] <= CHANNELS
    if x.is_cuda and eager(*given) and fits and all(y.is_contiguous() for y in given):
        from farfield.kernels.token_step import launch_norm

        return launch_norm(x, more, gain, epsilon, recent, taps, dtype)
    x = x if more is None else x + more
    out = F.rms_norm(x, gain.shape, gain, epsilon)
    if taps is not None and recent is not None:
        inputs = torch.cat([recent, out.to(recent.dtype)], 1)
        recent.copy_(inputs[:, 1:])
        out = (inputs * taps).sum(1, keepdim=True)
    return x, out.to(dtype)


def squared(x: Float[Tensor, "*B W"]) -> Float[Tensor, "*B W"]:
    """relu(x)^2, in one launch where there is a kernel."""
    if x.is_cuda and eager(x) and x.dtype in DTYPES and x.is_contiguous():
        from farfield.kernels.token_step import launch_square

        return launch_square(x)
    return x.relu().square()


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
