"""PowerAttention: each query reads the blocks at distances 1, 2, 4, 8, ..., so that what layers pass on grows as 2^L.

Tokens are cut into blocks. With d = I - J the distance of query block I and key block J, all heads and layers read

    seen(I) = { J <= I : d < window  or  J < sinks  or  d is a power of two }
    out[i]  = sum over the tokens j <= i of seen(i // block) of softmax_j(scale * q[i] . k[j]) v[j]

A layer is one hop, and distances are sums of hops: from powers alone, L layers reach exactly the distances with at most
L ones in binary, log2(N) layers all N blocks, where windows need N / window.

T * block * (window + sinks + log2(T / block)) scores. Every block will stand at a power of two again, so the decode
state keeps all tokens; a step reads log2(T / block) blocks of them.
Departs from the paper: nothing.
"""

from functools import partial

import torch
from torch.nn.functional import pad

from farfield.mechanism import Case, Mechanism, Paper, Rotary, Supports, no_tokens
from farfield.ops.attend import attend
from farfield.select import static
from farfield.state import Cache
from farfield.token_ring import TokenRing
from farfield.types import Layout, Rows


class PowerAttention(Mechanism):
    """PowerAttention: blocks at power-of-two distances.

    Args:
        block: tokens of a block.
        window: latest blocks that are read whole, a query's own included.
        sinks: first blocks of the sequence that every query reads.
    """

    paper = Paper(
        title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
        authors="Chen et al.",
        year=2025,
        arxiv="2503.03588",
    )
    decodes = (TokenRing,)
    remembers = Cache
    cases = (
        Case(options={"block": 4, "window": 1, "sinks": 0}, block=4),
        Case(options={"block": 5, "window": 3, "sinks": 2}, tokens=97, block=5),
    )
    supports = Supports(noncausal=False)

    def __init__(
        self,
        *,
        block: int = 256,
        window: int = 5,
        sinks: int = 1,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        if block < 1 or window < 1 or sinks < 0:
            raise ValueError(
                "power-attention: block and window must be at least 1, sinks at least 0; got "
                f"block={block}, window={window}, sinks={sinks}"
            )
        self.block, self.window, self.sinks = block, window, sinks

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        return attend(q, Rows(k, v), self._layout(q.shape[2], q.device), scale=self.scale).out

    def extend(self, q, k, v, state: Cache | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        if state is None:
            return self.forward(q, k, v), Cache(q.shape[2], k, v)
        seen, k, v = state.tokens, torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        after = Cache(k.shape[2], k, v)
        if not q.shape[2]:
            return no_tokens(q, v), after
        tile = static.tile_of(self.block)
        lead = static.lead_in(seen, q.shape[2], tile)
        lists = static.power_lists(
            (seen - lead) // tile, -(-after.tokens // tile), window=self.window, sinks=self.sinks,
            split=self.block // tile, device=q.device,
        )  # fmt: skip
        layout = Layout(*lists, tile, tile, lead + q.shape[2], after.tokens, causal=True)
        position = torch.arange(seen - lead, after.tokens, device=q.device)
        out = attend(pad(q, (0, 0, lead, 0)), Rows(k, v), layout, scale=self.scale, position=position).out
        return out[:, :, lead:], after

    def ring(self, state: Cache, *, capacity: int, rotary: Rotary | None = None) -> TokenRing:
        self.check_ring(state, rotary)
        return TokenRing.all_of(state, capacity)

    def ring_sizes(self):
        return {"whole": True}

    def step(self, q, k, v, ring: TokenRing):
        self.check_step(ring)
        tile, last = static.tile_of(self.block), (ring.capacity - 1) // self.block
        lists = partial(
            static.power_lists_of, last=last, window=self.window, sinks=self.sinks, split=self.block // tile
        )
        ring.append(q, k, v)
        return ring.read(q, lists, tile, scale=self.scale)

    def reference(self, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        distance = i // self.block - j // self.block
        seen = (distance < self.window) | (j // self.block < self.sinks) | (distance & (distance - 1) == 0)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        return scores.masked_fill(~(seen & (j <= i)), float("-inf")).softmax(-1) @ v

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """The layout of a sequence, for pictures."""
        return {"powers": self._layout(tokens)}

    def _layout(self, tokens: int, device: torch.device | None = None) -> Layout:
        return static.powers(tokens=tokens, block=self.block, window=self.window, sinks=self.sinks, device=device)
