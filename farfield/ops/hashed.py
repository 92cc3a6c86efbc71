"""Tokens to buckets, buckets to sorted slots, and rows to and fro: what attention in buckets needs besides attend."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from farfield.ops import precision
from farfield.ops.attend import attend
from farfield.ops.eager import eager, recorded
from farfield.types import Layout, Rows

EVERY = 1 << 30  # the position of a slot that holds no query: it sees whatever its block reads
STEP = 1 << 22  # numbers that are hashed at a time


class Slots(NamedTuple):
    """Tokens sorted by (bucket, position), every bucket from a slot that is a multiple of the block on.

    -1 stands for a token that has no slot, and for a slot that has no token.

    Args:
        q_slot, k_slot: of each token.
        q_token, k_token: of each slot; `q_token[q_slot[i]] = i`.
        position: the last slot of the keys that the query of a slot sees; empty where that is its own slot.
        index, count: for each block of query slots, the blocks of key slots that it reads, as in Layout.
    """

    q_slot: Int[Tensor, "B H T"]
    q_token: Int[Tensor, "B H M"]
    k_slot: Int[Tensor, "B H S"]
    k_token: Int[Tensor, "B H R"]
    position: Int[Tensor, "B H M"]
    index: Int[Tensor, "B H N P"]
    count: Int[Tensor, "B H N"]


@cache
def planes(seed: int, heads: int, width: int, buckets: int) -> Float[Tensor, "H D R"]:
    """buckets / 2 random directions a head, of length 1, float64: the same on every device."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, width, buckets // 2, generator=made, dtype=torch.float64, device="cpu")
    return x / x.norm(dim=1, keepdim=True)


def buckets(x: Float[Tensor, "B H T D"], many: int, seed: int) -> Int[Tensor, "B H T"]:
    """The bucket of each row: of `many` directions, half of them random and half their opposites, the nearest.

    Products are taken in float32 or wider; of equal ones the first direction wins. No gradient.

    Source: angular locality-sensitive hashing (Andoni et al. 2015, arXiv:1509.02897) as in Reformer.
    """
    x = x.detach()
    return _buckets(x, many, seed) if eager(x) else _buckets_op(x, many, seed)


@custom_op("farfield::hash_buckets", mutates_args=())
def _buckets_op(x: Tensor, many: int, seed: int) -> Tensor:
    return _buckets(x, many, seed)


@_buckets_op.register_fake
def _(x, many, seed):
    return x.new_empty(x.shape[:3], dtype=torch.int32)


