"""append: one token into a ring of fixed buffers, the groups it completes, and the lists by which attention reads it.

A token goes to its slot among the near rows and into the float32 sums of its block. The token that opens block n moves
up what block n - 1 has completed, one level a token: token l of the block copies level l's new group to the far rows
and adds it to its parent's sums. So every token costs the same, whatever it completes, and a group is there long
before it is read. Everything is decided from the count of tokens, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

HIDDEN = 1 << 62  # the end of a near row that holds no token yet


class Plan(NamedTuple):
    """What the sizes of a ring follow from: FMA's block, near, rank and sinks, and the number of levels; and whether
    what lies beyond these is not read.
    """

    block: int
    near: int
    rank: int
    sinks: int
    levels: int
    endless: int = 0

    def radius(self, level: int) -> int:
        """Groups before its own that a query does not read at this level."""
        return -(-(self.near // self.block) >> level)

    def slots(self, level: int) -> int:
        """Groups of the level that are kept: those that may be read and the newest."""
        return 2 * self.radius(level + 1) + 1

    def start(self, level: int) -> int:
        """The first slot of the level among all far groups."""
        return self.sink_groups + sum(self.slots(below) for below in range(level))

    @property
    def sink_groups(self) -> int:
        return -(-self.sinks // self.rank)

    @property
    def near_rows(self) -> int:
        return self.near + self.block

    @property
    def far_rows(self) -> int:
        return self.start(self.levels) * self.rank

    @property
    def picks(self) -> int:
        """Far groups that one query reads, at most."""
        return self.sink_groups + 2 * self.levels

    @property
    def capacity(self) -> int:
        """Tokens that these levels reach back over; endless: more than there can be."""
        return HIDDEN if self.endless else (self.radius(self.levels) + 1 << self.levels) * self.block

    def slot(self, level: int, group: int) -> int:
        return self.start(level) + group % self.slots(level)

    def listed(self, n: int) -> list[int]:
        """The slots of the far groups that query block n reads, ascending."""
        found = list(range(self.sink_groups)) if n > self.radius(0) else []
        for level in range(self.levels):
            first = 2 * ((n >> level + 1) - self.radius(level + 1))
            found += [self.slot(level, g) for g in range(max(first, 0), (n >> level) - self.radius(level))]
        return sorted(found)

    def counts(self, level: int, group: int) -> list[int]:
        """Tokens that each row of a group stands for; sinks are read by themselves."""
        width = (self.block << level) // self.rank
        starts = range(group * self.rank * width, (group + 1) * self.rank * width, width)
        return [width - min(max(self.sinks - start, 0), width) for start in starts]

    def shares(self, level: int, group: int, filters: Tensor | None) -> Tensor:
        """What a group adds to the rows of its parent, [1 or G, p, p] float64: row s takes share [s, j] of row j."""
        even = group // 2 * 2
        count = torch.tensor(self.counts(level, even) + self.counts(level, even + 1), dtype=torch.float64)
        if filters is not None and min(count) > 0:
            found = filters.double()
        else:
            pair = torch.eye(self.rank, dtype=torch.float64).repeat_interleave(2, 1) * count
            found = (pair / pair.sum(1, keepdim=True).clamp(min=1))[None]
        return found[..., group % 2 * self.rank :][..., : self.rank]

    def centres(self, level: int, group: int) -> list[float]:
        """Positions of a group's rows, which may lie between tokens."""
        width = (self.block << level) // self.rank
        return [(group * self.rank + row) * width + (width - 1) / 2 for row in range(self.rank)]


