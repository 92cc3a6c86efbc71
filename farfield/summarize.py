"""summarize: rows into ever coarser rows. One pyramid, all levels back to back in one buffer.

A group of level l is block * 2^(l-1) tokens and becomes `rank` rows; its two children are groups of level l-1. A pool
says how: tree pools make level 1 from tokens and every other level from its children, so that all levels together
cost O(n); the convolution of the paper makes every level from the tokens, O(n log n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from farfield.mechanism import check_kv
from farfield.ops import pool as op
from farfield.ops import precision
from farfield.ops.pool import Pooled, Tree
from farfield.select.static import depth
from farfield.types import Rows


@dataclass(frozen=True)
class Groups:
    """Consecutive groups of one level.

    Args:
        k, v: `rank` rows a group.
        count: how many tokens each row stands for; None: the same for all, group width / rank.
        memo: what the pool needs to make parents of these, beside the rows.
    """

    k: Float[Tensor, "B G N p D"]
    v: Float[Tensor, "B G N p E"]
    count: Float[Tensor, "#B 1 N p"] | None = None
    memo: Float[Tensor, "B G N p"] | None = None

    def __len__(self) -> int:
        return self.k.shape[2]

    def cut(self, start: int | None = None, stop: int | None = None) -> Groups:
        return self._each(lambda x: x[:, :, start:stop])

    def copy(self) -> Groups:
        return self._each(torch.clone)

    def join(self, other: Groups) -> Groups:
        return Groups(
            torch.cat([self.k, other.k], 2),
            torch.cat([self.v, other.v], 2),
            None if self.count is None or other.count is None else torch.cat([self.count, other.count], 2),
            None if self.memo is None or other.memo is None else torch.cat([self.memo, other.memo], 2),
        )

    def _each(self, f: Callable[[Tensor], Tensor]) -> Groups:
        count, memo = (None if x is None else f(x) for x in (self.count, self.memo))
        return Groups(f(self.k), f(self.v), count, memo)


class Pool(nn.Module):
    """Makes groups of `rank` rows: level 1 from blocks of tokens, every further level from pairs of groups."""

    whole = False  # a row stands for its whole group, not for its own segment of it
    most: int | None = None  # levels that the pool can make
    made_for: Mapping[str, int] = {}  # kv_heads, width, value_width, block, rank, block/rank: what parameters need

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError where the pool was made for another size than the one of this name."""
        for name, size in sizes.items():
            if (made := self.made_for.get(name, size)) != size:
                raise ValueError(
                    f"{type(self).__name__}: was made for {name}={made}, got {size}; make it with {name}={size}"
                )

    def leaf(self, k: Tensor, v: Tensor, count: Tensor | None, rank: int) -> Groups:
        """Level 1 from blocks of tokens: k [B, G, N, m, D], v [B, G, N, m, E], count [B|1, 1, N, m] of 0 and 1."""
        raise NotImplementedError

    def parent(self, pairs: Groups, height: int) -> Groups:
        """The next level from groups 0 and 1, 2 and 3, ... (an even number).

        height: that of the new level; level 1 has 0.
        """
        raise NotImplementedError

    def grow(
        self, k: Tensor, v: Tensor, count: Tensor | None, *, rank: int, first: int, pending: Sequence[Groups | None],
        levels: int | None = None,
    ) -> tuple[list[Groups], list[Groups | None]]:  # fmt: skip
        """All groups that further blocks of tokens complete, level by level.

        Args:
            k, v, count: the new blocks, as for `leaf`, in float32 or wider.
            first: how many blocks there were before.
            pending: what an earlier call returned: per level, what waits for more tokens.
            levels: how many there are at most. Default: as many as have groups.

        Returns:
            The new groups of each level and what is pending after them.

        Raises:
            ValueError: the pool was made for other heads, widths, rank or block.
        """
        self.check(_sizes(k, v, k.shape[3], rank))
        # sums of many tokens stay in float32, whatever autocast would make of them
        with precision.kept(k):
            return self._grow(k, v, count, rank, first, pending, levels)

    def _grow(self, k, v, count, rank, first, pending, most) -> tuple[list[Groups], list[Groups | None]]:
        levels, waiting = [], []
        new = self.leaf(k, v, count, rank)
        while len(new) or len(levels) < len(pending):
            levels.append(new)
            if len(levels) == most:
                # nothing waits to be part of a level that is not there
                waiting.append(None)
                break
            old = pending[len(levels) - 1] if len(levels) <= len(pending) else None
            children = new if old is None else old.join(new)
            even = len(children) // 2 * 2
            waiting.append(children.cut(even) if even < len(children) else None)
            new = self.parent(children.cut(0, even), len(levels))
        return levels, waiting


