"""The attention layer: projections, a short convolution, q and k norms, rotary positions, and any mechanism."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from farfield import mechanisms
from farfield.mechanism import Mechanism, Rotary, State
from farfield.nn.conv import ShortConv
from farfield.nn.rope import Rope
from farfield.ops import precision
from farfield.ops.token_step import placed
from farfield.ring import turns_of
from farfield.token_ring import Ring

SPARE = 32  # inputs kept beyond what the convolution reads, at least, so that crop can take back as many tokens


@dataclass(frozen=True)
class LayerState(State):
    """What an attention layer remembers: its mechanism's state and the last inputs of its convolution."""

    inner: State
    recent: Tensor | None  # [B, R, W]
    reach: int  # inputs that the convolution reads behind the present one

    def crop(self, drop: int) -> LayerState:
        keep, recent = self.left(drop), self.recent
        if recent is not None:
            left = recent.shape[1] - drop
            if left < min(keep, self.reach):
                spare = recent.shape[1] - self.reach
                raise ValueError(
                    f"Attention: cannot drop {drop} of {self.tokens} tokens, at most {spare}: the convolution's "
                    "inputs are kept for no more; keep the state from before the draft (states are never changed in "
                    "place)"
                )
            recent = recent[:, :left]
        return LayerState(keep, self.inner.crop(drop), recent, self.reach)


