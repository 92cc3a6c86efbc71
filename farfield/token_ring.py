"""Decode states in buffers of fixed size, for mechanisms that read tokens and for those that keep a state alone.

A `TokenRing` holds the keys and values of the first tokens and of the last ones, or of all. A `StateRing` holds a state
whose tensors keep their shapes. `farfield.scored_ring` has that of mechanisms which choose blocks by score,
`farfield.ring` that of FMA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from farfield.ops.append import HIDDEN
from farfield.ops.append_token import append_token
from farfield.ops.attend import attend
from farfield.ops.token_step import DTYPES, WIDEST
from farfield.state import Cache, Memory, State
from farfield.types import Layout, Rows

ROWS = 64  # of a list's entry


class Ring(Memory):
    """A mechanism's fixed buffers. All that changes in them is on the device, and in place.

    The batch comes first in every tensor but those of `shared`.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    clock: Int[Tensor, "B ..."]  # tokens of each sequence so far, in the last column

    @property
    def tokens(self) -> Int[Tensor, " B"]:
        """Tokens of each sequence so far, on the device."""
        return self.clock if self.clock.dim() == 1 else self.clock[:, -1]

    @property
    def capturable(self) -> bool:
        """Whether a step waits for nothing that the host does, so that a CUDA graph can hold it."""
        return False

    def by_sequence(self) -> dict[str, Tensor]:
        """The tensors with a batch."""
        return {name: x for name, x in self.tensors().items() if name not in self.shared}

    def reorder_(self, beams: Int[Tensor, " B"]) -> None:
        """Sequence i becomes sequence beams[i], in place, for as many beams as there are sequences."""
        reorder_(self.by_sequence().values(), beams)


