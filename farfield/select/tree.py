"""Key blocks found by a search down a binary tree over the keys, a few scores a level: sub-quadratic top-k."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from farfield.ops.tree import PLACES, Search, search
from farfield.types import Layout


def tree(
    q: Float[Tensor, "B H R D"],
    k: Float[Tensor, "B G T D"],
    *,
    keep: int = 512,
    sinks: int = 16,
    width: int = 256,
    q_block: int = 128,
    k_block: int = 128,
    q_stride: int = 1,
    k_stride: int = 1,
    beam: int = 1,
    place: str = "centre",
    start: int = 0,
) -> Layout:
    """Each query block reads the first `sinks` tokens, the last `width`, and `keep` that a tree search finds between.

    The key blocks between sinks and window are cut into beam * keep / k_block nodes of nearly equal size (node j begins
    at floor(j * size / nodes)). Each step halves every node at floor(length / 2), scores each half by one block in it,
    the `place`, and keeps as many halves as there were nodes, the best, until all are single blocks; keep / k_block of
    these, the best, are read:

        score(block) = max over sampled queries i, sampled keys j of the block of q[i] . k[j]

    in float32 or wider; of equal scores the earlier one wins, and NaN counts as the lowest number. The queries that are
    asked are those at p, p - q_stride, ... above p - q_block, where p is the block's first query: nothing behind p has
    a part in the choice. Sinks and window are whole blocks: those that hold a token of them. Ranges of no more than
    `keep` tokens are read whole. Carries no gradient. Causal; the last query stands at the last key.

    T / q_block searches of log2(T / (beam * keep)) steps of 2 beam * keep / k_stride keys; memory O(T).

    Args:
        q: the last R of the T queries; those that are asked and not there count as beyond the beginning.
        start: the first query block that gets a list; the layout's queries are those from start * q_block on.

    Raises:
        ValueError: sizes do not fit together.

    Source: HiP Attention (Lee et al. 2024, arXiv:2406.09827), algorithm 1 and its block approximation; where blocks
    are cut and who wins ties is ours, and so is whom to ask.
    """
    if keep < k_block or keep % k_block or min(width, q_block, k_block, q_stride, k_stride, beam) < 1 or sinks < 0:
        raise ValueError(
            "tree: keep must be a multiple of k_block, sinks at least 0, the others at least 1; got "
            f"keep={keep}, k_block={k_block}, sinks={sinks}, width={width}, q_block={q_block}, q_stride={q_stride}, "
            f"k_stride={k_stride}, beam={beam}"
        )
    if place not in PLACES:
        raise ValueError(f"tree: place must be one of {', '.join(PLACES)}, got {place!r}")
    tokens = k.shape[2]
    if not 0 <= start * q_block < tokens or q.shape[2] > tokens:
        raise ValueError(
            f"tree: no query block {start} of {q_block} among {tokens} tokens, of which q holds {q.shape[2]}"
        )
    nodes, sink_blocks = keep // k_block, -(-sinks // k_block)
    plan = Search(start, nodes, beam, sink_blocks, width, q_block, k_block, q_stride, k_stride, PLACES.index(place))
    with torch.no_grad():
        index, count = search(q, k, plan)
    return Layout(index, count, q_block, k_block, tokens - start * q_block, tokens, causal=True)
