"""attend for lists of a query's own that end with the block which the query stands in.

That block is read by all of its queries, so that it goes to the kernels for whole blocks: dense attention over what is
before each query, which begins the softmax that joins the parts of the other entries. Of these a query sees all rows,
and nothing depends on where it stands: the query heads of a key head are one long row of queries.

Backward (attend_listed_backward): with out and lse of the whole, each part has the gradients of its own rows without
knowing of the other. There the own block is tiles of rows, each with readers of its own: those from its first on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from farfield.kernels import attend_hopper, attend_listed, attend_listed_hopper, attend_own_hopper
from farfield.kernels.replay import start
from farfield.kernels.transpose import WHOLE, counted
from farfield.ops.attend import Call, Plan

DENSE = {64: 64, 128: 128}  # width -> queries and rows of a block of the dense part, by measurements on an H200
SIZE = 1024  # entries of a program
SMALLEST = 256  # block for which this is faster


@triton.jit(do_not_specialize=["picks", "tiles", "lines", "entries"])
def divide(
    index, count, own_index, own_count, past_index, past_count, picks, tiles, lines, entries,
    SPLIT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Lists of the blocks of SPLIT tiles that tiles of queries stand in, and the others' without their last entries."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    left = picks - 1
    line = at // left
    block = tl.load(index + line * picks + at % left, mask=at < entries, other=0)
    tl.store(past_index + at, block, mask=at < entries)
    many = tl.load(count + at, mask=at < lines, other=0)
    tl.store(past_count + at, tl.maximum(many - 1, 0), mask=at < lines)
    n = at // SPLIT
    tl.store(own_index + at, (n // SPLIT * SPLIT + at % SPLIT).to(tl.int32), mask=n < tiles)
    tl.store(own_count + at, (at % SPLIT + 1).to(tl.int32), mask=at < tiles)


def wants(call: Call) -> bool:
    """Whether `parts` of what attend_listed.wants are faster than the whole: large blocks on a Hopper GPU."""
    plan, q = call.plans[0], call.q
    if not plan.own or plan.k_block < SMALLEST or call.index[0].shape[3] < 2:
        return False
    if q.shape[3] not in DENSE or q.shape[2] > call.k[0].shape[2] or call.index[0].shape[:2] != q.shape[:2]:
        return False
    # what the backward takes
    if q.shape[1] // call.k[0].shape[1] not in (1, 2, 4, 8, 16, 32) or q.numel() >= 1 << 33:
        return False
    dense = _dense(call, *call.index, *call.count)
    return attend_hopper.wants(dense) and attend_listed_hopper.wants(call, q.shape[1], 1)


def parts(call: Call) -> tuple[Call, Call]:
    """The dense part, and the other entries, for the query heads of a key head as one row of queries."""
    q, index, count, plan = call.q, call.index[0], call.count[0], call.plans[0]
    batch, heads, tokens, width = q.shape
    kv_heads, picks = call.k[0].shape[1], index.shape[3]
    split, tiles = plan.k_block // DENSE[width], -(-tokens // DENSE[width])
    own, filled = index.new_empty(1, 1, tiles, split), index.new_empty(1, 1, tiles)
    line = batch, kv_heads, heads // kv_heads * tokens
    past, some = index.new_empty(*line, picks - 1), index.new_empty(line)
    entries = past.numel()
    start(
        divide, (-(-max(entries, tiles * split) // SIZE),),
        index.contiguous(), count.contiguous(), own, filled, past, some, picks, tiles, some.numel(), entries,
        SPLIT=split, SIZE=SIZE, num_warps=4,
    )  # fmt: skip
    plans = [Plan(1, plan.k_block, 0, -1, 0)]
    others = call._replace(q=q.reshape(*line, width), index=[past], count=[some], plans=plans)
    return _dense(call, own, filled), others


def at_once(call: Call) -> bool:
    """Whether `joined` takes what `wants` does: few parts, of one chunk of queries."""
    return call.index[0].shape[3] - 1 <= attend_own_hopper.MOST and attend_listed.at_once(_others(call))


def joined(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T]: what queries get from other blocks goes to memory, and nothing else."""
    q, k, v, count, block = call.q, call.k[0], call.v[0], call.count[0].contiguous(), call.plans[0].k_block
    others = _others(call)
    parts = q.new_empty(others.index[0].numel(), q.shape[3])
    masses = torch.empty(parts.shape[0], dtype=torch.float32, device=q.device)
    lists = call.index[0].contiguous().view(*others.q.shape[:3], -1)
    found = counted(lists, count.view(others.q.shape[:3]), -(-k.shape[2] // block), WHOLE, left=1)
    attend_listed_hopper.read(others, found, parts, masses, k.shape[1], 1, 0, others.q.shape[2])
    return attend_own_hopper.attend_own(q, k, v, parts, masses, found.place, count, block, call.scale)


def _others(call: Call) -> Call:
    """The entries of past blocks, for the query heads of a key head as one row of queries; `count` is not theirs."""
    q, plan, kv_heads = call.q, call.plans[0], call.k[0].shape[1]
    line = q.shape[0], kv_heads, q.shape[1] // kv_heads * q.shape[2]
    index = call.index[0].reshape(*line, -1)[..., :-1]
    return call._replace(q=q.reshape(*line, -1), index=[index], plans=[Plan(1, plan.k_block, 0, -1, 0)])


def _dense(call: Call, index: Tensor, count: Tensor) -> Call:
    block = DENSE[call.q.shape[3]]
    return call._replace(index=[index], count=[count], plans=[Plan(block, block, 1, -1, 0)])
