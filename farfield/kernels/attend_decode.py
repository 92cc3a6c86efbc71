"""attend for few queries: the lists of one tile are shared out over so many programs that the GPU is full.

A list is cut into steps of BK rows, those of all sources one behind the other, and each split takes a run of steps. A
split leaves its own softmax, as float32 out and the log2 of its mass; a second launch joins them, always in one order.
How many splits there are follows from shapes alone, and which steps a split takes from the lists' counts, on the
device: a captured graph stays valid whatever the lists hold.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.ops.attend import Call

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WIDEST = 256  # key and value width
SOURCES = 2
QUERIES = 64  # of one unit, its stacked heads counted apart: more fill a tile of the forward kernel
MOST = 64  # splits


# what varies with the length or the step must not make another kernel; the other strides are multiples of the width
VARIES = ["heads", "tokens", "rows0", "rows1", "blocks", "reach0", "sinks0", "reach1", "sinks1"]
VARIES += [f"{name}_strides" for name in ("lse", "position", "group")]
VARIES += [f"{name}{source}_strides" for name in ("bias", "end", "group", "index", "count") for source in (0, 1)]


@triton.jit(do_not_specialize=VARIES)
def attend_split(
    q, out, lse, parts, masses, position, group,
    k0, v0, bias0, end0, group0, index0, count0,
    k1, v1, bias1, end1, group1, index1, count1,
    q_strides, out_strides, lse_strides, position_strides, group_strides,
    k0_strides, v0_strides, bias0_strides, end0_strides, group0_strides, index0_strides, count0_strides,
    k1_strides, v1_strides, bias1_strides, end1_strides, group1_strides, index1_strides, count1_strides,
    heads, tokens, rows0, rows1, blocks, reach0, sinks0, reach1, sinks1, scale,
    STACK: tl.constexpr, REPEAT: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK0: tl.constexpr, K_BLOCK1: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, SOURCES: tl.constexpr,
    POSITION: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL0: tl.constexpr, REACH0: tl.constexpr, BIAS0: tl.constexpr, END0: tl.constexpr, GROUP0: tl.constexpr,
    CAUSAL1: tl.constexpr, REACH1: tl.constexpr, BIAS1: tl.constexpr, END1: tl.constexpr, GROUP1: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (STACK * Q_BLOCK + BQ - 1) // BQ
    # int64: token * stride passes 2**31 at long context
    pid = tl.program_id(0).to(tl.int64)
    split, tile = pid % SPLITS, pid // SPLITS % TILES
    n, unit = pid // SPLITS // TILES % blocks, pid // SPLITS // TILES // blocks
    units = heads // STACK
    b, u = unit // units, unit % units

    # row of the tile -> query head of the unit and token of the block
    row = tile * BQ + tl.arange(0, BQ)
    h = u * STACK + row // Q_BLOCK
    i = n * Q_BLOCK + row % Q_BLOCK
    asked = (row < STACK * Q_BLOCK) & (i < tokens)
    dims, values = tl.arange(0, D_TILE), tl.arange(0, E_TILE)
    # [BQ, D]
    q_at = q + b * q_strides[0] + h[:, None] * q_strides[1] + i[:, None] * q_strides[2] + dims * q_strides[3]
    q_tile = tl.load(q_at, mask=asked[:, None] & (dims < D), other=0.0)
    at = i
    if POSITION:
        at = tl.load(position + b * position_strides[0] + h * position_strides[1] + i, mask=asked, other=0).to(tl.int64)
    mine = tl.zeros([BQ], tl.int64)
    if GROUP:
        mine = tl.load(group + b * group_strides[0] + h * group_strides[1] + i, mask=asked, other=0).to(tl.int64)

    # this split's run of steps, through the first source and on through the second
    listed0 = tl.load(count0 + b * count0_strides[0] + u * count0_strides[1] + n * count0_strides[2]) * K_BLOCK0
    steps0 = (listed0 + BK - 1) // BK
    listed1 = 0
    if SOURCES > 1:
        listed1 = tl.load(count1 + b * count1_strides[0] + u * count1_strides[1] + n * count1_strides[2]) * K_BLOCK1
    steps = steps0 + (listed1 + BK - 1) // BK
    share = (steps + SPLITS - 1) // SPLITS
    first = split.to(tl.int32) * share
    last = tl.minimum(first + share, steps)

    peak = tl.full([BQ], float("-inf"), tl.float32)
    mass = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, E_TILE], tl.float32)
    g = u if STACK > 1 else u // REPEAT
    peak, mass, acc = _read(
        peak, mass, acc, q_tile, at, mine, scale, b, u, g, n, first, tl.minimum(last, steps0), listed0,
        rows0, reach0, sinks0, dims, values, k0, v0, bias0, end0, group0, index0,
        k0_strides, v0_strides, bias0_strides, end0_strides, group0_strides, index0_strides,
        D, E, K_BLOCK0, BK, CAUSAL0, REACH0, BIAS0, END0, GROUP0, STAGES,
    )  # fmt: skip
    if SOURCES > 1:
        peak, mass, acc = _read(
            peak, mass, acc, q_tile, at, mine, scale, b, u, g, n, tl.maximum(first, steps0) - steps0, last - steps0,
            listed1, rows1, reach1, sinks1, dims, values, k1, v1, bias1, end1, group1, index1,
            k1_strides, v1_strides, bias1_strides, end1_strides, group1_strides, index1_strides,
            D, E, K_BLOCK1, BK, CAUSAL1, REACH1, BIAS1, END1, GROUP1, STAGES,
        )  # fmt: skip

    acc /= tl.where(mass > 0, mass, 1.0)[:, None]
    # log2(0) = -inf is what a query that read nothing has
    total = peak + tl.log2(mass)
    if SPLITS == 1:
        out_at = out + b * out_strides[0] + h[:, None] * out_strides[1] + i[:, None] * out_strides[2] + values
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=asked[:, None] & (values < E))
        tl.store(lse + b * lse_strides[0] + h * lse_strides[1] + i, total * LN2, mask=asked)
    else:
        place = ((b * heads + h) * tokens + i) * SPLITS + split
        tl.store(parts + place[:, None] * E + values, acc, mask=asked[:, None] & (values < E))
        tl.store(masses + place, total, mask=asked)


@triton.jit
def _read(
    peak, mass, acc, q_tile, at, mine, scale, b, u, g, n, first, last, listed, rows, reach, sinks, dims, values,
    k, v, bias, end, group, index,
    k_strides, v_strides, bias_strides, end_strides, group_strides, index_strides,
    D: tl.constexpr, E: tl.constexpr, K_BLOCK: tl.constexpr, BK: tl.constexpr,
    CAUSAL: tl.constexpr, REACH: tl.constexpr, BIAS: tl.constexpr, END: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax over steps first .. last - 1 of the `listed` rows of one source."""
    k += b * k_strides[0] + g * k_strides[1]
    v += b * v_strides[0] + g * v_strides[1]
    index += b * index_strides[0] + u * index_strides[1] + n * index_strides[2]
    for step in tl.range(first, last, num_stages=STAGES):
        slot = step * BK + tl.arange(0, BK)
        row = tl.load(index + slot // K_BLOCK, mask=slot < listed, other=0).to(tl.int64) * K_BLOCK + slot % K_BLOCK
        # Triton 3.6 concludes that every row is a multiple of K_BLOCK, and shares comparisons between rows by it
        row = tl.multiple_of(row, 1)
        there = (slot < listed) & (row < rows)
        # [BK, D]
        k_at = k + row[:, None] * k_strides[2] + dims * k_strides[3]
        k_tile = tl.load(k_at, mask=there[:, None] & (dims < D), other=0.0)
        v_at = v + row[:, None] * v_strides[2] + values * v_strides[3]
        v_tile = tl.load(v_at, mask=there[:, None] & (values < E), other=0.0)
        # [BQ, BK], in units of log 2
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * (scale * LOG2E)
        if BIAS:
            more = tl.load(bias + b * bias_strides[0] + u * bias_strides[1] + row, mask=there, other=0.0)
            scores += (more * LOG2E)[None, :]
        seen = there[None, :]
        if CAUSAL or REACH:
            ends = row
            if END:
                ends = tl.load(end + b * end_strides[0] + g * end_strides[1] + row, mask=there, other=0).to(tl.int64)
            if CAUSAL:
                seen = seen & (ends[None, :] <= at[:, None])
            if REACH:
                seen = seen & ((tl.abs(at[:, None] - ends[None, :]) < reach) | (row < sinks)[None, :])
        if GROUP:
            theirs = tl.load(group + b * group_strides[0] + g * group_strides[1] + row, mask=there, other=0)
            seen = seen & (theirs.to(tl.int64)[None, :] == mine[:, None])
        scores = tl.where(seen, scores, float("-inf"))

        higher = tl.maximum(peak, tl.max(scores, 1))
        # a query that has read nothing keeps peak = -inf, and -inf - -inf is nan
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        mass = mass * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        peak = higher
    return peak, mass, acc


@triton.jit(do_not_specialize=["heads", "tokens"])
def merge_splits(
    parts, masses, out, lse, out_strides, lse_strides, heads, tokens,
    E: tl.constexpr, E_TILE: tl.constexpr, SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr,
):  # fmt: skip
    """One query's splits joined: out and lse from their float32 outs and log2 masses."""
    row = tl.program_id(0).to(tl.int64)
    b, h, i = row // tokens // heads, row // tokens % heads, row % tokens
    splits, values = tl.arange(0, SPLIT_TILE), tl.arange(0, E_TILE)
    inside = splits < SPLITS
    at = row * SPLITS + splits
    masses = tl.load(masses + at, mask=inside, other=float("-inf"))
    part = tl.load(parts + at[:, None] * E + values, mask=inside[:, None] & (values < E), other=0.0)
    peak = tl.max(masses, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(masses - base)
    mass = tl.sum(weights, 0)
    acc = tl.sum(part * weights[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    out_at = out + b * out_strides[0] + h * out_strides[1] + i * out_strides[2] + values
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=values < E)
    tl.store(lse + b * lse_strides[0] + h * lse_strides[1] + i, (base + tl.log2(mass)) * LN2)


def wants(call: Call) -> bool:
    """Whether a call has so few queries that this kernel is the one for it."""
    q, k, v = call.q, call.k, call.v
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or len(k) > SOURCES:
        return False
    if max(q.shape[-1], v[0].shape[-1]) > WIDEST or len({x.shape[1] for x in k}) > 1:
        return False
    return _units(call)[1] * q.shape[2] <= QUERIES


def attend_decode(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T]; the contract is ops.attend's."""
    q, k, v, bias, end, row_group, position, group, index, count, plans, scale = call
    batch, heads, tokens, width = q.shape
    kv_heads, value_width = k[0].shape[1], v[0].shape[-1]
    out = q.new_empty(batch, heads, tokens, value_width)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    blocks = index[0].shape[2]
    if not out.numel() or not blocks:
        return out, lse
    units, stack = _units(call)
    q_block = min(plans[0].q_block, triton.next_power_of_2(tokens))
    d_tile, e_tile = (max(16, triton.next_power_of_2(x)) for x in (width, value_width))
    # products of float32 and wide values take registers
    most = 16 if q.dtype == torch.float32 else 32 if max(d_tile, e_tile) > 128 else QUERIES
    tile = min(max(16, triton.next_power_of_2(stack * q_block)), most)
    programs = -(-stack * q_block // tile) * blocks * batch * units
    longest = sum(min(x.shape[-1] * p.k_block, y.shape[2]) for x, y, p in zip(index, k, plans, strict=True))
    splits, step, warps, stages = _tile(call, programs, longest, max(d_tile, e_tile))
    parts = masses = lse
    if splits > 1:
        parts = lse.new_empty(batch * heads * tokens, splits, value_width)
        masses = lse.new_empty(batch * heads * tokens, splits)

    def per_row(x: Tensor, head_count: int) -> tuple[Tensor, tuple[int, ...]]:
        """A [1|B, 1|heads, ...] tensor read as if it were [B, head_count, ...]: strides of 0."""
        if x.dim() == 1:
            return x, (0, 0)  # absent
        x = x if x.shape[1] in (1, head_count) else x.repeat_interleave(head_count // x.shape[1], 1)
        x = x.expand(batch, head_count, *x.shape[2:])
        x = x if x.stride(-1) == 1 else x.contiguous()
        return x, x.stride()

    def source(s: int):
        # lists of one entry may have any stride behind it
        rows = [per_row(bias[s].float(), units), *(per_row(x, kv_heads) for x in (end[s], row_group[s]))]
        lists = [per_row(x, units) for x in (index[s], count[s])]
        tensors = (k[s], v[s], *(x for x, _ in rows), *(x for x, _ in lists))
        strides = (k[s].stride(), v[s].stride(), *(x for _, x in rows), *(x for _, x in lists))
        return tensors, strides

    ends = (0, len(k) - 1)
    pairs = [source(s) for s in ends]
    asking = [per_row(x, heads) for x in (position, group)]
    names = ("CAUSAL", "REACH", "BIAS", "END", "GROUP")
    flags = {}
    for n, s in enumerate(ends):
        tensors = (x.dim() > 1 for x in (bias[s], end[s], row_group[s]))
        given = (plans[s].causal, plans[s].reach >= 0, *tensors)
        flags |= {f"{name}{n}": bool(x) for name, x in zip(names, given, strict=True)}
    head, tail = plans[0], plans[-1]
    attend_split[(programs * splits,)](
        q, out, lse, parts, masses, *(x for x, _ in asking), *pairs[0][0], *pairs[1][0],
        q.stride(), out.stride(), lse.stride(), *(x for _, x in asking), *pairs[0][1], *pairs[1][1],
        heads, tokens, k[0].shape[2], k[-1].shape[2], blocks, head.reach, head.sinks, tail.reach, tail.sinks, scale,
        STACK=stack, REPEAT=heads // kv_heads, Q_BLOCK=q_block, K_BLOCK0=head.k_block, K_BLOCK1=tail.k_block,
        D=width, E=value_width, D_TILE=d_tile, E_TILE=e_tile, BQ=tile, BK=step, SPLITS=splits, SOURCES=len(k),
        POSITION=position.dim() > 1, GROUP=group.dim() > 1, **flags, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        merge_splits[(batch * heads * tokens,)](
            parts, masses, out, lse, out.stride(), lse.stride(), heads, tokens,
            E=value_width, E_TILE=e_tile, SPLITS=splits, SPLIT_TILE=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return out, lse


def _units(call: Call) -> tuple[int, int]:
    """Lists of one query block and batch element, and the query heads that share one."""
    heads, kv_heads = call.q.shape[1], call.k[0].shape[1]
    shared = all(x.shape[1] == 1 for x in call.index)
    shared = shared and all(x.dim() == 1 or x.shape[1] in (1, kv_heads) for x in call.bias)
    units = kv_heads if shared else heads
    return units, heads // units


def _tile(call: Call, programs: int, longest: int, wide: int) -> tuple[int, int, int, int]:
    """Splits, rows of a step, warps and stages."""
    step = 16 if call.q.dtype == torch.float32 else 32
    processors = torch.cuda.get_device_properties(call.q.device).multi_processor_count if call.q.is_cuda else 132
    room = processors // programs
    if room < 2:
        # the GPU is full: long steps, several in flight
        return 1, step if step == 16 or wide > 128 else 64, 4, 3
    return max(1, min(room, -(-longest // step), MOST)), step, 4, 2
