"""Fast Multipole Attention against exact attention, the pooling of its summaries included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from farfield.bench.runner import Work, bench, draw, timed
from farfield.ops.multipole import forget

# heads of a length, so that the longest one still fits beside its float64 copies
HEADS = {1 << 15: 32, 1 << 17: 16, 1 << 20: 4}
RANK = {64: 4, 128: 16}

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

    def first() -> Tensor:
        own = [x.detach().requires_grad_() for x in (q, k, v)]
        forget()
        out = mechanism(*own)
        return torch.autograd.grad(out, own, torch.empty_like(out))[0]

    pairs = int(plan.near.count.sum()) * block * block + int(plan.far.count.sum()) * block * rank
    return Work(
        call=lambda: mechanism(q, k, v),
        # scores and weighted values over the tiles read, and the sums of the finest means
        flops=4 * heads * width * pairs + 2 * k.shape[1] * width * tokens,
        bytes=2 * (q.nbytes + k.nbytes),
        inputs=(q, k, v),
        # only pairs of a query and a row that it sees must be multiplied
        floor=lambda passes: floor(passes, q, k, round((plan.near.visible + plan.far.visible) * tokens)),
        check=(lambda passes: check(mechanism, q, k, v, passes, block=block, near=near, rank=rank)) if causal else None,
        causal=causal,
        # on the GPU lists and launches of a length are kept: what the first forward and backward took
        setup=timed(first, device)[1] if q.is_cuda else None,
    )


@bench(
    "fma-floor", over={"tokens": list(HEADS), "width": [64, 128], "block": [64, 128]}, against=(), dtypes=["bfloat16"]
)
def fma_floor(tokens: int, device: torch.device | str, dtype: torch.dtype, width: int = 64, block: int = 64) -> Work:
    """Causal FMA against the least time that its bytes and products take, 4 to 32 heads."""
    heads = HEADS.get(tokens, 4)
    return fma(tokens, device, dtype, heads=heads, width=width, block=block, near=block, rank=RANK.get(block, 4))


@bench("fma-long", over={"tokens": [1 << 16, 1 << 20]}, dtypes=["bfloat16"])
def fma_long(tokens: int, device: torch.device | str, dtype: torch.dtype, heads: int = 4, width: int = 128) -> Work:
    """Causal FMA against SDPA where the length is long."""
    return fma(tokens, device, dtype, heads=heads, width=width)


@bench("fma-short", over={"tokens": [1 << p for p in range(9, 14)]}, dtypes=["bfloat16"])
def fma_short(tokens: int, device: torch.device | str, dtype: torch.dtype, heads: int = 64, width: int = 128) -> Work:
    """Causal FMA against SDPA where the two cost about the same."""
    return fma(tokens, device, dtype, heads=heads, width=width)


def floor(passes: str, q: Tensor, k: Tensor, pairs: int) -> tuple[float, float]:
    """Bytes and flops of one head width D = E: inputs read once and outputs written once, and no product twice.

    Forward: q, k, v read, out written. Backward: these and d_out read, dq, dk, dv written.
    """
    forward, backward = 2 * (q.nbytes + k.nbytes), 4 * (q.nbytes + k.nbytes)
    flops = 4.0 * q.shape[0] * q.shape[1] * q.shape[3] * pairs
    return {
        "forward": (forward, flops),
        "backward": (backward, 2.5 * flops),
        "forward+backward": (forward + backward, 3.5 * flops),
    }[passes]


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
