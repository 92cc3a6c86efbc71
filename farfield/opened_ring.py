"""Opened FMA's decode state in buffers of fixed size: a FMARing, all tokens, all summaries, and what is chosen by.

The tokens of far blocks may stay in pinned host memory, from which a step takes those that it opens and no others:
a GPU reads it at its device address, so that the host neither waits nor does anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from farfield.mechanism import Rotary
from farfield.ops.attend import attend
from farfield.ops.opened_step import SCORES, Plan, Step, refusal
from farfield.ring import FMARing, zero_
from farfield.select import opened
from farfield.select.opened_step import fetch_opened, opened_step, write_lists
from farfield.summarize import Pool, span_of_rows, to_blocks
from farfield.token_ring import Ring
from farfield.types import Layout, Rows

if TYPE_CHECKING:
    from farfield.mechanisms.fma import OpenedState

STORES = ("device", "host")
STORED = ("all_k", "all_v")


@dataclass(frozen=True)
class OpenedRing(Ring):
    """Opened FMA's decode state in fixed buffers. `FMA.ring` makes one of a state, `FMA.step` takes a token.

    Changed in place by `step`, `reset_` and `reorder_`; the other methods return new rings. For a capacity of C tokens
    in N blocks, beside a FMARing for as many tokens:

        tokens     B G C (D + E) itemsize           in host memory with store="host"
        summaries  about 2 N p, B G (D + E) itemsize each, and their biases
        sketches   about 2 N detail, B G D numbers of float32 each, twice as many for some scores

    so that with blocks of 64, p = 4, detail = 16 and bfloat16 a GPU holds 5/8 of the tokens' bytes beside them.
    """

    shared: ClassVar[tuple[str, ...]] = ("bias", "weight", "entries", *(f"ring.{name}" for name in FMARing.shared))

    store: str  # where all_k and all_v are: "device", or "host" with the rest on the device
    ring: FMARing
    plan: Plan
    all_k: Float[Tensor, "B G C D"]  # rotated
    all_v: Float[Tensor, "B G C E"]
    kept_k: Float[Tensor, "B G F D"]  # sinks, then all groups of each level; rotated
    kept_v: Float[Tensor, "B G F E"]
    bias: Float[Tensor, "... F"]
    sketches: Float[Tensor, "B G K X"]
    near: Int[Tensor, "B L 1 P"]
    near_count: Int[Tensor, "B L 1"]
    far: Int[Tensor, "B L 1 Q"]
    far_count: Int[Tensor, "B L 1"]
    position: Int[Tensor, "B L 1"]
    clock: Int[Tensor, "B programs"]
    weight: Float[Tensor, "*weight"]  # of the learned score, or empty
    entries: Int[Tensor, "1 1 1 P"]

    @staticmethod
    @torch.no_grad()
    def from_state(
        state: OpenedState,
        *,
        heads: int,
        capacity: int,
        sinks: int,
        opening: Mapping[str, int],
        scale: float,
        store: str = "device",
        level_bias: Tensor | None = None,
        weight: Tensor | None = None,
        pool: Pool | None = None,
        rotary: Rotary | None = None,
        levels: int | None = None,
    ) -> OpenedRing:
        """The ring that goes on where a state stands; FMA.ring calls this with what the mechanism was made with.

        Args:
            heads: H.
            scale: factor on q . k.
            opening: picks, beam, shared, detail, summed, hold and score, as Plan has them.
            store: "device", or "host" for the tokens in pinned host memory.
            level_bias: [G, levels], added to the logits of the summaries.
            weight: [G, D], of the learned score.
            levels: at most; what lies beyond them is not read.

        Raises:
            ValueError: no such store, or the state has more tokens than `capacity`.
            NotImplementedError: heads open groups of their own, which a host store cannot fetch, or as for FMARing.
        """
        if store not in STORES:
            raise ValueError(f"OpenedRing: store must be one of {', '.join(STORES)}, got {store!r}")
        batch, kv_heads, _, width = state.k.shape
        if store == "host" and not opening["shared"] and heads != kv_heads:
            raise NotImplementedError(
                f"OpenedRing: store='host' fetches what a key head's queries open together, but shared=False lets "
                f"{heads // kv_heads} of them choose apart; use shared=True or store='device'"
            )
        inner = FMARing.from_state(state, capacity=capacity, sinks=sinks, pool=pool, rotary=rotary, levels=levels)
        blocks, device = -(-capacity // state.block), state.k.device
        plan = Plan(*inner.plan[:5], blocks * state.block, **opening)
        if level_bias is not None and level_bias.shape[1] < sum(n > 0 for n in plan.groups):
            raise ValueError(
                f"OpenedRing: level_bias has {level_bias.shape[1]} levels, but capacity={capacity} needs "
                f"{sum(n > 0 for n in plan.groups)}; build FMA with more"
            )
        wide = inner.sum_k.dtype
        size = width * (1 if plan.score == SCORES.index("mean") else 2)
        size = width + 1 if plan.score == SCORES.index("ball") else size
        lists = kv_heads if plan.shared else heads
        pinned = store == "host" and device.type == "cuda"
        at_home = torch.device("cpu") if store == "host" else device

        def zeros(*shape: int, dtype: torch.dtype = state.k.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def stored(like: Tensor) -> Tensor:
            shape = batch, kv_heads, plan.capacity, like.shape[3]
            return torch.zeros(shape, dtype=like.dtype, device=at_home, pin_memory=pinned)

        near, far = plan.widths
        made = OpenedRing(
            store,
            inner,
            plan,
            stored(state.k),
            stored(state.v),
            zeros(batch, kv_heads, plan.far_rows, width),
            zeros(batch, kv_heads, plan.far_rows, state.v.shape[3]),
            _bias(plan, wide, level_bias, batch if lists < heads else 0).to(device),
            zeros(batch, kv_heads, sum(plan.groups) * plan.detail, size, dtype=wide),
            zeros(batch, lists, 1, near, dtype=torch.int32),
            zeros(batch, lists, 1, dtype=torch.int32),
            zeros(batch, lists, 1, far, dtype=torch.int32),
            zeros(batch, lists, 1, dtype=torch.int32),
            zeros(batch, lists, 1, dtype=torch.long),
            torch.full((batch, kv_heads + lists), state.tokens, dtype=torch.long, device=device),
            zeros(0, dtype=wide) if weight is None else weight.detach().to(device, wide).clone(),
            torch.arange(near, dtype=torch.int32, device=device)[None, None, None],
        )
        if state.tokens > plan.capacity:
            raise ValueError(f"OpenedRing: the state has {state.tokens} tokens, capacity={capacity} is too small")
        if state.tokens:
            made._fill(state, rotary)
        if state.tokens % plan.hold:
            # the run that goes on has been chosen for
            for b, asker in enumerate(state.askers[:, :, -1:].split(1)):
                write_lists(asker, made.buffers(), b, state.tokens, scale)
        return made

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have."""
        return self.plan.capacity

    @property
    def host_nbytes(self) -> int:
        """Bytes of them that are not on the device."""
        return sum(getattr(self, name).nbytes for name in STORED) if self.store == "host" else 0

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step: on a GPU, where kernels take it."""
        return self.ring.capturable and refusal(self.ring.near_k, self.buffers()) is None

    @staticmethod
    def join(rings: Sequence[OpenedRing]) -> OpenedRing:
        """One ring of all sequences of rings of one kind, each where it stands: prefill apart, decode together.

        Raises:
            ValueError: the rings differ in more than batch and tokens.
        """
        first = rings[0]
        for ring in rings[1:]:
            mine, theirs = (
                [r.plan, r.store, [(x.shape[1:], x.dtype, x.device) for x in r.by_sequence().values()]]
                for r in (first, ring)
            )
            if mine != theirs or not torch.equal(ring.weight, first.weight) or not _alike(ring.bias, first.bias):
                raise ValueError(
                    "OpenedRing.join: rings must be of one kind, with the same level_bias, weight and heads, got "
                    f"{first.plan} and {ring.plan}"
                )
        own = [name for name in first.by_sequence() if not name.startswith("ring.")]
        joined = {name: _joined([getattr(ring, name) for ring in rings]) for name in own}
        if len(first.bias) > 1:
            joined["bias"] = torch.cat([ring.bias for ring in rings])
        return replace(first, ring=FMARing.join([ring.ring for ring in rings]), **joined)

    def reset_(self, sequences: Int[Tensor, " sequences"] | None = None) -> None:
        """Forget the tokens of these sequences, or of all, in place."""
        self.ring.reset_(sequences)
        # the tokens of a block are read together, hidden where they come later; but 0 times NaN is NaN
        zero_((self.clock, self.all_k, self.all_v), sequences)

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
            ValueError: shapes do not fit the ring, or the ring is full (CPU; on a GPU outputs are NaN from there on).
        """
        plan, lists, heads = self.plan, self.near.shape[1], q.shape[1]
        # a level_bias is laid out for lists of one head or of several
        other = self.bias.shape[1 if lists < heads else 0] > 1
        if heads % lists or (not plan.shared and lists != heads) or other:
            raise ValueError(f"OpenedRing: was made for other heads than the {heads} of q; make it with heads={heads}")
        self._check_room()
        turned = self.ring.append(q, k, v)
        q = turned if turned.numel() else q
        batch, _, _, width = q.shape
        scale = width**-0.5 if scale is None else scale
        ring = self.ring
        *buffers, _ = self.buffers()
        opened_step(q, *buffers, list(plan), scale)
        near, far, position = self.near, self.far, self.position
        tokens, kept = Rows(self.all_k, self.all_v), (self.kept_k, self.kept_v)
        if self.store == "host":
            held_k, held_v, end = fetch_opened(
                self.all_k, self.all_v, ring.near_k, ring.near_v, near, self.near_count, position, list(plan)
            )
            tokens, near = Rows(held_k, held_v, end=end), self.entries.expand(batch, lists, 1, -1)
        near_count, far_count = self.near_count, self.far_count
        if lists < heads:
            # heads that share a list are, with their key head, one sequence
            q = q.reshape(batch * lists, heads // lists, 1, width)
            apart = batch * lists, 1
            tokens = Rows(
                *(x.view(*apart, *x.shape[2:]) for x in (tokens.k, tokens.v)),
                end=None if tokens.end is None else tokens.end.view(*apart, -1),
            )
            kept = [x.view(*apart, *x.shape[2:]) for x in kept]
            near, far, near_count, far_count, position = (
                x.reshape(*apart, *x.shape[2:]) for x in (near, far, near_count, far_count, position)
            )
        sources = [
            (tokens, Layout(near, near_count, 1, plan.block, 1, len(tokens), causal=True)),
            (Rows(*kept, bias=self.bias), Layout(far, far_count, 1, plan.rank, 1, plan.far_rows)),
        ]
        out = attend(q, sources, scale=scale, position=position).out
        return out.reshape(batch, heads, 1, -1)

    def buffers(self) -> Step:
        """All of them, as the operation takes them."""
        ring = self.ring
        return Step(
            ring.near_k, ring.near_v, ring.far_k, ring.far_v, self.all_k, self.all_v, self.kept_k, self.kept_v,
            self.sketches, self.near, self.near_count, self.far, self.far_count, self.position, self.clock,
            self.weight, self.plan,
        )  # fmt: skip

    def _fill(self, state: OpenedState, rotary: Rotary | None) -> None:
        """Bring an empty ring, of which the inner one is there, to where the state stands."""
        plan, ring, tokens, begin = self.plan, self.ring, state.tokens, state.begin
        m, p, device = plan.block, plan.rank, self.kept_k.device
        for every, x in ((self.all_k, state.all_k), (self.all_v, state.all_v)):
            every[:, :, begin * m : tokens] = x.to(every.device)
        for kept, far in ((self.kept_k, ring.far_k), (self.kept_v, ring.far_v)):
            kept[:, :, : plan.sinks] = far[:, :, : plan.sinks]
        summarized = state.grown[-1].blocks
        for height, start in enumerate(plan.starts):
            if height < len(state.levels):
                old = state.levels[height]
                k, many = old.k, old.k.shape[2]
                if rotary is not None:
                    groups = old.first + torch.arange(many // p, device=device)
                    first, stop = span_of_rows(groups, height, m, p, False)
                    k = rotary(k, (first + stop - 1).double() / 2)
                to = (start + old.first) * p
                self.kept_k[:, :, to : to + many] = k
                self.kept_v[:, :, to : to + many] = old.v
            # what the inner ring has made since, a level a token
            for group in range(summarized >> height, max((tokens - 1 - height) // m, 0) >> height):
                slot = ring.plan.slot(height, group)
                here, to = slice(slot * p, (slot + 1) * p), slice((start + group) * p, (start + group + 1) * p)
                self.kept_k[:, :, to], self.kept_v[:, :, to] = ring.far_k[:, :, here], ring.far_v[:, :, here]
        levels, blocks = list(state.sketches), tokens // m
        done = begin + levels[0].rows.shape[2] if levels else 0
        if blocks > done:
            at = torch.arange(done * m, blocks * m, device=device).view(1, blocks - done, m)
            keys = to_blocks(state.all_k[:, :, (done - begin) * m : (blocks - begin) * m].to(device), m, blocks - done)
            present = (at >= plan.sinks).expand(keys.shape[0], -1, -1)
            new = opened.sketch(SCORES[plan.score], keys, present, plan.detail, below=levels)
            levels = [*(opened.joined(*pair) for pair in zip(levels, new, strict=False)), *new[len(levels) :]]
        at = 0
        for height, (groups, level) in enumerate(zip(plan.groups, levels, strict=False)):
            rows, first = level.rows.flatten(2, 3), at + (begin >> height) * plan.detail
            self.sketches[:, :, first : first + rows.shape[2]] = rows
            at += groups * plan.detail

    def _check_room(self) -> None:
        """On the CPU: raise before anything is written, so that the sequences that have room can go on."""
        if self.clock.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if full := (self.tokens >= self.capacity).nonzero().flatten().tolist():
            raise ValueError(
                f"OpenedRing: the ring holds {self.capacity} tokens and is full for sequences {full}; reset_ them, or "
                "make one with a larger capacity"
            )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Along the batch, in pinned memory if they are."""
    shape = sum(len(x) for x in parts), *parts[0].shape[1:]
    into = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device, pin_memory=parts[0].is_pinned())
    return torch.cat(list(parts), out=into)


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether the biases of two rings are the same for each sequence; see _bias."""
    each = math.gcd(len(x), len(y))
    return x.shape[1:] == y.shape[1:] and torch.equal(x[:each], y[:each])


def _bias(plan: Plan, dtype: torch.dtype, learned: Tensor | None, apart: int) -> Tensor:
    """Log of the tokens of each far row, [1, 1, F]; with what is learned [1, G, F], or [apart * G, 1, F]."""
    at = torch.arange(plan.sink_groups * plan.rank)
    found = [torch.zeros(len(at), dtype=dtype).masked_fill(at >= plan.sinks, -math.inf)]
    more = []
    for height, groups in enumerate(plan.groups):
        width = (plan.block << height) // plan.rank
        first = torch.arange(groups * plan.rank) * width
        found.append((width - (plan.sinks - first).clamp(0, width)).to(dtype).log())
        if learned is not None and groups:
            more.append(learned.detach()[:, height : height + 1].to("cpu", dtype).expand(-1, len(first)))
    bias = torch.cat(found)[None]
    if learned is not None:
        bias = bias + torch.cat([bias.new_zeros(len(learned), len(at)), *more], 1)
    return bias.repeat(apart, 1)[:, None] if apart and learned is not None else bias[None]
