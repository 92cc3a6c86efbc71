"""Linear recurrences and prefix scans: attention over the past with a fixed-size state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from farfield.mechanism import check_qkv, no_tokens
from farfield.ops.eager import eager, recorded

# chunks that one step of the recurrence over chunks joins
_FAN = 32


def scan(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T E"],
    decay: Float[Tensor, " H"] | Float[Tensor, "#B H T"] | None = None,
    state: Float[Tensor, "B H D E"] | None = None,
    *,
    chunk: int = 64,
) -> tuple[Float[Tensor, "B H T E"], Float[Tensor, "B H D E"]]:
    """The linear recurrence

        S[t] = exp(decay[t]) S[t-1] + k[t] v[t]^T,    out[t] = q[t] S[t]

    computed in parallel: quadratic inside chunks, a recurrence of fan 32 over the chunks. Feeding the tokens in any
    pieces, each with the state of the one before, gives the numbers of one call. Differentiable in every tensor.
    Query head h reads key head h // (H / G). Products and sums are float32 or wider, under autocast too. Only
    exponentials of sums of decays are taken, never of their differences: strong decays, and -inf, which forgets
    everything before its token, lose no precision.

    Work O(T chunk). Decays per head that need no gradient cost no memory beyond the result and a few states, since the
    backward computes the others again, and have a kernel on the GPU: bfloat16, float16 and float32, widths up to 256;
    its states are as exact as products of the inputs' dtype, and what has faded below 2^-64 may be dropped. Others take
    O(T (chunk + D E / chunk)).

    Args:
        decay: log of the factor on the state, at most 0, per head or per token. Default 0: nothing fades.
        state: S before the first token. Default 0.
        chunk: tokens of a chunk.

    Returns:
        out: q's dtype.
        state: S after the last token, float32 or wider.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit together.

    Source: the chunkwise form of GLA (Yang et al. 2023, arXiv:2312.06635) with the segment sums of Mamba-2
    (Dao and Gu 2024, arXiv:2405.21060).
    """
    check_qkv("scan", q, k, v)
    B, H, T, D = q.shape
    E = v.shape[3]
    if k.shape[2] != T:
        raise ValueError(f"scan: q has {T} tokens, k and v have {k.shape[2]}; the recurrence reads them in step")
    if chunk < 1:
        raise ValueError(f"scan: chunk must be at least 1, got {chunk}")
    for name, x in (("decay", decay), ("state", state)):
        if x is not None and x.device != q.device:
            raise ValueError(f"scan: {name} is on {x.device}, q on {q.device}")
        if x is not None and not x.is_floating_point():
            raise TypeError(f"scan: {name} must be floating point, got {x.dtype}")
    if decay is not None and decay.shape not in ((H,), (B, H, T), (1, H, T)):
        raise ValueError(f"scan: decay must be [H] = [{H}] or [B, H, T] = [{B}, {H}, {T}], got {list(decay.shape)}")
    if state is not None and state.shape != (B, H, D, E):
        raise ValueError(f"scan: state must be [B, H, D, E] = {[B, H, D, E]}, got {list(state.shape)}")

    dtype = torch.promote_types(q.dtype, torch.float32)
    if state is not None:
        state = state.to(dtype)
    if T == 0:
        return no_tokens(q, v), q.new_zeros(B, H, D, E, dtype=dtype) if state is None else state
    if decay is None:
        decay = q.new_zeros(H, dtype=dtype)
    if decay.dim() == 1 and not decay.requires_grad:
        return _faded(q, k, v, decay.to(dtype), q.new_empty(0, dtype=dtype) if state is None else state, chunk)
    if decay.dim() == 1:
        decay = decay[None, :, None].expand(1, H, T)
    return _chunked(q, k, v, decay, state, chunk)


def _chunked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """scan in differentiable PyTorch: decay [B|1, H, T], any of q, k, v with fewer heads."""
    B, H, T, D, E = q.shape[0], max(q.shape[1], k.shape[1]), q.shape[2], q.shape[3], v.shape[3]
    dtype, out_dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
    q, k, v = (x.to(dtype).repeat_interleave(H // x.shape[1], 1) for x in (q, k, v))
    state = q.new_zeros(B, H, D, E) if state is None else state
    C = min(chunk, T)
    # a token of k = v = 0 and decay 0 changes no state
    q, k, v = (pad(x, (0, 0, 0, -T % C)).unflatten(2, (-1, C)) for x in (q, k, v))
    decay = pad(decay.to(dtype), (0, -T % C)).unflatten(2, (-1, C))
    # autocast would take the products in bfloat16
    with torch.autocast(q.device.type, enabled=False):
        fade = _spans(decay).exp()  # [B, H, N, C, C]
        within = (q @ k.mT * fade) @ v
        added = (k * fade[..., -1, :, None]).mT @ v  # [B, H, N, D, E]
        states = _recur(added.flatten(3), decay.sum(-1), state.flatten(2)).unflatten(3, (D, E))
        before = torch.cat([state[:, :, None], states[:, :, :-1]], 2)
        out = within + decay.cumsum(-1).exp()[..., None] * (q @ before)
    return out.flatten(2, 3)[:, :, :T].to(out_dtype), states[:, :, -1]


def _faded(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The recurrence with decays [H] that get no gradient; an empty state stands for zeros."""
    if not eager(q, k, v, decay, state):
        return _forward(q, k, v, decay, state, False, chunk)
    if recorded(q, k, v, state):
        return _Faded.apply(q, k, v, decay, state, chunk)
    return _run(q, k, v, decay, state, False, chunk)


