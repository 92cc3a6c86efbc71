"""A pre-norm transformer block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from farfield.nn.layer import Attention, LayerRing, LayerState
from farfield.ops.token_step import normed, squared


class MLP(nn.Module):
    """relu(x A)^2 B. The quality of SwiGLU in small models with two matrices instead of three, so at equal weights
    the hidden layer is half wider and one activation fewer is kept for backward."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*B W"]) -> Float[Tensor, "*B W"]:
        return self.down(self.up(x).relu().square())


@dataclass(frozen=True)
class BlockRing:
    """What a block remembers in buffers of fixed size, and the weights of its products as they were."""

    layer: LayerRing
    up: Tensor
    down: Tensor


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: Attention, *, mlp_ratio: float = 4.0, dropout: float = 0.0):
        super().__init__()
        width = attention.width
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = MLP(width, round(width * mlp_ratio))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B T W"], group: Int[Tensor, "#B T"] | None = None) -> Float[Tensor, "B T W"]:
        x = x + self.dropout(self.attention(self.attention_norm(x), group))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def extend(self, x: Float[Tensor, "B T W"], state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """T further tokens after those in `state`."""
        out, state = self.attention.extend(self.attention_norm(x), state)
        x = x + self.dropout(out)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), cast(LayerState, state)

    @torch.no_grad()
    def ring(self, state: LayerState, *, capacity: int, dtype: torch.dtype | None = None) -> BlockRing:
        """As Attention.ring."""
        up, down = (x.weight.detach().to(dtype) for x in (self.mlp.up, self.mlp.down))
        return BlockRing(self.attention.ring(state, capacity=capacity, dtype=dtype), up, down)

    @torch.no_grad()
    def step(
        self, x: Float[Tensor, "B 1 W"], more: Float[Tensor, "B 1 W"] | None, ring: BlockRing,
        position: Int[Tensor, "B 1"],
    ) -> tuple[Float[Tensor, "B 1 W"], Float[Tensor, "B 1 W"]]:  # fmt: skip
        """One further token a sequence, which stands at `position`; `ring` takes it in place.

        What is to be added to x is handed on, so that one launch adds and norms.

        Returns:
            x and `more` for the next block.
        """
        layer, conv, first, second = ring.layer, self.attention.conv, self.attention_norm, self.mlp_norm
        taps = None if conv is None else conv.weight
        x, y = normed(x, more, first.weight, cast(float, first.eps), ring.up.dtype, layer.recent, taps)
        more = self.attention.step(y, layer, position)
        x, y = normed(x, more, second.weight, cast(float, second.eps), ring.up.dtype)
        return x, F.linear(squared(F.linear(y, ring.up)), ring.down)
