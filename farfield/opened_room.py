"""Summaries and sketches of an opened state in few buffers, with room behind them for those of further blocks.

All groups of a level lie one behind the other, level after level, as kernels read them; what a state holds are views.
Further blocks go into the room, and whoever is first to put some behind the same ones has it: then a chunk of a prompt
costs what it brings, not what there is. Whoever is second, or goes on from a copy or a file, gets buffers of its own,
as with `farfield.state.appended`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from farfield.ops import growth
from farfield.select.opened import Sketch
from farfield.summarize import Groups


class Shape(NamedTuple):
    """What a room is laid out by, beside what keys and values are like.

    Args:
        most: levels at most.
        sinks: so many tokens, the first of the sequence, are in no group; they are rows of their own before all others.
        begin: the block that blocks are counted from.
    """

    block: int
    rank: int
    detail: int
    most: int
    sinks: int
    begin: int

    @property
    def lead(self) -> int:
        """Rows before the summaries: the sinks, filled up to whole groups."""
        return -(-self.sinks // self.rank) * self.rank

    @property
    def hidden(self) -> int:
        """How many of the tokens that are counted are sinks."""
        return max(self.sinks - self.begin * self.block, 0)


class Room:
    """Buffers for the groups of `blocks` blocks, of which the first `used` are somebody's.

    Args:
        k, v: the sinks, [B, G, sinks, D] and [B, G, sinks, E].
        size: numbers in a row of a sketch.
    """

    def __init__(self, shape: Shape, blocks: int, k: Tensor, v: Tensor, size: int):
        self.shape, self.blocks, self.used = shape, blocks, 0
        self.groups = [blocks >> height for height in range(min(blocks.bit_length(), shape.most))]
        wide, many = torch.promote_types(k.dtype, torch.float32), sum(self.groups)
        rows = shape.lead + many * shape.rank

        def zeros(each: int, like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
            # who reads a block with what is beside it reads rows that are not there yet, and weighs them with 0
            return torch.zeros(*like.shape[:2], each, width, dtype=dtype, device=like.device)

        self.far_k, self.far_v = zeros(rows, k, k.shape[3], k.dtype), zeros(rows, v, v.shape[3], v.dtype)
        self.sketches = zeros(many * shape.detail, k, size, wide)
        self.bias = torch.zeros(1, 1, rows, dtype=wide, device=k.device)
        if shape.lead:
            self.far_k[:, :, : shape.sinks], self.far_v[:, :, : shape.sinks] = k, v
            self.bias[:, :, shape.sinks : shape.lead] = float("-inf")
        self.standing = self._counted(shape.rank, k.device, wide).view(1, 1, many, shape.rank)
        self.bias[:, :, shape.lead :] = self.standing.log().flatten(2)
        self.count = self._counted(shape.detail, k.device, wide).view(1, 1, many, shape.detail)
        self.centres: Tensor | None = None  # of the far rows, once somebody rotates them

    def _counted(self, each: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Tokens that each of `each` rows of every group stands for."""
        found = []
        for height, groups in enumerate(self.groups):
            size = (self.shape.block // each) << height
            rows = torch.full((groups * each,), size, dtype=dtype, device=device)
            if self.shape.hidden:
                first = torch.arange(min(len(rows), self.shape.hidden), device=device) * size
                rows[: len(first)] -= (self.shape.hidden - first).clamp(0, size)
            found.append(rows)
        return torch.cat(found) if found else torch.empty(0, dtype=dtype, device=device)

    def start(self, height: int) -> int:
        """How many groups of the levels below there is room for."""
        return sum(self.groups[:height])

    @property
    def starts(self) -> list[int]:
        """Per level, the number of its first group among the far rows' groups."""
        lead = self.shape.lead // self.shape.rank
        return [lead + self.start(height) for height in range(len(self.groups))]

    def far(self, height: int, first: int, stop: int) -> slice:
        """Where the rows of these groups of a level are."""
        at, p = self.shape.lead + self.start(height) * self.shape.rank, self.shape.rank
        return slice(at + first * p, at + stop * p)

    def sketched(self, height: int, first: int, stop: int) -> slice:
        at, d = self.start(height) * self.shape.detail, self.shape.detail
        return slice(at + first * d, at + stop * d)

    def levels(self, blocks: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """k, v and bias of each level, of all groups that so many blocks have."""
        p, lead = self.shape.rank, [self.shape.lead]
        rows = lead + [n * p for n in self._parts(blocks)]
        bias = self.bias.expand(self.far_k.shape[0], -1, -1)
        parts = [x.split_with_sizes(rows, 2)[1::2] for x in (self.far_k, self.far_v, bias)]
        return list(zip(*parts, strict=True))[: blocks.bit_length()]

    def all_sketches(self, blocks: int) -> list[Sketch]:
        """The sketches of the same groups."""
        parts, (batch, heads, _, size) = self._parts(blocks), self.sketches.shape
        rows = self.sketches.view(batch, heads, sum(self.groups), self.shape.detail, size).split_with_sizes(parts, 2)
        count = self.count.expand(batch, -1, -1, -1).split_with_sizes(parts, 2)
        return [Sketch(*x) for x in zip(rows[::2], count[::2], strict=True)][: blocks.bit_length()]

    def _parts(self, blocks: int) -> list[int]:
        """Of each level, how many groups there are, and for how many more there is room."""
        return [n for height, room in enumerate(self.groups) for n in (blocks >> height, room - (blocks >> height))]

    def tokens(self, height: int, group: int) -> Tensor:
        """How many tokens each row of a group stands for, where rows are means: [B, 1, 1, p]."""
        at = self.start(height) + group
        return self.standing[:, :, at : at + 1].expand(self.far_k.shape[0], -1, -1, -1)

    def put(self, height: int, first: int, groups: Groups) -> None:
        """Write groups first, first + 1, ... of a level."""
        here = self.far(height, first, first + len(groups))
        self.far_k[:, :, here], self.far_v[:, :, here] = groups.k.flatten(2, 3), groups.v.flatten(2, 3)
        if groups.count is not None and groups.count.shape[0]:
            # alike for all sequences
            self.bias[:, :, here] = groups.count[:1].log().flatten(2)

    def put_sketch(self, height: int, first: int, level: Sketch) -> None:
        self.sketches[:, :, self.sketched(height, first, first + level.rows.shape[2])] = level.rows.flatten(2, 3)


class Held(NamedTuple):
    """The room of a state's groups, how many blocks it has there, and what the kernels know of groups that wait."""

    room: Room
    blocks: int
    waiting: Float[Tensor, "B G 2 L p D"] | None


# beside the tensors, not in them, by the first level's sketches: copies and files have no room
_rooms = WeakTensorKeyDictionary()
_taking = threading.Lock()


def held(sketches: Sequence[Sketch]) -> Held | None:
    """Where these sketches and the summaries beside them lie, if it is known."""
    if not sketches:
        return None
    with _taking:
        return _rooms.get(sketches[0].rows)


def keep(sketches: Sequence[Sketch], where: Held) -> None:
    with _taking:
        _rooms[sketches[0].rows] = where


def take(where: Held | None, shape: Shape, stop: int) -> bool:
    """Whether the room behind these groups, for up to `stop` blocks, is now the caller's."""
    if where is None or where.room.shape != shape:
        return False
    room = where.room
    # what inference mode has made is written in inference mode only
    if room.sketches.is_inference() and not torch.is_inference_mode_enabled():
        return False
    with _taking:
        if room.used != where.blocks or room.blocks < stop:
            return False
        room.used = stop
    return True


def waiting(pending: Sequence[Groups | None], like: Tensor, rank: int) -> Tensor:
    """What waits at each level in one buffer, as the kernels have it."""
    batch, kv_heads, width = like.shape[0], like.shape[1], like.shape[3]
    found = torch.zeros(batch, kv_heads, 2, len(pending), rank, width, dtype=torch.float32, device=like.device)
    for height, groups in enumerate(pending):
        if groups is not None:
            found[:, :, 0, height], found[:, :, 1, height] = groups.k[:, :, 0], groups.v[:, :, 0]
    return found


def grow(
    where: Room, k: Tensor, raw: Tensor, v: Tensor, firsts: tuple[int, int, int], known: Tensor, done: int, stop: int
) -> Tensor:
    """Blocks done .. stop - 1 by the kernels of ops.growth; what waits after them."""
    shape, into = where.shape, (where.sketches, where.far_k, where.far_v)
    return growth.grow(
        k, raw, v, firsts, into, known, done, stop,
        block=shape.block, detail=shape.detail, lead=shape.lead, sinks=shape.hidden, blocks=where.blocks,
        most=shape.most,
    )  # fmt: skip
