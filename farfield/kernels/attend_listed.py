"""attend for lists of a query's own, forward: a program stays with a block of rows and reads the queries that chose it.

Queries that stand side by side choose different blocks, so that a tile of them would read far more rows than each of
them asks for. Here the lists are transposed: a program holds one block of keys and values and goes through its readers,
the query heads of a unit side by side in tiles of up to 128. What a query got from each of its blocks goes to memory
as a softmax of its own, and a second launch joins them, always in one order. Long sequences go through in chunks of
queries, so that these parts never take more than PARTS bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import attend_listed_hopper
from farfield.kernels.attend import LN2, LOG2E, _dense, lists_of, padded, soften
from farfield.kernels.replay import start
from farfield.kernels.transpose import Readers, counted, counts, piece_of, placed, transpose
from farfield.ops.attend import Call

PARTS = 1 << 30  # bytes
MOST = 1024  # readers of a program, or twice the average if that is more; even
FEWEST = 256  # queries of a unit for which lists are transposed
WIDEST = 128
ROWS = 128  # queries of a tile, the heads of a unit counted apart
AT_ONCE = 8  # parts that the second launch asks for together


class Beside(NamedTuple):
    """Blocks end with rows that only some of their readers read.

    Args:
        words: [B, U, T, P] int32, for each entry; its reader reads rows own + x * each and further `each` of the block
            if bit x is set, x < 30.
        bias: [B, G, S] float32, of all rows; it is added to q . k, before the scale.
        own: rows of a block that all its readers read.
    """

    words: Tensor
    bias: Tensor
    own: int
    each: int


VARIES = ["base", "seg_b", "seg_u", "rep_b", "rep_u", "most", "pieces", "units", "total", "first", "rows", "row_blocks"]
VARIES += ["picks", "q_b", "q_h", "q_t", "k_b", "k_h", "k_r", "v_b", "v_h", "v_r"]


@triton.jit
def read_beside(word, row, OWN: tl.constexpr, EACH: tl.constexpr):
    """Whether readers of these words read these rows of their block."""
    bit = tl.minimum(tl.maximum(row - OWN, 0) // EACH, 31)
    return (row < OWN) | (((word >> bit) & 1) != 0)


@triton.jit(do_not_specialize=["base", "bounds", "row_blocks", "first", "entries"])
def hand_out(words, start, reader, key, handed, base, bounds, row_blocks, first, entries, SIZE: tl.constexpr):
    """The word of each reader, in their order: that of entry `first` and what `reader` says, of `entries` a list."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    # behind them are entries that are not used
    there = at < tl.load(start + bounds - 1)
    segment = (tl.load(key + at, mask=there, other=0) - base) // (row_blocks + 1)
    entry = segment.to(tl.int64) * entries + first + tl.load(reader + at, mask=there, other=0)
    tl.store(handed + at, tl.load(words + entry, mask=there, other=0), mask=there)


