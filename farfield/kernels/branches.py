"""Three branches of one query, compressed rows, chosen blocks and a window, and their gated sum: launches alone.

What is here follows from shapes, strides and options, so that a call is one recording (kernels.replay). The window's
lists, and who reads each of their blocks, are constants of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from farfield.kernels import (
    attend_backward,
    attend_listed,
    attend_listed_hopper,
    choose,
    choose_backward,
    choose_hopper,
    compress,
    fan,
    join_branches,
    mix,
    near_hopper,
    patterns,
)
from farfield.kernels.launch import attend_forward
from farfield.kernels.replay import constant
from farfield.kernels.transpose import Readers, counted, counts, transpose
from farfield.ops.attend import Call, Plan
from farfield.ops.choose import Scoring


class About(NamedTuple):
    """What of a call is no tensor.

    Args:
        width: tokens of the window.
        block, picks: rows of a block of the window's lists, and entries of a list at most.
    """

    scoring: Scoring
    width: int
    block: int
    picks: int
    scale: float


def forward(*given) -> Tensor | tuple[Tensor, ...]:
    """out [B, H, T, D].

    Args:
        given: q, k, v and, where these are learned, the weights of the compression, gate and bias, dense; About; and
            whether there will be a backward.

    Returns:
        for a backward also out and lse of the compressed rows, of the chosen blocks and of the window, index and count
        of the choice, the compressed keys and values, and what `compress` keeps.
    """
    *tensors, about, trained = given
    q, k, v, *weights = tensors
    scoring, scale = about.scoring, about.scale
    rows = (k.shape[2] - scoring.span) // scoring.stride + 1
    keys, values, *kept = compress.compress(k, v, *weights[:6], scoring.stride, scoring.span, rows, trained)
    gate, bias = weights[6:] if weights else (None, None)
    if together(q, k, v, about):
        early = min(near_hopper.EARLY, -(-q.shape[2] // scoring.block)) * scoring.block
        far, far_lse, index, count, others, free, named = choose.run(
            q, keys, values, None, scoring, scoring.stride, scoring.span, 0, scale, early
        )
        near, near_lse, *begun = near_hopper.attend_near(q, k, v, scoring, about.width, scale, named)
        out, chosen, chosen_lse = _joined(q, k, v, others, free, begun, far, near, gate, bias, about, trained)
    else:
        far, far_lse, index, count = choose.both(q, keys, values, scoring, 0, scale)
        chosen, chosen_lse = attend_forward(chosen_call(q, k, v, index, count, about))
        near, near_lse = attend_forward(_window(q, k, v, about))
        out = mix.mix((far, chosen.view(q.shape), near), q, gate, bias, None)
    if not trained:
        return out
    return out, far, far_lse, chosen, chosen_lse, near, near_lse, index, count, keys, values, *kept


def together(q: Tensor, k: Tensor, v: Tensor, about: About) -> bool:
    """Whether blocks that every query reads come from the window's launch, and the parts of others meet in the sum."""
    scoring, stack = about.scoring, q.shape[1] // k.shape[1]
    if not scoring.scored or q.shape[2] < attend_listed.FEWEST:
        return False
    if not near_hopper.wants(q, k, v, scoring, about.width, about.scale):
        return False
    rows = (k.shape[2] - scoring.span) // scoring.stride + 1
    if not (rows > 0 and choose_hopper.wants_best(q, stack, scoring)):
        return False
    # of lists only the shape matters here
    lists = q.new_empty(1, dtype=torch.int32).expand(q.shape[0], k.shape[1], _chunk(q, scoring), scoring.scored)
    call = chosen_call(q, k, v, lists, lists[..., 0], about)
    return attend_listed_hopper.wants(call, 1, stack) and counts(call.index[0], -(-k.shape[2] // scoring.block))


def _chunk(q: Tensor, scoring: Scoring) -> int:
    """Queries whose parts take attend_listed.PARTS bytes."""
    each = q.shape[0] * q.shape[1] * scoring.scored * q.shape[3] * q.element_size()
    return min(q.shape[2], max(attend_listed.FEWEST, attend_listed.PARTS // each))


def _joined(
    q: Tensor, k: Tensor, v: Tensor, others: Tensor, free: Tensor, begun: Sequence[Tensor], far: Tensor, near: Tensor,
    gate: Tensor | None, bias: Tensor | None, about: About, trained: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """out, and out and lse of the chosen blocks for a backward; `others`: lists of what was chosen by score."""
    batch, heads, tokens, width = q.shape
    units, stack = batch * k.shape[1], heads // k.shape[1]
    scoring = about.scoring
    chunk, row_blocks = _chunk(q, scoring), -(-tokens // scoring.block)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    chosen = chosen_lse = None
    if trained:
        chosen = torch.empty(units, stack, tokens, width, dtype=q.dtype, device=q.device)
        chosen_lse = torch.empty(units, stack, tokens, dtype=torch.float32, device=q.device)
    parts = q.new_empty(units * stack * chunk * scoring.scored, width)
    masses = torch.empty(units * stack * chunk * scoring.scored, dtype=torch.float32, device=q.device)
    call = chosen_call(q, k, v, others, free, about)
    for first in range(0, tokens, chunk):
        many = min(chunk, tokens - first)
        listed, filled = (x[0][:, :, first : first + many].contiguous() for x in (call.index, call.count))
        most = attend_listed.piece_size(many, scoring.scored, row_blocks)
        found = counted(listed, filled, row_blocks, most)
        attend_listed_hopper.read(call, found, parts, masses, 1, stack, first, many)
        join_branches.join(
            parts, masses, found.place, filled, begun, far, near, q, gate, bias, out, (chosen, chosen_lse), first
        )
    return out, chosen, chosen_lse


def backward(*given) -> tuple[Tensor, ...]:
    """What goes on once the chosen blocks have been differentiated.

    Args:
        given: the gradients of the compressed rows' out and of the window's, or one for both; q, k, v, the compressed
            keys and values, out and lse of the compressed rows and of the window; dq, dk and dv of the chosen blocks;
            and where gates are learned what they add to dq. Then About, how many of the tensors come before q, and what
            all gradients are multiplied by.

    Returns:
        dq, dk and dv; where the compression is learned dk and dv of the window alone, and the gradients of the
        compressed keys and values.
    """
    *tensors, about, own, factor = given
    d_far, d_near = tensors[0], tensors[own - 1]
    q, k, v, keys, values, far, far_lse, near, near_lse, d_q1, d_k1, d_v1, *d_q3 = tensors[own:]
    scoring, scale = about.scoring, about.scale
    d_q0, d_keys, d_values = choose_backward.ended_backward(
        q, keys, values, d_far, None, far, far_lse, scoring.stride, scoring.span, 0, scale
    )
    call = _window(q, k, v, about)
    readers = constant(_readers, call.index[0], call.count[0], about.block)
    _, d_q2, ((d_k2, d_v2, *_),) = attend_backward.gradients(call, d_near, None, near, near_lse, False, readers)
    d_q = fan.add([d_q0, d_q1.view(q.shape), d_q2, *d_q3], factor)
    if d_q3:
        return d_q, d_k2, d_v2, d_keys, d_values
    d_k, d_v = fan.spread((d_k2, d_v2), (d_k1, d_v1), (d_keys, d_values), scoring.stride, scoring.span, factor)
    return d_q, d_k, d_v


def chosen_call(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, about: About) -> Call:
    """The chosen blocks: query heads that share a list are, with their key head, one batch element."""
    batch, heads, tokens, width = q.shape
    units = index.shape[1]
    q = q.reshape(batch * units, heads // units, tokens, width)
    k, v = (x.reshape(batch * units, 1, *x.shape[2:]) for x in (k, v))
    lists = [index.flatten(0, 1)[:, None]], [count.flatten(0, 1)[:, None]]
    none = q.new_empty(0)
    plan = Plan(1, about.scoring.block, True, -1, 0)
    return Call(q, [k], [v], [none], [none], [none], none, none, *lists, [plan], about.scale)


def _window(q: Tensor, k: Tensor, v: Tensor, about: About) -> Call:
    tokens, none = q.shape[2], q.new_empty(0)
    index, count = constant(patterns.recent, tokens, tokens, about.width, about.block, about.picks, q.device)
    plan = Plan(about.block, about.block, True, about.width, 0)
    return Call(q, [k], [v], [none], [none], [none], none, none, [index], [count], [plan], about.scale)


def _readers(index: Tensor, count: Tensor, block: int) -> list[Readers]:
    """Who reads each block of the window's lists."""
    blocks = index.shape[2]
    return transpose([index], [count], [blocks], [False], [attend_backward.piece(False, index.shape, blocks)])
