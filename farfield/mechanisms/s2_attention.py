"""S2-Attention: all heads read what is close by, and what is far away is shared out among them.

Tokens are cut into blocks. With v = stride and w = local, key head g of G shows query block I the key blocks

    seen(g, I) = { J <= I : I - J < w  or  (J + g * step + offset) mod v = 0 },    step = max(1, v // G)
    out[i]     = sum over the tokens j <= i of seen(g, i // block) of softmax_j(scale * q[i] . k[j]) v[j]

so that where G is a multiple of v every pair of blocks is read by some head. The query heads of one key head share its
blocks. Noncausal, all heads read the blocks at distances less than w, and every v-th block beyond.

About T * (w * block + T / 2v) scores a head. The far blocks are those of absolute positions: what a head does not read
once it is no longer local it never reads again, and the decode state drops it: it keeps w + (N - w) / v blocks of N.
Departs from the paper: blocks of 128 tokens, which fill the tiles of the tensor cores, where its examples have 64.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from farfield.mechanism import Case, Mechanism, Paper, Rotary, State, no_tokens
from farfield.ops.attend import attend
from farfield.select import static
from farfield.state import Cache
from farfield.token_ring import TokenRing
from farfield.types import Layout, Rows


@dataclass(frozen=True)
class S2State(State):
    """What later queries read: the last tokens of all key heads, and of each head the far blocks that are its own.

    Args:
        k, v: [B, G, tokens, width], from the first block on that the next query has close by.
        far_k, far_v: [B, blocks, block, width], by block and then by head.
    """

    k: Tensor
    v: Tensor
    far_k: Tensor
    far_v: Tensor


class S2Attention(Mechanism):
    """S2-Attention: context sharded over the heads.

    Args:
        stride: a head reads one in so many far blocks.
        local: blocks that every head reads, a query's own included.
        block: tokens of a block.
        offset: moves the far blocks of all heads.
        dense_heads: key heads, the last ones, that read everything.
        homogeneous: give all heads the same far blocks, the paper's ablation.
    """

    paper = Paper(
        title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
        authors="Lin et al.",
        year=2024,
        arxiv="2407.17678",
        code="github.com/linxihui/dkernel",
    )
    decodes = (TokenRing,)
    remembers = S2State
    cases = (
        Case(options={"stride": 4, "local": 2, "block": 8}, block=8),
        Case(options={"stride": 3, "local": 1, "block": 5, "offset": 1, "dense_heads": 1}, tokens=58, block=5),
        Case(options={"stride": 3, "local": 2, "block": 4, "causal": False}, tokens=50, block=4),
    )

    def __init__(
        self,
        *,
        stride: int = 8,
        local: int = 4,
        block: int = 128,
        offset: int = 0,
        dense_heads: int = 0,
        homogeneous: bool = False,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        if stride < 1 or local < 1 or block < 1 or dense_heads < 0:
            raise ValueError(
                "s2-attention: stride, local and block must be at least 1, dense_heads at least 0; got "
                f"stride={stride}, local={local}, block={block}, dense_heads={dense_heads}"
            )
        if not causal and (dense_heads or homogeneous or offset):
            raise NotImplementedError(
                "s2-attention: noncausal, all heads read the same blocks by distance; offset, dense_heads and "
                "homogeneous are for causal attention"
            )
        self.stride, self.local, self.block, self.offset = stride, local, block, offset
        self.dense_heads, self.homogeneous = dense_heads, homogeneous

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        tokens, heads = k.shape[2], k.shape[1]
        if self.causal:
            step, repeat = self._shards(heads).step, q.shape[1] // heads
            layout = static.sharded(
                tokens=tokens, heads=heads, stride=self.stride, local=self.local, block=self.block, repeat=repeat,
                step=step, offset=self.offset, dense=self.dense_heads, device=q.device,
            )  # fmt: skip
        else:
            layout = self._by_distance(tokens, q.device)
        return attend(q, Rows(k, v), layout, scale=self.scale).out

    def extend(self, q, k, v, state: S2State | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        if not self.causal:
            raise NotImplementedError("s2-attention: only causal attention can be extended; use forward")
        if state is None:
            out = self.forward(q, k, v)
            far = (x.new_empty(x.shape[0], 0, self.block, x.shape[3]) for x in (k, v))
            return out, self._drop(S2State(q.shape[2], k, v, *far), 0)
        seen, first = state.tokens, self._first(state.tokens)
        state = S2State(
            seen + q.shape[2], torch.cat([state.k, k], 2), torch.cat([state.v, v], 2), state.far_k, state.far_v
        )
        out = self._read(q, state, seen, first) if q.shape[2] else no_tokens(q, v)
        return out, self._drop(state, first)

    def ring(self, state: S2State, *, capacity: int, rotary: Rotary | None = None) -> TokenRing:
        """As Mechanism.ring, with a row for every token: what a head will never read is not left out."""
        self.check_ring(state, rotary)
        first = self._first(state.tokens)
        owned = self._shards(state.k.shape[1]).owned(0, first, state.k.device)

        def whole(near: Tensor, far: Tensor) -> Tensor:
            past = far.new_zeros(len(far), *owned.shape, *far.shape[2:])
            past[:, owned] = far
            return torch.cat([past.transpose(1, 2).flatten(2, 3), near], 2)

        k, v = whole(state.k, state.far_k), whole(state.v, state.far_v)
        return TokenRing.all_of(Cache(state.tokens, k, v), capacity)

    def ring_sizes(self):
        return {"whole": True}

    def step(self, q, k, v, ring: TokenRing):
        self.check_step(ring)
        tile, last, heads = static.tile_of(self.block), (ring.capacity - 1) // self.block, k.shape[1]
        lists = partial(
            static.shard_lists_of, last=last, plan=self._shards(heads), split=self.block // tile,
            repeat=q.shape[1] // heads,
        )  # fmt: skip
        ring.append(q, k, v)
        return ring.read(q, lists, tile, scale=self.scale)

    def reference(self, q, k, v):
        heads, tokens = k.shape[1], k.shape[2]
        k, v = (x.repeat_interleave(q.shape[1] // heads, 1) for x in (k, v))
        i, j = torch.arange(tokens)[:, None] // self.block, torch.arange(tokens) // self.block
        if self.causal:
            seen, step = [], 0 if self.homogeneous else max(1, self.stride // heads)
            for g in range(heads):
                own = (j + g * step + self.offset) % self.stride == 0
                all_of_it = torch.tensor(g >= heads - self.dense_heads)
                seen.append(((i - j < self.local) | own | all_of_it) & torch.ones(tokens, tokens).tril().bool())
            seen = torch.stack(seen).repeat_interleave(q.shape[1] // heads, 0)
        else:
            beyond = (i - j).abs() - (self.local - 1)
            seen = (beyond <= 0) | (beyond % self.stride == 0)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    def rows_read(self, tokens: int) -> float:
        """Over as many key heads as it takes for the shards to come round."""
        if not self.causal:
            return self._by_distance(tokens).visible
        heads = max(self.stride, self.dense_heads + 1)
        return static.sharded(
            tokens=tokens, heads=heads, stride=self.stride, local=self.local, block=self.block,
            step=self._shards(heads).step, offset=self.offset, dense=self.dense_heads,
        ).visible  # fmt: skip

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """What the first and the second of `stride` key heads read, for pictures."""
        if not self.causal:
            return {"all heads": self._by_distance(tokens)}
        heads = max(self.stride, self.dense_heads + 1)
        tile, shards = static.tile_of(self.block), self._shards(heads)
        index, count = static.shard_lists(0, -(-tokens // tile), shards, split=self.block // tile)
        return {
            f"head {g}": Layout(index[:, g : g + 1], count[:, g : g + 1], tile, tile, tokens, tokens, causal=True)
            for g in range(min(heads, 2))
        }

    def _by_distance(self, tokens: int, device: torch.device | None = None) -> Layout:
        return static.strided(
            tokens=tokens, stride=self.stride, local=self.local, block=self.block, causal=False, device=device
        )

    def _shards(self, heads: int) -> static.Shards:
        """How far blocks are shared out over so many key heads."""
        if self.dense_heads > heads:
            raise ValueError(f"s2-attention: dense_heads={self.dense_heads} of only {heads} key heads")
        step = 0 if self.homogeneous else max(1, self.stride // heads)
        return static.Shards(heads, self.stride, self.local, step, self.offset, self.dense_heads)

    def _first(self, tokens: int) -> int:
        """The first block that a query after so many tokens has close by."""
        return max(tokens // self.block - self.local + 1, 0)

    def _read(self, q: Tensor, state: S2State, seen: int, first: int) -> Tensor:
        """Attention of the last queries of state.tokens over the tokens from block `first` on and the far blocks.

        Heads keep different blocks, so keys and values are laid end to end, as those of one key head of which each
        query head lists its own.
        """
        heads, rows = state.k.shape[1:3]
        repeat, tile = q.shape[1] // heads, static.tile_of(self.block)
        split, shards = self.block // tile, self._shards(heads)
        lead = static.lead_in(seen, q.shape[2], tile)
        start, stop = (seen - lead) // tile, -(-state.tokens // tile)
        index, count = static.shard_lists(start, stop, shards, split=split, repeat=repeat, first=first, device=q.device)
        head = torch.arange(q.shape[1], dtype=torch.int32, device=q.device) // repeat
        tiles = -(-rows // tile)
        k, v = (pad(x, (0, 0, 0, tiles * tile - rows)).flatten(1, 2)[:, None] for x in (state.k, state.v))
        # what fills up the last tile ends after every query
        end = (torch.arange(tiles * tile, device=q.device) + first * self.block).repeat(heads)
        near = Layout(
            index + (head * tiles)[:, None, None], count, tile, tile, lead + q.shape[2], k.shape[2], causal=True
        )
        sources = [(Rows(k, v, end=end), near)]
        if state.far_k.shape[1]:
            k, v = (x.flatten(1, 2)[:, None] for x in (state.far_k, state.far_v))
            # by block and then by head: the places of a head's blocks
            owned = shards.owned(0, first, q.device)
            where, many = static.pack_lists((owned.flatten().cumsum(0) - 1).view(owned.shape).T, owned.T)
            where = where[:, : max(shards.before(first)), None] * split
            index = (where + torch.arange(split, device=q.device)).flatten(1)[head].int()
            shape = q.shape[1], near.index.shape[2]
            index, count = index[:, None].expand(*shape, -1)[None], (many * split)[head][:, None].expand(shape)[None]
            # far blocks are past
            sources.append((Rows(k, v), Layout(index, count, tile, tile, near.tokens, k.shape[2])))
        position = torch.arange(seen - lead, state.tokens, device=q.device)
        out = attend(pad(q, (0, 0, lead, 0)), sources, scale=self.scale, position=position).out
        return out[:, :, lead:]

    def _drop(self, state: S2State, first: int) -> S2State:
        """The state, whose tokens begin with block `first`, without what no later query reads."""
        after, shards = self._first(state.tokens), self._shards(state.k.shape[1])
        leaving = after - first
        if not leaving:
            return state
        # how many are kept follows from lengths alone: nothing has to be read back from the device
        many = sum(shards.before(after)) - sum(shards.before(first))
        owned = shards.owned(first, after, state.k.device)
        which = owned.flatten().int().argsort(descending=True, stable=True)[:many]
        cut = leaving * self.block

        def moved(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
            blocks = near[:, :, :cut].unflatten(2, (leaving, self.block)).transpose(1, 2).flatten(1, 2)
            # a copy: a view would keep what is dropped
            return near[:, :, cut:].clone(), torch.cat([far, blocks.index_select(1, which)], 1)

        (k, far_k), (v, far_v) = moved(state.k, state.far_k), moved(state.v, state.far_v)
        return S2State(state.tokens, k, v, far_k, far_v)
