"""FMA that opens groups against exact attention, its choice timed beside it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from farfield.bench.mechanisms import check_once
from farfield.bench.runner import Work, bench, compare, draw

CHECKED = 2111  # tokens of the comparison with the formula
LONGEST = 12.0  # seconds: exact attention's forward and backward of 1M tokens take 20 and more


@bench(
    "fma-opened",
    over={"tokens": [1 << 15, 1 << 16, 1 << 18, 1 << 20], "width": [64, 128]},
    dtypes=["bfloat16"],
    longest=LONGEST,
)
def fma_opened(
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    heads: int = 16,
    kv_heads: int | None = None,
    width: int = 64,
    near: int = 64,
    rank: int = 4,
    open: int = 16,
    detail: int = 16,
    score: str = "mean",
    hold: int = 64,
) -> Work:
    """Causal FMA whose queries open groups of 64 tokens, `hold` queries the same ones, against PyTorch's SDPA."""
    from farfield import mechanisms

    q, k, v = draw(tokens, device, dtype, heads=heads, kv_heads=kv_heads, width=width)
    options = {"block": 64, "near": near, "rank": rank, "open": open, "detail": detail, "hold": hold, "score": score}
    mechanism = mechanisms.make("fma", **options).to(device)
    rows = mechanism.rows_read(tokens) or 0.0

    def rates(passes: str, seconds: float, others: Mapping[str, float]) -> dict[str, float]:
        chosen = choosing(mechanism, q, k)
        more = {"choosing seconds": chosen, "choosing share": chosen / seconds} if chosen else {}
        return {"rows": rows, **more}

    sizes = {"heads": heads, "kv_heads": k.shape[1], "width": width, "tokens": CHECKED}
    return Work(
        call=lambda: mechanism(q, k, v),
        # of as many rows as can be read
        flops=4 * heads * width * tokens * rows,
        bytes=2 * (q.nbytes + k.nbytes),
        inputs=(q, k, v),
        check=lambda passes: check_once("fma-opened", "fma", options, sizes, dtype, device, passes),
        rates=rates,
    )


def choosing(mechanism, q: torch.Tensor, k: torch.Tensor) -> float | None:
    """Seconds of making sketches and choosing, None where no kernels do."""
    from farfield.ops import opened

    blocks = -(-q.shape[2] // mechanism.block)
    levels, radius = mechanism._levels(blocks)
    tree, plan = mechanism._tree(q.shape[2], blocks, levels, radius[0]), mechanism.plan()
    if not levels or opened.refusal(q, k, k, tree, plan):
        return None

    def call() -> None:
        with torch.no_grad():
            opened.choose(q, k, tree, plan, q.shape[3] ** -0.5)

    return compare({"choosing": call}, device=q.device, seconds=0.2)["choosing"].summary().get("median")
