"""Text from a decoder: the prompt in chunks, then one token at a time, from buffers of fixed size where all layers have
them; on a GPU that is one CUDA graph a token, the draw included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from farfield.nn import Decoder, DecoderRing, DecoderState
from farfield.ops import draw as one_launch
from farfield.train.codec import Codec
from farfield.train.config import DTYPES, autocast
from farfield.train.fast import Captured

WAYS = ("auto", "ring", "extend")
DRAWS = 1024  # numbers to draw by that are on the device at a time


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
    way: str = "auto",
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
        way: "ring" decodes from buffers of fixed size for the prompt and all new tokens, "extend" from states that
            grow; "auto" takes rings on a GPU, where every layer has one that a CUDA graph can hold.

    Raises:
        ValueError: an argument out of range.
        NotImplementedError: way="ring", and a layer's mechanism has no such buffers (at the first token).
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"generate: only a Decoder generates text, got {type(model).__name__}")
    if isinstance(prompt, str | bytes):
        raise ValueError("generate: prompt must be token ids, got text; encode it first, as in codec.encode(text)")
    ids = prompt.cpu().long() if isinstance(prompt, Tensor) else torch.tensor([int(i) for i in prompt])
    if ids.dim() != 1 or not len(ids):
        raise ValueError(f"generate: prompt must be a list of at least one token id, got shape {list(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= model.config.vocab:
        raise ValueError(
            f"generate: prompt ids must lie in 0..{model.config.vocab - 1}, got {int(ids.min())}..{int(ids.max())}"
        )
    if new_tokens < 0 or chunk < 1:
        raise ValueError(f"generate: need new_tokens >= 0 and chunk >= 1, got {new_tokens} and {chunk}")
    if way not in WAYS:
        raise ValueError(f"generate: way must be one of {', '.join(WAYS)}, got {way!r}")
    check_sampling(temperature, top_k, top_p)
    autocast(model.embed.weight.device, dtype)  # an unknown dtype is refused now, not at the first token
    draw = torch.Generator()
    draw.seed() if seed is None else draw.manual_seed(seed)
    return _generate(model, ids, new_tokens, (temperature, top_k, top_p), draw, chunk, stop, dtype, way)


def _generate(model, ids, new_tokens, sampling, draw, chunk, stop, dtype, way) -> Iterator[int]:
    if not new_tokens:
        return
    device = model.embed.weight.device
    first, *others = ids.split(chunk)
    with _evaluated(model, device, dtype):
        logits, state = model.extend(first[None].to(device), last=True)
        for piece in others:
            logits, state = model.extend(piece[None].to(device), state, last=True)
    ring = None if way == "extend" else _ring(model, state, len(ids) + new_tokens, way, dtype)
    # not every device has float64
    numbers = Numbers(draw, device if device.type == "cuda" else torch.device("cpu"))
    if ring is None:
        step: Callable[[], Tensor] = Extending(model, state, logits, sampling, numbers, dtype)
    else:
        step = Stepping(model, ring, logits, sampling, numbers)
    del state
    read = _Reader(device)
    wanted = read(step())
    for left in range(new_tokens - 1, -1, -1):
        # the next token is under way while this one is read and used
        following = read(step()) if left and ring is not None else None
        token = wanted()
        if token == stop:
            return
        yield token
        if left:
            wanted = following or read(step())


def _ring(model: Decoder, state: DecoderState, capacity: int, way: str, dtype: str) -> DecoderRing | None:
    """The ring that goes on after the prompt; None where "auto" decodes by `extend`."""
    if way == "auto" and model.embed.weight.device.type != "cuda":
        return None  # without a graph a step from a ring is no faster
    try:
        ring = model.ring(state, capacity=capacity, dtype=None if dtype == "float32" else DTYPES[dtype])
        return ring if way == "ring" or ring.capturable else None
    except (NotImplementedError, ValueError):
        # a pool or a rotation that rings do not take, or more levels than a block has tokens
        if way == "ring":
            raise
        return None


class Numbers:
    """The numbers in 0..1 that tokens are drawn by, DRAWS of them on the device at a time: the same on every device."""

    def __init__(self, draw: torch.Generator, device: torch.device):
        self.draw, self.used = draw, 0
        self.held = torch.empty(DRAWS, dtype=torch.float64, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)

    def fill(self) -> None:
        """Before each draw, where the host is not left out: further numbers once those held are used."""
        if self.used % DRAWS == 0:
            self.held.copy_(torch.rand(DRAWS, dtype=torch.float64, generator=self.draw))
            self.at.zero_()
        self.used += 1

    def next(self) -> Tensor:
        """The next one, [1]; nothing that waits for the host."""
        number = self.held.index_select(0, self.at)
        self.at.add_(1)
        return number


class Extending:
    """Token after token from states that grow. A call returns the next, [1, 1] on the device."""

    def __init__(self, model, state, logits, sampling, numbers: Numbers, dtype: str):
        self.model, self.state, self.logits, self.sampling, self.dtype = model, state, logits, sampling, dtype
        self.numbers = numbers
        self.token: Tensor | None = None

    def __call__(self) -> Tensor:
        self.numbers.fill()
        with _evaluated(self.model, self.logits.device, self.dtype):
            if self.token is not None:
                self.logits, self.state = self.model.extend(self.token, self.state, last=True)
            logits, number = self.logits[:, -1].to(self.numbers.held.device), self.numbers.next()
            self.token = drawn(logits, number, *self.sampling)[:, None].to(self.logits.device)
        return self.token


class Stepping:
    """The same from a ring; on a GPU a CUDA graph after a few tokens."""

    def __init__(self, model, ring: DecoderRing, logits, sampling, numbers: Numbers):
        self.logits: Tensor | None = logits
        self.sampling, self.numbers = sampling, numbers
        self.token = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
        # no method of this: a graph in a cycle of references would be freed at any time, captures of others among them
        self.step = partial(_step, model, ring, self.token, numbers, sampling)
        with _on(logits.device):
            self.captured = Captured(self.step, ()) if ring.capturable else None

    def __call__(self) -> Tensor:
        with _on(self.token.device):
            self.numbers.fill()
            if self.logits is not None:
                # of the prompt's last token
                self.token.copy_(drawn(self.logits[:, -1], self.numbers.next(), *self.sampling)[:, None])
                self.logits = None
            elif self.captured is not None:
                self.captured()
            else:
                self.step()
            return self.token.clone()


def _step(model, ring, token, numbers, sampling) -> Tensor:
    """`token` becomes the one behind it, in place."""
    with torch.no_grad():
        logits = model.step(token, ring)
        token.copy_(drawn(logits[:, -1], numbers.next(), *sampling)[:, None])
    return token


def _on(device: torch.device):
    """Streams, events and kernels are those of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _evaluated(model: Decoder, device: torch.device, dtype: str) -> Iterator[None]:
    """Modes of one step only: the caller runs between two tokens."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype), _on(device):
            yield
    finally:
        model.train(training)


class _Reader:
    """Brings tokens [1, 1] to the host; what it returns waits for the one."""

    def __init__(self, device: torch.device):
        self.cuda, self.turn = device.type == "cuda", 0
        self.places = [torch.zeros(1, 1, dtype=torch.long, pin_memory=True) for _ in range(2)] if self.cuda else []

    def __call__(self, token: Tensor) -> Callable[[], int]:
        if not self.cuda:
            return lambda: int(token)
        place, done = self.places[self.turn % 2], torch.cuda.Event()
        self.turn += 1
        with _on(token.device):
            place.copy_(token, non_blocking=True)
            done.record()

        def value() -> int:
            done.synchronize()
            return int(place)

        return value


def drawn(
    logits: Float[Tensor, "*B V"],
    number: Float[Tensor, "*#B"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Tensor, "*B"]:
    """The token that a number in 0..1 draws from `probabilities`: the first that with all lower ids has a larger share.

    Nothing in it waits for the host.

    Raises:
        ValueError: logits that are NaN, on the CPU; on a GPU what is drawn then has no meaning.
    """
    if logits.device.type == "cpu" and logits.isnan().any():
        raise ValueError(
            "generate: the model's logits are NaN, so that there is nothing to draw from; have its weights diverged?"
        )
    if temperature == 0:
        ids = torch.arange(logits.shape[-1], device=logits.device)
        # of equal ones the lower id, which argmax does not promise
        return torch.where(logits == logits.amax(-1, keepdim=True), ids, logits.shape[-1]).amin(-1)
    check_sampling(temperature, top_k, top_p)
    if not one_launch.refusal(logits, number):
        return one_launch.draw(logits, number, temperature, top_k, top_p)
    kept = probabilities(logits, temperature, top_k, top_p)
    sums = kept.cumsum(-1)
    place = (sums <= number[..., None] * sums[..., -1:]).sum(-1)
    # rounding may leave the sum of all below the number
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.minimum(place, torch.where(kept > 0, ids, 0).amax(-1))


def probabilities(
    logits: Float[Tensor, "*B V"], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "*B V"]:
    """What tokens are drawn from: softmax of logits / temperature, cut to top_k, then to top_p, and normalised.

    Float64. Of equal logits the lower id is the likelier one. At least one token is left.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature and top_k is None and top_p is None:
        return (logits.double() / temperature).softmax(-1)
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    ranked = ranked.double()
    if temperature == 0:
        kept = torch.zeros_like(ranked)
        kept[..., 0] = 1
    else:
        kept = (ranked / temperature).softmax(-1)
        if top_k is not None:
            kept[..., top_k:] = 0
            kept = kept / kept.sum(-1, keepdim=True)
        if top_p is not None:
            # a token stays while those before it do not reach top_p
            kept = kept.masked_fill(kept.cumsum(-1) - kept >= top_p, 0)
            kept = kept / kept.sum(-1, keepdim=True)
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