@triton.jit(do_not_specialize=VARIES)
def read_blocks(
    q, k, v, parts, masses, start, reader, key, words, bias,
    base, seg_b, seg_u, rep_b, rep_u, most, pieces, units, total, first, rows, row_blocks, picks,
    q_b, q_h, q_t, k_b, k_h, k_r, v_b, v_h, v_r, scale,
    STACK: tl.constexpr, STACK_TILE: tl.constexpr, REPEAT: tl.constexpr, K_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    D_UNIT: tl.constexpr, E_UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    OWN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """What each reader of a block, or of a piece of it, gets from it: parts and log2 masses, at the reader's place.

    With OWN, `words` at the reader's place and `bias` are those of `Beside`.
    """
    pid = tl.program_id(0).to(tl.int64)
    unit, x = pid // (row_blocks + pieces), pid % (row_blocks + pieces)
    b, u = unit // units, unit % units
    segment = b * seg_b + u * seg_u
    m, low, high, _ = piece_of(
        start + segment * (row_blocks + 1), key, base + segment * (row_blocks + 1), x, row_blocks, most
    )
    g = u if STACK > 1 else u // REPEAT
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    k += (b * k_b + g * k_h) * D_UNIT
    v += (b * v_b + g * v_h) * E_UNIT
    q += (b * q_b + u * STACK * q_h) * D_UNIT
    ROWS: tl.constexpr = BQ * STACK_TILE
    row = tl.arange(0, ROWS)
    head = row % STACK_TILE
    inside = tl.arange(0, BK)
    if K_BLOCK == BK:
        at = m * K_BLOCK + inside
        there = at < rows
        k_tile = tl.load(k + (at * k_r)[:, None] * D_UNIT + dims, mask=there[:, None] & (dims < D), other=0.0)
        v_tile = tl.load(v + (at * v_r)[:, None] * E_UNIT + values, mask=there[:, None] & (values < E), other=0.0)
    for tile in range(low, high, BQ):
        spot = tile + row // STACK_TILE
        asked = (spot < high) & (head < STACK)
        entry = tl.load(reader + spot, mask=asked, other=0).to(tl.int64)
        token = first + entry // picks
        q_at = q + (head * q_h + token * q_t)[:, None] * D_UNIT + dims
        q_tile = tl.load(q_at, mask=asked[:, None] & (dims < D), other=0.0)
        place = ((b * rep_b + u * rep_u) * total + spot) * STACK + head
        if K_BLOCK == BK:
            scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * (scale * LOG2E)
            seen = there[None, :]
            if CAUSAL:
                seen = seen & (at[None, :] <= token[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            peak = tl.max(scores, 1)
            weights = tl.exp2(scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
            mass = tl.sum(weights, 1)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        else:
            peak = tl.full([ROWS], float("-inf"), tl.float32)
            mass = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, E_TILE], tl.float32)
            if OWN:
                word = tl.load(words + spot, mask=asked, other=0)
            for begin in range(0, K_BLOCK, BK):
                at = m * K_BLOCK + begin + inside
                there = at < rows
                k_tile = tl.load(k + (at * k_r)[:, None] * D_UNIT + dims, mask=there[:, None] & (dims < D), other=0.0)
                v_tile = tl.load(
                    v + (at * v_r)[:, None] * E_UNIT + values, mask=there[:, None] & (values < E), other=0.0
                )
                scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")
                seen = there[None, :]
                if CAUSAL:
                    seen = seen & (at[None, :] <= token[:, None])
                if OWN:
                    scores += tl.load(bias + unit // (REPEAT if STACK == 1 else 1) * rows + at, mask=there, other=0.0)[
                        None, :
                    ]
                    seen = seen & read_beside(word[:, None], (begin + inside)[None, :], OWN, EACH)
                scores = tl.where(seen, scores * (scale * LOG2E), float("-inf"))
                peak, mass, acc = soften(peak, mass, acc, scores, v_tile)
        acc *= (1.0 / tl.where(mass > 0, mass, 1.0))[:, None]
        part_at = parts + place[:, None] * E + values
        tl.store(part_at, acc.to(parts.dtype.element_ty), mask=asked[:, None] & (values < E))
        # log2(0) = -inf is what a query that saw nothing of the block has
        tl.store(masses + place, peak + tl.log2(mass), mask=asked)


JOINING = ["units", "tokens", "first", "all_tokens", "picks", "list_b", "list_u", "rep_b", "rep_u", "entries", "total"]


@triton.jit(do_not_specialize=JOINING)
def join_parts(
    parts, masses, place, count, begun, begun_lse, out, lse,
    units, tokens, first, all_tokens, picks, list_b, list_u, rep_b, rep_u, entries, total,
    STACK: tl.constexpr, E: tl.constexpr, E_TILE: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The parts of each query as one softmax, with the one that is there. A row is a unit, a query and a head of it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < total
    r, query = row % STACK, row // STACK
    n, unit = query % tokens, query // tokens
    b, u = unit // units, unit % units
    values = tl.arange(0, E_TILE)
    line = b * list_b + u * list_u + n
    filled = tl.load(count + line, mask=there, other=0)
    place += line * picks
    from_ = (b * rep_b + u * rep_u) * entries
    to = (unit * STACK + r) * all_tokens + first + n
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, E_TILE], tl.float32)
    if begun is not None:
        peak = tl.load(begun_lse + to, mask=there, other=float("-inf")) * LOG2E
        mass = tl.where(peak == float("-inf"), 0.0, 1.0)
        acc = tl.load(begun + to[:, None] * E + values, mask=there[:, None] & (values < E), other=0.0).to(tl.float32)
    slot = tl.arange(0, AT_ONCE)[None, :]
    for begin in range(0, tl.max(filled, 0), AT_ONCE):
        used = begin + slot < filled[:, None]
        spot = from_[:, None] + tl.load(place[:, None] + begin + slot, mask=used, other=0)
        logs = tl.load(masses + spot * STACK + r[:, None], mask=used, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(logs, 1))
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(peak - floor)
        mass = mass * fade + tl.sum(tl.exp2(logs - floor[:, None]), 1)
        acc = acc * fade[:, None]
        # the loads of all of them are under way together
        for o in tl.static_range(AT_ONCE):
            one = begin + o < filled
            at = (from_ + tl.load(place + begin + o, mask=one, other=0)) * STACK + r
            part = tl.load(parts + at[:, None] * E + values, mask=one[:, None] & (values < E), other=0.0)
            weight = tl.exp2(tl.load(masses + at, mask=one, other=float("-inf")) - floor)
            acc += part.to(tl.float32) * weight[:, None]
        peak = higher
    acc *= (1.0 / tl.where(mass > 0, mass, 1.0))[:, None]
    tl.store(out + to[:, None] * E + values, acc.to(out.dtype.element_ty), mask=there[:, None] & (values < E))
    tl.store(lse + to, (peak + tl.log2(mass)) * LN2, mask=there)


def wants(call: Call) -> bool:
    """Whether a call has single queries with lists of blocks, enough of them to transpose these, and nothing else."""
    plan, width = call.plans[0], max(call.q.shape[3], call.v[0].shape[3])
    if len(call.plans) > 1 or plan.q_block != 1 or plan.reach >= 0 or call.q.dtype == torch.float32 or width > WIDEST:
        return False
    if plan.k_block < 16 or plan.k_block & (plan.k_block - 1):
        return False
    if any(x.dim() > 1 for x in (call.position, call.group, call.bias[0], call.end[0], call.row_group[0])):
        return False
    return bool(call.q.numel()) and call.q.shape[2] >= FEWEST and lists_of(call)[1] <= 64


def attend_listed(
    call: Call, begun: tuple[Tensor, Tensor] | None = None, beside: Beside | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T]; the contract is ops.attend's. `begun`: those of other rows, to be joined."""
    q, (k,), (v,), _, _, _, _, _, (index,), (count,), (plan,), scale = call
    batch, heads, tokens, width = q.shape
    kv_heads, rows, value_width = k.shape[1], k.shape[2], v.shape[3]
    units, stack = lists_of(call)
    out, lse = q.new_empty(batch, heads, tokens, value_width), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    picks, row_blocks = index.shape[3], -(-rows // plan.k_block)
    q, q_at = _dense(q)
    k, k_at = _dense(k)
    v, v_at = _dense(v)
    d_unit, e_unit = _unit(q, width, *q_at, *k_at), _unit(q, value_width, *v_at)
    d_tile, e_tile, stack_tile = padded(width), padded(value_width), padded(stack, 1)
    # with few readers at a time a block's tiles are not full
    chunk = min(tokens, _chunk(call, max(PARTS, 4 * q.nbytes) if beside else PARTS))
    parts = q.new_empty(batch * heads * chunk * picks, value_width)
    masses = lse.new_empty(batch * heads * chunk * picks)
    tile = max(1, ROWS // stack_tile)
    gathered = attend_listed_hopper.wants(call, units, stack)
    for first in range(0, tokens, chunk):
        many = min(chunk, tokens - first)
        listed, filled = index[:, :, first : first + many].contiguous(), count[:, :, first : first + many].contiguous()
        most = piece_size(many, picks, row_blocks)
        if counts(listed, row_blocks):
            found = counted(listed, filled, row_blocks, most)
        else:
            (found,) = transpose([listed], [filled], [row_blocks], [True], [most])
            found = placed(found, listed.shape, row_blocks)
        seg_b, seg_u = found.strides
        # units that share lists have parts of their own, one behind the other
        rep_b, rep_u = 0 if seg_b else 1 if seg_u else units, 0 if seg_u else 1
        words = None if beside is None else handed_out(beside.words, found, row_blocks, first)
        if gathered:
            attend_listed_hopper.read(call, found, parts, masses, units, stack, first, many, words, beside)
        else:
            start(
                read_blocks, (batch * units * (row_blocks + found.pieces),),
                q, k, v, parts, masses, found.start, found.reader, found.key, words, beside and beside.bias,
                found.base, seg_b, seg_u, rep_b, rep_u,
                found.most, found.pieces, units, listed.numel(), first, rows, row_blocks, picks,
                *[n // d_unit for n in (*q_at, *k_at)], *[n // e_unit for n in v_at], scale,
                stack, stack_tile, heads // kv_heads, plan.k_block, bool(plan.causal), width, value_width, d_tile,
                e_tile, d_unit, e_unit, BQ=tile, BK=min(plan.k_block, 64), OWN=beside.own if beside else 0,
                EACH=beside.each if beside else 1,
                num_warps=4 if max(d_tile, e_tile, plan.k_block) <= 64 else 8, num_stages=2,
            )  # fmt: skip
        # by measurement on an H200
        total, some = batch * heads * many, max(1, (1024 if stack > 1 and e_tile > 64 else 2048) // e_tile)
        start(
            join_parts, (-(-total // some),),
            parts, masses, found.place, filled, *(begun or (None, None)), out, lse, units, many, first, tokens, picks,
            seg_b * many, seg_u * many, rep_b, rep_u, listed.numel(), total, stack, value_width, e_tile, ROWS=some,
            AT_ONCE=min(AT_ONCE, padded(picks, 1)), num_warps=4,
        )  # fmt: skip
    return out, lse


def handed_out(words: Tensor, found: Readers, row_blocks: int, first: int) -> Tensor:
    """`Beside.words` of queries from `first` on, whose lists are `found`, in the order of the sort."""
    tokens, picks = words.shape[2:]
    assert found.key is not None
    handed, total = torch.empty_like(found.reader), found.reader.numel()
    start(
        hand_out, (-(-total // 1024),), words, found.start, found.reader, found.key, handed, found.base,
        found.start.numel(), row_blocks, first * picks, tokens * picks, 1024,
    )  # fmt: skip
    return handed


def at_once(call: Call) -> bool:
    """Whether a call that `wants` takes is launches alone: one chunk of queries, and no sort."""
    index = call.index[0]
    whole = index.shape[2] <= _chunk(call, PARTS)
    return whole and counts(index, -(-call.k[0].shape[2] // call.plans[0].k_block))


def _chunk(call: Call, most: int) -> int:
    """Queries whose parts take so many bytes."""
    q = call.q
    each = q.shape[0] * q.shape[1] * call.index[0].shape[3] * call.v[0].shape[3] * q.element_size()
    return max(FEWEST, most // max(1, each))


def piece_size(tokens: int, picks: int, row_blocks: int) -> int:
    """Readers that one program goes through; of a block that has more, several programs do."""
    return max(MOST, 2 * -(-2 * tokens * picks // (2 * max(row_blocks, 1))))


def _unit(x: Tensor, *sizes: int) -> int:
    """Elements loaded at once: what all of these are multiples of, 16 bytes at most."""
    unit = 16 // x.element_size()
    while any(n % unit for n in sizes):
        unit //= 2
    return unit
