"""append_token: one token a sequence into the rows of a ring; where it goes is decided on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from farfield.ops.append import HIDDEN
from farfield.ops.token_step import DTYPES, WIDEST


class Plan(NamedTuple):
    """Tokens of a block, sinks, tokens that a sequence may have, and rows of a list's entry."""

    block: int
    sinks: int
    capacity: int
    entry: int


@custom_op("farfield::append_token", mutates_args=("ring_k", "ring_v", "end", "count", "position", "clock"))
def append_token(
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    end: Tensor,
    count: Tensor,
    position: Tensor,
    clock: Tensor,
    plan: Sequence[int],
) -> None:
    """Put k [B, G, 1, D] and v [B, G, 1, E] to their rows of ring_k [B, G, S, D] and ring_v [B, G, S, E].

    Token t goes to row t if it is a sink, else to row sinks + t % (S - sinks). The first token of a block hides what
    its rows held. `end` [B, 1, S] are the rows' positions, `count` [B, 1, 1] the list entries with rows in use,
    `position` [B, 1, 1] becomes t and `clock` [B] t + 1. Past the capacity ValueError on the CPU, NaN on a GPU.
    """
    capacity = Plan(*plan).capacity
    # before anything is written, so that the sequences that have room can go on
    if clock.device.type == "cpu" and (full := (clock >= capacity).nonzero().flatten().tolist()):
        raise ValueError(
            f"append_token: the ring holds {capacity} tokens and is full for sequences {full}; make one with a "
            "larger capacity"
        )
    _append(k, v, ring_k, ring_v, end, count, position, clock, plan)


def _append(k, v, ring_k, ring_v, end, count, position, clock, plan):
    """In PyTorch, on any device."""
    block, sinks, capacity, entry = Plan(*plan)
    rows = ring_k.shape[2]
    span = rows - sinks
    t = clock[:, None]
    row = torch.where(t < sinks, t, sinks + t % span)
    full = (t >= capacity)[:, :, None, None]
    for ring, x in ((ring_k, k), (ring_v, v)):
        ring.scatter_(2, row[:, :, None, None].expand(x.shape), x.masked_fill(full, float("nan")))
    at, first = torch.arange(rows, device=clock.device), sinks + t // block * block % span
    opened = (t % block == 0) & (at >= first) & (at < first + block)
    end.masked_fill_(opened[:, None], HIDDEN)
    end.scatter_(2, row[:, None], t[:, None])
    count.copy_(((t + sinks).clamp(max=rows - 1) // entry + 1)[:, None])
    position.copy_(t[:, None])
    clock.add_(1)


@append_token.register_kernel("cuda")
def _(k, v, ring_k, ring_v, end, count, position, clock, plan):
    if k.dtype in DTYPES and max(k.shape[3], v.shape[3]) <= WIDEST:
        from farfield.kernels.token_step import launch_append

        launch_append(k, v, ring_k, ring_v, end, count, position, clock, *plan)
    else:
        _append(k, v, ring_k, ring_v, end, count, position, clock, plan)


@append_token.register_fake
def _(k, v, ring_k, ring_v, end, count, position, clock, plan):
    return None
