"""Decoding with opened FMA: one token a sequence from buffers of fixed size, against attention over the whole cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from farfield.bench.fma_decode import CACHES, LAYERS, SPARE, graphed, prefill, whole_cache
from farfield.bench.runner import STEP, Work, bench
from farfield.mechanisms.fma import FMA, FMAState
from farfield.opened_ring import OpenedRing

PINNED = 16e9  # bytes of host memory for all layers
# what a step writes where it has not been written before
BEHIND = ("all_k", "all_v", "kept_k", "kept_v", "sketches")


@bench(
    "fma-decode-opened",
    over={"tokens": [1 << 13, 1 << 16, 1 << 20], "batch": [1, 16], "open": [4, 16], "store": ["device", "host"]},
    against=("sdpa-decode", "sdpa-decode-flash"),
    dtypes=["bfloat16"],
    passes=STEP,
)
def fma_decode_opened(
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    batch: int = 1,
    open: int = 4,
    store: str = "device",
    heads: int = 8,
    kv_heads: int = 8,
    width: int = 64,
    block: int = 64,
    near: int = 128,
    rank: int = 4,
    layers: int = LAYERS,
) -> Work:
    """A decoding step of a layer, choice included, under a CUDA graph of up to 32 layers, after n tokens."""
    mechanism = FMA(block=block, near=near, rank=rank, open=open)
    following, state = prefill(mechanism, tokens, device, dtype, kv_heads, width)
    first = mechanism.ring(state, capacity=tokens + SPARE, store=store)
    assert isinstance(first, OpenedRing)
    layers = min(layers, int(CACHES / (batch * (first.nbytes - first.host_nbytes))))
    layers = min(layers, int(PINNED / (batch * first.host_nbytes))) if first.host_nbytes else layers
    if not layers:
        raise NotImplementedError(f"the buffers of one layer take {batch * first.nbytes / 1e9:.0f} GB")
    rings = [OpenedRing.join([first] * batch) for _ in range(layers)]
    ring = rings[0]
    begin = {name: x.clone() for name, x in ring.tensors().items() if name not in BEHIND}
    x = [torch.randn(batch, h, 1, width, device=device).to(dtype) for h in (heads, kv_heads, kv_heads)]

    def step() -> Tensor:
        out = x[0]
        for each in rings:
            out = each.step(x[0], x[1], x[2])
        return out

    def again() -> None:
        for each in rings:
            for name, now in each.tensors().items():
                if name in begin:
                    now.copy_(begin[name])

    def rates(passes: str, seconds: float, others: Mapping[str, float]) -> dict[str, float]:
        here, there = ring.nbytes - ring.host_nbytes, ring.host_nbytes
        return {"us a layer": seconds * 1e6, "device bytes": here, "host bytes": there}

    def rival(backend: str) -> Callable[[], Work]:
        return lambda: whole_cache(x[0], tokens, kv_heads, layers, backend)

    return Work(
        call=graphed(step, again) if torch.device(device).type == "cuda" else step,
        inputs=(x[0],),
        check=lambda passes: check(mechanism, following, state, first, heads),
        repeat=layers,
        rivals={"sdpa-decode": rival("CUDNN_ATTENTION"), "sdpa-decode-flash": rival("FLASH_ATTENTION")},
        rates=rates,
    )


def check(
    mechanism: FMA, following: tuple[Tensor, Tensor], state: FMAState, ring: OpenedRing, heads: int
) -> Mapping[str, Any]:
    """Compare the next token's output with that of `extend` in float64 from the same state.

    Raises:
        AssertionError: the error is larger than the dtype allows.
    """
    from farfield.testing.units import error_units

    k, v = following
    q = torch.randn(1, heads, 1, k.shape[3], device=k.device).to(k.dtype)
    exact, _ = mechanism.extend(q.double(), k.double(), v.double(), state.to(torch.float64))
    units = error_units(ring.copy().step(q, k, v), exact, terms=mechanism.near + mechanism.block)
    assert units <= 3.0, f"out is off by {units:.1f} units, 3 allowed"
    return {"units": {"out": round(units, 3)}}
