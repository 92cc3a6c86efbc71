"""Linear recurrences and prefix scans: attention over the past with a fixed-size state."""

from __future__ import annotations

from typing import NamedTuple

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
    scores, v = scores.to(dtype), v.to(dtype)
    if state is None:
        nothing = scores.new_zeros(B, H)
        state = Prefix(nothing - float("inf"), nothing, v.new_zeros(B, H, E))
    state = Prefix(*(x.to(dtype) for x in state))
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
