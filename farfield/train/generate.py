"""Text from a decoder: the prompt in chunks, then one token at a time from the state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from farfield.nn import Decoder, DecoderState
from farfield.train.codec import Codec
from farfield.train.config import autocast


def generate(
    model: Decoder,
    prompt: Sequence[int] | Int[Tensor, " T"],
    *,
    new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chunk: int = 2048,
    stop: int | None = None,
    dtype: str = "float32",
) -> Iterator[int]:
    """Token ids that continue the prompt, each as soon as it is drawn.

    Args:
        prompt: at least one token.
        new_tokens: how many at most.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that together reach this probability.
        seed: the same seed draws the same tokens, on every device; None: another each time.
        chunk: prompt tokens a forward, which bounds memory.
        stop: a token that ends the text and is not given out.
        dtype: "float32" or "bfloat16" (autocast).

    Raises:
        ValueError: an argument out of range.
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"generate: only a Decoder generates text, got {type(model).__name__}")
    ids = prompt.cpu().long() if isinstance(prompt, Tensor) else torch.tensor([int(i) for i in prompt])
    if ids.dim() != 1 or not len(ids):
        raise ValueError(f"generate: prompt must be a list of at least one token id, got shape {list(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= model.config.vocab:
        raise ValueError(
            f"generate: prompt ids must lie in 0..{model.config.vocab - 1}, got {int(ids.min())}..{int(ids.max())}"
        )
    if new_tokens < 0 or chunk < 1:
        raise ValueError(f"generate: need new_tokens >= 0 and chunk >= 1, got {new_tokens} and {chunk}")
    check_sampling(temperature, top_k, top_p)
    autocast(model.embed.weight.device, dtype)  # an unknown dtype is refused now, not at the first token
    draw = torch.Generator()
    draw.seed() if seed is None else draw.manual_seed(seed)
    return _generate(model, ids, new_tokens, (temperature, top_k, top_p), draw, chunk, stop, dtype)


def _generate(model, ids, new_tokens, sampling, draw, chunk, stop, dtype) -> Iterator[int]:
    if not new_tokens:
        return
    state = None
    for piece in ids.split(chunk):
        logits, state = _step(model, piece, state, dtype)
    for left in range(new_tokens - 1, -1, -1):
        token = int(torch.multinomial(probabilities(logits, *sampling), 1, generator=draw))
        if token == stop:
            return
        yield token
        if left:
            logits, state = _step(model, torch.tensor([token]), state, dtype)


def _step(model: Decoder, tokens: Tensor, state: DecoderState | None, dtype: str) -> tuple[Tensor, DecoderState]:
    """Logits of the token after these, on the CPU."""
    # modes are set for one step only: the caller runs between two tokens
    device, training = model.embed.weight.device, model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype):
            logits, state = model.extend(tokens[None].to(device), state, last=True)
    finally:
        model.train(training)
    return logits[0, -1].cpu(), state


def probabilities(
    logits: Float[Tensor, "*B V"], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "*B V"]:
    """What tokens are drawn from: softmax of logits / temperature, cut to top_k, then to top_p, and normalised.

    Float64. Of equal logits the lower id is the likelier one. At least one token is left.
    """
    check_sampling(temperature, top_k, top_p)
    ranked, order = torch.sort(logits.double(), dim=-1, descending=True, stable=True)
    if temperature == 0:
        kept = torch.zeros_like(ranked)
        kept[..., 0] = 1
    else:
        kept = (ranked / temperature).softmax(-1)
        if top_k is not None:
            kept[..., top_k:] = 0
            kept /= kept.sum(-1, keepdim=True)
        if top_p is not None:
            # a token stays while those before it do not reach top_p
            kept[kept.cumsum(-1) - kept >= top_p] = 0
            kept /= kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless these can be sampled with."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}; None draws from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be above 0 and at most 1, got {top_p}; None draws from all tokens")


def stream_text(codec: Codec, tokens: Iterator[int]) -> Iterator[str]:
    """Text of the tokens as they come, never a part of a character."""
    stream = codec.stream()
    for token in tokens:
        if text := stream.push(token):
            yield text
    if text := stream.close():
        yield text
