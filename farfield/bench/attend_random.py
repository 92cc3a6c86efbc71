"""attend on random block lists: what a kernel makes of sparsity that has no pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from farfield.bench.runner import BASELINES, Work, bench, draw, timed
from farfield.types import Layout, Rows

DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.02)
CHECKED = 3  # query blocks of a head that are compared with the formula


@bench(
    "attend-random",
    over={"tokens": [1 << 15], "width": [64, 128], "block": [128, 64], "density": list(DENSITIES)},
    against=("sdpa", "flex"),
    dtypes=["bfloat16"],
    passes=["forward", "backward"],
    axis="density",
)
def attend_random(
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    density: float = 0.1,
    width: int = 64,
    block: int = 128,
    heads: int = 16,
    shared: bool = False,
) -> Work:
    """attend on random lists of whole blocks, a list a head, against SDPA on everything and FlexAttention."""
    import farfield as ff

    q, k, v = draw(tokens, device, dtype, heads=heads, width=width)
    lists = 1 if shared else heads
    layout, setup = timed(lambda: random_layout(tokens, block, density, lists, device), device)
    rows = Rows(k, v)
    share = layout.density
    flops = 4.0 * heads * width * share * layout.row_blocks * block * tokens

    def rates(passes: str, seconds: float, others: Mapping[str, float]) -> dict[str, float]:
        found = {"read": share, "TFLOP/s": flops * (1.0 if passes == "forward" else 2.5) / seconds / 1e12}
        # 1 where skipping costs nothing: the dense one's time for this share of the work, over ours
        return found | ({"efficiency": others["sdpa"] / seconds * share} if "sdpa" in others else {})

    return Work(
        call=lambda: ff.attend(q, rows, layout).out,
        flops=flops,
        bytes=4 * q.nbytes,
        inputs=(q, k, v),
        check=lambda passes: check(q, k, v, layout, passes),
        causal=False,
        rivals={"flex": lambda: flex(q, k, v, layout, flops, rates), "sdpa": lambda: dense(q, k, v)},
        setup=setup,
        rates=rates,
    )


def random_layout(
    tokens: int, block: int, density: float, heads: int, device: torch.device | str, seed: int = 0
) -> Layout:
    """Each query block of each head reads `density` of all row blocks, drawn without repeats, in ascending order."""
    blocks = -(-tokens // block)
    picks = max(1, round(density * blocks))
    gen = torch.Generator(device).manual_seed(seed)
    order = torch.rand(1, heads, blocks, blocks, generator=gen, device=device).argsort(-1)
    index = order[..., :picks].sort(-1).values.to(torch.int32)
    count = torch.full((1, heads, blocks), picks, dtype=torch.int32, device=device)
    return Layout(index, count, block, block, tokens, tokens)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Work:
    """SDPA on every pair, with its rate."""
    work = BASELINES["sdpa"]((q, k, v), False)
    flops = work.flops or 0.0
    return replace(
        work,
        rates=lambda passes, seconds, _: {"TFLOP/s": flops * (1.0 if passes == "forward" else 2.5) / seconds / 1e12},
    )


def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, flops: float, rates: Callable[..., Any]) -> Work:
    """PyTorch's flex_attention, compiled, on the same lists. Compiled and warm before the clock starts.

    The lists have full width and the mask is a function, if one that hides nothing: without either some versions
    read everything or transpose the lists wrongly.
    """
    mask, setup = timed(layout.to_block_mask, q.device)
    # the tiles must divide the blocks; at 64 those that come by default do not
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if layout.q_block == 64 else None
    compiled = _compiled()

    def call() -> Tensor:
        return compiled(q, k, v, block_mask=mask, kernel_options=options)

    from torch._functorch import config

    # the backward is timed over and over on one forward. PyTorch asks again whenever one runs, so the option stays set
    config.donated_buffer = False
    with torch._dynamo.config.patch(recompile_limit=64), _backward_tiles(layout.q_block):
        with torch.no_grad():
            call()
        inputs = [x.requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(call().sum(), inputs)
    return Work(
        call=call, flops=flops, bytes=4 * q.nbytes, inputs=(q, k, v), backend="triton", setup=setup, rates=rates
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # pyright: ignore[reportReturnType]


def _backward_tiles(block: int):
    """flex_attention's backward tiles of 128 do not fit blocks of 64: a few of 64 to choose from."""
    if block % 128 == 0:
        return nullcontext()
    from torch._inductor.choices import InductorChoices
    from torch._inductor.template_heuristics.triton import FlexBwDConfig

    tiles = [FlexBwDConfig(64, 64, 64, 64, stages, 4) for stages in (2, 3)]
    return mock.patch.object(InductorChoices, "get_flex_attention_bwd_configs", return_value=tiles)


def check(q: Tensor, k: Tensor, v: Tensor, layout: Layout, passes: str) -> Mapping[str, Any]:
    """Compare a few query blocks of the first and the last head, and all gradients of their outputs, with the formula.

    Raises:
        AssertionError: an error is larger than the dtype allows.
    """
    import farfield as ff
    from farfield.testing.units import error_units

    block, heads = layout.q_block, q.shape[1]
    blocks = layout.index.shape[2]
    sampled = sorted({0, blocks // 2, blocks - 1})[:CHECKED]
    wide, own = ([x.detach().to(t).requires_grad_() for x in (q, k, v)] for t in (torch.float64, q.dtype))
    out = ff.attend(own[0], Rows(own[1], own[2]), layout).out
    exact, got = [], []
    given = torch.zeros_like(out)
    for h in {0, heads - 1}:
        for n in sampled:
            here = slice(n * block, min((n + 1) * block, q.shape[2]))
            lists = layout.index[0, min(h, layout.index.shape[1] - 1), n].long()
            listed = lists[:, None] * block + torch.arange(block, device=q.device)
            listed = listed[listed < k.shape[2]]
            scores = wide[0][0, h, here] @ wide[1][0, h, listed].mT * q.shape[3] ** -0.5
            exact.append(scores.softmax(-1) @ wide[2][0, h, listed])
            got.append(out[0, h, here])
            given[0, h, here] = 1.0
    right, mine = torch.cat(exact), torch.cat(got)
    terms = int(layout.count.max()) * block
    errors = {"out": error_units(mine, right, terms=terms)}
    if passes != "forward":
        expected = torch.autograd.grad(right.sum(), wide)
        pairs = zip(("dq", "dk", "dv"), torch.autograd.grad(out, own, given), expected, strict=True)
        errors |= {name: error_units(a, b, terms=terms) for name, a, b in pairs}
    for name, units in errors.items():
        assert units <= 3.0, f"{name} is off by {units:.1f} units, 3 allowed"
    return {"query blocks": len(exact), "units": {name: round(units, 3) for name, units in errors.items()}}
