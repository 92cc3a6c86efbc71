"""A decode state in fixed buffers for mechanisms that choose blocks of tokens by score."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from farfield.ops.choose import Scoring, choose_token
from farfield.select.scored import BlockCache
from farfield.token_ring import TokenRing


@dataclass(frozen=True)
class ScoredRing(TokenRing):
    """A ring that forgets no token, and the mean key of each block of tokens, by which blocks are chosen."""

    means: Float[Tensor, "B G M D"]  # float32 or wider
    scored: int  # tokens of such a block

    @staticmethod
    def after(state: BlockCache, capacity: int) -> ScoredRing:
        """The ring that goes on where a state stands."""
        ring, means = TokenRing.all_of(state, capacity), state.means
        held = means.new_zeros(*means.shape[:2], -(-capacity // state.block), means.shape[3])
        held[:, :, : means.shape[2]] = means
        return ScoredRing(**{f.name: getattr(ring, f.name) for f in fields(ring)}, means=held, scored=state.block)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step: no graph has held a choice in PyTorch yet."""
        return False

    @torch.no_grad()
    def read_best(
        self,
        q: Float[Tensor, "B H 1 D"],
        k: Float[Tensor, "B G 1 D"],
        v: Float[Tensor, "B G 1 E"],
        scoring: Scoring,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "B H 1 E"]:
        """Take one token a sequence and return its attention over the blocks that score best. Raises as `step`."""
        self.append(q, k, v)
        t, block, heads = self.position[:, 0].clamp(max=self.capacity - 1), scoring.block, q.shape[1]

        def places(x: Tensor) -> Tensor:
            return x[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])

        # as long as a block is open its mean is not read
        rows = (t // block * block + torch.arange(block, device=t.device)).clamp(max=self.capacity - 1)
        mean = self.k.gather(2, places(rows)).to(self.means.dtype).mean(2, keepdim=True)
        self.means.scatter_(2, places(t // block), mean)
        index, count = choose_token(q, self.means, scoring, t, scale=scale)
        repeat = heads // index.shape[1]
        index, count = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (index, count))
        return self.listed(q, index, count, block, scale)
