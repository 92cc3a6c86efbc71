"""branches: attention to compressed rows, to chosen blocks and to a window, and their gated sum; on the GPU.

One operation where keys and values of all three are the same: autograd has one node for it, and its launches, but for
the backward of the chosen blocks and of a learned compression, are two recordings (kernels.replay).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from farfield.ops import compress, precision
from farfield.ops.attend import Call, _gradients
from farfield.ops.choose import Scoring
from farfield.ops.eager import eager, recorded
from farfield.ops.lists import recent_sizes

HALF = 0.5  # the gate of each branch where none is learned


def takes(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scoring: Scoring) -> bool:
    """Whether `branches` does: what `compress` takes, and choices that a kernel makes."""
    mlp = compress.MLP(*weights[:6]) if weights else None
    if not compress.takes(k, v, mlp, scoring.span) or q.dtype != k.dtype or not eager(q, *weights):
        return False
    from farfield.kernels import choose as on_gpu

    return scoring.shared and scoring.scored <= on_gpu.MOST and q.shape[2] == k.shape[2]


def branches(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    weights: tuple[Tensor, ...],
    scoring: Scoring,
    window: int,
    scale: float,
) -> Float[Tensor, "B H T D"]:
    """Causal: the sum of three attentions, each times its gate.

    Args:
        weights: an MLP (ops.compress) for the compression, gate [G, D, 3] and bias [G, 3] of the gates; or none, for
            means and gates of 1/2.
        window: tokens, the query included.
    """
    from farfield.kernels import plans
    from farfield.kernels.branches import About, forward

    about = About(scoring, window, *recent_sizes(k.shape[2], window), scale)
    if recorded(q, k, v, *weights):
        return _Branches.apply(about, q, k, v, *weights)
    return plans.plainly(forward, (q, k, v, *[x.contiguous() for x in weights]), about, False)


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, about, q, k, v, *weights):
        from farfield.kernels import plans
        from farfield.kernels.branches import forward

        weights = tuple([x.contiguous() for x in weights])
        out, *kept = plans.plainly(forward, (q, k, v, *weights), about, True)
        ctx.save_for_backward(q, k, v, *weights, *kept)
        ctx.about, ctx.learned = about, len(weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        from farfield.kernels import mix, plans
        from farfield.kernels.branches import backward, chosen_call
        from farfield.kernels.fan import add

        about, saved, n = ctx.about, ctx.saved_tensors, ctx.learned
        (q, k, v), weights = saved[:3], saved[3 : 3 + n]
        far, far_lse, chosen, chosen_lse, near, near_lse, index, count, keys, values, *kept = saved[3 + n :]
        if n:
            parts = far, chosen.view(q.shape), near
            gate, bias = weights[6:]
            (d_far, d_chosen, d_near), *more, d_gate, d_bias, _ = mix.mix_gradients(parts, q, gate, bias, None, d_out)
            given = [d_far, d_near]
        else:
            d_chosen, more = d_out, []
            given = [d_out.contiguous()]
        call: Call = chosen_call(q, k, v, index, count, about)
        found = _gradients(call, d_chosen.reshape(call.q.shape), None, chosen, chosen_lse, False)
        tensors = [*given, q, k, v, keys, values, far, far_lse, near, near_lse, *found[:3], *more]
        if not n:
            d_q, d_k, d_v = plans.plainly(backward, tensors, about, len(given), HALF)
            return None, d_q, d_k, d_v
        d_q, d_k2, d_v2, d_keys, d_values = plans.plainly(backward, tensors, about, len(given), 1.0)
        grads, learned = [], []
        with precision.kept(k):
            for side, (x, d, *tokens) in enumerate(((k, d_keys, d_k2, found[1]), (v, d_values, d_v2, found[2]))):
                mlp = [*weights[side:6:2], kept[0][side]]
                d_x, *rest = compress.gradients(x, d, mlp, about.scoring.stride, about.scoring.span)
                grads.append(add([d_x, *[y.view(x.shape) for y in tokens]]))
                learned.append(rest)
        gates = [d.to(w.dtype) for d, w in ((d_gate, gate), (d_bias, bias)) if d is not None]
        return None, d_q, *grads, *[x for pair in zip(*learned, strict=True) for x in pair], *gates
