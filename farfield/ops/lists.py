"""The lists of select.multipole on the GPU, for select.static, whose op they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def tree_lists(
    n: Tensor, blocks: int, radius: Sequence[int], starts: Sequence[int], causal: bool, first: int, sink_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """near and far index and count in one launch."""
    from farfield.kernels.lists import build

    return build(n, blocks, radius, starts, causal, first, sink_groups)
