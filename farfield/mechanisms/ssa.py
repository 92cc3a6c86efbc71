"""Sparse sparse attention: one set of weights for a sparse and a full stream, trained to give the same outputs.

    score[m]  = sum over the query heads of a key head of softmax_m(scale * q[i] . mean(k over block m)),  m complete
    sparse[i] = softmax attention over i's block and the picks - 1 blocks before it that score best
    full[i]   = softmax attention over everything up to i
    loss      = alpha (smooth_l1(full, stop(sparse)) + smooth_l1(stop(full), sparse)),  of the gated outputs

full - sparse = delta * (dropped - sparse), where delta is the mass that full attention puts on what sparse attention
drops and `dropped` attention over that alone: what the loss bounds is the mass lost. A training step draws one stream
for all layers and adds the mean of the layers' losses; inference takes either stream.

Sparse: T * picks * block scores, and T^2 / (2 block) to choose by; training costs both streams. No parameters, no
gradient through the choice. The state keeps all tokens and the means of the complete blocks.
Departs from the paper: the output gate, made from the hidden state there, is an argument (default: none); decoding is
from a state. Of two equal scores the earlier block wins.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention, smooth_l1_loss

from farfield.mechanism import Case, Mechanism, Paper, Rotary, Supports, no_tokens
from farfield.scored_ring import ScoredRing
from farfield.select.scored import BlockCache, Scoring, attend_best, block_means, check, choose, remember, tokens_read
from farfield.token_ring import TokenRing
from farfield.types import Layout

STREAMS = ("sparse", "full")


class SSA(Mechanism):
    """Sparse sparse attention. `aligned` is the training step of a layer, `forward` and `extend` are one stream.

    Args:
        block: tokens of a block.
        picks: blocks that a query reads in the sparse stream, its own included.
        stream: "sparse" or "full", what `forward` and `extend` compute.
        alpha: factor of the alignment loss.
    """

    paper = Paper(
        title="SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in Feature Space",
        authors="Shen et al.",
        year=2025,
        arxiv="2511.20102",
        code="github.com/zhenyi4/ssa",
    )
    grouped = True
    decodes = (TokenRing,)
    remembers = BlockCache
    cases = (
        Case(options={"block": 8, "picks": 4}, tokens=91, block=8),
        Case(options={"block": 8, "picks": 3, "stream": "full"}, tokens=50, block=8, heads=6, value_width=24),
    )
    supports = Supports(noncausal=False, heads_apart=False)

    def __init__(
        self,
        *,
        block: int = 16,
        picks: int = 16,
        stream: str = "sparse",
        alpha: float = 10.0,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        self.scoring = Scoring(block, picks, block, block)
        check(self.scoring, "ssa")
        self.stream, self.alpha = _known(stream), alpha
        if stream == "full":
            self.supports = replace(self.supports, heads_apart=True)

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        if self.stream == "full":
            return self._full(q, k, v)
        return self._sparse(q, k, v, block_means(k, self.scoring.block), 0)

    def aligned(
        self, q: Tensor, k: Tensor, v: Tensor, *, stream: str | None = None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output of one stream, and the loss that pulls each stream towards the other.

        Args:
            stream: whose output goes on; one draw for all layers of a step. Default: the mechanism's.
            gate: [B, H, T], factor of both outputs.

        Returns:
            out [B, H, T, E], and the loss, alpha included: a float32 or wider number, to be averaged over layers.
        """
        self.check(q, k, v)
        stream = self.stream if stream is None else _known(stream)
        if gate is not None and gate.shape != q.shape[:3]:
            raise ValueError(f"ssa: gate must be [B, H, T] = {list(q.shape[:3])}, got {list(gate.shape)}")
        sparse, full = self._sparse(q, k, v, block_means(k, self.scoring.block), 0), self._full(q, k, v)
        if gate is not None:
            sparse, full = sparse * gate[..., None], full * gate[..., None]
        wide = torch.promote_types(q.dtype, torch.float32)
        a, b = sparse.to(wide), full.to(wide)
        loss = smooth_l1_loss(b, a.detach()) + smooth_l1_loss(a, b.detach())
        return sparse if stream == "sparse" else full, self.alpha * loss

    def extend(self, q, k, v, state: BlockCache | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        seen = 0 if state is None else state.tokens
        state = remember(state, k, v, self.scoring.block)
        if not q.shape[2]:
            return no_tokens(q, v), state
        if self.stream == "full":
            return self._full(q, state.k, state.v), state
        return self._sparse(q, state.k, state.v, state.means, seen), state

    def ring(self, state: BlockCache, *, capacity: int, rotary: Rotary | None = None) -> TokenRing:
        self.check_ring(state, rotary)
        return TokenRing.all_of(state, capacity) if self.stream == "full" else ScoredRing.after(state, capacity)

    def ring_sizes(self):
        return {"whole": True} if self.stream == "full" else {"scored": self.scoring.block}

    def step(self, q, k, v, ring: TokenRing):
        self.check_step(ring)
        if isinstance(ring, ScoredRing):
            return ring.read_best(q, k, v, self.scoring, scale=self.scale)
        return ring.step(q, k, v, scale=self.scale)

    def reference(self, q, k, v):
        block, picks, repeat = self.scoring.block, self.scoring.picks, q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        i = torch.arange(q.shape[2])
        own, seen = i // block, i <= i[:, None]
        if self.stream == "sparse":
            # a partial last block has the mean of what is there, which no query may count
            means = torch.stack([k[:, :, own == m].mean(2) for m in own.unique()], 2)
            past = own.unique() < ((i + 1) // block)[:, None]
            p = (q @ means.mT * scale).masked_fill(~past, float("-inf")).softmax(-1).nan_to_num(0.0)
            p = p.masked_fill(own.unique() == own[:, None], 1.0).masked_fill(own.unique() > own[:, None], -1.0)
            score = p.unflatten(1, (-1, repeat)).sum(2)
            chosen = torch.zeros_like(score, dtype=torch.bool)
            chosen = chosen.scatter(-1, score.topk(min(picks, score.shape[-1])).indices, True)
            seen = seen & chosen.repeat_interleave(repeat, 1)[..., own]
        return (q @ k.mT * scale).masked_fill(~seen, float("-inf")).softmax(-1) @ v

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """The sparse stream of a random sequence, for pictures; each key head and sequence has its own."""
        gen = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, 1, tokens, 16, generator=gen)
        choice = choose(q, block_means(k, self.scoring.block), self.scoring)
        return {"sparse, one head": Layout(*choice, 1, self.scoring.block, tokens, tokens, True)}

    def rows_read(self, tokens: int) -> float:
        return (tokens + 1) / 2 if self.stream == "full" else tokens_read(self.scoring, tokens)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, means: Tensor, first: int) -> Tensor:
        return attend_best(q, k, v, means, self.scoring, first=first, scale=self.scale)

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every query reads everything before it; the last query stands at the last row."""
        options = {"scale": self.scale, "enable_gqa": q.shape[1] != k.shape[1]}
        if q.shape[2] == k.shape[2]:
            return scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        return scaled_dot_product_attention(q, k, v, causal_lower_right(q.shape[2], k.shape[2]), **options)


def _known(stream: str) -> str:
    if stream not in STREAMS:
        raise ValueError(f"ssa: stream must be {' or '.join(map(repr, STREAMS))}, got {stream!r}")
    return stream
