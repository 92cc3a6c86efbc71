"""Native sparse attention: compressed blocks of the past, the blocks that they point to, and a window, each gated.

    ck[c], cv[c] = compressions of the keys and values c stride .. c stride + span - 1, wholly in the past
    p[h, c]      = softmax_c(scale * q[h] . ck[c]),      compressed[h] = sum_c p[h, c] cv[c]
    score[m]     = sum over c, and over the heads h of one key head, of p[h, c] overlap(c, m) / stride
    selected     = softmax attention over the first and the two latest blocks, and the best of the rest by score
    out          = gate[0] compressed + gate[1] selected + gate[2] (softmax attention over the last `window` tokens)

T * (picks * block + window) + T^2 / (2 stride) scores, the latter once more to choose by; never all in memory. The
query heads of a key head choose together. No gradient through the choice: ck learns through `compressed`. The state
keeps all tokens and compressions.

Departs from the paper: it makes the gates from the hidden state, and keys and values of each branch by projections of
their own. A mechanism is given q, k and v: by default the gates are sigmoids of linear maps of q, and the branches
share k and v; `gates`, `compression` and `window` hand in others. The paper leaves the MLP of the compression open;
here it is added to the mean of the block and starts at 0. Without parameters (`learned`) the compression is the mean
and every gate 1/2, which is where learning starts from. Of two equal scores the earlier block wins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from farfield.mechanism import Case, Mechanism, Paper, State, Supports, check_qkv, no_tokens
from farfield.ops import precision
from farfield.ops.attend import attend
from farfield.ops.branches import branches
from farfield.ops.branches import takes as together
from farfield.ops.compress import MLP, compress, takes
from farfield.ops.fan import fan
from farfield.ops.mix import mix
from farfield.select.scored import Scoring, attend_and_choose, attend_chosen, check, choose, recent, tokens_read
from farfield.types import Layout, Rows

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class NSAState(State):
    """All tokens, those of branches with keys and values of their own apart, and the compressions."""

    rows: Pair
    compression: Pair | None
    window: Pair | None
    compressed: Pair  # float32 or wider
    stride: int
    span: int

    @property
    def k(self) -> Tensor:
        return self.rows[0]

    def crop(self, drop: int) -> "NSAState":
        keep = self.left(drop)
        return replace(
            self,
            tokens=keep,
            rows=_head(self.rows, keep),
            compression=self.compression and _head(self.compression, keep),
            window=self.window and _head(self.window, keep),
            compressed=_head(self.compressed, _complete(keep, self.stride, self.span)),
        )


class Compression(nn.Module):
    """Blocks of `span` rows, one every `stride`, each made into one: its mean, and an MLP of its rows and their places.

        out[c] = mean(block[c]) + gelu(flat(block[c] + position) inner) outer

    Args:
        heads: G; the places are learned for each key head, the MLP for all.
        width: of the rows, and of the hidden layer.
    """

    def __init__(self, heads: int, width: int, stride: int, span: int):
        super().__init__()
        self.stride, self.span = stride, span
        self.position = nn.Parameter(torch.zeros(heads, span, width))
        self.inner = nn.Parameter(torch.randn(span * width, width) / (span * width) ** 0.5)
        self.outer = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP adds to the means of complete blocks: x [B, G, S, D] as [B, G, C, D], in the dtype of x."""
        parts = self.span // self.stride
        position, inner, outer = (p.to(x.dtype) for p in (self.position, self.inner, self.outer))
        # a piece of `stride` rows lies in several blocks: what it adds to each is made once, without copies of x
        pieces = x.unflatten(2, (-1, self.stride)).flatten(3)
        rows = pieces.shape[2] - parts + 1
        # one product for each head of each sequence: the numbers of one do not depend on the others
        by_part = _each(pieces, inner.unflatten(0, (parts, -1)).transpose(0, 1).flatten(1)).unflatten(3, (parts, -1))
        hidden = sum(by_part[:, :, n : n + rows, n] for n in range(parts))
        return _each(gelu(hidden + (position.flatten(1) @ inner)[:, None]), outer)


