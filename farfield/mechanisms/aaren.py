"""Aaren: attention of one query per head over every prefix, as a recurrent network with a constant state.

    s[i] = scale * q . k[i],    out[t] = sum over i <= t of e^(s[i]) v[i] / sum over i <= t of e^(s[i])

    token t:   m' = max(m, s[t]),   u' = u e^(m - m') + e^(s[t] - m'),   w' = w e^(m - m') + e^(s[t] - m') v[t],
               out[t] = w' / u',    from m = -inf, u = w = 0

The query does not depend on the token that asks, so this is a layer of its own and no form of self-attention: the
average over the past with one learned notion of what matters. (m, u, w) over two runs of tokens merge as partial
softmaxes do, which is associative: all outputs come from one parallel scan.
T * D work, times the chunk of the scan; the state keeps E + 2 numbers a head.
Departs from the paper: scores are scaled by 1 / sqrt(D); the state starts from -inf, not 0, which underflows where all
scores are far below 0; the scan's tree has the fan of a chunk, not 2. Whether the paper's own scores are scaled could
not be confirmed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farfield.mechanism import Case, Mechanism, Paper, Rotary, State, Supports, no_tokens
from farfield.ops import averages as op
from farfield.ops.scan import Prefix, prefix_scores, prefix_softmax
from farfield.token_ring import StateRing


@dataclass(frozen=True)
class AarenState(State):
    """Softmax sums over all tokens so far, and what they were scored with. Before the first token: none."""

    query: Tensor | None = None  # [B, H, D]
    peak: Tensor | None = None  # [B, H]
    mass: Tensor | None = None  # [B, H]
    total: Tensor | None = None  # [B, H, E]


class Aaren(Mechanism):
    """Aaren.

    The learned query token reaches a mechanism in one of two ways. By default the query of head h is that of the first
    token, q[:, h, 0]: where every text starts with the same token, this is the paper's layer, since that token sees
    nothing but itself and the layer's query projection is applied to it. With `width` the query is a parameter of the
    mechanism, and q counts only by its shape and gets no gradient.

    Args:
        width: D, for a learned query; None: that of the first token.
        queries: how many are learned: 1, which all heads share and meet with keys of their own, or one for each head.
    """

    paper = Paper(
        title="Attention as an RNN",
        authors="Feng, Tung, Hajimirsadeghi, Ahmed, Bengio, Mori",
        year=2024,
        arxiv="2405.13956",
    )
    decodes = (StateRing,)
    remembers = AarenState
    cases = (Case(), Case(options={"width": 16}, tokens=70, value_width=24))
    supports = Supports(noncausal=False)

    def __init__(self, *, width: int | None = None, queries: int = 1, causal: bool = True, scale: float | None = None):
        super().__init__(causal=causal, scale=scale)
        if queries < 1 or (width is not None and width < 1) or (width is None and queries > 1):
            raise ValueError(f"aaren: queries and width are at least 1, queries needs width; got {queries=}, {width=}")
        self.query = None if width is None else nn.Parameter(torch.randn(queries, width))

    def forward(self, q, k, v, *, group=None, rotary=None):
        if group is rotary is self.query is None:
            out = op.again(q, k, v, self.scale)
            if out is not None:
                return out
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        first = q if self.query is None else self._query(q)[:, :, None]
        return op.averages(first, k, v, self._factor(k))

    def extend(self, q, k, v, state: AarenState | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        seen = 0 if state is None else state.tokens
        if not q.shape[2]:
            return no_tokens(q, v), AarenState(0) if state is None else state
        query, sums = self._query(q), None
        if state is not None and state.total is not None:
            assert state.query is not None
            assert state.peak is not None
            assert state.mass is not None
            query, sums = state.query, Prefix(state.peak, state.mass, state.total)
        out, sums = prefix_softmax(self._scores(query, k), v, sums)
        return out, AarenState(seen + q.shape[2], query, *sums)

    def ring(self, state: AarenState, *, capacity: int | None = None, rotary: Rotary | None = None) -> StateRing:
        """As Mechanism.ring; of the same size for any capacity, so that it needs none."""
        self.check_ring(state, rotary)
        return StateRing.of(state)

    def step(self, q, k, v, ring: StateRing):
        self.check_step(ring)
        return ring.step(lambda state: self.extend(q, k, v, state))

    def reference(self, q, k, v):
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        # of no size, but a part of the graph
        query = q[:, :, :1] if self.query is None else self.query[None, :, None] + q[:, :, :0].sum(2, keepdim=True)
        scores = (query * k).sum(-1) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        t, i = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
        weights = scores[:, :, None].expand(-1, -1, q.shape[2], -1).masked_fill(i > t, float("-inf")).softmax(-1)
        return weights @ v

    def _query(self, q: Tensor) -> Tensor:
        """[B, H, D] in float32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        if self.query is None:
            return q[:, :, 0].to(wide)
        if self.query.shape[0] not in (1, q.shape[1]) or self.query.shape[1] != q.shape[3]:
            raise ValueError(
                f"aaren: the learned query is {list(self.query.shape)}, but q has {q.shape[1]} heads of width "
                f"{q.shape[3]}; build the mechanism with width={q.shape[3]}, queries=1 or {q.shape[1]}"
            )
        # the sum over no tokens is 0, keeps q a part of the graph, and reads nothing
        return self.query.to(wide) + q[:, :, :0].sum(2, dtype=wide)

    def _factor(self, k: Tensor) -> float:
        return k.shape[3] ** -0.5 if self.scale is None else self.scale

    def _scores(self, query: Tensor, k: Tensor) -> Tensor:
        """[B, H, T] of query [B, H, D] and k [B, G, T, D], in the query's dtype."""
        return prefix_scores(query * self._factor(k), k)
