"""Linear recurrences and prefix scans: attention over the past with a fixed-size state."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from farfield.mechanism import check_qkv, no_tokens
from farfield.ops import precision
from farfield.ops.eager import check_derivatives, eager, recorded
from farfield.ops.known import Known, Memory

CHUNK = 64  # tokens
# chunks that one step of the recurrence over chunks joins
_FAN = 32


def scan(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T E"],
    decay: Float[Tensor, " H"] | Float[Tensor, "#B H T"] | Decays | None = None,
    state: Float[Tensor, "B H D E"] | None = None,
    *,
    chunk: int = CHUNK,
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
        decay: log of the factor on the state, at most 0, per head or per token; `Decays`, what makes them per head.
            Default 0: nothing fades.
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
    keep = eager(q, k, v) and recorded(q, k, v, *(() if state is None else (state,)))
    key = _key(q, k, v, decay, state, chunk, keep)
    known = None if key is None else _memory.find(key)
    if known is None:
        _check(q, k, v, decay, state, chunk)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if state is not None:
        state = state.to(dtype)
    if known is None:
        (B, H, T, D), E = q.shape, v.shape[3]
        if T == 0:
            return no_tokens(q, v), q.new_zeros(B, H, D, E, dtype=dtype) if state is None else state
        if isinstance(decay, Tensor) and (decay.dim() == 3 or decay.requires_grad):
            if decay.dim() == 1:
                decay = decay[None, :, None].expand(1, H, T)
            return _chunked(q, k, v, decay, state, chunk)
    if decay is None:
        decay = _STILL
    elif isinstance(decay, Tensor):
        decay = decay.to(dtype)
    if key is None:
        # somebody would see the operation
        return _forward(q, k, v, _tensor(decay, q), q.new_empty(0, dtype=dtype) if state is None else state, chunk)
    # what was checked now need not be checked again
    return _faded(q, k, v, decay, state, chunk, keep, _memory.of(key) if known is None else known)


def again(q: Tensor, k: Tensor, v: Tensor, decay: Decays) -> Tensor | None:
    """out of scan(q, k, v, decay), if it has taken a call of this signature before; otherwise None."""
    keep = eager(q, k, v) and recorded(q, k, v)
    key = _key(q, k, v, decay, None, CHUNK, keep)
    known = None if key is None else _memory.find(key)
    return None if known is None else _faded(q, k, v, decay, None, CHUNK, keep, known)[0]


def _faded(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | Decays, state: Tensor | None, chunk: int, keep: bool, known: Known
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if keep:
        return _Faded.apply(q, k, v, decay, state, chunk, known)
    out, end = _run(q, k, v, decay, state, chunk, False, known)
    return out, end


class Decays(NamedTuple):
    """log of the factors on the state, of each head, that follow from numbers: made on the device when they are needed,
    and kept by the kernels for further calls.

    Args:
        make: (heads, dtype, device, *options) -> [heads]; the same function each time.
    """

    make: Callable[..., Tensor]
    options: tuple[Hashable, ...] = ()

    def of(self, q: Tensor) -> Tensor:
        return self.make(q.shape[1], torch.promote_types(q.dtype, torch.float32), q.device, *self.options)


def _still(heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(heads, dtype=dtype, device=device)


_STILL = Decays(_still)


def _tensor(decay: Tensor | Decays, q: Tensor) -> Tensor:
    return decay if isinstance(decay, Tensor) else decay.of(q)


# signatures that have passed the checks, with decays per head that need no gradient
_memory = Memory(128)


def _key(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | Decays | None, state: Tensor | None, chunk: int, keep: bool
) -> tuple[Any, ...] | None:  # fmt: skip
    """All that the checks look at and that launches follow from, None for what a compiler or a mode sees."""
    given = q, k, v, decay, state
    if not eager(*(x for x in given if isinstance(x, Tensor))):
        return None
    key: list[Any] = [chunk, keep, isinstance(decay, Tensor) and decay.requires_grad]
    for x in given:
        if x is None or isinstance(x, Decays):
            key.append(x)
        elif isinstance(x, Tensor):
            key += x.shape, x.stride(), x.dtype, x.device
        else:
            return None
    return tuple(key)


def _check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | Decays | None, state: Tensor | None, chunk: int
) -> None:  # fmt: skip
    check_qkv("scan", q, k, v)
    B, H, T, D = q.shape
    E = v.shape[3]
    if k.shape[2] != T:
        raise ValueError(f"scan: q has {T} tokens, k and v have {k.shape[2]}; the recurrence reads them in step")
    if chunk < 1:
        raise ValueError(f"scan: chunk must be at least 1, got {chunk}")
    if not isinstance(decay, Tensor | Decays | None):
        raise TypeError(f"scan: decay must be a tensor, Decays or None, got {decay!r}")
    for name, x in (("decay", decay), ("state", state)):
        if isinstance(x, Tensor) and x.device != q.device:
            raise ValueError(f"scan: {name} is on {x.device}, q on {q.device}")
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise TypeError(f"scan: {name} must be floating point, got {x.dtype}")
    if isinstance(decay, Tensor) and decay.shape not in ((H,), (B, H, T), (1, H, T)):
        raise ValueError(f"scan: decay must be [H] = [{H}] or [B, H, T] = [{B}, {H}, {T}], got {list(decay.shape)}")
    if state is not None and state.shape != (B, H, D, E):
        raise ValueError(f"scan: state must be [B, H, D, E] = {[B, H, D, E]}, got {list(state.shape)}")


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
    with precision.kept(q):
        fade = _spans(decay).exp()  # [B, H, N, C, C]
        within = (q @ k.mT * fade) @ v
        added = (k * fade[..., -1, :, None]).mT @ v  # [B, H, N, D, E]
        states = _recur(added.flatten(3), decay.sum(-1), state.flatten(2)).unflatten(3, (D, E))
        before = torch.cat([state[:, :, None], states[:, :, :-1]], 2)
        out = within + decay.cumsum(-1).exp()[..., None] * (q @ before)
    return out.flatten(2, 3)[:, :, :T].to(out_dtype), states[:, :, -1]


def _run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | Decays, state: Tensor | None, chunk: int, keep: bool,
    known: Known | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out [B, H, T, E] and end [B, H, D, E], by whatever takes the call; where `keep`, also the states that the kernels
    have started from, if they leave some."""
    if q.is_cuda:
        from farfield.kernels import plans
        from farfield.kernels.scan import refusal, whole

        if not refusal(q, v):
            # what is copied is not recorded
            state = None if state is None else state.contiguous()
            given, made = _split(decay)
            return plans.partly(whole, (q, k, v, given, state), made, keep, known=known)
    return _plain(q, k, v, _tensor(decay, q), state, False, chunk)


