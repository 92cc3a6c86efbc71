"""draw: a token from logits, by temperature, top-k and top-p, in one launch on a GPU."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from farfield.ops.eager import eager

MOST = 1024  # tokens to draw from: each is compared with all


def refusal(logits: Tensor, number: Tensor) -> str | None:
    """Why `draw` cannot take these, None if it can."""
    if not logits.is_cuda:
        return f"takes CUDA tensors, not {logits.device.type}"
    if logits.dim() != 2 or number.dim() != 1:
        return (
            f"takes rows of logits and a number for each or for all, got {logits.dim()} and {number.dim()} dimensions"
        )
    if not 0 < logits.shape[1] <= MOST or not logits.shape[0]:
        return f"takes up to {MOST} tokens, and a row of them at least, got {list(logits.shape)}"
    if not eager(logits, number):
        return "takes no compiled call"
    return None


def draw(
    logits: Float[Tensor, "B V"],
    number: Float[Tensor, " #B"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int[Tensor, " B"]:
    """The first token that with all lower ids has a larger share than `number` (float64, 0..1) of what is kept.

    Shares are those of softmax(logits / temperature) in float64, of the `top_k` likeliest tokens, and of these of the
    likeliest that together reach `top_p`; of equal logits the lower id is the likelier one.
    """
    from farfield.kernels import draw as kernels

    tokens = logits.shape[1]
    least = tokens if top_k is None else min(top_k, tokens)
    # every share that stands before another is below 2
    return kernels.drawn(logits, number, float(temperature), least, 2.0 if top_p is None else float(top_p))
