"""Means of further blocks, written to where those of all blocks before are: what a chunk of a prompt adds to a state.

Three trees of means at once, each with rows of its own: sketches of the keys as they are read, and summaries of keys
and of values. Row r of a height stands for tokens r w .. (r + 1) w - 1, w doubling from height to height, so that a
program adds up a piece of the tokens, aligned to a power of two of blocks, and lifts the sums in registers; a further
launch goes on from what the pieces leave. A group of which one half is older takes that half as it was written down:
from the sketches, and of summaries, which are rounded there, from `waiting`, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import _dense
from farfield.kernels.attend_listed import _unit
from farfield.kernels.opened_sketches import _before, _counted, _leaf
from farfield.kernels.replay import start

ROWS, NUMBERS, WARPS = 128, 8192, 8  # of a program: rows of the lowest level, and numbers at most that it holds
FURTHER = 256  # rows where it goes on from what others have left


class Trees(NamedTuple):
    """Where means are written to, level by level, with room for as many groups as `blocks` blocks have.

    Args:
        sketches: [B, G, K, D] in float32, `detail` rows a group.
        far_k, far_v: [B, G, R, D], `rank` rows a group, behind `lead` others.
        sinks: so many tokens, the first ones, are in no mean.
    """

    sketches: Tensor
    far_k: Tensor
    far_v: Tensor
    block: int
    rank: int
    detail: int
    lead: int
    sinks: int
    blocks: int


@triton.jit
def _settled(
    x, first, height, unit, side, into, about, dims, wide,
    EACH: tl.constexpr, SEGMENT: tl.constexpr, D: tl.constexpr, SKETCH: tl.constexpr,
):  # fmt: skip
    """Sums of rows first, first + 1, ... of a height: those of new groups are stored, an older half is looked up."""
    sketches, far, waiting, left = into
    done, stop, levels, known, most, sinks, lead, blocks, all_rows, rows = about
    line = first + tl.arange(0, x.shape[0])
    group, row = line // EACH, line % EACH
    size = tl.full([], SEGMENT, tl.int64) << height
    number = _counted(line * size, size, sinks).to(tl.float32)
    old, new = done >> height, stop >> height
    # the other half of the first new group above
    older = (group == old - 1) & (old % 2 == 1) & (height + 1 < most)
    fresh = (group >= old) & (group < new) & (height < levels)
    place = _before(blocks, height, EACH) + line
    if SKETCH:
        to = (unit * all_rows + place)[:, None] * D + dims
        was = tl.load(sketches + to, mask=older[:, None] & wide, other=0.0)
    else:
        to = (unit * rows + lead + place)[:, None] * D + dims
        held = ((unit * 2 + side - 1) * known + height) * EACH + row
        was = tl.load(waiting + held[:, None] * D + dims, mask=older[:, None] & wide, other=0.0)
    x = tl.where(older[:, None], was * number[:, None], x)
    mean = x * (1.0 / tl.maximum(number, 1.0))[:, None]
    if SKETCH:
        tl.store(sketches + to, mean, mask=fresh[:, None] & wide)
    else:
        tl.store(far + to, mean.to(far.dtype.element_ty), mask=fresh[:, None] & wide)
        # the last group waits for its other half
        waits = fresh & (group == new - 1) & (new % 2 == 1) & (height + 1 < most)
        hold = ((unit * 2 + side - 1) * levels + height) * EACH + row
        tl.store(left + hold[:, None] * D + dims, mean, mask=waits[:, None] & wide)
    return x


@triton.jit
def _lifted(
    x, piece, height, above, pieces, unit, side, into, about, dims, wide,
    EACH: tl.constexpr, SEGMENT: tl.constexpr, LIFTS: tl.constexpr, MOST: tl.constexpr, D: tl.constexpr,
    SKETCH: tl.constexpr,
):  # fmt: skip
    """A piece's sums of `height` and of the LIFTS - 1 heights above, and those of the next one into `above`."""
    for i in tl.static_range(LIFTS):
        first = piece * (EACH << (LIFTS - i))
        x = _settled(x, first, height + i, unit, side, into, about, dims, wide, EACH, SEGMENT, D, SKETCH)
        x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), 1)
    group = piece - (about[0] >> (height + LIFTS))
    at = ((unit * 3 + side) * pieces + group) * MOST + tl.arange(0, EACH)
    tl.store(above + at[:, None] * D + dims, x, mask=wide)


