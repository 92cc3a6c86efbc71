"""FMA's near field alone: what its far field has to beat.

    seen(i) = i's block and the near / block blocks before it, and the first `sinks` tokens;    j <= i
    out[i]  = sum over j in seen(i) of softmax_j(scale * q[i] . k[j]) v[j]

A control, to be found by FARFIELD_MECHANISMS=examples/controls.
"""

import torch

from farfield.mechanism import Case, Mechanism, Paper, Supports, no_tokens
from farfield.ops.attend import attend
from farfield.select.static import near_lists, pack_lists
from farfield.types import Layout, Rows


class NearField(Mechanism):
    """FMA's near field and sinks, and nothing else.

    Args:
        block, near, sinks: as FMA's.
    """

    paper = Paper(
        title="Fast Multipole Attention: A Scalable Multilevel Attention Mechanism for Text and Images",
        authors="Kang, Tran, De Sterck",
        year=2023,
        arxiv="2310.11960",
    )
    cases = (Case(options={"block": 8, "near": 16, "sinks": 3}, tokens=101, block=8),)
    supports = Supports(noncausal=False, decode=False)

    def __init__(
        self, *, block: int = 64, near: int = 128, sinks: int = 0, causal: bool = True, scale: float | None = None
    ):
        super().__init__(causal=causal, scale=scale)
        if block < 1 or near < block or near % block or not 0 <= sinks <= block:
            raise ValueError(
                f"near-field: near must be a multiple of block and sinks at most block, got {block=}, {near=}, {sinks=}"
            )
        self.block, self.near, self.sinks = block, near, sinks

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        far = Rows(k[:, :, : self.sinks], v[:, :, : self.sinks])
        near, sinks = self._layouts(q.shape[2], q.device)
        return attend(q, [(Rows(k, v), near), (far, sinks)] if len(far) else [(Rows(k, v), near)], scale=self.scale).out

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
        rows = min(self.sinks, tokens)
        # blocks that see token 0 among the near ones read no sink twice
        used = ((n > radius) & (rows > 0)).int()[None, None]
        return near, Layout(torch.zeros_like(used)[..., None], used, self.block, max(rows, 1), tokens, rows)
