"""The lists of select.multipole, sharded and powers on the GPU, for select.static, which asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tree_lists(
    start: int, blocks: int, radius: Sequence[int], starts: Sequence[int], causal: bool, first: int, sink_groups: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """near and far index and count in one launch."""
    from farfield.kernels import plans
    from farfield.kernels.lists import build

    return plans.lists(build, start, blocks, tuple(radius), tuple(starts), causal, first, sink_groups, device=device)


def shard_lists(
    start: int, blocks: int, picks: int, first: int, heads: int, repeat: int, sparse: int, stride: int, step: int,
    offset: int, local: int, split: int, device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """index and count of select.sharded in one launch."""
    from farfield.kernels import plans
    from farfield.kernels.patterns import shards

    about = start, blocks, picks, first, heads, repeat, sparse, stride, step, offset, local, split
    return plans.lists(shards, *about, device=device)


def power_lists(
    start: int, blocks: int, picks: int, window: int, sinks: int, split: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """index and count of select.powers in one launch."""
    from farfield.kernels import plans
    from farfield.kernels.patterns import powers

    return plans.lists(powers, start, blocks, picks, window, sinks, split, device=device)


def recent_lists(
    tokens: int, rows: int, width: int, block: int, picks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """index and count of select.scored.recent in one launch."""
    from farfield.kernels import plans
    from farfield.kernels.patterns import recent

    if rows != tokens:
        # decoding: no two calls are alike
        return recent(tokens, rows, width, block, picks, device)
    return plans.lists(recent, tokens, rows, width, block, picks, device=device)


def recent_sizes(rows: int, width: int) -> tuple[int, int]:
    """Rows of a block of select.scored.recent, and entries of a list at most."""
    block = 128 if width >= 256 else 64
    return block, min(-(-rows // block), (width + 2 * block - 3) // block + 1)
