"""Layouts as sets of (query block, row block) pairs: union, difference, transpose, density, pictures, conversions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from farfield.types import Layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask

_UNUSED = torch.iinfo(torch.int32).max


class Transpose(NamedTuple):
    """Who reads each row block: query blocks `query[b, h, start[b, h, m] : start[b, h, m + 1]]`, ascending.

    As long as the layout's lists, however unevenly the row blocks are read.
    """

    start: Int[Tensor, "B H M1"]
    query: Int[Tensor, "B H NP"]


def union(a: Layout, b: Layout) -> Layout:
    """Read what either layout reads."""
    _alike("union", a, b)
    listed = torch.cat(_broadcast(_entries(a), _entries(b)), -1).sort(-1).values
    repeated = torch.zeros_like(listed, dtype=torch.bool)
    repeated[..., 1:] = listed[..., 1:] == listed[..., :-1]
    return _from_entries(a, listed.masked_fill(repeated, _UNUSED))


def minus(a: Layout, b: Layout) -> Layout:
    """Read what `a` reads and `b` does not."""
    _alike("minus", a, b)
    ours, theirs = (x.contiguous() for x in _broadcast(_entries(a), _entries(b)))
    if theirs.shape[-1] == 0:
        return a
    at = torch.searchsorted(theirs, ours).clamp(max=theirs.shape[-1] - 1)
    return _from_entries(a, ours.masked_fill(theirs.gather(-1, at) == ours, _UNUSED))


def transpose(layout: Layout) -> Transpose:
    """Who reads each row block; linear in the number of list entries, on the layout's device, without a host sync."""
    b, h, blocks, picks = layout.index.shape
    keys = torch.where(layout.used(), layout.index.long(), layout.row_blocks).reshape(b, h, blocks * picks)
    ordered, order = keys.sort(dim=-1, stable=True)
    query = (order // max(picks, 1)).to(torch.int32)
    bounds = torch.arange(layout.row_blocks + 1, device=keys.device).expand(b, h, -1).contiguous()
    return Transpose(torch.searchsorted(ordered, bounds).to(torch.int32), query)


def density(layout: Layout) -> float:
    """Share of all (query block, row block) pairs that is read, before `end`, `reach` and groups hide anything."""
    return layout.count.double().mean().item() / layout.row_blocks


def visible(layout: Layout) -> float:
    """Rows that a query sees on average, over batches, heads and queries; rows are plain tokens (end = row, position =
    query). Exact, in the size of the lists."""
    n = torch.arange(layout.index.shape[2], device=layout.index.device)[:, None]
    i, stop = n * layout.q_block, ((n + 1) * layout.q_block).clamp(max=layout.tokens)
    first = layout.index.long() * layout.k_block
    end = (first + layout.k_block).clamp(max=layout.rows)

    def upto(shift: int, most: int | None = None) -> Tensor:
        """Pairs of each entry whose row is at most the query's position - shift, of the rows below `most`."""
        size = ((end if most is None else end.clamp(max=most)) - first).clamp(min=0)

        def before(x: Tensor) -> Tensor:
            inside = x.clamp(min=0).minimum(size)
            return inside * (inside + 1) // 2 + (x - size).clamp(min=0) * size

        # query i sees min(i - shift - first + 1, size) of them
        return before(stop - shift - first) - before(i - shift - first)

    def within(most: int | None) -> Tensor:
        return upto(0 if layout.causal else -layout.rows, most)

    pairs = within(None)
    if layout.reach is not None:
        past, ahead = layout.reach, 1 - layout.reach
        outside = [upto(past, most) for most in (None, layout.sinks)]
        if not layout.causal:
            outside = [
                x + within(most) - upto(ahead, most) for x, most in zip(outside, (None, layout.sinks), strict=True)
            ]
        pairs = pairs - outside[0] + outside[1]
    used = pairs.masked_fill(~layout.used(), 0)
    return used.sum().item() / max(math.prod(used.shape[:2]) * layout.tokens, 1)


def to_dense(layout: Layout) -> Bool[Tensor, "#B #H T S"]:
    """The T x S mask of a layout over plain tokens (end = row, position = query). For tests and pictures."""
    b, h, blocks, _ = layout.index.shape
    pairs = torch.zeros(b, h, blocks, layout.row_blocks + 1, dtype=torch.bool, device=layout.index.device)
    pairs.scatter_(-1, torch.where(layout.used(), layout.index.long(), layout.row_blocks), True)
    mask = pairs[..., :-1].repeat_interleave(layout.q_block, 2).repeat_interleave(layout.k_block, 3)
    mask = mask[:, :, : layout.tokens, : layout.rows]
    i = torch.arange(layout.tokens, device=mask.device)[:, None]
    r = torch.arange(layout.rows, device=mask.device)
    if layout.causal:
        mask = mask & (r <= i)
    if layout.reach is not None:
        mask = mask & (((i - r).abs() < layout.reach) | (r < layout.sinks))
    return mask


def from_dense(mask: Bool[Tensor, "#B #H T S"], *, q_block: int, k_block: int, causal: bool = False) -> Layout:
    """The smallest layout that reads every True of a T x S mask: whole blocks. For tests and small experiments."""
    b, h, tokens, rows = mask.shape
    blocks, row_blocks = -(-tokens // q_block), -(-rows // k_block)
    padded = torch.zeros(b, h, blocks * q_block, row_blocks * k_block, dtype=torch.bool, device=mask.device)
    padded[:, :, :tokens, :rows] = mask
    pairs = padded.view(b, h, blocks, q_block, row_blocks, k_block).any(5).any(3)
    listed = torch.arange(row_blocks, dtype=torch.int32, device=mask.device).expand_as(pairs)
    count = pairs.sum(-1, dtype=torch.int32)
    index = listed.masked_fill(~pairs, _UNUSED).sort(-1).values[..., : int(count.max()) if count.numel() else 0]
    return Layout(index.masked_fill(index == _UNUSED, 0), count, q_block, k_block, tokens, rows, causal)


def to_block_mask(layout: Layout) -> BlockMask:
    """The same layout for PyTorch's flex_attention, its causal, reach and sinks rules as the mask_mod.

    BlockMask keeps lists of full width: memory N * M per head.
    """
    from torch.nn.attention.flex_attention import BlockMask

    b, h, blocks, picks = layout.index.shape
    # full width: narrower lists were transposed wrongly by some PyTorch versions
    index = torch.zeros(b, h, blocks, layout.row_blocks, dtype=torch.int32, device=layout.index.device)
    width = min(picks, layout.row_blocks)
    index[..., :width] = layout.index[..., :width]
    causal, reach, sinks = layout.causal, layout.reach, layout.sinks

    def seen(batch: Tensor, head: Tensor, i: Tensor, r: Tensor) -> Tensor:
        past = r <= i if causal else r >= 0
        return past if reach is None else past & (((i - r).abs() < reach) | (r < sinks))

    return BlockMask.from_kv_blocks(
        layout.count.contiguous(),
        index,
        BLOCK_SIZE=(layout.q_block, layout.k_block),
        mask_mod=seen,
        seq_lengths=(layout.tokens, layout.rows),
    )


def from_block_mask(mask: BlockMask, *, causal: bool = False) -> Layout:
    """The blocks that a BlockMask names, partial and full ones alike; its mask_mod is not carried over.

    Args:
        causal: the mask_mod is plain causality, which a layout can express.
    """
    q_block, k_block = mask.BLOCK_SIZE
    tokens, rows = mask.seq_lengths

    def layout(index: Tensor, count: Tensor) -> Layout:
        used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        index = torch.where(used, index, _UNUSED).sort(-1).values
        index = index.masked_fill(index == _UNUSED, 0).to(torch.int32)
        return Layout(index, count.to(torch.int32), q_block, k_block, tokens, rows, causal)

    partial = layout(mask.kv_indices, mask.kv_num_blocks)
    if mask.full_kv_indices is None or mask.full_kv_num_blocks is None:
        return partial
    return union(partial, layout(mask.full_kv_indices, mask.full_kv_num_blocks))


def plot(layout: Layout, ax: Axes | None = None, *, batch: int = 0, head: int = 0, color: str = "#2a6f97") -> Axes:
    """Draw which row blocks (across) each query block (down) reads."""
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(4, 4))[1] if ax is None else ax
    index, count = layout.index[batch, head].cpu(), layout.count[batch, head].cpu()
    bars = [
        (m * layout.k_block, n * layout.q_block)
        for n in range(index.shape[0])
        for m in index[n, : int(count[n])].tolist()
    ]
    ax.bar(
        [m for m, _ in bars], layout.q_block, width=layout.k_block, bottom=[n for _, n in bars],
        align="edge", color=color, edgecolor="white", linewidth=0.4,
    )  # fmt: skip
    ax.set(xlim=(0, layout.rows), ylim=(layout.tokens, 0), xlabel="row", ylabel="query", aspect="auto")
    return ax


def _entries(layout: Layout) -> Int[Tensor, "B H N P"]:
    """The lists with _UNUSED past their counts: still ascending."""
    return layout.index.masked_fill(~layout.used(), _UNUSED)


def _from_entries(like: Layout, listed: Int[Tensor, "B H N P"]) -> Layout:
    listed = listed.sort(-1).values
    used = listed != _UNUSED
    return replace(like, index=listed.masked_fill(~used, 0), count=used.sum(-1, dtype=torch.int32), own=False)


def _broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    lead = torch.broadcast_shapes(a.shape[:3], b.shape[:3])
    return a.expand(*lead, -1), b.expand(*lead, -1)


def _alike(who: str, a: Layout, b: Layout) -> None:
    for name in ("q_block", "k_block", "tokens", "rows", "causal", "reach", "sinks"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"{who}: the layouts differ in {name}, {getattr(a, name)} and {getattr(b, name)}; "
                "attend can read several (rows, layout) sources instead"
            )
