"""Linear recurrences: attention without a softmax, with a fixed-size state."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from farfield.mechanism import check_qkv

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

    Work O(T chunk), memory O(T (chunk + D E / chunk)).

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

    dtype, out_dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    state = q.new_zeros(B, H, D, E) if state is None else state.to(dtype)
    if T == 0:
        return v.to(out_dtype), state
    if decay is None:
        decay = q.new_zeros(1, 1, T)
    elif decay.dim() == 1:
        decay = decay[None, :, None].expand(1, H, T)

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
