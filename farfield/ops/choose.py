"""choose: the blocks that score best for each query; attention over them, and over the rows they are scored by.

The score of a block comes from rows that stand for pieces of the sequence (means, learned compressions): row c ends at
token c * stride + span - 1 and counts for a query once it has ended at or before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from farfield.ops.attend import attend
from farfield.ops.eager import eager, recorded
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
    lse: Float[Tensor, "B H T"] | None = None,
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
        lse: of the softmax over the rows, as `attend_ended` gives it, which saves the GPU one way through them.

    Raises:
        ValueError: sizes do not fit together.

    Source: Native Sparse Attention (arXiv:2502.11089), equations 8 to 12; without `shared` MoBA (arXiv:2502.13189).
    """
    check(scoring)
    q, keys = q.detach(), keys.detach()
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    lse = q.new_empty(0, dtype=torch.float32) if lse is None else lse.detach()
    run = _choose if eager(q, keys) else _op
    return Choice(*run(q, keys, lse, [int(x) for x in scoring], first, factor))


def choose_token(
    q: Float[Tensor, "B H 1 D"],
    keys: Float[Tensor, "B G C D"],
    scoring: Scoring,
    position: Int[Tensor, "B 1"],
    *,
    scale: float | None = None,
) -> Choice:
    """`choose` for one query a sequence, each at a position of its own, in PyTorch on any device.

    Args:
        keys: rows for as many tokens as a sequence may have, of whole blocks.
    """
    from farfield.cpu.choose import choose_token

    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    return Choice(*choose_token(q, keys, scoring, position, factor))


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


def _choose(
    q: Tensor, keys: Tensor, lse: Tensor, scoring: list[int], first: int, scale: float
) -> tuple[Tensor, Tensor]:
    plan = _scoring(scoring)
    if q.is_cuda:
        from farfield.kernels import choose as on_gpu
        from farfield.kernels import plans

        if on_gpu.takes(q, keys) and plan.scored <= on_gpu.MOST:
            known = lse if lse.numel() and plan.shared else None
            if first or known is not None:
                index, count = on_gpu.run(q, keys, None, known, plan, plan.stride, plan.span, first, scale)
                return index, count
            return plans.plainly(on_gpu.alone, (q, keys.contiguous()), plan, first, scale)
    from farfield.cpu.choose import choose as on_cpu

    return on_cpu(q, keys, plan, first, scale)


@custom_op("farfield::choose", mutates_args=())
def _op(q: Tensor, keys: Tensor, lse: Tensor, scoring: list[int], first: int, scale: float) -> tuple[Tensor, Tensor]:
    return _choose(q, keys, lse, scoring, first, scale)


@_op.register_fake
def _(q, keys, lse, scoring, first, scale):
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
    layout = Layout(index, count, 1, block, tokens, k.shape[2], True, own=not first)
    position = torch.arange(first, first + tokens, device=q.device) if first else None
    found = attend(q, Rows(k, v), layout, scale=scale, position=position)
    return Partial(found.out.view(batch, heads, tokens, v.shape[3]), found.lse.view(batch, heads, tokens))


def attend_ended(
    q: Float[Tensor, "B H T D"],
    keys: Float[Tensor, "B G C D"],
    values: Float[Tensor, "B G C E"],
    *,
    stride: int,
    span: int,
    first: int = 0,
    scale: float | None = None,
) -> Partial:
    """Attention of each query over the rows that have ended at or before it; 0 and -inf before there is one.

    Row c ends at token c * stride + span - 1. Rows are not rounded to the dtype of q: what one of them is off by, a
    share of the whole past is off by, and choices are made by them. On the GPU their values are, and in the backward
    the keys.

    Args:
        keys, values: float32 or wider.
        first: position of the first query.

    Returns:
        out in q's dtype.
    """
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not keys.shape[2]:
        out = (q.sum(-1, keepdim=True) * 0).expand(*q.shape[:3], values.shape[3])
        return Partial(out, out.new_full(out.shape[:3], float("-inf"), dtype=keys.dtype))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and _ended_on_gpu(q, keys, values):
        plain = eager(q, keys, values) and not recorded(q, keys, values)
        return Partial(*(_attend_ended if plain else _ended_op)(q, keys, values, stride, span, first, factor))
    layout = _ended(q, keys.shape[2], stride, span, first)
    end = torch.arange(keys.shape[2], device=q.device) * stride + span - 1
    position = torch.arange(first, first + q.shape[2], device=q.device) if first else None
    found = attend(q.to(keys.dtype), Rows(keys, values, end=end), layout, scale=factor, position=position)
    return Partial(found.out.to(q.dtype), found.lse)