class Append(NamedTuple):
    """What an implementation gets. Absent filters and turns are empty.

    Shapes: q [B, H, 1, D], k [B, G, 1, D], v [B, G, 1, E]; near_k [B, G, S, D], near_v; far_k [B, G, R, D], far_v;
    sum_k [B, G, L, p, D], sum_v, float32 or wider; bias [B, 1, R]; near_end [B, 1, S]; near_count, far_count
    [B, 1, 1]; far_index [B, 1, 1, P]; position [B, 1, 1]; clock [B, 2 G + 1], tokens so far, one for each program of
    the kernel; filters [2, G, p, 2 p]; turns [pairs], float64, turns a token of channels c and c + pairs.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    near_k: Tensor
    near_v: Tensor
    far_k: Tensor
    far_v: Tensor
    sum_k: Tensor
    sum_v: Tensor
    bias: Tensor
    near_end: Tensor
    near_count: Tensor
    far_index: Tensor
    far_count: Tensor
    position: Tensor
    clock: Tensor
    filters: Tensor
    turns: Tensor
    plan: Plan


WRITTEN = Append._fields[3:16]


@custom_op("farfield::append", mutates_args=WRITTEN)
def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_k: Tensor,
    near_v: Tensor,
    far_k: Tensor,
    far_v: Tensor,
    sum_k: Tensor,
    sum_v: Tensor,
    bias: Tensor,
    near_end: Tensor,
    near_count: Tensor,
    far_index: Tensor,
    far_count: Tensor,
    position: Tensor,
    clock: Tensor,
    filters: Tensor,
    turns: Tensor,
    plan: Sequence[int],
) -> Tensor:
    """Put one token a sequence into the ring. Returns q turned to its position, or nothing if `turns` is empty.

    Past the ring's capacity this implementation raises ValueError; the kernel, which cannot, writes NaN.
    """
    return _append(Append(q, k, v, near_k, near_v, far_k, far_v, sum_k, sum_v, bias, near_end, near_count, far_index,
                          far_count, position, clock, filters, turns, Plan(*plan)))  # fmt: skip


@append.register_kernel("cuda")
def _(*arguments):
    from farfield.kernels.append import launch, refusal

    *tensors, plan = arguments
    call = Append._make([*tensors, Plan(*plan)])
    # float64, and what else there is no kernel for, runs in PyTorch; that reads the clock on the host
    return _append(call) if refusal(call) else launch(call)


@append.register_fake
def _(q, *args):
    turns = args[-2]
    return q.new_empty(q.shape if turns.numel() else (0,))


def _append(call: Append) -> Tensor:
    """The same in PyTorch: the sequences at one position at a time."""
    turned = call.q.new_empty(call.q.shape if call.turns.numel() else 0)
    clock = call.clock[:, -1].tolist()
    # before anything is written, so that the sequences that have room can go on
    if full := [b for b, t in enumerate(clock) if t >= call.plan.capacity]:
        raise ValueError(
            f"append: the ring reaches back over {call.plan.capacity} tokens and is full for sequences {full}; reset_ "
            "them, or make one with a larger capacity"
        )
    for t in sorted(set(clock)):
        here = [b for b, at in enumerate(clock) if at == t]
        _append_at(call, t, torch.tensor(here, device=call.clock.device), turned)
    call.clock.add_(1)
    return turned


def _append_at(call: Append, t: int, b: Tensor, turned: Tensor) -> None:
    """Token t of the sequences b."""
    plan, device = call.plan, call.k.device
    n, r = divmod(t, plan.block)
    if r < plan.levels and n and n % (1 << r) == 0:
        _move_up(call, r, (n >> r) - 1, b)
    segment = plan.block // plan.rank
    row = r // segment
    count = plan.counts(0, n)[row]
    kinds = ((call.k, call.near_k, call.far_k, call.sum_k), (call.v, call.near_v, call.far_v, call.sum_v))
    for kind, (new, near, far, sums) in enumerate(kinds):
        x = new[b, :, 0]
        placed = _turn(x, float(t), call.turns) if kind == 0 else x
        near[b, :, t % plan.near_rows] = placed
        if t < plan.sinks:
            far[b, :, t] = placed
        share = x.to(sums.dtype) / count if t >= plan.sinks else torch.zeros_like(x, dtype=sums.dtype)
        sums[b, :, 0, row] = share + sums[b, :, 0, row] if r % segment else share
    if call.turns.numel():
        turned[b] = _turn(call.q[b], float(t), call.turns)
    call.position[b] = t
    if not r:
        open_block = n % (plan.near_rows // plan.block) * plan.block
        call.near_end[b, :, open_block : open_block + plan.block] = HIDDEN
        call.near_count[b] = min(n, plan.radius(0)) + 1
        listed = torch.tensor(plan.listed(n), dtype=torch.int32, device=device)
        call.far_index[b, :, :, : len(listed)] = listed
        call.far_count[b] = len(listed)
    call.near_end[b, :, t % plan.near_rows] = t


def _move_up(call: Append, level: int, group: int, b: Tensor) -> None:
    """Copy the group that the sums of a level hold to the far rows, and add it to its parent."""
    plan = call.plan
    rows = slice(plan.slot(level, group) * plan.rank, (plan.slot(level, group) + 1) * plan.rank)
    for kind, (far, sums) in enumerate(((call.far_k, call.sum_k), (call.far_v, call.sum_v))):
        x = sums[b, :, level]
        centres = torch.tensor(plan.centres(level, group), dtype=torch.float64, device=x.device)
        far[b, :, rows] = (_turn(x, centres, call.turns) if kind == 0 else x).to(far.dtype)
        if level + 1 < plan.levels:
            shares = plan.shares(level, group, call.filters[kind].cpu() if call.filters.numel() else None)
            part = shares.to(x) @ x
            sums[b, :, level + 1] = part + sums[b, :, level + 1] if group % 2 else part
    if plan.sinks:
        count = torch.tensor(plan.counts(level, group), dtype=call.bias.dtype, device=call.bias.device)
        call.bias[b, :, rows] = count.log()


def _turn(x: Tensor, position: Tensor | float, turns: Tensor) -> Tensor:
    """`x` [..., D] or, with positions [p], [..., p, D] rotated in float32 or wider."""
    if not turns.numel():
        return x
    pairs, wide = turns.shape[0], x.to(torch.promote_types(x.dtype, torch.float32))
    position = torch.as_tensor(position, dtype=torch.float64, device=x.device)
    # whole turns are dropped in float64: float32 angles are off by 0.06 rad at a million tokens
    angle = ((position[..., None] * turns).remainder(1.0) * (2 * math.pi)).to(wide.dtype)
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = wide.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x.dtype)
