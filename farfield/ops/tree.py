"""tree: for each query block, the key blocks that a hierarchical search finds, between sinks and window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.library import custom_op

from farfield.ops import precision
from farfield.ops.eager import eager

PLACES = ("centre", "first", "last")


class Search(NamedTuple):
    """What is searched for, and where: integers only, so that a custom op can carry it.

    Args:
        start: the first query block that gets a list.
        nodes: key blocks that a list keeps of those between sinks and window.
        beam: so many times as many nodes are followed down the tree.
        sinks: first key blocks, which every list names.
        width: the newest tokens of a block's first query that are in the window, itself included.
        q_block, k_block: tokens of a query block and of a key block.
        q_stride, k_stride: every so many queries and keys of a block are looked at.
        place: which block of a node stands for it, a number of PLACES.
    """

    start: int
    nodes: int
    beam: int
    sinks: int
    width: int
    q_block: int
    k_block: int
    q_stride: int
    k_stride: int
    place: int

    @property
    def picks(self) -> int:
        """Entries of a list, at most."""
        return self.sinks + self.nodes + (self.q_block + self.width - 2) // self.k_block + 2

    @property
    def followed(self) -> int:
        return self.nodes * self.beam

    def steps(self, tokens: int) -> int:
        """Halvings until the nodes of every list are single blocks and have scores."""
        first = max((tokens - 1) // self.q_block, 0) * self.q_block
        between = max(first - self.width + 1, 0) // self.k_block - self.sinks
        return max((-(-between // self.followed) - 1).bit_length(), 1) if between > self.nodes else 0


def search(
    q: Float[Tensor, "B H R D"], k: Float[Tensor, "B G T D"], plan: Search
) -> tuple[Int[Tensor, "B H N P"], Int[Tensor, "B H N"]]:
    """index and count, int32, of query blocks `plan.start` .. ceil(T / q_block) - 1; the contract is select.tree's.

    q holds the last R of the T queries. A list ends with its window, which goes on past count: where more tokens of the
    last query block follow, count alone grows.
    """
    if eager(q, k):
        return _search(q, k, plan)
    return _tree(q, k, list(plan))


def _search(q: Tensor, k: Tensor, plan: Search) -> tuple[Tensor, Tensor]:
    from farfield.cpu.tree import search

    if q.is_cuda:
        from farfield.kernels import tree

        # no kernel for this dtype or width: the same choice in PyTorch
        search = search if tree.refusal(q, plan) else tree.search
    with precision.kept(q):
        return search(q, k, plan)


@custom_op("farfield::tree", mutates_args=())
def _tree(q: Tensor, k: Tensor, plan: Sequence[int]) -> tuple[Tensor, Tensor]:
    return _search(q, k, Search(*plan))


@_tree.register_fake
def _(q, k, plan):
    about = Search(*plan)
    blocks = (k.shape[2] + about.q_block - 1) // about.q_block - about.start
    shape = *q.shape[:2], blocks
    return q.new_empty(*shape, about.picks, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)
