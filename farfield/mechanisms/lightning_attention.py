"""Lightning attention: causal linear attention whose past fades by a fixed factor of each head.

    out[t] = scale * sum over s <= t of lambda^(t - s) (q[t] . k[s]) v[s]
    S[t] = lambda S[t-1] + k[t] v[t]^T,    out[t] = scale * q[t] S[t]

No softmax and no denominator. In chunks of C tokens the left product (Q K^T, masked by the decays) inside, the right
product (Q S) across: T (C (D + E) + 2 D E) multiplications, and a state of D * E numbers a head at any length.
Departs from the paper: nothing in the operator; the decays are by default those of the authors' code, see `decay`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from farfield.mechanism import Case, Mechanism, Paper, Rotary, State, Supports, no_tokens
from farfield.ops.scan import Decays, again, scan
from farfield.packing import blank, documents
from farfield.token_ring import StateRing

CONVENTIONS = ("released", "paper", "fla")


@dataclass(frozen=True)
class LightningState(State):
    """S [B, H, D, E] after the last token, float32 or wider."""

    memory: Tensor


class LightningAttention(Mechanism):
    """Lightning attention.

    Three sets of decays go by this name, and a model trained with one cannot run with another. With heads
    h = 1 .. H and layers l = 0 .. L - 1, lambda = exp(-rate):

        released   rate = slope(h) (1 - l / (L - 1) + 1e-5), slope the ALiBi slopes: 2^(-8 h / H) for H a power of two
        paper      rate = (8 h / H) (1 - l / L), equation 10
        fla        rate = (8 (h - 1) / H) (1 - l / L), and scale 1 / sqrt(D): flash-linear-attention

    At H = 8 and l = 0, lambda lies between 0.61 and 0.996 (released), 0.37 and 0.0003 (paper), 1 and 0.0009 (fla).
    Slopes of other H are those of the power of two below, P, then every other one of 2 P.

    Args:
        decay: "released", "paper" or "fla"; or lambda of each head, numbers above 0 and at most 1.
        layer, layers: l and L: the layer that this attention is in, and how many the model has.
        scale: factor on q . k. Default 1, for "fla" 1 / sqrt(D).
    """

    paper = Paper(
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        authors="Qin, Sun, Li, Shen, Sun, Zhong",
        year=2024,
        arxiv="2405.17381",
        code="github.com/OpenNLPLab/lightning-attention",
    )
    decodes = (StateRing,)
    remembers = LightningState
    cases = (
        Case(block=32),
        Case(options={"decay": "paper", "layer": 1, "layers": 3}, tokens=70, value_width=24),
    )
    supports = Supports(noncausal=False, packed=True, heads_apart=False)

    _given: Tensor | None

    def __init__(
        self,
        *,
        decay: str | tuple[float, ...] = "released",
        layer: int = 0,
        layers: int = 1,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        if isinstance(decay, str) and decay not in CONVENTIONS:
            raise ValueError(f"lightning-attention: decay must be one of {', '.join(CONVENTIONS)} or numbers, {decay=}")
        if not isinstance(decay, str) and not (decay and all(0 < x <= 1 for x in decay)):
            raise ValueError(f"lightning-attention: decays are numbers above 0 and at most 1, got {decay}")
        if not 0 <= layer < layers:
            raise ValueError(f"lightning-attention: layer counts from 0 to layers - 1, got {layer=} of {layers=}")
        self.decay, self.layer, self.layers = decay, layer, layers
        # q goes into the scan as it is
        self._plain = scale == 1 or (scale is None and decay != "fla")
        # bits of float64 in integers, which a module's change of dtype leaves alone
        given = None if isinstance(decay, str) else torch.tensor(decay, dtype=torch.float64).log().view(torch.int64)
        self._made = Decays(_log_decays, (decay, layer, layers)) if isinstance(decay, str) else None
        self.register_buffer("_given", given, persistent=False)

    def rates(self, heads: int) -> list[float]:
        """-log lambda of each head.

        Raises:
            ValueError: the decays were given, for another number of heads.
        """
        return [-x for x in self._log_decay(torch.zeros(1, heads, 1, 1, dtype=torch.float64)).tolist()]

    def forward(self, q, k, v, *, group=None, rotary=None):
        if group is rotary is None and self._made is not None and self._plain:
            out = again(q, k, v, self._made)
            if out is not None:
                return out
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        decay = self._decays(q)
        if group is not None:
            decay = decay.of(q) if isinstance(decay, Decays) else decay
            document = documents(group)
            q, k, v = (blank(x, document) for x in (q, k, v))
            # each document forgets what was before it; padding is zeros, which change nothing
            first = torch.ones_like(document, dtype=torch.bool)
            first[:, 1:] = document[:, 1:] != document[:, :-1]
            decay = decay[None, :, None].expand(group.shape[0], -1, q.shape[2])
            decay = decay.masked_fill(first[:, None], float("-inf"))
            if group.shape[0] != q.shape[0]:
                decay = decay.expand(q.shape[0], -1, -1)
        return scan(self._scaled(q), k, v, decay)[0]

    def extend(self, q, k, v, state: LightningState | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        before = None if state is None else state.memory
        out, memory = scan(self._scaled(q), k, v, self._decays(q), before)
        if not q.shape[2]:
            out = no_tokens(q, v)
        return out, LightningState(q.shape[2] + (0 if state is None else state.tokens), memory)

    def ring(self, state: LightningState, *, capacity: int | None = None, rotary: Rotary | None = None) -> StateRing:
        """As Mechanism.ring; of the same size for any capacity, so that it needs none."""
        self.check_ring(state, rotary)
        return StateRing.of(state)

    def step(self, q, k, v, ring: StateRing):
        self.check_step(ring)
        return ring.step(lambda state: self.extend(q, k, v, state))

    def reference(self, q, k, v):
        heads = q.shape[1]
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        h = torch.arange(1, heads + 1, dtype=torch.float64)
        scale = self.scale
        if self.decay == "released":
            slope = torch.tensor(_alibi(heads), dtype=torch.float64)
            rate = slope * (1 - self.layer / max(self.layers - 1, 1) + 1e-5)
        elif self.decay == "paper":
            rate = 8 * h / heads * (1 - self.layer / self.layers)
        elif self.decay == "fla":
            rate = 8 * (h - 1) / heads * (1 - self.layer / self.layers)
            scale = q.shape[-1] ** -0.5 if scale is None else scale
        else:
            rate = -torch.tensor(self.decay, dtype=torch.float64).log()
        t, s = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
        mask = (-rate[:, None, None] * (t - s)).exp().masked_fill(s > t, 0.0)
        return (1.0 if scale is None else scale) * (q @ k.mT * mask) @ v

    def _scaled(self, q: Tensor) -> Tensor:
        if self._plain:
            return q
        return q * (q.shape[3] ** -0.5 if self.scale is None else self.scale)

    def _decays(self, q: Tensor) -> Tensor | Decays:
        """log lambda [H], float32 or wider, or what makes them."""
        if self._made is not None:
            return self._made
        assert self._given is not None
        if len(self._given) != q.shape[1]:
            raise ValueError(f"lightning-attention: {len(self._given)} decays were given, but q has {q.shape[1]} heads")
        return self._given.view(torch.float64).to(torch.promote_types(q.dtype, torch.float32))

    def _log_decay(self, q: Tensor) -> Tensor:
        decay = self._decays(q)
        return decay.of(q) if isinstance(decay, Decays) else decay


def _log_decays(
    heads: int, dtype: torch.dtype, device: torch.device, convention: str, layer: int, layers: int
) -> Tensor:  # fmt: skip
    h = torch.arange(1, heads + 1, dtype=dtype, device=device)
    if convention == "released":
        power = 1 << (heads.bit_length() - 1)
        exponent = h * (-8 / power)
        if power != heads:
            # the heads beyond a power of two stand between those of the next one
            exponent = torch.where(h <= power, exponent, (2 * (h - power) - 1) * (-4 / power))
        return exponent.exp2() * -(1 - layer / max(layers - 1, 1) + 1e-5)
    return (h if convention == "paper" else h - 1) * (-8 / heads * (1 - layer / layers))


def _alibi(heads: int) -> list[float]:
    """Slopes of ALiBi's released code, for the reference."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
    power = 2 ** (heads.bit_length() - 1)
    return _alibi(power) + _alibi(2 * power)[0::2][: heads - power]
