"""attend on the GPU, backward: shares and pieces of the gradients of row blocks, added up in one order.

A share is what one entry of a list gives to dk, dv and the bias gradient of a small row block; its readers' shares are
added up, at most `most` readers a program. Row blocks that more read are cut into pieces, which are added up in turn.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import padded
from farfield.kernels.replay import start
from farfield.kernels.transpose import Readers
from farfield.ops.attend import Plan

FULL = 8192  # lists that keep a GPU busy while the last of them end
NUMBERS = 2048  # what a program that adds up shares holds at a time
LOOK = 8  # numbers of pieces that it looks at

SUMS_VARY = ["first", "units", "blocks", "picks", "rows", "row_blocks", "pieces", "most", "base"]
SUMS_VARY += ["segment_b", "segment_h"]


@triton.jit(do_not_specialize=SUMS_VARY)
def sum_shares(
    share_k, share_v, d_k, d_v, sum_k, sum_v, start, reader, key, segment_b, segment_h,
    first, units, blocks, picks, rows, row_blocks, pieces, most, base,
    K_BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SIZE_K: tl.constexpr, SIZE_V: tl.constexpr,
    NUMBERS: tl.constexpr, MANY: tl.constexpr, LOOK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add up shares, SIZE numbers of dk or of dv: of a run of row blocks, or of pieces of row blocks' readers.

    Most numbers of pieces are nobody's, and those that are somebody's stand side by side: a program looks at LOOK of
    them, far apart.
    """
    PARTS_K: tl.constexpr = (K_BLOCK * D + SIZE_K - 1) // SIZE_K
    PARTS_V: tl.constexpr = (K_BLOCK * E + SIZE_V - 1) // SIZE_V
    runs = (row_blocks + MANY - 1) // MANY
    looks = (pieces + LOOK - 1) // LOOK
    pid = tl.program_id(0).to(tl.int64)
    part, x = pid % (PARTS_K + PARTS_V), pid // (PARTS_K + PARTS_V) % (looks + runs)
    local = pid // (PARTS_K + PARTS_V) // (looks + runs)
    unit = first + local
    segment = unit // units * segment_b + unit % units * segment_h
    start += segment * (row_blocks + 1)
    if x >= looks:
        run = (x - looks) * MANY + tl.arange(0, MANY)
        there = run < row_blocks
        from_ = tl.load(start + run, mask=there, other=0)
        each = tl.load(start + run + 1, mask=there, other=0) - from_
        there &= each <= most
        each = tl.where(there, each, 0)
        if part < PARTS_K:
            _sum_run(
                share_k, d_k, reader + from_, each, there, local * blocks, picks, unit, run, rows, part,
                K_BLOCK, D, SIZE_K, TILES,
            )  # fmt: skip
        else:
            _sum_run(
                share_v, d_v, reader + from_, each, there, local * blocks, picks, unit, run, rows, part - PARTS_K,
                K_BLOCK, E, SIZE_V, TILES,
            )  # fmt: skip
    else:
        # as transpose.piece_of
        lanes = tl.arange(0, LOOK)
        number = x + looks * lanes
        zero = tl.load(start).to(tl.int64)
        at = zero + (number + 1) * (most // 2) - 1
        exists = (number < pieces) & (at < tl.load(start + row_blocks))
        m = tl.load(key + at, mask=exists, other=0).to(tl.int64) - (base + segment * (row_blocks + 1))
        begin = tl.load(start + m, mask=exists, other=0).to(tl.int64)
        end = tl.load(start + m + 1, mask=exists, other=0).to(tl.int64)
        own = begin + (number - 2 * (begin - zero) // most) * most
        counts = tl.where(exists & (end - begin > most), tl.minimum(end - own, most), 0)
        for y in range(LOOK):
            count = tl.sum(tl.where(lanes == y, counts, 0), 0).to(tl.int32)
            if count > 0:
                first_reader = reader + tl.sum(tl.where(lanes == y, own, 0), 0)
                piece = local * pieces + x + looks * y
                if part < PARTS_K:
                    _sum_piece(
                        share_k, sum_k, first_reader, count, local * blocks, picks, piece, part,
                        K_BLOCK, D, SIZE_K, NUMBERS // SIZE_K, TILES,
                    )  # fmt: skip
                else:
                    _sum_piece(
                        share_v, sum_v, first_reader, count, local * blocks, picks, piece, part - PARTS_K,
                        K_BLOCK, E, SIZE_V, NUMBERS // SIZE_V, TILES,
                    )  # fmt: skip


@triton.jit
def _sum_run(
    share, grad, reader, count, there, list0, picks, unit, m, rows, part,
    K_BLOCK: tl.constexpr, X: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Every row block of the run takes its next readers, four at a time: most have no more."""
    at = part.to(tl.int32) * SIZE + tl.arange(0, SIZE)
    acc = tl.zeros([m.shape[0], SIZE], tl.float32)
    for x in range(0, tl.max(count), 4):
        for y in tl.static_range(4):
            own = x + y < count
            entry = tl.load(reader + x + y, mask=own, other=0)
            for tile in tl.static_range(TILES):
                line = ((list0 + entry // picks) * TILES + tile) * picks + entry % picks
                acc += _share(share, line, own, at, K_BLOCK * X, SIZE)
    there = there[:, None] & (at < K_BLOCK * X)[None, :]
    there &= m[:, None] * (K_BLOCK * X) + at < rows.to(tl.int64) * X
    grad += unit * rows * X
    tl.store(grad + m[:, None] * (K_BLOCK * X) + at, acc.to(grad.dtype.element_ty), mask=there)


@triton.jit
def _sum_piece(
    share, sums, reader, count, list0, picks, piece, part,
    K_BLOCK: tl.constexpr, X: tl.constexpr, SIZE: tl.constexpr, READERS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, READERS)
    at = part.to(tl.int32) * SIZE + tl.arange(0, SIZE)
    acc = tl.zeros([READERS, SIZE], tl.float32)
    for x in range(0, count, 2 * READERS):
        for y in tl.static_range(2):
            own = x + y * READERS + lanes < count
            entry = tl.load(reader + x + y * READERS + lanes, mask=own, other=0)
            for tile in tl.static_range(TILES):
                line = ((list0 + entry // picks) * TILES + tile) * picks + entry % picks
                acc += _share(share, line, own, at, K_BLOCK * X, SIZE)
    tl.store(sums + piece * (K_BLOCK * X) + at, tl.sum(acc, 0), mask=at < K_BLOCK * X)


@triton.jit
def _share(share, line, own, at, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    there = own[:, None]
    if WIDTH % SIZE:
        there &= (at < WIDTH)[None, :]
    return tl.load(share + line[:, None] * WIDTH + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _put(grad, total, unit, m, rows, at, K_BLOCK: tl.constexpr, X: tl.constexpr):
    """Part of the gradient of a row block; the last one may be short."""
    there = (at < K_BLOCK * X) & (m * (K_BLOCK * X) + at < rows.to(tl.int64) * X)
    tl.store(grad + (unit * rows * X + m * (K_BLOCK * X)) + at, total.to(grad.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["first", "units", "rows", "row_blocks", "pieces", "most", "segment_b", "segment_h"])
def sum_pieces(
    sum_k, sum_v, d_k, d_v, start, segment_b, segment_h, first, units, rows, row_blocks, pieces, most,
    K_BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SIZE_K: tl.constexpr, SIZE_V: tl.constexpr,
    READERS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of MANY row blocks, most of which have none; those that have stand side by side."""
    PARTS_K: tl.constexpr = (K_BLOCK * D + SIZE_K - 1) // SIZE_K
    PARTS_V: tl.constexpr = (K_BLOCK * E + SIZE_V - 1) // SIZE_V
    runs = (row_blocks + MANY - 1) // MANY
    pid = tl.program_id(0).to(tl.int64)
    part, run, local = pid % (PARTS_K + PARTS_V), pid // (PARTS_K + PARTS_V) % runs, pid // (PARTS_K + PARTS_V) // runs
    unit = first + local
    start += (unit // units * segment_b + unit % units * segment_h) * (row_blocks + 1)
    many = run + runs * tl.arange(0, MANY)
    there = many < row_blocks
    sizes = tl.load(start + many + 1, mask=there, other=0) - tl.load(start + many, mask=there, other=0)
    if tl.max(sizes) <= most:
        return
    zero = tl.load(start)
    for m in range(run, row_blocks, runs):
        begin = (tl.load(start + m) - zero).to(tl.int64)
        size = tl.load(start + m + 1) - zero - begin
        if size > most:
            piece = local * pieces + 2 * begin // most
            count = ((size + most - 1) // most).to(tl.int32)
            if part < PARTS_K:
                _join(sum_k, d_k, piece, count, unit, m, rows, part, K_BLOCK, D, SIZE_K, READERS)
            else:
                _join(sum_v, d_v, piece, count, unit, m, rows, part - PARTS_K, K_BLOCK, E, SIZE_V, READERS)


@triton.jit
def _join(
    sums, grad, piece, count, unit, m, rows, part,
    K_BLOCK: tl.constexpr, X: tl.constexpr, SIZE: tl.constexpr, READERS: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, READERS)
    at = part.to(tl.int32) * SIZE + tl.arange(0, SIZE)
    acc = tl.zeros([READERS, SIZE], tl.float32)
    for x in range(0, count, READERS):
        there = (x + lanes < count)[:, None] & (at < K_BLOCK * X)[None, :]
        acc += tl.load(sums + (piece + x + lanes)[:, None] * (K_BLOCK * X) + at, mask=there, other=0.0)
    _put(grad, tl.sum(acc, 0), unit, m, rows, at, K_BLOCK, X)


class Source(NamedTuple):
    """One source as the kernels take it; what is shared has strides of 0."""

    k: Tensor
    v: Tensor
    bias: Tensor
    end: Tensor
    group: Tensor
    index: Tensor
    count: Tensor
    strides: tuple[tuple[int, ...] | int, ...]  # of k and v, then over batch and heads of bias, end and group
    lists: tuple[int, int]  # from batch to batch and from unit to unit, in lists
    plan: Plan
    rows: int
    row_blocks: int
    picks: int  # entries of a list
    repeat: int  # units that share a key head
    small: bool
    causal: bool
    reach: bool
    biased: bool
    ended: bool
    grouped: bool
    d_bias: bool  # the gradient of the bias is asked for


# of dk, dv and the bias gradient: where they go, shares or pieces. What a kernel leaves alone may be any tensor of the
# dtype.
Three = tuple[Tensor, Tensor, Tensor]


def slices_of(sources: list[Source], units: int, lists: int) -> list[tuple[int, int]]:
    """Units whose shares together take no more memory than the keys and values, or are few; one at least."""
    rows = sum([s.picks * s.plan.k_block for s in sources if s.small])
    held = units * sum([s.rows for s in sources]) // max([s.repeat for s in sources])
    step = max(1, min(units, max(held // max(1, rows * lists), FULL // lists)))
    return [(begin, min(begin + step, units)) for begin in range(0, units, step)]


def shares_of(source: Source, lists: int, d_q: Tensor, delta: Tensor) -> Three:
    """Scratch memory for one share of dk, dv and the bias gradient an entry of a list."""
    if not source.small:
        return d_q, d_q, delta
    rows = lists * source.picks * source.plan.k_block
    dtype, device = d_q.dtype, d_q.device
    return (
        torch.empty(rows * source.k.shape[3], dtype=dtype, device=device),
        torch.empty(rows * source.v.shape[3], dtype=dtype, device=device),
        torch.empty(rows, dtype=torch.float32, device=device) if source.d_bias else delta,
    )


def pieces_of(source: Source, count: int, delta: Tensor) -> Three:
    """Scratch memory for dk, dv and the bias gradient of so many pieces."""
    if not count:
        return delta, delta, delta
    rows, device = count * source.plan.k_block, delta.device
    return (
        torch.empty(rows * source.k.shape[3], dtype=torch.float32, device=device),
        torch.empty(rows * source.v.shape[3], dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device) if source.d_bias else delta,
    )


def add_up(
    source: Source, shares: Three, grad: Three, readers: Readers, begin, stop, units, blocks, lists, delta: Tensor
) -> None:
    """The shares of units begin .. stop - 1, added up."""
    pieces = pieces_of(source, (stop - begin) * readers.pieces, delta)
    k_block = source.plan.k_block
    for k, v, d, e in _pairs(source):
        parts = _parts(k_block, d, e, NUMBERS // 4)
        many = NUMBERS // max(parts.d, parts.e)
        runs = -(-source.row_blocks // many)
        start(
            sum_shares, ((stop - begin) * (runs + -(-readers.pieces // LOOK)) * parts.programs,),
            shares[k], shares[v], grad[k], grad[v], pieces[k], pieces[v], readers.start, readers.reader, readers.key,
            *readers.strides, begin, units, blocks, source.picks, source.rows, source.row_blocks, readers.pieces,
            readers.most, readers.base, K_BLOCK=k_block, D=d, E=e, SIZE_K=parts.d, SIZE_V=parts.e, NUMBERS=NUMBERS,
            MANY=many, LOOK=LOOK, TILES=lists, num_warps=4,
        )  # fmt: skip
    join_pieces(source, pieces, grad, readers, begin, stop, units)


def join_pieces(source: Source, pieces: Three, grad: Three, readers: Readers, begin, stop, units) -> None:
    """Row blocks that were cut into pieces; without any there is nothing to launch."""
    if not readers.pieces:
        return
    k_block, many = source.plan.k_block, 8
    for k, v, d, e in _pairs(source):
        parts = _parts(k_block, d, e, 1024)
        start(
            sum_pieces, ((stop - begin) * -(-source.row_blocks // many) * parts.programs,),
            pieces[k], pieces[v], grad[k], grad[v], readers.start, *readers.strides, begin, units, source.rows,
            source.row_blocks, readers.pieces, readers.most, K_BLOCK=k_block, D=d, E=e, SIZE_K=parts.d, SIZE_V=parts.e,
            READERS=8, MANY=many, num_warps=4,
        )  # fmt: skip


def _pairs(source: Source) -> tuple[tuple[int, int, int, int], ...]:
    """What one launch adds up: two of dk, dv and the bias gradient, and their widths."""
    widths = source.k.shape[3], source.v.shape[3]
    # the bias gradient is a dk of width 1
    return ((0, 1, *widths), (2, 2, 1, 0)) if source.d_bias else ((0, 1, *widths),)


class _Parts(NamedTuple):
    d: int  # numbers of dk at a time
    e: int
    programs: int


@cache
def _parts(k_block: int, width: int, value_width: int, most: int) -> _Parts:
    d, e = (min(padded(k_block * x), most) for x in (width, value_width))
    return _Parts(d, e, -(-k_block * width // d) + -(-k_block * value_width // e))
