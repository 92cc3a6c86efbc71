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
VARIES = ["many", "blocks", "levels", "radius", "first", "sink_groups", "near_picks", "far_picks", "starts"]


@triton.jit(do_not_specialize=VARIES)
def tree_lists(
    n, near, near_count, far, far_count, many, blocks, levels, radius, first, sink_groups, near_picks, far_picks,
    starts, CAUSAL: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < many
    n = tl.load(n + at, mask=inside, other=0).to(tl.int32)

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
            group = n >> level
            parent = group >> 1
            left = tl.maximum(2 * (parent - above), 0)
            filled = _run(far, left, group - own - 1, filled, starts[level], inside, 2)
            if not CAUSAL:
                last = tl.minimum(((blocks - 1) >> level), 2 * (parent + above) + 1)
                filled = _run(far, group + own + 1, last, filled, starts[level], inside, 2)
        own = above
    tl.store(far_count + at, filled, mask=inside)
    _clear(far, filled, inside, far_picks)


def build(
    n: Tensor, blocks: int, radius: Sequence[int], starts: Sequence[int], causal: bool, first: int, sink_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """near and far index and count, int32; the contract is select.static's."""
    many, sides = len(n), 1 if causal else 2
    near_picks = sides * radius[0] + 1
    far_picks = sink_groups + sum(sides * (2 * above - own + 1) for own, above in pairwise(radius))
    near, near_count, far, far_count = (
        n.new_empty(shape, dtype=torch.int32) for shape in ((many, near_picks), (many,), (many, far_picks), (many,))
    )
    padded = (*starts, *[0] * (LEVELS - len(starts)))
    tree_lists[(triton.cdiv(many, TILE),)](
        n, near, near_count, far, far_count, many, blocks, len(starts), radius[0], first, sink_groups, near_picks,
        far_picks, padded, CAUSAL=causal, LEVELS=LEVELS, TILE=TILE, num_warps=2,
    )  # fmt: skip
    return near, near_count, far, far_count
