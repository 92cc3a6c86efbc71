"""Decoding with FMA: one token a sequence from rings of fixed size, against attention over the whole cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from farfield.bench.runner import STEP, Work, bench, draw
from farfield.mechanisms.fma import FMA, FMAState
from farfield.opened_ring import OpenedRing
from farfield.ring import FMARing

LAYERS = 32  # rings of their own, as in a model, so that none is found in the cache because of the one before
SPARE = 4096  # tokens that are appended before the rings are set back
CHUNK = 1 << 16  # tokens of a prefill at a time
CACHES = 60e9  # bytes for all layers of the baseline


@bench(
    "fma-decode",
    over={"tokens": [1 << 13, 1 << 16, 1 << 20], "batch": [1, 64]},
    against=("sdpa-decode", "sdpa-decode-flash"),
    dtypes=["bfloat16"],
    passes=STEP,
)
def fma_decode(
    tokens: int,
    device: torch.device | str,
    dtype: torch.dtype,
    batch: int = 1,
    heads: int = 32,
    kv_heads: int = 8,
    width: int = 128,
    block: int = 64,
    near: int = 128,
    rank: int = 16,
    layers: int = LAYERS,
) -> Work:
    """A decoding step of a layer, under a CUDA graph of 32 layers, after a prefill of n tokens."""
    mechanism = FMA(block=block, near=near, rank=rank)
    prefilled, state = prefill(mechanism, tokens, device, dtype, kv_heads, width)
    first = FMARing.from_state(state, capacity=tokens + SPARE)
    ring = FMARing.join([first] * batch)
    rings = [ring.copy() for _ in range(layers)]

    def checked(passes: str) -> Mapping[str, Any]:
        expected = formula(first, kv_heads, width)
        assert first.nbytes == expected, f"the ring holds {first.nbytes} bytes, {expected} by the formula"
        return check(mechanism, prefilled, state, first, heads)

    held = {"state bytes": ring.nbytes, "formula": formula(ring, kv_heads, width)}
    return decoding(rings, ring.tensors(), prefilled, heads, tokens, checked, held, bytes=ring.nbytes)


def prefill(
    mechanism: FMA, tokens: int, device: torch.device | str, dtype: torch.dtype, kv_heads: int, width: int
) -> tuple[tuple[Tensor, Tensor], FMAState]:
    """One more token's k and v, and the state after `tokens` before it."""
    q, k, v = draw(tokens + 1, device, dtype, heads=kv_heads, width=width)
    state: FMAState | None = None
    with torch.no_grad():
        for start in range(0, tokens, CHUNK):
            here = slice(start, min(start + CHUNK, tokens))
            _, state = mechanism.extend(q[:, :, here], k[:, :, here], v[:, :, here], state)
    assert state is not None
    return (k[:, :, tokens:].clone(), v[:, :, tokens:].clone()), state


def decoding(
    rings: Sequence[FMARing] | Sequence[OpenedRing],
    begin: Mapping[str, Tensor],
    following: tuple[Tensor, Tensor],
    heads: int,
    tokens: int,
    check: Callable[[str], Mapping[str, Any]],
    held: Mapping[str, float],
    bytes: int | None = None,
) -> Work:
    """A step of each ring, all set back to the buffers in `begin` now and then, against attention over `tokens`.

    Args:
        following: what k and v of a token look like.
        held: named numbers for the record.
    """
    _, kv_heads, _, width = following[0].shape
    shapes = [(len(begin["clock"]), h, 1, width) for h in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, device=following[0].device).to(following[0].dtype) for shape in shapes)

    def step() -> Tensor:
        out = q
        for ring in rings:
            out = ring.step(q, k, v)
        return out

    def again() -> None:
        for ring in rings:
            now = ring.tensors()
            for name, x in begin.items():
                now[name].copy_(x)

    def rival(backend: str) -> Callable[[], Work]:
        return lambda: whole_cache(q, tokens, kv_heads, len(rings), backend)

    return Work(
        call=graphed(step, again) if q.is_cuda else step,
        bytes=bytes,
        inputs=(q,),
        check=check,
        repeat=len(rings),
        rivals={"sdpa-decode": rival("CUDNN_ATTENTION"), "sdpa-decode-flash": rival("FLASH_ATTENTION")},
        rates=lambda passes, seconds, _: {"us a layer": seconds * 1e6, **held},
    )


def check(
    mechanism: FMA, following: tuple[Tensor, Tensor], state: FMAState, ring: FMARing | OpenedRing, heads: int
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


def formula(ring: FMARing, kv_heads: int, width: int) -> int:
    """Bytes of a ring by the formula of FMARing's docstring, for mean pooling without sinks or rotation."""
    plan, batch = ring.plan, ring.near_k.shape[0]
    near_rows, levels, radius = plan.near + plan.block, plan.levels, plan.near // plan.block
    above = [-(-radius // 2 ** (level + 1)) for level in range(levels)]
    far_rows = plan.rank * sum(2 * r + 1 for r in above)
    item, wide = ring.near_k.element_size(), ring.sum_k.element_size()
    held = kv_heads * 2 * width * ((near_rows + far_rows) * item + levels * plan.rank * wide)
    return batch * (held + far_rows * wide + 8 * near_rows + 8 * levels + 16 * kv_heads + 24) + 4 * (radius + 1)


def whole_cache(q: Tensor, tokens: int, kv_heads: int, layers: int, backend: str) -> Work:
    """SDPA of one query a sequence over all tokens, as many layers as memory allows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    batch, _, _, width = q.shape
    each = 2 * batch * kv_heads * tokens * width * q.element_size()
    layers = min(layers, int(CACHES / each))
    if not layers:
        raise NotImplementedError(f"the cache of one layer takes {each / 1e9:.0f} GB")
    shape = (layers, 2, batch, kv_heads, tokens, width)
    cache = torch.empty(shape, dtype=q.dtype, device=q.device).normal_()

    def call() -> Tensor:
        out = q
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            for k, v in cache:
                out = scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out

    return Work(
        call=graphed(call) if q.is_cuda else call,
        bytes=each,
        inputs=(q,),
        backend=backend.lower(),
        repeat=layers,
        rates=lambda passes, seconds, _: {"us a layer": seconds * 1e6, "state bytes": each},
    )


class graphed:
    """The step as a CUDA graph.

    Args:
        step: kept alive with the graph, which reads and writes the memory of its tensors.
        again: called before the first replay and after every SPARE more: sets back what the steps fill up.
    """

    def __init__(self, step: Callable[[], Tensor], again: Callable[[], None] | None = None):
        self.step, self.again, self.replays = step, again, 0
        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = step()

    def __call__(self) -> Tensor:
        if self.again is not None and self.replays % SPARE == 0:
            self.again()
        self.replays += 1
        self.graph.replay()
        return self.out
