"""Sliding window with attention sinks: the last tokens, and the first few that every head likes to rest on.

    seen(i) = { j : i - width < j <= i } and { j < sinks, j <= i }          (noncausal: |i - j| < width)
    out[i]  = sum over j in seen(i) of softmax_j(scale * q[i] . k[j]) v[j]

T * (width + sinks) scores; the state keeps width - 1 + sinks rows.
Departs from the paper: positions are those of the text, not of the places in the cache.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farfield.mechanism import Case, Mechanism, Paper, Rotary, State, Supports, no_tokens
from farfield.ops.attend import attend
from farfield.packing import blank, documents
from farfield.select import static
from farfield.token_ring import TokenRing
from farfield.types import Layout, Rows


@dataclass(frozen=True)
class WindowState(State):
    """The sinks, then the last rows: `width` - 1 of them, and `rewind` more."""

    k: Tensor
    v: Tensor
    width: int
    sinks: int

    def crop(self, drop: int) -> "WindowState":
        """The state before the last `drop` tokens.

        Raises:
            ValueError: rows that the earlier window saw are gone; `rewind` says how far back one can go.
        """
        left, rows = self.left(drop), self.k.shape[2]
        most = self.tokens if rows == self.tokens else max(rows - self.sinks - self.width + 1, 0)
        if drop > most:
            raise self.forgotten(drop, most)
        keep = rows - drop
        return replace(self, tokens=left, k=self.k[:, :, :keep], v=self.v[:, :, :keep])


class SlidingWindow(Mechanism):
    """Sliding window with attention sinks.

    Args:
        width: tokens that a query sees, itself included.
        sinks: first tokens that every later query sees.
        block: tokens of a query block of the layout; no effect on the result.
        rewind: tokens that `state.crop` can go back; the state grows by as many rows.
    """

    paper = Paper(
        title="Efficient Streaming Language Models with Attention Sinks",
        authors="Xiao, Tian, Chen, Han, Lewis",
        year=2023,
        arxiv="2309.17453",
        code="github.com/mit-han-lab/streaming-llm",
    )
    decodes = (TokenRing,)
    remembers = WindowState
    cases = (
        Case(options={"width": 21, "sinks": 3, "block": 16}),
        Case(options={"width": 9, "sinks": 2, "block": 8, "causal": False}, tokens=50, block=8),
    )
    supports = Supports(packed=True)

    def __init__(
        self,
        *,
        width: int = 256,
        sinks: int = 4,
        block: int = 64,
        rewind: int = 0,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        if width < 1 or sinks < 0 or block < 1 or rewind < 0:
            raise ValueError(
                "window: width and block must be at least 1, sinks and rewind at least 0; got "
                f"width={width}, block={block}, sinks={sinks}, rewind={rewind}"
            )
        self.width, self.sinks, self.block, self.rewind = width, sinks, block, rewind

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        if group is not None:
            return self._packed(q, k, v, group)
        return attend(q, Rows(k, v), self._layout(q), scale=self.scale).out

    def extend(self, q, k, v, state: WindowState | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        if not self.causal:
            raise NotImplementedError("window: only causal attention can be extended; use forward")
        seen = 0
        if state is not None:
            seen, k, v = state.tokens, torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        tokens, rows = seen + q.shape[2], k.shape[2]
        if not q.shape[2]:
            out = no_tokens(q, v)
        else:
            end = _positions(rows, tokens, self.sinks, q.device)
            position = torch.arange(seen, tokens, device=q.device)
            out = attend(q, Rows(k, v, end=end), self._layout(q, rows), scale=self.scale, position=position).out
        first = rows - (self.width - 1 + self.rewind)
        if first > self.sinks:
            k, v = (torch.cat([x[:, :, : self.sinks], x[:, :, first:]], 2) for x in (k, v))
        return out, WindowState(tokens, k, v, self.width, self.sinks)

    def ring(self, state: WindowState, *, capacity: int | None = None, rotary: Rotary | None = None) -> TokenRing:
        """As Mechanism.ring; of the same size for any capacity, so that it needs none."""
        self.check_ring(state, rotary)
        at = _positions(state.k.shape[2], state.tokens, state.sinks, state.k.device)
        return TokenRing.of(state.k, state.v, at, tokens=state.tokens, span=state.width, sinks=state.sinks)

    def ring_sizes(self):
        return {"block": 1, "sinks": self.sinks, "span": self.width}

    def reference(self, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        seen = ((i - j).abs() < self.width) | (j < self.sinks)
        if self.causal:
            seen &= j <= i
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """The layout of a sequence, for pictures."""
        return {
            "window": static.window(
                tokens=tokens, width=self.width, sinks=self.sinks, block=self.block, causal=self.causal
            )
        }

    def _layout(self, q: Tensor, rows: int | None = None) -> Layout:
        return static.window(
            tokens=q.shape[2], rows=rows, width=self.width, sinks=self.sinks, block=self.block, causal=self.causal,
            device=q.device,
        )  # fmt: skip

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, group: Tensor) -> Tensor:
        """The window over all tokens, cut at documents by groups; each document's sinks are rows of their own."""
        batch, tokens = q.shape[0], q.shape[2]
        document = documents(group).expand(batch, -1)
        q, k, v = (blank(x, document) for x in (q, k, v))
        at = torch.arange(tokens, device=q.device).expand(batch, -1)
        count = int(document.max()) + 1
        first = at.new_full((batch, count + 1), tokens).scatter_reduce_(
            1, document.where(document >= 0, count), at, "amin"
        )[:, :count]
        own = document.clamp(min=0)
        is_sink = at - first.gather(1, own) < self.sinks if count else at < 0
        hidden = q.new_zeros(batch, 1, tokens, dtype=torch.promote_types(q.dtype, torch.float32))
        hidden = hidden.masked_fill((is_sink | (document < 0))[:, None], float("-inf"))
        layout = replace(self._layout(q), sinks=0)
        sources = [(Rows(k, v, bias=hidden, group=document[:, None]), layout)]
        if self.sinks and count:
            # row block d holds the sinks of document d; those past its end belong to the next one and are hidden
            rows = (first[:, :, None] + torch.arange(self.sinks, device=q.device)).flatten(1)
            owner = torch.arange(count, device=q.device).repeat_interleave(self.sinks).expand(batch, -1)
            absent = rows >= tokens
            rows = rows.clamp(max=tokens - 1)
            absent |= document.gather(1, rows) != owner
            sink_k, sink_v = (x.gather(2, rows[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v))
            bias = hidden.new_zeros(rows.shape).masked_fill(absent, float("-inf"))[:, None]
            lists = _documents_of_blocks(document, self.block, count)
            layout = Layout(*lists, self.block, self.sinks, tokens, count * self.sinks, self.causal)
            sources.append((Rows(sink_k, sink_v, end=rows[:, None], bias=bias, group=owner[:, None]), layout))
        asking = document.masked_fill(document < 0, -2)[:, None]
        return attend(q, sources, scale=self.scale, group=asking).out


def _positions(rows: int, tokens: int, sinks: int, device: torch.device) -> Tensor:
    """Where the rows of a state of so many tokens stand: the sinks, and what follows the gap behind them."""
    at = torch.arange(rows, device=device)
    return torch.where(at < sinks, at, at + tokens - rows)


def _documents_of_blocks(document: Tensor, block: int, count: int) -> tuple[Tensor, Tensor]:
    """For each block of tokens, the documents that have tokens in it: index [B, 1, N, P] and count [B, 1, N]."""
    short = -document.shape[1] % block
    blocks = torch.nn.functional.pad(document, (0, short), value=-1).unflatten(1, (-1, block))
    last = blocks.amax(2)
    first = blocks.masked_fill(blocks < 0, count).amin(2)
    width = int((last - first).max()) + 1
    listed = first[..., None] + torch.arange(max(width, 1), device=document.device)
    index, counts = static.pack_lists(listed, listed <= last[..., None])
    return index[:, None], counts[:, None]
