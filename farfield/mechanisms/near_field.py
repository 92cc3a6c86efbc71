"""FMA's near field alone: what its far field has to beat, and a cheap layer beside few that look far.

    seen(i) = i's block and the near / block blocks before it, and the first `sinks` tokens;    j <= i
    out[i]  = sum over j in seen(i) of softmax_j(scale * q[i] . k[j]) v[j]

T * (near + block / 2 + sinks) scores; the state keeps at most near + block - 1 + sinks rows, and those of `rewind`.
Departs from the paper: there is no far field.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farfield.mechanism import Case, Mechanism, Paper, Rotary, State, Supports, no_tokens
from farfield.ops.attend import attend
from farfield.select.static import near_lists, pack_lists
from farfield.token_ring import TokenRing
from farfield.types import Layout, Rows


@dataclass(frozen=True)
class NearState(State):
    """Of what reads its own block of tokens, the `near` tokens before it, and the first ones: no others."""

    block: int
    near: int
    first: int  # position of the first row of `k` and `v`, where a block begins
    k: Tensor  # [B, G, tokens - first, D]
    v: Tensor
    sink_k: Tensor
    sink_v: Tensor

    def crop(self, drop: int) -> "NearState":
        """The state before the last `drop` tokens.

        Raises:
            ValueError: tokens that the next one reads are gone.
        """
        keep = self.left(drop)
        if self.first > max(keep // self.block * self.block - self.near, 0):
            raise self.forgotten(drop, self.tokens - self.first - self.near)
        rows = keep - self.first
        sinks = (x[:, :, :keep] for x in (self.sink_k, self.sink_v))
        sink_k, sink_v = sinks
        return replace(self, tokens=keep, k=self.k[:, :, :rows], v=self.v[:, :, :rows], sink_k=sink_k, sink_v=sink_v)


class NearField(Mechanism):
    """FMA's near field and sinks, and nothing else.

    Args:
        block, near, sinks, rewind: as FMA's.
    """

    paper = Paper(
        title="Fast Multipole Attention: A Scalable Multilevel Attention Mechanism for Text and Images",
        authors="Kang, Tran, De Sterck",
        year=2023,
        arxiv="2310.11960",
    )
    decodes = (TokenRing,)
    remembers = NearState
    cases = (Case(options={"block": 8, "near": 16, "sinks": 3}, tokens=101, block=8),)
    supports = Supports(noncausal=False)

    def __init__(
        self,
        *,
        block: int = 64,
        near: int = 128,
        sinks: int = 0,
        rewind: int = 0,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        if block < 1 or near < block or near % block or not 0 <= sinks <= block or rewind < 0:
            raise ValueError(
                "near-field: near must be a multiple of block, sinks at most block, and rewind at least 0; got "
                f"{block=}, {near=}, {sinks=}, {rewind=}"
            )
        self.block, self.near, self.sinks, self.rewind = block, near, sinks, rewind

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        far = Rows(k[:, :, : self.sinks], v[:, :, : self.sinks])
        near, sinks = self._layouts(q.shape[2], q.device)
        return attend(q, [(Rows(k, v), near), (far, sinks)] if len(far) else [(Rows(k, v), near)], scale=self.scale).out

    def extend(self, q, k, v, state: NearState | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        m, nothing = self.block, (k[:, :, :0], v[:, :, :0])
        state = state or NearState(0, m, self.near, 0, *nothing, *nothing)
        if not q.shape[2]:
            return no_tokens(q, v), state
        seen, first, tokens = state.tokens, state.first, state.tokens + q.shape[2]
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        held = (state.sink_k, state.sink_v) if seen >= self.sinks else (k[:, :, : self.sinks], v[:, :, : self.sinks])
        # a query block reads one list: further blocks must start where those of the sequence do
        lead = seen % m if (tokens - 1) // m > seen // m else 0
        asking = torch.nn.functional.pad(q, (0, 0, lead, 0))
        q_block = m if (tokens - 1) // m > seen // m else q.shape[2]
        n, radius = torch.arange(seen // m, (tokens - 1) // m + 1, device=q.device), self.near // m
        listed, used = near_lists(n[None], radius, True, torch.full_like(n, tokens)[None])
        index, count = pack_lists(listed - first // m, used)
        near = Layout(index[:, None], count[:, None], q_block, m, asking.shape[2], k.shape[2], True)
        sources = [(Rows(k, v, end=torch.arange(first, tokens, device=q.device)), near)]
        if self.sinks:
            sources.append((Rows(*held), self._sinks(n, q_block, asking.shape[2], held[0].shape[2])))
        position = torch.arange(seen - lead, tokens, device=q.device)
        out = attend(asking, sources, scale=self.scale, position=position).out[:, :, lead:]
        # the next token reads from here on; copies, or the state would hold on to the whole chunk
        now = max(max(tokens - self.rewind, 0) // m * m - self.near, 0)
        k, v, *held = (x.clone() for x in (k[:, :, now - first :], v[:, :, now - first :], *held))
        return out, NearState(tokens, m, self.near, now, k, v, *held)

    def ring(self, state: NearState, *, capacity: int | None = None, rotary: Rotary | None = None) -> TokenRing:
        """As Mechanism.ring; of the same size for any capacity, so that it needs none."""
        self.check_ring(state, rotary)
        k, v = torch.cat([state.sink_k, state.k], 2), torch.cat([state.sink_v, state.v], 2)
        sinks = torch.arange(state.sink_k.shape[2], device=k.device)
        at = torch.cat([sinks, torch.arange(state.first, state.tokens, device=k.device)])
        span = self.near + self.block
        return TokenRing.of(k, v, at, tokens=state.tokens, span=span, block=self.block, sinks=self.sinks)

    def ring_sizes(self):
        return {"block": self.block, "sinks": self.sinks, "span": self.near + self.block}

    def reference(self, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
        seen = (i // self.block - j // self.block <= self.near // self.block) | (j < self.sinks)
        return scores.masked_fill(~seen | (j > i), float("-inf")).softmax(-1) @ v

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """The layouts of the tokens and of the sinks."""
        return dict(zip(("near", "sinks"), self._layouts(tokens, torch.device("cpu")), strict=True))

    def _layouts(self, tokens: int, device: torch.device) -> tuple[Layout, Layout]:
        n, radius = torch.arange(-(-tokens // self.block), device=device), self.near // self.block
        index, count = pack_lists(*near_lists(n[None], radius, True, torch.full_like(n, len(n))[None]))
        near = Layout(index[:, None], count[:, None], self.block, self.block, tokens, tokens, True)
        return near, self._sinks(n, self.block, tokens, min(self.sinks, tokens))

    def _sinks(self, n: torch.Tensor, q_block: int, tokens: int, rows: int) -> Layout:
        """That of the sinks, for these query blocks: those that see token 0 among the near ones read no sink twice."""
        used = ((n > self.near // self.block) & (rows > 0)).int()[None, None]
        return Layout(torch.zeros_like(used)[..., None], used, q_block, max(rows, 1), tokens, rows)