def _run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, back: bool, chunk: int,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, H, T, E] and end [B, H, D, E], by whatever takes the call. q may have fewer heads than k and v, too.

    back: from the last token to the first, and state and end on the other side of their token's decay:

        out[t] = sum_{s >= t} e^(decay (s - t)) (q[t] . k[s]) v[s] + e^(decay (T - 1 - t)) q[t] state
        end = sum_s e^(decay (s + 1)) k[s] v[s]^T + e^(decay T) state

    kept: gets the states that the kernels have started from, where they leave some.
    """
    given = state if state.numel() else None
    if q.is_cuda:
        from farfield.kernels.scan import forward, refusal

        if not refusal(q, v):
            return forward(q, k, v, decay, given, back, kept)
    T = q.shape[2]
    every = decay[None, :, None]
    with torch.no_grad():
        if not back:
            out, end = _chunked(q, k, v, every.expand(1, -1, T), given, chunk)
            return out.contiguous(), end.contiguous()
        q, k, v = (x.flip(2) for x in (q, k, v))
        # the decay of a token comes after it: that of the first one here is not the state's
        shifted = torch.cat([torch.zeros_like(every), every.expand(1, -1, T - 1)], 2)
        out, end = _chunked(q, k, v, shifted, given, chunk)
        return out.flip(2), decay.exp()[:, None, None] * end


def _gradients(
    d_out: Tensor, d_end: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, chunk: int,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q, k, v and state: three more recurrences; an empty d_end stands for zeros, `before` is what the forward kept.

    With S of the forward and R[t] = sum_{s >= t} lambda^(s - t) q[s] d_out[s]^T + lambda^(T - 1 - t) d_end:
    dq = d_out S^T, dk = v R^T, dv = k R, and d state = lambda R[0].
    """
    d_q = both = None
    if q.is_cuda:
        from farfield.kernels.scan import gradient_of_queries, gradients, refusal

        if not refusal(q, v):
            d_q = gradient_of_queries(d_out, k, v, decay, before)
            both = gradients(d_out, d_end if d_end.numel() else None, q, k, v, decay)
    if d_q is None:
        d_q, _ = _run(d_out, v, k, decay, state.mT if state.numel() else state, False, chunk)
    if both is None:
        d_k, _ = _run(v, d_out, q, decay, d_end.mT if d_end.numel() else d_end, True, chunk)
        both = d_k, *_run(k, q, d_out, decay, d_end, True, chunk)
    d_k, d_v, d_state = both
    heads, wide = k.shape[1], decay.dtype
    if heads != q.shape[1]:
        d_k, d_v = (x.unflatten(1, (heads, -1)).sum(2, dtype=wide).to(x.dtype) for x in (d_k, d_v))
    return d_q, d_k, d_v, d_state if state.numel() else torch.empty_like(state)


