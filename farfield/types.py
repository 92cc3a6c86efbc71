"""The three nouns every operation shares: Rows (what is read), Layout (who reads it), Partial (a result).

Letters, everywhere in the library: B batch, H query heads, G key/value heads (H is a multiple of G, query head h
reads key head h // (H / G)), T query tokens, S rows, D key width, E value width, N query blocks, M row blocks,
P picks (list entries per query block), L levels. Tensors are [B, H, T, D], the order of PyTorch's
scaled_dot_product_attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Rows:
    """Keys and values to read: tokens, or summaries of many tokens, or both.

    A pyramid is one Rows that holds all coarse levels back to back; `offsets[l]` is then the first row of level l.

    Args:
        k: keys.
        v: values.
        end: position of the last token a row stands for, [S] or [B|1, G|1, S]; a token's own position.
            Default 0 .. S-1.
        bias: added to a row's logits, [S] or [B|1, 1|G|H, S]: the log of its token count, sampling weights, ...
            -inf hides the row. Differentiable.
        group: bucket or document of a row, [S] or [B|1, G|1, S]; only queries of the same group see it.
        offsets: first row of each level of a pyramid; empty for plain tokens.
    """

    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S E"]
    end: Int[Tensor, "*#end S"] | None = None
    bias: Float[Tensor, "*#bias S"] | None = None
    group: Int[Tensor, "*#group S"] | None = None
    offsets: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.k.shape[2]


@dataclass(frozen=True)
class Partial:
    """Attention over some of the rows, ready to be merged with attention over others.

    Args:
        out: softmax-weighted values; 0 where a query read nothing.
        lse: natural log of the sum of the exponentiated logits, float32 or wider, differentiable; -inf where a
            query read nothing.
    """

    out: Float[Tensor, "B H T E"]
    lse: Float[Tensor, "B H T"]


@dataclass(frozen=True)
class Layout:
    """Which row blocks each query block reads.

    Query block n holds the queries n * q_block .. (n + 1) * q_block - 1, row block m the rows m * k_block ..
    (m + 1) * k_block - 1; a last block may be short. `index[b, h, n, :count[b, h, n]]` are the row blocks that query
    block n reads, ascending and without repeats; entries past `count` are never used. A first dimension of 1 is shared
    by all batches, a second of 1 by all heads. `k_block = 1` names single rows. Together with the rows' `end` and
    `group` and the queries' positions and groups this is the dense mask, query by query:

        for i in range(tokens):
            n = i // q_block
            for m in index[b, h, n, : count[b, h, n]]:
                for r in range(m * k_block, min((m + 1) * k_block, rows)):
                    near = reach is None or abs(position[i] - end[r]) < reach or r < sinks
                    past = not causal or end[r] <= position[i]
                    mask[i, r] = near and past and row_group[r] == query_group[i]

    Args:
        index: row blocks, int32.
        count: how many entries of each list are used, int32.
        q_block: queries of a query block.
        k_block: rows of a row block.
        tokens: T, the number of queries.
        rows: S, the number of rows.
        causal: rows that end after the query's position are hidden.
        reach: rows that end `reach` or more positions away from the query are hidden; None hides none.
        sinks: the first `sinks` rows are exempt from `reach`.
        own: a promise that makes reading faster and changes nothing else: q_block is 1, query i stands at position i,
            and each list ends with the block of row i.
    """

    index: Int[Tensor, "#B #H N P"]
    count: Int[Tensor, "#B #H N"]
    q_block: int
    k_block: int
    tokens: int
    rows: int
    causal: bool = False
    reach: int | None = None
    sinks: int = 0
    own: bool = False

    def __post_init__(self):
        if self.q_block < 1 or self.k_block < 1:
            raise ValueError(f"Layout: blocks must be at least 1, got q_block={self.q_block}, k_block={self.k_block}")
        if self.own and (self.q_block > 1 or not self.causal or self.reach is not None or self.tokens > self.rows):
            raise ValueError(
                "Layout: own=True is for causal lists of single queries without reach that stand among the rows, got "
                f"q_block={self.q_block}, causal={self.causal}, reach={self.reach}, {self.tokens} queries, "
                f"{self.rows} rows"
            )
        blocks = -(-self.tokens // self.q_block)
        if self.index.shape[-2] != blocks:
            raise ValueError(
                f"Layout: {self.tokens} queries in blocks of {self.q_block} are {blocks} query blocks, but index has "
                f"{self.index.shape[-2]}. Build the lists for this many tokens."
            )
        if self.count.shape != self.index.shape[:-1]:
            raise ValueError(
                f"Layout: count has shape {tuple(self.count.shape)}, expected {tuple(self.index.shape[:-1])} as index"
            )

    @property
    def row_blocks(self) -> int:
        """M, the number of row blocks."""
        return -(-self.rows // self.k_block)

    def used(self) -> Bool[Tensor, "#B #H N P"]:
        """Which list entries count."""
        return torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]

    def to(self, device: torch.device | str) -> Layout:
        return replace(self, index=self.index.to(device), count=self.count.to(device))

    # The algebra is in select.algebra; these are its postcard names.
    def union(self, other: Layout) -> Layout:
        from farfield.select import algebra

        return algebra.union(self, other)

    def minus(self, other: Layout) -> Layout:
        from farfield.select import algebra

        return algebra.minus(self, other)

    def transpose(self):
        from farfield.select import algebra

        return algebra.transpose(self)

    @property
    def density(self) -> float:
        from farfield.select import algebra

        return algebra.density(self)

    @property
    def visible(self) -> float:
        from farfield.select import algebra

        return algebra.visible(self)

    def plot(self, ax: Axes | None = None, **options) -> Axes:
        from farfield.select import algebra

        return algebra.plot(self, ax, **options)

    def to_block_mask(self) -> BlockMask:
        from farfield.select import algebra

        return algebra.to_block_mask(self)
