"""FMA's decode state in buffers of fixed size: one token in, one out, nothing allocated, no shape that changes.

`FMA.extend` returns a new state each time, whose shapes grow and shrink. A ring is written in place instead, and what
a step does is decided on the device from the count of tokens, so that one CUDA graph serves every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from farfield.mechanism import Rotary
from farfield.ops import precision
from farfield.ops.append import HIDDEN, Plan, append
from farfield.ops.attend import attend
from farfield.select.static import radii
from farfield.state import save
from farfield.summarize import FilterPool, Groups, MeanPool, Pool, check_rank, to_blocks
from farfield.token_ring import Ring, check_token, taken_by_kernels
from farfield.types import Layout, Rows

if TYPE_CHECKING:
    from farfield.mechanisms.fma import FMAState


@dataclass(frozen=True)
class FMARing(Ring):
    """FMA's decode state in fixed buffers. `FMA.ring` makes one of a state, `FMA.step` takes a token.

    The sequences of a batch may stand at different positions; each has a clock of its own. Changed in place by `step`,
    `reset_` and `reorder_`; the other methods return new rings. With L levels, radius R = near / m, R_l = R / 2^l
    rounded up, and c = 4 bytes an accumulated number (8 in float64):

        S      = near + m                                          near rows
        R_far  = p (ceil(sinks / p) + sum over l < L of 2 R_(l+1) + 1)   far rows
        P      = ceil(sinks / p) + 2 L                             list entries
        nbytes = B (G (D + E) ((S + R_far) itemsize + L p c) + R_far c + 8 S + 4 P + 16 G + 24) + 4 (R + 1)

    and, shared by the batch, 4 G p 2 p c for learned filters and 8 for each rotated pair of channels. L is the
    smallest number of levels that reaches back over `capacity` tokens: nbytes grows with log(capacity) and does not
    depend on how many tokens there were. With a horizon L is at most that of the horizon, and there is no capacity.
    """

    shared: ClassVar[tuple[str, ...]] = ("near_index", "filters", "turns")

    block: int
    near: int
    rank: int
    sinks: int
    near_k: Float[Tensor, "B G S D"]  # rotated, if anything is
    near_v: Float[Tensor, "B G S E"]
    far_k: Float[Tensor, "B G R D"]  # sinks, then each level's groups in slots of their own; rotated
    far_v: Float[Tensor, "B G R E"]
    sum_k: Float[Tensor, "B G L p D"]  # per level the group in the making, float32 or wider
    sum_v: Float[Tensor, "B G L p E"]
    bias: Float[Tensor, "B 1 R"]
    near_end: Int[Tensor, "B 1 S"]
    near_index: Int[Tensor, "1 1 1 N"]
    near_count: Int[Tensor, "B 1 1"]
    far_index: Int[Tensor, "B 1 1 P"]
    far_count: Int[Tensor, "B 1 1"]
    position: Int[Tensor, "B 1 1"]
    clock: Int[Tensor, "B C"]
    filters: Float[Tensor, "*filters"]  # [2, G, p, 2 p] of a learned pool, or empty
    turns: Float[Tensor, " pairs"]  # turns a token of each rotated pair of channels
    endless: int = 0  # 1: what lies beyond the levels is not read, and the ring never full

    @staticmethod
    def empty(
        batch: int,
        kv_heads: int,
        width: int,
        value_width: int | None = None,
        *,
        capacity: int,
        block: int = 64,
        near: int = 128,
        rank: int = 16,
        sinks: int = 0,
        pool: Pool | None = None,
        rotary: Rotary | None = None,
        levels: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> FMARing:
        """A ring without tokens. Everything is allocated here.

        Args:
            batch, kv_heads, width, value_width: B, G, D and E (default D).
            capacity: tokens that a sequence may have; `ring.capacity` may be larger. Past it, `step` raises on the CPU
                and returns NaN on a GPU.
            block, near, rank, sinks: as for FMA.
            pool: MeanPool or FilterPool, whose filters are taken as they are now. Default the mean.
            rotary: a rotation of halves with `pairs` and `base`, such as farfield.nn.Rope.
            levels: at most; if the capacity needs more, what lies beyond them is not read and the ring is endless.

        Raises:
            ValueError: the sizes do not fit together, or the capacity needs more levels than a block has tokens.
            NotImplementedError: another pool or another rotation.
        """
        check_rank(block, rank)
        radii(near, block, 0)
        if not 0 <= sinks <= block:
            raise ValueError(f"FMARing: sinks must lie in 0 .. block={block}, got {sinks}")
        plan = _plan(capacity, block, near, rank, sinks, levels)
        wide = torch.promote_types(dtype, torch.float32)
        value_width = width if value_width is None else value_width

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        bias = zeros(batch, 1, plan.far_rows, dtype=wide)
        bias[:, :, sinks : plan.start(0) * rank] = float("-inf")
        for level in range(plan.levels):
            rows = slice(plan.start(level) * rank, plan.start(level + 1) * rank)
            # every group but the first is whole
            bias[:, :, rows] = torch.tensor(plan.counts(level, 1), dtype=wide).log().repeat(plan.slots(level))
        return FMARing(
            block,
            near,
            rank,
            sinks,
            zeros(batch, kv_heads, plan.near_rows, width),
            zeros(batch, kv_heads, plan.near_rows, value_width),
            zeros(batch, kv_heads, plan.far_rows, width),
            zeros(batch, kv_heads, plan.far_rows, value_width),
            zeros(batch, kv_heads, plan.levels, rank, width, dtype=wide),
            zeros(batch, kv_heads, plan.levels, rank, value_width, dtype=wide),
            bias,
            torch.full((batch, 1, plan.near_rows), HIDDEN, dtype=torch.long, device=device),
            torch.arange(near // block + 1, dtype=torch.int32, device=device)[None, None, None],
            zeros(batch, 1, 1, dtype=torch.int32),
            zeros(batch, 1, 1, plan.picks, dtype=torch.int32),
            zeros(batch, 1, 1, dtype=torch.int32),
            zeros(batch, 1, 1, dtype=torch.long),
            zeros(batch, 2 * kv_heads + 1, dtype=torch.long),
            _filters(pool, kv_heads, rank, wide, device),
            turns_of(rotary, width, device),
            plan.endless,
        )

    @staticmethod
    @torch.no_grad()
    def from_state(
        state: FMAState,
        *,
        capacity: int,
        sinks: int = 0,
        pool: Pool | None = None,
        rotary: Rotary | None = None,
        levels: int | None = None,
    ) -> FMARing:
        """The ring that goes on where a state of `extend` stands: prefill there, decode here. Arguments as for `empty`.

        Raises:
            ValueError: the state has more tokens than `capacity`, or as for `empty`.
        """
        batch, kv_heads, _, width = state.k.shape
        ring = FMARing.empty(
            batch, kv_heads, width, state.v.shape[3], capacity=capacity, block=state.block, near=state.near,
            rank=state.rank, sinks=sinks, pool=pool, rotary=rotary, levels=levels, dtype=state.k.dtype,
            device=state.k.device,
        )  # fmt: skip
        if state.tokens > ring.capacity:
            raise ValueError(f"FMARing: the state has {state.tokens} tokens, capacity={capacity} is too small")
        if state.tokens:
            with precision.kept(state.k):
                _fill(ring, state, pool or MeanPool(), rotary)
        return ring

    @property
    def plan(self) -> Plan:
        return Plan(self.block, self.near, self.rank, self.sinks, self.sum_k.shape[2], self.endless)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have."""
        return self.plan.capacity

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step: on a GPU, where kernels take it."""
        return taken_by_kernels(self.near_k, self.near_v)

    def to(self, device: torch.device | str) -> FMARing:
        """The ring on another device."""
        return self.replaced({name: x.to(device) for name, x in self.tensors().items()})

    def reorder(self, beams: Int[Tensor, " beams"]) -> FMARing:
        """A ring whose sequence i is this one's sequence beams[i]."""
        turned = {name: x.index_select(0, beams.to(x.device)) for name, x in self.by_sequence().items()}
        return self.replaced(turned)

    def reset_(self, sequences: Int[Tensor, " sequences"] | None = None) -> None:
        """Forget the tokens of these sequences, or of all, in place."""
        # what was never written is never read, but a ring past its capacity holds NaN, and 0 times NaN is NaN
        zero_((self.clock, self.near_k, self.near_v, self.far_k, self.far_v, self.sum_k, self.sum_v), sequences)

    @staticmethod
    def join(rings: Sequence[FMARing]) -> FMARing:
        """One ring of all sequences of rings of one kind, each where it stands: prefill apart, decode together.

        Raises:
            ValueError: the rings differ in more than batch and tokens.
        """
        first = rings[0]
        for ring in rings[1:]:
            mine, theirs = (
                [r.plan, [(x.shape[1:], x.dtype, x.device) for x in r.by_sequence().values()]] for r in (first, ring)
            )
            same = all(torch.equal(getattr(first, name), getattr(ring, name)) for name in first.shared)
            if mine != theirs or not same:
                raise ValueError(f"FMARing.join: rings must be of one kind, got {first.plan} and {ring.plan}")
        joined = {name: torch.cat([getattr(ring, name) for ring in rings]) for name in first.by_sequence()}
        return first.replaced(joined)

    def save(self, path: str | Path) -> None:
        """Write the ring to a safetensors file; `farfield.state.State.load` reads it."""
        save(self, path)

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
        """
        batch = len(self.near_k)
        turned = self.append(q, k, v)
        near_list = self.near_index.expand(batch, -1, -1, -1)
        near = Layout(near_list, self.near_count, 1, self.block, 1, self.near_k.shape[2], causal=True)
        far = Layout(self.far_index, self.far_count, 1, self.rank, 1, self.far_k.shape[2])
        sources = [
            (Rows(self.near_k, self.near_v, end=self.near_end), near),
            (Rows(self.far_k, self.far_v, bias=self.bias), far),
        ]
        q = turned if turned.numel() else q
        return attend(q, sources, scale=scale, position=self.position).out

    @torch.no_grad()
    def append(
        self, q: Float[Tensor, "B H 1 D"], k: Float[Tensor, "B G 1 D"], v: Float[Tensor, "B G 1 E"]
    ) -> Float[Tensor, "*turned"]:
        """Take one token a sequence without reading anything. Returns q rotated, empty if nothing is."""
        check_token("FMARing", q, k, v, self.near_k, self.near_v)
        with precision.kept(q):
            return append(
                q, k, v, self.near_k, self.near_v, self.far_k, self.far_v, self.sum_k, self.sum_v, self.bias,
                self.near_end, self.near_count, self.far_index, self.far_count, self.position, self.clock,
                self.filters, self.turns, list(self.plan),
            )  # fmt: skip


def zero_(buffers: Sequence[Tensor], sequences: Tensor | None) -> None:
    """Zeros for these sequences, or for all."""
    for x in buffers:
        if sequences is None:
            x.zero_()
        else:
            x.index_fill_(0, sequences.to(x.device), 0)


def _plan(capacity: int, block: int, near: int, rank: int, sinks: int, most: int | None) -> Plan:
    if capacity < 1:
        raise ValueError(f"FMARing: capacity must be at least 1, got {capacity}")
    levels = 1
    while (plan := Plan(block, near, rank, sinks, levels)).capacity < capacity and levels != most:
        levels += 1
    if levels > block:
        most = Plan(block, near, rank, sinks, block).capacity
        raise ValueError(
            f"FMARing: capacity={capacity} needs {levels} levels, but blocks of {block} tokens have time for {block}: "
            f"one level moves up a token. Use a capacity up to {most} or larger blocks."
        )
    return plan._replace(endless=int(plan.capacity < capacity))


def _filters(
    pool: Pool | None, kv_heads: int, rank: int, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """The pool's child -> parent filters for K and V, [2, G, p, 2 p]; empty for the mean."""
    if pool is None or type(pool) is MeanPool:
        return torch.empty(0, dtype=dtype, device=device)
    if not isinstance(pool, FilterPool):
        raise NotImplementedError(
            f"FMARing: takes MeanPool and FilterPool, got {type(pool).__name__}; decode this pool with extend"
        )
    pool.check({"kv_heads": kv_heads, "rank": rank})
    # the pool is linear: what it makes of unit rows are its filters
    unit = torch.eye(2 * rank, dtype=dtype, device=device).view(1, 1, 2, rank, -1).expand(-1, kv_heads, -1, -1, -1)
    with torch.no_grad(), precision.kept(unit):
        found = pool.parent(Groups(unit, unit), 1)
    return torch.stack([found.k[0, :, 0], found.v[0, :, 0]]).contiguous()


