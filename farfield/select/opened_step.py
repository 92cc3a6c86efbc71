"""opened_step: what opened FMA's fixed buffers take of a token, which groups its query opens, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from farfield.ops import opened_step as on_gpu
from farfield.ops.append import HIDDEN
from farfield.ops.append import Plan as Ring
from farfield.ops.opened_step import SCORES, Plan, Step
from farfield.select import opened
from farfield.select.static import radii

WRITTEN = Step._fields[4:15]


@custom_op("farfield::opened_step", mutates_args=WRITTEN)
def opened_step(
    q: Tensor,
    near_k: Tensor,
    near_v: Tensor,
    far_k: Tensor,
    far_v: Tensor,
    all_k: Tensor,
    all_v: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    sketches: Tensor,
    near: Tensor,
    near_count: Tensor,
    far: Tensor,
    far_count: Tensor,
    position: Tensor,
    clock: Tensor,
    weight: Tensor,
    plan: Sequence[int],
    scale: float,
) -> None:
    """Keep the token that append has put into the ring, and write the lists of its query q [B, H, 1, D], rotated.

    Past the capacity this implementation raises ValueError; the kernels, which cannot, make the output NaN.
    """
    step = Step(
        near_k, near_v, far_k, far_v, all_k, all_v, kept_k, kept_v, sketches, near, near_count, far, far_count,
        position, clock, weight, Plan(*plan),
    )  # fmt: skip
    _step(q, step, scale)


@opened_step.register_kernel("cuda")
def _(q, *arguments):
    *tensors, plan, scale = arguments
    step = Step._make([*tensors, Plan(*plan)])
    # float64, and what else there is no kernel for, runs in PyTorch; that reads the clock on the host
    run = _step if on_gpu.refusal(q, step) else on_gpu.run
    run(q, step, scale)


@opened_step.register_fake
def _(q, *arguments):
    return None


@custom_op("farfield::fetch_opened", mutates_args=())
def fetch_opened(
    all_k: Tensor, all_v: Tensor, near_k: Tensor, near_v: Tensor, near: Tensor, near_count: Tensor, position: Tensor,
    plan: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The blocks that near lists name, entry by entry: k [B, G, P * block, D], v, and each row's position [B, G, rows].

    Entries past the count are not written on a GPU. Takes one list a key head.
    """
    return _fetch(all_k, all_v, near_k, near_v, near, near_count, position, Plan(*plan))


@fetch_opened.register_kernel("cuda")
def _(all_k, all_v, near_k, near_v, near, near_count, position, plan):
    return on_gpu.fetch(all_k, all_v, near_k, near_v, near, near_count, position, Plan(*plan))


@fetch_opened.register_fake
def _(all_k, all_v, near_k, near_v, near, near_count, position, plan):
    return on_gpu.held_by(near_k, near_v, near, Plan(*plan))


def _step(q: Tensor, step: Step, scale: float) -> None:
    """The same in PyTorch, sequence by sequence."""
    clock = step.clock[:, 0].tolist()
    if full := [b for b, t in enumerate(clock) if t >= step.plan.capacity]:
        raise ValueError(
            f"opened_step: the ring holds {step.plan.capacity} tokens and is full for sequences {full}; make one with "
            "a larger capacity"
        )
    for b, t in enumerate(clock):
        _keep(step, b, t)
        if t % step.plan.hold == 0:
            write_lists(q[b : b + 1], step, b, t, scale)
        step.position[b] = t
    step.clock.add_(1)


def _keep(step: Step, b: int, t: int) -> None:
    plan = step.plan
    n, r = divmod(t, plan.block)
    for near, every, kept in (
        (step.near_k, step.all_k, step.kept_k),
        (step.near_v, step.all_v, step.kept_v),
    ):
        row = near[b, :, t % near.shape[2]]
        every[b, :, t] = row
        if t < plan.sinks:
            kept[b, :, t] = row
    if not (r < plan.levels and n and n % (1 << r) == 0):
        return
    group = (n >> r) - 1
    slot = Ring(*plan[:5]).slot(r, group)
    to = plan.starts[r] + group
    for far, kept in ((step.far_k, step.kept_k), (step.far_v, step.kept_v)):
        rows = far[b, :, slot * plan.rank : (slot + 1) * plan.rank]
        kept[b, :, to * plan.rank : (to + 1) * plan.rank] = rows
    score, detail, before = SCORES[plan.score], plan.detail, sum(plan.groups[:r])
    here = step.sketches[b, :, (before + group) * detail : (before + group + 1) * detail]
    if not r:
        at = torch.arange(group * plan.block, n * plan.block, device=step.near_k.device)
        keys = step.near_k[b : b + 1, :, at % step.near_k.shape[2]][:, :, None]
        new = opened.sketch(score, keys, (at >= plan.sinks)[None, None], detail, levels=1)[0]
    else:
        children = level_of(step.sketches[b : b + 1], plan, r - 1)
        new = opened.parents(score, opened.cut(children, 2 * group, 2 * group + 2), detail)
    here.copy_(new.rows[0, :, 0])


def level_of(sketches: Tensor, plan: Plan, height: int) -> opened.Sketch:
    """A level of sketches [B, G, K, X] as a Sketch."""
    before, groups, detail = sum(plan.groups[:height]), plan.groups[height], plan.detail
    rows = sketches[:, :, before * detail : (before + groups) * detail].unflatten(2, (groups, detail))
    size = (plan.block // detail) << height
    first = torch.arange(groups * detail, device=sketches.device) * size
    count = size - (plan.sinks - first).clamp(0, size)
    return opened.Sketch(rows, count.view(1, 1, groups, detail).to(sketches.dtype))


def write_lists(q: Tensor, step: Step, b: int, t: int, scale: float) -> None:
    """The lists of sequence b for a query [1, H, 1, D] at position t, as `q` chooses."""
    plan, score = step.plan, SCORES[step.plan.score]
    levels = [level_of(step.sketches[b : b + 1], plan, height) for height in range(plan.levels)]
    weight = step.weight if step.weight.numel() else None
    where = opened.place(t, t + 1, plan.block, q.device)
    opening = opened.Opening(
        plan.picks, plan.beam, bool(plan.shared), plan.detail, plan.sink_groups, True, bool(plan.summed)
    )
    lists = opened.opened_lists(
        opened.asked(score, q, scale, weight), *opened.told(score, levels), where, opening,
        radius=radii(plan.near, plan.block, plan.levels), groups=plan.groups, starts=plan.starts,
    )  # fmt: skip
    for (index, count), into, many in zip(lists, (step.near, step.far), (step.near_count, step.far_count), strict=True):
        listed = min(index.shape[3], into.shape[3])
        into[b, :, :, :listed] = index[0, ..., :listed]
        many[b] = count[0]


def _fetch(
    all_k: Tensor, all_v: Tensor, near_k: Tensor, near_v: Tensor, near: Tensor, near_count: Tensor, position: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in PyTorch."""
    there = torch.arange(near.shape[3], device=near.device) < near_count[..., None]
    block = near.long().masked_fill(~there, 0)[:, :, 0]
    rows = (block[..., None] * plan.block + torch.arange(plan.block, device=near.device)).flatten(2)
    index = rows[..., None].to(all_k.device)
    k, v = (x.take_along_dim(index, 2).to(near_k.device) for x in (all_k, all_v))
    return k, v, torch.where(there[:, :, 0].repeat_interleave(plan.block, -1), rows, HIDDEN)