@triton.jit
def _added(
    x, stride, origin, piece, above, pieces, unit, side, into, about, dims, wide,
    BLOCK: tl.constexpr, EACH: tl.constexpr, LIFTS: tl.constexpr, MOST: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, SKETCH: tl.constexpr,
):  # fmt: skip
    """Sums of tokens, lifted."""
    SEGMENT: tl.constexpr = BLOCK // EACH
    line = piece * (EACH << LIFTS) + tl.arange(0, EACH << LIFTS)
    first = line * SEGMENT
    there = (line // EACH >= about[0]) & (line // EACH < about[1])
    from_ = x + ((first - origin) * stride)[:, None] * UNIT + dims
    total = _leaf(from_, stride, first, there, wide, about[5], SEGMENT, UNIT)
    _lifted(total, piece, 0, above, pieces, unit, side, into, about, dims, wide, EACH, SEGMENT, LIFTS, MOST, D, SKETCH)


@triton.jit
def _risen(
    below, many, piece, height, above, pieces, unit, side, into, about, dims, wide,
    BLOCK: tl.constexpr, EACH: tl.constexpr, LIFTS: tl.constexpr, MOST: tl.constexpr, D: tl.constexpr,
    SKETCH: tl.constexpr,
):  # fmt: skip
    """Sums that pieces have left, lifted."""
    line = piece * (EACH << LIFTS) + tl.arange(0, EACH << LIFTS)
    group = line // EACH - (about[0] >> height)
    at = ((unit * 3 + side) * many + group) * MOST + line % EACH
    mask = ((group >= 0) & (group < many))[:, None] & wide
    x = tl.load(below + at[:, None] * D + dims, mask=mask, other=0.0)
    _lifted(
        x, piece, height, above, pieces, unit, side, into, about, dims, wide, EACH, BLOCK // EACH, LIFTS, MOST, D,
        SKETCH,
    )  # fmt: skip


ABOUT = ["done", "stop", "levels", "known", "most", "sinks", "lead", "blocks", "all_rows", "rows", "pieces"]
STRIDES = ["k_b", "k_h", "k_t", "raw_b", "raw_h", "raw_t", "v_b", "v_h", "v_t"]


@triton.jit(do_not_specialize=[*ABOUT, *STRIDES, "kv_heads", "k_first", "raw_first", "v_first"])
def grow_leaves(
    k, raw, v, above, sketches, far_k, far_v, waiting, left,
    done, stop, levels, known, most, sinks, lead, blocks, all_rows, rows, pieces,
    kv_heads, k_first, raw_first, v_first, k_b, k_h, k_t, raw_b, raw_h, raw_t, v_b, v_h, v_t,
    BLOCK: tl.constexpr, DETAIL: tl.constexpr, RANK: tl.constexpr, LIFTS: tl.constexpr, MOST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Blocks done .. stop - 1, 1 << LIFTS a program, and the LIFTS lowest levels of them.

    Args:
        k, raw: the keys as they are read, and before they are rotated.
        k_first, raw_first, v_first: numbers of the first tokens.
        waiting, left: groups that wait for their other half, [B, G, 2, levels, RANK, D], before and after.
        above: sums of the next level, [B, G, 3, pieces, MOST, D].
    """
    SLICES: tl.constexpr = D // BD
    pid, unit, side = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    dims = pid % SLICES * BD + tl.arange(0, BD)
    wide = (dims < D)[None, :]
    piece = (pid // SLICES + (done >> LIFTS)).to(tl.int64)
    b, g = unit // kv_heads, unit % kv_heads
    about = (done, stop, levels, known, most, sinks, lead, blocks, all_rows, rows)
    if side == 0:
        x, stride = k + (b * k_b + g * k_h) * UNIT, k_t.to(tl.int64)
        into = (sketches, far_k, waiting, left)
        _added(
            x, stride, k_first, piece, above, pieces, unit, side, into, about, dims, wide, BLOCK, DETAIL, LIFTS, MOST,
            D, UNIT, True,
        )  # fmt: skip
    else:
        if side == 1:
            x, stride, origin, far = raw + (b * raw_b + g * raw_h) * UNIT, raw_t.to(tl.int64), raw_first, far_k
        else:
            x, stride, origin, far = v + (b * v_b + g * v_h) * UNIT, v_t.to(tl.int64), v_first, far_v
        into = (sketches, far, waiting, left)
        _added(
            x, stride, origin, piece, above, pieces, unit, side, into, about, dims, wide, BLOCK, RANK, LIFTS, MOST,
            D, UNIT, False,
        )  # fmt: skip
        if pid // SLICES == 0:
            # what goes on waiting
            row = tl.arange(0, RANK)
            for height in range(known):
                if ((done >> height) == (stop >> height)) & ((done >> height) % 2 == 1) & (height + 1 < most):
                    at = ((unit * 2 + side - 1) * known + height) * RANK + row
                    was = tl.load(waiting + at[:, None] * D + dims, mask=wide, other=0.0)
                    to = ((unit * 2 + side - 1) * levels + height) * RANK + row
                    tl.store(left + to[:, None] * D + dims, was, mask=wide)


@triton.jit(do_not_specialize=[*ABOUT, "height", "many"])
def grow_parents(
    below, above, sketches, far_k, far_v, waiting, left, height, many,
    done, stop, levels, known, most, sinks, lead, blocks, all_rows, rows, pieces,
    BLOCK: tl.constexpr, DETAIL: tl.constexpr, RANK: tl.constexpr, LIFTS: tl.constexpr, MOST: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """LIFTS levels from `height` on, of which `below` holds the sums of `many` groups, the first done >> height."""
    SLICES: tl.constexpr = D // BD
    pid, unit, side = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    dims = pid % SLICES * BD + tl.arange(0, BD)
    wide = (dims < D)[None, :]
    piece = (pid // SLICES + (done >> (height + LIFTS))).to(tl.int64)
    about = (done, stop, levels, known, most, sinks, lead, blocks, all_rows, rows)
    if side == 0:
        into = (sketches, far_k, waiting, left)
        _risen(
            below, many, piece, height, above, pieces, unit, side, into, about, dims, wide, BLOCK, DETAIL, LIFTS, MOST,
            D, True,
        )  # fmt: skip
    else:
        if side == 1:
            far = far_k
        else:
            far = far_v
        into = (sketches, far, waiting, left)
        _risen(
            below, many, piece, height, above, pieces, unit, side, into, about, dims, wide, BLOCK, RANK, LIFTS, MOST,
            D, False,
        )  # fmt: skip


def grow(
    k: Tensor, raw: Tensor, v: Tensor, firsts: tuple[int, int, int], trees: Trees, waiting: Tensor, done: int,
    stop: int, most: int,
) -> Tensor:  # fmt: skip
    """Blocks done .. stop - 1 into `trees`; what waits after them, [B, G, 2, levels, rank, D] in float32.

    Args:
        k, raw, v: [B, G, tokens, D], keys as they are read, keys, values; `firsts`: numbers of their first tokens.
        waiting: what this returned for the blocks before.
        most: levels at most.
    """
    batch, kv_heads, _, width = k.shape
    sketches, far_k, far_v, block, rank, detail, lead, sinks, blocks = trees
    (k, k_at), (raw, raw_at), (v, v_at) = (_dense(x) for x in (k, raw, v))
    unit, each, levels = _unit(k, width, *k_at, *raw_at, *v_at), max(rank, detail), min(stop.bit_length(), most)
    left = sketches.new_empty(batch, kv_heads, 2, levels, rank, width)
    into = sketches, far_k, far_v, waiting, left
    about = done, stop, levels, waiting.shape[3], most, sinks, lead, blocks, sketches.shape[2], far_k.shape[2]
    lifts, height, below = max(1, (ROWS // each).bit_length() - 1), 0, None
    while height < levels and stop >> height > done >> height:
        # aligned pieces; of the first and of the last a part may lie outside
        pieces = (stop - 1 >> height + lifts) - (done >> height + lifts) + 1
        columns = max(16, min(width, 64, NUMBERS // (each << lifts)))
        above = sketches.new_empty(batch, kv_heads, 3, pieces, each, width)
        grid = pieces * (width // columns), batch * kv_heads, 3
        same = block, detail, rank, lifts, each, width, columns
        if below is None:
            at = [n // unit for n in (*k_at, *raw_at, *v_at)]
            start(
                grow_leaves, grid, k, raw, v, above, *into, *about, pieces, kv_heads, *firsts, *at, *same, unit,
                num_warps=WARPS,
            )  # fmt: skip
        else:
            start(
                grow_parents, grid, below, above, *into, height, below.shape[3], *about, pieces, *same, num_warps=WARPS
            )
        height += lifts
        below, lifts = above, max(1, (FURTHER // each).bit_length() - 1)
    return left