def turns_of(rotary: Rotary | None, width: int, device: torch.device | str | None) -> Tensor:
    """Turns a token of each rotated pair of channels."""
    pairs, base = (0, 1.0) if rotary is None else (getattr(rotary, name, None) for name in ("pairs", "base"))
    if pairs is None or base is None:
        raise NotImplementedError(
            "FMARing: rotary must rotate channels c and c + pairs by position * base^(-c / pairs) and tell `pairs` and "
            f"`base`, as farfield.nn.Rope does; got {type(rotary).__name__}. Decode others with extend."
        )
    if 2 * pairs > width:
        raise ValueError(f"FMARing: {pairs} rotated pairs do not fit a width of {width}")
    channel = torch.arange(pairs, dtype=torch.float64, device=device)
    return base ** (-channel / max(pairs, 1)) / (2 * torch.pi)


def _fill(ring: FMARing, state: FMAState, pool: Pool, rotary: Rotary | None) -> None:
    """Bring an empty ring to where the state stands."""
    plan, tokens, m, p = ring.plan, state.tokens, state.block, state.rank
    device, first, last = state.k.device, state.first * state.block, (state.tokens - 1) // state.block

    def turned(x: Tensor, position: Tensor) -> Tensor:
        return x if rotary is None else rotary(x, position)

    # tokens, one by one; a state that can be rewound holds more
    start = max(last - plan.radius(0), 0) * m
    at = torch.arange(start, tokens, device=device)
    recent = (x[:, :, start - first :] for x in (state.k, state.v))
    for kind, (near, x) in enumerate(zip((ring.near_k, ring.near_v), recent, strict=True)):
        near[:, :, at % plan.near_rows] = x if kind else turned(x, at)
    ring.near_end[:, :, at % plan.near_rows] = at
    held = state.sink_k.shape[2]
    ring.far_k[:, :, :held] = turned(state.sink_k, torch.arange(held, device=device))
    ring.far_v[:, :, :held] = state.sink_v

    # the open block, or the complete one that the next token moves up
    begun = torch.arange(last * m, tokens, device=device)
    segment = m // p
    counts = torch.tensor(plan.counts(0, last), device=device).clamp(min=1)
    share = (begun >= plan.sinks).to(ring.sum_k.dtype) / counts[(begun - last * m) // segment]
    for sums, x in ((ring.sum_k, state.k), (ring.sum_v, state.v)):
        x = x[:, :, last * m - first :].to(sums.dtype) * share[:, None]
        sums[:, :, 0].index_add_(2, (begun - last * m) // segment, x)

    # all groups that can still matter: the state's, and those of the blocks complete since then
    grown = state.grown[-1]
    stop = tokens // m
    blocks_k, blocks_v = (
        to_blocks(x[:, :, grown.blocks * m - first :], m, stop - grown.blocks) for x in (state.k, state.v)
    )
    count = None
    if plan.sinks:
        here = torch.arange(grown.blocks * m, stop * m, device=device) >= plan.sinks
        count = here.to(blocks_k.dtype).view(1, 1, -1, m).expand(len(state.k), -1, -1, -1)
    new: list[Groups] = []
    if stop > grown.blocks:
        new = pool.grow(blocks_k, blocks_v, count, rank=p, first=grown.blocks, pending=grown.pending)[0]
    pending = grown.pending
    for level in range(plan.levels):
        # a level moves up at its own token of the next block
        moved = max((tokens - 1 - level) // m, 0) >> level
        made = grown.blocks >> level
        fresh = new[level] if level < len(new) else None
        if level < len(state.levels):
            old = state.levels[level]
            groups = range(old.first, min(made, moved))
            _place(ring, level, groups, old.k.unflatten(2, (-1, p)), old.v.unflatten(2, (-1, p)), old.first, turned)
        if fresh is not None:
            _place(ring, level, range(made, moved), fresh.k, fresh.v, made, turned)
        if level + 1 == plan.levels or not moved:
            continue
        # what the parent in the making has taken: its even child, or both
        for group in range((moved - 1) // 2 * 2, moved):
            if group >= made and fresh is not None:
                child = fresh.cut(group - made, group - made + 1)
            elif level < len(pending) and group == made - 1 and made % 2:
                child = pending[level]
            else:
                continue  # both children of a parent that has moved up itself
            assert child is not None
            for kind, (sums, x) in enumerate(((ring.sum_k, child.k), (ring.sum_v, child.v))):
                shares = plan.shares(level, group, ring.filters[kind].cpu() if ring.filters.numel() else None)
                sums[:, :, level + 1] += shares.to(x) @ x[:, :, 0].to(sums.dtype)

    n = torch.tensor(plan.listed(last), dtype=torch.int32, device=device)
    ring.near_count.fill_(min(last, plan.radius(0)) + 1)
    ring.far_index[..., : len(n)] = n
    ring.far_count.fill_(len(n))
    ring.position.fill_(tokens - 1)
    ring.clock.fill_(tokens)


def _place(
    ring: FMARing,
    level: int,
    groups: range,
    k: Tensor,
    v: Tensor,
    first: int,
    turned: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Groups of a level, k and v [B, G, N, p, ...] from group `first` on, to their slots: the newest that fit."""
    plan, p = ring.plan, ring.rank
    for group in groups[-plan.slots(level) :]:
        rows = slice(plan.slot(level, group) * p, (plan.slot(level, group) + 1) * p)
        centres = torch.tensor(plan.centres(level, group), dtype=torch.float64, device=k.device)
        # rounded before they are turned, as extend does
        ring.far_k[:, :, rows] = turned(k[:, :, group - first].to(ring.far_k.dtype), centres)
        ring.far_v[:, :, rows] = v[:, :, group - first].to(ring.far_v.dtype)
        if plan.sinks:
            ring.bias[:, :, rows] = torch.tensor(plan.counts(level, group), device=k.device).to(ring.bias).log()