def attend_and_choose(
    q: Float[Tensor, "B H T D"],
    keys: Float[Tensor, "B G C D"],
    values: Float[Tensor, "B G C E"],
    scoring: Scoring,
    *,
    first: int = 0,
    scale: float | None = None,
) -> tuple[Partial, Choice]:
    """`attend_ended`, and `choose` by the same rows: on the GPU these are prepared once."""
    check(scoring)
    if _both_on_gpu(q, keys, values, scoring):
        factor = q.shape[3] ** -0.5 if scale is None else float(scale)
        if recorded(q, keys, values):
            found = _Both.apply(q, keys, values, scoring, first, factor)
        else:
            found = _both(q, keys, values, scoring, first, factor)
        return Partial(*found[:2]), Choice(*found[2:])
    far = attend_ended(q, keys, values, stride=scoring.stride, span=scoring.span, first=first, scale=scale)
    return far, choose(q, keys, scoring, first=first, scale=scale, lse=far.lse)


def _both_on_gpu(q: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> bool:
    if not (q.is_cuda and eager(q, keys, values) and keys.shape[2] and scoring.shared):
        return False
    from farfield.kernels import choose as on_gpu

    plain = q.dtype in (torch.bfloat16, torch.float16) and scoring.scored <= on_gpu.MOST
    return plain and _ended_on_gpu(q, keys, values)


def _both(
    q: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, first: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from farfield.kernels import choose as on_gpu
    from farfield.kernels import plans

    keys, values = keys.contiguous(), values.contiguous()
    if first:
        # decoding: no two calls are alike
        return on_gpu.both(q, keys, values, scoring, first, scale)
    return plans.plainly(on_gpu.both, (q, keys, values), scoring, first, scale)


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, keys, values, scoring, first, scale):
        ctx.set_materialize_grads(False)
        out, lse, index, count = _both(q, keys, values, scoring, first, scale)
        ctx.save_for_backward(out, lse, q, keys, values)
        ctx.plan = scoring.stride, scoring.span, first, scale
        ctx.mark_non_differentiable(index, count)
        return out, lse, index, count

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse, *_):
        from farfield.kernels.choose_backward import ended_backward

        out, lse, q, keys, values = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        return *ended_backward(q, keys, values, d_out, d_lse, out, lse, *ctx.plan), None, None, None


def _ended(q: Tensor, rows: int, stride: int, span: int, first: int) -> Layout:
    """Blocks of queries and the blocks of rows of which some have ended; what has not is hidden by the rows' ends."""
    blocks, row_blocks = -(-q.shape[2] // 64), -(-rows // 64)
    index = torch.arange(row_blocks, dtype=torch.int32, device=q.device).expand(1, 1, blocks, row_blocks)
    last = (torch.arange(blocks, device=q.device) + 1) * 64 - 1 + first
    seen = ((last - span + 1).div(stride, rounding_mode="floor") + 1).clamp(0, rows)
    count = (-(-seen // 64)).to(torch.int32)[None, None]
    return Layout(index, count, 64, 64, q.shape[2], rows, True)


def _ended_on_gpu(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    from farfield.kernels import choose as on_gpu

    return on_gpu.takes(q, keys) and values.shape[3] <= on_gpu.WIDEST


def _attend_ended(
    q: Tensor, keys: Tensor, values: Tensor, stride: int, span: int, first: int, scale: float
) -> tuple[Tensor, Tensor]:
    from farfield.kernels import choose as on_gpu

    out, lse = on_gpu.run(q, keys, values, None, None, stride, span, first, scale)
    return out, lse


@custom_op("farfield::attend_ended", mutates_args=())
def _ended_op(
    q: Tensor, keys: Tensor, values: Tensor, stride: int, span: int, first: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend_ended(q, keys, values, stride, span, first, scale)


@_ended_op.register_fake
def _(q, keys, values, stride, span, first, scale):
    return q.new_empty(*q.shape[:3], values.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("farfield::attend_ended_backward", mutates_args=())
def _ended_backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, values: Tensor, stride: int,
    span: int, first: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from farfield.kernels.choose_backward import ended_backward

    d_q, d_k, d_v = ended_backward(q, keys, values, d_out, d_lse, out, lse, stride, span, first, scale)
    return d_q, d_k.to(keys.dtype), d_v.to(values.dtype)


@_ended_backward.register_fake
def _(d_out, d_lse, out, lse, q, keys, values, stride, span, first, scale):
    return torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)


def _save(ctx, inputs, output):
    q, keys, values, *ctx.plan = inputs
    ctx.save_for_backward(*output, q, keys, values)


def _differentiate(ctx, d_out, d_lse):
    return *_ended_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.plan), None, None, None, None


_ended_op.register_autograd(_differentiate, setup_context=_save)