class NSA(Mechanism):
    """Native sparse attention.

    Args:
        block: tokens of a selected block.
        picks: blocks that a query reads, the forced ones included.
        initial, local: the first and the latest blocks that are always read, the query's own among the latter.
        span, stride: tokens of a compressed block, and between two of them; `stride` divides `span` and `block`.
        window: tokens of the sliding window, the query included.
        learned: compression and gates have parameters, which needs kv_heads and width. Default: where these are given.
        kv_heads, width, value_width: G, D and E; value_width is D by default.
    """

    paper = Paper(
        title="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
        authors="Yuan et al.",
        year=2025,
        arxiv="2502.11089",
    )
    grouped = True
    remembers = NSAState
    cases = (
        Case(
            options={"block": 8, "picks": 3, "initial": 0, "local": 1, "span": 8, "stride": 8, "window": 9},
            tokens=67,
            block=8,
            heads=6,
        ),
        Case(
            options={
                "block": 16,
                "picks": 4,
                "span": 4,
                "stride": 2,
                "window": 12,
                "kv_heads": 2,
                "width": 16,
                "value_width": 16,
            },
            tokens=91,
        ),
    )
    supports = Supports(noncausal=False, heads_apart=False)

    def __init__(
        self,
        *,
        block: int = 64,
        picks: int = 16,
        initial: int = 1,
        local: int = 2,
        span: int = 32,
        stride: int = 16,
        window: int = 512,
        learned: bool | None = None,
        causal: bool = True,
        scale: float | None = None,
        kv_heads: int | None = None,
        width: int | None = None,
        value_width: int | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        self.scoring = Scoring(block, picks, stride, span, initial, local)
        check(self.scoring, "nsa")
        if window < 1:
            raise ValueError(f"nsa: window must be at least 1, got {window}")
        self.window = window
        self.learned = kv_heads is not None and width is not None if learned is None else learned
        if self.learned:
            if kv_heads is None or width is None:
                raise ValueError(f"nsa: learned=True needs kv_heads and width, got {kv_heads} and {width}")
            self.compress_k = Compression(kv_heads, width, stride, span)
            self.compress_v = Compression(kv_heads, value_width or width, stride, span)
            self.gate = nn.Parameter(torch.zeros(kv_heads, width, 3))
            self.gate_bias = nn.Parameter(torch.zeros(kv_heads, 3))

    def forward(
        self, q, k, v, *, group=None, rotary=None, gates: Tensor | None = None, compression: Pair | None = None,
        window: Pair | None = None,
    ):  # fmt: skip
        """Attention of every query.

        Args:
            gates: [B, H, T, 3], factors of the compressed, the selected and the window branch.
            compression, window: keys and values of those branches, of the shapes of k and v.
        """
        self._check(q, k, v, gates, compression, window, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        if gates is compression is window is None and together(q, k, v, self.weights(), self.scoring):
            scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
            return branches(q, k, v, self.weights(), self.scoring, self.window, scale)
        return self._attend(q, (k, v), self._compressed(*(compression or (k, v))), window or (k, v), gates, 0)

    def extend(
        self, q, k, v, state: NSAState | None = None, *, rotary=None, gates: Tensor | None = None,
        compression: Pair | None = None, window: Pair | None = None,
    ):  # fmt: skip
        self._check(q, k, v, gates, compression, window, rotary=rotary, state=state)
        rows, seen = (k, v), 0
        if state is None:
            compressed = self._compressed(*(compression or rows))
        else:
            for name, old, new in (("compression", state.compression, compression), ("window", state.window, window)):
                if (old is None) != (new is None):
                    there = "without" if old is None else "with"
                    raise ValueError(f"nsa: the state was begun {there} {name}=, go on with it in the same way")
            seen = state.tokens
            rows = _join(state.rows, rows)
            compression = compression and state.compression and _join(state.compression, compression)
            window = window and state.window and _join(state.window, window)
            first = state.compressed[0].shape[2] * self.scoring.stride
            new = self._compressed(*(x[:, :, first:] for x in compression or rows))
            compressed = _join(state.compressed, new)
        state = NSAState(
            rows[0].shape[2], rows, compression, window, compressed, self.scoring.stride, self.scoring.span
        )
        if not q.shape[2]:
            return no_tokens(q, v), state
        return self._attend(q, rows, compressed, window or rows, gates, seen), state

    def reference(self, q, k, v):
        block, picks, stride, span, initial, local, _ = self.scoring
        tokens, repeat = q.shape[2], q.shape[1] // k.shape[1]
        ck, cv = ([self._one(x, name, c) for c in range(_complete(tokens, stride, span))]
                  for x, name in ((k, "compress_k"), (v, "compress_v")))  # fmt: skip
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        i, blocks = torch.arange(tokens), -(-tokens // block)
        compressed, score = torch.zeros_like(q @ k.mT @ v), q.new_zeros(*q.shape[:3], blocks)
        if ck:
            ck, cv = (torch.stack(x, 2).repeat_interleave(repeat, 1) for x in (ck, cv))
            past = torch.arange(ck.shape[2]) * stride + span <= i[:, None] + 1
            p = (q @ ck.mT * scale).masked_fill(~past, float("-inf")).softmax(-1).nan_to_num(0.0)
            compressed = p @ cv
            for j in range(1, blocks + 1):
                for m in range(block // stride):
                    for n in range(span // stride):
                        if 1 <= (c := block // stride * j - m - n) <= ck.shape[2]:
                            score[..., j - 1] += p[..., c - 1].detach()
        score = score.unflatten(1, (-1, repeat)).sum(2)
        own, each = i[:, None] // block, torch.arange(blocks)
        score = score.masked_fill((each < initial) | (each > own - local), float("inf"))
        score = score.masked_fill(each > own, float("-inf"))
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen = chosen.scatter(-1, score.topk(min(picks, blocks)).indices, True).repeat_interleave(repeat, 1)
        logits, before = q @ k.mT * scale, i <= i[:, None]
        selected = logits.masked_fill(~(chosen[..., i // block] & before), float("-inf")).softmax(-1) @ v
        near = logits.masked_fill(~(before & (i > i[:, None] - self.window)), float("-inf")).softmax(-1) @ v
        gates = q.new_full((*q.shape[:3], 3), 0.5)
        if self.learned:
            w, b = (x.repeat_interleave(repeat, 0) for x in (self.gate, self.gate_bias))
            gates = (torch.einsum("bhtd,hdn->bhtn", q, w) + b[:, None]).sigmoid()
        return gates[..., :1] * compressed + gates[..., 1:2] * selected + gates[..., 2:] * near

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """The layouts of a random sequence, for pictures; each key head and sequence selects for itself."""
        gen = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, 1, tokens, 16, generator=gen)
        ck = _means(k, self.scoring.stride, self.scoring.span)
        selected = Layout(*choose(q, ck, self.scoring), 1, self.scoring.block, tokens, tokens, True)
        return {"selected, one head": selected, "window": recent(tokens=tokens, rows=tokens, width=self.window)}

    def rows_read(self, tokens: int) -> float:
        """Of all three branches: a token that two of them read counts twice."""
        i = torch.arange(1, tokens + 1, dtype=torch.float64)
        compressed = ((i - self.scoring.span) // self.scoring.stride + 1).clamp(min=0)
        return tokens_read(self.scoring, tokens) + (compressed + i.clamp(max=self.window)).mean().item()

    def _check(self, q, k, v, gates: Tensor | None, compression: Pair | None, window: Pair | None, **more) -> None:
        self.check(q, k, v, **more)
        for name, pair in (("compression", compression), ("window", window)):
            if pair is not None:
                if pair[0].shape != k.shape or pair[1].shape != v.shape:
                    raise ValueError(
                        f"nsa: {name} must be keys and values of the shapes of k and v, {list(k.shape)} and "
                        f"{list(v.shape)}, got {list(pair[0].shape)} and {list(pair[1].shape)}"
                    )
                check_qkv(f"nsa: {name}", q, *pair)
        if gates is not None and gates.shape != (*q.shape[:3], 3):
            raise ValueError(f"nsa: gates must be [B, H, T, 3] = {[*q.shape[:3], 3]}, got {list(gates.shape)}")
        if self.learned and k.shape[1::2] != self.gate.shape[:2]:
            raise ValueError(f"nsa: built for G, D = {list(self.gate.shape[:2])}, but k is {list(k.shape)}")

    def _attend(
        self, q: Tensor, rows: Pair, compressed: Pair, window: Pair, gates: Tensor | None, first: int
    ) -> Tensor:
        weights = {"shares": gates} if gates is not None else {}
        if self.learned and gates is None:
            weights = {"gate": self.gate, "bias": self.gate_bias}
        return _branches(q, rows, compressed, window, self.scoring, self.window, self.scale, first, weights)

    def weights(self) -> tuple[Tensor, ...]:
        """Those of the compression, of keys and of values, then gate and bias; none without parameters."""
        if not self.learned:
            return ()
        names = "inner", "position", "outer"
        mlp = [getattr(x, name) for name in names for x in (self.compress_k, self.compress_v)]
        return *mlp, self.gate, self.gate_bias

    def _mlp(self) -> MLP | None:
        return MLP(*self.weights()[:6]) if self.learned else None

    def _compressed(self, k: Tensor, v: Tensor) -> Pair:
        """The compressions of the complete blocks, float32 or wider."""
        stride, span = self.scoring.stride, self.scoring.span
        if takes(k, v, self._mlp(), span):
            return compress(k, v, self._mlp(), stride=stride, span=span, rows=_complete(k.shape[2], stride, span))
        with precision.kept(k):
            means = _means(k, stride, span), _means(v, stride, span)
            if not self.learned or not means[0].shape[2]:
                return means
            used = (means[0].shape[2] - 1) * stride + span
            k, v = (x[:, :, :used].to(m.dtype) for x, m in zip((k, v), means, strict=True))
            return means[0] + self.compress_k(k), means[1] + self.compress_v(v)

    def _one(self, x: Tensor, name: str, c: int) -> Tensor:
        """Compressed row c, [B, G, D], literally."""
        block = x[:, :, c * self.scoring.stride : c * self.scoring.stride + self.scoring.span]
        if not self.learned:
            return block.mean(2)
        mlp = getattr(self, name)
        return block.mean(2) + gelu((block + mlp.position).flatten(2) @ mlp.inner) @ mlp.outer


def _branches(
    q: Tensor, rows: Pair, compressed: Pair, window: Pair, scoring: Scoring, width: int, scale: float | None,
    first: int, weights: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    q, q1, q2, q3 = fan(q, 4)
    far, choice = attend_and_choose(q, *compressed, scoring, first=first, scale=scale)
    selected = attend_chosen(q1, Rows(*rows), choice, scoring.block, first=first, scale=scale)
    layout = recent(tokens=q.shape[2], rows=window[0].shape[2], width=width, device=q.device)
    position = torch.arange(first, first + q.shape[2], device=q.device) if first else None
    near = attend(q2, Rows(*window), layout, scale=scale, position=position)
    return mix((far.out, selected.out, near.out), q3, **weights)


def _each(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, G, N, X] times a matrix, head by head."""
    return torch.bmm(x.flatten(0, 1), matrix.expand(x.shape[0] * x.shape[1], -1, -1)).unflatten(0, x.shape[:2])


def _complete(tokens: int, stride: int, span: int) -> int:
    """Blocks of `span` tokens, one every `stride`, that so many tokens complete."""
    return max(0, (tokens - span) // stride + 1)


def _means(x: Tensor, stride: int, span: int) -> Tensor:
    """The means of the complete blocks, float32 or wider."""
    rows, parts = _complete(x.shape[2], stride, span), span // stride
    used = rows and rows + parts - 1
    pieces = x[:, :, : used * stride].unflatten(2, (used, stride))
    pieces = pieces.mean(3, dtype=torch.promote_types(x.dtype, torch.float32))
    return sum((pieces[:, :, n : n + rows] for n in range(1, parts)), pieces[:, :, :rows]) / parts


def _join(old: Pair, new: Pair) -> Pair:
    return torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)


def _head(pair: Pair, rows: int) -> Pair:
    return pair[0][:, :, :rows], pair[1][:, :, :rows]
