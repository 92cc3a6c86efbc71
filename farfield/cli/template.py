"""Example: each query reads the tokens of its own block and of the block before it.

    b(i)    = floor(i / block)
    seen(i) = {j <= i : b(j) >= b(i) - 1}
    out[i]  = sum over j in seen(i) of softmax_j(scale * q[i] . k[j]) v[j]

Causal. No parameters. At most 2 * block scores a query instead of T.
Departs from the paper: nothing known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from farfield.mechanism import Case, Mechanism, Paper, State, Supports
from farfield.ops.attend import attend
from farfield.types import Layout, Rows


@dataclass(frozen=True)
class Recent(State):
    """The tokens that a later query may still read: less than two blocks."""

    k: Tensor
    v: Tensor


class Example(Mechanism):
    paper = Paper(
        title="Title of the paper",
        authors="First author et al.",
        year=2026,
        arxiv=None,  # "2310.11960"
        code=None,  # "github.com/owner/name"
    )
    remembers = Recent
    cases = (Case(options={"block": 16}), Case(options={"block": 32}, tokens=131, block=32, value_width=24))
    supports = Supports(noncausal=False)

    def __init__(self, *, block: int = 64, causal: bool = True, scale: float | None = None):
        super().__init__(causal=causal, scale=scale)
        if block < 1:
            raise ValueError(f"{self.name}: block must be at least 1, got {block}")
        self.block = block

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        layout = self._layout(q.shape[2], k.shape[2], before=0, device=q.device)
        return attend(q, Rows(k, v), layout, scale=self.scale).out

    def extend(self, q, k, v, state: Recent | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        start = 0 if state is None else state.tokens
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        end = start + q.shape[2]
        first = end - k.shape[2]  # position of the first row: where a block begins
        # blocks are counted from token 0: a call that starts inside a block begins with queries that nobody asked for
        late = start % self.block
        position = torch.arange(start - late, end, device=q.device)
        rows = Rows(k, v, end=torch.arange(first, end, device=q.device))
        before = (start - late - first) // self.block
        layout = self._layout(len(position), len(rows), before=before, device=q.device)
        out = attend(pad(q, (0, 0, late, 0)), rows, layout, scale=self.scale, position=position).out[:, :, late:]
        # the next token reads its own block and the one before
        keep = max(0, end // self.block - 1) * self.block - first
        return out, Recent(end, k[:, :, keep:].clone(), v[:, :, keep:].clone())

    def reference(self, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        seen = (j <= i) & (j // self.block >= i // self.block - 1)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """What `farfield show NAME --plot FILE` draws."""
        return {"tokens": self._layout(tokens, tokens, before=0, device=None)}

    def _layout(self, tokens: int, rows: int, *, before: int, device: torch.device | None) -> Layout:
        """Query block n reads row blocks n - 1 and n; `before` row blocks come before query block 0."""
        n = torch.arange(-(-tokens // self.block), dtype=torch.int32, device=device) + before
        index = torch.stack([(n - 1).clamp(min=0), n], -1)
        count = (n + 1).clamp(max=2)
        return Layout(index[None, None], count[None, None], self.block, self.block, tokens, rows, causal=True)
