"""Which kernel takes a call of attend, and in which tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from farfield.kernels import attend_decode, attend_hopper, attend_hopper_runs, attend_listed, attend_own
from farfield.kernels.attend import Tiles, launch, lists_of, padded
from farfield.ops.attend import Call


def attend_forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T]; the contract is ops.attend's."""
    q, index, plans = call.q, call.index, call.plans
    batch, heads, tokens, width = q.shape
    value_width = call.v[0].shape[-1]
    if not (batch * heads * tokens * value_width and index[0].shape[2]):
        return q.new_empty(batch, heads, tokens, value_width), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if attend_decode.wants(call):
        return attend_decode.attend_decode(call)
    if attend_listed.wants(call):
        if attend_own.wants(call):
            if attend_own.at_once(call):
                return attend_own.joined(call)
            dense, others = attend_own.parts(call)
            # what the queries of a chunk got is joined before that of the next
            begun = attend_forward(dense)
            out, lse = attend_listed.attend_listed(others, begun)
            return out.view(begun[0].shape), lse.view(begun[1].shape)
        return attend_listed.attend_listed(call)
    if attend_hopper_runs.wants(call):
        return attend_hopper_runs.forward(call)
    if attend_hopper.wants(call):
        return attend_hopper.forward(call)
    out = q.new_empty(batch, heads, tokens, value_width)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    units, stack = lists_of(call)
    q_block = min(plans[0].q_block, padded(tokens))
    launch(call, units, q_block, _tiles(stack * q_block, max(padded(width), padded(value_width)), q.dtype), out, lse)
    return out, lse


def _tiles(size: int, wide: int, dtype: torch.dtype) -> Tiles:
    """By the queries of a list, the wider of the two widths, and the dtype."""
    tile = padded(size)
    if dtype == torch.float32:
        # IEEE products run on no tensor core, and their operands lie in registers: these tiles do not spill
        if wide > 128:
            return Tiles(16, 32, 8, 2)
        if wide > 64:
            return Tiles(32, 16, 8, 2) if tile >= 32 else Tiles(16, 16, 4, 2)
        return Tiles(64, 32, 8, 2) if tile >= 64 else Tiles(tile, 16, 4, 2)
    if wide > 128:
        return Tiles(min(tile, 32), 32, 4, 2)
    return Tiles(min(tile, 128), 64, 8 if tile >= 128 else 4, 2)
