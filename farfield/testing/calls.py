"""Random calls of attend: what a kernel is compared on with float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from farfield.ops.attend import Call, Plan
from farfield.types import Layout, Rows


@dataclass(frozen=True)
class Sizes:
    """What the sizes of a call are drawn from; the values of one argument are equally likely.

    Args:
        repeat: query heads of a key head.
        value_width: None is the width of the keys.
        rows, k_block: of each of one or two sources.
        picks: entries of a list at most.
        latest: positions and ends are before.
        single: whether the bias of a single row is drawn; it changes nothing, and its gradient is what rounding leaves.
        rounded: the dtype that holds every number, so that a kernel of this dtype starts from the same ones.
    """

    batch: Sequence[int] = (1, 2, 3)
    kv_heads: Sequence[int] = (1, 2, 3)
    repeat: Sequence[int] = (1, 1, 2, 4, 5)
    tokens: Sequence[int] = (1, 2, 17, 63, 64, 65, 130, 257)
    width: Sequence[int] = (16, 24, 64, 80, 96, 128, 192, 256)
    value_width: Sequence[int | None] = (None, 16, 40, 128)
    q_block: Sequence[int] = (1, 5, 16, 64, 128)
    rows: Sequence[int] = (1, 30, 64, 200, 513)
    k_block: Sequence[int] = (1, 2, 4, 7, 16, 64, 128)
    picks: int = 70
    latest: int = 300
    single: bool = True
    rounded: torch.dtype = torch.bfloat16
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32)


GPU = Sizes()
SMALL = Sizes(
    batch=(1, 2),
    kv_heads=(1, 2),
    repeat=(1, 3),
    tokens=(1, 7, 33),
    width=(16, 24),
    value_width=(16, 40),
    q_block=(1, 5, 16),
    rows=(1, 20, 50),
    k_block=(1, 4, 7, 16),
    latest=40,
    rounded=torch.float16,
    dtypes=(torch.float32, torch.float16),
)
"""What Triton's interpreter does in a moment."""


@dataclass(frozen=True)
class Problem:
    """ff.attend(q, sources, **options), in float64.

    Args:
        grads: gradients of out and lse.
        dtype: one to do it in.
    """

    q: Tensor
    sources: list[tuple[Rows, Layout]]
    options: dict[str, Tensor] = field(default_factory=dict)
    grads: tuple[Tensor, ...] = ()
    dtype: torch.dtype = torch.float64

    @property
    def terms(self) -> int:
        """Rows that a query reads, at most."""
        return sum(len(rows) for rows, _ in self.sources)

    def to(self, dtype: torch.dtype) -> Problem:
        """In another dtype; a bias in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        rows = [
            replace(r, k=r.k.to(dtype), v=r.v.to(dtype), bias=None if r.bias is None else r.bias.to(wide))
            for r, _ in self.sources
        ]
        sources = list(zip(rows, (layout for _, layout in self.sources), strict=True))
        return replace(self, q=self.q.to(dtype), sources=sources, dtype=dtype)


def draw(seed: int, sizes: Sizes = GPU, device: torch.device | str = "cpu") -> Problem:
    """A random call: everything that attend takes, in any combination, half of the tensors strided."""
    pick, gen = random.Random(seed), torch.Generator(device).manual_seed(seed)
    batch, kv_heads = pick.choice(sizes.batch), pick.choice(sizes.kv_heads)
    heads = kv_heads * pick.choice(sizes.repeat)
    tokens, width = pick.choice(sizes.tokens), pick.choice(sizes.width)
    value_width, q_block = pick.choice(sizes.value_width) or width, pick.choice(sizes.q_block)
    blocks = -(-tokens // q_block)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, device=device, dtype=torch.float64).to(sizes.rounded).double()

    def strided(heads: int, rows: int, width: int) -> Tensor:
        """[B, H, S, D], half of the time as a view of [B, S, H, D]."""
        if pick.random() < 0.5:
            return normal(batch, rows, heads, width).transpose(1, 2)
        return normal(batch, heads, rows, width)

    def whole(end: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, end, shape, generator=gen, device=device, dtype=dtype)

    grouped = pick.random() < 0.3
    sources = []
    for _ in range(pick.choice([1, 2])):
        rows, k_block = pick.choice(sizes.rows), pick.choice(sizes.k_block)
        row_blocks = -(-rows // k_block)
        picks = pick.randint(0, min(row_blocks, sizes.picks))
        lead = pick.choice([1, batch]), pick.choice([1, heads])
        order = torch.rand(*lead, blocks, row_blocks, generator=gen, device=device).argsort(-1)
        index = order[..., :picks].sort(-1).values.to(torch.int32)
        count = whole(picks + 1, *lead, blocks, dtype=torch.int32)
        causal, reach, sinks = pick.random() < 0.5, pick.choice([None, None, 20]), pick.choice([0, 3])
        layout = Layout(index, count, q_block, k_block, tokens, rows, causal, reach, sinks)
        extra: dict[str, Tensor] = {}
        if pick.random() < 0.5 and (sizes.single or rows > 1):
            extra["bias"] = normal(pick.choice([1, batch]), pick.choice([1, kv_heads, heads]), rows)
            extra["bias"][..., : rows // 5] = float("-inf")
        if pick.random() < 0.5:
            extra["end"] = whole(sizes.latest, pick.choice([1, batch]), pick.choice([1, kv_heads]), rows)
        if grouped:
            extra["group"] = whole(3, 1, kv_heads, rows)
        k, v = strided(kv_heads, rows, width), strided(kv_heads, rows, value_width)
        drawn = Rows(k, v, extra.get("end"), extra.get("bias"), extra.get("group"))
        sources.append((drawn, layout))
    options = {}
    if pick.random() < 0.5:
        options["position"] = whole(sizes.latest, 1, pick.choice([1, heads]), tokens)
    if grouped:
        options["group"] = whole(3, batch, 1, tokens)
    grads = strided(heads, tokens, value_width), normal(batch, heads, tokens)
    return Problem(strided(heads, tokens, width), sources, options, grads, pick.choice(sizes.dtypes))


def arguments(problem: Problem) -> Call:
    """The same call for an implementation."""
    q, sources = problem.q, problem.sources
    none = q.new_empty(0)

    def per_head(x: Tensor | None) -> Tensor:
        return none if x is None else x[None, None] if x.dim() == 1 else x

    plans = [
        Plan(p.q_block, p.k_block, p.causal, -1 if p.reach is None else p.reach, p.sinks, p.own) for _, p in sources
    ]
    rows = [r for r, _ in sources]
    bias, end, row_group = ([per_head(getattr(r, name)) for r in rows] for name in ("bias", "end", "group"))
    return Call(
        q, [r.k for r in rows], [r.v for r in rows], bias, end, row_group, per_head(problem.options.get("position")),
        per_head(problem.options.get("group")), [p.index for _, p in sources], [p.count for _, p in sources], plans,
        q.shape[-1] ** -0.5,
    )  # fmt: skip
