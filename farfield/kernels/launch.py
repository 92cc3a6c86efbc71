"""What the kernels need around them: tensors as pointers and strides, tile sizes, and who can take a call."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from farfield.kernels import attend_decode, attend_hopper
from farfield.kernels.attend import attend_forward as _attend_forward
from farfield.ops.attend import Call

WIDEST = 256  # key and value width
SOURCES = 2


def refusal(call: Call) -> str | None:
    """Why the Triton kernel cannot take a call of attend, None if it can."""
    q, k, v = call.q, call.k, call.v
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {q.dtype}"
    if max(q.shape[-1], v[0].shape[-1]) > WIDEST:
        return f"takes widths up to {WIDEST}, got D={q.shape[-1]} and E={v[0].shape[-1]}"
    if len(k) > SOURCES:
        return f"takes {SOURCES} sources, got {len(k)}"
    if len({x.shape[1] for x in k}) > 1:
        return "takes sources of one number of key heads"
    return None


def attend_forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T]; the contract is ops.attend's."""
    q, k, v, bias, end, row_group, position, group, index, count, plans, scale = call
    batch, heads, tokens, width = q.shape
    kv_heads, value_width = k[0].shape[1], v[0].shape[-1]
    blocks = index[0].shape[2]
    if batch * heads * tokens * value_width and attend_decode.wants(call):
        return attend_decode.attend_decode(call)
    if batch * heads * tokens * value_width and attend_hopper.wants(call):
        return attend_hopper.forward(call)
    out = q.new_empty(batch, heads, tokens, value_width)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if not out.numel() or not blocks:
        return out, lse
    # query heads of one key head share a tile unless their lists or biases differ
    shared = all(x.shape[1] == 1 for x in index) and all(x.dim() == 1 or x.shape[1] in (1, kv_heads) for x in bias)
    units = kv_heads if shared else heads
    stack, q_block = heads // units, min(plans[0].q_block, max(16, triton.next_power_of_2(tokens)))
    d_tile, e_tile = (max(16, triton.next_power_of_2(x)) for x in (width, value_width))
    wide = max(d_tile, e_tile)
    roomy = wide <= 128 and q.dtype != torch.float32
    tile = min(max(16, triton.next_power_of_2(stack * q_block)), 128 if roomy else 32)
    step = 64 if roomy else 32
    none = (0, 0)

    def per_row(x: Tensor, head_count: int) -> tuple[Tensor, tuple[int, ...]]:
        """A [1|B, 1|heads, ...] tensor read as if it were [B, head_count, ...]: strides of 0."""
        if x.dim() == 1:
            return x, none  # absent
        x = x if x.shape[1] in (1, head_count) else x.repeat_interleave(head_count // x.shape[1], 1)
        x = x.expand(batch, head_count, *x.shape[2:])
        x = x if x.stride(-1) == 1 else x.contiguous()
        return x, x.stride()

    def source(s: int):
        per_unit = [per_row(x, units) for x in (index[s], count[s])]
        rows = [per_row(bias[s].float(), units)]
        rows += [per_row(x, kv_heads) for x in (end[s], row_group[s])]
        tensors = (k[s], v[s], *(x for x, _ in rows), *(x for x, _ in per_unit))
        strides = (k[s].stride(), v[s].stride(), *(x for _, x in rows), *(x for _, x in per_unit))
        return tensors, strides

    pairs = [source(s) for s in (0, len(k) - 1)]
    asking = [per_row(x, heads) for x in (position, group)]
    names = ("CAUSAL", "REACH", "BIAS", "END", "GROUP")
    flags = {}
    for n, s in enumerate((0, len(k) - 1)):
        tensors = (x.dim() > 1 for x in (bias[s], end[s], row_group[s]))
        given = (plans[s].causal, plans[s].reach >= 0, *tensors)
        flags |= {f"{name}{n}": bool(x) for name, x in zip(names, given, strict=True)}
    first, last = plans[0], plans[-1]
    _attend_forward[(-(-stack * q_block // tile) * blocks * batch * units,)](
        q, out, lse, *(x for x, _ in asking), *pairs[0][0], *pairs[1][0],
        q.stride(), out.stride(), lse.stride(), *(x for _, x in asking), *pairs[0][1], *pairs[1][1],
        heads, tokens, k[0].shape[2], k[-1].shape[2], blocks, first.reach, first.sinks, last.reach, last.sinks, scale,
        STACK=stack, REPEAT=heads // kv_heads, Q_BLOCK=q_block, K_BLOCK0=first.k_block, K_BLOCK1=last.k_block,
        D=width, E=value_width, D_TILE=d_tile, E_TILE=e_tile, BQ=tile, BK0=step, BK1=step, SOURCES=len(k),
        POSITION=position.dim() > 1, GROUP=group.dim() > 1, **flags,
        PRECISION="ieee", num_warps=4 if tile <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return out, lse
