"""A short depthwise convolution along the tokens: what lets one layer see pairs and triples of neighbours."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad


class ShortConv(nn.Module):
    """Each channel mixes `size` neighbouring tokens of its own document.

        out[t] = sum over j < size of weight[j] * x[t - before + j],    before = size - 1, or size // 2 if not causal

    Starts as the identity plus small noise. Written as shifted sums: for a handful of taps they cost what a
    convolution kernel costs, and the document borders come in as masks.
    """

    def __init__(self, width: int, size: int = 4, *, causal: bool = True):
        super().__init__()
        if size < 1:
            raise ValueError(f"ShortConv: size must be at least 1, got {size}")
        self.width, self.size, self.causal = width, size, causal
        self.before = size - 1 if causal else size // 2
        self.weight = nn.Parameter(torch.empty(size, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)
        with torch.no_grad():
            self.weight[self.before] += 1

    def forward(self, x: Float[Tensor, "B T W"], group: Int[Tensor, "#B T"] | None = None) -> Float[Tensor, "B T W"]:
        after = self.size - 1 - self.before
        padded = pad(x, (0, 0, self.before, after))
        if group is None:
            return self._mix(padded, x.shape[1])
        # a document is a run of equal ids, so an id that comes back later is another document
        run = (group[:, 1:] != group[:, :-1]).cumsum(1)
        run = pad(pad(run, (1, 0)), (self.before, after), value=-1)
        return self._mix(padded, x.shape[1], run)

    def extend(self, x: Float[Tensor, "B T W"], recent: Float[Tensor, "B R W"]) -> Float[Tensor, "B T W"]:
        """Outputs of T further tokens after the inputs `recent`, of which the last size - 1 are read."""
        recent = recent[:, max(0, recent.shape[1] - self.before) :]
        padded = torch.cat([recent, x], 1)
        return self._mix(pad(padded, (0, 0, self.before - recent.shape[1], 0)), x.shape[1])

    def _mix(self, padded: Tensor, tokens: int, run: Tensor | None = None) -> Tensor:
        out = None
        for j in range(self.size):
            x = padded[:, j : j + tokens] * self.weight[j]
            if run is not None:
                same = run[:, j : j + tokens] == run[:, self.before : self.before + tokens]
                x = torch.where(same[..., None], x, 0)
            out = x if out is None else out + x
        assert out is not None
        return out

    def extra_repr(self) -> str:
        return f"width={self.width}, size={self.size}, causal={self.causal}"