@dataclass(frozen=True)
class LayerRing:
    """The same in buffers of fixed size: its mechanism's, and the last inputs of its convolution.

    Beside them are the weights of its products, as they were when the ring was made.
    """

    inner: Ring
    recent: Tensor | None  # [B, reach, W]
    qkv: Tensor  # [(H + 2 G) D, W]
    out: Tensor
    turns: Tensor  # turns a token of each pair of channels that the layer rotates itself

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer under its name."""
        found = {f"inner.{name}": x for name, x in self.inner.tensors().items()}
        return found if self.recent is None else {**found, "recent": self.recent}


class Attention(nn.Module):
    """Multi-head attention on x [B, T, W] through any mechanism.

    Args:
        width: W, of the residual stream.
        heads: H query heads.
        kv_heads: G key/value heads, a divisor of H; default H.
        head_width: D; default W / H.
        mechanism: a registry name, or a Mechanism.
        options: the named mechanism's options.
        causal: tokens see themselves and what came before only.
        conv: width of the depthwise convolution before the projections; 0 for none. Centred where not causal.
        rope_share: share of D that carries rotary positions; 0 for none.
        rope_base: see Rope.
        qk_norm: q and k are brought to unit RMS per head, and q is multiplied by a learned gain per head, start 1.6.
        log_scale: n; the query at position t >= n is multiplied by log(t + 1) / log(n), so that a softmax over more
            tokens than it was trained with stays as sharp (Chiang, Cholak 2022, arXiv:2202.12172); 0 for never.
        rotate: who places the rotations. "mechanism": the mechanism does where it can (FMA rotates each summary to
            its centre), else the layer. "layer": always the layer, before any pooling.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_width: int | None = None,
        mechanism: str | Mechanism = "fma",
        options: Mapping[str, Any] | None = None,
        causal: bool = True,
        conv: int = 4,
        rope_share: float = 0.5,
        rope_base: float = 10_000.0,
        qk_norm: bool = True,
        log_scale: int = 0,
        rotate: str = "mechanism",
    ):
        super().__init__()
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"Attention: kv_heads must divide heads, got heads={heads} and kv_heads={kv_heads}")
        if head_width is None and width % heads:
            raise ValueError(f"Attention: width {width} is not a multiple of {heads} heads; give head_width")
        if rotate not in ("mechanism", "layer"):
            raise ValueError(f'Attention: rotate must be "mechanism" or "layer", got {rotate!r}')
        if log_scale and (log_scale < 2 or not causal):
            raise ValueError(
                "Attention: log_scale is the number of tokens that was trained with, at least 2, where a query sees "
                f"what came before only; got log_scale={log_scale} and causal={causal}"
            )
        self.width, self.heads, self.kv_heads, self.log_scale = width, heads, kv_heads, log_scale
        self.head_width = head_width or width // heads
        self.mechanism = _mechanism(mechanism, options or {}, causal, heads, kv_heads, self.head_width)
        self.conv = ShortConv(width, conv, causal=causal) if conv else None
        self.rope = Rope(self.head_width, share=rope_share, base=rope_base) if rope_share else None
        # separate matrices: an optimizer that orthogonalises updates should see q, k and v apart
        self.q = nn.Linear(width, heads * self.head_width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(heads * self.head_width, width, bias=False)
        self.gain = nn.Parameter(torch.full((heads,), 1.6)) if qk_norm else None
        self.spare = max(SPARE, getattr(self.mechanism, "rewind", 0))
        self.inside = rotate == "mechanism" and self.mechanism.supports.rotary
        # whether a forward with gradients leaves behind what the mechanism itself minimizes
        self.teaching = False
        self.taught: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, which the graph behind `taught` cannot go into."""
        return {**super().__getstate__(), "taught": None}

    def forward(self, x: Float[Tensor, "B T W"], group: Int[Tensor, "#B T"] | None = None) -> Float[Tensor, "B T W"]:
        """Attention of every token. `group` as in Mechanism.forward: the convolution keeps documents apart too."""
        self._check(x)
        if group is not None and 0 < self.log_scale < x.shape[1]:
            raise NotImplementedError(
                f"Attention: log_scale={self.log_scale} counts from the sequence's beginning, not from a document's; "
                "give packed documents in sequences of at most as many tokens, or one by one"
            )
        mixed = x if self.conv is None else self.conv(x, group)
        q, k, v, rotary = self._placed(*self._heads(mixed), *self._positions(0, x))
        return self._join(self.attended(q, k, v, group, rotary))

    def attended(self, q: Tensor, k: Tensor, v: Tensor, group: Tensor | None, rotary: Rotary | None) -> Tensor:
        """The mechanism's own part of `forward`."""
        with precision.kept(q):
            if self.teaching and torch.is_grad_enabled():
                if group is not None:
                    raise NotImplementedError("Attention: what a mechanism minimizes itself is not of packed documents")
                self.taught = self.mechanism.auxiliary(q, k, v, rotary=rotary)
            return self.mechanism(q, k, v, group=group, rotary=rotary)

    def extend(self, x: Float[Tensor, "B T W"], state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Attention of T further tokens after those in `state`: the outputs of one forward over everything."""
        self._check(x)
        if state is not None and state.recent is not None and len(state.recent) != len(x):
            raise ValueError(f"Attention: the state holds {len(state.recent)} sequences, got {len(x)}")
        tokens = state.tokens if state else 0
        mixed, recent, reach = x, None, 0
        if self.conv is not None:
            recent = x[:, :0] if state is None or state.recent is None else state.recent
            mixed, reach = self.conv.extend(x, recent), self.conv.before
            # cloned, or the state would hold on to the whole chunk
            recent = torch.cat([recent, x], 1)[:, -(reach + self.spare) :].clone()
        q, k, v, rotary = self._placed(*self._heads(mixed), *self._positions(tokens, x))
        with precision.kept(x):
            out, inner = self.mechanism.extend(q, k, v, state.inner if state else None, rotary=rotary)
        return self._join(out), LayerState(tokens + x.shape[1], inner, recent, reach)

    @torch.no_grad()
    def ring(self, state: LayerState, *, capacity: int, dtype: torch.dtype | None = None) -> LayerRing:
        """The fixed buffers that go on where `state` stands; as Mechanism.ring. `dtype`: of the layer's products."""
        inner = self.mechanism.ring(state.inner, capacity=capacity, rotary=self.rope if self.inside else None)
        recent = state.recent
        if recent is not None:
            recent = recent[:, max(0, recent.shape[1] - state.reach) :]
            recent = torch.nn.functional.pad(recent, (0, 0, state.reach - recent.shape[1], 0)).clone()
        turns = turns_of(None if self.inside else self.rope, self.head_width, inner.tokens.device)
        qkv = torch.cat([self.q.weight, self.k.weight, self.v.weight]).to(dtype)
        return LayerRing(inner, recent, qkv, self.out.weight.detach().to(dtype), turns)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "B 1 W"], ring: LayerRing, position: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 W"]:
        """`extend` by one token a sequence, which stands at `position`, in place; x comes out of the convolution."""
        heads = rearrange(F.linear(x, ring.qkv), "b t (h d) -> b h t d", d=self.head_width)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        found = placed(q, k, position, gain=self.gain, grown=self.log_scale, turns=ring.turns)
        if found is None:
            q, k, v, _ = self._placed(q, k, v, position, self.log_scale > 0)
        else:
            q, k = found
        with precision.kept(x):
            out = self.mechanism.step(q, k, v, ring.inner)
        return F.linear(rearrange(out, "b h t d -> b t (h d)"), ring.out)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.width:
            raise ValueError(f"Attention: x must be [batch, tokens, width={self.width}], got {list(x.shape)}")

    def _positions(self, start: int, x: Tensor) -> tuple[Tensor | None, bool]:
        """Of the tokens x from position `start` on, where they are needed, and whether queries have grown by them."""
        grown = 0 < self.log_scale < start + x.shape[1]
        needed = grown or (self.rope is not None and not self.inside)
        return torch.arange(start, start + x.shape[1], device=x.device) if needed else None, grown

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (rearrange(p(x), "b t (h d) -> b h t d", d=self.head_width) for p in (self.q, self.k, self.v))
        return q, k, v

    def _placed(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, grown: bool
    ) -> tuple[Tensor, Tensor, Tensor, Rotary | None]:
        """q and k as the mechanism gets them, and the rotation that it places. `position`: [T] or [B, T]."""
        if self.gain is not None:
            q, k = _unit(q, self.gain[:, None, None]), _unit(k)
        if grown and position is not None:
            wide = torch.promote_types(q.dtype, torch.float32)
            factor = (position + 1).clamp(min=self.log_scale).to(wide).log() / math.log(self.log_scale)
            q = (q * factor[..., None, :, None]).to(q.dtype)
        if self.rope is None or self.inside or position is None:
            return q, k, v, self.rope
        return self.rope(q, position), self.rope(k, position), v, None

    def _join(self, out: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T W"]:
        return self.out(rearrange(out, "b h t d -> b t (h d)"))


def _unit(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """`x` at unit RMS times `gain`: float32 or wider inside, x's dtype out."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain).to(x.dtype)


def _mechanism(
    mechanism: str | Mechanism, options: Mapping[str, Any], causal: bool, heads: int, kv_heads: int, width: int
) -> Mechanism:
    if isinstance(mechanism, Mechanism):
        if options:
            raise ValueError(
                f"Attention: options {sorted(options)} need a mechanism's name, got a built {mechanism.name}"
            )
        if mechanism.causal != causal:
            raise ValueError(
                f"Attention: causal={causal}, but the {mechanism.name} given has causal={mechanism.causal}"
            )
        return mechanism
    if options.get("causal", causal) != causal:
        raise ValueError(f"Attention: causal={causal}, but the options say causal={options['causal']}")
    options = {**options, "causal": causal}
    return mechanisms.make_for(mechanism, options, heads=heads, kv_heads=kv_heads, width=width)
