"""mix: three branches of one query, each times its gate, added up in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from farfield.ops import precision
from farfield.ops.eager import eager, recorded

BRANCHES = 3


def mix(
    parts: tuple[Float[Tensor, "B H T E"], Float[Tensor, "B H T E"], Float[Tensor, "B H T E"]],
    q: Float[Tensor, "B H T D"],
    *,
    gate: Float[Tensor, "G D 3"] | None = None,
    bias: Float[Tensor, "G 3"] | None = None,
    shares: Float[Tensor, "B H T 3"] | None = None,
) -> Float[Tensor, "B H T E"]:
    """sum over n of gates[n] parts[n], in the dtype of q.

    The gates are `shares`, or sigmoid(q gate + bias) of each key head's weights, or 1/2 where nothing is given.
    Gates and sums are float32 or wider. On the GPU one kernel, and one for the backward.
    """
    given = [x for x in (gate, bias, shares) if x is not None]
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.numel() and eager(q, *parts, *given):
        from farfield.kernels import mix as on_gpu

        if max(q.shape[3], parts[0].shape[3]) <= on_gpu.WIDEST and all(x.dtype == q.dtype for x in parts):
            if recorded(q, *parts, *given):
                return _Mix.apply(q, gate, bias, shares, *parts)
            return _mix(parts, q, gate, bias, shares)
    wide = torch.promote_types(q.dtype, torch.float32)
    if shares is not None:
        weights = shares.to(wide)
    elif gate is not None and bias is not None:
        with precision.kept(q):
            logits = q.to(wide).unflatten(1, (gate.shape[0], -1)) @ gate.to(wide)[:, None]
            logits = (logits + bias.to(wide)[:, None, None]).flatten(1, 2)
            # the sigmoid, in an operation whose rounding does not depend on where in memory a number lies
            weights = torch.stack([logits, torch.zeros_like(logits)], -1).softmax(-1)[..., 0]
    else:
        weights = q.new_full((BRANCHES,), 0.5, dtype=wide)
    added = [x * weights[..., n, None] for n, x in enumerate(parts)]
    return sum(added[1:], added[0]).to(q.dtype)


def _mix(parts: Sequence[Tensor], q: Tensor, gate: Tensor | None, bias: Tensor | None, shares: Tensor | None) -> Tensor:
    from farfield.kernels import mix as on_gpu
    from farfield.kernels import plans

    given = [None if x is None else x.contiguous() for x in (gate, bias, shares)]
    inputs = [x for x in (q, *parts, *given) if x is not None]
    return plans.plainly(on_gpu.mixed, inputs, *[x is not None for x in given])


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, gate, bias, shares, *parts):
        ctx.save_for_backward(q, gate, bias, shares, *parts)
        return _mix(parts, q, gate, bias, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        from farfield.kernels import mix as on_gpu

        q, gate, bias, shares, part0, part1, part2 = ctx.saved_tensors
        parts = part0, part1, part2
        d_parts, d_q, d_gate, d_bias, d_shares = on_gpu.mix_gradients(parts, q, gate, bias, shares, d_out)
        if d_gate is not None and d_bias is not None:
            d_gate, d_bias = d_gate.to(gate.dtype), d_bias.to(bias.dtype)
        return d_q, d_gate, d_bias, d_shares, *d_parts
