"""What choosing costs where the choice depends on data: alone, and beside the whole forward that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from farfield import mechanisms
from farfield.bench.mechanisms import check_once, key_heads
from farfield.bench.runner import Work, bench, draw
from farfield.select.scored import attend_and_choose, block_means, choose


def _by_means(mech, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return choose(q, block_means(k, mech.scoring.block), mech.scoring, scale=mech.scale).index


def _by_compressions(mech, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # scores are the weights of the compressed branch, which is computed on the way
    keys, values = mech._compressed(k, v)
    return attend_and_choose(q, keys, values, mech.scoring)[1].index


CHOICES: dict[str, Callable[..., Tensor]] = {
    "hip": lambda mech, q, k, v: mech.choose(q, k).index,
    "moba": _by_means,
    "ssa": _by_means,
    "nsa": _by_compressions,
}
"""name -> the lists of a mechanism, from q, k and v alone."""


@bench(
    "choosing",
    over={"tokens": [1 << p for p in range(13, 19)], "mechanism": list(CHOICES), "width": [64, 128]},
    against="whole",
    dtypes=["bfloat16"],
    passes=["forward"],
)
def choosing(
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    mechanism: str = "hip",
    width: int = 128,
    heads: int = 16,
    **options,
) -> Work:
    """The choice of hip, moba, nsa and ssa, beside the forward it is part of: its share, and how it grows."""
    if mechanism not in CHOICES:
        raise ValueError(
            f"mechanism must be one of {', '.join(CHOICES)}, which choose by their data; got {mechanism!r}"
        )
    kind, sizes = mechanisms.get(mechanism), {"heads": heads, "kv_heads": key_heads(mechanism, heads), "width": width}
    q, k, v = draw(tokens, device, dtype, **sizes)
    made = mechanisms.make_for(mechanism, {**options, "causal": True}, **sizes).to(device).eval()

    def rates(passes: str, seconds: float, others: Mapping[str, float]) -> dict[str, float]:
        return {"share": seconds / others["whole"]} if "whole" in others else {}

    return Work(
        call=lambda: CHOICES[mechanism](made, q, k, v),
        check=lambda passes: check_once(kind.__module__, mechanism, options, sizes, dtype, device, passes),
        rivals={"whole": lambda: Work(call=lambda: made(q, k, v))},
        rates=rates,
    )
