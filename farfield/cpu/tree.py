"""The tree search in batched PyTorch: all query blocks take each step together."""

from __future__ import annotations

import torch
from torch import Tensor

from farfield.ops.tree import Search

NUMBERS = 1 << 23  # gathered keys of a slice of query blocks, in numbers


def search(q: Tensor, k: Tensor, plan: Search) -> tuple[Tensor, Tensor]:
    """index [B, H, N, P] and count [B, H, N]; the contract is ops.tree's."""
    batch, heads, _, width = q.shape
    tokens = k.shape[2]
    blocks = -(-tokens // plan.q_block)
    one = max(1, batch * heads * 2 * plan.followed * -(-plan.k_block // plan.k_stride) * width)
    step = max(1, NUMBERS // one)
    parts = [
        _lists(q, k, plan, torch.arange(n, min(n + step, blocks), device=q.device))
        for n in range(plan.start, blocks, step)
    ]
    index, count = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return index, count


def _lists(q: Tensor, k: Tensor, plan: Search, n: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of query blocks n."""
    batch, heads = q.shape[:2]
    tokens = k.shape[2]
    first = n * plan.q_block
    last = (first + plan.q_block).clamp(max=tokens) - 1
    window = ((first - plan.width + 1).clamp(min=0) // plan.k_block).clamp(min=plan.sinks)
    stop = last // plan.k_block + 1
    size = window - plan.sinks
    found = size.clamp(max=plan.nodes)

    chosen = _descend(q, k, plan, first, size)
    slot = torch.arange(plan.picks, device=q.device)
    behind = slot - (plan.sinks + found)[:, None]
    # past count as well: a block that is still open goes on there
    listed = torch.where(behind >= 0, window[:, None] + behind, slot).expand(batch, heads, -1, -1).clone()
    own = slice(plan.sinks, plan.sinks + plan.nodes)
    listed[..., own] = torch.where(behind[:, own] < 0, chosen, listed[..., own])
    count = stop.clamp(max=plan.sinks) + found + (stop - window).clamp(min=0)
    return listed.to(torch.int32), count.to(torch.int32).expand(batch, heads, -1).contiguous()


def _descend(q: Tensor, k: Tensor, plan: Search, first: Tensor, size: Tensor) -> Tensor:
    """Those of `size` blocks behind the sinks that the search ends at, ascending, [B, H, N, nodes]."""
    batch, heads, held, _ = q.shape
    kv_heads, tokens = k.shape[1:3]
    wide, device = torch.promote_types(q.dtype, torch.float32), q.device
    # queries of the block before, up to the first one of this: what comes later must not choose
    at = first[:, None] - torch.arange(0, plan.q_block, plan.q_stride, device=device)
    row = at - (tokens - held)
    asked = row >= 0
    asking = q[:, :, row.clamp(min=0)].to(wide)  # [B, H, N, R, D]
    sampled = torch.arange(0, plan.k_block, plan.k_stride, device=device)
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1)
    g = (torch.arange(heads, device=device) // (heads // kv_heads)).view(-1, 1, 1, 1)

    slot, nodes = torch.arange(plan.followed + 1, device=device), size.clamp(1, plan.followed)[:, None]
    cuts = plan.sinks + slot * size[:, None] // nodes
    start, length = cuts[:, :-1], cuts.diff(dim=1).masked_fill(slot[:-1] >= nodes, 0)
    start, length = (x.expand(batch, heads, -1, -1) for x in (start, length))
    steps = plan.steps(tokens)
    lowest = torch.finfo(wide).min
    for step in range(steps):
        half = length // 2
        start = torch.stack([start, start + half], -1).flatten(-2)
        length = torch.stack([half, length - half], -1).flatten(-2)
        block = start + (length // 2, 0, length - 1)[plan.place]
        rows = (block[..., None] * plan.k_block + sampled).clamp(0, tokens - 1)
        keys = k[b, g, rows].to(wide).flatten(3, 4)  # [B, H, N, 2 nodes x sampled, D]
        # a node that is there wins over one that is not, even if its keys are NaN
        scores = (asking @ keys.mT).nan_to_num(nan=lowest, posinf=float("inf"), neginf=lowest)
        scores = scores.masked_fill(~asked[..., None], float("-inf")).amax(3)
        scores = scores.unflatten(-1, (-1, len(sampled))).amax(-1).masked_fill(length == 0, float("-inf"))
        # nodes ascend, so that the earlier one of equals wins
        kept = plan.followed if step + 1 < steps else plan.nodes
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept].sort(-1).values
        start, length = start.gather(-1, best), length.gather(-1, best)
    unused = torch.iinfo(start.dtype).max
    return start.masked_fill(length == 0, unused).sort(-1).values[..., : plan.nodes]
