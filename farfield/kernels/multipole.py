"""Causal FMA with mean pooling as one call: pool, lists and attention, forward and backward, on Hopper GPUs.

The kernels are those of pool and attend. What is done here once instead of at every call: the launches are recorded
(kernels.replay), and the lists, which depend on the number of blocks only, are kept together with their transposes. A
call that is being captured in a CUDA graph neither reads nor fills what is kept: the graph would go on reading memory
that is given back here, and what is written during a capture is written when the graph runs. It makes its own lists.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from farfield.kernels import attend_backward, attend_hopper, pool, replay
from farfield.kernels.lists import build
from farfield.kernels.transpose import Readers, transpose
from farfield.ops.attend import Call, Plan
from farfield.ops.multipole import Field, kept_parts, tree_of

KEPT = 16  # lists of so many lengths
LONGEST = 1 << 15  # query blocks: longer calls take longer than their lists


def forward(q: Tensor, k: Tensor, v: Tensor, field: Field, scale: float) -> tuple[Tensor, Tensor]:
    """out and what the backward needs; the contract is ops.multipole's."""
    q, k, v = _plain(q), _plain(k), _plain(v)
    key = q.shape, q.stride(), k.shape, k.stride(), v.stride(), q.dtype, q.device, field, scale
    return replay.call(_forward, key, (q, k, v, *_lists(q, field)), field, scale)


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, field: Field, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous; the contract is ops.multipole's."""
    d_out, q, k, v = _plain(d_out), _plain(q), _plain(k), _plain(v)
    lists = _lists(q, field)
    near, far = _readers(q, field, lists)
    key = d_out.stride(), q.shape, q.stride(), k.shape, k.stride(), v.stride(), q.dtype, q.device, field, scale
    inputs = d_out, q, k, v, out, kept, *lists, *near[:3], *far[:3]
    return replay.call(_backward, key, inputs, near[3:], far[3:], field, scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, near: Tensor, near_count: Tensor, far: Tensor, far_count: Tensor,
    field: Field, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    size = kept_parts(q.shape, k.shape, q.element_size(), field)[-1]
    kept = q.new_empty(size, dtype=torch.uint8)
    lse, far_k, far_v, bias = _parts(kept, q, k, field)
    pool.forward(k, v, q.new_empty(0, dtype=torch.float32), tree_of(q.shape[2], field), (far_k, far_v, bias))
    call = _call(q, k, v, far_k, far_v, bias, near, near_count, far, far_count, field, scale)
    out, _ = attend_hopper.forward(call, lse)
    return out, kept


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor,
    near: Tensor, near_count: Tensor, far: Tensor, far_count: Tensor,
    near_start: Tensor, near_reader: Tensor, near_key: Tensor, far_start: Tensor, far_reader: Tensor, far_key: Tensor,
    near_about: tuple, far_about: tuple, field: Field, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse, far_k, far_v, bias = _parts(kept, q, k, field)
    call = _call(q, k, v, far_k, far_v, bias, near, near_count, far, far_count, field, scale)
    read = Readers(near_start, near_reader, near_key, *near_about), Readers(far_start, far_reader, far_key, *far_about)
    _, d_q, (near_grads, far_grads) = attend_backward.gradients(call, d_out, None, out, lse, False, read)
    none = q.new_empty(0, dtype=torch.float32)
    given = *near_grads[:2], *far_grads[:2], none, none, none
    d_k, d_v, _ = pool.backward(*given, q.shape[2], tree_of(q.shape[2], field))
    return d_q, d_k, d_v


def _call(q, k, v, far_k, far_v, bias, near, near_count, far, far_count, field: Field, scale: float) -> Call:
    none = q.new_empty(0)
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


@lru_cache(maxsize=1024)
def _suits(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether tensor memory accelerators can read it: rows without gaps, 16 bytes or a multiple from each other."""
    *outer, last = stride
    apart = attend_hopper.ALIGNED
    fits = all(n == 1 or (s > 0 and s % apart == 0) for n, s in zip(shape, outer, strict=False))
    return last == 1 and fits and stride[2] < attend_backward.FAR


def _plain(x: Tensor) -> Tensor:
    """The tensor, or a copy that the kernels can read."""
    if x.data_ptr() % replay.ALIGNED == 0 and _suits(x.shape, x.stride()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _lists(q: Tensor, field: Field) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Near and far index and count, kept or made for this call."""
    where = -(-q.shape[2] // field.block), field, q.device
    if _alone(where[0]):
        return _kept_lists.__wrapped__(*where, 0)
    # what one stream writes is not there yet for another
    return _kept_lists(*where, replay._stream(q.device))


def _readers(q: Tensor, field: Field, lists: tuple[Tensor, ...]) -> tuple[Readers, Readers]:
    """The same lists, transposed."""
    where = -(-q.shape[2] // field.block), field, q.device
    if _alone(where[0]):
        return _transposed(lists, where[0], field)
    return _kept_readers(*where, replay._stream(q.device))


def _alone(blocks: int) -> bool:
    return blocks > LONGEST or torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=KEPT)
def _kept_lists(blocks: int, field: Field, device: torch.device, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tree = tree_of(blocks * field.block, field)
    radius = list(accumulate(range(tree.levels), lambda r, _: -(-r // 2), initial=field.near // field.block))
    starts = list(accumulate(tree.groups[:-1], initial=tree.lead // field.rank))
    return build(0, blocks, radius, starts, True, 0, tree.lead // field.rank, device)


@lru_cache(maxsize=KEPT)
def _kept_readers(blocks: int, field: Field, device: torch.device, stream: int) -> tuple[Readers, Readers]:
    return _transposed(_kept_lists(blocks, field, device, stream), blocks, field)


def _transposed(lists: tuple[Tensor, ...], blocks: int, field: Field) -> tuple[Readers, Readers]:
    near, near_count, far, far_count = lists
    groups = tree_of(blocks * field.block, field).rows // field.rank
    # no block is read by more than the blocks after it that are near: it is never cut into pieces
    most = [blocks + blocks % 2, attend_backward.PIECE]
    near, far = transpose([near, far], [near_count, far_count], [blocks, groups], [False, True], most)
    return near, far