def _split(decay: Tensor | Decays) -> tuple[Tensor | None, Decays | None]:
    return (decay, None) if isinstance(decay, Tensor) else (None, decay)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, back: bool, chunk: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and end in PyTorch, decays [H] that get no gradient. q may have fewer heads than k and v, too.

    back: from the last token to the first, and state and end on the other side of their token's decay:

        out[t] = sum_{s >= t} e^(decay (s - t)) (q[t] . k[s]) v[s] + e^(decay (T - 1 - t)) q[t] state
        end = sum_s e^(decay (s + 1)) k[s] v[s]^T + e^(decay T) state
    """
    T = q.shape[2]
    every = decay[None, :, None]
    with torch.no_grad():
        if not back:
            out, end = _chunked(q, k, v, every.expand(1, -1, T), state, chunk)
            return out.contiguous(), end.contiguous()
        q, k, v = (x.flip(2) for x in (q, k, v))
        # the decay of a token comes after it: that of the first one here is not the state's
        shifted = torch.cat([torch.zeros_like(every), every.expand(1, -1, T - 1)], 2)
        out, end = _chunked(q, k, v, shifted, state, chunk)
        return out.flip(2), decay.exp()[:, None, None] * end


def _gradients(
    d_out: Tensor, d_end: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | Decays, state: Tensor | None,
    chunk: int, before: Tensor | None = None, known: Known | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Of q, k, v and state: three more recurrences; no d_end stands for zeros, `before` is what the forward kept,
    `known` of its signature.

    With S of the forward and R[t] = sum_{s >= t} lambda^(s - t) q[s] d_out[s]^T + lambda^(T - 1 - t) d_end:
    dq = d_out S^T, dk = v R^T, dv = k R, and d state = lambda R[0].
    """
    found = None
    if q.is_cuda:
        from farfield.kernels import plans
        from farfield.kernels.scan import refusal, whole_backward

        if not refusal(q, v):
            d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
            d_end, state = (None if x is None else x.contiguous() for x in (d_end, state))
            given, made = _split(decay)
            known = None if known is None else plans.after(known, d_out, d_end)
            found = plans.partly(whole_backward, (d_out, d_end, q, k, v, given, state, before), made, known=known)
    if found is None:
        decay = _tensor(decay, q)
        d_q, _ = _plain(d_out, v, k, decay, None if state is None else state.mT, False, chunk)
        d_k, _ = _plain(v, d_out, q, decay, None if d_end is None else d_end.mT, True, chunk)
        found = d_q, d_k, *_plain(k, q, d_out, decay, d_end, True, chunk)
    d_q, d_k, d_v, *rest = found
    heads = k.shape[1]
    if heads != q.shape[1]:
        wide = torch.promote_types(q.dtype, torch.float32)
        d_k, d_v = (x.unflatten(1, (heads, -1)).sum(2, dtype=wide).to(x.dtype) for x in (d_k, d_v))
    return d_q, d_k, d_v, rest[0] if state is not None else None


