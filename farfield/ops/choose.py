"""choose: the blocks that score best for each query, and attention over lists of blocks of one's own.

The score of a block comes from rows that stand for pieces of the sequence (means, learned compressions): row c ends at
token c * stride + span - 1 and counts for a query once it has ended at or before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.library import custom_op

from farfield.ops.attend import attend
from farfield.ops.eager import eager
from farfield.types import Layout, Partial, Rows


class Scoring(NamedTuple):
    """How blocks are scored and chosen; integers only, so that a custom op can carry it.

    Args:
        block: tokens of a block.
        picks: blocks that a query reads, the forced ones included.
        stride, span: tokens between two rows and tokens of a row; both multiples of `stride`, as `block` is.
        initial: the first blocks are always read.
        local: so many blocks, the query's own the last of them, are always read; at least 1.
        shared: the query heads of a key head choose together, by the sum of their softmaxes over the rows; otherwise
            each chooses for itself, by q . row.
    """

    block: int
    picks: int
    stride: int
    span: int
    initial: int = 0
    local: int = 1
    shared: bool = True

    @property
    def scored(self) -> int:
        """How many picks are left to the scores."""
        return self.picks - self.initial - self.local


class Choice(NamedTuple):
    """The blocks of each query, for each key head or each query head: ascending, and 0 past `count`."""

    index: Int[Tensor, "B heads T P"]
    count: Int[Tensor, "B heads T"]


def choose(
    q: Float[Tensor, "B H T D"],
    keys: Float[Tensor, "B G C D"],
    scoring: Scoring,
    *,
    first: int = 0,
    scale: float | None = None,
) -> Choice:
    """The best blocks of each query: the forced ones, and of those between them the best by score.

        p[h, c]  = softmax over the rows c that have ended, of scale * q[h] . keys[c]
        score[j] = sum over the heads h of the key head, and over the rows c, of p[h, c] * overlap(c, j) / stride

    or without `shared` score[h, j] = q[h] . keys[j]. Scores are float32 or wider, the lower of two equal blocks wins,
    nothing carries a gradient, and no more scores than a few million are in memory at once, on the GPU a few tiles.

    Args:
        keys: the rows; those that no query may count yet do no harm.
        first: position of the first query.
        scale: default 1 / sqrt(D).

    Raises:
        ValueError: sizes do not fit together.

    Source: Native Sparse Attention (arXiv:2502.11089), equations 8 to 12; without `shared` MoBA (arXiv:2502.13189).
    """
    check(scoring)
    q, keys = q.detach(), keys.detach()
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    run = _choose if eager(q, keys) else _op
    return Choice(*run(q, keys, [int(x) for x in scoring], first, factor))


def check(scoring: Scoring, who: str = "choose") -> None:
    """Raise ValueError unless the numbers fit together."""
    block, picks, stride, span, initial, local, shared = scoring
    if min(block, stride, span, local) < 1 or initial < 0:
        raise ValueError(
            f"{who}: block, stride, span and local must be at least 1 and initial at least 0, got "
            f"block={block}, stride={stride}, span={span}, local={local}, initial={initial}"
        )
    if picks < initial + local:
        raise ValueError(
            f"{who}: picks={picks} must hold the {initial} initial and {local} local blocks that are always read"
        )
    if block % stride or span % stride:
        raise ValueError(f"{who}: stride={stride} must divide block={block} and span={span}")
    if not shared and not block == stride == span:
        raise ValueError(
            f"{who}: each head for itself scores one row a block, got block={block}, stride={stride}, span={span}"
        )


def _choose(q: Tensor, keys: Tensor, scoring: list[int], first: int, scale: float) -> tuple[Tensor, Tensor]:
    from farfield.cpu.choose import choose as on_cpu

    return on_cpu(q, keys, _scoring(scoring), first, scale)


@custom_op("farfield::choose", mutates_args=())
def _op(q: Tensor, keys: Tensor, scoring: list[int], first: int, scale: float) -> tuple[Tensor, Tensor]:
    return _choose(q, keys, scoring, first, scale)


@_op.register_fake
def _(q, keys, scoring, first, scale):
    plan = _scoring(scoring)
    lists = q.shape[0], keys.shape[1] if plan.shared else q.shape[1], q.shape[2]
    return q.new_empty(*lists, plan.picks, dtype=torch.int32), q.new_empty(lists, dtype=torch.int32)


def _scoring(numbers: list[int]) -> Scoring:
    *sizes, shared = numbers
    return Scoring(*sizes, shared=bool(shared))


def attend_chosen(
    q: Float[Tensor, "B H T D"],
    rows: Rows,
    choice: Choice,
    block: int,
    *,
    first: int = 0,
    scale: float | None = None,
) -> Partial:
    """Causal attention of each query over the tokens of its own list of blocks.

    Query heads that share a list are, with their key head, one batch element of `attend`.

    Args:
        rows: tokens; row r has the position r.
        first: position of the first query.
    """
    batch, heads, tokens, _ = q.shape
    lists, kv_heads = choice.index.shape[1], rows.k.shape[1]
    index, count, k, v = *choice, rows.k, rows.v
    if lists == kv_heads:
        q = q.reshape(batch * lists, heads // lists, tokens, q.shape[3])
        k, v = (x.reshape(batch * lists, 1, *x.shape[2:]) for x in (k, v))
        index, count = (x.flatten(0, 1)[:, None] for x in choice)
    layout = Layout(index, count, 1, block, tokens, k.shape[2], True)
    position = torch.arange(first, first + tokens, device=q.device) if first else None
    found = attend(q, Rows(k, v), layout, scale=scale, position=position)
    return Partial(found.out.view(batch, heads, tokens, v.shape[3]), found.lse.view(batch, heads, tokens))
