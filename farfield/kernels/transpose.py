"""Who reads each row block, on the GPU: the lists of all sources transposed by one stable sort.

Entry n * P + p of a segment (the lists of one batch and head, or of all that share them) names a row block. Sorted by
row block, ties in the order of the lists, the entries of row block m stand at `start[m] .. start[m + 1] - 1`. Row
blocks that many read are cut into pieces of `most` entries, numbered so that no prefix sum over the row blocks is
needed: the pieces of row block m take the numbers from (2 * start[m]) // most, and a row block of more than `most`
entries has no more pieces than there are numbers before its successor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.replay import start as launch

WHOLE = 1 << 30  # row blocks of fewer entries are never cut


class Readers(NamedTuple):
    """The transposed lists of one source.

    `start` [segments * (M + 1)] counts from the first entry of the sort; `reader` [entries], at those places, holds the
    entry n * P + p within its segment, or n alone, and `key` what was sorted: row block m of a segment has the number
    base + segment * (M + 1) + m.
    """

    start: Tensor
    reader: Tensor
    key: Tensor | None
    base: int
    strides: tuple[int, int]  # what batch and unit add to the number of a segment
    most: int  # entries of a piece
    pieces: int  # numbers of pieces in a segment
    place: Tensor | None = None  # where each used entry went, of `counted` and `placed`


@triton.jit(do_not_specialize=["base", "shift", "per_segment", "picks", "row_blocks", "total"])
def _keys(index, count, keys, base, shift, per_segment, picks, row_blocks, total, SIZE: tl.constexpr):
    """One key an entry: segment by segment the row blocks, then what is not used."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < total
    used = at % picks < tl.load(count + at // picks, mask=there, other=0)
    named = tl.load(index + at, mask=there & used, other=0).to(tl.int64)
    key = base + at // per_segment * (row_blocks + 1) + tl.where(used, named, row_blocks)
    # not keys[shift:], whose alignment would make another kernel
    tl.store(keys + shift + at, key.to(keys.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["base", "shift", "per_list", "per_segment", "total", "bounds", "entries", "steps"])
def _spans(
    keys, order, start, reader, base, shift, per_list, per_segment, total, bounds, entries, steps, SIZE: tl.constexpr
):
    """Where each row block's entries start, and what each entry of the sort is."""
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    # there are far fewer row blocks than entries
    if first < bounds:
        low = tl.zeros([SIZE], tl.int64)
        high = tl.zeros([SIZE], tl.int64) + entries
        for _step in range(steps):
            middle = (low + high) // 2
            open_ = low < high
            below = tl.load(keys + middle, mask=open_ & (at < bounds), other=0).to(tl.int64) < base + at
            low = tl.where(open_ & below, middle + 1, low)
            high = tl.where(open_ & (below == 0), middle, high)
        tl.store(start + at, low.to(tl.int32), mask=at < bounds)
    entry = tl.load(order + shift + at, mask=at < total, other=0) - shift
    tl.store(reader + shift + at, (entry % per_segment // per_list).to(tl.int32), mask=at < total)


def transpose(
    index: Sequence[Tensor], count: Sequence[Tensor], row_blocks: Sequence[int], by_entry: Sequence[bool],
    most: Sequence[int],
) -> list[Readers]:  # fmt: skip
    """The readers of every source's row blocks; linear in the number of entries, nothing read back by the host.

    Args:
        index: [1|B, 1|H, N, P] each.
        by_entry: `reader` holds entries n * P + p rather than query blocks n.
        most: entries of a piece; even.
    """
    ordered, order = keys_of(index, count, row_blocks).sort(stable=True)
    return readers_of(ordered, order, [x.shape for x in index], row_blocks, by_entry, most)


def keys_of(index: Sequence[Tensor], count: Sequence[Tensor], row_blocks: Sequence[int]) -> Tensor:
    """What is to be sorted: the row blocks of all entries, numbered through all segments and sources."""
    device = index[0].device
    shapes = [x.shape for x in index]
    numbers = [a * b * c * d for a, b, c, d in shapes]
    starts = [shape[0] * shape[1] * (m + 1) for shape, m in zip(shapes, row_blocks, strict=True)]
    entries = sum(numbers)
    keys = torch.empty(entries, dtype=torch.int32 if sum(starts) < 1 << 31 else torch.int64, device=device)
    size, base, shift = 1024, 0, 0
    for s, (_, _, blocks, picks) in enumerate(shapes):
        number = numbers[s]
        if number:
            launch(
                _keys, (-(-number // size),),
                index[s].contiguous(), count[s].contiguous(), keys, base, shift, blocks * picks, picks, row_blocks[s],
                number, SIZE=size,
            )  # fmt: skip
        base += starts[s]
        shift += number
    return keys


def readers_of(
    ordered: Tensor, order: Tensor, shapes: Sequence[Sequence[int]], row_blocks: Sequence[int],
    by_entry: Sequence[bool], most: Sequence[int],
) -> list[Readers]:  # fmt: skip
    """`transpose` of lists of these shapes, once their keys are sorted: `order` is where each key was."""
    device, entries, size = ordered.device, ordered.numel(), 1024
    # the entries of a source stay where they were: its keys are larger than those of the sources before it
    reader = torch.empty(entries, dtype=torch.int32, device=device)
    found, base, shift, steps = [], 0, 0, entries.bit_length()
    for s, (batches, heads, blocks, picks) in enumerate(shapes):
        number, bounds, limit = batches * heads * blocks * picks, batches * heads * (row_blocks[s] + 1), most[s]
        start = torch.empty(bounds, dtype=torch.int32, device=device)
        launch(
            _spans, (-(-max(bounds, number) // size),),
            ordered, order, start, reader, base, shift, 1 if by_entry[s] else max(picks, 1), max(blocks * picks, 1),
            number, bounds, entries, steps, SIZE=size,
        )  # fmt: skip
        # a list names a row block once: none has more entries than there are query blocks
        cut = blocks > limit
        found.append(
            Readers(
                start, reader, ordered, base, (heads if batches > 1 else 0, 1 if heads > 1 else 0),
                limit if cut else WHOLE, 2 * blocks * picks // limit + 1 if cut else 0,
            )
        )  # fmt: skip
        base += bounds
        shift += number
    return found


COUNTED = ["tokens", "picks", "row_blocks", "words"]


@triton.jit
def _entries(index, count, tokens, picks, TOKENS: tl.constexpr, PICKS: tl.constexpr, LEFT: tl.constexpr):
    """The segment, some of its queries, and the row blocks that they name, [TOKENS, PICKS], as far as `used`.

    The last LEFT entries of each list are left out.
    """
    segment = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    p = tl.program_id(2) * PICKS + tl.arange(0, PICKS)
    line = segment * tokens + n
    used = p[None, :] < tl.load(count + line, mask=n < tokens, other=0)[:, None] - LEFT
    m = tl.load(index + line[:, None] * (picks + LEFT) + p[None, :], mask=used, other=0)
    return segment, n, p, m, used


@triton.jit(do_not_specialize=["total"])
def clear(x, total, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(x + at, tl.zeros([SIZE], tl.int32), mask=at < total)


@triton.jit(do_not_specialize=COUNTED)
def _mark(
    index, count, masks, tokens, picks, row_blocks, words,
    TOKENS: tl.constexpr, PICKS: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """One bit an entry: query n of a list is bit n % 32 of word n // 32 of the row block."""
    segment, n, _, m, used = _entries(index, count, tokens, picks, TOKENS, PICKS, LEFT)
    word = (segment * words + n // 32)[:, None] * row_blocks + m
    bit = tl.zeros([TOKENS, PICKS], tl.int32) + (1 << n % 32)[:, None]
    tl.atomic_or(masks + word, bit, mask=used, sem="relaxed")


@triton.jit
def _ones(x):
    """Bits of 32 that are set."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["row_blocks", "words", "span", "spans"])
def _before(
    masks, before, totals, row_blocks, words, span, spans, DOWN: tl.constexpr, ACROSS: tl.constexpr
):  # fmt: skip
    """Readers of each row block in the words of a span before each, and in the span."""
    segment, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    m = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    carry = tl.zeros([ACROSS], tl.int32)
    for begin in range(part * span, tl.minimum(part * span + span, words), DOWN):
        w = begin + tl.arange(0, DOWN)
        at = (segment * words + w)[:, None] * row_blocks + m[None, :]
        there = (w < words)[:, None] & (m < row_blocks)[None, :]
        ones = _ones(tl.load(masks + at, mask=there, other=0))
        tl.store(before + at, tl.cumsum(ones, 0) - ones + carry[None, :], mask=there)
        carry += tl.sum(ones, 0)
    # the number behind the row blocks is that of what is not used: nothing
    to = totals + (segment * spans + part) * (row_blocks + 1) + m
    tl.store(to, tl.where(m < row_blocks, carry, 0), mask=m <= row_blocks)


@triton.jit(do_not_specialize=["row_blocks", "spans", "bounds", "apart"])
def _starts(totals, start, row_blocks, spans, bounds, apart, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """Where the readers of each row block start, and how many are in the spans before each, in place of its total.

    A program takes `bounds` numbers, whose readers are `apart` from those of the next program's.
    """
    carry, behind = tl.program_id(0) * apart, (tl.program_id(0) + 1) * bounds
    for begin in range(behind - bounds, behind, SIZE):
        at = begin + tl.arange(0, SIZE)
        from_ = totals + at // (row_blocks + 1) * (spans * (row_blocks + 1)) + at % (row_blocks + 1)
        many = tl.zeros([SIZE], tl.int32)
        for first in range(0, spans, PARTS):
            part = first + tl.arange(0, PARTS)
            there = (part < spans)[:, None] & (at < behind)[None, :]
            where = from_[None, :] + (part * (row_blocks + 1))[:, None]
            more = tl.load(where, mask=there, other=0)
            tl.store(where, tl.cumsum(more, 0) - more + many[None, :], mask=there)
            many += tl.sum(more, 0)
        tl.store(start + at, tl.cumsum(many, 0) - many + carry, mask=at < behind)
        carry += tl.sum(many, 0)


@triton.jit(do_not_specialize=[*COUNTED, "span", "spans"])
def _place(
    index, count, masks, before, totals, start, reader, key, place, tokens, picks, row_blocks, words, span, spans,
    TOKENS: tl.constexpr, PICKS: tl.constexpr, LEFT: tl.constexpr, BY_ENTRY: tl.constexpr,
):  # fmt: skip
    """Entries at their places."""
    segment, n, p, m, used = _entries(index, count, tokens, picks, TOKENS, PICKS, LEFT)
    word = (segment * words + n // 32)[:, None] * row_blocks + m
    earlier = tl.load(masks + word, mask=used, other=0) & ((1 << n % 32) - 1)[:, None]
    number = segment * (row_blocks + 1) + m
    spot = (segment * spans + n // 32 // span)[:, None] * (row_blocks + 1) + m
    to = tl.load(start + number, mask=used, other=0) + tl.load(totals + spot, mask=used, other=0)
    to += tl.load(before + word, mask=used, other=0) + _ones(earlier)
    if BY_ENTRY:
        entry = n[:, None] * picks + p[None, :]
        tl.store(reader + to, entry, mask=used)
        if place is not None:
            tl.store(place + segment * tokens * picks + entry, to, mask=used)
    else:
        tl.store(reader + to, tl.broadcast_to(n[:, None], [TOKENS, PICKS]), mask=used)
    if key is not None:
        tl.store(key + to, number.to(tl.int32), mask=used)


@triton.jit(do_not_specialize=["base", "per_segment", "row_blocks", "total"])
def _places(reader, key, place, base, per_segment, row_blocks, total, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < total
    number = tl.load(key + at, mask=there, other=0).to(tl.int64) - base
    entry = number // (row_blocks + 1) * per_segment + tl.load(reader + at, mask=there, other=0)
    tl.store(place + entry, at.to(tl.int32), mask=there)


def placed(found: Readers, shape: Sequence[int], row_blocks: int) -> Readers:
    """The readers of one source's lists of this shape, by entry, with `place`."""
    place = torch.empty_like(found.reader)
    if place.numel():
        launch(
            _places, (-(-place.numel() // 1024),), found.reader, found.key, place, found.base,
            shape[2] * shape[3], row_blocks, place.numel(), SIZE=1024,
        )  # fmt: skip
    return found._replace(place=place)


MASKS = 1 << 28  # bytes of masks; what would take more is sorted
PROGRAMS = 512  # that add up masks, about
SPAN = 128, 16  # words and row blocks of a tile of masks


def counts(index: Tensor, row_blocks: int) -> bool:
    """Whether `counted` has the memory for these lists."""
    batches, heads, tokens, _ = index.shape
    return batches * heads * -(-tokens // 32) * row_blocks * 4 <= MASKS


def counted(
    index: Tensor, count: Tensor, row_blocks: int, most: int, by_entry: bool = True, left: int = 0, apart: bool = False
) -> Readers:  # fmt: skip
    """`transpose` of one source's lists, without a sort; by entry with `place`.

    A list names a row block once, so that an entry's place follows from how many earlier lists name its row block: one
    bit a list, counted.

    Args:
        left: entries at the end of each list that are left out. The others are found without `key`.
        apart: what is not used of a segment lies behind it, as in the sort, and not behind the last one; without
            `place`. Segments are then looked at side by side.
    """
    batches, heads, tokens, picks = index.shape
    picks -= left
    index, count, device = index.contiguous(), count.contiguous(), index.device
    segments, words, bounds = batches * heads, -(-tokens // 32), batches * heads * (row_blocks + 1)
    masks = torch.empty(segments * words * row_blocks, dtype=torch.int32, device=device)
    launch(clear, (-(-masks.numel() // 4096),), masks, masks.numel(), SIZE=4096)
    # a query's own lists have the length that its mechanism gives them; others change with the layout, which must not
    # need another kernel
    wide = 1 << max(picks - 1, 0).bit_length() if by_entry and not apart else 16
    some, sizes, down, across = max(1, 1024 // wide), (tokens, picks, row_blocks, words), *SPAN
    tiles = row_blocks // across + 1
    # long ways along the queries are cut where there are few of them
    span = max(down, -(-words * segments * tiles // (PROGRAMS * down)) * down)
    spans = max(1, -(-words // span))
    before, totals = torch.empty_like(masks), torch.empty(bounds * spans, dtype=torch.int32, device=device)
    entries = segments * tokens * picks
    start, reader = totals.new_empty(bounds), totals.new_empty(entries)
    key = None if left else totals.new_empty(entries)
    place = torch.empty_like(reader) if by_entry and not apart else None
    grid = -(-tokens // some), segments, max(-(-picks // wide), 1)
    launch(_mark, grid, index, count, masks, *sizes, TOKENS=some, PICKS=wide, LEFT=left)
    # one more than there are row blocks: the number of what is not used
    # there may be more tiles than the second axis of a grid has places, 65,535
    launch(
        _before, (tiles, segments, spans), masks, before, totals, row_blocks, words, span, spans, DOWN=down,
        ACROSS=across,
    )  # fmt: skip
    lots = segments if apart else 1
    size, parts = (1024, 1) if spans == 1 else (512, 16)
    launch(
        _starts, (lots,), totals, start, row_blocks, spans, bounds // lots, entries // lots, SIZE=size, PARTS=parts,
        num_warps=8,
    )  # fmt: skip
    launch(
        _place, grid, index, count, masks, before, totals, start, reader, key, place, *sizes, span, spans, TOKENS=some,
        PICKS=wide, LEFT=left, BY_ENTRY=by_entry,
    )  # fmt: skip
    cut = tokens > most
    strides = heads if batches > 1 else 0, 1 if heads > 1 else 0
    pieces = 2 * tokens * picks // most + 1 if cut else 0
    return Readers(start, reader, key, 0, strides, most if cut else WHOLE, pieces, place)


@triton.jit
def piece_of(start, key, key0, x, row_blocks, most):
    """Row block, first and last entry, and number of piece of program x of a segment's row blocks and pieces.

    Numbers below `row_blocks` are those of uncut row blocks. `key0` is the key of the segment's row block 0. Nothing to
    do: first > last.
    """
    piece = x - row_blocks
    m = x
    if piece >= 0:
        # this entry of the sort belongs to the row block that the piece belongs to, if it belongs to any
        at = tl.load(start) + (piece + 1) * (most // 2) - 1
        end = tl.load(start + row_blocks)
        m = tl.load(key + at, mask=at < end, other=0).to(tl.int64) - key0
        m = tl.where(at < end, m, row_blocks)
    there = m < row_blocks
    first = tl.load(start + m, mask=there, other=0).to(tl.int64)
    last = tl.load(start + m + 1, mask=there, other=0).to(tl.int64)
    cut = last - first > most
    if piece >= 0:
        own = first + (piece - 2 * (first - tl.load(start)) // most) * most
        last = tl.where(cut & (own < last), tl.minimum(last, own + most), -1)
        first = tl.where(cut, own, 0)
    else:
        last = tl.where(cut, -1, last)
    return m, first, last, piece
