"""growth: the means of further blocks into what holds those of the blocks before, by GPU kernels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def refusal(k: Tensor, v: Tensor, block: int, rank: int, detail: int) -> str | None:
    """Why `grow` cannot take such tokens, None if it can."""
    if not k.is_cuda:
        return f"takes CUDA tensors, not {k.device.type}"
    if k.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {k.dtype}"
    if k.shape[3] not in (16, 32, 64, 128) or v.shape[3] != k.shape[3]:
        return f"takes D = E = 16, 32, 64 or 128, got {k.shape[3]} and {v.shape[3]}"
    if any(n & (n - 1) for n in (block, rank, detail)) or max(rank, detail) > 128:
        return f"takes blocks, ranks and sketches of powers of two, got {block}, {rank} and {detail}"
    if not k.shape[0] * k.shape[1]:
        return "takes at least one sequence"
    return None


def grow(
    k: Float[Tensor, "B G S D"],
    raw: Float[Tensor, "B G S1 D"],
    v: Float[Tensor, "B G S2 D"],
    firsts: tuple[int, int, int],
    into: tuple[Float[Tensor, "B G K D"], Float[Tensor, "B G R D"], Float[Tensor, "B G R D"]],
    waiting: Float[Tensor, "B G 2 L p D"],
    done: int,
    stop: int,
    *,
    block: int,
    detail: int,
    lead: int,
    sinks: int,
    blocks: int,
    most: int,
) -> Float[Tensor, "B G 2 L2 p D"]:
    """Write what blocks done .. stop - 1 add to sketches and summaries, all means; in place, without gradients.

    Args:
        k, raw, v: the keys as they are read, and keys and values before they are rotated.
        firsts: the number of the first token of each.
        into: sketches in float32, `detail` rows a group; summaries of keys and of values, p rows a group, behind `lead`
            others. Level by level, each with room for the groups of `blocks` blocks.
        waiting: of summaries the groups that wait for their other half, in float32, by level; after `done` blocks.
        sinks: so many tokens, the first ones, are in no mean.
        most: levels at most.

    Returns:
        What waits after `stop` blocks; of levels where nothing does, anything.
    """
    from farfield.kernels import growth

    trees = growth.Trees(*into, block, waiting.shape[4], detail, lead, sinks, blocks)
    return growth.grow(k, raw, v, firsts, trees, waiting, done, stop, most)