class _Faded(torch.autograd.Function):
    """The operation below without the dispatcher."""

    @staticmethod
    def forward(ctx, q, k, v, decay, state, chunk):
        # most use out alone, and zeros for end would have to be written and read
        ctx.set_materialize_grads(False)
        ctx.chunk = chunk
        # dq goes by the states of the forward
        kept: list[Tensor] = []
        out, end = _run(q, k, v, decay, state, False, chunk, kept)
        ctx.save_for_backward(q, k, v, decay, state, *kept)
        return out, end

    @staticmethod
    def backward(ctx, d_out, d_end):
        return _differentiate(ctx, d_out, d_end)[:6]


@custom_op("farfield::scan", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, back: bool, chunk: int
) -> tuple[Tensor, Tensor]:
    return _run(q, k, v, decay, state, back, chunk)


@_forward.register_fake
def _(q, k, v, decay, state, back, chunk):
    heads, width, value_width = max(q.shape[1], k.shape[1]), q.shape[3], v.shape[3]
    out = q.new_empty(q.shape[0], heads, q.shape[2], value_width)
    return out, q.new_empty(q.shape[0], heads, width, value_width, dtype=decay.dtype)


@custom_op("farfield::scan_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_end: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(d_out, d_end, q, k, v, decay, state, chunk)


@_backward.register_fake
def _(d_out, d_end, q, k, v, decay, state, chunk):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, state))


def _save(ctx, inputs, output):
    *saved, back, ctx.chunk = inputs
    if back:
        raise NotImplementedError("scan: the recurrence from the last token on is part of a backward and has none")
    ctx.save_for_backward(*saved)


def _differentiate(ctx, d_out, d_end):
    q, k, v, decay, state, *before = ctx.saved_tensors
    d_out = q.new_zeros(*q.shape[:3], v.shape[3]) if d_out is None else d_out
    d_end = decay.new_empty(0) if d_end is None else d_end
    given = d_out, d_end, q, k, v, decay, state
    # the registered operation refuses a gradient of its gradients
    if torch.is_grad_enabled() or not eager(*given):
        d_q, d_k, d_v, d_state = _backward(*given, ctx.chunk)
    else:
        d_q, d_k, d_v, d_state = _gradients(*given, ctx.chunk, *before)
    return d_q, d_k, d_v, None, d_state, None, None


