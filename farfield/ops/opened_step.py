"""opened_step: the buffers of opened FMA's decoding step, and its kernels; the operation is select.opened_step's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCORES = ("box", "ball", "peak", "mean", "learned")  # those of select.opened


class Plan(NamedTuple):
    """What the sizes of the buffers follow from, and how groups are opened; integers only.

    Args:
        block, near, rank, sinks, levels: as of ops.append.Plan.
        capacity: tokens, a multiple of the block.
        detail, picks, beam, shared, summed: as of select.opened.Opening.
        score: number of the score in SCORES.
        hold: queries in a row that open the same groups.
    """

    block: int
    near: int
    rank: int
    sinks: int
    levels: int
    capacity: int
    detail: int
    picks: int
    beam: int
    shared: int
    summed: int
    score: int
    hold: int = 1

    @property
    def blocks(self) -> int:
        return self.capacity // self.block

    @property
    def groups(self) -> list[int]:
        """Groups of each level."""
        return [self.blocks >> height for height in range(self.levels)]

    @property
    def sink_groups(self) -> int:
        return -(-self.sinks // self.rank)

    @property
    def starts(self) -> list[int]:
        """The first group of each level among all far groups."""
        return [self.sink_groups + sum(self.groups[:height]) for height in range(self.levels)]

    @property
    def far_rows(self) -> int:
        return self.rank * (self.sink_groups + sum(self.groups))

    @property
    def widths(self) -> tuple[int, int]:
        """Entries of the near and of the far list, at most."""
        return self.near // self.block + 1 + self.picks, self.sink_groups + self.levels * (2 + self.picks)


class Step(NamedTuple):
    """The buffers: those of the ring that append has just written, and what opening needs beside them.

    Shapes: near_k [B, G, S, D], near_v; far_k [B, G, R, D], far_v, the ring's; all_k [B, G, C, D], all_v, on the
    device or in pinned host memory; kept_k [B, G, F, D], kept_v, all summaries; sketches [B, G, K, X], float32 or
    wider; near [B, lists, 1, P], near_count [B, lists, 1], far, far_count, int32; position [B, lists, 1]; clock
    [B, G + lists], tokens so far, one for each program of the kernels; weight [G, D] of the learned score, or empty.
    """

    near_k: Tensor
    near_v: Tensor
    far_k: Tensor
    far_v: Tensor
    all_k: Tensor
    all_v: Tensor
    kept_k: Tensor
    kept_v: Tensor
    sketches: Tensor
    near: Tensor
    near_count: Tensor
    far: Tensor
    far_count: Tensor
    position: Tensor
    clock: Tensor
    weight: Tensor
    plan: Plan


def refusal(q: Tensor, step: Step) -> str | None:
    """Why the kernels cannot take a step, None if they can."""
    plan = step.plan
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {q.dtype}"
    if SCORES[plan.score] != "mean":
        return f"takes means, not score={SCORES[plan.score]!r}"
    if plan.detail & (plan.detail - 1) or plan.beam > 127:
        return f"takes sketches of powers of two and a beam of 127 at most, got {plan.detail} and {plan.beam}"
    return None


def run(q: Tensor, step: Step, scale: float) -> None:
    """By kernels, for what `refusal` has nothing against."""
    from farfield.kernels.opened_step import launch_keep, launch_open

    launch_keep(step)
    launch_open(q, step, scale)


def fetch(
    all_k: Tensor, all_v: Tensor, near_k: Tensor, near_v: Tensor, near: Tensor, near_count: Tensor, position: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """By a kernel."""
    from farfield.kernels.opened_step import launch_fetch

    held = held_by(near_k, near_v, near, plan)
    launch_fetch(all_k, all_v, near_k, near_v, near, near_count, position, plan, held)
    return held


def held_by(near_k: Tensor, near_v: Tensor, near: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the blocks that near lists can name."""
    rows = near.shape[3] * plan.block
    k, v = (x.new_empty(*x.shape[:2], rows, x.shape[3]) for x in (near_k, near_v))
    return k, v, torch.empty(*k.shape[:3], dtype=torch.long, device=k.device)
