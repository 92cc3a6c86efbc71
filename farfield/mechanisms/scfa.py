"""Sparse causal attention over tokens that are dropped or hashed into buckets, head by head.

    hash:  bucket(x) = argmax over [x R, -x R],    seen(i) = { j < i : bucket(k[j]) = bucket(q[i]) }
    drop:  m_q, m_k random,                        seen(i) = { j <= i : m_k[j] } if m_q[i], else nothing
    out[i] = sum over j in seen(i) of softmax_j(scale * q[i] . k[j]) v[j],    0 where nothing is seen

Tokens are sorted by (bucket, position), or what is kept is moved together; a block of sorted queries then reads a run
of blocks. T^2 / buckets scores by hashing if the buckets are even, (1 - drop)^2 T^2 by dropping (half of them causal).
Hashing is strict because the paper's keys are normalised queries, k = q / |q|, and a token would see little but itself.
Departs from the paper: R and the masks follow from a seed and the token's place, they are not drawn for every call; k
is the caller's (for the paper's model pass k = normalize(q)).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farfield.mechanism import Case, Mechanism, Paper, State, Supports, no_tokens
from farfield.ops.attend import attend
from farfield.select import hashed, static
from farfield.state import Cache
from farfield.types import Layout, Rows

NEVER = 1 << 62  # the end of a place that holds no row


@dataclass(frozen=True)
class HashState(Cache):
    """All rows in the order they came, and the bucket of each key."""

    bucket: Tensor  # [B, H, S]

    def crop(self, drop: int) -> "HashState":
        return replace(super().crop(drop), bucket=self.bucket[:, :, : self.left(drop)])


@dataclass(frozen=True)
class DropState(State):
    """The kept rows of each head, and the position of each; heads that kept fewer have places left."""

    k: Tensor
    v: Tensor
    end: Tensor  # [B, H, R]
    kept: tuple[int, ...]  # rows of each head, at most

    def crop(self, drop: int) -> "DropState":
        """The state before the last `drop` tokens."""
        keep = self.left(drop)
        return replace(self, tokens=keep, end=self.end.masked_fill(self.end >= keep, NEVER))


class SparseCausalFlash(Mechanism):
    """Hash attention or QK-dropping.

    Args:
        choose: "hash" or "drop".
        buckets: of a head's hash; even.
        shared: each token has one bucket, its query's, as where keys are normalised queries; False hashes the keys by
            themselves.
        drop: the share of queries and of keys that is dropped.
        seed: of the directions, or of what is dropped. Give every layer its own.
        block: sorted tokens of a block; no effect on the result.
    """

    paper = Paper(
        title="Faster Causal Attention Over Large Sequences Through Sparse Flash Attention",
        authors="Pagliardini, Paliotta, Jaggi, Fleuret",
        year=2023,
        arxiv="2306.01160",
        code="github.com/epfml/dynamic-sparse-flash-attention",
    )
    remembers = HashState, DropState
    cases = (
        Case(options={"buckets": 4, "block": 16}, kv_heads=4),
        Case(options={"buckets": 4, "block": 8, "shared": False}, heads=2, tokens=61, block=8),
        Case(options={"choose": "drop", "block": 16}, heads=2, tokens=75),
    )
    supports = Supports(noncausal=False, grouped=False)

    def __init__(
        self,
        *,
        choose: str = "hash",
        buckets: int = 16,
        shared: bool = True,
        drop: float = 0.5,
        seed: int = 0,
        block: int = 128,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        if choose not in ("hash", "drop"):
            raise ValueError(f"scfa: choose must be 'hash' or 'drop', got {choose!r}")
        if buckets < 2 or buckets % 2:
            raise ValueError(f"scfa: buckets come in pairs of opposites: an even number, at least 2, got {buckets}")
        if not 0 <= drop < 1:
            raise ValueError(f"scfa: drop is a share, 0 <= drop < 1, got {drop}")
        if block < 1:
            raise ValueError(f"scfa: block must be at least 1, got {block}")
        self.choose, self.buckets, self.shared, self.drop = choose, buckets, shared, drop
        self.seed, self.block = seed, block

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        if self.choose == "drop":
            return self._sorted(q, k, v, self._drop(q, 0, q.shape[2]))
        return self._sorted(q, k, v, self._hash(q, k))

    def extend(self, q, k, v, state: HashState | DropState | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        if self.choose == "drop":
            if state is not None and not isinstance(state, DropState):
                raise TypeError(f"scfa: choose='drop' goes on from its own state, got {type(state).__name__}")
            return self._extend_dropped(q, k, v, state)
        if state is not None and not isinstance(state, HashState):
            raise TypeError(f"scfa: choose='hash' goes on from its own state, got {type(state).__name__}")
        return self._extend_hashed(q, k, v, state)

    def reference(self, q, k, v):
        heads, tokens, width = q.shape[1:]
        i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
        if self.choose == "drop":
            asking, there = hashed.kept(1 - self.drop, heads=heads, start=0, stop=tokens, seed=self.seed)
            seen = asking[:, :, None] & there[:, None] & (j <= i)
        else:
            directions = hashed.planes(self.seed, heads, width, self.buckets).to(q.device)
            mine, theirs = (
                torch.cat([x @ directions, -x @ directions], -1).argmax(-1) for x in (q.detach(), k.detach())
            )
            theirs = mine if self.shared else theirs
            seen = (mine[..., None] == theirs[:, :, None]) & (j < i)
        scores = q @ k.mT * (width**-0.5 if self.scale is None else self.scale)
        scores = scores.masked_fill(~seen, float("-inf"))
        # a row of -inf alone has no softmax
        empty = ~seen.any(-1, keepdim=True)
        return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ v

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """The layout over the sorted tokens of one head, for pictures; hashing, of random tokens."""
        q = torch.randn(1, 1, tokens, 64, generator=torch.Generator().manual_seed(self.seed), device="cpu")
        order = self._drop(q, 0, tokens) if self.choose == "drop" else self._hash(q, q)
        return {self.choose: order.layout}

    def rows_read(self, tokens: int) -> float:
        """By dropping, the mean over all masks; by hashing, that of even buckets. Tokens that read nothing count."""
        if self.choose == "drop":
            return (1 - self.drop) ** 2 * (tokens + 1) / 2
        return (tokens - 1) / 2 / self.buckets

    def _hash(self, q: Tensor, k: Tensor) -> hashed.Sorted:
        mine = hashed.buckets(q, many=self.buckets, seed=self.seed)
        if self.shared:
            return hashed.sort(mine, many=self.buckets, block=self.block)
        theirs = hashed.buckets(k, many=self.buckets, seed=self.seed)
        return hashed.sort(theirs, many=self.buckets, queries=mine, block=self.block)

    def _drop(self, q: Tensor, start: int, stop: int) -> hashed.Sorted:
        """What is kept, moved together: one bucket, and none for what is dropped."""
        asking, there = self._bucket(q, start, stop)
        return hashed.sort(there, many=1, queries=asking, block=self.block, strict=False)

    def _bucket(self, q: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """0 for the kept, -1 for the dropped, of queries and keys, [B, H, T] each."""
        batch, heads = q.shape[:2]
        kept = hashed.kept(1 - self.drop, heads=heads, start=start, stop=stop, seed=self.seed, device=q.device)
        asking, there = (kept.to(torch.int32) - 1)[:, None].expand(-1, batch, -1, -1)
        return asking, there

    def _sorted(self, q: Tensor, k: Tensor, v: Tensor, order: hashed.Sorted) -> Tensor:
        return order.attend(q, k, v, scale=q.shape[3] ** -0.5 if self.scale is None else self.scale)

    def _extend_hashed(self, q: Tensor, k: Tensor, v: Tensor, state: HashState | None) -> tuple[Tensor, HashState]:
        tokens = q.shape[2]
        mine = hashed.buckets(q, many=self.buckets, seed=self.seed)
        theirs = mine if self.shared else hashed.buckets(k, many=self.buckets, seed=self.seed)
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            theirs = torch.cat([state.bucket, theirs], 2)
        rows = k.shape[2]
        if not tokens:
            out = no_tokens(q, v)
        elif tokens == 1:
            # the rows of the query's bucket one by one, without moving any
            found = theirs[..., : rows - 1] == mine
            index = found.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
            count = found.sum(-1, keepdim=True, dtype=torch.int32)
            layout = Layout(index[:, :, None], count, 1, 1, 1, rows)
            out = attend(q, Rows(k, v), layout, scale=self.scale).out
        else:
            order = hashed.sort(theirs, many=self.buckets, queries=mine, block=self.block)
            out = self._sorted(q, k, v, order)
        return out, HashState(rows, k, v, theirs)

    def _extend_dropped(self, q: Tensor, k: Tensor, v: Tensor, state: DropState | None) -> tuple[Tensor, DropState]:
        batch, heads, tokens, _ = q.shape
        seen = 0 if state is None else state.tokens
        asking, there = self._bucket(q, seen, seen + tokens)
        position = torch.arange(seen, seen + tokens, device=q.device)
        end = position.expand(batch, heads, -1).masked_fill(there < 0, NEVER)
        # the masks follow from the seed, so that the host knows how many rows there are
        new = hashed.kept(1 - self.drop, heads=heads, start=seen, stop=seen + tokens, seed=self.seed, device="cpu")
        many = new[1].sum(-1).tolist()
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            end = torch.cat([state.end, end], 2)
            many = [a + b for a, b in zip(state.kept, many, strict=True)]
        # stable: the kept ones stay in the order of their positions
        order = (end == NEVER).to(torch.int8).sort(dim=-1, stable=True).indices[..., : max(many, default=0)]
        end = end.gather(2, order)
        k, v = (x.gather(2, order[..., None].expand(*order.shape, x.shape[3])) for x in (k, v))
        if tokens:
            layout = static.full(tokens=tokens, rows=max(k.shape[2], 1), q_block=64, k_block=64, device=q.device)
            layout = replace(layout, causal=True)
            out = attend(q, Rows(k, v, end=end), layout, scale=self.scale, position=position).out
            out = out.masked_fill((asking < 0)[..., None], 0.0)
        else:
            out = no_tokens(q, v)
        return out, DropState(seen + tokens, k, v, end, tuple(many))
