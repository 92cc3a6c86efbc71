"""Layouts that depend on lengths only: full, window, strided, sharded over heads, powers of two, FMA's multipole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.library import custom_op

from farfield.ops import lists as on_gpu
from farfield.ops.eager import eager
from farfield.types import Layout


def full(
    *,
    tokens: int,
    rows: int | None = None,
    q_block: int = 64,
    k_block: int = 64,
    causal: bool = False,
    device: torch.device | str | None = None,
) -> Layout:
    """Each query reads every row, or with `causal` every row up to its own."""
    rows = tokens if rows is None else rows
    _positive(tokens=tokens, rows=rows, q_block=q_block, k_block=k_block)
    blocks, row_blocks = -(-tokens // q_block), -(-rows // k_block)
    index = torch.arange(row_blocks, dtype=torch.int32, device=device).expand(1, 1, blocks, row_blocks)
    count = torch.full((1, 1, blocks), row_blocks, dtype=torch.int32, device=device)
    if causal and rows == tokens:
        last = torch.arange(1, blocks + 1, dtype=torch.int32, device=device) * q_block - 1
        count = (last // k_block + 1).clamp(max=row_blocks)[None, None]
    return Layout(index, count, q_block, k_block, tokens, rows, causal)


def window(
    *,
    tokens: int,
    width: int,
    rows: int | None = None,
    sinks: int = 0,
    block: int = 64,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Layout:
    """Each query reads the rows less than `width` positions away, itself included, and the first `sinks` rows.

    Exact to the token: the lists name blocks of `block`, and the layout's `reach` trims them.

    Args:
        rows: S >= tokens; the last query stands at the last row. Default `tokens`.
    """
    rows = tokens if rows is None else rows
    _positive(tokens=tokens, width=width, block=block)
    if rows < tokens:
        raise ValueError(f"window: every query needs its own row, got {tokens} queries and {rows} rows")
    blocks, row_blocks = -(-tokens // block), -(-rows // block)
    n = torch.arange(blocks, device=device) * block + rows - tokens  # the row of a block's first query
    first = ((n - width + 1) // block).clamp(min=0)
    last = ((n + block - 1 + (0 if causal else width - 1)) // block).clamp(max=row_blocks - 1)
    slots = torch.arange(min(row_blocks, ((1 if causal else 2) * (width - 1) + block - 1) // block + 2), device=device)
    sink_slots = torch.arange(-(-min(sinks, rows) // block), device=device).expand(blocks, -1)
    near = first[:, None] + slots
    index, count = pack_lists(
        torch.cat([sink_slots, near], -1),
        torch.cat([sink_slots < first[:, None], near <= last[:, None]], -1),
    )
    return Layout(index[None, None], count[None, None], block, block, tokens, rows, causal, width, sinks)


def strided(
    *,
    tokens: int,
    stride: int,
    local: int = 1,
    block: int = 64,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Layout:
    """Each query block reads itself, the `local - 1` blocks before it, and every `stride`-th block before those.

    The strided pattern of Sparse Transformers (Child et al. 2019, arXiv:1904.10509) in blocks; noncausal lists are
    mirrored to the blocks after.
    """
    _positive(tokens=tokens, stride=stride, local=local, block=block)
    blocks = -(-tokens // block)
    n = torch.arange(blocks, device=device)[:, None]
    steps = torch.arange(blocks // stride + 1, device=device)
    near = torch.arange(local, device=device)
    back = torch.cat([n - near, n - (local - 1 + (steps + 1) * stride)], 1)
    # a distance of 0 belongs to the backward half
    ahead = torch.cat([n + near[1:], n + (local - 1 + (steps + 1) * stride)], 1)
    listed = back if causal else torch.cat([back, ahead], 1)
    index, count = pack_lists(listed, (listed >= 0) & (listed < blocks))
    return Layout(index[None, None], count[None, None], block, block, tokens, tokens, causal)


class Shards(NamedTuple):
    """How far blocks are shared out over key heads: head g has block J iff (J + g * step + offset) % stride == 0.

    Args:
        heads: G, key heads.
        local: how many blocks, a query's own included, all heads read.
        step: how far the blocks of a head and of the next are apart; 0 gives all heads the same.
        dense: how many heads, the last ones, have all blocks.
    """

    heads: int
    stride: int
    local: int
    step: int
    offset: int = 0
    dense: int = 0

    def owned(self, first: int, stop: int, device: torch.device) -> Bool[Tensor, "N G"]:
        """Which heads have which of the blocks first .. stop - 1."""
        g = torch.arange(self.heads, device=device)
        block = torch.arange(first, stop, device=device)[:, None]
        return ((block + g * self.step + self.offset) % self.stride == 0) | (g >= self.heads - self.dense)

    def before(self, stop: int) -> list[int]:
        """How many of the blocks before `stop` each head has."""
        leads = [-(g * self.step + self.offset) % self.stride for g in range(self.heads - self.dense)]
        return [len(range(lead, stop, self.stride)) for lead in leads] + [stop] * self.dense

    def most(self, last: int, first: int = 0) -> int:
        """How many blocks from `first` on a query of block `last`, or of one before it, reads at most."""
        all_of_it = last - first + 1
        picks = min(self.local, all_of_it) + max(0, last - self.local - first + self.stride) // self.stride
        return all_of_it if self.dense else min(picks, all_of_it)


def sharded(
    *,
    tokens: int,
    heads: int,
    stride: int,
    local: int,
    block: int = 128,
    repeat: int = 1,
    step: int | None = None,
    offset: int = 0,
    dense: int = 0,
    device: torch.device | str | None = None,
) -> Layout:
    """A context shared out over the heads: all read the same blocks close by, and each its own of those far away.

    Key head g of query block I reads block J iff

        I - local < J <= I    or    J <= I and (J + g * step + offset) % stride == 0

    Positions are absolute: what a head does not read once it is no longer local, it never reads again. Blocks that
    split into tiles of 128 or 64 tokens are listed as tiles, the last one up to the query's own.

    Args:
        heads: G, key heads; `repeat` query heads share the list of each.
        step: how far the blocks of a head and of the next are apart. Default stride / heads, at least 1: the heads
            spread over all residues. 0 gives all heads the same blocks.
        dense: how many heads, the last ones, read everything.

    Source: S2-Attention (Lin et al. 2024, arXiv:2407.17678).
    """
    _positive(tokens=tokens, heads=heads, stride=stride, local=local, block=block, repeat=repeat)
    if not 0 <= dense <= heads:
        raise ValueError(f"sharded: dense must be 0 .. heads={heads}, got {dense}")
    plan = Shards(heads, stride, local, max(1, stride // heads) if step is None else step, offset, dense)
    tile = tile_of(block)
    lists = shard_lists(0, -(-tokens // tile), plan, split=block // tile, repeat=repeat, device=device)
    return Layout(*lists, tile, tile, tokens, tokens, causal=True)


def shard_lists(
    start: int,
    stop: int,
    plan: Shards,
    *,
    split: int = 1,
    repeat: int = 1,
    first: int = 0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """index [1, H, N, P] and count of `sharded`, for the query tiles start .. stop - 1; `split` tiles are a block.

    Args:
        first: the first block at hand, which gets number 0; those before it are left out of the lists.
    """
    last = (stop - 1) // split
    on = _device(device)
    if on.type == "cuda" and eager():
        heads, stride, local, step, offset, dense = plan
        picks = plan.most(last, first) * split
        return on_gpu.shard_lists(
            start, stop - start, picks, first, heads, repeat, heads - dense, stride, step % stride, offset % stride,
            local, split, on,
        )  # fmt: skip
    return shard_lists_of(torch.arange(start, stop, device=on), last, plan, split=split, repeat=repeat, first=first)


def shard_lists_of(
    n: Int[Tensor, " N"], last: int, plan: Shards, *, split: int = 1, repeat: int = 1, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The same for these query tiles, none of them after block `last`."""
    heads, stride, local, step, offset, dense = plan
    picks = plan.most(last, first) * split
    g = (torch.arange(heads * repeat, device=n.device) // repeat)[:, None]
    place = torch.arange(picks, device=n.device)
    every = torch.where(g < heads - dense, stride, 1)
    lead = first + (-(g * step + offset) % stride - first) % every
    own = n // split
    remote = (own - local - lead + every).clamp(min=0) // every
    near = (own - local + 1).clamp(min=first)
    count = (remote + own - near) * split + n % split + 1
    nth, remote = place // split, remote[..., None]
    block = torch.where(nth < remote, lead[..., None] + every[..., None] * nth, near[:, None] + nth - remote) - first
    return _filled(block * split + place % split, count)


def powers(
    *,
    tokens: int,
    block: int = 256,
    window: int = 5,
    sinks: int = 1,
    device: torch.device | str | None = None,
) -> Layout:
    """Each query block reads the blocks at distances 1, 2, 4, 8, ..., the `window` latest and the `sinks` first.

    Its own block counts as one of the window. With window = 1 and no sinks, what L layers carry to a block comes from
    exactly those distances that have at most L ones in binary: log2(blocks) layers connect all.

    Blocks that split into tiles of 128 or 64 tokens are listed as tiles, the last one up to the query's own.

    Source: PowerAttention (Chen et al. 2025, arXiv:2503.03588).
    """
    _positive(tokens=tokens, block=block, window=window)
    tile = tile_of(block)
    lists = power_lists(0, -(-tokens // tile), window=window, sinks=sinks, split=block // tile, device=device)
    return Layout(*lists, tile, tile, tokens, tokens, causal=True)


def power_lists(
    start: int, stop: int, *, window: int, sinks: int, split: int = 1, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """index [1, 1, N, P] and count of `powers`, for the query tiles start .. stop - 1; `split` tiles are a block."""
    last = (stop - 1) // split
    picks = _power_picks(last, window, sinks) * split
    on = _device(device)
    if on.type == "cuda" and eager():
        return on_gpu.power_lists(start, stop - start, picks, window, sinks, split, on)
    return power_lists_of(torch.arange(start, stop, device=on), last, window=window, sinks=sinks, split=split)


def power_lists_of(
    n: Int[Tensor, " N"], last: int, *, window: int, sinks: int, split: int = 1
) -> tuple[Tensor, Tensor]:
    """The same for these query tiles, none of them after block `last`."""
    place = torch.arange(_power_picks(last, window, sinks) * split, device=n.device)
    own = n // split
    low = (own - window + 1).clamp(min=0, max=sinks)
    distances = 2 ** torch.arange(last.bit_length(), device=n.device)
    reached = (distances <= own[:, None] - sinks).sum(-1)
    far = (reached - (window - 1).bit_length()).clamp(min=0)
    near = (own + 1).clamp(max=window)
    count = (low + far + near - 1) * split + n % split + 1
    nth = place // split
    own, low, reached, far, near = (x[:, None] for x in (own, low, reached, far, near))
    distance = 2 ** (reached - 1 - nth + low).clamp(min=0)
    block = torch.where(nth < low + far, own - distance, own - near + 1 + nth - low - far)
    index, count = _filled(torch.where(nth < low, nth, block) * split + place % split, count)
    return index[None], count[None]


def _power_picks(last: int, window: int, sinks: int) -> int:
    """Blocks that a query of block `last`, or of one before it, reads at most."""
    # every power of two from the window on, up to the distance of the first block that is no sink
    steps = max(0, max(last - sinks, 0).bit_length() - (window - 1).bit_length())
    return min(sinks + steps + window, last + 1)


def tile_of(block: int) -> int:
    """The part of a block that a list names: 128 or 64 tokens where the block is made of such, else all of it."""
    return next((tile for tile in (128, 64) if block % tile == 0), block)


def lead_in(start: int, tokens: int, tile: int) -> int:
    """How many queries to put before these, so that none of their tiles holds the end of one tile of the sequence and
    the start of the next. `start` is the position of the first.
    """
    into = start % tile
    return into if into + tokens > tile else 0


def _filled(index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """[H, N, P] and [H, N] as int32 with a batch of 1, 0 past the counts."""
    past = torch.arange(index.shape[-1], device=index.device) >= count[..., None]
    return index.masked_fill(past, 0).to(torch.int32)[None], count.to(torch.int32)[None]


def _device(device: torch.device | str | None) -> torch.device:
    return device if isinstance(device, torch.device) else torch.empty(0, device=device).device


class Multipole(NamedTuple):
    """FMA's two layouts: the near field over the tokens and the far field over the pyramid of `summarize`."""

    near: Layout
    far: Layout


def multipole(
    *,
    tokens: int,
    block: int = 64,
    near: int = 128,
    rank: int = 16,
    causal: bool = True,
    levels: int | None = None,
    device: torch.device | str | None = None,
) -> Multipole:
    """Near field exact, far field through ever coarser groups: each (query, token) pair is covered exactly once.

    A query block reads its own block and the near / block blocks before it (and after it, noncausal) token by token;
    level l of the far field, groups of block * 2^(l-1) tokens, supplies what the children of the parent's neighbours
    add to its own neighbours. Queries read O(near + rank * log(tokens)) rows.

    Args:
        tokens: T = S.
        block: tokens of a query block, of a near block and of a group of level 1.
        near: exact tokens to each side at least; a multiple of `block`.
        rank: rows of a group; the far layout's lists name groups of the pyramid `summarize(rows, block, rank)`.
        levels: how many there are at most; tokens beyond the last one's groups are not read. Default: all are read.

    Source: Fast Multipole Attention (Kang, Tran, De Sterck 2023, arXiv:2310.11960), the interaction lists;
    near > block is ours.
    """
    _positive(tokens=tokens, block=block, near=near, rank=rank)
    blocks = -(-tokens // block)
    first, start = [], 0
    for level in range(depth(blocks) if levels is None else min(levels, depth(blocks))):
        first.append(start)
        start += -(-blocks // 2**level)
    near_list, far_list = tree_lists(blocks, radii(near, block, len(first)), first, causal, device=device)
    # every group of a causal list is complete and past: nothing is left to hide
    far = Layout(*far_list, block, rank, tokens, start * rank, causal=False)
    return Multipole(Layout(*near_list, block, block, tokens, tokens, causal), far)


def depth(blocks: int) -> int:
    """Levels of a pyramid over so many blocks: the coarsest still has three groups, two of which are no neighbours."""
    levels = 0
    while -(-blocks // 2**levels) >= 3:
        levels += 1
    return levels


def radii(near: int, block: int, levels: int) -> tuple[int, ...]:
    """How many groups to each side are neighbours, level by level: near / block at the finest, halving to 1.

    One more entry than `levels`. Twice the radius above is at least the radius below, which makes the lists a
    partition.

    Raises:
        ValueError: `near` is not a positive multiple of `block`.
    """
    if near < block or near % block:
        raise ValueError(f"multipole: near must be a positive multiple of block={block}, got {near}")
    found = [near // block]
    for _ in range(levels):
        found.append(-(-found[-1] // 2))
    return tuple(found)


def near_lists(
    n: Int[Tensor, "*batch N"], radius: int, causal: bool, blocks: int | Int[Tensor, "*batch N"]
) -> tuple[Int[Tensor, "*batch N P"], Bool[Tensor, "*batch N P"]]:
    """Blocks within `radius` of block n of a sequence of `blocks` blocks, and which of them exist."""
    listed = n[..., None] + torch.arange(-radius, 1 if causal else radius + 1, device=n.device)
    blocks = blocks[..., None] if isinstance(blocks, Tensor) else blocks
    return listed, (listed >= 0) & (listed < blocks)


def far_lists(
    n: Int[Tensor, "*batch N"],
    radius: Sequence[int],
    causal: bool,
    blocks: int | Int[Tensor, "*batch N"],
) -> tuple[list[Int[Tensor, "*batch N P"]], list[Bool[Tensor, "*batch N P"]]]:
    """For each level, the groups that block n of a sequence of `blocks` blocks reads, and which of them exist.

    `radius` is `radii(...)`: the levels are one fewer.
    """
    listed, used = [], []
    blocks = blocks[..., None] if isinstance(blocks, Tensor) else blocks
    for level, (own, above) in enumerate(pairwise(radius)):
        group = (n >> level)[..., None]
        parent = group >> 1
        slots = torch.arange(2 * above - own + 1, device=n.device)
        left = 2 * (parent - above) + slots
        listed.append(left)
        used.append((left >= 0) & (left < group - own))
        if not causal:
            right = group + own + 1 + slots
            groups = (blocks + 2**level - 1) >> level
            listed[-1] = torch.cat([left, right], -1)
            used[-1] = torch.cat([used[-1], (right < groups) & (right <= 2 * (parent + above) + 1)], -1)
    return listed, used


def tree_lists(
    blocks: int,
    radius: Sequence[int],
    starts: Sequence[int],
    causal: bool,
    *,
    start: int = 0,
    first: int = 0,
    sink_groups: int = 0,
    device: torch.device | str | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The near and far lists of blocks start .. blocks - 1 of a sequence, each as index [1, 1, N, P] and count.

    Args:
        blocks: of the whole sequence.
        radius: `radii(...)`, one more than there are levels.
        starts: per level, what to add to a group's number to find it among the far groups.
        start: the first block that gets lists.
        first: number of the first near block at hand.
        sink_groups: how many far groups, the first ones, hold the sinks of the sequence: read where block 0 is no
            neighbour.
    """
    if eager():
        lists = _lists(start, blocks, radius, starts, causal, first, sink_groups, _device(device))
    else:
        on = torch.empty(0, device=device)
        lists = _tree_lists(on, start, blocks, list(radius), list(starts), causal, first, sink_groups)
    near, near_count, far, far_count = lists
    return (near, near_count), (far, far_count)


def _lists(
    start: int, blocks: int, radius: Sequence[int], starts: Sequence[int], causal: bool, first: int, sink_groups: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if device.type == "cuda":
        return on_gpu.tree_lists(start, blocks, radius, starts, causal, first, sink_groups, device)
    n = torch.arange(start, blocks, device=device)[None, None]
    listed, used = near_lists(n, radius[0], causal, blocks)
    near = pack_lists(listed - first, used)
    far, used = far_lists(n, radius, causal, blocks)
    far = [x + at for x, at in zip(far, starts, strict=True)]
    sinks = torch.arange(sink_groups, device=device).expand(*n.shape, -1)
    far = pack_lists(torch.cat([sinks, *far], -1), torch.cat([(n > radius[0])[..., None].expand_as(sinks), *used], -1))
    return *near, *far


# One opaque op: traced, this is some fifty small integer kernels for a compiler to chew on, in every layer.
@custom_op("farfield::tree_lists", mutates_args=())
def _tree_lists(
    on: Tensor, start: int, blocks: int, radius: Sequence[int], starts: Sequence[int], causal: bool, first: int,
    sink_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`on`: any tensor on the device."""
    return _lists(start, blocks, radius, starts, causal, first, sink_groups, on.device)


@_tree_lists.register_fake
def _(on, start, blocks, radius, starts, causal, first, sink_groups):
    many, sides = blocks - start, 1 if causal else 2
    picks = sink_groups + sum(sides * (2 * above - own + 1) for own, above in pairwise(radius))
    shapes = (1, 1, many, sides * radius[0] + 1), (1, 1, many), (1, 1, many, picks), (1, 1, many)
    return tuple(on.new_empty(shape, dtype=torch.int32) for shape in shapes)


def pack_lists(
    listed: Int[Tensor, "*batch P"], used: Bool[Tensor, "*batch P"]
) -> tuple[Int[Tensor, "*batch P"], Int[Tensor, "*batch"]]:
    """The used entries of each list in ascending order, then zeros; and how many they are."""
    unused = torch.iinfo(torch.int32).max
    index = listed.masked_fill(~used, unused).to(torch.int32).sort(-1).values
    return index.masked_fill(index == unused, 0), used.sum(-1, dtype=torch.int32)


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral | torch.SymInt) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
