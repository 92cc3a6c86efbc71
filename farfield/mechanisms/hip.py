"""HiP: the keys a query block reads are found by a search down a binary tree over the keys.

    nodes(0)   = the key blocks between sinks and window, cut into beam k / b_k equal runs
    nodes(t+1) = as many of the halves of nodes(t), the best by score(half) = max_{i, j} q[i] . k[j],
                 i over some queries, j over some keys of the block in the middle of the half
    seen(i)    = the best k / b_k blocks at the end, the first tokens (sinks), the last ones (window);  j <= i
    out[i]     = sum over j in seen(i) of softmax_j(scale * q[i] . k[j]) v[j]

T (k + window + sinks) scores, and (T / b_q) log2(T / k) steps of 2 beam k / b_sk keys for the choice; the state keeps
all keys and values, up to 2 b_q queries and the list of the open block, which is chosen anew every b_q tokens.
Departs from the paper: the queries that choose for a block are those of the block before and the block's own first one
(the paper asks the block itself, and so lets later queries choose for earlier ones); blocks are 128 queries and 128
keys, sampled by 8 and 64, where the paper has 64 and 2, sampled by 2 and 1; because so few blocks make up k, four times
as many nodes are followed as are kept in the end (the paper's are `Hip(q_block=64, k_block=2, q_stride=2, k_stride=1,
beam=1)`, and 32 and 2 in its appendix); sinks and window are rounded up to whole key blocks and left out of the search;
a layer is sparse throughout (which layers stay dense is the model's to say); no offloading.
"""

from dataclasses import dataclass, replace
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.nn.functional import pad

from farfield.mechanism import Case, Mechanism, Paper, State, Supports, no_tokens
from farfield.ops.attend import attend
from farfield.select.tree import tree
from farfield.types import Layout, Rows


