"""Choices by score, one for each query: blocks whose mean key, or learned compressions of them, match it best.

A choice is made for each query token. One made for a block of queries from their mean would let the block's last query
choose for its first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from farfield.ops.choose import Choice, Scoring, attend_chosen, check, choose
from farfield.types import Layout

__all__ = ["Choice", "Scoring", "attend_chosen", "block_means", "check", "choose", "ended", "tokens_read"]


def block_means(x: Float[Tensor, "B G S D"], block: int) -> Float[Tensor, "B G M D"]:
    """The mean of each complete block, float32 or wider; no gradient."""
    blocks = x.shape[2] // block
    whole = x.detach()[:, :, : blocks * block].unflatten(2, (blocks, block))
    return whole.mean(3, dtype=torch.promote_types(x.dtype, torch.float32))


def ended(
    *, tokens: int, rows: int, stride: int, span: int, first: int = 0, q_block: int = 64, k_block: int = 64,
    device: torch.device | str | None = None,
) -> Layout:  # fmt: skip
    """Each query reads the rows that have ended at or before it; row c ends at token c * stride + span - 1.

    Args:
        tokens: queries, at positions first, first + 1, ...

    Causal by the rows' `end`, which must be given with them.
    """
    blocks, row_blocks = -(-tokens // q_block), -(-rows // k_block)
    index = torch.arange(row_blocks, dtype=torch.int32, device=device).expand(1, 1, blocks, row_blocks)
    last = (torch.arange(blocks, device=device) + 1) * q_block - 1 + first
    seen = ((last - span + 1).div(stride, rounding_mode="floor") + 1).clamp(0, rows)
    count = (-(-seen // k_block)).to(torch.int32)[None, None]
    return Layout(index, count, q_block, k_block, tokens, rows, True)


def tokens_read(scoring: Scoring, tokens: int) -> float:
    """Tokens that a causal query sees of its chosen blocks, on average: early queries have fewer blocks to choose."""
    i = torch.arange(tokens, dtype=torch.float64)
    return torch.minimum(i, (scoring.picks - 1) * scoring.block + i % scoring.block).add(1).mean().item()
