"""opened: the groups that each query of causal FMA opens, and its attention over them and all else, by GPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.library import custom_op

from farfield.ops.eager import eager, recorded
from farfield.ops.pool import Tree

SCORES = ("peak", "mean")  # of select.opened.SCORES, those that there are kernels for
RANKS = (1, 2, 4, 8, 16, 32)
MOST = 64  # groups opened, and looked into on a level
LEVELS = 15  # where each query, or few together, have lists of their own: 2 bits each in a word
TILE = 64  # queries that read what is opened as they read what is near, if they choose together
FEWEST = 8  # of one head among them


class Plan(NamedTuple):
    """Integers only, so that a custom op can carry it.

    Args:
        near: tokens read one by one before a query's block.
        detail: rows of a group's sketch.
        picks, beam, shared: as in select.opened.Opening.
        hold: queries in a row that open the same groups.
        score: number of the score in SCORES.
        summed: a group scores the log of the sum of what its rows score, e^score each, instead of the best of them.
    """

    near: int
    detail: int
    picks: int
    beam: int
    shared: int
    hold: int = 1
    score: int = 0
    summed: int = 0


def refusal(q: Tensor, k: Tensor, v: Tensor, tree: Tree, plan: Plan) -> str | None:
    """Why the kernels cannot take such a call, None if they can."""
    if not q.is_cuda:
        return f"take CUDA tensors, not {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"take bfloat16 and float16, not {q.dtype}"
    if q.shape[3] not in (16, 32, 64, 128) or v.shape[3] != q.shape[3]:
        return f"take D = E = 16, 32, 64 or 128, got {q.shape[3]} and {v.shape[3]}"
    if tree.block not in (64, 128) or tree.rank not in RANKS or plan.detail & (plan.detail - 1):
        return f"take blocks of 64 and 128, ranks and sketches of powers of two, got {tree.block} and {tree.rank}"
    if max(plan.picks, plan.beam) > MOST or q.shape[1] // k.shape[1] > MOST:
        return f"take {MOST} groups and query heads of a key head at most"
    if not tree.complete or not q.shape[0] * q.shape[1]:
        return "take causal sequences, at least one of them"
    if tree.levels > LEVELS and not by_tiles(q, k, plan):
        return f"take {LEVELS} levels where fewer than {TILE} queries choose together, got {tree.levels}"
    return None


def by_tiles(q: Tensor, k: Tensor, plan: Plan) -> bool:
    """Whether the queries of a run, of all heads that choose together, are whole tiles of queries."""
    heads = q.shape[1] // k.shape[1] if plan.shared else 1
    return plan.hold >= FEWEST and plan.hold * heads % TILE == 0


def choose(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G T D"], tree: Tree, plan: Plan, scale: float
) -> tuple[Int[Tensor, "B lists N k"], Int[Tensor, "B lists N"]]:
    """The groups of level 1 that each run of queries opens, ascending, and how many."""
    q, k = q.detach(), k.detach()
    if eager(q, k):
        return _chosen(q, k, tree, plan, scale)
    leaves, count = _choose(q, k, list(tree), list(plan), scale)
    return leaves, count


def choose_from(
    asking: Float[Tensor, "B H runs D"],
    rows: Float[Tensor, "B G R D"],
    tree: Tree,
    plan: Plan,
    scale: float,
    first: int,
) -> tuple[Int[Tensor, "B lists runs k"], Int[Tensor, "B lists runs"]]:
    """`choose` for runs first, first + 1, ..., by sketches that there are already.

    Args:
        asking: the query of each run that chooses.
        rows: `told` of select.opened, of the groups of `tree`.
    """
    from farfield.kernels import opened_search

    sketches = opened_search.sketched(rows, asking.dtype, SCORES[plan.score])
    return opened_search.choose(asking.detach(), sketches, tree, plan, scale, first)


def lists(
    leaves: Tensor, count: Tensor, tree: Tree, plan: Plan, first: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The near and far lists of runs first, first + 1, ... of queries, each as index [B, lists, runs, P] and count."""
    if eager(leaves, count):
        near, near_count, far, far_count = _listed(leaves, count, tree, plan, first)
    else:
        near, near_count, far, far_count = _lists(leaves, count, list(tree), list(plan), first)
    return (near, near_count), (far, far_count)