class _Faded(torch.autograd.Function):
    """The operation below without the dispatcher."""

    @staticmethod
    def forward(ctx, q, k, v, decay, state, chunk, known):
        # most use out alone, and zeros for end would have to be written and read
        ctx.set_materialize_grads(False)
        # dq goes by the states of the forward
        out, end, *kept = _run(q, k, v, decay, state, chunk, True, known)
        given, ctx.made = _split(decay)
        ctx.chunk, ctx.known = chunk, known
        ctx.save_for_backward(q, k, v, given, state, *kept)
        return out, end

    @staticmethod
    def backward(ctx, d_out, d_end):
        q, k, v, given, state, *before = ctx.saved_tensors
        decay = ctx.made if given is None else given
        return *_differentiated(ctx, d_out, d_end, q, k, v, decay, state, *(before or [None]), ctx.known), None, None


# an empty state or gradient stands for zeros


@custom_op("farfield::scan", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, end = _run(q, k, v, decay, _there(state), chunk, False)
    return out, end


@_forward.register_fake
def _(q, k, v, decay, state, chunk):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(*q.shape[:2], q.shape[3], v.shape[3], dtype=decay.dtype)


@custom_op("farfield::scan_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_end: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v, d_state = _gradients(d_out, _there(d_end), q, k, v, decay, _there(state), chunk)
    return d_q, d_k, d_v, torch.empty_like(state) if d_state is None else d_state


@_backward.register_fake
def _(d_out, d_end, q, k, v, decay, state, chunk):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, state))


def _there(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _save(ctx, inputs, output):
    *saved, ctx.chunk = inputs
    ctx.save_for_backward(*saved)


def _differentiate(ctx, d_out, d_end):
    return *_differentiated(ctx, d_out, d_end, *ctx.saved_tensors), None


def _differentiated(ctx, d_out, d_end, q, k, v, decay, state, *more):
    """Of q, k, v, decay and state."""
    d_out = q.new_zeros(*q.shape[:3], v.shape[3]) if d_out is None else d_out
    # the registered operation refuses a gradient of its gradients
    if torch.is_grad_enabled() or not eager(d_out, q, k, v):
        decay = _tensor(decay, q)
        none = decay.new_empty(0)
        d_end, before = (none if x is None else x for x in (d_end, state))
        d_q, d_k, d_v, d_state = _backward(d_out, d_end, q, k, v, decay, before, ctx.chunk)
        return d_q, d_k, d_v, None, None if state is None else d_state
    state = None if state is None else _there(state)
    d_q, d_k, d_v, d_state = _gradients(d_out, d_end, q, k, v, decay, state, ctx.chunk, *more)
    return d_q, d_k, d_v, None, d_state


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
    if state is not None and not (state.total.shape == (B, H, E) and state.peak.shape == state.mass.shape == (B, H)):
        raise ValueError(f"{who}: state must hold [B, H] and [B, H, E] = {[B, H, E]}, got {list(state.total.shape)}")

    dtype, out_dtype = torch.promote_types(torch.promote_types(scores.dtype, v.dtype), torch.float32), v.dtype
    scores = scores.to(dtype)
    if state is not None:
        state = Prefix(*(x.to(dtype) for x in state))
    if v.is_cuda and T:
        from farfield.kernels.prefix import refusal

        if not refusal(scores, v):
            if not torch.compiler.is_compiling():
                check_derivatives(scores, v, *(state or ()))
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
    with precision.kept(v):
        sums, peak = _merged(scores, leaves, state.peak, before, chunk)
    mass, total = sums[..., :1], sums[..., 1:]
    out = total / mass.masked_fill(mass == 0, 1.0)
    return out.to(out_dtype), Prefix(peak[:, :, -1], mass[:, :, -1, 0], total[:, :, -1])


def prefix_scores(query: Float[Tensor, "B H D"], k: Float[Tensor, "B G T D"]) -> Float[Tensor, "B H T"]:
    """query . k[t], what `prefix_softmax` takes, in the query's dtype, float32 or wider. Query head h reads key head
    h // (H / G). On the GPU k is read as it is, once for all its query heads.

    Raises:
        TypeError: the query is narrower than float32.
        ValueError: shapes do not fit together.
    """
    if query.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"prefix_scores: query must be float32 or float64, got {query.dtype}")
    if len(query) != len(k) or query.shape[2] != k.shape[3] or query.shape[1] % max(k.shape[1], 1):
        raise ValueError(
            f"prefix_scores: query {list(query.shape)} does not fit k {list(k.shape)}: [B, H, D], H % G = 0"
        )
    if k.is_cuda and k.numel() and query.numel():
        from farfield.kernels.prefix import refusal

        if not refusal(query, k):
            if not torch.compiler.is_compiling():
                check_derivatives(query, k)
            return _score(query, k)
    with precision.kept(k):
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
    from farfield.kernels import plans, prefix

    return plans.plainly(prefix.scores, (query, k))


@_score.register_fake
def _(query, k):
    return query.new_empty(*query.shape[:2], k.shape[2])


@custom_op("farfield::prefix_scores_backward", mutates_args=(), device_types="cuda")
def _score_backward(d_scores: Tensor, query: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    from farfield.kernels import plans, prefix

    d_query, d_k = plans.plainly(prefix.scores_backward, (d_scores.contiguous(), query, k))
    return d_query[:, :, 0], d_k


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
