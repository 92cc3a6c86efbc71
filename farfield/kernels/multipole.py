"""Causal FMA with mean pooling as one call: pool, lists and attention, forward and backward, on Hopper GPUs.

The kernels are those of pool and attend, or know the tree (multipole_hopper, multipole_backward). Launches are recorded
(kernels.replay), and the lists, which depend on the number of blocks only, are constants of a recording: they are made
once for a shape, and given back with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from farfield.kernels import attend_backward, attend_hopper, hopper, multipole_backward, multipole_hopper, pool
from farfield.kernels.lists import build
from farfield.kernels.replay import ALIGNED, Recorded, constant
from farfield.kernels.transpose import Readers, transpose
from farfield.ops.attend import Call, Plan
from farfield.ops.multipole import Field, kept_parts, tree_of

LONGEST = 1 << 15  # query blocks: what is longer takes longer than its launches and lists
KEPT = 4  # strides of d_out that a backward is kept for


class Whole:
    """The calls with one shape, stride and dtype of q, k and v, on one device."""

    __slots__ = ("backwards", "field", "forwards", "odd", "scale", "short")

    def __init__(self, shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]], field: Field, scale: float):
        self.field, self.scale = field, scale
        self.odd = not all(_suits(*about) for about in zip(shapes, strides, strict=True))
        self.short = -(-shapes[0][2] // field.block) <= LONGEST
        self.forwards = self._recorded(_forward)
        self.backwards: dict[tuple[int, ...], Callable[..., tuple[Tensor, Tensor, Tensor]]] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and what the backward needs; the contract is ops.multipole's."""
        return self.forwards(*self._readable(q, k, v))

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv, contiguous."""
        strides = d_out.stride()
        backward = self.backwards.get(strides)
        if backward is None:
            if not _suits(d_out.shape, strides):
                return self.backward(d_out.contiguous(), q, k, v, out, kept)
            if len(self.backwards) >= KEPT:
                self.backwards.clear()
            backward = self.backwards[strides] = self._recorded(_backward)
        if d_out.data_ptr() % ALIGNED:
            d_out = _aligned(d_out)
        return backward(d_out, *self._readable(q, k, v), out, kept)

    def _recorded(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        if self.short:
            return Recorded(function, self.field, self.scale)
        return partial(function, field=self.field, scale=self.scale)

    def _readable(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors as the kernels can read them, always in the same strides."""
        if self.odd:
            q, k, v = (x if _suits(x.shape, x.stride()) else x.contiguous() for x in (q, k, v))
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNED:
            q, k, v = _aligned(q), _aligned(k), _aligned(v)
        return q, k, v


def _forward(q: Tensor, k: Tensor, v: Tensor, field: Field, scale: float) -> tuple[Tensor, Tensor]:
    tree, size = tree_of(q.shape[2], field), kept_parts(q.shape, k.shape, q.element_size(), field)[-1]
    kept = q.new_empty(size, dtype=torch.uint8)
    lse, far_k, far_v, bias = _parts(kept, q, k, field)
    pool.forward(k, v, q.new_empty(0, dtype=torch.float32), tree, (far_k, far_v, bias))
    if multipole_hopper.wants(q, field.near, tree):
        return multipole_hopper.forward(q, k, v, far_k, far_v, lse, field.near, tree, scale), kept
    lists = constant(_lists, -(-q.shape[2] // field.block), field, q.device)
    out, _ = attend_hopper.forward(_call(q, k, v, far_k, far_v, bias, lists, field, scale), lse)
    return out, kept


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, field: Field, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tree = tree_of(q.shape[2], field)
    lse, far_k, far_v, bias = _parts(kept, q, k, field)
    if multipole_backward.wants(q, k, field.near, tree):
        return multipole_backward.backward(q, k, v, out, d_out, lse, far_k, far_v, tree, scale)
    none = q.new_empty(0, dtype=torch.float32)
    if multipole_backward.wants_halves(q, k, field.near, tree):
        shift, delta = multipole_backward.statistics_of(out, d_out, lse, field.block)
        d_q, *near = multipole_backward.near_gradients(q, k, v, d_out, shift, delta, scale)
        far = multipole_backward.far_gradients(q, d_out, shift, delta, far_k, far_v, d_q, tree, scale)
    else:
        lists, read = constant(_transposed, -(-q.shape[2] // field.block), field, q.device)
        call = _call(q, k, v, far_k, far_v, bias, lists, field, scale)
        _, d_q, (near, far) = attend_backward.gradients(call, d_out, None, out, lse, False, read)
    d_k, d_v, _ = pool.backward(*near[:2], *far[:2], none, none, none, q.shape[2], tree)
    return d_q, d_k, d_v


def _call(q, k, v, far_k, far_v, bias, lists: Sequence[Tensor], field: Field, scale: float) -> Call:
    none = q.new_empty(0)
    near, near_count, far, far_count = lists
    plans = Plan(field.block, field.block, 1, -1, 0), Plan(field.block, field.rank, 0, -1, 0)
    return Call(
        q, (k, far_k), (v, far_v), (none, bias), (none, none), (none, none), none, none,
        (near, far), (near_count, far_count), plans, scale,
    )  # fmt: skip


def _parts(kept: Tensor, q: Tensor, k: Tensor, field: Field) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, far keys and values, and their bias: views of `kept`."""
    far_k, far_v, bias, _ = kept_parts(q.shape, k.shape, q.element_size(), field)
    batch, heads, tokens, width = q.shape
    rows = tree_of(tokens, field).rows
    far = batch, k.shape[1], rows, width
    return (
        _view(kept, 0, torch.float32, batch, heads, tokens), _view(kept, far_k, q.dtype, *far),
        _view(kept, far_v, q.dtype, *far), _view(kept, bias, torch.float32, 1, 1, rows),
    )  # fmt: skip


def _view(kept: Tensor, at: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return kept[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _lists(blocks: int, field: Field, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Near and far index and count."""
    tree = tree_of(blocks * field.block, field)
    radius = list(accumulate(range(tree.levels), lambda r, _: -(-r // 2), initial=field.near // field.block))
    starts = list(accumulate(tree.groups[:-1], initial=tree.lead // field.rank))
    return build(0, blocks, radius, starts, True, 0, tree.lead // field.rank, device)


def _transposed(blocks: int, field: Field, device: torch.device) -> tuple[tuple[Tensor, ...], list[Readers]]:
    """The lists, and who reads each near block and each far group."""
    lists = near, near_count, far, far_count = _lists(blocks, field, device)
    groups = tree_of(blocks * field.block, field).rows // field.rank
    # of groups that are not small, `reader` holds query blocks, as it does of near blocks
    small = field.rank < attend_backward.SMALL
    # no block is read by more than the blocks after it that are near: it is never cut into pieces
    most = [blocks + blocks % 2, attend_backward.piece(small, far.shape, groups)]
    return lists, transpose([near, far], [near_count, far_count], [blocks, groups], [False, small], most)


def _suits(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether tensor memory accelerators can read it: rows without gaps, 16 bytes or a multiple from each other."""
    *outer, last = stride
    apart = hopper.ALIGNED
    fits = all(n == 1 or (s > 0 and s % apart == 0) for n, s in zip(shape, outer, strict=False))
    return last == 1 and fits and stride[2] < attend_backward.FAR


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % ALIGNED == 0 else x.new_empty_strided(x.shape, x.stride()).copy_(x)
