"""Decoding with opened FMA: one token a sequence from buffers of fixed size, against attention over the whole cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from farfield.bench.fma_decode import LAYERS, SPARE, check, decoding, prefill
from farfield.bench.runner import STEP, Work, bench
from farfield.mechanisms.fma import FMA
from farfield.opened_ring import OpenedRing

RINGS = 30e9  # bytes of the device for all layers; the baseline and the float64 state of the check lie beside them
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
    layers = min(layers, int(RINGS / (batch * (first.nbytes - first.host_nbytes))))
    layers = min(layers, int(PINNED / (batch * first.host_nbytes))) if first.host_nbytes else layers
    if not layers:
        raise NotImplementedError(f"the buffers of one layer take {batch * first.nbytes / 1e9:.0f} GB")
    rings = [OpenedRing.join([first] * batch) for _ in range(layers)]
    ring = rings[0]
    begin = {name: x.clone() for name, x in ring.tensors().items() if name not in BEHIND}
    held = {"device bytes": ring.nbytes - ring.host_nbytes, "host bytes": ring.host_nbytes}

    def checked(passes: str) -> Mapping[str, Any]:
        return check(mechanism, following, state, first, heads)

    return decoding(rings, begin, following, heads, tokens, checked, held)
