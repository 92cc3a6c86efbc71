"""Full softmax attention: every query reads every token.

    out[i] = sum over j of softmax_j(scale * q[i] . k[j]) v[j],    causal: j <= i

T * S scores. The baseline of everything else, through PyTorch's scaled_dot_product_attention.
Departs from the paper: nothing.
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from farfield.mechanism import Case, Mechanism, Paper, Rotary, Supports
from farfield.ops.attend import attend
from farfield.packing import blank, documents
from farfield.select import static
from farfield.state import Cache
from farfield.token_ring import TokenRing
from farfield.types import Rows


class Full(Mechanism):
    paper = Paper(
        title="Attention Is All You Need",
        authors="Vaswani et al.",
        year=2017,
        arxiv="1706.03762",
        code="github.com/tensorflow/tensor2tensor",
    )
    decodes = (TokenRing,)
    remembers = Cache
    cases = (Case(), Case(options={"causal": False}, value_width=24))
    supports = Supports(cross=True, packed=True)

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        if group is not None:
            # a dense mask of documents is T x T; groups in attend are T
            document = documents(group)
            q, k, v = (blank(x, document) for x in (q, k, v))
            layout = static.full(tokens=q.shape[2], causal=self.causal, device=q.device)
            rows = Rows(k, v, group=document[:, None])
            # padding sees nothing
            asking = document.masked_fill(document < 0, -2)[:, None]
            return attend(q, rows, layout, scale=self.scale, group=asking).out
        return _sdpa(q, k, v, is_causal=self.causal, scale=self.scale)

    def extend(self, q, k, v, state: Cache | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        if not self.causal:
            raise NotImplementedError("full: only causal attention can be extended; use forward")
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        # aligned lower-right: the last query reads everything
        mask = causal_lower_right(q.shape[2], k.shape[2])
        return _sdpa(q, k, v, attn_mask=mask, scale=self.scale), Cache(k.shape[2], k, v)

    def ring(self, state: Cache, *, capacity: int, rotary: Rotary | None = None) -> TokenRing:
        self.check_ring(state, rotary)
        return TokenRing.all_of(state, capacity)

    def ring_sizes(self):
        return {"whole": True}

    def reference(self, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.causal:
            i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
            scores = scores.masked_fill(j > i, float("-inf"))
        return scores.softmax(-1) @ v

    def rows_read(self, tokens: int) -> float:
        return (tokens + 1) / 2 if self.causal else tokens


def _sdpa(q, k, v, **options):
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
