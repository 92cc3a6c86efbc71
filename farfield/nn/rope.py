"""Rotary positions on a share of the head width."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class Rope(nn.Module):
    """Rotate the first `share` of the width by angles that grow with the position.

        out[t, c], out[t, c + h] = rotation by position[t] * base^(-c / h) of x[t, c], x[t, c + h],    c < h

    h is half of the rotated width; the rest of the width passes unrotated, which is what lets a head look for
    content at any distance. No parameters, no tables: nothing depends on the length.

    Args:
        width: head width D.
        share: share of the width that is rotated, rounded down to an even number.
        base: the slowest channel turns once in about 2 pi * base tokens.
    """

    def __init__(self, width: int, *, share: float = 0.5, base: float = 10_000.0):
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"Rope: share must lie in 0..1, got {share}")
        if base <= 1:
            raise ValueError(f"Rope: base must be above 1, got {base}")
        self.width, self.base = width, base
        self.pairs = int(width * share) // 2
        if share and not self.pairs:
            raise ValueError(
                f"Rope: a share of {share} of width {width} holds no pair of channels; use 0 or a larger share"
            )

    def forward(self, x: Float[Tensor, "B H T D"], position: Shaped[Tensor, "*B T"]) -> Float[Tensor, "B H T D"]:
        """`x` rotated to `position`, [T] or [B, T], which may be fractional. Float32 or wider inside, x's dtype out."""
        if x.shape[-1] != self.width:
            raise ValueError(f"Rope: built for width {self.width}, got {x.shape[-1]}")
        if not self.pairs:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = self._angles(position, wide.dtype)
        a, b, rest = wide.split([self.pairs, self.pairs, self.width - 2 * self.pairs], -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x.dtype)

    def _angles(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # float32 angles are off by 0.06 rad at a million tokens: reduce to one turn in float64 where there is one
        exact = torch.float32 if position.device.type == "mps" else torch.float64
        speed = self.base ** (-torch.arange(self.pairs, device=position.device, dtype=exact) / self.pairs)
        angle = (position.to(exact)[..., None] * speed).remainder(2 * math.pi).to(dtype)
        if position.dim() == 2:
            angle = angle[:, None]
        return angle.cos(), angle.sin()

    def extra_repr(self) -> str:
        return f"width={self.width}, rotated={2 * self.pairs}, base={self.base:g}"
