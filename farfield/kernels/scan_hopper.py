"""The walk of scan on Hopper GPUs: warps with roles, in Gluon.

One warp copies chunks of q, k and v into a ring of shared memory, through the tensor memory accelerator; groups of four
warps compute. The state lies in their registers as its transpose, [values, dims], from where the tensor cores take it
as it is: out^T = S^T q^T needs no copy of it, and only the masked products of keys and queries pass through shared
memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from farfield.kernels.hopper import LOG2E, aligned, barriers, descriptor, on_hopper, report, sync, wait_empty, wait_full
from farfield.kernels.replay import start


@gluon.jit
def _power(rate, n):
    """2^(rate n), n >= 0; 1 for n = 0 though the rate be -inf."""
    return gl.exp2(gl.where(n > 0, rate * n, 0.0))


@gluon.jit
def _copy(
    q, k, v, rings, b, h, start, stop, virtual,
    Q_REPEAT: gl.constexpr, REPEAT: gl.constexpr, V_REPEAT: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr,
    C: gl.constexpr, BACK: gl.constexpr,
):  # fmt: skip
    q_ring, k_ring, v_ring, full, empty = rings
    step = 0
    for at in range(start, stop, C):
        # tokens that are not there are 0
        row = virtual - C - at if BACK else at
        s = wait_empty(empty, step)
        mbarrier.expect(full.index(s), 2 * C * (2 * D + PARTS * 64))
        tma.async_copy_global_to_shared(k, [b, h // REPEAT, row, 0], full.index(s), k_ring.index(s))
        tma.async_copy_global_to_shared(q, [b, h // Q_REPEAT, row, 0], full.index(s), q_ring.index(s))
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(
                v, [b, h // V_REPEAT, row, 64 * part], full.index(s), v_ring.index(s * PARTS + part)
            )
        step += 1


@gluon.jit
def _load(
    q, k, v, q_2, k_2, v_2, rings, b, h, second, start, stop, virtual,
    Q_REPEAT: gl.constexpr, REPEAT: gl.constexpr, V_REPEAT: gl.constexpr, Q_REPEAT_2: gl.constexpr,
    REPEAT_2: gl.constexpr, V_REPEAT_2: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr, C: gl.constexpr,
    BACK: gl.constexpr, BOTH: gl.constexpr,
):  # fmt: skip
    if BOTH:
        if second:
            _copy(q_2, k_2, v_2, rings, b, h, start, stop, virtual, Q_REPEAT_2, REPEAT_2, V_REPEAT_2, PARTS, D, C, BACK)
        else:
            _copy(q, k, v, rings, b, h, start, stop, virtual, Q_REPEAT, REPEAT, V_REPEAT, PARTS, D, C, BACK)
    else:
        _copy(q, k, v, rings, b, h, start, stop, virtual, Q_REPEAT, REPEAT, V_REPEAT, PARTS, D, C, BACK)


@gluon.jit
def _compute(
    before, given, rings,
    TURNED: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr, C: gl.constexpr,
    BACK: gl.constexpr, BOTH: gl.constexpr,
):  # fmt: skip
    """64 columns of v."""
    (
        out, out_2, end, pairs_ring, out_ring, b, h, bh, n, second, rate, start, stop, virtual, skip, segments,
    ) = given  # fmt: skip
    q_ring, k_ring, v_ring, full, empty = rings
    SIZE: gl.constexpr = PARTS * 64 * D
    dtype: gl.constexpr = q_ring.dtype
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    held: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    of_state: gl.constexpr = gl.DotOperandLayout(0, score, 2)
    of_value: gl.constexpr = gl.DotOperandLayout(0, held, 2)

    values = 64 * PART + gl.arange(0, 64, gl.SliceLayout(1, held))
    dims = gl.arange(0, D, gl.SliceLayout(0, held))
    straight, turned = dims[None, :] * (PARTS * 64) + values[:, None], dims[None, :] + values[:, None] * D
    place = turned if TURNED else straight
    if BOTH:
        place = gl.where(second > 0, straight if TURNED else turned, place)
    acc = gl.zeros([64, D], gl.float32, held)
    if before is not None:
        acc += gl.load(before + (bh.to(gl.int64) * segments + n) * SIZE + place)

    r = gl.arange(0, C, gl.SliceLayout(0, score))
    lag = r[None, :] - gl.arange(0, C, gl.SliceLayout(1, score))[:, None]
    if BACK:
        lag = -lag
    # [C, C], by key and query: lambda^(t - s), 0 for the future
    fade = gl.where(lag >= 0, _power(rate, lag), 0.0)
    s = gl.arange(0, C, gl.SliceLayout(0, of_value))
    if BACK:
        weight = _power(rate, s + 1)
    else:
        grown = _power(rate, r + 1)
    nothing = gl.zeros([C, C], gl.float32, score)
    p_tile, o_tile = pairs_ring.index(PART), out_ring.index(PART)
    step = 0
    for at in range(start, stop, C):
        # tokens of this chunk: the first one is short from the end on, the last one otherwise
        if BACK:
            many = C - gl.maximum(skip - at, 0)
            grown = _power(rate, gl.maximum(many - 1 - r, 0))
        else:
            many = gl.minimum(stop - at, C)
            weight = _power(rate, gl.maximum(many - 1 - s, 0))
        i = wait_full(full, step)
        keys = k_ring.index(i).reshape([C, D])
        queries = q_ring.index(i).reshape([C, D]).permute((1, 0))
        pairs = warpgroup_mma(keys, queries, nothing, use_acc=False, is_async=True)
        narrow = gl.convert_layout(acc.to(dtype), of_state)
        o = warpgroup_mma(narrow, queries, nothing, use_acc=False, is_async=True)
        v_tile = v_ring.index(i * PARTS + PART).reshape([C, 64]).permute((1, 0)).load(of_value)
        faded = (v_tile.to(gl.float32) * weight[None, :]).to(dtype)
        pairs = warpgroup_mma_wait(1, deps=[pairs])
        p_tile.store((pairs * fade).to(dtype))
        fence_async_shared()
        o, narrow = warpgroup_mma_wait(0, deps=[o, narrow])
        o = o * grown[None, :]
        sync()
        plain = gl.convert_layout(v_tile, of_state)
        o = warpgroup_mma(plain, p_tile, o, is_async=True)
        acc = warpgroup_mma(faded, keys, acc * _power(rate, many), is_async=True)
        o, plain = warpgroup_mma_wait(1, deps=[o, plain])
        # the copy of the chunk before has read its tile
        tma.store_wait(0)
        sync()
        o_tile.reshape([C, 64]).permute((1, 0)).store(o.to(dtype))
        fence_async_shared()
        sync()
        row = virtual - C - at if BACK else at
        if BOTH:
            if second:
                tma.async_copy_shared_to_global(out_2, [b, h, row, 64 * PART], o_tile)
            else:
                tma.async_copy_shared_to_global(out, [b, h, row, 64 * PART], o_tile)
        else:
            tma.async_copy_shared_to_global(out, [b, h, row, 64 * PART], o_tile)
        acc, faded = warpgroup_mma_wait(0, deps=[acc, faded])
        report(empty, i)
        step += 1
    if (n == segments - 1) & (second == 0):
        gl.store(end + bh.to(gl.int64) * SIZE + straight, acc)
    tma.store_wait(0)


# what varies with the length must not make another kernel
VARIES = ["heads", "tokens", "piece", "each", "segments", "before"]


@gluon.jit(do_not_specialize=VARIES)
def scan_hopper(
    q, k, v, out, q_2, k_2, v_2, out_2, decay, before, end, heads, tokens, piece, each, segments,
    TURNED: gl.constexpr, Q_REPEAT: gl.constexpr, REPEAT: gl.constexpr, V_REPEAT: gl.constexpr,
    Q_REPEAT_2: gl.constexpr, REPEAT_2: gl.constexpr, V_REPEAT_2: gl.constexpr, PARTS: gl.constexpr, D: gl.constexpr,
    C: gl.constexpr, STAGES: gl.constexpr, BACK: gl.constexpr, BOTH: gl.constexpr,
):  # fmt: skip
    """One segment of one head; with BOTH, programs come in pairs, which read the same and write one each."""
    pid = gl.program_id(0)
    second = 0
    if BOTH:
        second = pid % 2
        pid = pid // 2
    n, bh = pid % segments, pid // segments
    b, h = bh // heads, bh % heads
    rate = gl.load(decay + h).to(gl.float32) * LOG2E
    # from the end on, what is missing to whole chunks comes first
    virtual = (tokens + C - 1) // C * C
    skip = virtual - tokens
    start = n * each * piece
    stop = gl.minimum(start + each * piece, virtual if BACK else tokens)
    whole: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], q.dtype)
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, C, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, C, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES * PARTS, 1, 1, C, 64], v.layout)
    out_ring = gl.allocate_shared_memory(out.dtype, [PARTS, 1, 1, C, 64], out.layout)
    pairs_ring = gl.allocate_shared_memory(q.dtype, [PARTS, C, C], whole)
    full, empty = barriers(STAGES, 1, PARTS)
    fence_async_shared()
    rings = q_ring, k_ring, v_ring, full, empty
    computing = (
        out, out_2, end, pairs_ring, out_ring, b, h, bh, n, second, rate, start, stop, virtual, skip, segments
    )  # fmt: skip
    # constants stay constants only where they are written into the call
    if PARTS == 1:
        gl.warp_specialize([
            (_compute, (before, computing, rings, TURNED, 0, PARTS, D, C, BACK, BOTH)),
            (_load, (
                q, k, v, q_2, k_2, v_2, rings, b, h, second, start, stop, virtual,
                Q_REPEAT, REPEAT, V_REPEAT, Q_REPEAT_2, REPEAT_2, V_REPEAT_2, PARTS, D, C, BACK, BOTH,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (before, computing, rings, TURNED, 0, PARTS, D, C, BACK, BOTH)),
            (_compute, (before, computing, rings, TURNED, 1, PARTS, D, C, BACK, BOTH)),
            (_load, (
                q, k, v, q_2, k_2, v_2, rings, b, h, second, start, stop, virtual,
                Q_REPEAT, REPEAT, V_REPEAT, Q_REPEAT_2, REPEAT_2, V_REPEAT_2, PARTS, D, C, BACK, BOTH,
            )),
        ], [4, 1], [240, 24])  # fmt: skip


CHUNK = 64  # tokens
# width of keys, of values -> chunks in flight
STAGES = {(64, 64): 8, (64, 128): 4, (128, 64): 4, (128, 128): 3}


def wants(*tensors: Tensor) -> bool:
    """Whether this kernel takes the tensors, on a Hopper GPU."""
    if tensors[0].dtype != torch.bfloat16 or not on_hopper(tensors[0].device):
        return False
    return all(x.shape[3] in (64, 128) and aligned(x) for x in tensors)


class Walk(NamedTuple):
    """out = q (the sums of k v^T) over the past; each [B, H or fewer, T, width]."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