def _buckets(x: Tensor, many: int, seed: int) -> Tensor:
    batch, heads, tokens, width = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda and wide == torch.float32 and x.numel():
        from farfield.kernels.hashed import recorded_buckets

        return recorded_buckets(x, _directions(seed, heads, width, many, x.dtype, x.device), many // 2)
    directions = _planes_on(seed, heads, width, many, wide, x.device)
    found = torch.empty(batch, heads, tokens, dtype=torch.int32, device=x.device)
    which = torch.arange(many, dtype=torch.int32, device=x.device)
    step = max(1, STEP // max(1, batch * heads * width))
    with precision.kept(x):
        for start in range(0, tokens, step):
            there = slice(start, start + step)
            shares = x[:, :, there].to(wide) @ directions
            # argmax leaves open which of equal ones it names
            both = torch.cat([shares, -shares], -1)
            best = both == both.amax(-1, keepdim=True)
            found[:, :, there] = torch.where(best, which, many - 1).amin(-1)
    return found


@cache
def _planes_on(
    seed: int, heads: int, width: int, many: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "H D R"]:
    return planes(seed, heads, width, many).to(device, dtype)


@cache
def _directions(seed: int, heads: int, width: int, many: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same as the kernel takes them."""
    from farfield.kernels.hashed import directions

    return directions(planes(seed, heads, width, many), dtype).to(device)


def slots(
    q_bucket: Int[Tensor, "B H T"] | None, k_bucket: Int[Tensor, "B H S"], many: int, block: int, *, strict: bool
) -> Slots:
    """Sort queries and keys by (bucket, position), and list what each block of sorted queries reads.

    Query i stands at position S - T + i and sees the keys of its bucket up to there, with `strict` only those before.
    Tokens whose bucket is none of 0 .. many - 1 get no slot. Everything happens on the device, in time linear in T and
    S (the lists: (T / block)^2 numbers); shapes depend on shapes alone.

    Args:
        q_bucket: None: each token has one bucket, and queries see what is strictly before them. A query then lies one
            slot before its key, so that causal order of slots is the whole rule; the first of a bucket, which sees
            nothing, has no slot.
        block: slots of a block of queries and of a block of keys.

    Raises:
        ValueError: sizes do not fit.
    """
    shared = q_bucket is None
    if many < 1 or block < 1:
        raise ValueError(f"slots: many and block must be at least 1, got many={many}, block={block}")
    if shared and not strict:
        raise ValueError("slots: tokens of one bucket each see strictly earlier ones; pass q_bucket, or strict=True")
    q_bucket = k_bucket[:, :, :0] if q_bucket is None else q_bucket
    if q_bucket.shape[2] > k_bucket.shape[2]:
        raise ValueError(
            f"slots: queries are the last of the tokens, got {q_bucket.shape[2]} and {k_bucket.shape[2]} keys"
        )
    call = q_bucket, k_bucket, many, block, strict, shared
    return Slots(*(_slots(*call) if eager(q_bucket, k_bucket) else _slots_op(*call)))


def room(tokens: int, many: int, block: int) -> int:
    """Slots that always suffice: every bucket may leave up to block - 1 of them empty."""
    return (tokens + min(many, tokens) * (block - 1)) // block * block


def _shapes(q_bucket: Tensor, k_bucket: Tensor, many: int, block: int, shared: bool) -> list[tuple[int, ...]]:
    batch, heads, keys = k_bucket.shape
    queries = keys if shared else q_bucket.shape[2]
    q_room, k_room = room(queries, many, block), room(keys, many, block)
    sizes = (queries,), (q_room,), (keys,), (k_room,), (0 if shared else q_room,)
    return [(batch, heads, *n) for n in (*sizes, (q_room // block, k_room // block), (q_room // block,))]


@custom_op("farfield::hash_slots", mutates_args=())
def _slots_op(
    q_bucket: Tensor, k_bucket: Tensor, many: int, block: int, strict: bool, shared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e, f, g = _slots(q_bucket, k_bucket, many, block, strict, shared)
    return a, b, c, d, e, f, g


@_slots_op.register_fake
def _(q_bucket, k_bucket, many, block, strict, shared):
    return tuple(
        k_bucket.new_empty(shape, dtype=torch.int32) for shape in _shapes(q_bucket, k_bucket, many, block, shared)
    )


def _slots(q_bucket: Tensor, k_bucket: Tensor, many: int, block: int, strict: bool, shared: bool):
    shapes = _shapes(q_bucket, k_bucket, many, block, shared)
    if k_bucket.is_cuda and k_bucket.numel():
        from farfield.kernels.hashed import recorded_slots

        return recorded_slots(q_bucket, k_bucket, many, block, strict, shared, shapes)
    (*_, queries), (*_, q_room), (*_, keys), (*_, k_room), *_ = shapes
    if not k_bucket.numel():
        return tuple(k_bucket.new_zeros(shape, dtype=torch.int32) for shape in shapes)
    which = torch.arange(many, device=k_bucket.device)
    # [B, H, S, many]: keys of each bucket up to and with this token
    so_far = (k_bucket[..., None] == which).cumsum(2)
    k_start = _starts(so_far[:, :, -1], block)
    k_slot = _slot_of(so_far, k_bucket, k_start)
    k_token = _inverse(k_slot, k_room)
    if shared:
        first = k_slot == k_start.gather(2, k_bucket.long().clamp(0, many - 1))
        q_start, q_slot = k_start, torch.where(first | (k_slot < 0), -1, k_slot - 1)
        position = k_slot.new_empty(*k_slot.shape[:2], 0)
    else:
        asked = q_bucket.long().clamp(0, many - 1)
        q_so_far = (q_bucket[..., None] == which).cumsum(2)
        q_start = _starts(q_so_far[:, :, -1], block)
        q_slot = _slot_of(q_so_far, q_bucket, q_start)
        seen = so_far[:, :, keys - queries :].gather(3, asked[..., None])[..., 0]
        if strict:
            seen = seen - (k_bucket[:, :, keys - queries :] == q_bucket).long()
        last = k_start.gather(2, asked) + seen - 1
        position = torch.full((*last.shape[:2], q_room + 1), EVERY, device=last.device)
        position = position.scatter_(2, q_slot.where(q_slot >= 0, q_room), last)[..., :q_room]
    q_token = _inverse(q_slot, q_room)
    # the bucket of a block: blocks belong to one, empty ones at the end to any
    n = torch.arange(q_room // block, device=k_bucket.device)
    own = (q_start[:, :, None] <= n[:, None] * block).sum(-1) - 1
    low = k_start.gather(2, own) // block
    there = (q_token >= 0).unflatten(2, (-1, block))
    high = n * block + block - 1 if shared else position.unflatten(2, (-1, block)).where(there, -1).amax(-1)
    count = torch.where(there.any(-1), high // block - low + 1, 0).clamp(min=0)
    index = low[..., None] + torch.arange(k_room // block, device=k_bucket.device)
    found = q_slot, q_token, k_slot, k_token, position, index, count
    return tuple(x.to(torch.int32) for x in found)


def _starts(total: Tensor, block: int) -> Tensor:
    """The first slot of each bucket, [B, H, many]."""
    sizes = (total + block - 1) // block * block
    return sizes.cumsum(-1) - sizes


def _slot_of(so_far: Tensor, bucket: Tensor, start: Tensor) -> Tensor:
    own = bucket.long().clamp(0, start.shape[-1] - 1)
    slot = start.gather(2, own) + so_far.gather(3, own[..., None])[..., 0] - 1
    return slot.where(bucket == own, -1)


def _inverse(slot: Tensor, room: int) -> Tensor:
    """The token of each slot."""
    at = torch.arange(slot.shape[2], device=slot.device).expand_as(slot)
    found = torch.full((*slot.shape[:2], room + 1), -1, device=slot.device)
    return found.scatter_(2, slot.where(slot >= 0, room), at)[..., :room]


def take(
    x: Float[Tensor, "B H S D"], index: Int[Tensor, "B H T"], inverse: Int[Tensor, "B H S"]
) -> Float[Tensor, "B H T D"]:
    """The rows that `index` names, 0 where it is negative. No row is named twice.

    Differentiable in x: the gradient of row s is that of the output row `inverse[s]`, 0 where that is negative.
    """
    if x.shape[:2] != index.shape[:2] or inverse.shape != x.shape[:3]:
        raise ValueError(
            f"take: x {list(x.shape)} needs index [B, H, T] and inverse {list(x.shape[:3])}, got {list(index.shape)} "
            f"and {list(inverse.shape)}"
        )
    if not eager(x, index, inverse):
        return _take_op(x, index, inverse)
    return _Take.apply(x, index, inverse) if recorded(x) else _take(x, index)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor):
        ctx.save_for_backward(index, inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        index, inverse = ctx.saved_tensors
        return take(grad, inverse, index), None, None


@custom_op("farfield::take_rows", mutates_args=())
def _take_op(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return _take(x, index)


@_take_op.register_fake
def _(x, index, inverse):
    return x.new_empty(*index.shape, x.shape[3])


def _save(ctx, inputs, output):
    _, index, inverse = inputs
    ctx.save_for_backward(index, inverse)


def _differentiate(ctx, grad):
    index, inverse = ctx.saved_tensors
    return take(grad, inverse, index), None, None


_take_op.register_autograd(_differentiate, setup_context=_save)


def _take(x: Tensor, index: Tensor) -> Tensor:
    if x.is_cuda and x.dtype != torch.float64 and index.numel() and x.numel():
        from farfield.kernels.hashed import take

        return take(x, index)
    if not x.shape[2]:
        return x.new_zeros(*index.shape, x.shape[3])
    absent = (index < 0)[..., None]
    rows = index.long().clamp(min=0)[..., None].expand(*index.shape, x.shape[3])
    return x.gather(2, rows).masked_fill(absent, 0.0)


def attend_sorted(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S E"],
    slots: Slots,
    block: int,
    scale: float,
) -> Float[Tensor, "B H T E"]:
    """attend by these lists, between moving rows into their slots and back; 0 for queries without a slot."""
    if q.is_cuda and eager(q, k, v, *slots):
        from farfield.kernels import hashed

        if hashed.wants(q, v, block, scale):
            if recorded(q, k, v):
                return _AttendSorted.apply(q, k, v, slots, block, scale)
            return hashed.forward(q, k, v, slots, block, scale)[0]
    layout = Layout(
        slots.index, slots.count, block, block, slots.q_token.shape[2], slots.k_token.shape[2], causal=True
    )  # fmt: skip
    queries = take(q, slots.q_token, slots.q_slot)
    rows = Rows(take(k, slots.k_token, slots.k_slot), take(v, slots.k_token, slots.k_slot))
    position = slots.position if slots.position.shape[2] else None
    return take(attend(queries, rows, layout, scale=scale, position=position).out, slots.q_slot, slots.q_token)


class _AttendSorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, slots: Slots, block: int, scale: float):
        from farfield.kernels import hashed

        out, kept = hashed.forward(q, k, v, slots, block, scale)
        ctx.block, ctx.scale = block, scale
        ctx.save_for_backward(*kept, *slots)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        from farfield.kernels import hashed

        saved = ctx.saved_tensors
        kept, slots = hashed.Kept(*saved[:5]), Slots(*saved[5:])
        return *hashed.backward(d_out, kept, slots, ctx.block, ctx.scale), None, None, None
