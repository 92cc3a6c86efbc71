"""append on the GPU: one launch, three kinds of programs, each with a clock of its own so that none waits for another.

For each sequence one program a key head takes the key (and turns the query heads that read it), one takes the value,
and one more writes the lists. All read the count of tokens from their own copy and leave it one higher.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.ops.append import HIDDEN as _HIDDEN
from farfield.ops.append import Append

HIDDEN = tl.constexpr(_HIDDEN)
TURN = tl.constexpr(6.283185307179586)
WIDEST = 256


@triton.jit(do_not_specialize=["capacity"])
def append(
    q, k, v, turned,
    near_k, near_v, far_k, far_v, sum_k, sum_v,
    bias, near_end, near_count, far_index, far_count, position, clock, filters, turns,
    q_strides, k_strides, v_strides, capacity,
    HEADS: tl.constexpr, STACK: tl.constexpr, STACK_TILE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_CHUNK: tl.constexpr, E_CHUNK: tl.constexpr, PAIRS: tl.constexpr, LEARNED: tl.constexpr,
    BLOCK: tl.constexpr, RADIUS: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr,
    SINKS: tl.constexpr, SINK_GROUPS: tl.constexpr, SINK_TILE: tl.constexpr,
    LEVELS: tl.constexpr, LEVEL_TILE: tl.constexpr, GROUPS: tl.constexpr, PICKS: tl.constexpr, BLOCK_TILE: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 2 * HEADS + 1
    pid = tl.program_id(0).to(tl.int64)
    b, part = pid // PARTS, pid % PARTS
    t = tl.load(clock + pid)
    if part < HEADS:
        if PAIRS:
            _turn_queries(
                t, q + b * q_strides[0] + part * STACK * q_strides[1], q_strides[1], q_strides[3],
                turned + (b * HEADS + part) * STACK * D, turns, STACK, STACK_TILE, D, D_TILE, PAIRS,
            )  # fmt: skip
        _take(
            t, k + b * k_strides[0] + part * k_strides[1], k_strides[3], near_k, far_k, sum_k, filters, turns,
            b * HEADS + part, part, capacity, D, D_TILE, D_CHUNK, PAIRS, LEARNED, BLOCK, RADIUS, RANK, RANK_TILE,
            SINKS, SINK_GROUPS, LEVELS, LEVEL_TILE, GROUPS,
        )  # fmt: skip
    elif part < 2 * HEADS:
        # the filters of V follow those of K
        g = part - HEADS
        _take(
            t, v + b * v_strides[0] + g * v_strides[1], v_strides[3], near_v, far_v, sum_v, filters, turns,
            b * HEADS + g, part, capacity, E, E_TILE, E_CHUNK, 0, LEARNED, BLOCK, RADIUS, RANK, RANK_TILE,
            SINKS, SINK_GROUPS, LEVELS, LEVEL_TILE, GROUPS,
        )  # fmt: skip
    else:
        _list(
            t, b, bias, near_end, near_count, far_index, far_count, position, BLOCK, RADIUS, RANK, RANK_TILE,
            SINKS, SINK_GROUPS, SINK_TILE, LEVELS, LEVEL_TILE, GROUPS, PICKS, BLOCK_TILE,
        )  # fmt: skip
    # every thread has read the clock before one sets it
    tl.debug_barrier()
    tl.store(clock + pid, t + 1)


@triton.jit
def _take(
    t, x, stride, near, far, sums, filters, turns, head, part, capacity,
    W: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr, LEARNED: tl.constexpr,
    BLOCK: tl.constexpr, RADIUS: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr,
    SINKS: tl.constexpr, SINK_GROUPS: tl.constexpr, LEVELS: tl.constexpr, LEVEL_TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Token t of one head of K or of V: x [W] into the near rows and the sums; what its block's turn it is moves up."""
    SEGMENT: tl.constexpr = BLOCK // RANK
    NEAR: tl.constexpr = (RADIUS + 1) * BLOCK
    near += head * NEAR * W
    far += head * GROUPS * RANK * W
    sums += head * LEVELS * RANK * W
    n, r = t // BLOCK, t % BLOCK

    dims = tl.arange(0, TILE)
    held = dims < W
    row = tl.load(x + dims * stride, mask=held, other=0.0).to(tl.float32)
    placed = row
    if PAIRS:
        partner, rate, side = _halves(dims, turns, PAIRS)
        other = tl.load(x + partner * stride, mask=held, other=0.0).to(tl.float32)
        placed = _turn(row, other, t.to(tl.float64), rate, side)

    if _complete(n, r, LEVELS):
        _move_up(
            r, (n >> r) - 1, far, sums, filters + part * RANK * 2 * RANK, turns, W, CHUNK, PAIRS, LEARNED,
            BLOCK, RADIUS, RANK, RANK_TILE, SINKS, SINK_GROUPS, LEVELS, LEVEL_TILE,
        )  # fmt: skip
        # the first token of a block writes over sums that have just been read
        tl.debug_barrier()

    # tokens past the capacity would leave earlier ones unread: say so as loudly as a kernel can
    placed = tl.where(t < capacity, placed, float("nan"))
    tl.store(near + t % NEAR * W + dims, placed.to(near.dtype.element_ty), mask=held)
    count = tl.full([], SEGMENT, tl.int64)
    counts = t >= SINKS
    if SINKS:
        if t < SINKS:
            tl.store(far + t * W + dims, placed.to(far.dtype.element_ty), mask=held)
        count = tl.maximum(_tokens(t // SEGMENT, count, SINKS), 1)
    into = sums + r // SEGMENT * W + dims
    before = tl.load(into, mask=held & (r % SEGMENT != 0), other=0.0)
    tl.store(into, before + tl.where(counts, row / count.to(tl.float32), 0.0), mask=held)


@triton.jit
def _move_up(
    level, group, far, sums, filters, turns,
    W: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr, LEARNED: tl.constexpr,
    BLOCK: tl.constexpr, RADIUS: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr,
    SINKS: tl.constexpr, SINK_GROUPS: tl.constexpr, LEVELS: tl.constexpr, LEVEL_TILE: tl.constexpr,
):  # fmt: skip
    """The group that the sums of a level hold: to its slot among the far rows, and into its parent's sums."""
    width = tl.full([], BLOCK // RANK, tl.int64) << level
    slot = _slot(level, group, RADIUS, SINK_GROUPS, LEVEL_TILE)
    rows = tl.arange(0, RANK_TILE)
    odd = group % 2
    child = odd * RANK + rows
    if LEARNED:
        # shares[s, j] of the group's row j go to row s of the parent
        inside = (rows < RANK)[:, None] & (rows < RANK)[None, :]
        shares = tl.load(filters + rows[:, None] * (2 * RANK) + child[None, :], mask=inside, other=0.0)
        if SINKS:
            # a parent that lacks some of its rows is not what the filter has learned: the mean
            share = _share((group - odd) * RANK + child, width, SINKS)
            mean = tl.where((child // 2)[None, :] == rows[:, None], share[None, :], 0.0)
            shares = tl.where((group > 1) | (width > SINKS), shares, mean)

    for start in range(0, W, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        held = (rows < RANK)[:, None] & (dims < W)[None, :]
        at = rows[:, None] * W + dims[None, :]
        mine = sums + level * RANK * W
        x = tl.load(mine + at, mask=held, other=0.0)
        placed = x
        if PAIRS:
            partner, rate, side = _halves(dims, turns, PAIRS)
            other = tl.load(mine + rows[:, None] * W + partner[None, :], mask=held, other=0.0)
            centre = (2 * (group * RANK + rows) * width + width - 1).to(tl.float64) * 0.5
            placed = _turn(x, other, centre[:, None], rate[None, :], side[None, :])
        tl.store(far + slot * RANK * W + at, placed.to(far.dtype.element_ty), mask=held)
        if level + 1 < LEVELS:
            above = mine + RANK * W + at
            after = tl.load(above, mask=held & (odd == 1), other=0.0)
            if LEARNED:
                after += tl.dot(shares, x, input_precision="ieee")
            else:
                # row s of the parent is the mean of the pair's rows 2 s and 2 s + 1, as far as they are this group's
                for twin in tl.static_range(2):
                    row = 2 * rows + twin - odd * RANK
                    share = _share((group - odd) * RANK + 2 * rows + twin, width, SINKS)
                    there = held & ((row >= 0) & (row < RANK))[:, None]
                    more = tl.load(mine + row[:, None] * W + dims[None, :], mask=there, other=0.0)
                    after += share[:, None] * more
            # threads read and write in different layouts
            tl.debug_barrier()
            tl.store(above, after, mask=held)


@triton.jit
def _list(
    t, b, bias, near_end, near_count, far_index, far_count, position,
    BLOCK: tl.constexpr, RADIUS: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr,
    SINKS: tl.constexpr, SINK_GROUPS: tl.constexpr, SINK_TILE: tl.constexpr, LEVELS: tl.constexpr,
    LEVEL_TILE: tl.constexpr, GROUPS: tl.constexpr, PICKS: tl.constexpr, BLOCK_TILE: tl.constexpr,
):  # fmt: skip
    """What sequence b reads at token t, and what its rows stand for. Lists change when a block opens."""
    n, r = t // BLOCK, t % BLOCK
    tl.store(position + b, t)
    near_end += b * (RADIUS + 1) * BLOCK
    if r == 0:
        rows = tl.arange(0, BLOCK_TILE)
        ends = tl.where(rows == 0, t, HIDDEN)
        tl.store(near_end + n % (RADIUS + 1) * BLOCK + rows, ends, mask=rows < BLOCK)
        tl.store(near_count + b, (tl.minimum(n, RADIUS) + 1).to(tl.int32))

        # two entries a level: the children of the parent's outermost neighbour, as far as they are no neighbours
        entry = tl.arange(0, 2 * LEVEL_TILE)
        slot, used = _entry(entry, n, RADIUS, SINK_GROUPS, LEVELS, LEVEL_TILE)
        # ascending: a slot's place is the number of smaller ones
        smaller = used[None, :] & (slot[None, :] < slot[:, None])
        sinks = tl.where(n > RADIUS, SINK_GROUPS, 0)
        place = sinks + tl.sum(smaller.to(tl.int64), 1)
        far_index += b * PICKS
        tl.store(far_index + place, slot.to(tl.int32), mask=used)
        if SINKS:
            first = tl.arange(0, SINK_TILE)
            tl.store(far_index + first, first, mask=first < sinks)
        tl.store(far_count + b, (sinks + tl.sum(used.to(tl.int64), 0)).to(tl.int32))
    else:
        tl.store(near_end + t % ((RADIUS + 1) * BLOCK), t)
    if SINKS > 0 and _complete(n, r, LEVELS):
        # rows of first groups stand for fewer tokens
        group = (n >> r) - 1
        rows = tl.arange(0, RANK_TILE)
        count = _tokens(group * RANK + rows, tl.full([], BLOCK // RANK, tl.int64) << r, SINKS)
        at = _slot(r, group, RADIUS, SINK_GROUPS, LEVEL_TILE) * RANK + rows
        tl.store(bias + b * GROUPS * RANK + at, tl.log(count.to(tl.float32)), mask=rows < RANK)


@triton.jit
def _entry(
    entry, n,
    RADIUS: tl.constexpr, SINK_GROUPS: tl.constexpr, LEVELS: tl.constexpr, LEVEL_TILE: tl.constexpr,
):  # fmt: skip
    """The slot of a far list's entry for query block n, and whether it is one."""
    level = (entry // 2).to(tl.int64)
    radius, above = _radius(level, RADIUS), _radius(level + 1, RADIUS)
    group = 2 * ((n >> (level + 1)) - above) + entry % 2
    used = (level < LEVELS) & (entry % 2 < 2 * above - radius + 1) & (group >= 0) & (group < (n >> level) - radius)
    below = tl.arange(0, LEVEL_TILE).to(tl.int64)
    slots = tl.where(below[None, :] < level[:, None], 2 * _radius(below + 1, RADIUS)[None, :] + 1, 0)
    start = SINK_GROUPS + tl.sum(slots, 1)
    return start + tl.maximum(group, 0) % (2 * above + 1), used


@triton.jit
def _slot(level, group, RADIUS: tl.constexpr, SINK_GROUPS: tl.constexpr, LEVEL_TILE: tl.constexpr):
    """Where a group of one level lies among all far groups."""
    below = tl.arange(0, LEVEL_TILE).to(tl.int64)
    start = SINK_GROUPS + tl.sum(tl.where(below < level, 2 * _radius(below + 1, RADIUS) + 1, 0), 0)
    return start + group % (2 * _radius(level + 1, RADIUS) + 1)


@triton.jit
def _complete(n, r, LEVELS: tl.constexpr):
    """Whether level r has a group that block n - 1 has completed."""
    level = tl.minimum(r, LEVELS)
    return (r < LEVELS) & (n > 0) & (n >> level << level == n)


@triton.jit
def _radius(level, RADIUS: tl.constexpr):
    """RADIUS / 2^level, rounded up."""
    return RADIUS - 1 + (tl.full([], 1, tl.int64) << level) >> level


@triton.jit
def _tokens(nth, width, SINKS: tl.constexpr):
    """Tokens that the n-th row of `width` tokens stands for: sinks are read by themselves."""
    return width - tl.minimum(tl.maximum(SINKS - nth * width, 0), width)


@triton.jit
def _share(nth, width, SINKS: tl.constexpr):
    """What the n-th row of a level weighs in the mean of its pair."""
    mine, theirs = _tokens(nth, width, SINKS), _tokens(nth ^ 1, width, SINKS)
    return mine.to(tl.float32) / tl.maximum(mine + theirs, 1).to(tl.float32)


@triton.jit
def _turn_queries(
    t, q, head_stride, stride, turned, turns,
    STACK: tl.constexpr, STACK_TILE: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    heads, dims = tl.arange(0, STACK_TILE), tl.arange(0, D_TILE)
    held = (heads < STACK)[:, None] & (dims < D)[None, :]
    partner, rate, side = _halves(dims, turns, PAIRS)
    x = tl.load(q + heads[:, None] * head_stride + dims[None, :] * stride, mask=held, other=0.0).to(tl.float32)
    other = tl.load(q + heads[:, None] * head_stride + partner[None, :] * stride, mask=held, other=0.0).to(tl.float32)
    placed = _turn(x, other, t.to(tl.float64), rate[None, :], side[None, :])
    tl.store(turned + heads[:, None] * D + dims[None, :], placed.to(turned.dtype.element_ty), mask=held)


@triton.jit
def _halves(dims, turns, PAIRS: tl.constexpr):
    """For each channel the other one of its pair, its turns a token, and the sign of the other's part."""
    first = dims < PAIRS
    partner = tl.where(first, dims + PAIRS, tl.where(dims < 2 * PAIRS, dims - PAIRS, dims))
    rate = tl.load(turns + tl.where(first, dims, partner), mask=dims < 2 * PAIRS, other=0.0)
    return partner, rate, tl.where(first, -1.0, 1.0)


@triton.jit
def _turn(x, other, position, rate, side):
    # whole turns are dropped in float64: float32 angles are off by 0.06 rad at a million tokens
    turns = position * rate
    quarter = tl.floor(turns * 4 + 0.5)
    angle = (turns - quarter * 0.25).to(tl.float32) * TURN
    # polynomials of Cephes for an eighth of a turn to either side: the library's keep a table on the stack
    square = angle * angle
    sin = angle + angle * square * ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1)
    cos = 1 - 0.5 * square
    cos += square * square * ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2)
    nth = quarter.to(tl.int64) & 3
    odd, back = nth % 2 == 1, nth >= 2
    sin, cos = tl.where(odd, cos, sin), tl.where(odd, -sin, cos)
    sin, cos = tl.where(back, -sin, sin), tl.where(back, -cos, cos)
    return x * cos + side * other * sin


def refusal(call: Append) -> str | None:
    """Why the kernel cannot take a call, None if it can."""
    if call.k.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {call.k.dtype}"
    if max(call.k.shape[3], call.v.shape[3]) > WIDEST:
        return f"takes widths up to {WIDEST}, got D={call.k.shape[3]} and E={call.v.shape[3]}"
    return None


def launch(call: Append) -> Tensor:
    """The contract is ops.append's; the ring's buffers are contiguous."""
    *tensors, plan = call
    q, k, v, filters, turns = *tensors[:3], *tensors[-2:]
    batch, kv_heads, _, width = k.shape
    value_width, pairs, stack = v.shape[3], turns.numel(), q.shape[1] // kv_heads
    turned = torch.empty_like(q, memory_format=torch.contiguous_format) if pairs else q.new_empty(0)
    tile = triton.next_power_of_2
    # channels of a group at a time: filters of 128 rows and their sums stay in registers
    chunk = 64 if plan.rank <= 32 else 16
    append[(batch * (2 * kv_heads + 1),)](
        q, k, v, turned, *tensors[3:], q.stride(), k.stride(), v.stride(), plan.capacity,
        HEADS=kv_heads, STACK=stack, STACK_TILE=tile(stack), D=width, E=value_width,
        D_TILE=tile(width), E_TILE=tile(value_width),
        D_CHUNK=min(max(16, tile(width)), chunk), E_CHUNK=min(max(16, tile(value_width)), chunk),
        PAIRS=pairs, LEARNED=filters.numel() > 0,
        BLOCK=plan.block, RADIUS=plan.radius(0), RANK=plan.rank, RANK_TILE=max(16, tile(plan.rank)),
        SINKS=plan.sinks, SINK_GROUPS=plan.sink_groups, SINK_TILE=tile(max(plan.sink_groups, 1)),
        LEVELS=plan.levels, LEVEL_TILE=tile(plan.levels), GROUPS=plan.start(plan.levels), PICKS=plan.picks,
        BLOCK_TILE=tile(plan.block), num_warps=4 if plan.rank <= 32 else 8,
    )  # fmt: skip
    return turned
