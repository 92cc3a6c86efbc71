"""pool: k and v read once, all levels of a linear pyramid come out; on the GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.library import custom_op

from farfield.ops.eager import eager, recorded

WIDEST = 256  # key and value width


class Tree(NamedTuple):
    """The groups of a pyramid in integers, so that a custom op can carry them.

    Args:
        block: tokens of a group of level 1.
        rank: rows of a group.
        blocks: groups of level 1.
        levels: how many levels, at least 1.
        complete: level l + 1 has half of the groups of level l, rounded down (True) or up.
        lo, hi: the tokens that count, lo <= t < hi; 0 <= lo, and hi is at most the number of tokens.
    """

    block: int
    rank: int
    blocks: int
    levels: int
    complete: bool
    lo: int
    hi: int

    @property
    def groups(self) -> list[int]:
        """Groups of each level."""
        found = [self.blocks]
        for _ in range(self.levels - 1):
            found.append(found[-1] // 2 if self.complete else (found[-1] + 1) // 2)
        return found

    @property
    def lead(self) -> int:
        """Rows before the levels: the first `lo` tokens as they are, filled up to whole groups."""
        return -(-self.lo // self.rank) * self.rank

    @property
    def rows(self) -> int:
        return self.lead + self.rank * sum(self.groups)


class Pooled(NamedTuple):
    """All far rows in one buffer: `tree.lead` rows, then level by level.

    Args:
        k, v: the tokens, for whoever reads them as well as the far rows: their gradients and the far rows' are then
            added in the one pass that the backward makes over the tokens.
        far_k, far_v: in the dtype of k; a row of no tokens is 0.
        bias: log of the tokens that each row stands for, float32 or wider, -inf for none.
        span: position of each row's first and last token, were all of its tokens there.
    """

    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S E"]
    far_k: Float[Tensor, "B G R D"]
    far_v: Float[Tensor, "B G R E"]
    bias: Float[Tensor, "B1 1 R"]
    span: Int[Tensor, "2 R"]


def refusal(k: Tensor, v: Tensor, rank: int, *, learned: bool) -> str | None:
    """Why `pool` cannot take these tensors, None if it can."""
    if k.device.type != "cuda":
        return f"takes CUDA tensors, not {k.device.type}"
    if k.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {k.dtype}"
    if not k.shape[0]:
        return "takes a batch of at least 1"
    if max(k.shape[3], v.shape[3]) > WIDEST:
        return f"takes widths up to {WIDEST}, got D={k.shape[3]} and E={v.shape[3]}"
    if learned and (rank & (rank - 1) or rank > 32):
        return f"takes filters of 1, 2, 4, ... 32 rows, got {rank}"
    return None


def pool(
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S E"],
    filters: Float[Tensor, "2 G p p2"] | None,
    tree: Tree,
) -> Pooled:
    """The pyramid of means, or of child -> parent filters, over k and v.

    Level 1 holds the means of segments of block / rank tokens; the rows of a group of any further level are `filters`
    (k's, v's; [p, 2p] for each head) times the rows of its two children, or their means without filters. A group of
    which a row stands for no token is the mean of its tokens. Everything is float32 until it is stored. Differentiable
    in k, v and the filters, whose gradient is float32. Deterministic. Takes what `refusal` has nothing against.
    """
    if filters is None:
        weights = k.new_empty(0, dtype=torch.float32)
    else:
        weights = filters.to(torch.float32).contiguous()
    if eager(k, v, weights) and not recorded(k, v, weights):
        return Pooled(k, v, *_pool(k, v, weights, tree))
    return Pooled(*_Pool.apply(k, v, weights, tree))


def _pool(k: Tensor, v: Tensor, filters: Tensor, tree: Tree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from farfield.kernels.plans import pooled

    return pooled(k, v, filters, tree)


def _gradients(
    near_k: Tensor, near_v: Tensor, d_far_k: Tensor, d_far_v: Tensor, far_k: Tensor, far_v: Tensor, filters: Tensor,
    tokens: int, tree: Tree,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from farfield.kernels.plans import pool_backward

    return pool_backward(near_k, near_v, d_far_k, d_far_v, far_k, far_v, filters, tokens, tree)


class _Pool(torch.autograd.Function):
    # a custom op cannot hand k and v through, and two gradients of k would cost three passes more to add
    @staticmethod
    def forward(ctx, k, v, filters, tree):
        pooled = _pool(k, v, filters, tree) if eager(k, v, filters) else _forward(k, v, filters, *tree)
        far_k, far_v, bias, span = pooled
        ctx.tree, ctx.tokens, ctx.dtype, ctx.shapes = tree, k.shape[2], k.dtype, (far_k.shape, far_v.shape)
        if filters.dim() > 1:
            ctx.save_for_backward(filters, far_k, far_v)
        else:
            ctx.save_for_backward(filters)
        ctx.mark_non_differentiable(bias, span)
        if not torch.compiler.is_compiling():
            # whoever does not read the tokens has no gradient of zeros to make and to add
            ctx.set_materialize_grads(False)
        return k.view_as(k), v.view_as(v), far_k, far_v, bias, span

    @staticmethod
    def backward(ctx, near_k, near_v, d_far_k, d_far_v, *_):
        filters, *far = ctx.saved_tensors
        none = filters.new_empty(0)
        near_k, near_v = (none if x is None else x for x in (near_k, near_v))
        # None where only one of far_k and far_v is used
        d_far_k, d_far_v = (
            none.new_zeros(shape, dtype=ctx.dtype) if grad is None else grad
            for grad, shape in zip((d_far_k, d_far_v), ctx.shapes, strict=True)
        )
        far_k, far_v = far or (none, none)
        given = near_k, near_v, d_far_k, d_far_v, far_k, far_v, filters
        # the registered operation refuses a gradient of its gradients
        if torch.is_grad_enabled() or not eager(*given):
            d_k, d_v, d_filters = _backward(*given, ctx.tokens, *ctx.tree)
        else:
            d_k, d_v, d_filters = _gradients(*given, ctx.tokens, ctx.tree)
        return d_k, d_v, d_filters if filters.dim() > 1 else None, None


# The schema is flat: an absent tensor is an empty one.


@custom_op("farfield::pool", mutates_args=())
def _forward(
    k: Tensor, v: Tensor, filters: Tensor, block: int, rank: int, blocks: int, levels: int, complete: bool, lo: int,
    hi: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _pool(k, v, filters, Tree(block, rank, blocks, levels, complete, lo, hi))


@_forward.register_fake
def _(k, v, filters, *tree):
    rows = Tree(*tree).rows
    far = (x.new_empty(*x.shape[:2], rows, x.shape[3]) for x in (k, v))
    return *far, k.new_empty(1, 1, rows, dtype=torch.float32), k.new_empty(2, rows, dtype=torch.int64)


@custom_op("farfield::pool_backward", mutates_args=())
def _backward(
    near_k: Tensor, near_v: Tensor, d_far_k: Tensor, d_far_v: Tensor, far_k: Tensor, far_v: Tensor, filters: Tensor,
    tokens: int, block: int, rank: int, blocks: int, levels: int, complete: bool, lo: int, hi: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tree = Tree(block, rank, blocks, levels, complete, lo, hi)
    return _gradients(near_k, near_v, d_far_k, d_far_v, far_k, far_v, filters, tokens, tree)


@_backward.register_fake
def _(near_k, near_v, d_far_k, d_far_v, far_k, far_v, filters, tokens, *tree):
    d_k, d_v = (x.new_empty(*x.shape[:2], tokens, x.shape[3]) for x in (d_far_k, d_far_v))
    return d_k, d_v, torch.empty_like(filters)
