"""Fast Multipole Attention against exact attention, the pooling of its summaries included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from farfield.bench.runner import Work, bench, draw

# queries whose result is compared with the formula, as shares of the length
SAMPLED = (0.0, 0.31, 0.5, 0.77, 0.93, 1.0)


@bench("fma", over={"tokens": [1 << p for p in range(10, 17)]}, against="sdpa")
def fma(
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    heads: int = 4,
    kv_heads: int | None = None,
    width: int = 64,
    block: int = 64,
    near: int = 64,
    rank: int = 4,
    causal: bool = True,
) -> Work:
    """Causal FMA with mean pooling, one sequence, forward and backward, against PyTorch's SDPA."""
    from farfield import mechanisms, select

    q, k, v = draw(tokens, device, dtype, heads=heads, kv_heads=kv_heads, width=width)
    options = {"block": block, "near": near, "rank": rank, "causal": causal}
    mechanism = mechanisms.make("fma", pool="mean", **options).to(device)
    plan = select.multipole(tokens=tokens, device=device, **options)
    pairs = int(plan.near.count.sum()) * block * block + int(plan.far.count.sum()) * block * rank
    return Work(
        call=lambda: mechanism(q, k, v),
        # scores and weighted values over the tiles read, and the sums of the finest means
        flops=4 * heads * width * pairs + 2 * k.shape[1] * width * tokens,
        bytes=2 * (q.nbytes + k.nbytes),
        inputs=(q, k, v),
        check=(lambda passes: check(mechanism, q, k, v, passes, block=block, near=near, rank=rank)) if causal else None,
        causal=causal,
    )


def check(
    mechanism, q: Tensor, k: Tensor, v: Tensor, passes: str, *, block: int, near: int, rank: int
) -> Mapping[str, Any]:
    """Compare sampled queries, and all gradients of their outputs, with the formula in float64.

    Raises:
        AssertionError: an error is larger than the dtype allows.
    """
    from farfield.testing.units import error_units

    tokens = q.shape[2]
    sampled = sorted({min(tokens - 1, int(share * tokens)) for share in SAMPLED})
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    own = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    exact = torch.cat([literal(wide[0], wide[1], wide[2], i, block=block, near=near, rank=rank) for i in sampled], 2)
    if passes == "forward":
        with torch.no_grad():
            errors = {"out": error_units(mechanism(*own)[:, :, sampled], exact, terms=near + block)}
    else:
        out = mechanism(*own)
        given = torch.zeros_like(out)
        given[:, :, sampled] = 1.0
        expected = torch.autograd.grad(exact.sum(), wide)
        pairs = zip(("dq", "dk", "dv"), torch.autograd.grad(out, own, given), expected, strict=True)
        errors = {name: error_units(got, right, terms=near + block) for name, got, right in pairs}
    for name, units in errors.items():
        assert units <= 3.0, f"{name} is off by {units:.1f} units at n={tokens}, 3 allowed"
    return {"queries": len(sampled), "units": {name: round(units, 3) for name, units in errors.items()}}


def literal(q: Tensor, k: Tensor, v: Tensor, i: int, *, block: int, near: int, rank: int) -> Tensor:
    """Query i of causal FMA with mean pooling, [B, H, 1, E]: near tokens, and segment means of every far group."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    j = torch.arange(i + 1, device=q.device)
    level, radius, width = torch.zeros_like(j), near // block, block
    while (apart := (i // width - j // width) > radius).any():
        level += apart
        radius, width = -(-radius // 2), 2 * width
    ask, scale = q[:, :, i, :, None], q.shape[-1] ** -0.5
    logits = [scale * (k[:, :, j[level == 0]] @ ask)[..., 0]]
    values = [v[:, :, j[level == 0]]]
    for each_level in range(1, int(level.max()) + 1):
        # a far group is complete: its segments are all of one length
        each = block * 2 ** (each_level - 1) // rank
        keys, means = (x[:, :, j[level == each_level]].unflatten(2, (-1, each)).mean(3) for x in (k, v))
        logits.append(scale * (keys @ ask)[..., 0] + torch.tensor(each, dtype=q.dtype).log())
        values.append(means)
    return torch.cat(logits, -1).softmax(-1)[:, :, None] @ torch.cat(values, 2)