def _refuse(ctx, *grads):
    raise NotImplementedError(
        "scan: first derivatives only where decays are per head and need no gradient; give decays per token"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _recur(added: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """S[n] = exp(decay[n]) S[n-1] + added[n] for every n: added [B, H, N, X], decay [B, H, N], state [B, H, X]."""
    N = added.shape[2]
    F = min(_FAN, N)
    added = pad(added, (0, 0, 0, -N % F)).unflatten(2, (-1, F))
    decay = pad(decay, (0, -N % F)).unflatten(2, (-1, F))
    own = _spans(decay).exp() @ added  # [B, H, N / F, F, X]
    before = state[:, :, None]
    if own.shape[2] > 1:
        ends = _recur(own[:, :, :, -1], decay.sum(-1), state)
        before = torch.cat([before, ends[:, :, :-1]], 2)
    out = own + decay.cumsum(-1).exp()[..., None] * before[:, :, :, None]
    return out.flatten(2, 3)[:, :, :N]


def _spans(decay: Tensor) -> Tensor:
    """[..., t, s]: the sum of decay[s + 1 .. t], -inf where s > t.

    Summed up, not subtracted: the difference of two cumulative sums is inexact when they are large, NaN when -inf.
    """
    later = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device).tril(-1)
    steps = decay[..., :, None].masked_fill(~later, 0.0)
    return steps.cumsum(-2).masked_fill(later.mT, float("-inf"))


class Prefix(NamedTuple):
    """Softmax sums over some tokens: with peak the largest score, mass = sum e^(s - peak), total = sum e^(s - peak) v.

    Two of them over different tokens merge into one: rescaled to the larger peak and added. No tokens: (-inf, 0, 0).
    """

    peak: Float[Tensor, "B H"]
    mass: Float[Tensor, "B H"]
    total: Float[Tensor, "B H E"]


def prefix_softmax(
    scores: Float[Tensor, "B H T"],
    v: Float[Tensor, "B G T E"],
    state: Prefix | None = None,
    *,
    chunk: int = 64,
) -> tuple[Float[Tensor, "B H T E"], Prefix]:
    """The softmax average of every prefix, a parallel scan whose operator is the merge of softmax sums:

        out[t] = sum_{i <= t} e^(s[i]) v[i] / sum_{i <= t} e^(s[i])

    Quadratic inside chunks, then the same scan over the chunks' sums. Feeding the tokens in any pieces, each with the
    state of the one before, gives the numbers of one call. Every exponential is of a score less the largest one so
    far, so that no size of scores overflows or underflows to 0 / 0. A score of -inf hides its token; a prefix of
    nothing else gives 0. Differentiable in scores, v and the state's mass and total: the peak is a constant, which is
    exact because it cancels. Sums are float32 or wider, under autocast too. Query head h reads value head
    h // (H / G).

    Work O(T chunk E), memory O(T (chunk + E)).

    Args:
        state: sums over the tokens before the first. Default: none.
        chunk: tokens of a chunk, at least 2.

    Returns:
        out: v's dtype.
        state: sums over all tokens, float32 or wider.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit together.

    Source: the scan of Aaren (Feng et al. 2024, arXiv:2405.13956), its binary tree replaced by one of fan `chunk`.
    """
    who = "prefix_softmax"
    for name, x, dims in (("scores", scores, 3), ("v", v, 4)):
        if x.dim() != dims:
            raise ValueError(f"{who}: {name} must have {dims} dimensions, got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{who}: {name} must be floating point, got {x.dtype}")
    B, H, T = scores.shape
    G, E = v.shape[1], v.shape[3]
    if v.shape[0] != B or v.shape[2] != T or G == 0 or H % G:
        raise ValueError(f"{who}: v {list(v.shape)} does not fit scores {list(scores.shape)}: [B, G, T, E], H % G = 0")
    if chunk < 2:
        raise ValueError(f"{who}: chunk must be at least 2, got {chunk}")
    if v.device != scores.device or (state is not None and state.total.device != v.device):
        raise ValueError(f"{who}: scores, v and state must share a device, got scores on {scores.device}")
    if state is not None and (state.total.shape != (B, H, E) or state.peak.shape != (B, H) != state.mass.shape):
        raise ValueError(f"{who}: state must hold [B, H] and [B, H, E] = {[B, H, E]}, got {list(state.total.shape)}")

    dtype, out_dtype = torch.promote_types(torch.promote_types(scores.dtype, v.dtype), torch.float32), v.dtype
    scores = scores.to(dtype)
    if state is not None:
        state = Prefix(*(x.to(dtype) for x in state))
    if v.is_cuda and T:
        from farfield.kernels.prefix import refusal

        if not refusal(scores, v):
            none = scores.new_empty(0)
            before = (none, none, none) if state is None else state
            out, _, _, *sums = _launch(scores, v, *before, recorded(scores, v, *before))
            return out, Prefix(*sums)
    v = v.to(dtype)
    if state is None:
        nothing = scores.new_zeros(B, H)
        state = Prefix(nothing - float("inf"), nothing, v.new_zeros(B, H, E))
    if T == 0:
        return v.repeat_interleave(H // G, 1).to(out_dtype), state
    # a token of score s is the sums (s, 1, v): mass and total side by side
    leaves = torch.cat([torch.ones_like(v[..., :1]), v], -1).repeat_interleave(H // G, 1)
    before = torch.cat([state.mass[..., None], state.total], -1)
    with torch.autocast(v.device.type, enabled=False):
        sums, peak = _merged(scores, leaves, state.peak, before, chunk)
    mass, total = sums[..., :1], sums[..., 1:]
    out = total / mass.masked_fill(mass == 0, 1.0)
    return out.to(out_dtype), Prefix(peak[:, :, -1], mass[:, :, -1, 0], total[:, :, -1])


def prefix_scores(query: Float[Tensor, "B H D"], k: Float[Tensor, "B G T D"]) -> Float[Tensor, "B H T"]:
    """query . k[t], what `prefix_softmax` takes, in the query's dtype, float32 or wider. Query head h reads key head
    h // (H / G). On the GPU k is read as it is, once for all its query heads.

    Raises:
        TypeError: the query is narrower than float32.
    """
    if query.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"prefix_scores: query must be float32 or float64, got {query.dtype}")
    if k.is_cuda and k.numel() and query.numel():
        from farfield.kernels.prefix import refusal

        if not refusal(query, k):
            return _score(query, k)
    with torch.autocast(k.device.type, enabled=False):
        return (query.unflatten(1, (k.shape[1], -1)) @ k.to(query.dtype).mT).flatten(1, 2)


def _merged(peak: Tensor, sums: Tensor, peak0: Tensor, sums0: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Sums over every prefix, and their peaks: peak [B, H, N] and sums [B, H, N, X] of the entries, the first's after
    peak0 [B, H], sums0 [B, H, X]."""
    N = peak.shape[2]
    C = min(chunk, N)
    scores = pad(peak, (0, -N % C), value=float("-inf")).unflatten(2, (-1, C))
    sums = pad(sums, (0, 0, 0, -N % C)).unflatten(2, (-1, C))
    highest = scores.detach().cummax(-1).values  # [B, H, N / C, C]
    future = torch.ones(C, C, dtype=torch.bool, device=peak.device).triu(1)
    weights = (scores[..., None, :] - _finite(highest)[..., None]).masked_fill(future, float("-inf")).exp()
    own = weights @ sums  # [B, H, N / C, C, X]
    peaks, before = peak0.detach()[:, :, None], sums0[:, :, None]
    if own.shape[2] > 1:
        ends, end_peaks = _merged(highest[:, :, :-1, -1], own[:, :, :-1, -1], peak0, sums0, chunk)
        peaks, before = torch.cat([peaks, end_peaks], 2), torch.cat([before, ends], 2)
    joint = torch.maximum(highest, peaks[..., None])
    base = _finite(joint)
    own = own * (highest - base).exp()[..., None]
    out = own + (peaks[..., None] - base).exp()[..., None] * before[:, :, :, None]
    return out.flatten(2, 3)[:, :, :N], joint.flatten(2, 3)[:, :, :N]


def _finite(peak: Tensor) -> Tensor:
    """-inf - -inf is nan: what has no tokens is measured from 0."""
    return peak.masked_fill(peak == float("-inf"), 0.0)


# The kernels. An absent tensor is an empty one.


@custom_op("farfield::prefix_scores", mutates_args=(), device_types="cuda")
def _score(query: Tensor, k: Tensor) -> Tensor:
    from farfield.kernels.prefix import scores

    return scores(query, k)


@_score.register_fake
def _(query, k):
    return query.new_empty(*query.shape[:2], k.shape[2])


@custom_op("farfield::prefix_scores_backward", mutates_args=(), device_types="cuda")
def _score_backward(d_scores: Tensor, query: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    from farfield.kernels.prefix import scores_backward

    return scores_backward(d_scores, query, k)


@_score_backward.register_fake
def _(d_scores, query, k):
    return query.new_empty(query.shape), k.new_empty(k.shape)


def _save_scored(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_scored(ctx, d_scores):
    return _score_backward(d_scores, *ctx.saved_tensors)


@custom_op("farfield::prefix_softmax", mutates_args=(), device_types="cuda")
def _launch(
    scores: Tensor, v: Tensor, peak: Tensor, mass: Tensor, total: Tensor, recorded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, what rounding took from it if gradients are recorded, lse, and the sums at the end."""
    from farfield.kernels.prefix import forward

    out, rest, lse, peak, mass, total = forward(scores, v, (peak, mass, total) if total.numel() else None, recorded)
    return out, v.new_empty(0) if rest is None else rest, lse, peak, mass, total


@_launch.register_fake
def _(scores, v, peak, mass, total, recorded):
    sums = (scores.new_empty(scores.shape[:2]) for _ in range(2))
    out = v.new_empty(*scores.shape, v.shape[3])
    rest = torch.empty_like(out) if recorded and v.dtype != scores.dtype else v.new_empty(0)
    return out, rest, scores.new_empty(scores.shape), *sums, scores.new_empty(*scores.shape[:2], v.shape[3])


@custom_op("farfield::prefix_softmax_backward", mutates_args=(), device_types="cuda")
def _launch_backward(
    d_out: Tensor,
    d_mass: Tensor,
    d_total: Tensor,
    scores: Tensor,
    v: Tensor,
    out: Tensor,
    rest: Tensor,
    lse: Tensor,
    mass: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from farfield.kernels.prefix import backward

    end_mass, end_total = (x if x.numel() else None for x in (d_mass, d_total))
    kept = rest if rest.numel() else None
    d_scores, d_v, d_first, d_first_total = backward(d_out, end_mass, end_total, scores, v, out, kept, lse, mass)
    if d_v.shape[1] != v.shape[1]:
        d_v = d_v.unflatten(1, (v.shape[1], -1)).sum(2, dtype=torch.float32).to(v.dtype)
    return d_scores, d_v, d_first, d_first_total


@_launch_backward.register_fake
def _(d_out, d_mass, d_total, scores, v, out, rest, lse, mass):
    total = scores.new_empty(*scores.shape[:2], v.shape[3])
    return scores.new_empty(scores.shape), v.new_empty(v.shape), torch.empty_like(mass), total


def _save_prefix(ctx, inputs, output):
    scores, v, peak, _, _, _ = inputs
    out, rest, lse, end, mass, _ = output
    ctx.mark_non_differentiable(rest, lse, end)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, v, peak, out, rest, lse, mass)


def _differentiate_prefix(ctx, d_out, d_rest, d_lse, d_peak, d_mass, d_total):
    scores, v, peak, out, rest, lse, mass = ctx.saved_tensors
    none = scores.new_empty(0)
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_mass, d_total = (none if x is None else x for x in (d_mass, d_total))
    d_scores, d_v, d_mass, d_total = _launch_backward(d_out, d_mass, d_total, scores, v, out, rest, lse, mass)
    if not peak.numel():
        return d_scores, d_v, None, None, None, None
    # a prefix of nothing has nothing before it
    share = (peak - lse[:, :, 0]).exp().masked_fill(peak == float("-inf"), 0.0)
    return d_scores, d_v, None, share * d_mass, share[..., None] * d_total, None


def _refuse_prefix(ctx, *grads):
    raise NotImplementedError("prefix_softmax: first derivatives only on the GPU")


_score.register_autograd(_differentiate_scored, setup_context=_save_scored)
_score_backward.register_autograd(_refuse_prefix)
_launch.register_autograd(_differentiate_prefix, setup_context=_save_prefix)
_launch_backward.register_autograd(_refuse_prefix)
