"""A pre-norm transformer block."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from farfield.nn.layer import Attention, LayerRing, LayerState


class MLP(nn.Module):
    """relu(x A)^2 B. The quality of SwiGLU in small models with two matrices instead of three, so at equal weights
    the hidden layer is half wider and one activation fewer is kept for backward."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*B W"]) -> Float[Tensor, "*B W"]:
        return self.down(self.up(x).relu().square())


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

    def step(self, x: Float[Tensor, "B 1 W"], ring: LayerRing, position: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 W"]:
        """One further token a sequence, which stands at `position`; `ring` takes it in place."""
        x = x + self.attention.step(self.attention_norm(x), ring, position)
        return x + self.mlp(self.mlp_norm(x))
