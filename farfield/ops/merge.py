"""merge: join attention over some rows with attention over others, as if one softmax had read all of them."""

from __future__ import annotations

import torch

from farfield.types import Partial


def merge(*partials: Partial) -> Partial:
    """The attention over the union of the rows that the partials read, which must not overlap.

    Exact, and so are its gradients, because lse is differentiable. A query that read nothing anywhere stays at 0 and
    -inf.

        lse = logsumexp_s(lse_s),    out = sum_s exp(lse_s - lse) out_s

    Raises:
        ValueError: no partials, or partials of different shapes.

    Source: FlashAttention's rescaling (Dao et al. 2022, arXiv:2205.14135) across calls instead of tiles.
    """
    if not partials:
        raise ValueError("merge: needs at least one Partial")
    first = partials[0]
    for p in partials[1:]:
        if p.out.shape != first.out.shape or p.lse.shape != first.lse.shape:
            raise ValueError(
                f"merge: partials must have one shape, got out {list(first.out.shape)} and {list(p.out.shape)}"
            )
    if len(partials) == 1:
        return first
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
