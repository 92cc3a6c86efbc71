"""Attention within buckets: tokens sorted by (bucket, position), and layouts over the sorted slots.

    order = hashed.sort(hashed.buckets(k, many=16), many=16, queries=hashed.buckets(q, many=16))
    q, k, v = order.queries(q), order.keys(k), order.keys(v)
    out = order.back(attend(q, Rows(k, v), order.layout, position=order.position).out)

Every bucket starts with a block of its own, so that a block of sorted queries reads a run of blocks of its bucket and
nothing else: no groups need be compared, and all but the last blocks of a run are seen whole. Tokens that no bucket
holds are dropped, which makes compaction the same thing with one bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from farfield.ops import hashed as ops
from farfield.ops.hashed import Slots, planes
from farfield.types import Layout

__all__ = ["Sorted", "buckets", "kept", "planes", "sort"]


@dataclass(frozen=True)
class Sorted:
    """An order of queries and keys, and who reads what in it.

    Args:
        slots: where tokens went; see ops.hashed.
        layout: over the slots.
        position: of the query slots, for attend; None: they stand where they are.
    """

    slots: Slots
    layout: Layout
    position: Int[Tensor, "B H M"] | None

    def queries(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H M D"]:
        """Rows of tokens into the slots of the queries; 0 in empty ones."""
        return ops.take(x, self.slots.q_token, self.slots.q_slot)

    def keys(self, x: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H R D"]:
        """Rows of tokens into the slots of the keys; 0 in empty ones."""
        return ops.take(x, self.slots.k_token, self.slots.k_slot)

    def attend(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"], v: Float[Tensor, "B H S E"], *, scale: float
    ) -> Float[Tensor, "B H T E"]:
        """What each query reads in its bucket: rows into the slots, attend, and back, with less work for the host."""
        return ops.attend_sorted(q, k, v, self.slots, self.layout.q_block, scale)

    def back(self, x: Float[Tensor, "B H M D"]) -> Float[Tensor, "B H T D"]:
        """Rows of query slots to their tokens; 0 for tokens without a slot."""
        return ops.take(x, self.slots.q_slot, self.slots.q_token)


def buckets(x: Float[Tensor, "B H T D"], *, many: int = 16, seed: int = 0) -> Int[Tensor, "B H T"]:
    """The bucket of each token, of `many`: the nearest of many / 2 random directions and their opposites.

    Rows that point the same way share a bucket whatever their length. Decided in float32 or wider, the first of equal
    ones; no gradient.

    Raises:
        ValueError: `many` is odd or less than 2.
    """
    if many < 2 or many % 2:
        raise ValueError(f"buckets: directions come in pairs, so many must be even and at least 2, got {many}")
    return ops.buckets(x, many, seed)


def kept(
    rate: float, *, heads: int, start: int, stop: int, seed: int = 0, device: torch.device | str | None = None
) -> Bool[Tensor, "2 H T"]:
    """Which of the tokens start .. stop - 1 are kept with probability `rate`, for each head as query and as key.

    A function of seed, head and token alone: a longer sequence keeps what a shorter one kept, on every device.
    The integer hash is MurmurHash3's finaliser (Appleby 2011).
    """
    low = (1 << 32) - 1
    at = torch.arange(start, stop, device=device)
    row = torch.arange(2 * heads, device=device)[:, None]
    x = _mix((row * 0x9E3779B1 + seed * 0x7FEB352D + 0x165667B1) & low, low)
    x = _mix(x ^ (at * 0x9E3779B1 & low), low)
    return (x < round(rate * (1 << 32))).unflatten(0, (2, heads))


def _mix(x: Tensor, low: int) -> Tensor:
    """32 bits to 32 bits, every one of which depends on all of them."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ x >> shift) * factor) & low
    return x ^ x >> 16


def sort(
    bucket: Int[Tensor, "B H S"],
    *,
    many: int,
    queries: Int[Tensor, "B H T"] | None = None,
    block: int = 128,
    strict: bool = True,
) -> Sorted:
    """Sort by (bucket, position), stable, without the host: time linear in the tokens.

    Query i stands at position S - T + i and sees the keys of its bucket up to there, with `strict` only those before.

    Args:
        bucket: of each key; what is none of 0 .. many - 1 is dropped.
        queries: buckets of the queries; None: a token's query and key share one bucket, and `strict` must be set.
        block: slots of a block.
    """
    slots = ops.slots(queries, bucket, many, block, strict=strict)
    layout = Layout(
        slots.index, slots.count, block, block, slots.q_token.shape[2], slots.k_token.shape[2], causal=True
    )  # fmt: skip
    return Sorted(slots, layout, None if queries is None else slots.position)
