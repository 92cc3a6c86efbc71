"""Literal oracles: dense, slow, float64, and sharing nothing with the operations they check.

They take the library's nouns (Rows, Layout) as data only. Gradients come from PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from farfield.types import Layout, Rows


def visible(
    layout: Layout,
    *,
    batch: int = 1,
    heads: int = 1,
    position: Tensor | None = None,
    group: Tensor | None = None,
    end: Tensor | None = None,
    row_group: Tensor | None = None,
) -> Tensor:
    """Who sees what, [batch, heads, T, S] bool: one query and one row after the other.

    position and group are the queries', end and row_group the rows': 1-D, or with batch and head dimensions (1, the
    number of heads, or a divisor of it).
    """
    T, S = layout.tokens, layout.rows
    position = torch.arange(T) if position is None else position
    end = torch.arange(S) if end is None else end
    positions, ends = _per_head(position, batch, heads), _per_head(end, batch, heads)
    groups = None if group is None or row_group is None else _per_head(group, batch, heads)
    row_groups = None if group is None or row_group is None else _per_head(row_group, batch, heads)
    lists = layout.index.expand(batch, heads, -1, -1).tolist()
    counts = layout.count.expand(batch, heads, -1).tolist()
    mask = torch.zeros(batch, heads, T, S, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(T):
                named = lists[b][h][i // layout.q_block][: counts[b][h][i // layout.q_block]]
                for r in range(S):
                    if r // layout.k_block not in named:
                        continue
                    at, until = positions[b][h][i], ends[b][h][r]
                    if layout.causal and until > at:
                        continue
                    if layout.reach is not None and abs(at - until) >= layout.reach and r >= layout.sinks:
                        continue
                    if groups and row_groups and groups[b][h][i] != row_groups[b][h][r]:
                        continue
                    mask[b, h, i, r] = True
    return mask


def attend(
    q: Tensor,
    sources: Sequence[tuple[Rows, Layout]],
    *,
    position: Tensor | None = None,
    group: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax over all sources, from the dense mask."""
    batch, heads = q.shape[:2]
    factor = _scale(q, scale)
    logits, values = [], []
    for rows, layout in sources:
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (rows.k, rows.v))
        where = {"position": position, "group": group, "end": rows.end, "row_group": rows.group}
        mask = visible(layout, batch=batch, heads=heads, **where)
        score = factor * (q @ k.mT)
        if rows.bias is not None:
            bias = rows.bias.reshape((1,) * (3 - rows.bias.dim()) + tuple(rows.bias.shape))
            score = score + bias.repeat_interleave(heads // bias.shape[1], 1)[:, :, None]
        logits.append(score.masked_fill(~mask, float("-inf")))
        values.append(v)
    return _softmax(torch.cat(logits, -1), torch.cat(values, 2))


def full(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, seen: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of plain softmax attention, optionally under a further mask `seen` [T, S] or [B, H, T, S]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = _scale(q, scale) * (q @ k.mT)
    if causal:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        logits = logits.masked_fill(j > i, float("-inf"))
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    return _softmax(logits, v)


def levels(tokens: int, *, block: int, near: int) -> Tensor:
    """[T, T]: on which level query i meets token j. 0 is the near field, level l reads groups of block * 2^(l-1).

    Two tokens meet on the coarsest level whose groups are still no neighbours, one level below the first on which they
    are. Groups are neighbours up to near / block of them apart on the finest level, half as many (rounded up) on each
    coarser one.
    """
    i, radius, width = torch.arange(tokens), near // block, block
    level = torch.zeros(tokens, tokens, dtype=torch.long)
    while True:
        apart = (i[:, None] // width - i // width).abs() > radius
        if not apart.any():
            return level
        level += apart
        radius, width = -(-radius // 2), 2 * width


def segments(start: int, stop: int, rank: int) -> list[range]:
    """The at most `rank` runs of tokens whose means a group start .. stop - 1 is read as."""
    each = -(-(stop - start) // rank)
    return [range(a, min(a + each, stop)) for a in range(start, stop, each)]


def fma(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    near: int,
    rank: int,
    causal: bool,
    sinks: int = 0,
    group: Tensor | None = None,
    queries: str = "kept",
    bias: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of Fast Multipole Attention with mean pooling, any length, group by group and query by query.

    A far group is cut into segments, each read as the mean of its keys and values, with the log of its token count
    added to the logit (`bias`). The first `sinks` tokens are read as themselves by everyone and belong to no segment.
    queries="pooled": on each far level a query is replaced by the mean query of its own segment. `group` [B, T]:
    every run of equal ids is a sequence of its own, negative ids are padding.
    """
    if group is not None:

        def alone(*x: Tensor) -> tuple[Tensor, Tensor]:
            return fma(
                *x,
                block=block,
                near=near,
                rank=rank,
                causal=causal,
                sinks=sinks,
                queries=queries,
                bias=bias,
                scale=scale,
            )

        return by_document(alone, q, k, v, group)
    T = q.shape[2]
    factor = _scale(q, scale)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    met = levels(T, block=block, near=near)
    outs, lses = [], []
    for i in range(T):
        exact = [j for j in range(T) if met[i, j] == 0 or j < sinks]
        logits = [factor * (k[:, :, [j for j in exact if j <= i or not causal]] @ q[:, :, i, :, None])[..., 0]]
        values = [v[:, :, [j for j in exact if j <= i or not causal]]]
        for level in range(1, int(met.max()) + 1):
            width = block * 2 ** (level - 1)
            asks = q[:, :, i]
            if queries == "pooled":
                own = i // width * width
                asks = next(q[:, :, list(run)].mean(2) for run in _runs(own, width, T, rank) if i in run)
            for first in range(0, T, width):
                if met[i, first] != level or (causal and first > i):
                    continue
                for run in _runs(first, width, T, rank):
                    tokens = [j for j in run if j >= sinks]
                    if not tokens:
                        continue
                    key, value = k[:, :, tokens].mean(2), v[:, :, tokens].mean(2)
                    score = factor * (asks * key).sum(-1, keepdim=True)
                    logits.append(score + torch.tensor(len(tokens), dtype=q.dtype).log() if bias else score)
                    values.append(value[:, :, None])
        out, lse = _softmax(torch.cat(logits, -1)[:, :, None], torch.cat(values, 2))
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def by_document(
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, group: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `run` on every document by itself: each run of equal ids. Padding (negative ids): 0 and -inf."""
    B, H, T, _ = q.shape
    out = [[q.new_zeros(1, H, 1, v.shape[-1])] * T for _ in range(B)]
    lse = [[q.new_full((1, H, 1), float("-inf"))] * T for _ in range(B)]
    for b in range(B):
        ids = group[b % group.shape[0]].tolist()
        start = 0
        for stop in range(1, T + 1):
            if stop < T and ids[stop] == ids[start]:
                continue
            if ids[start] >= 0:
                o, s = run(*(x[b : b + 1, :, start:stop] for x in (q, k, v)))
                out[b][start:stop], lse[b][start:stop] = o.split(1, 2), s.split(1, 2)
            start = stop
    return torch.cat([torch.cat(x, 2) for x in out]), torch.cat([torch.cat(x, 2) for x in lse])


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, state) of S[t] = exp(decay[t]) S[t-1] + k[t] v[t]^T, out[t] = q[t] S[t], token by token."""
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    S = q.new_zeros(B, H, D, v.shape[-1]) if state is None else state
    out = [v[:, :, :0]]
    for t in range(T):
        if decay is not None:
            S = S * (decay if decay.dim() == 1 else decay[:, :, t]).exp()[..., None, None]
        S = S + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(q[:, :, t, None, :] @ S)
    return torch.cat(out, 2), S


def _softmax(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of -inf give 0 and -inf, and no gradient."""
    dead = (logits == float("-inf")).all(-1, keepdim=True)
    logits = logits.masked_fill(dead, 0.0)
    out = (logits.softmax(-1) @ values).masked_fill(dead, 0.0)
    return out, logits.logsumexp(-1).masked_fill(dead[..., 0], float("-inf"))


def _runs(first: int, width: int, tokens: int, rank: int) -> list[range]:
    """The segments of the group of `width` tokens from `first`, without what lies past the end."""
    return [range(r.start, min(r.stop, tokens)) for r in segments(first, first + width, rank) if r.start < tokens]


def _per_head(x: Tensor, batch: int, heads: int) -> list[list[list[int]]]:
    x = x.reshape((1,) * (3 - x.dim()) + tuple(x.shape))
    return x.repeat_interleave(heads // x.shape[1], 1).expand(batch, -1, -1).tolist()


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
