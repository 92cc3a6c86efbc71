"""Three branches of one query, compressed rows, chosen blocks and a window, and their gated sum: launches alone.

What is here follows from shapes, strides and options, so that a call is one recording (kernels.replay). The window's
lists, and who reads each of their blocks, are constants of it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from farfield.kernels import attend_backward, choose, choose_backward, compress, fan, mix, patterns
from farfield.kernels.launch import attend_forward
from farfield.kernels.replay import constant
from farfield.kernels.transpose import Readers, transpose
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
    far, far_lse, index, count = choose.both(q, keys, values, scoring, 0, scale)
    chosen, chosen_lse = attend_forward(chosen_call(q, k, v, index, count, about))
    near, near_lse = attend_forward(_window(q, k, v, about))
    gate, bias = weights[6:] if weights else (None, None)
    out = mix.mix((far, chosen.view(q.shape), near), q, gate, bias, None)
    if not trained:
        return out
    return out, far, far_lse, chosen, chosen_lse, near, near_lse, index, count, keys, values, *kept


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
