"""attend for few queries: the lists of one tile are shared out over so many programs that the GPU is full.

A list is cut into steps, those of all sources one behind the other, and each split takes a run of steps. A split
leaves its own softmax, as float32 out and the log2 of its mass; a second launch joins them, always in one order. How
many splits there are follows from shapes alone, and which steps a split takes from the lists' counts, on the device: a
captured graph stays valid whatever the lists hold.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels.attend import LN2, Tiles, launch, lists_of, padded, refusal
from farfield.kernels.replay import start
from farfield.ops.attend import Call

QUERIES = 64  # of one unit, its stacked heads counted apart: more fill a tile of the forward kernel
MOST = 64  # splits
FEW = 1024  # rows of a list


@triton.jit(do_not_specialize=["splits"])
def merge_splits(parts, masses, out, lse, splits, E: tl.constexpr, E_TILE: tl.constexpr, SPLIT_TILE: tl.constexpr):
    """One query's splits joined: out and lse from their float32 outs and log2 masses."""
    row = tl.program_id(0).to(tl.int64)
    split, values = tl.arange(0, SPLIT_TILE), tl.arange(0, E_TILE)
    inside = split < splits
    at = row * splits + split
    masses = tl.load(masses + at, mask=inside, other=float("-inf"))
    part = tl.load(parts + at[:, None] * E + values, mask=inside[:, None] & (values < E), other=0.0)
    peak = tl.max(masses, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(masses - base)
    mass = tl.sum(weights, 0)
    acc = tl.sum(part * weights[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(out + row * E + values, acc.to(out.dtype.element_ty), mask=values < E)
    tl.store(lse + row, (base + tl.log2(mass)) * LN2)


def wants(call: Call) -> bool:
    """Whether a call has so few queries that this kernel is the one for it."""
    return refusal(call) is None and lists_of(call)[1] * call.q.shape[2] <= QUERIES


def attend_decode(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T]; the contract is ops.attend's."""
    batch, heads, tokens, _ = call.q.shape
    value_width = call.v[0].shape[-1]
    out = call.q.new_empty(batch, heads, tokens, value_width)
    lse = call.q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if not out.numel() or not call.index[0].shape[2]:
        return out, lse
    units, _ = lists_of(call)
    q_block = min(call.plans[0].q_block, padded(tokens, 1))
    tiles = _tiles(call, units, q_block)
    if tiles.splits == 1:
        launch(call, units, q_block, tiles, out, lse)
        return out, lse
    parts = lse.new_empty(batch * heads * tokens, tiles.splits, value_width)
    masses = lse.new_empty(batch * heads * tokens, tiles.splits)
    launch(call, units, q_block, tiles, out, lse, parts, masses)
    start(
        merge_splits, (batch * heads * tokens,),
        parts, masses, out, lse, tiles.splits, value_width, padded(value_width), padded(tiles.most, 1), num_warps=4,
    )  # fmt: skip
    return out, lse


def _tiles(call: Call, units: int, q_block: int) -> Tiles:
    q, index = call.q, call.index
    batch, heads, _, width = q.shape
    wide, exact = max(padded(width), padded(call.v[0].shape[-1])), q.dtype == torch.float32
    # products of float32 and wide values take registers
    most, step = (16, 16) if exact else (32 if wide > 128 else QUERIES, 32)
    size = heads // units * q_block
    tile = min(padded(size), most)
    room = _processors(q.device) // (-(-size // tile) * index[0].shape[2] * batch * units)
    longest = sum(min(x.shape[3] * p.k_block, y.shape[2]) for x, y, p in zip(index, call.k, call.plans, strict=True))
    if room < 2:
        # the GPU is full. Few rows: short steps, so that more programs fit that hide each other's waits.
        # Many: long steps, several in flight
        if longest <= FEW and not exact and wide <= 128:
            return Tiles(tile, step, 4, 2)
        return Tiles(tile, step if exact or wide > 128 else 64, 4, 3)
    most = min(room, MOST)
    return Tiles(tile, step, 4, 2, max(1, min(most, -(-longest // step))), most)


@cache
def _processors(device: torch.device) -> int:
    # without a GPU: those of an H200
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