@dataclass(frozen=True)
class TokenRing(Ring):
    """Keys and values in fixed buffers: the first `sinks` tokens, and the others in `span` rows that are used again.

    A query reads the sinks, its own block of `block` tokens and the span / block - 1 blocks before it: block = 1 is a
    window of `span` tokens, span = capacity everything. Each sequence has a clock of its own. Bytes:

        B (G (D + E) (sinks + span) itemsize + 8 (sinks + span) + 20)    and 4 a list entry of 64 rows
    """

    shared: ClassVar[tuple[str, ...]] = ("index",)

    block: int
    sinks: int
    capacity: int
    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S E"]
    end: Int[Tensor, "B 1 S"]  # position of each row
    index: Int[Tensor, "1 1 1 N"]
    count: Int[Tensor, "B 1 1"]
    position: Int[Tensor, "B 1 1"]
    clock: Int[Tensor, " B"]

    @staticmethod
    @torch.no_grad()
    def of(
        k: Float[Tensor, "B G R D"],
        v: Float[Tensor, "B G R E"],
        position: Int[Tensor, " R"],
        *,
        tokens: int,
        span: int,
        block: int = 1,
        sinks: int = 0,
        capacity: int | None = None,
    ) -> TokenRing:
        """The ring that goes on after `tokens` tokens, of which those at hand stand at `position`.

        Args:
            span: rows beside the sinks, a multiple of `block`.
            capacity: tokens that a sequence may have; None: any number. Past it `step` raises on the CPU and returns
                NaN on a GPU.

        Raises:
            ValueError: more tokens than `capacity`.
        """
        if capacity is not None and tokens > capacity:
            raise ValueError(f"TokenRing: the state has {tokens} tokens, capacity={capacity} is too small")
        batch, rows, device = len(k), sinks + span, k.device
        ring_k, ring_v = (torch.zeros(*x.shape[:2], rows, x.shape[3], dtype=x.dtype, device=device) for x in (k, v))
        end = torch.full((batch, 1, rows), HIDDEN, dtype=torch.long, device=device)
        # what a token of the last block reads
        first = (max(tokens - 1, 0) // block + 1) * block - span
        held = (position < sinks) | (position >= first)
        at = position[held]
        to = torch.where(at < sinks, at, sinks + at % span)
        ring_k[:, :, to], ring_v[:, :, to] = k[:, :, held], v[:, :, held]
        end[:, :, to] = at
        return TokenRing(
            block,
            sinks,
            HIDDEN if capacity is None else capacity,
            ring_k,
            ring_v,
            end,
            torch.arange(-(-rows // ROWS), dtype=torch.int32, device=device)[None, None, None],
            torch.zeros(batch, 1, 1, dtype=torch.int32, device=device),
            torch.zeros(batch, 1, 1, dtype=torch.long, device=device),
            torch.full((batch,), tokens, dtype=torch.long, device=device),
        )

    @staticmethod
    def all_of(state: Cache, capacity: int) -> TokenRing:
        """The ring that goes on after all of a state's tokens and forgets none."""
        at = torch.arange(state.tokens, device=state.k.device)
        return TokenRing.of(state.k, state.v, at, tokens=state.tokens, span=capacity, capacity=capacity)

    @property
    def span(self) -> int:
        """Rows beside the sinks."""
        return self.k.shape[2] - self.sinks

    @property
    def whole(self) -> bool:
        """Whether it forgets no token."""
        return (self.block, self.sinks, self.span) == (1, 0, self.capacity)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step."""
        return taken_by_kernels(self.k, self.v)

    @torch.no_grad()
    def step(
        self,
        q: Float[Tensor, "B H 1 D"],
        k: Float[Tensor, "B G 1 D"],
        v: Float[Tensor, "B G 1 E"],
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "B H 1 E"]:
        """Take one token a sequence and return its attention. No gradients.

        Raises:
            ValueError: shapes do not fit the ring, or the ring is full (CPU).
            TypeError: another dtype than the ring's.
        """
        self.append(q, k, v)
        return self._attend(q, self.index.expand(len(self.clock), -1, -1, -1), self.count, ROWS, scale)

    @torch.no_grad()
    def append(self, q: Float[Tensor, "B H 1 D"], k: Float[Tensor, "B G 1 D"], v: Float[Tensor, "B G 1 E"]) -> None:
        """Take one token a sequence without reading anything; q is checked alone. Raises as `step`."""
        check_token("TokenRing", q, k, v, self.k, self.v)
        append_token(
            k, v, self.k, self.v, self.end, self.count, self.position, self.clock,
            [self.block, self.sinks, self.capacity, ROWS],
        )  # fmt: skip

    @torch.no_grad()
    def read(
        self,
        q: Float[Tensor, "B H 1 D"],
        lists: Callable[[Int[Tensor, " B"]], tuple[Tensor, Tensor]],
        tile: int,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "B H 1 E"]:
        """Attention of the tokens taken last over tiles of rows of a ring that forgets none; NaN past its capacity.

        Args:
            lists: index [1, 1|H, B, P] and count [1, 1|H, B] of the tiles that these query tiles read.
        """
        last = (self.capacity - 1) // tile
        index, count = lists((self.position.flatten() // tile).clamp(max=last))
        index, count = (x[0].transpose(0, 1).unsqueeze(2).contiguous() for x in (index, count))
        return self.listed(q, index, count, tile, scale)

    def listed(
        self,
        q: Float[Tensor, "B H 1 D"],
        index: Int[Tensor, "B L 1 P"],
        count: Int[Tensor, "B L 1"],
        tile: int,
        scale: float | None,
    ) -> Float[Tensor, "B H 1 E"]:
        """Attention of the tokens taken last over these tiles of rows; NaN past the capacity, whatever they are."""
        full = self.position[..., None] >= self.capacity
        return self._attend(q, index, count, tile, scale).masked_fill(full, float("nan"))

    def _attend(self, q: Tensor, index: Tensor, count: Tensor, tile: int, scale: float | None) -> Tensor:
        layout = Layout(index, count, 1, tile, 1, self.k.shape[2], causal=True)
        return attend(q, Rows(self.k, self.v, end=self.end), layout, scale=scale, position=self.position).out


@dataclass(frozen=True)
class StateRing(Ring):
    """A state whose tensors keep their shapes from token to token, written in place by `step`."""

    state: State  # `tokens` of it is that of the beginning
    clock: Int[Tensor, " B"]

    @staticmethod
    def of(state: State) -> StateRing:
        """A ring that shares no memory with the state.

        Raises:
            ValueError: a state without tokens, which has no tensors yet.
        """
        held = list(state.tensors().values())
        if not state.tokens or not held:
            raise ValueError("StateRing: the state has no tokens; extend it by one at least")
        return StateRing(state.copy(), held[0].new_full((len(held[0]),), state.tokens, dtype=torch.long))

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step."""
        return self.clock.is_cuda

    @torch.no_grad()
    def step(self, extend: Callable[[Any], tuple[Tensor, State]]) -> Tensor:
        """What `extend` returns for the state, which becomes the new one."""
        out, now = extend(self.state)
        mine = self.state.tensors()
        for name, x in now.tensors().items():
            if x is not mine[name]:
                mine[name].copy_(x)
        self.clock.add_(1)
        return out


def taken_by_kernels(k: Tensor, v: Tensor) -> bool:
    """Whether there are kernels that append to such keys and values."""
    return k.is_cuda and k.dtype in DTYPES and max(k.shape[3], v.shape[3]) <= WIDEST


def check_token(who: str, q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor) -> None:
    """Refuse what is not one token a sequence of a ring with keys [B, G, R, D] and values [B, G, R, E].

    Raises:
        ValueError: other shapes.
        TypeError: other dtypes.
    """
    batch, width = len(ring_k), ring_k.shape[3]
    wanted = [(batch, x.shape[1], 1, x.shape[3]) for x in (ring_k, ring_v)]
    if q.shape[0] != batch or q.shape[2:] != (1, width) or [k.shape, v.shape] != wanted:
        raise ValueError(
            f"{who}: takes q [{batch}, H, 1, {width}], k {list(wanted[0])} and v {list(wanted[1])}, "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if {q.dtype, k.dtype, v.dtype} != {ring_k.dtype}:
        raise TypeError(f"{who}: holds {ring_k.dtype}, got {q.dtype}, {k.dtype} and {v.dtype}")


def reorder_(buffers: Iterable[Tensor], beams: Tensor) -> None:
    """Sequence i of each becomes sequence beams[i].

    Raises:
        ValueError: fewer or more beams than sequences.
    """
    for x in buffers:
        if len(beams) != len(x):
            raise ValueError(f"reorder_: needs {len(x)} beams, one a sequence, got {len(beams)}")
        x.copy_(x.index_select(0, beams.to(x.device)))
