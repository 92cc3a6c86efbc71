"""merge: join attention over some rows with attention over others, as if one softmax had read all of them."""

from __future__ import annotations

import torch

from farfield.ops.eager import eager, recorded
from farfield.types import Partial


def merge(*partials: Partial) -> Partial:
    """The attention over the union of the rows that the partials read, which must not overlap.

    Exact, and so are its gradients, because lse is differentiable. A query that read nothing anywhere stays at 0 and
    -inf.

        lse = logsumexp_s(lse_s),    out = sum_s exp(lse_s - lse) out_s

    Raises:
        ValueError: no partials, or partials of different shapes.
        TypeError: something else than partials.

    Source: FlashAttention's rescaling (Dao et al. 2022, arXiv:2205.14135) across calls instead of tiles.
    """
    if not partials:
        raise ValueError("merge: needs at least one Partial")
    for p in partials:
        if not isinstance(p, Partial):
            raise TypeError(f"merge: takes what attend returns, Partials, got {type(p).__name__}")
    first = partials[0]
    for p in partials[1:]:
        if p.out.shape != first.out.shape or p.lse.shape != first.lse.shape:
            raise ValueError(
                f"merge: partials must have one shape, got out {list(first.out.shape)} and {list(p.out.shape)}"
            )
    if len(partials) == 1:
        return first
    if len(partials) == 2 and _quick(*partials):
        from farfield.kernels.merge import merge as join

        return Partial(*join(*(x for p in partials for x in (p.out, p.lse))))
    lse = torch.stack([p.lse for p in partials])
    peak = lse.detach().amax(0)
    # -inf - -inf is nan: queries that read nothing are measured from 0
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = (lse - peak).exp()
    mass = weights.sum(0)
    share = weights / mass.masked_fill(mass == 0, 1.0)
    out = torch.stack([p.out for p in partials]).mul(share[..., None]).sum(0)
    # log(0) has an infinite slope: 0 * inf would be nan in the backward
    total = mass.masked_fill(mass == 0, 1.0).log() + peak
    return Partial(out.to(first.out.dtype), total.masked_fill(mass == 0, float("-inf")))


def _quick(one: Partial, other: Partial) -> bool:
    """Whether a kernel takes them: on a GPU, without gradients."""
    parts = one.out, one.lse, other.out, other.lse
    if not one.out.is_cuda or not eager(*parts) or recorded(*parts):
        return False
    alike = one.out.dtype == other.out.dtype and one.lse.dtype == other.lse.dtype == torch.float32
    return alike and one.out.numel() > 0 and all(x.is_contiguous() for x in parts)
