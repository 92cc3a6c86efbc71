"""Fast Multipole Attention: near tokens exactly, far tokens through ever coarser summaries, one softmax over all.

    near(i)  = tokens of i's block and of the near / m blocks to each side (causal: before it), one by one
    far(i)   = groups of width m 2^(l-1), l = 1, 2, ..., p rows each: the children of the parent's neighbours that
               are no neighbours themselves, so that every token is covered exactly once
    s[i, r]  = scale * q[i] . k[r] + log(tokens that r stands for)
    out[i]   = sum over near(i) and far(i) of softmax(s[i])[r] v[r]

O(n log n): a causal query reads near + m / 2 tokens and 1.5 p log2(n / m) summaries or so. With `queries="pooled"`
(noncausal) the far field is read by summaries of the queries too, and the whole is O(n). Causal decoding keeps
near + m tokens and at most 4 p summaries a level: O(log n).

An average hides the single far token that matters. With `open=k` each query opens the k groups of level 1 that could
hide most from it, as `farfield.select.opened` finds them on the way down the tree: it reads these token by token, and
the summaries of all else. Still every token is covered exactly once; k = 0 is the above, and with k = all it is full
attention. A query then reads near + m / 2 + k m tokens and at most p (1.5 + k) log2(n / m) summaries, and decoding
keeps everything: the tokens, in host memory if wanted, all summaries, and the sketches that are chosen by. `extend`
takes chunks of any length; single tokens go faster through the fixed buffers of `ring`.

With `horizon=h` the tree ends at the level L that a sequence of h tokens needs. A query then reads the sinks and all
tokens from the start of the r-th group of m 2^L tokens before its own on, r = near / (m 2^L) rounded up, and nothing
before them; noncausal, up to the end of the r-th group after its own. Sequences of up to h tokens are read whole. The
whole costs O(n), and decoding keeps O(log h), with `open=k` O(h).

Departs from the paper:
- The default pooling is the mean of segments and builds each level from the one below; "conv" is the paper's grouped
  convolution, one filter a level, here starting as the mean. The multiplicity bias, an option there, is always on.
- Slots outside the sequence are left out; in the published code they take softmax mass as zero keys.
- Any length; the near field may be wider than a block; sinks, packed documents and rotary positions are ours. Keys
  are pooled before they are rotated, and a summary is rotated to its centre: the mean of c rotated keys has lost the
  frequencies above 1 / c. In a small model the two could not be told apart (results/h200/rotation.md).
- Pooled queries: the paper states the O(n) cost only. Here the mean query of a sub-block reads the level, and its
  result is handed down to the sub-blocks below. Causal pooled queries are refused: a pooled query holds tokens later
  than the first it would answer for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from farfield import opened_room
from farfield.mechanism import Case, Mechanism, Paper, Rotary, State, Supports, check_plain, no_tokens
from farfield.opened_ring import OpenedRing
from farfield.ops import growth
from farfield.ops import multipole as whole
from farfield.ops import opened as on_gpu
from farfield.ops.attend import attend
from farfield.ops.merge import merge
from farfield.ops.pool import Tree
from farfield.packing import Packing
from farfield.ring import FMARing
from farfield.select import opened
from farfield.select.static import depth, far_lists, multipole, near_lists, pack_lists, radii, tree_lists
from farfield.state import appended
from farfield.summarize import (
    Groups,
    MeanPool,
    Pool,
    StridedPool,
    check_rank,
    make_pool,
    pyramid,
    span_of_rows,
    summarize,
    to_blocks,
)
from farfield.types import Layout, Partial, Rows

PIECE = 1 << 14  # queries at once that open groups each for itself


@dataclass(frozen=True)
class Level:
    """The summaries of one level that a later query can still read: groups `first`, first + 1, ..."""

    first: int
    k: Tensor  # [B, G, N * p, D]
    v: Tensor
    bias: Tensor | None  # [B, 1, N * p]; None: all groups are alike

    def join(self, other: Level) -> Level:
        bias = None if self.bias is None or other.bias is None else torch.cat([self.bias, other.bias], 2)
        return Level(self.first, torch.cat([self.k, other.k], 2), torch.cat([self.v, other.v], 2), bias)

    def head(self, rows: int) -> Level:
        """The first rows."""
        bias = None if self.bias is None else self.bias[:, :, :rows]
        return Level(self.first, self.k[:, :, :rows], self.v[:, :, :rows], bias)

    def after(self, groups: int, rank: int) -> Level:
        """Without the first groups, and without keeping their memory alive."""
        rows = groups * rank
        bias = None if self.bias is None else _after(self.bias, rows)
        return Level(self.first + groups, _after(self.k, rows), _after(self.v, rows), bias)


@dataclass(frozen=True)
class Grown:
    """What the pool needs to go on after so many blocks."""

    blocks: int
    pending: tuple[Groups | None, ...]


@dataclass(frozen=True)
class FMAState(State):
    """At most near + m tokens, one by one, and at most 4 p rows a level; more by what `rewind` asks for."""

    block: int
    near: int
    rank: int
    first: int  # the block that `k` and `v` start with
    k: Tensor  # [B, G, tokens - first * block, D], not rotated
    v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    levels: tuple[Level, ...]
    grown: tuple[Grown, ...]  # oldest first, without gaps
    most: int = field(default=whole.LEVELS, kw_only=True)  # levels at most

    @property
    def rows(self) -> int:
        """Rows of k held, of any kind; as many of v."""
        waiting = sum(len(x) for grown in self.grown for x in grown.pending if x is not None)
        return self.k.shape[2] + self.sink_k.shape[2] + sum(x.k.shape[2] for x in self.levels) + waiting * self.rank

    def crop(self, drop: int) -> FMAState:
        """The state before the last `drop` tokens.

        Raises:
            ValueError: tokens that the earlier state needs are summarized and gone; `rewind` says how far one can go.
        """
        keep = self.left(drop)
        blocks = _summarized(keep, self.block, self.near)
        if blocks < self.grown[0].blocks:
            oldest = self.grown[0].blocks + self.near // self.block
            raise self.forgotten(drop, self.tokens - oldest * self.block - 1)
        rows = keep - self.first * self.block
        groups = (max((blocks >> height) - level.first, 0) for height, level in enumerate(self.levels))
        levels = (level.head(n * self.rank) for level, n in zip(self.levels, groups, strict=True))
        return replace(
            self,
            tokens=keep,
            k=self.k[:, :, :rows],
            v=self.v[:, :, :rows],
            sink_k=self.sink_k[:, :, :keep],
            sink_v=self.sink_v[:, :, :keep],
            levels=tuple(levels),
            grown=tuple(g for g in self.grown if g.blocks <= blocks),
        )


PLAIN = tuple(f.name for f in fields(FMAState))  # told here, since torch.compile does not follow `fields` of a class


@dataclass(frozen=True)
class OpenedState(FMAState):
    """As FMAState with nothing forgotten within the horizon, and what opening needs beside it."""

    all_k: Tensor  # [B, G, tokens - begin * block, D], rotated
    all_v: Tensor
    hold: int
    askers: Tensor  # [B, H, as many / hold, D], the query that chooses for each run, rotated; none where each does
    sketches: tuple[opened.Sketch, ...]  # of the summarized blocks from `begin` on
    begin: int = 0  # blocks that are forgotten, whole groups of every level

    @property
    def host_nbytes(self) -> int:
        """Bytes of the tokens that are kept away from everything else, in host memory."""
        return self.all_k.nbytes + self.all_v.nbytes if self.all_k.device != self.k.device else 0

    def to_host(self) -> OpenedState:
        """The state with all tokens in host memory, pinned if the rest is on a GPU; `extend` goes on with it.

        A call of `extend` brings the tokens to the device and lets them go again, which suits chunks of a prompt. Token
        by token decode from `FMA.ring(state, store="host")`, which fetches what is opened alone.
        """
        pinned = self.k.is_cuda
        held = (torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned).copy_(x) for x in (self.all_k, self.all_v))
        all_k, all_v = held
        # near tokens may lie among all of them
        return replace(self, all_k=all_k, all_v=all_v, k=_after(self.k, 0), v=_after(self.v, 0))

    def crop(self, drop: int) -> OpenedState:
        state = super().crop(drop)
        assert isinstance(state, OpenedState)
        blocks = _summarized(state.tokens, self.block, self.near)
        counted = ((blocks >> height) - (self.begin >> height) for height in range(len(self.sketches)))
        sketches = (opened.cut(x, 0, n) for n, x in zip(counted, self.sketches, strict=True))
        keep = state.tokens - self.begin * self.block
        return replace(
            state,
            all_k=self.all_k[:, :, :keep],
            all_v=self.all_v[:, :, :keep],
            askers=self.askers[:, :, : -(-keep // self.hold)],
            sketches=tuple(sketches),
        )

    def after(self, begin: int) -> OpenedState:
        """Without the blocks before `begin`, and without keeping their memory alive."""
        blocks = begin - self.begin
        tokens = blocks * self.block
        levels = (x.after((begin >> height) - x.first, self.rank) for height, x in enumerate(self.levels))
        sketches = (
            opened.Sketch(*(_after(y, blocks >> height) for y in (x.rows, x.count)))
            for height, x in enumerate(self.sketches)
        )
        return replace(
            self,
            levels=tuple(levels),
            all_k=_after_there(self.all_k, tokens),
            all_v=_after_there(self.all_v, tokens),
            askers=_after(self.askers, tokens // self.hold if self.hold > 1 else 0),
            sketches=tuple(sketches),
            begin=begin,
        )


class FMA(Mechanism):
    """Fast Multipole Attention.

    Args:
        block: m, tokens of a query block and of the finest group.
        near: tokens read one by one to each side at least; a multiple of `block`. The paper has near = block.
        rank: p, rows of a group; divides `block`.
        pool: "mean"; "learned" (FilterPool: child -> parent filters); "conv" (ConvPool: the paper's); "softmax" and
            "softmax-whole" (SoftmaxPool over segments or over whole groups); "strided" (StridedPool: every so many-th
            token, another one in each head); "dense" and "dense-strided" (DensePool: a matrix for each token of a row,
            starting as the mean or as strided); or a Pool.
        sinks: the first tokens of each document are read one by one by every later query; at most `block`.
        queries: "kept", or "pooled" for the O(n) form (noncausal).
        rewind: tokens that `state.crop` can go back across summaries; the state grows by as many tokens.
        horizon: how far back to read, in tokens: no further levels than a sequence of so many has, more than near +
            block. Of longer ones a query sees the sinks and its last h / 2 to h tokens or, where h is no power of 2, up
            to 2 h; see above. Default: everything.
        open: k, groups of level 1 that each query opens; may be changed at any time (`mech.open = 0`), except that
            a state made with 0 cannot go on with more.
        beam: groups of each coarser level that a query looks into on its way; at least `open`. Default 2 open.
        score: what a group could hide: "mean", "peak", "box", "ball", or "learned" with a weight for each key head and
            channel, which `score_loss` teaches; see farfield.select.opened. Trained models do best with means; "peak"
            finds the single key that is like no other near it.
        detail: rows of a group's sketch, each for a segment of it; divides `block`. Default 16, means of 4 keys in
            blocks of 64; of other blocks the largest number that divides both.
        segments: a group scores what the "best" of its segments scores, or their "sum" as the softmax has it, which
            with means is nearer to what it holds.
        shared: the query heads of a key head open the same groups; otherwise each its own.
        hold: so many queries in a row open the same groups, chosen by the first of them; divides `block`. Choosing
            then costs 1 / hold, and a GPU reads what is opened as it reads what is near, in tiles of 64 queries, where
            hold times the heads that choose together is a multiple of 64 and hold is 8 at least.
        tolerance: opens so many more groups that no output is farther from full attention's than this; see `certify`.
        level_bias: a learned number for each key head and level, added to the logits of its summaries. It starts at 0,
            or at the number that is given, such as -1 for a model that was trained without summaries.
        kv_heads, width, value_width, levels: G, D, E and the number of levels, for what has parameters:
            learned and strided (kv_heads), softmax (kv_heads, width), dense (kv_heads, width, value_width), conv
            (width, value_width, levels), level_bias (kv_heads, levels), score="learned" (kv_heads, width).
    """

    paper = Paper(
        title="Fast Multipole Attention: A Scalable Multilevel Attention Mechanism for Text and Images",
        authors="Kang, Tran, De Sterck",
        year=2023,
        arxiv="2310.11960",
        code="github.com/yanmingk/FMA",
    )
    decodes = (FMARing, OpenedRing)
    remembers = FMAState
    cases = (
        Case(options={"block": 8, "near": 16, "rank": 4}, tokens=197, block=8),
        Case(options={"block": 16, "near": 16, "rank": 8, "sinks": 3}, tokens=150),
        Case(options={"block": 4, "near": 8, "rank": 2, "causal": False, "sinks": 2}, tokens=101, block=4),
        Case(options={"block": 8, "near": 8, "rank": 4, "causal": False, "queries": "pooled"}, tokens=131, block=8),
        Case(
            options={
                "block": 4,
                "near": 8,
                "rank": 2,
                "sinks": 3,
                "open": 2,
                "beam": 3,
                "hold": 2,
                "score": "box",
                "segments": "sum",
                "level_bias": True,
                "kv_heads": 2,
                "levels": 5,
            },
            tokens=90,
            block=4,
        ),
        Case(
            options={"block": 8, "near": 8, "rank": 2, "sinks": 3, "pool": "strided", "kv_heads": 2},
            tokens=150,
            block=8,
        ),
        Case(
            options={"block": 8, "near": 8, "rank": 2, "causal": False, "open": 1, "shared": False},
            tokens=77,
            block=8,
        ),
        Case(options={"block": 4, "near": 8, "rank": 2, "sinks": 3, "open": 1, "horizon": 24}, tokens=90, block=4),
    )
    supports = Supports(packed=True, rotary=True)

    def __init__(
        self,
        *,
        block: int = 64,
        near: int = 128,
        rank: int = 16,
        pool: str | Pool = "mean",
        sinks: int = 0,
        queries: str = "kept",
        rewind: int = 0,
        horizon: int | None = None,
        open: int = 0,
        beam: int | None = None,
        score: str = "mean",
        detail: int | None = None,
        segments: str = "best",
        shared: bool = True,
        hold: int = 1,
        level_bias: bool | float = False,
        tolerance: float | None = None,
        causal: bool = True,
        scale: float | None = None,
        kv_heads: int | None = None,
        width: int | None = None,
        value_width: int | None = None,
        levels: int | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        check_rank(block, rank)
        radii(near, block, 0)
        if not 0 <= sinks <= block:
            raise ValueError(f"fma: sinks must lie in 0 .. block={block}, got {sinks}")
        if queries not in ("kept", "pooled"):
            raise ValueError(f"fma: queries must be 'kept' or 'pooled', got {queries!r}")
        if queries == "pooled" and causal:
            raise NotImplementedError(
                "fma: a pooled query holds tokens later than the first it answers for, which would leak the future; "
                "use queries='kept' for causal attention"
            )
        if rewind < 0:
            raise ValueError(f"fma: rewind must not be negative, got {rewind}")
        self.block, self.near, self.rank, self.sinks = block, near, rank, sinks
        self.queries, self.rewind, self._horizon = queries, rewind, horizon
        # levels at most
        self.most = whole.LEVELS if horizon is None else whole.reached(-(-horizon // block), near // block)
        if not self.most:
            raise ValueError(
                f"fma: horizon={horizon} leaves no far field; it must be more than near + block = {near + block}, or "
                "use the mechanism window"
            )
        self.open, self.beam, self.score, self.shared, self.hold = open, beam, score, shared, hold
        self.detail, self.segments = math.gcd(16, block) if detail is None else detail, segments
        self._check_opening()
        if queries == "pooled":
            self.supports = replace(self.supports, packed=False)
        if open:
            # boxes and variances are those of rotated keys
            relative = score not in ("box", "learned")
            self.supports = replace(self.supports, heads_apart=not shared, relative=relative)
        sizes = {"kv_heads": kv_heads, "width": width, "value_width": value_width, "levels": levels}
        if any(n is not None and n < 1 for n in sizes.values()):
            raise ValueError(f"fma: kv_heads, width, value_width and levels must be at least 1, got {sizes}")
        self.pool = pool if isinstance(pool, Pool) else make_pool(pool, block, rank, sizes)
        self.biased, self.tolerance = level_bias is not False, tolerance
        if tolerance is not None:
            if tolerance < 0:
                raise ValueError(f"fma: tolerance must not be negative, got {tolerance}")
            self.supports = replace(self.supports, packed=False, rotary=False, decode=False)
        if self.biased:
            if kv_heads is None or levels is None:
                raise ValueError("fma: level_bias has parameters and needs kv_heads and levels")
            begin = 0.0 if level_bias is True else float(level_bias)
            self.level_bias = nn.Parameter(torch.full((kv_heads, levels), begin))
        if score == "learned":
            if kv_heads is None or width is None:
                raise ValueError("fma: score='learned' has parameters and needs kv_heads and width")
            self.spread = nn.Parameter(torch.full((kv_heads, width), 0.5))

    @property
    def horizon(self) -> int | None:
        """How far back to read; another one needs another mechanism, since states and rings are made for it."""
        return self._horizon

    def _scale(self, q: Tensor) -> float:
        """What the products of queries and keys are multiplied by."""
        return q.shape[-1] ** -0.5 if self.scale is None else float(self.scale)

    def check(self, q, k, v, **others):
        super().check(q, k, v, **others)
        heads, width = k.shape[1], k.shape[3]
        if self.biased and len(self.level_bias) != heads:
            raise ValueError(f"fma: level_bias was made for kv_heads={len(self.level_bias)}, but k has {heads} heads")
        if self.score == "learned" and self.spread.shape != (heads, width):
            raise ValueError(
                f"fma: score='learned' was made for kv_heads, width = {list(self.spread.shape)}, but k has "
                f"{[heads, width]}"
            )

    def _check_opening(self) -> None:
        for name in ("open", "beam"):
            # may be changed at any time
            if type(value := getattr(self, name)) is not int:
                check_plain("fma", name, "int | None" if name == "beam" else "int", value)
        if self.open < 0 or (self.beam is not None and self.beam < self.open):
            raise ValueError(
                f"fma: open must not be negative and beam at least open, got open={self.open}, beam={self.beam}"
            )
        if self.score not in opened.SCORES:
            raise ValueError(f"fma: score must be one of {', '.join(opened.SCORES)}, got {self.score!r}")
        if self.detail < 1 or self.block % self.detail:
            raise ValueError(f"fma: detail must divide block={self.block}, got {self.detail}")
        if self.segments not in ("best", "sum"):
            raise ValueError(f"fma: segments must be 'best' or 'sum', got {self.segments!r}")
        if self.hold < 1 or self.block % self.hold:
            raise ValueError(f"fma: hold must divide block={self.block}, got {self.hold}")
        if self.open and self.queries == "pooled":
            raise NotImplementedError("fma: pooled queries choose no groups; use queries='kept' with open")

    def forward(self, q, k, v, *, group=None, rotary=None):
        field = None
        if group is None and rotary is None and self._means():
            field = whole.Field(self.block, self.near, self.rank, self.sinks, self.most)
            out = whole.again(q, k, v, field, self.scale)
            if out is not None:
                return out
        self.check(q, k, v, group=group, rotary=rotary)
        if not q.shape[2]:
            return no_tokens(q, v)
        if self.tolerance is not None:
            if group is not None or rotary is not None:
                raise NotImplementedError("fma: tolerance is not proven for packed documents, nor for rotary positions")
            if self._levels(-(-q.shape[2] // self.block))[0]:
                return self.certify(q, k, v)[0]
        if group is not None:
            return self._packed(q, k, v, Packing(group, self.block), rotary)
        if field is not None and not whole.refusal(q, k, v, field, self.scale):
            return whole.multipole(q, k, v, field, self.scale)
        blocks, kept = -(-q.shape[2] // self.block), self.queries == "kept"
        levels, radius = self._levels(blocks)
        far, starts = None, []
        if levels:
            tree = self._tree(q.shape[2], blocks, levels, radius[0])
            if self.open and rotary is None:
                out = self._at_once(q, k, v, tree)
                if out is not None:
                    return out
            found = pyramid(self.pool, k, v, tree)
            k, v = found.k, found.v
            far_k = found.far_k if rotary is None else rotary(found.far_k, found.span.double().mean(0))
            far = Rows(far_k, found.far_v, bias=self._bias(found.bias, tree.lead, tree.groups))
            starts = list(accumulate(tree.groups[:-1], initial=tree.lead // self.rank))
        turned = q
        if rotary is not None:
            at = torch.arange(q.shape[2], device=q.device)
            turned, k = rotary(q, at), rotary(k, at)
        if self.open and far is not None:
            found = self._quickly(turned, k, v, far, tree)
            if found is not None:
                return found
            sketches = self._sketches(k, tree, self._present(tree, q.device))
            where = opened.place(0, q.shape[2], self.block, q.device)
            return self._attend_opened(turned, Rows(k, v), far, sketches, where, starts, asking=self._held(turned))[0]
        near_list, far_list = self._lists(starts if kept else (), blocks, q.device)
        sources = [(Rows(k, v), _layout(near_list, q, k, self.block, self.block, self.causal))]
        if far is not None and (kept or self.sinks):
            sources.append((far, _layout(far_list, q, far.k, self.block, self.rank)))
        here = attend(turned, sources, scale=self.scale)
        if kept or far is None:
            return here.out
        handed_down = self._pooled_queries(q, far, starts, blocks, rotary)
        return here.out if handed_down is None else merge(here, handed_down).out

    def _means(self) -> bool:
        """Whether this is what one operation computes, where kernels take it: causal, queries kept, means."""
        # not self.pool, which takes a module as long to find as a kernel to launch
        return (
            not (self.open or self.biased)
            and self.tolerance is None
            and self.causal
            and self.queries == "kept"
            and type(self._modules["pool"]) is MeanPool
        )

    def _at_once(self, q: Tensor, k: Tensor, v: Tensor, tree: Tree) -> Tensor | None:
        """Opened attention of runs of queries that pools and chooses in one pass, None where it has to be two."""
        self._check_opening()
        if type(self._modules["pool"]) is not MeanPool or self.score not in on_gpu.SCORES:
            return None
        plan, scale = self.plan(), self._scale(q)
        if not scale or on_gpu.refusal(q, k, v, tree, plan) or not on_gpu.at_once(q, k, v, tree, plan):
            return None
        (far_k, far_v, bias), near, listed = on_gpu.runs(q, k, v, tree, plan, scale)
        far = Rows(far_k, far_v, bias=self._bias(bias, tree.lead, tree.groups))
        return opened.attend_runs(q, Rows(k, v), far, near, listed, self.hold, self.block, self.rank, scale).out

    def _quickly(self, q: Tensor, k: Tensor, v: Tensor, far: Rows, tree: Tree) -> Tensor | None:
        """Opened attention by kernels of its own, None where they do not take it; q and the keys are rotated."""
        self._check_opening()
        plan, scale = self.plan(), self._scale(q)
        if far.bias is None or self._refused(q, k, v, tree, plan):
            return None
        chosen = on_gpu.choose(q, k, tree, plan, scale)
        if on_gpu.by_tiles(q, k, plan):
            near, listed = on_gpu.lists(*chosen, tree, plan)
            return opened.attend_runs(q, Rows(k, v), far, near, listed, self.hold, self.block, self.rank, scale).out
        return on_gpu.attend(q, k, v, (far.k, far.v, far.bias), chosen, tree, plan, scale)

    def _refused(self, q: Tensor, k: Tensor, v: Tensor, tree: Tree, plan: on_gpu.Plan) -> bool:
        """Whether the kernels of opened groups do not take such a call."""
        if self.score not in on_gpu.SCORES:
            why = f"take score={' or '.join(map(repr, on_gpu.SCORES))}, not {self.score!r}"
        elif not self._scale(q):
            why = "take any scale but 0"
        else:
            why = on_gpu.refusal(q, k, v, tree, plan)
        if why is not None:
            self._slowly(q, why)
        return why is not None

    def _slowly(self, q: Tensor, why: str) -> None:
        """On a GPU a warning that groups are opened without kernels, which `why` says of them; not in float64."""
        if q.is_cuda and q.dtype != torch.float64 and not torch.compiler.is_compiling():
            warnings.warn(
                f"fma: groups are opened by PyTorch operations, with a list for each query, which takes far longer and "
                f"more memory: the kernels {why}",
                stacklevel=3,
            )

    def _sketches(self, k: Tensor, tree: Tree, present: Tensor | None) -> list[opened.Sketch]:
        """Of the blocks of `tree`; present: [1|B, blocks * m], None if all tokens are there."""
        self._check_opening()
        present = None if present is None else present.unflatten(1, (tree.blocks, self.block))
        blocks_k = to_blocks(k.detach(), self.block, tree.blocks)
        return opened.sketch(self.score, blocks_k, present, self.detail, levels=tree.levels, complete=tree.complete)

    def plan(self) -> on_gpu.Plan:
        """How groups are opened, for the kernels."""
        beam = 2 * self.open if self.beam is None else self.beam
        score = on_gpu.SCORES.index(self.score) if self.score in on_gpu.SCORES else 0
        summed = int(self.segments == "sum")
        return on_gpu.Plan(self.near, self.detail, self.open, beam, int(self.shared), self.hold, score, summed)

    def _weight(self) -> Tensor | None:
        """Of the learned score, which the choice passes no gradient to."""
        return self.spread.detach() if self.score == "learned" else None

    def score_loss(self, q: Tensor, k: Tensor, *, queries: int = 64) -> Tensor:
        """How far the learned score is from what the groups hold, in nats.

        The Kullback-Leibler divergence from the groups' shares of exact attention, by the tokens of each, to their
        shares by score, on average over levels, heads and some queries. Add it to what is minimized: only the score's
        weights get a gradient. It takes `queries` times T products a head.

        Args:
            q, k: [B, H, T, D] and [B, G, T, D], as the forward gets them; with `rotary` rotate them before.
            queries: so many, evenly spread over those that have a far field.

        Returns:
            0 where no query has two far groups.

        Raises:
            ValueError: q and k do not fit together or the mechanism, or no queries.
            NotImplementedError: the score is not learned, or attention is not causal.
        """
        if self.score != "learned" or not self.causal:
            raise NotImplementedError(f"fma: only a learned causal score is taught, not score={self.score!r}")
        self.check(q, k, k)
        if queries < 1:
            raise ValueError(f"fma: score_loss needs queries of at least 1, got {queries}")
        tokens, blocks = q.shape[2], -(-q.shape[2] // self.block)
        levels, radius = self._levels(blocks)
        if not levels:
            return self.spread.sum() * 0
        tree = self._tree(tokens, blocks, levels, radius[0])
        sketches = self._sketches(k, tree, self._present(tree, q.device))
        first = (radius[0] + 1) * self.block
        at = torch.linspace(first, tokens - 1, min(queries, tokens - first), device=q.device).long()
        scale = self._scale(q)
        return opened.score_loss(
            q[:, :, at],
            k,
            at,
            self.spread,
            sketches,
            block=self.block,
            radius=radius,
            lead=tree.lo,
            scale=scale,
            summed=self.segments == "sum",
        )

    def auxiliary(self, q, k, v, *, rotary=None):
        if self.score != "learned":
            return None
        if rotary is not None:
            at = torch.arange(q.shape[2], device=q.device)
            q, k = rotary(q, at), rotary(k, at)
        return self.score_loss(q, k)

    def _held(self, q: Tensor) -> Tensor:
        """For each query the one that chooses for it."""
        return q if self.hold == 1 else q[:, :, :: self.hold].repeat_interleave(self.hold, 2)[:, :, : q.shape[2]]

    def _attend_opened(
        self,
        q: Tensor,
        tokens: Rows,
        far: Rows,
        sketches: Sequence[opened.Sketch],
        where: opened.Where,
        starts: Sequence[int],
        first: int = 0,
        *,
        asking: Tensor,
        more: int = 0,
        boxes: opened.Boxes | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Each query's own lists over all tokens and all summaries, and the bound where there are `boxes`.

        q and the keys are rotated; `asking` chooses; `more` groups than `open` are opened.
        """
        scale = self._scale(q)
        sinks = -(-self.sinks // self.rank)
        picks = self.open + more
        beam = 2 * picks if self.beam is None else max(self.beam, picks)
        summed = self.segments == "sum"
        opening = opened.Opening(picks, beam, self.shared, self.detail, sinks, self.causal, summed)
        part, bound = opened.attend_opened(
            q,
            tokens,
            far,
            opened.asked(self.score, asking, scale, self._weight()),
            opened.told(self.score, sketches),
            where,
            opening,
            radius=radii(self.near, self.block, len(starts)),
            groups=[x.rows.shape[2] for x in sketches],
            starts=starts,
            block=self.block,
            rank=self.rank,
            first=first,
            scale=scale,
            boxes=boxes,
        )
        return part.out, bound

    def certify(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and for each query [B, H, T] a bound on its distance from full attention's in any channel.

        With `tolerance` more and more groups are opened, 1, 2, 4, ... of them, for the queries whose bound is above it;
        at the end all. How many that takes is up to the data: the host waits for the device. The proof is that of
        farfield.select.opened.omitted.

        Raises:
            NotImplementedError: the pool is not the mean, there is a level_bias, queries are pooled, the dtype is below
                float32, or the sequence goes beyond the horizon: the proof is not for these.
        """
        self.check(q, k, v)
        if type(self.pool) is not MeanPool or self.biased or self.queries == "pooled":
            raise NotImplementedError("fma: the bound is proven for kept queries and means without a level_bias")
        if torch.finfo(q.dtype).bits < 32:
            raise NotImplementedError(f"fma: the bound needs float32 or float64, got {q.dtype}")
        blocks = -(-q.shape[2] // self.block)
        levels, radius = self._levels(blocks)
        if levels < whole.reached(blocks, self.near // self.block):
            raise NotImplementedError(
                f"fma: the bound is for queries that read everything, but horizon={self.horizon} cuts {q.shape[2]} "
                "tokens short; use a larger one or none"
            )
        if not levels:
            out = self.forward(q, k, v)
            return out, torch.zeros_like(out[..., 0], dtype=torch.float64)
        tree = self._tree(q.shape[2], blocks, levels, radius[0])
        found = pyramid(self.pool, k, v, tree)
        far = Rows(found.far_k, found.far_v, bias=found.bias)
        starts = list(accumulate(tree.groups[:-1], initial=tree.lead // self.rank))
        present = self._present(tree, q.device)
        sketches = self._sketches(k, tree, present)
        present = None if present is None else present.unflatten(1, (tree.blocks, self.block))
        blocks_k, blocks_v = (to_blocks(x.detach(), self.block, tree.blocks) for x in (k, v))
        boxes = opened.boxes(blocks_k, blocks_v, present, self.rank, tree.lead, levels=levels, complete=tree.complete)
        where, rows = opened.place(0, q.shape[2], self.block, q.device), Rows(found.k, found.v)
        tolerance = math.inf if self.tolerance is None else self.tolerance
        more = 0
        asking = self._held(q)
        out, bound = self._attend_opened(q, rows, far, sketches, where, starts, asking=asking, boxes=boxes)
        assert bound is not None
        while self.open + more < tree.blocks and (self.tolerance is not None and not (bound <= tolerance).all()):
            more = max(1, 2 * more)
            now, least = self._attend_opened(
                q, rows, far, sketches, where, starts, asking=asking, more=more, boxes=boxes
            )
            assert least is not None
            above = ~(bound <= tolerance)
            out, bound = torch.where(above[..., None], now, out), torch.where(above, least, bound)
        return out, bound

    def _tree(self, tokens: int, blocks: int, levels: int, radius: int) -> Tree:
        """What is summarized. Causal: all that the last query does not read one by one, in complete groups."""
        done = blocks - 1 - radius if self.causal else blocks
        stop = done * self.block if self.causal else tokens
        return Tree(self.block, self.rank, done, levels, self.causal, self.sinks, stop)

    def _present(self, tree: Tree, device: torch.device) -> Tensor | None:
        """Which tokens of its blocks the tree summarizes, [1, blocks * m]; None: all."""
        at = torch.arange(tree.blocks * self.block, device=device)[None]
        return (at >= tree.lo) & (at < tree.hi) if tree.lo or tree.hi < at.shape[1] else None

    def _levels(self, blocks: int) -> tuple[int, tuple[int, ...]]:
        """Levels that some query of so many blocks reads, and the radii of all."""
        levels = self._at_most(whole.reached(blocks, self.near // self.block))
        self._reach(levels, blocks)
        return levels, radii(self.near, self.block, levels)

    def _at_most(self, levels: int) -> int:
        """So many, or those that the horizon has, or the pool."""
        return min(levels, self.most, levels if self.pool.most is None else self.pool.most)

    def extend(self, q, k, v, state: FMAState | None = None, *, rotary=None):
        self.check(q, k, v, rotary=rotary, state=state)
        if not self.causal:
            raise NotImplementedError("fma: only causal attention can be extended; use forward")
        if self.tolerance is not None:
            raise NotImplementedError("fma: tolerance is for forward; extend with open instead")
        if state is None:
            nothing = k[:, :, :0], v[:, :, :0]
            empty = 0, self.block, self.near, self.rank, 0, *nothing, *nothing, (), (Grown(0, ()),)
            state = FMAState(*empty, most=self.most)
            if self.open:
                state = OpenedState(*empty, *nothing, self.hold, q[:, :, :0], (), most=self.most)
        self._check_state(state)
        if not q.shape[2]:
            return no_tokens(q, v), state
        out, now = self._continue(q, k, v, state, rotary)
        return out, self._forget(now)

    def _check_state(self, state: FMAState) -> None:
        """Raise ValueError where `open`, `hold` or `horizon` are such as the state cannot go on with."""
        if state.most != self.most:
            raise ValueError(
                f"fma: the state was made with another horizon: it has {state.most} levels at most, horizon="
                f"{self.horizon} has {self.most}; begin a new one"
            )
        if self.open and not isinstance(state, OpenedState):
            raise ValueError(
                f"fma: open={self.open} reads far tokens, but this state was made with open=0 and has forgotten them; "
                "begin a new one"
            )
        if isinstance(state, OpenedState) and state.hold != self.hold:
            raise ValueError(f"fma: the state was made with hold={state.hold}, not hold={self.hold}; begin a new one")

    def _continue(self, q, k, v, state: FMAState, rotary) -> tuple[Tensor, FMAState]:
        """Attention of the tokens after `state`, and the state after them with nothing forgotten yet."""
        m = self.block
        seen, first, tokens = state.tokens, state.first, state.tokens + q.shape[2]
        if rotary is not None:
            q = rotary(q, torch.arange(seen, tokens, device=q.device))
        here, last = seen // m, (tokens - 1) // m
        where = None
        if isinstance(state, OpenedState) and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            now, where = self._go_on(q, k, v, state, rotary)
            sinks, k, v = (now.sink_k, now.sink_v), now.k, now.v
        else:
            new_k, new_v = k, v
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            sinks = self._sinks_of(state, k, v)
            levels, grown = self._grow(k, v, state, tokens)
            now = FMAState(
                tokens, m, self.near, self.rank, first, k, v, *sinks, tuple(levels), tuple(grown), most=self.most
            )
            if isinstance(state, OpenedState):
                now = self._remember(now, state, q, new_k, new_v, rotary)
        if where is None:
            far, starts = self._far_rows(now.levels, sinks, k, v, rotary)
        else:
            far, starts = self._far_in(where.room, len(now.levels), rotary)
        self._reach(len(starts), last + 1)
        # a cropped state may have levels without groups
        if isinstance(now, OpenedState) and self.open and now.levels and now.grown[-1].blocks:
            return self._open_further(q, now, far, starts, where), now

        # a query block reads one list: further blocks must start where the tree's do
        lead = seen - here * m if last > here else 0
        q = torch.nn.functional.pad(q, (0, 0, lead, 0)) if lead else q
        q_block = m if last > here else q.shape[2]
        at = torch.arange(first * m, tokens, device=q.device)
        near_list, far_list = self._lists(starts, last + 1, q.device, here, first)
        near = _layout(near_list, q, k, q_block, m, causal=True)
        sources = [(Rows(k if rotary is None else rotary(k, at), v, end=at if first else None), near)]
        if len(far):
            sources.append((far, _layout(far_list, q, far.k, q_block, self.rank)))
        position = torch.arange(seen - lead, tokens, device=q.device) if seen else None
        out = attend(q, sources, scale=self.scale, position=position).out[:, :, lead:]
        return out, now

    def _go_on(self, q, k, v, state: OpenedState, rotary) -> tuple[OpenedState, opened_room.Held | None]:
        """The state after further tokens, with nothing forgotten yet, and where its groups lie; q is rotated.

        What a chunk costs is what it brings: tokens, summaries and sketches go into the room behind those there are.
        """
        m, first, begin, tokens = self.block, state.first, state.begin, state.tokens + q.shape[2]
        turned = k if rotary is None else rotary(k, torch.arange(state.tokens, tokens, device=k.device))
        every_k, every_v = appended(state.all_k, turned), appended(state.all_v, v)
        # what all tokens hold need not be held twice
        at_hand, past = every_k.device == k.device, (first - begin) * m
        k = every_k[:, :, past:] if at_hand and rotary is None else torch.cat([state.k, k], 2)
        v = every_v[:, :, past:] if at_hand else torch.cat([state.v, v], 2)
        sinks, askers = self._sinks_of(state, k, v), state.askers
        if self.hold > 1:
            asking = q[:, :, -state.tokens % self.hold :: self.hold]
            askers = appended(askers, asking) if asking.shape[2] else askers
        levels, grown, sketches, where = self._grow_there(state, tokens, k, v, every_k, sinks)
        now = OpenedState(
            tokens, m, self.near, self.rank, first, k, v, *sinks, levels, grown, all_k=every_k, all_v=every_v,
            hold=self.hold, askers=askers, sketches=sketches, begin=begin, most=self.most,
        )  # fmt: skip
        return now, where

    def _grow_there(
        self, state: OpenedState, tokens: int, k: Tensor, v: Tensor, every_k: Tensor, sinks: Sequence[Tensor]
    ) -> tuple[tuple[Level, ...], tuple[Grown, ...], tuple[opened.Sketch, ...], opened_room.Held | None]:
        """`_grow`, and the sketches, into the room behind what there is; by kernels where they take it."""
        m, p, begin = self.block, self.rank, state.begin
        done = state.grown[-1].blocks
        stop = max(done, _summarized(tokens, m, self.near))
        where = opened_room.held(state.sketches)
        if stop == begin or (stop == done and where is not None):
            return state.levels, state.grown, state.sketches, where
        shape = opened_room.Shape(m, p, self.detail, self.most, self.sinks, begin)
        moved = not opened_room.take(where, shape, stop - begin)
        if moved or where is None:
            where = self._moved(state, shape, stop, sinks)
        room, grown, waiting = where.room, list(state.grown), where.waiting
        quick = type(self._modules["pool"]) is MeanPool and self.score == "mean"
        quick = quick and not growth.refusal(k, v, m, p, self.detail)
        read, read_first = every_k, 0
        if quick and every_k.device != k.device:
            read_first = (done - begin) * m
            read = every_k[:, :, read_first : (stop - begin) * m].to(k.device)
        # block by block only where `crop` may want to stop in between
        for now in range(_summarized(tokens - self.rewind, m, self.near), stop + 1):
            before = grown[-1]
            if now <= before.blocks:
                continue
            if quick:
                known = opened_room.waiting(before.pending, k, p) if waiting is None else waiting
                past = (state.first - begin) * m
                firsts = read_first, past, past
                waiting = opened_room.grow(room, read, k, v, firsts, known, before.blocks - begin, now - begin)
                pending = self._waiting(room, waiting, now - begin)
            else:
                new, pending = self._pooled(k, v, state.first, before, now)
                for height, groups in enumerate(new):
                    if len(groups):
                        room.put(height, (before.blocks >> height) - (begin >> height), groups)
            grown.append(Grown(now, pending))
        if not quick and stop > done:
            for height, level in enumerate(self._further_sketches(state, every_k, k.device, stop)):
                room.put_sketch(height, (done - begin) >> height, level)
        blocks = stop - begin
        levels = tuple(
            Level(begin >> height, level_k, level_v, bias if self.sinks else None)
            for height, (level_k, level_v, bias) in enumerate(room.levels(blocks))
        )
        levels, sketches = levels[: self._at_most(len(levels))], tuple(room.all_sketches(blocks))
        where = opened_room.Held(room, blocks, waiting)
        opened_room.keep(sketches, where)
        return levels, tuple(grown), sketches, where

    def _moved(
        self, state: OpenedState, shape: opened_room.Shape, stop: int, sinks: Sequence[Tensor]
    ) -> opened_room.Held:
        """A room for `stop` blocks, and half as many behind those of `state`, which are in it."""
        done, stop = state.grown[-1].blocks - shape.begin, stop - shape.begin
        width = sinks[0].shape[3]
        size = opened.width_of(self.score, width)
        # a prompt may be all there is
        sink_k, sink_v = sinks
        room = opened_room.Room(shape, stop + stop // 2 if done else stop, sink_k, sink_v, size)
        room.used = stop
        for height, (level, sketch) in enumerate(zip(state.levels, state.sketches, strict=False)):
            many = done >> height
            if many:
                here = room.far(height, 0, many)
                room.far_k[:, :, here], room.far_v[:, :, here] = level.k, level.v
                if level.bias is not None and level.bias.shape[0]:
                    room.bias[:, :, here] = level.bias[:1]
                room.put_sketch(height, 0, sketch)
        return opened_room.Held(room, done, None)

    def _waiting(self, room: opened_room.Room, waiting: Tensor, blocks: int) -> tuple[Groups | None, ...]:
        """What waits for its other half after so many blocks, of means."""
        found = []
        both = (x.split(1, 2) for x in waiting.unbind(2))
        for height, (k, v) in enumerate(zip(*both, strict=True)):
            group = blocks >> height
            if group % 2 == 0 or height + 1 >= self.most:
                found.append(None)
            else:
                found.append(Groups(k, v, room.tokens(height, group - 1) if self.sinks else None))
        return tuple(found)

    def _far_in(self, room: opened_room.Room, levels: int, rotary: Rotary | None) -> tuple[Rows, list[int]]:
        """`_far_rows` of a room."""
        far_k, begin = room.far_k, room.shape.begin
        if rotary is not None:
            if room.centres is None:
                centres = [torch.arange(room.shape.lead, device=far_k.device).double()]
                for height, groups in enumerate(room.groups):
                    numbers = torch.arange(groups, device=far_k.device) + (begin >> height)
                    centres.append(self._centres(numbers, height))
                room.centres = torch.cat(centres)
            far_k = rotary(far_k, room.centres)
        bias = self._bias(room.bias, room.shape.lead, room.groups[:levels])
        return Rows(far_k, room.far_v, bias=bias), [
            at - (begin >> height) for height, at in enumerate(room.starts[:levels])
        ]

    def _sinks_of(self, state: FMAState, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The first tokens of the sequence, of k and v that begin where the state's do."""
        if state.tokens >= self.sinks:
            return state.sink_k, state.sink_v
        return k[:, :, : self.sinks], v[:, :, : self.sinks]

    def _open_further(
        self, q: Tensor, now: OpenedState, far: Rows, starts: Sequence[int], lies: opened_room.Held | None
    ) -> Tensor:
        """Opened attention of the last tokens of `now`; q is rotated.

        Positions and groups are counted from the first token that is kept: the tree from there on is the same, since
        only groups of the coarsest level are forgotten.
        """
        begin = now.begin * self.block
        tokens = now.tokens - begin
        seen = tokens - q.shape[2]
        rows = Rows(now.all_k.to(q.device), now.all_v.to(q.device))
        sketches = now.sketches[: len(starts)]
        starts = [at + (now.begin >> height) for height, at in enumerate(starts)]
        found = self._quickly_further(q, rows, far, sketches, now.askers, seen, lies)
        if found is not None:
            return found
        asking = q
        if self.hold > 1:
            asking = now.askers[:, :, torch.arange(seen, tokens, device=q.device) // self.hold]
        where = opened.place(seen, tokens, self.block, q.device)
        return self._attend_opened(q, rows, far, sketches, where, starts, seen, asking=asking)[0]

    def _quickly_further(
        self,
        q: Tensor,
        tokens: Rows,
        far: Rows,
        sketches: Sequence[opened.Sketch],
        askers: Tensor,
        seen: int,
        where: opened_room.Held | None,
    ) -> Tensor | None:
        """`_quickly` for the queries from position `seen` on, by the sketches of all blocks before."""
        self._check_opening()
        used, plan, scale = sketches[0].rows.shape[2], self.plan(), self._scale(q)
        # in a room levels lie as those of more blocks would
        blocks = used if where is None else where.room.blocks
        tree = Tree(self.block, self.rank, blocks, len(sketches), True, self.sinks, blocks * self.block)
        runs = on_gpu.by_tiles(q, tokens.k, plan)
        step = q.shape[2] if runs else PIECE
        if far.bias is None or self._refused(q[:, :, :step], tokens.k, tokens.v, tree, plan):
            return None
        if not runs and torch.is_grad_enabled() and any(x.requires_grad for x in (q, tokens.k, tokens.v, far.k, far.v)):
            # the kernels' backward is for all queries at once, from the first token on
            if seen:
                self._slowly(q, f"take gradients from a state on only if a multiple of {on_gpu.TILE} choose together")
                return None
            step = q.shape[2]
        # tiles and blocks start where the tokens' do
        lead = seen % (self.block if runs else on_gpu.TILE)
        q, start = torch.nn.functional.pad(q, (0, 0, lead, 0)) if lead else q, seen - lead
        asking = q if self.hold == 1 else askers[:, :, start // self.hold :]
        if where is None:
            seen_by, _ = opened.told(self.score, sketches)
        else:
            seen_by = opened.told_rows(self.score, where.room.sketches)
        chosen = on_gpu.choose_from(asking, seen_by, tree, plan, scale, start // self.hold)
        if runs:
            lists = on_gpu.lists(*chosen, tree, plan, start // self.hold)
            out = opened.attend_runs(q, tokens, far, *lists, self.hold, self.block, self.rank, scale, start).out
            return out[:, :, lead:]
        rows = far.k, far.v, far.bias
        outs = []
        for at in range(0, q.shape[2], step):
            here = slice(at // self.hold, -(-(at + step) // self.hold))
            part = chosen[0][:, :, here], chosen[1][:, :, here]
            asked = q[:, :, at : at + step]
            outs.append(on_gpu.attend(asked, tokens.k, tokens.v, rows, part, tree, plan, scale, start + at, used))
        return (outs[0] if len(outs) == 1 else torch.cat(outs, 2))[:, :, lead:]

    def _remember(self, now: FMAState, before: OpenedState, q: Tensor, k: Tensor, v: Tensor, rotary) -> OpenedState:
        """`now` with all tokens, those of the new q (rotated), k and v too, and sketches of all summarized blocks."""
        askers = before.askers
        if self.hold > 1:
            askers = torch.cat([askers, q[:, :, -before.tokens % self.hold :: self.hold]], 2)
        if rotary is not None:
            k = rotary(k, torch.arange(before.tokens, now.tokens, device=k.device))
        every_k, every_v = (appended(*pair) for pair in ((before.all_k, k), (before.all_v, v)))
        sketches, begin = list(before.sketches), before.begin
        new = self._further_sketches(before, every_k, k.device, now.grown[-1].blocks)
        if new:
            sketches = [*(opened.joined(*pair) for pair in zip(sketches, new, strict=False)), *new[len(sketches) :]]
        parts = {name: getattr(now, name) for name in PLAIN}
        return OpenedState(
            **parts, all_k=every_k, all_v=every_v, hold=self.hold, askers=askers, sketches=tuple(sketches), begin=begin
        )

    def _grow(self, k, v, state: FMAState, tokens: int) -> tuple[list[Level], list[Grown]]:
        """The levels and the pool's memory once every block that the last query no longer reads is summarized."""
        levels, grown, first = list(state.levels), list(state.grown), state.first
        back = _summarized(tokens - self.rewind, self.block, self.near)
        # block by block only where `crop` may want to stop in between
        for stop in range(back, _summarized(tokens, self.block, self.near) + 1):
            done = grown[-1].blocks
            if stop <= done:
                continue
            new, pending = self._pooled(k, v, first, grown[-1], stop)
            grown.append(Grown(stop, pending))
            for height, groups in enumerate(new):
                level = self._level(groups, height, done >> height, k, v)
                levels[height : height + 1] = [level if height == len(levels) else levels[height].join(level)]
        return levels, grown

    def _pooled(
        self, k: Tensor, v: Tensor, first: int, before: Grown, stop: int
    ) -> tuple[list[Groups], tuple[Groups | None, ...]]:
        """All groups that the blocks up to `stop` complete, and what waits; k and v begin with block `first`."""
        done = before.blocks
        here = slice((done - first) * self.block, (stop - first) * self.block)
        blocks_k, blocks_v = (to_blocks(x[:, :, here], self.block, stop - done) for x in (k, v))
        count = None
        if self.sinks:
            at = torch.arange(done * self.block, stop * self.block, device=k.device)
            count = (at >= self.sinks).to(blocks_k.dtype).view(1, 1, stop - done, self.block)
            count = count.expand(k.shape[0], -1, -1, -1)
        new, pending = self.pool.grow(
            blocks_k, blocks_v, count, rank=self.rank, first=done, pending=before.pending, levels=self.most
        )
        # copies: what waits is a small part of what it was cut from
        return new, tuple(None if x is None else x.copy() for x in pending)

    def _further_sketches(
        self, before: OpenedState, every_k: Tensor, device: torch.device, stop: int
    ) -> list[opened.Sketch]:
        """Of the groups that the blocks up to `stop` complete, of all tokens' keys."""
        begin = before.begin
        done, stop = before.sketches[0].rows.shape[2] if before.sketches else 0, stop - begin
        if stop <= done:
            return []
        here = slice(done * self.block, stop * self.block)
        at = torch.arange(here.start, here.stop, device=device).view(1, stop - done, self.block)
        present = (at + begin * self.block >= self.sinks).expand(every_k.shape[0], -1, -1)
        keys = to_blocks(every_k[:, :, here].to(device), self.block, stop - done)
        return opened.sketch(self.score, keys, present, self.detail, below=before.sketches)[: self.most]

    def _forget(self, state: FMAState) -> FMAState:
        """The state without what neither a later query nor `crop` within `rewind` can need."""
        back = max(state.tokens - self.rewind, 1)
        # a state that was cropped has already forgotten more
        first, last = max(_summarized(back, self.block, self.near), state.first), (back - 1) // self.block
        radius = radii(self.near, self.block, len(state.levels))
        if isinstance(state, OpenedState) and len(state.levels) == self.most:
            # one group more than is read: then none that a query reads is counted as the sequence's first, with sinks
            begin = (last >> self.most) - radius[-1] - 1 << self.most
            state = state.after(begin) if begin > state.begin else state
        levels = []
        for height, level in enumerate(state.levels):
            oldest = max(2 * ((last >> (height + 1)) - radius[height + 1]), level.first)
            # groups that are not there yet cannot be forgotten
            oldest = min(oldest, level.first + level.k.shape[2] // self.rank)
            levels.append(level if isinstance(state, OpenedState) else level.after(oldest - level.first, self.rank))
        tokens = (first - state.first) * self.block
        every = (state.all_k, state.all_v) if isinstance(state, OpenedState) else (None, None)
        k, v = (_left(x, tokens, whole) for x, whole in zip((state.k, state.v), every, strict=True))
        return replace(
            state,
            first=first,
            k=k,
            v=v,
            sink_k=_left(state.sink_k, 0, state.sink_k),
            sink_v=_left(state.sink_v, 0, state.sink_v),
            levels=tuple(levels),
            grown=tuple(g for g in state.grown if g.blocks >= first),
        )

    def _pooled_queries(self, q, far: Rows, starts: Sequence[int], blocks: int, rotary) -> Partial | None:
        """The far field read by mean queries of the rows' own sub-blocks, handed down to the tokens."""
        tokens, m, p = q.shape[2], self.block, self.rank
        pooled = summarize(Rows(q, q), block=m, rank=p)
        result = None
        radius = radii(self.near, m, len(starts))
        for height in reversed(range(len(starts))):
            groups = -(-blocks // 2**height)
            n = torch.arange(groups, device=q.device)
            # the lists of a level, read by its own groups: their block lists at that level's scale
            listed, used = far_lists(n, radius[height : height + 2], False, groups)
            index, count = pack_lists(listed[0] + starts[height], used[0])
            lists = index[None, None], count[None, None]
            rows = slice(pooled.offsets[height], pooled.offsets[height] + groups * p)
            q_l = pooled.k[:, :, rows]
            if rotary is not None:
                q_l = rotary(q_l, self._centres(n, height))
            here = attend(q_l, far, _layout(lists, q_l, far.k, p, p), scale=self.scale)
            result = here if result is None else merge(here, _hand_down(result, 2, groups * p))
        return None if result is None else _hand_down(result, m // p, tokens)

    def _packed(self, q, k, v, packing: Packing, rotary):
        m = self.block
        q, k, v = (packing.fill(x) for x in (q, k, v))
        at = torch.arange(packing.tokens, device=q.device)
        within = at - packing.start.repeat_interleave(m, 1) * m
        blocks = packing.tokens // m
        levels = self._at_most(depth(blocks))
        # the sinks of document d are rows d * sinks ... of theirs
        documents = int(packing.document.max()) + 1
        first = torch.zeros(q.shape[0], documents + 1, dtype=torch.long, device=q.device)
        first.scatter_(
            1, packing.document.expand(q.shape[0], -1) % (documents + 1), packing.start.expand(q.shape[0], -1)
        )
        sink_at = first[:, :documents, None] * m + torch.arange(self.sinks, device=q.device)
        sink_at = sink_at.flatten(1).clamp(max=packing.tokens - 1)
        sinks = [x.gather(2, sink_at[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v)]
        if rotary is not None and self.sinks:
            sinks[0] = rotary(sinks[0], sink_at)
        sinks = [_fill_groups(x, self.sinks, -self.sinks % self.rank) if self.sinks else x for x in sinks]
        far, starts = Rows(k[:, :, :0], v[:, :, :0]), []
        if levels:
            tree = Tree(m, self.rank, blocks, levels, False, 0, packing.tokens)
            found = pyramid(self.pool, k, v, tree, packing.present & (within >= self.sinks))
            far_k = found.far_k if rotary is None else rotary(found.far_k, found.span.double().mean(0))
            starts = list(accumulate(tree.groups[:-1], initial=sinks[0].shape[2] // self.rank))
            known = self._sink_bias(sinks[0]).expand(found.bias.shape[0], -1, -1)
            known = self._bias(torch.cat([known, found.bias], 2), sinks[0].shape[2], tree.groups)
            far = Rows(torch.cat([sinks[0], far_k], 2), torch.cat([sinks[1], found.far_v], 2), bias=known)
        if rotary is not None:
            q, k = rotary(q, at), rotary(k, at)
        near_list, far_list = self._packed_lists(packing, starts)
        near = _layout(near_list, q, k, m, m, causal=self.causal)
        bias = packing.present.to(torch.promote_types(q.dtype, torch.float32)).log()[:, None]
        if self.open and levels:
            self._slowly(q, "take one document, not packed ones")
            sketches = self._sketches(k, tree, packing.present & (within >= self.sinks))
            where = opened.Where(
                *(
                    x.repeat_interleave(m, 1)
                    for x in (packing.block_of, packing.blocks, packing.start, packing.document)
                )
            )
            rows = Rows(k, v, bias=bias)
            found = self._attend_opened(q, rows, far, sketches, where, starts, asking=self._held(q))[0]
            return packing.restore(found)
        sources = [(Rows(k, v, bias=bias), near)]
        if starts:
            sources.append((far, _layout(far_list, q, far.k, m, self.rank)))
        return packing.restore(attend(q, sources, scale=self.scale).out)

    def _level(self, groups: Groups, height: int, first: int, k: Tensor, v: Tensor) -> Level:
        bias = None if groups.count is None else groups.count.log().flatten(2)
        return Level(first, groups.k.flatten(2, 3).to(k.dtype), groups.v.flatten(2, 3).to(v.dtype), bias)

    def _far_rows(
        self, levels: Sequence[Level], sinks: Sequence[Tensor], k: Tensor, v: Tensor, rotary: Rotary | None
    ) -> tuple[Rows, list[int]]:
        """Sinks and all levels in one buffer of groups of p rows, and what to add to a group's number to find it."""
        p, wide = self.rank, torch.promote_types(k.dtype, torch.float32)
        keys, values = ([_fill_groups(x, self.sinks, -self.sinks % p)] if self.sinks else [] for x in sinks)
        weights = [self._sink_bias(x) for x in keys]
        centres = [torch.arange(x.shape[2], device=k.device).double() for x in keys]
        lead = sum(x.shape[2] for x in keys)
        starts, at = [], lead // p
        for height, level in enumerate(levels):
            groups = level.k.shape[2] // p
            starts.append(at - level.first)
            at += groups
            keys.append(level.k)
            values.append(level.v)
            each = math.log((self.block << height) / p)
            weights.append(k.new_full((1, 1, groups * p), each, dtype=wide) if level.bias is None else level.bias)
            if rotary is not None:
                centres.append(self._centres(torch.arange(level.first, level.first + groups, device=k.device), height))
        if not keys:
            return Rows(k[:, :, :0], v[:, :, :0]), starts
        batch = next((w.shape[0] for w in weights if w.shape[0] != 1), 1)
        bias = torch.cat([w.expand(batch, -1, -1) for w in weights], -1).to(wide)
        bias = self._bias(bias, lead, [x.k.shape[2] // p for x in levels])
        far_k = torch.cat(keys, 2)
        if rotary is not None:
            far_k = rotary(far_k, torch.cat(centres))
        return Rows(far_k, torch.cat(values, 2), bias=bias), starts

    def _bias(self, known: Tensor, lead: int, groups: Sequence[int]) -> Tensor:
        """The rows' bias [1|B, 1, R] with the learned one of each level added, [1|B, G, R]; the first `lead` have none.

        Raises:
            ValueError: there are more levels than learned numbers.
        """
        if not self.biased or not groups:
            return known
        heads, levels = self.level_bias.shape
        if len(groups) > levels:
            raise ValueError(f"fma: level_bias has {levels} levels, but the sequence {len(groups)}; build it with more")
        learned = [self.level_bias.new_zeros(heads, lead)]
        learned += [self.level_bias[:, n : n + 1].expand(-1, many * self.rank) for n, many in enumerate(groups)]
        # of levels that are not there yet
        learned.append(self.level_bias.new_zeros(heads, known.shape[2] - lead - sum(groups) * self.rank))
        return known + torch.cat(learned, 1).to(known.dtype)

    def _sink_bias(self, filled: Tensor) -> Tensor:
        """[1, 1, rows]: 0 for the sinks, -inf for what fills their groups up."""
        each = max(-(-self.sinks // self.rank) * self.rank, 1)
        at = torch.arange(filled.shape[2], device=filled.device) % each
        bias = torch.zeros_like(at, dtype=torch.promote_types(filled.dtype, torch.float32))
        return bias.masked_fill(at >= self.sinks, float("-inf"))[None, None]

    def _lists(self, starts: Sequence[int], blocks: int, device: torch.device, start: int = 0, first: int = 0):
        """Near and far lists of blocks `start` to the last, over tokens from block `first` and `_far_rows`."""
        radius = radii(self.near, self.block, len(starts))
        sinks = -(-self.sinks // self.rank)
        return tree_lists(
            blocks, radius, starts, self.causal, start=start, first=first, sink_groups=sinks, device=device
        )

    def _packed_lists(self, packing: Packing, starts: Sequence[int]):
        """The same for every block of every document."""
        n, start = packing.block_of, packing.start[..., None]
        self._reach(len(starts), int(packing.blocks.max()))
        radius = radii(self.near, self.block, len(starts))
        listed, used = near_lists(n, radius[0], self.causal, packing.blocks)
        near = pack_lists(listed + start, used)
        listed, used = far_lists(n, radius, self.causal, packing.blocks)
        groups = -(-self.sinks // self.rank)
        sinks = packing.document[..., None] * groups + torch.arange(groups, device=n.device)
        listed = [sinks, *(x + (start >> height) + starts[height] for height, x in enumerate(listed))]
        used = [(n > radius[0])[..., None].expand_as(sinks), *used]
        return near, pack_lists(torch.cat(listed, -1), torch.cat(used, -1))

    def _reach(self, levels: int, blocks: int) -> None:
        """Refuse a sequence of so many blocks if so many levels leave some of it unread, but beyond the horizon."""
        if levels < self.most and (blocks - 1 >> levels) > radii(self.near, self.block, levels)[-1]:
            raise ValueError(
                f"fma: {blocks} blocks of {self.block} tokens need more than the pool's {levels} levels; "
                "build it with more"
            )

    def _centres(self, group: Tensor, height: int) -> Tensor:
        """Positions of the rows of these groups of level l, which may lie between tokens."""
        first, end = span_of_rows(group, height, self.block, self.rank, self.pool.whole)
        return (first + end - 1).double() / 2

    def reference(self, q, k, v):
        if type(self.pool) not in (MeanPool, StridedPool):
            raise NotImplementedError("fma: the reference is written for means and strided pools")
        tokens, m, p = q.shape[2], self.block, self.rank
        # whether a group holds an opened block, [B, H, T, groups]
        holds = self._opened(q, k) if self.open else torch.zeros(1, 1, tokens, -(-tokens // m), dtype=torch.bool)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        i = torch.arange(tokens)
        scale = self._scale(q)
        distance, radius = (i[:, None] // m - i // m).abs(), self.near // m
        seen = (distance <= radius) | (i < self.sinks) | holds[..., i // m]
        if self.causal:
            seen &= i <= i[:, None]
        widest = m << self.most
        logits, values = [(q @ k.mT * scale).masked_fill(~seen, float("-inf"))], [v]
        width = m
        while (tokens - 1) // width > radius and width < widest:
            above = -(-radius // 2)
            parents = torch.nn.functional.pad(holds, (0, holds.shape[-1] % 2)).unflatten(-1, (-1, 2)).any(-1)
            for start in range(0, tokens, width // p):
                stop = min(start + width // p, tokens)
                if stop <= self.sinks:
                    continue
                members = torch.arange(max(start, self.sinks), stop)
                own, group = i // width, start // width
                listed = ((own // 2 - group // 2).abs() <= above) | parents[..., group // 2]
                seen = ((own - group).abs() > radius) & listed & ~holds[..., group]
                if self.causal:
                    seen &= group < own
                asking = q
                if self.queries == "pooled":
                    parts = [q[:, :, s : s + width // p] for s in range(0, tokens, width // p)]
                    asking = torch.cat([x.mean(2, keepdim=True).expand_as(x) for x in parts], 2)
                row = [x[:, :, members].mean(2) for x in (k, v)]
                if isinstance(self.pool, StridedPool):
                    row = [self._strided(x, start, width // p, tokens)[0] for x in (k, v)]
                score = asking @ row[0][..., None] * scale + math.log(len(members))
                if self.biased:
                    learned = self.level_bias[:, (width // m).bit_length() - 1]
                    score = score + learned.repeat_interleave(q.shape[1] // len(learned))[:, None, None]
                logits.append(score.masked_fill(~seen[..., None], float("-inf")))
                values.append(row[1][:, :, None])
            width, radius, holds = 2 * width, above, parents
        return torch.cat(logits, -1).softmax(-1) @ torch.cat(values, 2)

    def _strided(self, x: Tensor, start: int, width: int, tokens: int) -> tuple[Tensor, int]:
        """By definition: a strided pool's row [B, H, D] for tokens start to start + width, and how many are there."""
        assert isinstance(self.pool, StridedPool)
        each = self.block // self.rank
        if width == each:
            place = self.pool.leaf_place
            parts = [(x[:, :, min(t, tokens - 1)], int(self.sinks <= t < tokens)) for t in range(start, start + each)]
        else:
            place = self.pool.pair_place[(width // each).bit_length() - 2]
            parts = [self._strided(x, at, width // 2, tokens) for at in (start, start + width // 2)]
        total = sum(many for _, many in parts)
        mean = torch.stack([row * many for row, many in parts]).sum(0) / max(total, 1)
        chosen = [parts[int(n)] for n in place.repeat_interleave(x.shape[1] // len(place))]
        heads = [row[:, h] if many else mean[:, h] for h, (row, many) in enumerate(chosen)]
        return torch.stack(heads, 1), total

    def _opened(self, q: Tensor, k: Tensor) -> Tensor:
        """By definition: which blocks each query opens, [B, H, T, blocks]."""
        tokens, m, d = q.shape[2], self.block, self.detail
        repeat = q.shape[1] // k.shape[1]
        x = q.detach() * self._scale(q)
        x = x[:, :, torch.arange(tokens) // self.hold * self.hold]
        k = k.detach().repeat_interleave(repeat, 1)
        levels = [(m, self.near // m)]
        while (tokens - 1) // levels[-1][0] > levels[-1][1] and levels[-1][0] < m << self.most:
            levels.append((2 * levels[-1][0], -(-levels[-1][1] // 2)))
        scores, parts = [], list(k.unbind(2) if self.score == "peak" else torch.zeros(tokens).unbind())
        for height, (width, _) in enumerate(levels[:-1]):
            segment, below, parts, found = width // d, parts, [], []
            for start in range(0, tokens, segment):
                stop, size = min(start + segment, tokens), 2 if height else segment
                own = k[:, :, max(start, self.sinks) : stop]
                mean, many = own.mean(2, keepdim=True), own.shape[2]
                # what this segment is put together from
                halves = [(start + n * (segment // size), segment // size) for n in range(size)]
                inner = [k[:, :, max(at, self.sinks) : min(at + n, tokens)] for at, n in halves]
                inner = [(y.mean(2), below[at // n]) for y, (at, n) in zip(inner, halves, strict=True) if y.shape[2]]
                if not inner:
                    score, told = torch.full(x.shape[:3], -math.inf), None
                elif self.score == "box":
                    low, high = own.amin(2, keepdim=True), own.amax(2, keepdim=True)
                    score, told = torch.maximum(x * low, x * high).sum(-1), None
                elif self.score == "ball":
                    told = torch.stack([(mean[:, :, 0] - c).norm(dim=-1) + r for c, r in inner]).amax(0)
                    score = (x * mean).sum(-1) + x.norm(dim=-1) * told[..., None]
                elif self.score == "peak":
                    peaks = torch.stack([y for _, y in inner], 2)
                    away = (peaks - mean).square().sum(-1)
                    best = (away >= 0.9999 * away.amax(-1, keepdim=True)).int().argmax(-1)[..., None, None]
                    told = peaks.take_along_dim(best, 2)[:, :, 0]
                    score = (x * told[:, :, None]).sum(-1)
                elif self.score == "learned":
                    spread = (own - mean).square().mean(2, keepdim=True)
                    weight = self.spread.detach().repeat_interleave(repeat, 0)[:, None]
                    score, told = (x * mean + weight * x.square() * spread).sum(-1), None
                else:
                    score, told = (x * mean).sum(-1), None
                parts.append(told)
                found.append(score + (math.log(many) if many else 0.0))
            found += [torch.full(x.shape[:3], -math.inf)] * (-len(found) % d)
            found = torch.stack(found, -1).unflatten(-1, (-1, d))
            scores.append(found.exp().sum(-1).log() if self.segments == "sum" else found.amax(-1))
        i, kept = torch.arange(tokens)[:, None], torch.zeros(*x.shape[:3], tokens, dtype=torch.bool)
        for height in reversed(range(len(scores))):
            score, (width, radius) = scores[height], levels[height]
            own, j = i // width, torch.arange(score.shape[-1])
            listed = ((own // 2 - j // 2).abs() <= levels[height + 1][1]) | kept[..., j // 2]
            seen = ((own - j).abs() > radius) & listed & (score > -math.inf)
            if self.causal:
                seen &= j < own
            score = score.masked_fill(~seen, -math.inf)
            if self.shared and repeat > 1:
                shares = torch.where(seen, score.softmax(-1), 0.0).unflatten(1, (-1, repeat)).sum(2)
                score = shares.repeat_interleave(repeat, 1).masked_fill(~seen, -math.inf)
            most = (2 * self.open if self.beam is None else self.beam) if height else self.open
            place = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            kept = seen & (place < most)
        return torch.nn.functional.pad(kept, (0, -(-tokens // m) - kept.shape[-1]))

    def layouts(self, tokens: int) -> dict[str, Layout]:
        """The near and the far layout of a sequence, for pictures."""
        plan = multipole(
            tokens=tokens, block=self.block, near=self.near, rank=self.rank, causal=self.causal, levels=self.most
        )
        return {"near": plan.near, "far": plan.far}

    def rows_read(self, tokens: int) -> float:
        """The rows of `layouts`, and the sinks for every query that does not see them as near tokens.

        With `open` the most that it can be: k groups without a common parent are opened, m tokens each, and the
        sibling of each is read as a summary on every level above.
        """
        beyond = max(tokens - self.near - self.block, 0)
        rows = sum(x.visible for x in self.layouts(tokens).values()) + self.sinks * beyond / max(tokens, 1)
        blocks = -(-tokens // self.block)
        n, more = torch.arange(blocks, dtype=torch.float64), 0.0
        levels = min(whole.reached(blocks, self.near // self.block), self.most)
        *radius, last = radii(self.near, self.block, levels)
        top = n.div(2**levels, rounding_mode="floor")
        # the blocks first .. end - 1 are read at all
        first, end = (top - last).clamp(min=0) * 2**levels, ((top + last + 1) * 2**levels).clamp(max=blocks)
        for height, near in enumerate(radius):
            own, low, high = (x.div(2**height, rounding_mode="floor") for x in (n, first, end + 2**height - 1))
            far = (own - near - low).clamp(min=0)
            if not self.causal:
                far += (high - 1 - own - near).clamp(min=0)
            opened = far.clamp(max=self.open)
            more += opened * self.rank if height else opened * (self.block - self.rank)
        share = torch.full((blocks,), float(self.block), dtype=torch.float64)
        share[-1:] -= blocks * self.block - tokens
        return rows + float((more * share).sum()) / max(tokens, 1)

    def ring(
        self,
        state: FMAState,
        *,
        capacity: int = 1 << 20,
        rotary: Rotary | None = None,
        heads: int | None = None,
        store: str = "device",
    ) -> FMARing | OpenedRing:
        """The fixed buffers that go on where `state` stands, for sequences of up to `capacity` tokens; see FMARing.

        With a horizon that the capacity goes beyond, a FMARing never gets full.

        With `open` an OpenedRing, which holds all tokens.

        Args:
            heads: H of an opened ring. Default that of the queries that the state was made with.
            store: "host" keeps the tokens of an opened ring in pinned host memory.
        """
        self.check_ring(state, rotary)
        self._check_state(state)
        if not isinstance(state, OpenedState) or not self.open:
            if self.biased or store != "device":
                raise NotImplementedError(
                    "fma: a ring without opened groups has no tokens to keep in a store, nor a level_bias; use extend"
                )
            return FMARing.from_state(
                state, capacity=capacity, sinks=self.sinks, pool=self.pool, rotary=rotary, levels=self.most
            )
        self._check_opening()
        return OpenedRing.from_state(
            state, heads=heads or state.askers.shape[1], capacity=capacity, sinks=self.sinks, opening=self._opening(),
            scale=self._scale(state.k), store=store,
            level_bias=self.level_bias if self.biased else None, weight=self._weight(), pool=self.pool, rotary=rotary,
            levels=self.most,
        )  # fmt: skip

    def _opening(self) -> dict[str, int]:
        """How a ring opens groups."""
        plan = self.plan()
        return {
            "detail": plan.detail, "picks": plan.picks, "beam": plan.beam, "shared": plan.shared,
            "summed": plan.summed, "hold": plan.hold, "score": opened.SCORES.index(self.score),
        }  # fmt: skip

    def step(self, q: Tensor, k: Tensor, v: Tensor, ring: FMARing | OpenedRing) -> Tensor:
        """`extend` by one token a sequence, in place and without gradients: what a CUDA graph captures."""
        self.check_step(ring)
        mine = {"block": self.block, "near": self.near, "rank": self.rank, "sinks": self.sinks, "picks": self.open}
        mine |= self._opening() if self.open else {}
        theirs = {name: getattr(ring.plan, name, None) for name in mine}
        if isinstance(ring, FMARing):
            theirs["picks"] = 0
        if theirs != mine:
            raise ValueError(f"fma: the ring was made for {theirs}, not for {mine}; make it by ring()")
        held = ring.plan if isinstance(ring, FMARing) else ring.ring.plan
        if held.levels > self.most or (held.endless and held.levels < self.most):
            raise ValueError(
                f"fma: the ring was made with another horizon: it has {held.levels} levels, horizon={self.horizon} has "
                f"{self.most}; make it by ring()"
            )
        return ring.step(q, k, v, scale=self.scale)


def _summarized(tokens: int, block: int, near: int) -> int:
    """How many blocks no query from the last of `tokens` tokens on reads one by one."""
    return max((tokens - 1) // block - near // block, 0)


def _layout(
    lists: tuple[Tensor, Tensor], q: Tensor, rows: Tensor, q_block: int, k_block: int, causal: bool = False
) -> Layout:
    """Lists [1, 1, N, P], or [B, N, P] of packed documents. Far lists name complete past groups: nothing to hide."""
    index, count = (x[:, None] for x in lists) if lists[0].dim() == 3 else lists
    return Layout(index, count, q_block, k_block, q.shape[2], rows.shape[2], causal)


def _after(x: Tensor, rows: int) -> Tensor:
    """What follows the first rows, without keeping their memory alive."""
    return x[:, :, rows:].clone(memory_format=torch.contiguous_format)


def _left(x: Tensor, rows: int, kept: Tensor | None) -> Tensor:
    """What follows the first rows, in memory of its own unless `kept` holds all of it anyway."""
    if kept is None or torch.compiler.is_compiling():
        return _after(x, rows)
    storage = kept.untyped_storage()
    if x.untyped_storage().data_ptr() != storage.data_ptr() or (kept is x and storage.nbytes() != x.nbytes):
        return _after(x, rows)
    return x[:, :, rows:] if rows else x


def _after_there(x: Tensor, rows: int) -> Tensor:
    """The same in the kind of memory that x is in."""
    if torch.compiler.is_compiling() or not x.is_pinned():
        return _after(x, rows)
    x = x[:, :, rows:]
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


def _fill_groups(x: Tensor, sinks: int, short: int) -> Tensor:
    """The sinks of each document, filled up by rows of 0. Of a document that is too short nobody reads them."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % sinks))
    return torch.nn.functional.pad(x.unflatten(2, (-1, sinks)), (0, 0, 0, short)).flatten(2, 3)


def _hand_down(partial: Partial, times: int, rows: int) -> Partial:
    """Each row's result for the `times` rows below it."""
    out, lse = (x.repeat_interleave(times, 2)[:, :, :rows] for x in (partial.out, partial.lse))
    return Partial(out, lse)
