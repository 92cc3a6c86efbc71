"""FMA's near and far lists on the GPU: one launch for all of them.

On each level the groups that a query block reads are a run before its neighbours and, noncausal, a run after them:
runs of at most two groups, in ascending order, so that lists are written front to back and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.replay import start as launch

LEVELS = 28  # of a pyramid: so many starts the kernel takes
TILE = 64  # query blocks of a program


@triton.jit
def _run(index, first, last, filled, offset, inside, WIDTH: tl.constexpr):
    """Write first + offset .. last + offset to the next places of each list; how many are filled then."""
    for i in tl.static_range(WIDTH):
        tl.store(index + filled + i, first + i + offset, mask=inside & (first + i <= last))
    return filled + tl.maximum(last - first + 1, 0)


@triton.jit
def _clear(index, filled, inside, picks):
    """0 in the places that are left."""
    for start in range(0, picks, 16):
        place = start + tl.arange(0, 16)
        left = inside[:, None] & (place[None, :] >= filled[:, None]) & (place < picks)[None, :]
        tl.store(index[:, None] + place[None, :], tl.zeros([index.shape[0], 16], tl.int32), mask=left)


# what varies with the length must not make another kernel
VARIES = ["start", "blocks", "levels", "radius", "first", "sink_groups"]
VARIES += [f"starts{i}" for i in range(LEVELS // 2)]


@triton.jit(do_not_specialize=VARIES)
def tree_lists(
    near, near_count, far, far_count, start, blocks, levels, radius, first, sink_groups,
    starts0: tl.int64, starts1: tl.int64, starts2: tl.int64, starts3: tl.int64, starts4: tl.int64, starts5: tl.int64,
    starts6: tl.int64, starts7: tl.int64, starts8: tl.int64, starts9: tl.int64, starts10: tl.int64,
    starts11: tl.int64, starts12: tl.int64, starts13: tl.int64,
    CAUSAL: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """starts: two levels' in one number, the lower level's in its lower half; a tuple would be specialised."""
    starts = (
        starts0, starts1, starts2, starts3, starts4, starts5, starts6, starts7, starts8, starts9, starts10, starts11,
        starts12, starts13,
    )  # fmt: skip
    SIDES: tl.constexpr = 1 if CAUSAL else 2
    near_picks, far_picks, own = SIDES * radius + 1, sink_groups, radius
    for _ in range(levels):
        above = (own + 1) // 2
        far_picks += SIDES * (2 * above - own + 1)
        own = above
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < blocks - start
    n = start + at.to(tl.int32)

    near += at * near_picks
    low = tl.maximum(n - radius, 0)
    high = tl.minimum(n if CAUSAL else n + radius, blocks - 1)
    count = tl.maximum(high - low + 1, 0)
    tl.store(near_count + at, count, mask=inside)
    for i in range(near_picks):
        tl.store(near + i, tl.where(i < count, low + i - first, 0), mask=inside)

    far += at * far_picks
    sinks = tl.where(n > radius, sink_groups, 0)
    for i in range(sink_groups):
        tl.store(far + i, tl.zeros([TILE], tl.int32) + i, mask=inside & (i < sinks))
    filled, own = sinks, radius
    for level in tl.static_range(LEVELS):
        above = (own + 1) // 2
        if level < levels:
            # a negative lower half borrows from the upper one
            offset = starts[level // 2].to(tl.int32)
            if level % 2:
                offset = ((starts[level // 2] - offset) >> 32).to(tl.int32)
            group = n >> level
            parent = group >> 1
            left = tl.maximum(2 * (parent - above), 0)
            filled = _run(far, left, group - own - 1, filled, offset, inside, 2)
            if not CAUSAL:
                last = tl.minimum(((blocks - 1) >> level), 2 * (parent + above) + 1)
                filled = _run(far, group + own + 1, last, filled, offset, inside, 2)
        own = above
    tl.store(far_count + at, filled, mask=inside)
    _clear(far, filled, inside, far_picks)


def build(
    start: int, blocks: int, radius: Sequence[int], starts: Sequence[int], causal: bool, first: int, sink_groups: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """near and far index and count, int32; the contract is select.static's."""
    many, sides = blocks - start, 1 if causal else 2
    near_picks = sides * radius[0] + 1
    far_picks = sink_groups + sum(sides * (2 * above - own + 1) for own, above in pairwise(radius))
    near, near_count, far, far_count = (
        torch.empty(shape, dtype=torch.int32, device=device)
        for shape in ((1, 1, many, near_picks), (1, 1, many), (1, 1, many, far_picks), (1, 1, many))
    )
    pairs = [0] * (LEVELS // 2)
    for level, at in enumerate(starts):
        pairs[level // 2] += at << 32 * (level % 2)
    launch(
        tree_lists, (-(-many // TILE),),
        near, near_count, far, far_count, start, blocks, len(starts), radius[0], first, sink_groups,
        *pairs, CAUSAL=causal, LEVELS=LEVELS, TILE=TILE, num_warps=2,
    )  # fmt: skip
    return near, near_count, far, far_count