class MeanPool(Pool):
    """Each row is the mean of its own segment of the group, width / rank tokens. No parameters."""

    def leaf(self, k, v, count, rank):
        if count is None:
            return Groups(*(x.unflatten(3, (rank, -1)).mean(4) for x in (k, v)))
        share, total = _shares(count.unflatten(3, (rank, -1)))
        k, v = (torch.einsum("bgnpt,bhnptd->bhnpd", share, x.unflatten(3, (rank, -1))) for x in (k, v))
        return Groups(k, v, total)

    def parent(self, pairs, height):
        count = None if pairs.count is None else _segments(pairs.count)
        return self.leaf(_segments(pairs.k), _segments(pairs.v), count, pairs.k.shape[3])


class FilterPool(MeanPool):
    """Learned child -> parent filters: 2p rows become p, the same filter on all levels, one for each key head.

    The weights of a parent row sum to 1, so constants pass; they start as the mean of its own two children:

        filter = mean + gate * (softmax(logits) - mean)

    Level 1 is the mean of segments. K and V have filters of their own.

    Args:
        heads: G.
        rank: p.
    """

    def __init__(self, heads: int, rank: int):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(2, heads, rank, 2 * rank) / math.sqrt(2 * rank))
        self.gate = nn.Parameter(torch.zeros(2, heads, rank, 1))
        self.made_for = {"kv_heads": heads, "rank": rank}

    def filters(self) -> tuple[Float[Tensor, "2 G p p2"], Float[Tensor, "p p2"]]:
        """The filters of k and v, and the mean that they start from."""
        rank = self.gate.shape[2]
        mean = torch.eye(rank, device=self.gate.device).repeat_interleave(2, 1) / 2
        return mean + self.gate * (self.logits.softmax(-1) - mean), mean

    def parent(self, pairs, height):
        rank = pairs.k.shape[3]
        filters, mean = self.filters()
        filters = filters.to(pairs.k.dtype)[:, None, :, None]  # [2, 1, G, 1, p, 2p]
        count = None
        if pairs.count is not None:
            children = _segments(pairs.count)
            count = children.unflatten(3, (rank, 2)).sum(4)
            # a group that lacks some of its rows is not what the filter has learned: its mean
            complete = (children > 0).all(-1)[..., None, None]
            filters = torch.where(complete, filters, _shares(mean.to(children.dtype) * children[..., None, :])[0])
        k, v = (
            torch.einsum("bgnpc,bgncd->bgnpd", f.expand(x.shape[0], x.shape[1], x.shape[2] // 2, -1, -1), _segments(x))
            for f, x in zip(filters, (pairs.k, pairs.v), strict=True)
        )
        return Groups(k, v, count)


class SoftmaxPool(Pool):
    """Softmax pooling by p learned queries for each key head: row s weighs its tokens by exp(query[s] . k / sqrt(D)).

    Args:
        heads: G.
        rank: p.
        width: D.
        whole: every row looks over the whole group; otherwise over its own segment, which keeps the order of the
            tokens. Segment queries start at 0, the mean; whole-group queries start at random, or all would stay alike.

    Over the whole group a parent's row is the merge of its two children's, by their log-sum-exp: every level equals
    pooling from the tokens. Over segments a parent's row is the softmax over its two children's rows.
    """

    def __init__(self, heads: int, rank: int, width: int, *, whole: bool = False):
        super().__init__()
        self.whole = whole
        self.made_for = {"kv_heads": heads, "width": width, "rank": rank}
        self.query = nn.Parameter(torch.randn(heads, rank, width) if whole else torch.zeros(heads, rank, width))

    def leaf(self, k, v, count, rank):
        query = self.query.to(k.dtype) / math.sqrt(k.shape[-1])
        known = None if count is None else count.log()
        if self.whole:
            logits = torch.einsum("gpd,bgntd->bgnpt", query, k)
            logits = logits if known is None else logits + known[..., None, :]
            weights = _softmax(logits)
            k, v = (torch.einsum("bgnpt,bgntd->bgnpd", weights, x) for x in (k, v))
            share = None if count is None else (count.sum(-1, keepdim=True) / rank).expand(*count.shape[:3], rank)
            return Groups(k, v, share, _logsumexp(logits, -1))
        k, v = (x.unflatten(3, (rank, -1)) for x in (k, v))
        logits = torch.einsum("gpd,bgnptd->bgnpt", query, k)
        if count is not None:
            count = count.unflatten(3, (rank, -1))
            logits = logits + count.log()
        weights = _softmax(logits)
        k, v = (torch.einsum("bgnpt,bgnptd->bgnpd", weights, x) for x in (k, v))
        return Groups(k, v, None if count is None else count.sum(-1))

    def parent(self, pairs, height):
        if not self.whole:
            count = None if pairs.count is None else _segments(pairs.count)
            return self.leaf(_segments(pairs.k), _segments(pairs.v), count, pairs.k.shape[3])
        assert pairs.memo is not None
        lse = pairs.memo.unflatten(2, (-1, 2))
        weights = _softmax(lse, dim=3)
        k, v = (torch.einsum("bgntp,bgntpd->bgnpd", weights, x.unflatten(2, (-1, 2))) for x in (pairs.k, pairs.v))
        count = None if pairs.count is None else pairs.count.unflatten(2, (-1, 2)).sum(3)
        return Groups(k, v, count, _logsumexp(lse, 3))


class ConvPool(Pool):
    """The paper's grouped convolution: for each level its own filter over all tokens of a group, for K and for V.

        row[s, c] = bias[s, c] + sum_t weight[s, t, c] * token[t, c]

    One filter set for all heads. Starts as the mean of segments. Parameters grow linearly with the longest sequence.

    Args:
        rank: p.
        width, value_width: D and E.
        block: m.
        levels: how many levels there are filters for.
    """

    def __init__(self, rank: int, width: int, value_width: int, block: int, levels: int):
        super().__init__()
        means = [
            torch.eye(rank).repeat_interleave(n, 1)[..., None] / n
            for n in ((block << height) // rank for height in range(levels))
        ]
        self.k_weight = nn.ParameterList(nn.Parameter(mean.repeat(1, 1, width)) for mean in means)
        self.v_weight = nn.ParameterList(nn.Parameter(mean.repeat(1, 1, value_width)) for mean in means)
        self.k_bias = nn.Parameter(torch.zeros(levels, rank, width))
        self.v_bias = nn.Parameter(torch.zeros(levels, rank, value_width))
        self.most = levels
        self.made_for = {"width": width, "value_width": value_width, "block": block, "rank": rank}

    def _grow(self, k, v, count, rank, first, pending, most):
        levels, waiting = [], []
        if count is not None:
            k, v = k * count[..., None], v * count[..., None]
        for level in range(len(self.k_bias) if most is None else min(most, len(self.k_bias))):
            sums = Groups(
                self._sums(k, self.k_weight[level], level, first),
                self._sums(v, self.v_weight[level], level, first),
                None if count is None else self._counts(count, level, first),
            )
            # a group that is only begun is kept as its running sum, without the bias
            if pending and (begun := pending[level]) is not None:
                head = sums.cut(0, 1)
                total = None if begun.count is None or head.count is None else begun.count + head.count
                sums = Groups(begun.k + head.k, begun.v + head.v, total).join(sums.cut(1))
            done = (first + k.shape[2] >> level) - (first >> level)
            whole, rest = sums.cut(0, done), sums.cut(done)
            k_bias, v_bias = self.k_bias[level].to(k.dtype), self.v_bias[level].to(k.dtype)
            levels.append(Groups(whole.k + k_bias, whole.v + v_bias, whole.count))
            waiting.append(rest if len(rest) else None)
        return levels, waiting

    def _sums(self, x: Tensor, weight: Tensor, level: int, first: int) -> Tensor:
        """Filtered sums over the groups that the new blocks touch; the first and the last may be parts."""
        span = 1 << level
        x = nn.functional.pad(x, (0, 0, 0, 0, first % span, -(first + x.shape[2]) % span))
        return torch.einsum("ptd,bgntd->bgnpd", weight.to(x.dtype), x.unflatten(2, (-1, span)).flatten(3, 4))

    def _counts(self, count: Tensor, level: int, first: int) -> Tensor:
        """Tokens per row of the same groups."""
        span = 1 << level
        count = nn.functional.pad(count, (0, 0, first % span, -(first + count.shape[2]) % span))
        count = count.unflatten(2, (-1, span)).flatten(3, 4)
        return count.unflatten(3, (self.k_bias.shape[1], -1)).sum(4)


class StridedPool(Pool):
    """Each row is one token of its segment, another one in each head: exact attention to a part of the tokens, of which
    the heads together miss little, as those of dilated attention (LongNet, arXiv:2307.02486).

    Of each row's c tokens on level 1 head h has token h mod c; of its two children on level l + 1 the one that bit
    l - 1 of h / c says. While a row stands for at most as many tokens as there are heads, one of them has each. Beyond,
    which one is drawn at random when the pool is made, other ones in each layer, and kept in checkpoints. No
    parameters.

    With the bias log c a row weighs c e^(q . k) for its token: on average over the c tokens that it could be, what they
    weigh together, where a mean key has less (Jensen).

    A row that lacks its token or child is the mean of what there is.

    Args:
        heads: G.
        rank: p.
        block: m.
    """

    levels = 48  # that there are choices for: more than there can be
    leaf_place: Tensor  # [G]
    pair_place: Tensor  # [levels, G]

    def __init__(self, heads: int, rank: int, block: int):
        super().__init__()
        leaf, pair = _places(heads, rank, block, self.levels)
        self.register_buffer("leaf_place", leaf)
        self.register_buffer("pair_place", pair)
        self.made_for = {"kv_heads": heads, "block/rank": block // rank}

    def leaf(self, k, v, count, rank):
        k, v = (x.unflatten(3, (rank, -1)) for x in (k, v))
        return self._chosen(k, v, None if count is None else count.unflatten(3, (rank, -1)), self.leaf_place)

    def parent(self, pairs, height):
        k, v = (_segments(x).unflatten(3, (-1, 2)) for x in (pairs.k, pairs.v))
        count = None if pairs.count is None else _segments(pairs.count).unflatten(3, (-1, 2))
        return self._chosen(k, v, count, self.pair_place[height - 1])

    def _chosen(self, k: Tensor, v: Tensor, count: Tensor | None, place: Tensor) -> Groups:
        """Rows of k [B, G, N, p, j, D] and v, which count [B|1, 1, N, p, j] tokens each."""
        if count is None:
            at = place[:, None, None, None, None]
            return Groups(*(x.take_along_dim(at[None], 4).squeeze(4) for x in (k, v)))
        share, total = _shares(count)
        own = nn.functional.one_hot(place, count.shape[-1])[:, None, None].to(share.dtype)
        share = torch.where(((count > 0) & (own > 0)).any(-1, keepdim=True), own, share)
        k, v = (torch.einsum("bgnpj,bgnpjd->bgnpd", share.expand(x.shape[0], -1, -1, -1, -1), x) for x in (k, v))
        return Groups(k, v, total)


def _places(heads: int, rank: int, block: int, levels: int) -> tuple[Int[Tensor, " G"], Int[Tensor, "levels G"]]:
    """Which token of a row each head begins with, and which child on each level above; see StridedPool."""
    check_rank(block, rank)
    each, h = block // rank, torch.arange(heads)
    # drawn from where the generator stands, so other in each layer, without moving it: all else is drawn as ever
    with torch.random.fork_rng(devices=[]):
        leaf = h % each if each <= heads else torch.randperm(each)[:heads]
        drawn = torch.randint(2, (levels, heads))
    return leaf, torch.stack([h // each >> n & 1 if each << n < heads else drawn[n] for n in range(levels)])


class DensePool(Pool):
    """A strided convolution with a full matrix for every token: rows that can hold their tokens side by side.

        row[s] = sum_j token[s c + j] M[j],    c = m / p, on level 1
        row[s] = sum_j child[2 s + j] W[l, j], j < 2, on level l + 1; from level 4 on always the matrices of level 4

    A mean cannot say which of its tokens was which. With other matrices for each token the row's subspaces can: one
    head may read the first of c tokens and another the second, or one head c of them, a part of the width each. K and
    V have matrices of their own, each key head too; no bias. What is learned is their distance from the start, as a
    multiple of 1 / sqrt(c D) (1 / sqrt(2 D) for children).

    Tokens that are missing leave their weight to the others of their row, whose sum is then multiplied by c and
    divided by their number; children likewise, by the tokens that they stand for.

    Cost: a product with D x D for each token and, with all further levels together, for each two rows of level 1.

    Args:
        heads: G.
        rank: p.
        width, value_width: D and E.
        block: m.
        strided: start as StridedPool; otherwise as the mean.
    """

    apart = 3  # levels of parents that have matrices of their own
    leaf_start: Tensor  # [G, c] of 0 and 1: the tokens whose mean a head starts with
    pair_start: Tensor  # [3, G, 2], children

    def __init__(self, heads: int, rank: int, width: int, value_width: int, block: int, *, strided: bool = False):
        super().__init__()
        each = block // rank
        leaf, pair = _places(heads, rank, block, self.apart)
        for name, place, many in (("leaf", leaf, each), ("pair", pair, 2)):
            start = nn.functional.one_hot(place, many).float()
            self.register_buffer(f"{name}_start", start if strided else torch.ones_like(start))
        self.k_leaf, self.v_leaf = (nn.Parameter(torch.zeros(heads, each, n, n)) for n in (width, value_width))
        self.k_pair, self.v_pair = (nn.Parameter(torch.zeros(self.apart, heads, 2, n, n)) for n in (width, value_width))
        self.made_for = {"kv_heads": heads, "width": width, "value_width": value_width, "block/rank": each}

    def leaf(self, k, v, count, rank):
        k, v = (x.unflatten(3, (rank, -1)) for x in (k, v))
        count = None if count is None else count.unflatten(3, (rank, -1))
        return self._mixed(k, v, count, self.leaf_start, self.k_leaf, self.v_leaf)

    def parent(self, pairs, height):
        k, v = (_segments(x).unflatten(3, (-1, 2)) for x in (pairs.k, pairs.v))
        count = None if pairs.count is None else _segments(pairs.count).unflatten(3, (-1, 2))
        level = min(height, self.apart) - 1
        return self._mixed(k, v, count, self.pair_start[level], self.k_pair[level], self.v_pair[level])

    def _mixed(self, k: Tensor, v: Tensor, count: Tensor | None, start: Tensor, *learned: Tensor) -> Groups:
        """Rows of k [B, G, N, p, j, D] and v, which count [B|1, 1, N, p, j] tokens each."""
        total = None
        if count is not None:
            share, total = _shares(count)
            k, v = (x * (share * count.shape[-1])[..., None] for x in (k, v))
        k, v = (
            # one product for each head, j D numbers deep
            (x.flatten(4).flatten(2, 3) @ _matrices(start, y).to(x.dtype).flatten(1, 2)).unflatten(2, x.shape[2:4])
            for x, y in zip((k, v), learned, strict=True)
        )
        return Groups(k, v, total)


def _matrices(start: Float[Tensor, "G j"], learned: Float[Tensor, "G j D D"]) -> Float[Tensor, "G j D D"]:
    """The mean of those that `start` says, and what is learned on top."""
    many, width = learned.shape[1:3]
    share = start / start.sum(-1, keepdim=True)
    eye = torch.eye(width, dtype=start.dtype, device=start.device)
    return share[:, :, None, None] * eye + learned / math.sqrt(many * width)


# by name, the sizes that a pool's parameters need
POOLS: dict[str, tuple[str, ...]] = {
    "mean": (),
    "learned": ("kv_heads",),
    "conv": ("width", "levels"),
    "softmax": ("kv_heads", "width"),
    "softmax-whole": ("kv_heads", "width"),
    "strided": ("kv_heads",),
    "dense": ("kv_heads", "width"),
    "dense-strided": ("kv_heads", "width"),
}


def make_pool(name: str, block: int, rank: int, sizes: Mapping[str, int | None]) -> Pool:
    """The pool of this name.

    Args:
        sizes: kv_heads, width, value_width and levels, as far as they are known; POOLS says who needs which.

    Raises:
        ValueError: no such pool, or a size that its parameters need is missing.
    """
    given = {size: n for size, n in sizes.items() if n is not None}
    if not isinstance(name, str) or name not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)} or a Pool, got {name!r}")
    if missing := [size for size in POOLS[name] if size not in given]:
        raise ValueError(f"pool={name!r} has parameters and needs {' and '.join(missing)}")
    if name == "learned":
        return FilterPool(given["kv_heads"], rank)
    if name == "conv":
        width = given["width"]
        return ConvPool(rank, width, given.get("value_width", width), block, given["levels"])
    if name == "strided":
        return StridedPool(given["kv_heads"], rank, block)
    if name.startswith("dense"):
        heads, width = given["kv_heads"], given["width"]
        sizes_of_rows = width, given.get("value_width", width)
        return DensePool(heads, rank, *sizes_of_rows, block, strided=name == "dense-strided")
    if name.startswith("softmax"):
        return SoftmaxPool(given["kv_heads"], rank, given["width"], whole=name == "softmax-whole")
    return MeanPool()


def summarize(rows: Rows, *, block: int = 64, rank: int = 16, pool: Pool | None = None) -> Rows:
    """The pyramid over `rows` that the far layout of `select.multipole` reads: coarser and coarser, down to two groups.

    Level l has ceil(S / (block * 2^(l-1))) groups of `rank` rows, in order; the last group of a level may be partial
    and is pooled over what is there. Rows carry the log of their token count as bias, so that a summary of c tokens
    with equal logits weighs as c; a row that stands for no token is hidden. Differentiable.

    Args:
        rows: tokens; their bias, groups and ends are not read.
        block: tokens of a group of level 1; a multiple of `rank`.
        rank: rows of a group.
        pool: how rows are made; default MeanPool().

    Returns:
        Rows with `end` (last token of each row), `bias` and the levels' `offsets`; in the dtype of `rows`.

    Raises:
        ValueError: `rank` does not divide `block`, the pool was made for other sizes, or k and v do not fit together.
        TypeError: no Rows, or no Pool, or k and v are not floating point of one dtype.

    Source: Fast Multipole Attention (arXiv:2310.11960); filters from child to parent, softmax pooling and the
    hierarchy of means are ours.
    """
    if not isinstance(rows, Rows):
        raise TypeError(f"summarize: rows must be Rows, as in Rows(k, v), got {type(rows).__name__}")
    if not isinstance(pool, Pool | None):
        raise TypeError(f"summarize: pool must be a Pool, such as MeanPool(), got {pool!r}")
    check_kv("summarize", rows.k, rows.v)
    check_rank(block, rank)
    pool, tokens = pool or MeanPool(), len(rows)
    blocks = -(-tokens // block)
    levels = depth(blocks)
    if not levels:
        return Rows(rows.k[:, :, :0], rows.v[:, :, :0])
    if pool.most is not None and pool.most < levels:
        raise ValueError(f"summarize: {tokens} tokens make {levels} levels, but the pool has {pool.most}; give it more")
    tree = Tree(block, rank, blocks, levels, complete=False, lo=0, hi=tokens)
    found = pyramid(pool, rows.k, rows.v, tree)
    offsets = tuple(rank * n for n in accumulate(tree.groups[:-1], initial=0))
    end = found.span[1].clamp(max=tokens - 1)
    return Rows(found.far_k, found.far_v, end=end, bias=found.bias, offsets=offsets)


def pyramid(
    pool: Pool,
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S E"],
    tree: Tree,
    present: Bool[Tensor, "#B S"] | None = None,
) -> Pooled:
    """All rows of `tree` in one buffer, by the kernels of ops.pool where they take the call.

    Args:
        present: leaves further tokens out.
    """
    learned = isinstance(pool, FilterPool)
    linear = present is None and (learned or type(pool) is MeanPool)
    pool.check(_sizes(k, v, tree.block, tree.rank))
    if linear and not op.refusal(k, v, tree.rank, learned=learned):
        return op.pool(k, v, pool.filters()[0] if isinstance(pool, FilterPool) else None, tree)
    # so many blocks that every level is made of whole groups
    padded = tree.blocks if tree.complete else tree.groups[-1] << (tree.levels - 1)
    blocks_k, blocks_v = (to_blocks(x, tree.block, padded) for x in (k, v))
    count = None
    if present is not None or tree.lo or tree.hi < padded * tree.block:
        at = torch.arange(padded * tree.block, device=k.device)
        there = ((at >= tree.lo) & (at < tree.hi))[None]
        if present is not None:
            there = there & nn.functional.pad(present, (0, max(padded * tree.block - k.shape[2], 0)))
        count = there.to(blocks_k.dtype).unflatten(1, (padded, tree.block))[:, None]
    found = pool.grow(blocks_k, blocks_v, count, rank=tree.rank, first=0, pending=(), levels=tree.levels)[0]
    found = [groups.cut(0, n) for groups, n in zip(found, tree.groups, strict=False)]
    # the tokens before the levels
    far = [[nn.functional.pad(x[:, :, : tree.lo], (0, 0, 0, tree.lead - tree.lo))] if tree.lo else [] for x in (k, v)]
    bias = []
    at = torch.arange(tree.lead, device=k.device)
    span = [torch.stack([at, at])]
    if tree.lo:
        bias.append(torch.zeros_like(at, dtype=blocks_k.dtype).masked_fill(at >= tree.lo, float("-inf"))[None, None])
    for height, groups in enumerate(found):
        for xs, x, like in zip(far, (groups.k, groups.v), (k, v), strict=True):
            xs.append(x.flatten(2, 3).to(like.dtype))
        each = math.log((tree.block << height) / tree.rank)
        known = blocks_k.new_full((1, 1, len(groups) * tree.rank), each)
        bias.append(known if groups.count is None else groups.count.log().flatten(2))
        start, end = span_of_rows(torch.arange(len(groups), device=k.device), height, tree.block, tree.rank, pool.whole)
        span.append(torch.stack([start, end - 1]))
    far_k, far_v = (torch.cat(xs, 2) for xs in far)
    batch = next((x.shape[0] for x in bias if x.shape[0] != 1), 1)
    bias = torch.cat([x.expand(batch, -1, -1) for x in bias], 2)
    return Pooled(k, v, far_k, far_v, bias, torch.cat(span, 1))


def to_blocks(x: Float[Tensor, "B G S D"], block: int, blocks: int) -> Float[Tensor, "B G N m D"]:
    """The first `blocks` blocks of tokens, filled up with 0 where there are none, in float32 or wider."""
    x = x[:, :, : blocks * block].to(torch.promote_types(x.dtype, torch.float32))
    if short := blocks * block - x.shape[2]:
        x = nn.functional.pad(x, (0, 0, 0, short))
    return x.unflatten(2, (blocks, block))


def span_of_rows(
    group: Int[Tensor, "*batch N"], level: int, block: int, rank: int, whole: bool
) -> tuple[Int[Tensor, "*batch R"], Int[Tensor, "*batch R"]]:
    """First token and one past the last token of each row of these groups; `level` counts from 0."""
    width = block << level
    if whole:
        start = (group * width)[..., None].expand(*group.shape, rank).flatten(-2)
        return start, start + width
    segment = width // rank
    start = (group[..., None] * width + torch.arange(rank, device=group.device) * segment).flatten(-2)
    return start, start + segment


def check_rank(block: int, rank: int) -> None:
    """Raise ValueError unless a group of `block` tokens splits into `rank` rows."""
    if block < 1 or rank < 1 or block % rank:
        raise ValueError(
            f"rank must divide block, so that every row stands for as many tokens; got block={block}, rank={rank}"
        )


def _sizes(k: Tensor, v: Tensor, block: int, rank: int) -> dict[str, int]:
    """What pools are made for, of k [B, G, ..., D] and v [B, G, ..., E]."""
    rows = {"kv_heads": k.shape[1], "width": k.shape[-1], "value_width": v.shape[-1]}
    return rows | {"block": block, "rank": rank, "block/rank": block // rank}


def _segments(x: Float[Tensor, "B G N2 p *D"]) -> Float[Tensor, "B G N p2 *D"]:
    """The rows of groups 2n and 2n + 1 behind each other."""
    return x.unflatten(2, (-1, 2)).flatten(3, 4)


def _shares(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights divided by their sum over the last dimension, 0 where there is nothing to divide; and the sum."""
    total = weights.sum(-1)
    empty = total == 0
    return weights / total.masked_fill(empty, 1.0)[..., None], total


def _softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """Softmax that gives 0, and no gradient, where every logit is -inf."""
    dead = (logits == float("-inf")).all(dim, keepdim=True)
    return logits.masked_fill(dead, 0.0).softmax(dim).masked_fill(dead, 0.0)


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    """logsumexp that gives -inf, and no gradient, where every logit is -inf."""
    dead = (logits == float("-inf")).all(dim)
    return logits.masked_fill(dead.unsqueeze(dim), 0.0).logsumexp(dim).masked_fill(dead, float("-inf"))