@dataclass(frozen=True)
class HipState(State):
    """All keys and values, the last queries, and the list of the block that the last token stands in, if it is open."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor | None
    count: Tensor | None
    block: int
    k_block: int

    def crop(self, drop: int) -> "HipState":
        """The state before the last `drop` tokens.

        Raises:
            ValueError: queries that choose for the block of the new end are gone; `rewind` says how far back one can
                go.
        """
        left, held = self.left(drop), self.q.shape[2]
        same = self.index is not None and left // self.block == self.tokens // self.block
        if not same and _asked(left, self.block) < self.tokens - held:
            raise self.forgotten(drop)
        cropped = replace(
            self, tokens=left, q=self.q[:, :, : max(held - drop, 0)], k=self.k[:, :, :left], v=self.v[:, :, :left]
        )
        if self.count is None or not same or not left % self.block:
            return replace(cropped, index=None, count=None)
        return replace(cropped, count=self.count - _blocks_between(left, self.tokens, self.k_block))


class Hip(Mechanism):
    """Hierarchically pruned attention.

    Args:
        keep: k, tokens that the search finds for each query; a multiple of `k_block`.
        sinks: first tokens that every query sees.
        width: last tokens that a block's first query sees at least, itself included.
        q_block, k_block: tokens of a query block, which shares one list, and of a key block, of which lists consist.
        q_stride, k_stride: every so many queries and keys of a block are scored.
        beam: nodes that are followed down the tree for each key block that is read in the end.
        place: which block of a node stands for it: "centre", "first" or "last".
        rewind: tokens that `state.crop` can go back; the state grows by as many queries.
    """

    paper = Paper(
        title="A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned "
        "Attention",
        authors="Lee, Park, Lee, Shin, Jeon, Jung, Kim, Hwang",
        year=2024,
        arxiv="2406.09827",
        code="github.com/DeepAuto-AI/hip-attention",
    )
    remembers = HipState
    cases = (
        Case(
            options={
                "keep": 12,
                "sinks": 3,
                "width": 9,
                "q_block": 8,
                "k_block": 4,
                "q_stride": 3,
                "k_stride": 2,
                "beam": 2,
            },
            tokens=101,
            block=8,
        ),
        # the scalar algorithm
        Case(
            options={"keep": 6, "sinks": 2, "width": 5, "q_block": 1, "k_block": 1, "q_stride": 1, "k_stride": 1},
            tokens=50,
            block=12,
            value_width=24,
        ),
    )
    supports = Supports(noncausal=False)

    def __init__(
        self,
        *,
        keep: int = 512,
        sinks: int = 16,
        width: int = 256,
        q_block: int = 128,
        k_block: int = 128,
        q_stride: int = 8,
        k_stride: int = 64,
        beam: int = 4,
        place: str = "centre",
        rewind: int = 0,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        if scale is not None and scale <= 0:
            raise ValueError(f"hip: the largest q . k are searched for, so scale must be positive; got {scale}")
        if rewind < 0:
            raise ValueError(f"hip: rewind must be at least 0, got {rewind}")
        self.keep, self.sinks, self.width, self.q_block, self.k_block = keep, sinks, width, q_block, k_block
        self.q_stride, self.k_stride, self.beam, self.place, self.rewind = q_stride, k_stride, beam, place, rewind
        # refuses sizes that do not fit
        self.choose(torch.empty(0, 1, 1, 1), torch.empty(0, 1, 1, 1))

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        return attend(q, Rows(k, v), self.choose(q, k), scale=self.scale).out

    def choose(self, q: Tensor, k: Tensor, start: int = 0) -> Layout:
        """Who reads what, for query blocks `start` and after; q holds the last of the queries. See select.tree."""
        return tree(
            q, k, keep=self.keep, sinks=self.sinks, width=self.width, q_block=self.q_block, k_block=self.k_block,
            q_stride=self.q_stride, k_stride=self.k_stride, beam=self.beam, place=self.place, start=start,
        )  # fmt: skip

    def extend(self, q, k, v, state: HipState | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        seen, new, block, asking = 0, q.shape[2], self.q_block, q
        index = count = None
        if state is not None:
            seen, index, count = state.tokens, state.index, state.count
            k, v, asking = (torch.cat(x, 2) for x in ((state.k, k), (state.v, v), (state.q, q)))
        tokens, late = seen + new, seen % block
        if not new:
            out = no_tokens(q, v[:, :, :0])
        else:
            start, lists = seen // block, []
            if index is not None and count is not None:
                # the window of the open block grows
                start += 1
                lists.append((index, count + _blocks_between(seen, min(tokens, start * block), self.k_block)))
            if start * block < tokens:
                found = self.choose(asking, k, start)
                lists.append((found.index, found.count))
            index, count = (torch.cat(x, 2) for x in zip(*lists, strict=True))
            # a chunk that leaves the open block is filled up from the block's beginning, so that its blocks are those
            # of the sequence; what stands there is dropped again
            skip = late if late + new > block else 0
            layout = Layout(index, count, block, self.k_block, skip + new, tokens, causal=True)
            position = torch.arange(seen - skip, tokens, device=q.device) if seen else None
            filled = pad(q, (0, 0, skip, 0))
            out = attend(filled, Rows(k, v), layout, scale=self.scale, position=position).out[:, :, skip:]
        held = asking.shape[2]
        asking = asking[:, :, max(_asked(max(tokens - self.rewind, 0), block) - (tokens - held), 0) :]
        if index is not None and count is not None and tokens % block:
            index, count = index[:, :, -1:], count[:, :, -1:]
        else:
            index = count = None
        return out, HipState(tokens, asking, k, v, index, count, block, self.k_block)

    def reference(self, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        batch, heads, tokens, width = q.shape
        size, sinks = self.k_block, -(-self.sinks // self.k_block)
        seen = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
        for b, h, p in product(range(batch), range(heads), range(0, tokens, self.q_block)):
            asked = [i for i in range(p, p - self.q_block, -self.q_stride) if i >= 0]
            products = (q[b, h, asked].detach() @ k[b, h].detach().T).amax(0).tolist()
            window = max(max(p - self.width + 1, 0) // size, sinks)
            blocks = _found(sinks, window, self.keep // size, self.beam, size, self.k_stride, self.place, products)
            for m in (*range(sinks), *blocks, *range(window, -(-tokens // size))):
                seen[b, h, p : p + self.q_block, m * size : (m + 1) * size] = True
        scores = q @ k.mT * (width**-0.5 if self.scale is None else self.scale)
        return scores.masked_fill(~seen.tril(), float("-inf")).softmax(-1) @ v

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """An example, for pictures: what is chosen depends on q and k, which are random here."""
        gen = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, 1, tokens, 16, generator=gen)
        return {"tree": self.choose(q, k)}

    def rows_read(self, tokens: int) -> float:
        """Which rows are read depends on the data, how many does not."""
        total, sinks = 0, -(-self.sinks // self.k_block)
        for p in range(0, tokens, self.q_block):
            queries = min(self.q_block, tokens - p)
            window = max(max(p - self.width + 1, 0) // self.k_block, sinks)
            skipped = max((window - sinks) * self.k_block - self.keep, 0)
            total += queries * (p + 1 - skipped) + queries * (queries - 1) // 2
        return total / max(tokens, 1)


def _asked(tokens: int, block: int) -> int:
    """The first query that is asked for the block that the token after the first `tokens` stands in."""
    return max(tokens // block * block - block + 1, 0)


def _blocks_between(few: int, many: int, block: int) -> int:
    """How many more key blocks `many` tokens begin than `few`."""
    return (many - 1) // block - (few - 1) // block


def _found(
    first: int, stop: int, nodes: int, beam: int, size: int, stride: int, place: str, products: list[float]
) -> list[int]:
    """The key blocks of first .. stop - 1 that the search ends at; products[j] is the largest of key j."""
    if stop - first <= nodes:
        return list(range(first, stop))

    def worse(run: tuple[int, int]) -> tuple[float, int]:
        """A key to sort runs by: of equal scores the earlier one is better."""
        begin, end = run
        block = {"centre": begin + (end - begin) // 2, "first": begin, "last": end - 1}[place]
        return -max(products[block * size : (block + 1) * size : stride]), begin

    followed = min(nodes * beam, stop - first)
    cuts = [first + j * (stop - first) // followed for j in range(followed + 1)]
    runs = list(pairwise(cuts))
    while any(end - begin > 1 for begin, end in runs):
        halves = [pair for begin, end in runs for pair in pairwise((begin, begin + (end - begin) // 2, end))]
        runs = sorted((half for half in halves if half[0] < half[1]), key=worse)[:followed]
    return sorted(begin for begin, _ in sorted(runs, key=worse)[:nodes])
