"""Choices by score, one for each query: blocks whose mean key, or learned compressions of them, match it best.

A choice is made for each query token. One made for a block of queries from their mean would let the block's last query
choose for its first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from farfield.ops.choose import Choice, Scoring, attend_and_choose, attend_chosen, attend_ended, check, choose
from farfield.ops.eager import eager
from farfield.ops.lists import recent_lists, recent_sizes
from farfield.ops.means import means
from farfield.ops.replayed import replayed
from farfield.state import Cache
from farfield.types import Layout, Rows

__all__ = [
    "BlockCache",
    "Choice",
    "Scoring",
    "attend_and_choose",
    "attend_best",
    "attend_chosen",
    "attend_ended",
    "block_means",
    "check",
    "choose",
    "recent",
    "remember",
    "tokens_read",
]


def block_means(x: Float[Tensor, "B G S D"], block: int) -> Float[Tensor, "B G M D"]:
    """The mean of each complete block, float32 or wider; no gradient."""
    return means(x, block)


@dataclass(frozen=True)
class BlockCache(Cache):
    """All tokens, and the mean key of each complete block in float32 or wider."""

    means: Tensor
    block: int

    def crop(self, drop: int) -> BlockCache:
        return replace(super().crop(drop), means=self.means[:, :, : self.left(drop) // self.block])


def remember(state: BlockCache | None, k: Tensor, v: Tensor, block: int) -> BlockCache:
    """The state with further tokens."""
    if state is None:
        return BlockCache(k.shape[2], k, v, block_means(k, block), block)
    if state.block != block:
        raise ValueError(f"the state was made with block={state.block}, not block={block}; begin a new one")
    k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
    means = torch.cat([state.means, block_means(k[:, :, state.means.shape[2] * block :], block)], 2)
    return BlockCache(k.shape[2], k, v, means, block)


def attend_best(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S E"],
    means: Float[Tensor, "B G M D"],
    scoring: Scoring,
    *,
    first: int = 0,
    scale: float | None = None,
) -> Float[Tensor, "B H T E"]:
    """Attention of each query over the blocks that `choose` gives it by these rows; `first`: its first position."""
    if first:
        # decoding: no two calls are alike
        return _attend_best(q, k, v, means, scoring, first, scale)
    return replayed(_attend_best, (q, k, v, means), scoring, first, scale)


def _attend_best(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, scoring: Scoring, first: int, scale: float | None
) -> Tensor:
    choice = choose(q, means, scoring, first=first, scale=scale)
    return attend_chosen(q, Rows(k, v), choice, scoring.block, first=first, scale=scale).out


def recent(*, tokens: int, rows: int, width: int, device: torch.device | str | None = None) -> Layout:
    """The last `width` rows of each query, itself included; the last query stands at the last row.

    The lists of `select.window` without sinks, from one launch on the GPU: no list has to be sorted.
    """
    block, picks = recent_sizes(rows, width)
    on = torch.empty(0, device=device).device
    if on.type == "cuda" and tokens and eager():
        return Layout(*recent_lists(tokens, rows, width, block, picks, on), block, block, tokens, rows, True, width)
    row = torch.arange(-(-tokens // block), device=device)[:, None] * block + rows - tokens
    first = ((row - width + 1) // block).clamp(min=0)
    last = ((row + block - 1) // block).clamp(max=-(-rows // block) - 1)
    slots = torch.arange(picks, device=device)
    count = last - first + 1
    index = torch.minimum(first + slots, last)
    lists = index.to(torch.int32)[None, None], count[:, 0].to(torch.int32)[None, None]
    return Layout(*lists, block, block, tokens, rows, True, width)


def tokens_read(scoring: Scoring, tokens: int) -> float:
    """Tokens that a causal query sees of its chosen blocks, on average: early queries have fewer blocks to choose."""
    i = torch.arange(tokens, dtype=torch.float64)
    return torch.minimum(i, (scoring.picks - 1) * scoring.block + i % scoring.block).add(1).mean().item()
