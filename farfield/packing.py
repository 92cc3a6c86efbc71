"""Packing: documents laid out so that each starts at a block, and the tree of each restarts with it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from farfield.select.static import depth


def documents(group: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number the documents of each row 0, 1, ...: a document is a run of equal ids. Padding, id < 0, stays -1."""
    starts = torch.zeros_like(group, dtype=torch.long)
    starts[:, 1:] = group[:, 1:] != group[:, :-1]
    return starts.cumsum(1).masked_fill(group < 0, -1)


def blank(x: Tensor, document: Int[Tensor, "B T"]) -> Tensor:
    """[B, H, T, X] with 0 in the place of padding, whatever stood there."""
    return x.masked_fill(document[:, None, :, None] < 0, 0)


class Packing:
    """Where the tokens of a packed batch go when every document starts at a multiple of its largest group.

    Built from document ids, one host sync for the new length. Documents are runs of equal ids; negative ids are
    padding and get no place. Block n of row b belongs to document `document[b, n]`, is that document's block
    `block_of[b, n]` of `blocks[b, n]`, and the document starts at block `start[b, n]`; -1, 0 and 0 where no document
    is.

    Args:
        group: [B, T] document ids.
        block: tokens of a block.
    """

    document: Int[Tensor, "B N"]
    block_of: Int[Tensor, "B N"]
    blocks: Int[Tensor, "B N"]
    start: Int[Tensor, "B N"]
    present: Bool[Tensor, "B S"]

    def __init__(self, group: Int[Tensor, "B T"], block: int):
        batch, tokens = group.shape
        run = documents(group)
        real = run >= 0
        run = run.clamp(min=0)
        length = torch.zeros(batch, tokens + 1, dtype=torch.long, device=group.device).scatter_add_(1, run, real.long())
        blocks = (length + block - 1) // block
        # a group of the coarsest level in use must not straddle documents; large alignments first, so that sums of
        # padded sizes are multiples of every later one
        levels = sum(-(-blocks // 2**height) >= 3 for height in range(depth(-(-tokens // block)) + 1))
        unit = 2 ** (torch.as_tensor(levels, device=group.device) - 1).clamp(min=0)
        padded = (blocks + unit - 1) // unit * unit
        order = unit.argsort(dim=1, descending=True, stable=True)
        ends = padded.gather(1, order).cumsum(1)
        start = torch.empty_like(blocks).scatter_(1, order, ends - padded.gather(1, order))
        self.tokens = max(int(ends[:, -1].max()), 1) * block if batch and tokens else block

        at = torch.arange(tokens, device=group.device).expand(batch, -1)
        first = torch.full_like(length, tokens).scatter_reduce_(1, run, at.masked_fill(~real, tokens), "amin")
        offset = at - first.gather(1, run)
        self.real = real
        self.target = (start.gather(1, run) * block + offset).masked_fill(~real, 0)
        # padding tokens all write to one place past the end, which is cut off
        place = self.target.masked_fill(~real, self.tokens)
        self.source = place.new_full((batch, self.tokens + 1), -1).scatter_(1, place, at)[:, : self.tokens]
        self.present = self.source >= 0
        self.source = self.source.clamp(min=0)
        # every block of a document has at least its first token
        taken = self.present[:, ::block]
        self.document = run.gather(1, self.source[:, ::block]).masked_fill(~taken, -1)
        owner = self.document.clamp(min=0)
        self.start = start.gather(1, owner).masked_fill(~taken, 0)
        self.blocks = blocks.gather(1, owner).masked_fill(~taken, 0)
        self.block_of = (torch.arange(self.document.shape[1], device=group.device) - self.start).masked_fill(~taken, -1)

    def fill(self, x: Tensor) -> Tensor:
        """[B, H, T, X] to its places, [B, H, S, X], 0 in between."""
        at = self.source[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])
        return x.gather(2, at).masked_fill(~self.present[:, None, :, None], 0)

    def restore(self, x: Tensor) -> Tensor:
        """[B, H, S, X] back to the tokens' order, [B, H, T, X], 0 for padding."""
        at = self.target[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])
        return x.gather(2, at).masked_fill(~self.real[:, None, :, None], 0)
