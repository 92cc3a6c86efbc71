"""The lists of select.sharded, select.powers and scored.recent on the GPU: one launch, one lane an entry.

Every entry of these lists follows from its place alone, so nothing is sorted and nothing read back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.replay import start as launch

SIZE = 1024  # entries of a program


@triton.jit
def _place(blocks, picks, start, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """Of each entry: its number, its list, its place in it, its query tile, the block that the tile is part of."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    # a list's number and place fit 32 bits, whose division is a tenth of the work of 64 bits'
    number = (at // picks).to(tl.int32)
    place = (at - number.to(tl.int64) * picks).to(tl.int32)
    n = start + number % blocks
    return at, number, place, n, n // SPLIT


@triton.jit
def _put(index, count, at, number, place, block, listed, n, picks, total, SPLIT: tl.constexpr):
    """Entry `place` of a list of `listed` blocks, each SPLIT tiles, the last block up to tile n."""
    filled = listed * SPLIT - SPLIT + n % SPLIT + 1
    tile = block * SPLIT + place % SPLIT
    tl.store(index + at, tl.where(place < filled, tile, 0), mask=at < total)
    tl.store(count + number, filled, mask=(at < total) & (place == 0))


@triton.jit(
    do_not_specialize=[
        "start", "blocks", "picks", "total", "first", "repeat", "sparse", "stride", "step", "offset", "local",
    ]
)  # fmt: skip
def shard_lists(
    index, count, start, blocks, picks, total, first, repeat, sparse, stride, step, offset, local,
    SPLIT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at, number, place, n, own = _place(blocks, picks, start, SPLIT, SIZE)
    g = number // blocks // repeat
    every = tl.where(g < sparse, stride, 1)
    owned = (stride - (g * step + offset) % stride) % every
    # the first block at hand that the head keeps; divisions here round towards 0
    lead = first + (owned + every - first % every) % every
    remote = tl.maximum(own - local - lead + every, 0) // every
    near = tl.maximum(own - local + 1, first)
    nth = place // SPLIT
    block = tl.where(nth < remote, lead + every * nth, near + nth - remote) - first
    _put(index, count, at, number, place, block, remote + own - near + 1, n, picks, total, SPLIT)


@triton.jit(do_not_specialize=["start", "blocks", "picks", "total", "window", "sinks"])
def power_lists(
    index, count, start, blocks, picks, total, window, sinks, SPLIT: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    at, number, place, n, own = _place(blocks, picks, start, SPLIT, SIZE)
    low = tl.minimum(tl.maximum(own - window + 1, 0), sinks)
    # powers of two up to the distance of the first block that is no sink, and those within the window
    reached = tl.zeros([SIZE], tl.int32)
    close = 0
    for bit in tl.static_range(31):
        reached += (own - sinks >= 1 << bit).to(tl.int32)
        close += (window > 1 << bit).to(tl.int32)
    far = tl.maximum(reached - close, 0)
    near = tl.minimum(window, own + 1)
    nth = place // SPLIT
    distance = 1 << tl.minimum(tl.maximum(reached - 1 - (nth - low), 0), 30)
    block = tl.where(nth < low, nth, tl.where(nth < low + far, own - distance, own - near + 1 + nth - low - far))
    _put(index, count, at, number, place, block, low + far + near, n, picks, total, SPLIT)


@triton.jit(do_not_specialize=["tokens", "rows", "width", "picks", "total"])
def recent_lists(index, count, tokens, rows, width, picks, total, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    number = (at // picks).to(tl.int32)
    place = (at - number.to(tl.int64) * picks).to(tl.int32)
    row = number * BLOCK + rows - tokens
    first = tl.maximum(row - width + 1, 0) // BLOCK
    last = tl.minimum((row + BLOCK - 1) // BLOCK, (rows + BLOCK - 1) // BLOCK - 1)
    tl.store(index + at, tl.minimum(first + place, last), mask=at < total)
    tl.store(count + number, last - first + 1, mask=(at < total) & (place == 0))


def shards(
    start: int, blocks: int, picks: int, first: int, heads: int, repeat: int, sparse: int, stride: int, step: int,
    offset: int, local: int, split: int, device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """index [1, heads * repeat, blocks, picks] and count, int32; the contract is select.static.shard_lists'."""
    index = torch.empty(1, heads * repeat, blocks, picks, dtype=torch.int32, device=device)
    count = torch.empty(1, heads * repeat, blocks, dtype=torch.int32, device=device)
    total = heads * repeat * blocks * picks
    launch(
        shard_lists, (-(-total // SIZE),),
        index, count, start, blocks, picks, total, first, repeat, sparse, stride, step, offset, local,
        SPLIT=split, SIZE=SIZE, num_warps=4,
    )  # fmt: skip
    return index, count


def powers(
    start: int, blocks: int, picks: int, window: int, sinks: int, split: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """index [1, 1, blocks, picks] and count, int32; the contract is select.static.power_lists'."""
    index = torch.empty(1, 1, blocks, picks, dtype=torch.int32, device=device)
    count = torch.empty(1, 1, blocks, dtype=torch.int32, device=device)
    total = blocks * picks
    launch(
        power_lists, (-(-total // SIZE),),
        index, count, start, blocks, picks, total, window, sinks, SPLIT=split, SIZE=SIZE, num_warps=4,
    )  # fmt: skip
    return index, count


def recent(tokens: int, rows: int, width: int, block: int, picks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """index [1, 1, blocks, picks] and count, int32; the contract is select.scored.recent's."""
    blocks = -(-tokens // block)
    index = torch.empty(1, 1, blocks, picks, dtype=torch.int32, device=device)
    count = torch.empty(1, 1, blocks, dtype=torch.int32, device=device)
    total = blocks * picks
    launch(
        recent_lists, (-(-total // SIZE),),
        index, count, tokens, rows, width, picks, total, BLOCK=block, SIZE=SIZE, num_warps=4,
    )  # fmt: skip
    return index, count