def at_once(q: Tensor, k: Tensor, v: Tensor, tree: Tree, plan: Plan) -> bool:
    """Whether `runs` takes a call that `refusal` has nothing against: nobody sees operations or wants gradients."""
    if not by_tiles(q, k, plan) or SCORES[plan.score] != "mean" or not eager(q, k, v) or recorded(q, k, v):
        return False
    from farfield.kernels import opened_sketches

    return opened_sketches.takes(tree, plan.detail)


def runs(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    tree: Tree,
    plan: Plan,
    scale: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Means as far rows (keys, values, biases [1, 1, R]), and `lists` of what `choose` finds: one pass over k and v."""
    from farfield.kernels import opened, plans

    far_k, far_v, bias, near, near_count, far, far_count = plans.plainly(opened.runs, (q, k, v), tree, plan, scale)
    return (far_k, far_v, bias), (near, near_count), (far, far_count)


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    far: tuple[Tensor, Tensor, Tensor],
    chosen: tuple[Tensor, Tensor],
    tree: Tree,
    plan: Plan,
    scale: float,
    begin: int = 0,
    used: int | None = None,
) -> Float[Tensor, "B H T D"]:
    """Each query's near tokens, the tokens of what it opened, and the summaries of all else, under one softmax.

    Differentiable in q, k, v and in the far rows, if the first query is the first token.

    Args:
        k, v: all tokens [B, G, S, D], S at least begin + T.
        far: keys, values [B, G, R, D] and biases [1|B, 1|G, R] of the summaries, in the order of `tree`.
        chosen: of `choose` or `choose_from`.
        begin: position of the first query, a multiple of TILE.
        used: how many of the tree's blocks there are, default all; then the far rows have room for the rest.
    """
    if plan.hold > 1:
        leaves, count = (x.repeat_interleave(plan.hold, 2)[:, :, : q.shape[2]] for x in chosen)
        chosen = leaves, count
    if begin:
        from farfield.kernels import attend_opened

        return attend_opened.forward(q, k, v, *far, *chosen, tree, plan.near, scale, begin=begin, used=used)[0]
    given = q, k, v, *far, *chosen
    if not eager(*given):
        return _attend(q, k, v, *far, *chosen, list(tree), list(plan), scale)[0]
    if not recorded(*given):
        return _attended(given, tree, plan, scale)[0]
    return _Attend.apply(*given, tree, plan, scale)


def _tree(numbers: Sequence[int]) -> Tree:
    block, rank, blocks, levels, complete, lo, hi = numbers
    return Tree(block, rank, blocks, levels, bool(complete), lo, hi)


@custom_op("farfield::choose_opened", mutates_args=())
def _choose(q: Tensor, k: Tensor, tree: Sequence[int], plan: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    return _chosen(q, k, _tree(tree), Plan(*plan), scale)


def _chosen(q: Tensor, k: Tensor, tree: Tree, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    from farfield.kernels import opened_search, plans

    return plans.plainly(opened_search.chosen, (q, k), tree, plan, scale)


@_choose.register_fake
def _(q, k, tree, plan, scale):
    about = Plan(*plan)
    shape = q.shape[0], k.shape[1] if about.shared else q.shape[1], -(-q.shape[2] // about.hold)
    return q.new_empty(*shape, about.picks, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


@custom_op("farfield::opened_runs", mutates_args=())
def _lists(
    leaves: Tensor, count: Tensor, tree: Sequence[int], plan: Sequence[int], first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _listed(leaves, count, _tree(tree), Plan(*plan), first)


def _listed(leaves: Tensor, count: Tensor, tree: Tree, plan: Plan, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from farfield.kernels import opened, plans

    if first:
        # a recording would be for this length alone
        return opened.lists_of_runs(leaves, count, tree, plan, first)
    return plans.plainly(opened.lists_of_runs, (leaves, count), tree, plan)


@_lists.register_fake
def _(leaves, count, tree, plan, first):
    widths = list_widths(_tree(tree), Plan(*plan).near, leaves.shape[3])
    near, far = (leaves.new_empty(*count.shape, n) for n in widths)
    return near, torch.empty_like(count), far, torch.empty_like(count)


def list_widths(tree: Tree, near: int, picks: int) -> tuple[int, int]:
    """The longest near and far list that there can be."""
    groups = tree.groups
    width = near // tree.block + 1 + min(picks, groups[0])
    # of the children of an opened group one at least is opened
    return width, tree.lead // tree.rank + sum(2 + min(picks, n) for n in [*groups[1:], 0])


def _attended(given: Sequence[Tensor], tree: Tree, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    from farfield.kernels import attend_opened, plans

    if given[0].shape[2] > plans.LONGEST:
        q, k, v, far_k, far_v, bias, leaves, count = given
        return attend_opened.forward(q, k, v, far_k, far_v, bias, leaves, count, tree, plan.near, scale)
    return plans.plainly(attend_opened.forward, given, tree, plan.near, scale)


def _gradients(
    given: Sequence[Tensor], tree: Tree, plan: Plan, scale: float, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from farfield.kernels import attend_opened, plans

    d_out, q, k, v, far_k, far_v, bias, leaves, count, out, lse = given
    # what is copied is not recorded
    d_out = d_out.contiguous()
    if q.shape[2] > plans.LONGEST:
        return attend_opened.backward(
            d_out, q, k, v, far_k, far_v, bias, leaves, count, out, lse, tree, plan.near, scale, bias_grad
        )
    given = d_out, q, k, v, far_k, far_v, bias, leaves, count, out, lse
    return plans.plainly(attend_opened.backward, given, tree, plan.near, scale, bias_grad)


class _Attend(torch.autograd.Function):
    # a custom op with a gradient costs the host more than its launches
    @staticmethod
    def forward(ctx, *given):
        *tensors, ctx.tree, ctx.plan, ctx.scale = given
        out, lse = _attended(tensors, ctx.tree, ctx.plan, ctx.scale)
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        given, wanted = (d_out, *ctx.saved_tensors), ctx.needs_input_grad[5]
        # the registered operation refuses a gradient of its gradients
        if torch.is_grad_enabled() or not eager(*given):
            grads = _backward(*given, list(ctx.tree), list(ctx.plan), ctx.scale, wanted)
        else:
            grads = _gradients(given, ctx.tree, ctx.plan, ctx.scale, wanted)
        return *_shaped(grads, ctx.saved_tensors[5], wanted), None, None, None, None, None


@custom_op("farfield::attend_opened", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, bias: Tensor, leaves: Tensor, count: Tensor,
    tree: Sequence[int], plan: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _attended((q, k, v, far_k, far_v, bias, leaves, count), _tree(tree), Plan(*plan), scale)


@_attend.register_fake
def _(q, k, v, far_k, far_v, bias, leaves, count, tree, plan, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("farfield::attend_opened_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor, bias: Tensor, leaves: Tensor,
    count: Tensor, out: Tensor, lse: Tensor, tree: Sequence[int], plan: Sequence[int], scale: float, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = d_out, q, k, v, far_k, far_v, bias, leaves, count, out, lse
    return _gradients(given, _tree(tree), Plan(*plan), scale, bias_grad)


@_backward.register_fake
def _(d_out, q, k, v, far_k, far_v, bias, leaves, count, out, lse, tree, plan, scale, bias_grad):
    shape = (q.shape[0], k.shape[1], far_k.shape[2]) if bias_grad else (0,)
    return *(x.new_empty(x.shape) for x in (q, k, v, far_k, far_v)), bias.new_empty(shape)


def _save(ctx, inputs, output):
    *tensors, ctx.tree, ctx.plan, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    # nobody asks for lse
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_out, d_lse):
    wanted = ctx.needs_input_grad[5]
    grads = _backward(d_out, *ctx.saved_tensors, ctx.tree, ctx.plan, ctx.scale, wanted)
    return *_shaped(grads, ctx.saved_tensors[5], wanted), None, None, None, None, None


def _shaped(grads: Sequence[Tensor], bias: Tensor, wanted: bool) -> tuple[Tensor | None, ...]:
    """The gradients, that of the bias, if it is wanted, in the shape of the bias."""
    *others, d_bias = grads
    if wanted:
        for dim in range(2):
            d_bias = d_bias.sum(dim, keepdim=True) if bias.shape[dim] == 1 else d_bias
    return *others, d_bias if wanted else None


def _refuse(ctx, *grads):
    raise NotImplementedError("fma: first derivatives only; the gradient of a gradient is not implemented")


_attend.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
