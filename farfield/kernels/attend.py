"""attend on the GPU, forward: one program a query tile, all its sources under one running softmax.

A program takes up to BQ of the stack * q_block queries that share a list (the query heads of one key head lie in one
tile) and walks the list's rows BK at a time. A list is read as count * k_block consecutive rows, so that one tile may
hold a part of a large block, one block, or many small ones: gathering single rows and reading blocks is one loop.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# what varies with the length or the step must not make another kernel; the other strides are multiples of the width
VARIES = ["heads", "tokens", "rows0", "rows1", "blocks", "reach0", "sinks0", "reach1", "sinks1"]
VARIES += [f"{name}_strides" for name in ("lse", "position", "group")]
VARIES += [f"{name}{source}_strides" for name in ("bias", "end", "group", "index", "count") for source in (0, 1)]


@triton.jit(do_not_specialize=VARIES)
def attend_forward(
    q, out, lse, position, group,
    k0, v0, bias0, end0, group0, index0, count0,
    k1, v1, bias1, end1, group1, index1, count1,
    q_strides, out_strides, lse_strides, position_strides, group_strides,
    k0_strides, v0_strides, bias0_strides, end0_strides, group0_strides, index0_strides, count0_strides,
    k1_strides, v1_strides, bias1_strides, end1_strides, group1_strides, index1_strides, count1_strides,
    heads, tokens, rows0, rows1, blocks, reach0, sinks0, reach1, sinks1, scale,
    STACK: tl.constexpr, REPEAT: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK0: tl.constexpr, K_BLOCK1: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_TILE: tl.constexpr, E_TILE: tl.constexpr,
    BQ: tl.constexpr, BK0: tl.constexpr, BK1: tl.constexpr, SOURCES: tl.constexpr,
    POSITION: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL0: tl.constexpr, REACH0: tl.constexpr, BIAS0: tl.constexpr, END0: tl.constexpr, GROUP0: tl.constexpr,
    CAUSAL1: tl.constexpr, REACH1: tl.constexpr, BIAS1: tl.constexpr, END1: tl.constexpr, GROUP1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (STACK * Q_BLOCK + BQ - 1) // BQ
    # int64: token * stride passes 2**31 at long context
    pid = tl.program_id(0).to(tl.int64)
    tile, n, unit = pid % TILES, pid // TILES % blocks, pid // TILES // blocks
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

    peak = tl.full([BQ], float("-inf"), tl.float32)
    mass = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, E_TILE], tl.float32)
    g = u if STACK > 1 else u // REPEAT
    peak, mass, acc = _read(
        peak, mass, acc, q_tile, at, mine, scale, b, u, g, n, rows0, reach0, sinks0, dims, values,
        k0, v0, bias0, end0, group0, index0, count0,
        k0_strides, v0_strides, bias0_strides, end0_strides, group0_strides, index0_strides, count0_strides,
        D, E, K_BLOCK0, BK0, CAUSAL0, REACH0, BIAS0, END0, GROUP0, PRECISION,
    )  # fmt: skip
    if SOURCES > 1:
        peak, mass, acc = _read(
            peak, mass, acc, q_tile, at, mine, scale, b, u, g, n, rows1, reach1, sinks1, dims, values,
            k1, v1, bias1, end1, group1, index1, count1,
            k1_strides, v1_strides, bias1_strides, end1_strides, group1_strides, index1_strides, count1_strides,
            D, E, K_BLOCK1, BK1, CAUSAL1, REACH1, BIAS1, END1, GROUP1, PRECISION,
        )  # fmt: skip

    acc /= tl.where(mass > 0, mass, 1.0)[:, None]
    out_at = out + b * out_strides[0] + h[:, None] * out_strides[1] + i[:, None] * out_strides[2] + values
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=asked[:, None] & (values < E))
    # log2(0) = -inf is what a query that read nothing has
    tl.store(lse + b * lse_strides[0] + h * lse_strides[1] + i, (peak + tl.log2(mass)) * LN2, mask=asked)


@triton.jit
def _read(
    peak, mass, acc, q_tile, at, mine, scale, b, u, g, n, rows, reach, sinks, dims, values,
    k, v, bias, end, group, index, count,
    k_strides, v_strides, bias_strides, end_strides, group_strides, index_strides, count_strides,
    D: tl.constexpr, E: tl.constexpr, K_BLOCK: tl.constexpr, BK: tl.constexpr,
    CAUSAL: tl.constexpr, REACH: tl.constexpr, BIAS: tl.constexpr, END: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax over the rows of one source that block n of unit (b, u) lists."""
    k += b * k_strides[0] + g * k_strides[1]
    v += b * v_strides[0] + g * v_strides[1]
    index += b * index_strides[0] + u * index_strides[1] + n * index_strides[2]
    listed = tl.load(count + b * count_strides[0] + u * count_strides[1] + n * count_strides[2]) * K_BLOCK
    for start in range(0, listed, BK):
        slot = start + tl.arange(0, BK)
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
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * (scale * LOG2E)
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
        acc = acc * fade[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        peak = higher
    return peak, mass, acc