def walk(
    walks: list[Walk], decay: Tensor, before: Tensor | None, turned: bool, end: Tensor, cut: tuple[int, int, int],
    back: bool,
) -> None:  # fmt: skip
    """One walk, or two of the same widths that read the same tensors.

    Args:
        before: [B H, segments, D, E], float32: the state before each segment; None: there is nothing before the first,
            and there is no other.
        turned: `before` is [B H, segments, E, D]. That of the second walk is the same the other way round.
        end: [B, H, D, E], the state at the end, of the first walk.
        cut: tokens of a piece, pieces of a segment, segments.
    """
    first = walks[0]
    width, value_width = first.q.shape[3], first.v.shape[3]
    batch, heads, tokens, _ = first.out.shape
    boxes, repeats = [], []
    for x in walks:
        boxes += [descriptor(x.q, CHUNK, width), descriptor(x.k, CHUNK, width)]
        boxes += [descriptor(x.v, CHUNK, 64), descriptor(x.out, CHUNK, 64)]
        repeats.append([heads // y.shape[1] for y in x[:3]])
    if len(walks) == 1:
        boxes += [None] * 4
        repeats *= 2
    piece, each, segments = cut
    start(
        scan_hopper, (len(walks) * segments * batch * heads,),
        *boxes, decay, before, end, heads, tokens, piece, each, segments, TURNED=turned,
        **dict(zip(("Q_REPEAT", "REPEAT", "V_REPEAT"), repeats[0], strict=True)),
        **dict(zip(("Q_REPEAT_2", "REPEAT_2", "V_REPEAT_2"), repeats[1], strict=True)),
        PARTS=value_width // 64, D=width, C=CHUNK, STAGES=STAGES[width, value_width], BACK=back,
        BOTH=len(walks) > 1, num_warps=4,
    )  # fmt: skip
