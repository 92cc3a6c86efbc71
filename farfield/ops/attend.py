"""attend: read the rows a layout names, under one softmax over all sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.library import custom_op

from farfield.ops import precision
from farfield.ops.eager import PLAIN, eager, recorded
from farfield.ops.known import Known, Memory
from farfield.types import Layout, Partial, Rows


class Plan(NamedTuple):
    """One source's part of the op's `plan`: integers only, so that a custom op can carry it."""

    q_block: int
    k_block: int
    causal: int
    reach: int  # -1: no limit
    sinks: int
    own: int = 0  # each list ends with the block of its single query


class Call(NamedTuple):
    """What an implementation gets: lists hold one entry a source, an absent tensor is a 1-D empty one.

    Shapes: q [B, H, T, D], k [B, G, S, D], v [B, G, S, E]; bias, end and row_group [1|B, heads, S], position and
    group [1|B, heads, T], index [1|B, 1|H, N, P], count [1|B, 1|H, N].
    """

    q: Tensor
    k: Sequence[Tensor]
    v: Sequence[Tensor]
    bias: Sequence[Tensor]
    end: Sequence[Tensor]
    row_group: Sequence[Tensor]
    position: Tensor
    group: Tensor
    index: Sequence[Tensor]
    count: Sequence[Tensor]
    plans: Sequence[Plan]
    scale: float


def attend(
    q: Float[Tensor, "B H T D"],
    rows: Rows | Sequence[tuple[Rows, Layout]],
    layout: Layout | None = None,
    *,
    scale: float | None = None,
    position: Int[Tensor, "*#batch T"] | None = None,
    group: Int[Tensor, "*#batch T"] | None = None,
) -> Partial:
    """Softmax attention of each query over the rows that its block reads, one softmax over all sources.

        out[i] = sum_r e^(s[i, r]) v[r] / sum_r e^(s[i, r]),    s[i, r] = scale * q[i] . k[r] + bias[r]

    A row is visible to a query iff it is in the query block's list, it ends at or before the query's position (causal
    layouts), it lies within the layout's reach, and the groups agree (where given). A row that two sources name is
    counted twice. Differentiable in q and in the rows' k, v and bias through out and lse; layouts, positions and
    groups carry no gradient. H is a multiple of G, and query head h reads key head h // (H / G). Scores and sums are
    float32 or wider. On the CPU everything is deterministic. The backward recomputes the scores from lse: memory is
    linear in T and S.

    Args:
        rows: what to read, with `layout`; or a sequence of (rows, layout) sources, all with one q_block.
        scale: factor on q . k before the exponential. Default 1 / sqrt(D).
        position: positions of the queries, [T] or [B|1, 1|H, T]. Default 0 .. T-1.
        group: buckets or documents of the queries, [T] or [B|1, 1|H, T]; needed iff any source has groups.

    Returns:
        out in q's dtype, lse as natural log in float32 or wider. A query that reads nothing gives 0 and -inf.

    Raises:
        ValueError: shapes do not fit together, or a layout was built for another T, S or q_block.
        TypeError: q, k and v are not floating point of one dtype, or positions or groups are not integers.

    Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the softmax in pieces and its backward from lse; the
    joint softmax over near and far rows is Fast Multipole Attention's (arXiv:2310.11960).
    """
    given = [(rows, layout)] if isinstance(rows, Rows) else rows
    key = _key(q, given, position, group, scale)
    known = None if key is None else _memory.find(key)
    if known is None:
        sources = _check(q, given, position, group)
        known = None if key is None else _memory.of(key)
    else:
        # what was checked then need not be checked again
        sources = cast(Sequence[tuple[Rows, Layout]], given)
    none = q.new_empty(0)
    call = Call(
        q,
        [r.k for r, _ in sources],
        [r.v for r, _ in sources],
        [none if r.bias is None else _weights(r.bias, q) for r, _ in sources],
        [none if r.end is None else _per_head(r.end) for r, _ in sources],
        [none if r.group is None else _per_head(r.group) for r, _ in sources],
        none if position is None else _per_head(position),
        none if group is None else _per_head(group),
        [p.index for _, p in sources],
        [p.count for _, p in sources],
        [Plan(p.q_block, p.k_block, p.causal, -1 if p.reach is None else p.reach, p.sinks, p.own) for _, p in sources],
        q.shape[3] ** -0.5 if scale is None else float(scale),
    )
    weighed = q, *call.k, *call.v, *call.bias
    if not eager(*weighed):
        out, lse = _forward(*_flat(call))
    elif recorded(*weighed):
        out, lse = _Attend.apply(call, known, *weighed)
    else:
        out, lse = _attend(call, known)
    return Partial(out, lse)


def _attend(call: Call, known: Known | None = None) -> tuple[Tensor, Tensor]:
    """out and lse, by whatever takes the call; `known`: of its signature."""
    if call.q.is_cuda:
        from farfield.kernels import plans
        from farfield.kernels.attend import refusal

        if not refusal(call):
            return _plainly(plans.forward, call, known)
    # no kernel for this dtype, width or number of sources: the same sums in PyTorch
    from farfield.cpu.attend import forward

    return _plainly(forward, call)


def _gradients(
    call: Call, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> list[Tensor]:
    """Of q, each k, each v and each bias, by whatever takes the call; no d_lse stands for zeros."""
    from farfield.cpu.attend import backward

    if call.q.is_cuda:
        from farfield.kernels import plans
        from farfield.kernels.attend import refusal

        if not refusal(call):
            return _plainly(plans.backward, call, d_out, d_lse, out, lse, bias_grad)
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
    return _plainly(backward, call, d_out, d_lse, out, lse, bias_grad)


class _Attend(torch.autograd.Function):
    """The operation below without the dispatcher; lists of tensors are flat here."""

    @staticmethod
    def forward(ctx, call: Call, known: Known | None, *weighed: Tensor):
        # most use out alone, and zeros for lse would have to be written and read
        ctx.set_materialize_grads(False)
        out, lse = _attend(call, known)
        ctx.plans, ctx.scale, ctx.sources = call.plans, call.scale, len(call.k)
        _keep(ctx, out, lse, call)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        out, lse, call = _kept(ctx)
        d_out = torch.zeros_like(out) if d_out is None else d_out
        bias_grad = any(ctx.needs_input_grad[-ctx.sources :])
        return None, None, *_differentiated(call, d_out, d_lse, out, lse, bias_grad)


# The schema is flat: an absent tensor is an empty one, because lists of optional tensors carry no gradient.


@custom_op("farfield::attend", mutates_args=())
def _forward(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    bias: Sequence[Tensor],
    end: Sequence[Tensor],
    row_group: Sequence[Tensor],
    position: Tensor,
    group: Tensor,
    index: Sequence[Tensor],
    count: Sequence[Tensor],
    plan: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _attend(Call(q, k, v, bias, end, row_group, position, group, index, count, _plans(plan), scale))


@_forward.register_fake
def _(q, k, v, bias, end, row_group, position, group, index, count, plan, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v[0].shape[-1]), q.new_empty(q.shape[:3], dtype=wide)


@custom_op("farfield::attend_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    bias: Sequence[Tensor],
    end: Sequence[Tensor],
    row_group: Sequence[Tensor],
    position: Tensor,
    group: Tensor,
    index: Sequence[Tensor],
    count: Sequence[Tensor],
    plan: Sequence[int],
    scale: float,
    bias_grad: bool,
) -> list[Tensor]:
    call = Call(q, k, v, bias, end, row_group, position, group, index, count, _plans(plan), scale)
    return _gradients(call, d_out, d_lse, out, lse, bias_grad)


@_backward.register_fake
def _(d_out, d_lse, out, lse, q, k, v, bias, *rest):
    return [x.new_empty(x.shape) for x in (q, *k, *v, *bias)]


def _save(ctx, inputs, output):
    call = Call(*inputs)
    ctx.plans, ctx.scale, ctx.sources = _plans(inputs[-2]), call.scale, len(call.k)
    out, lse = output
    _keep(ctx, out, lse, call)


def _differentiate(ctx, d_out, d_lse):
    # lse has a gradient of its own: merge() weighs partial results by it
    out, lse, call = _kept(ctx)
    grads = _differentiated(call, d_out, d_lse, out, lse, any(ctx.needs_input_grad[3]))
    n = ctx.sources
    d_q, d_k, d_v, d_bias = grads[0], grads[1 : n + 1], grads[n + 1 : 2 * n + 1], grads[2 * n + 1 :]
    nothing = [None] * n
    return d_q, d_k, d_v, d_bias, nothing, nothing, None, None, nothing, nothing, None, None


def _keep(ctx, out: Tensor, lse: Tensor, call: Call) -> None:
    q, k, v, bias, end, row_group, position, group, index, count, _, _ = call
    ctx.save_for_backward(out, lse, q, position, group, *k, *v, *bias, *end, *row_group, *index, *count)


def _kept(ctx) -> tuple[Tensor, Tensor, Call]:
    out, lse, q, position, group, *rest = ctx.saved_tensors
    n = ctx.sources
    k, v, bias, end, row_group, index, count = (rest[i * n : (i + 1) * n] for i in range(7))
    return out, lse, Call(q, k, v, bias, end, row_group, position, group, index, count, ctx.plans, ctx.scale)


def _differentiated(call: Call, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool):
    # the registered operation refuses a gradient of its gradients
    if torch.is_grad_enabled() or not eager(d_out, call.q, *(() if d_lse is None else (d_lse,))):
        d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
        return _backward(d_out, d_lse, out, lse, *_flat(call), bias_grad)
    return _gradients(call, d_out, d_lse, out, lse, bias_grad)


def _refuse(ctx, *grads):
    raise NotImplementedError("attend: first derivatives only; the gradient of a gradient is not implemented")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _plainly(implementation, call: Call, *more):
    with precision.kept(call.q):
        return implementation(call, *more)


def _plans(flat: Sequence[int]) -> list[Plan]:
    size = len(Plan._fields)
    return [Plan(*flat[i : i + size]) for i in range(0, len(flat), size)]


def _flat(call: Call) -> list[Any]:
    """The arguments of the registered operation."""
    return [*call[:-2], [x for plan in call.plans for x in plan], call.scale]


def _weights(bias: Tensor, q: Tensor) -> Tensor:
    """Per head, in float32 or wider."""
    bias = _per_head(bias)
    wide = torch.promote_types(q.dtype, torch.float32)
    return bias if bias.dtype == wide else bias.to(wide)


def _per_head(x: Tensor) -> Tensor:
    """[S] or [B, H, S] as [B, H, S]."""
    return x[None, None] if x.dim() == 1 else x


# signatures that have passed the checks, and with each what kernels keep for further calls of it
_memory = Memory(128)


def _key(
    q: Tensor, given: Sequence[tuple[Rows, Layout | None]], position: Tensor | None, group: Tensor | None,
    scale: float | None,
) -> tuple[Any, ...] | None:  # fmt: skip
    """All that the checks look at and that launches follow from, None for what a compiler or a mode sees.

    None also for what is no (Rows, Layout): the checks say so.
    """
    if not eager(q) or type(given) not in (list, tuple):
        return None
    tensors: list[Any] = [q, position, group]
    key: list[Any] = [None if scale is None else float(scale)]
    for rows, layout in given:
        if type(rows) is not Rows or type(layout) is not Layout:
            return None
        tensors += rows.k, rows.v, rows.end, rows.bias, rows.group, layout.index, layout.count
        key += layout.q_block, layout.k_block, layout.tokens, layout.rows, layout.causal, layout.reach, layout.sinks
        key.append(layout.own)
    for x in tensors:
        if x is None:
            key.append(None)
        elif type(x) in PLAIN:
            key += x.shape, x.stride(), x.dtype, x.device
        else:
            return None
    return tuple(key)


def _check(
    q: Tensor, given: Sequence[tuple[Rows, Layout | None]], position: Tensor | None, group: Tensor | None
) -> Sequence[tuple[Rows, Layout]]:
    """The sources, once everything fits together."""
    if isinstance(given, Tensor):
        raise TypeError("attend: rows must be Rows, or a list of (Rows, Layout), got a tensor; use Rows(k, v)")
    if not given:
        raise ValueError("attend: needs at least one (rows, layout) source")
    if not q.is_floating_point() or q.dim() != 4:
        raise TypeError(f"attend: q must be floating point [B, H, T, D], got {q.dtype} {list(q.shape)}")
    batch, heads, tokens, _ = q.shape
    sources: list[tuple[Rows, Layout]] = []
    grouped = False
    for n, (rows, layout) in enumerate(given):
        if not isinstance(rows, Rows) or not isinstance(layout, Layout):
            raise TypeError(
                f"attend: source {n} must be (Rows, Layout), got ({type(rows).__name__}, {type(layout).__name__})"
            )
        sources.append((rows, layout))
        value_width = _check_source(f"attend: source {n}", q, rows, layout)
        if not n:
            q_block, first_width = layout.q_block, value_width
        elif layout.q_block != q_block:
            raise ValueError(f"attend: all layouts must share a q_block, got {q_block} and {layout.q_block}")
        elif value_width != first_width:
            raise ValueError(f"attend: all sources must share a value width, got {first_width} and {value_width}")
        if rows.group is not None:
            grouped = True
            if group is None:
                raise ValueError(f"attend: source {n} has row groups but the queries have none; pass group=")
    if group is not None and not grouped:
        raise ValueError("attend: the queries have groups but no source has; set Rows.group")
    for name, x in (("position", position), ("group", group)):
        if x is not None:
            _check_per_row("attend", name, x, batch, (1, heads), tokens, "T", integer=True)
            if x.device != q.device:
                raise ValueError(f"attend: {name} is on {x.device}, q on {q.device}")
    return sources


def _check_source(who: str, q: Tensor, rows: Rows, layout: Layout) -> int:
    """The value width, once the source fits the queries."""
    dtype, device = q.dtype, q.device
    batch, heads, tokens, width = q.shape
    for name, x in (("k", rows.k), ("v", rows.v)):
        if x.dim() != 4 or x.shape[0] != batch:
            raise ValueError(f"{who}: {name} must be [B={batch}, G, S, width], got {list(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{who}: {name} is {x.dtype} but q is {dtype}; use one dtype")
        if x.device != device:
            raise ValueError(f"{who}: {name} is on {x.device}, q on {device}")
    _, kv_heads, many, key_width = rows.k.shape
    _, value_heads, value_rows, value_width = rows.v.shape
    if kv_heads != value_heads or many != value_rows or key_width != width:
        raise ValueError(f"{who}: k {list(rows.k.shape)} and v {list(rows.v.shape)} do not fit q {list(q.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{who}: {heads} query heads are not a multiple of {kv_heads} key heads")
    if layout.tokens != tokens:
        raise ValueError(
            f"{who}: the layout was built for {layout.tokens} queries, but q has {tokens}. Build the layout for this T."
        )
    if layout.rows != many:
        raise ValueError(
            f"{who}: the layout was built for {layout.rows} rows, but there are {many}. "
            "Build the layout for these rows."
        )
    index = layout.index
    list_batch, list_heads = index.shape[:2]
    if list_batch not in (1, batch) or list_heads not in (1, heads):
        raise ValueError(f"{who}: index must be [1|{batch}, 1|{heads}, N, P], got {list(index.shape)}")
    if index.device != device:
        raise ValueError(f"{who}: the layout is on {index.device}, q on {device}; use layout.to(device)")
    for name, x in (("end", rows.end), ("group", rows.group), ("bias", rows.bias)):
        if x is not None:
            allowed = (1, kv_heads, heads) if name == "bias" else (1, kv_heads)
            _check_per_row(who, name, x, batch, allowed, many, "S", integer=name != "bias")
            if x.device != device:
                raise ValueError(f"{who}: {name} is on {x.device}, q on {device}")
    return value_width


def _check_per_row(
    who: str, name: str, x: Tensor, batch: int, heads: tuple[int, ...], rows: int, letter: str, *, integer: bool
) -> None:
    if integer == x.is_floating_point() or x.dtype == torch.bool:
        raise TypeError(f"{who}: {name} must be {'integer' if integer else 'floating point'}, got {x.dtype}")
    fits = x.shape[-1] == rows and (x.dim() == 1 or (x.dim() == 3 and x.shape[0] in (1, batch) and x.shape[1] in heads))
    if not fits:
        allowed = " or ".join(f"[1|{batch}, {h}, {rows}]" for h in dict.fromkeys(heads))
        raise ValueError(f"{who}: {name} must be [{letter}={rows}] or {allowed}, got {list(x.shape)}")
