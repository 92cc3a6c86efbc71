"""How much of what exact top-k would read a layout reads, and keys with the locality that a tree search lives on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from farfield.types import Layout


class Captured(NamedTuple):
    """Means over batch, heads and the queries looked at.

    Args:
        recall: share of the keys with the largest q . k, among those up to the query, that its list names.
        mass: softmax weight, in attention over all keys up to the query, of those that its list names.
    """

    recall: float
    mass: float


def captured(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    layout: Layout,
    *,
    keep: int,
    scale: float | None = None,
    queries: int = 64,
) -> Captured:
    """What a causal layout of self-attention over plain tokens reads of the `keep` largest scores, and of the mass.

    Every pair is scored for `queries` queries, evenly spread over the second half of the sequence.
    """
    tokens, width = q.shape[2:]
    at = torch.linspace(tokens // 2, tokens - 1, min(queries, tokens - tokens // 2), device=q.device).long()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q[:, :, at].to(wide) @ k.to(wide).mT
    future = torch.arange(tokens, device=q.device) > at[:, None]
    scores = scores.masked_fill(future, float("-inf"))

    n = at // layout.q_block
    blocks = torch.zeros(*scores.shape[:3], layout.row_blocks + 1, dtype=torch.bool, device=q.device)
    # entries past count go to a block of their own, which is dropped
    listed = torch.where(layout.used(), layout.index.long(), layout.row_blocks)[:, :, n]
    blocks.scatter_(3, listed.expand(*scores.shape[:3], -1), True)
    read = blocks[..., :-1].repeat_interleave(layout.k_block, 3)[..., :tokens] & ~future
    if layout.reach is not None:
        near = at[:, None] - torch.arange(tokens, device=q.device) < layout.reach
        read &= near | (torch.arange(tokens, device=q.device) < layout.sinks)

    best = scores.topk(keep, -1).indices
    weights = (scores * (width**-0.5 if scale is None else scale)).softmax(-1)
    recall = read.gather(-1, best).double().mean()
    return Captured(recall.item(), weights.where(read, 0.0).sum(-1).double().mean().item())


def topical(
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    width: int,
    *,
    topics: int = 64,
    run: int = 256,
    share: float = 0.5,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """q and k of a text that stays on a topic for about `run` tokens: neighbouring keys are alike.

    Each head has `topics` random directions; a token's query and key are those of its topic and standard normal noise,
    `share` of the variance from the topic. Queries of a key head's group ask for a topic of their own.
    """
    gen = torch.Generator().manual_seed(seed)
    change = torch.rand(batch, 1 + heads, tokens, generator=gen) < 1 / run
    drawn = torch.randint(topics, (batch, 1 + heads, tokens), generator=gen)
    last = torch.where(change, torch.arange(tokens), 0).cummax(-1).values
    topic = drawn.gather(-1, last)
    directions = torch.randn(batch, kv_heads, topics, width, generator=gen)
    b, g = torch.arange(batch)[:, None, None], torch.arange(kv_heads)[:, None]
    keys = directions[b, g, topic[:, :1]]
    asked = directions[b, torch.arange(heads)[:, None] // (heads // kv_heads), topic[:, 1:]]
    noise = [torch.randn(x.shape, generator=gen) for x in (asked, keys)]
    q, k = (share**0.5 * x + (1 - share) ** 0.5 * y for x, y in zip((asked, keys), noise, strict=True))
    return q.to(device, dtype), k.to(device, dtype)
