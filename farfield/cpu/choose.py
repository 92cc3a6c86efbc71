"""choose in batched PyTorch: so many queries at a time that their scores fit the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from farfield.ops import precision
from farfield.ops.choose import Scoring

STEP = 1 << 21  # scores at once

_UNUSED = torch.iinfo(torch.int32).max


def choose(q: Tensor, keys: Tensor, scoring: Scoring, first: int, scale: float) -> tuple[Tensor, Tensor]:
    """index [B, lists, T, picks] and count [B, lists, T]; the contract is ops.choose's."""
    batch, heads, tokens, _ = q.shape
    lists = keys.shape[1] if scoring.shared else heads
    index = torch.zeros(batch, lists, tokens, scoring.picks, dtype=torch.int32, device=q.device)
    count = torch.zeros(batch, lists, tokens, dtype=torch.int32, device=q.device)
    step = max(1, STEP // max(1, batch * heads * keys.shape[2]))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        at = torch.arange(first + start, first + stop, device=q.device)
        # what the last of them can count, and the blocks before its own
        rows = min(keys.shape[2], max(0, (first + stop - scoring.span) // scoring.stride + 1))
        past = (first + stop - 1) // scoring.block
        score = _scores(q[:, :, start:stop], keys[:, :, :rows], at, past, scoring, scale)
        index[:, :, start:stop], count[:, :, start:stop] = _best(score, at // scoring.block, scoring)
    return index, count


def choose_token(q: Tensor, keys: Tensor, scoring: Scoring, position: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same for one query a sequence, q [B, H, 1, D] at `position` [B, 1]; nothing waits for the host."""
    at = position[:, None, None]
    # all blocks that there may be
    score = _scores(q, keys, at, keys.shape[2] * scoring.stride // scoring.block, scoring, scale)
    return _best(score, at[..., 0] // scoring.block, scoring)


def _scores(q: Tensor, keys: Tensor, at: Tensor, blocks: int, scoring: Scoring, scale: float) -> Tensor:
    """[B, lists, t, blocks] of the first so many blocks; those that are not past are not for reading."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, tokens, width = q.shape
    kv_heads, rows = keys.shape[1:3]
    # under autocast these products would be rounded
    with precision.kept(q):
        logits = q.to(dtype).reshape(batch, kv_heads, heads // kv_heads * tokens, width) @ keys.to(dtype).mT
    logits = logits.view(batch, kv_heads, heads // kv_heads, tokens, rows)
    if not scoring.shared:
        return logits.flatten(1, 2)[..., :blocks]
    ended = torch.arange(rows, device=q.device) * scoring.stride + scoring.span - 1 <= at[..., None]
    shares = (logits * scale).masked_fill(~ended, float("-inf")).softmax(-1)
    # a query before the end of the first row has no share anywhere
    shares = shares.masked_fill(~ended, 0.0).sum(2)
    pieces, per_row = scoring.block // scoring.stride, scoring.span // scoring.stride
    # a row counts once for each piece of `stride` tokens that it shares with the block
    shares = torch.nn.functional.pad(shares, (per_row - 1, blocks * pieces - rows))
    shares = torch.stack([shares[..., n : n + blocks * pieces] for n in range(per_row)]).sum(0)
    return shares.unflatten(-1, (blocks, pieces)).sum(-1)


def _best(score: Tensor, own: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """The forced blocks and the best of those between them, ascending; own: each query's block [t], or [B, 1, 1]."""
    blocks = torch.arange(score.shape[-1], device=score.device)
    last = own[..., None] - scoring.local  # the last block that is not forced
    score = score.masked_fill((blocks < scoring.initial) | (blocks > last), float("-inf"))
    # stable: of two equal scores the lower block stands first
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., : scoring.scored]
    there = torch.arange(best.shape[-1], device=score.device) <= last - scoring.initial
    initial = torch.arange(scoring.initial, device=score.device)
    local = own[..., None] + torch.arange(1 - scoring.local, 1, device=score.device)
    lead = score.shape[:2]
    listed = [
        initial.masked_fill(initial > own[..., None], _UNUSED).expand(*lead, -1, -1),
        best.masked_fill(~there, _UNUSED),
        local.masked_fill(local < scoring.initial, _UNUSED).expand(*lead, -1, -1),
    ]
    index = torch.cat(listed, -1).sort(-1).values
    used = index != _UNUSED
    index = torch.nn.functional.pad(index.masked_fill(~used, 0), (0, scoring.picks - index.shape[-1]))
    return index.to(torch.int32), used.sum(-1, dtype=torch.int32)
