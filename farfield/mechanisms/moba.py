"""Mixture of block attention: each query head reads its own block, and the past blocks whose mean key it matches best.

    score[i, m] = q[i] . mean(k over block m),    m before i's block
    seen(i)     = i's block, and the picks - 1 best of the blocks before it
    out[i]      = sum over j in seen(i), j <= i, of softmax_j(scale * q[i] . k[j]) v[j]

No parameters, no gradient through the choice. T * picks * block scores, and T * T / (2 block) to choose by.
The state keeps all tokens and the means of the complete blocks.
Departs from the paper: one attention over all chosen blocks, instead of two merged by their log-sum-exp; of two equal
scores the earlier block wins.
"""

import torch
from torch import Tensor

from farfield.mechanism import Case, Mechanism, Paper, Rotary, Supports, no_tokens
from farfield.scored_ring import ScoredRing
from farfield.select.scored import BlockCache, Scoring, attend_best, block_means, check, choose, remember, tokens_read
from farfield.types import Layout


class MoBA(Mechanism):
    """Mixture of block attention.

    Args:
        block: tokens of a block.
        picks: blocks that a query reads, its own included.
    """

    paper = Paper(
        title="MoBA: Mixture of Block Attention for Long-Context LLMs",
        authors="Lu et al.",
        year=2025,
        arxiv="2502.13189",
        code="github.com/MoonshotAI/MoBA",
    )
    grouped = True
    decodes = (ScoredRing,)
    remembers = BlockCache
    cases = (
        Case(options={"block": 16, "picks": 3}, tokens=90),
        Case(options={"block": 8, "picks": 4}, tokens=67, block=8, heads=6, value_width=24),
    )
    supports = Supports(noncausal=False)

    def __init__(self, *, block: int = 512, picks: int = 3, causal: bool = True, scale: float | None = None):
        super().__init__(causal=causal, scale=scale)
        self.scoring = Scoring(block, picks, block, block, shared=False)
        check(self.scoring, "moba")

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        return self._attend(q, k, v, block_means(k, self.scoring.block), 0)

    def extend(self, q, k, v, state: BlockCache | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        seen = 0 if state is None else state.tokens
        state = remember(state, k, v, self.scoring.block)
        return self._attend(q, state.k, state.v, state.means, seen), state

    def ring(self, state: BlockCache, *, capacity: int, rotary: Rotary | None = None) -> ScoredRing:
        self.check_ring(state, rotary)
        return ScoredRing.after(state, capacity)

    def ring_sizes(self):
        return {"scored": self.scoring.block}

    def step(self, q, k, v, ring: ScoredRing):
        self.check_step(ring)
        return ring.read_best(q, k, v, self.scoring, scale=self.scale)

    def reference(self, q, k, v):
        block, picks = self.scoring.block, self.scoring.picks
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        i = torch.arange(q.shape[2])
        own = i // block
        means = torch.stack([k[:, :, own == m].mean(2) for m in own.unique()], 2)
        gate = (q @ means.mT).masked_fill(own.unique() > own[:, None], float("-inf"))
        gate = gate.masked_fill(own.unique() == own[:, None], float("inf"))
        chosen = torch.zeros_like(gate, dtype=torch.bool)
        chosen.scatter_(-1, gate.topk(min(picks, gate.shape[-1])).indices, True)
        seen = chosen[..., own] & (i <= i[:, None])
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """The layout of a random sequence, for pictures: each head and sequence has its own."""
        gen = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, 1, tokens, 16, generator=gen)
        choice = choose(q, block_means(k, self.scoring.block), self.scoring)
        return {"one head": Layout(*choice, 1, self.scoring.block, tokens, tokens, True)}

    def rows_read(self, tokens: int) -> float:
        return tokens_read(self.scoring, tokens)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, means: Tensor, first: int) -> Tensor:
        if not q.shape[2]:
            return no_tokens(q, v)
        return attend_best(q, k, v, means, self.scoring, first=first, scale=self.scale)
