"""How well a model predicts held-out text: overall, by position, by distance to the last repeat; and does it copy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from farfield.nn import Decoder, Encoder
from farfield.train.config import autocast
from farfield.train.data import Split

CONTEXT = 12
REPEATS = (("none", 0, 0), ("1-128", 1, 128), ("128-512", 129, 512), ("512-1k", 513, 1024), (">1k", 1025, math.inf))
"""Buckets of the distance to the last repeat: name, least and largest distance; 0 is no repeat."""


@dataclass(frozen=True)
class Bucket:
    """Some of the text: its bits per byte, and its share of all bytes."""

    name: str
    bits_per_byte: float
    share: float


@dataclass(frozen=True)
class Evaluation:
    """Held-out prediction, in bits per byte.

    Args:
        bits_per_byte: over everything; for an encoder over the hidden tokens.
        bits_per_token: the same, per token.
        early: first sixteenth of the window (the first 512 of 8192).
        late: second half of the window.
        by_position: buckets whose ends double.
        by_repeat: by the distance to where the last 12 tokens before a token stood last, within the window. Buckets
            without text are left out.
        windows, tokens, bytes: how much was read.
        length: n.
    """

    bits_per_byte: float
    bits_per_token: float
    early: float
    late: float
    by_position: tuple[Bucket, ...]
    by_repeat: tuple[Bucket, ...]
    windows: int
    tokens: int
    bytes: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Decoder | Encoder,
    split: Split,
    *,
    windows: int | None = None,
    batch: int | None = None,
    dtype: str = "float32",
    mask_share: float = 0.15,
) -> Evaluation:
    """Bits per byte of the split's windows, each read from an empty context.

    For a tokenizer, bytes are those of the text behind each token. An encoder is asked for hidden tokens (the same
    ones at every call), so its windows have no buckets by repeat.

    Args:
        model: on the device to run on.
        windows: how many, spread evenly over the split; None: all.
        batch: windows a forward; default about 16k tokens.
        dtype: "float32" or "bfloat16" (autocast).
    """
    if not isinstance(split, Split):
        raise TypeError(f"evaluate: split must be a Split, such as open_data(...).valid, got {type(split).__name__}")
    numbers = spread(split, windows)
    batch = batch or max(1, 16_384 // split.tokens)
    bits, sizes, repeats = [], [], []
    training = model.training
    model.eval()
    try:
        for part in _batches(numbers, batch):
            ids, size = (torch.stack(x) for x in zip(*map(split.window, part), strict=True))
            if isinstance(model, Encoder):
                found, counted = _hidden_bits(model, ids[:, :-1], part, mask_share, dtype)
                bits.append(found)
                sizes.append((size[:, :-1] * counted).numpy())
            else:
                bits.append(token_bits(model, ids, dtype=dtype).numpy())
                sizes.append(size[:, 1:].numpy())
                # the repeat of a token is that of the tokens before it, so the last token has none to give
                repeats += [last_repeat(row)[:-1] for row in ids.numpy()]
    finally:
        model.train(training)
    b, s = np.concatenate(bits), np.concatenate(sizes)
    n, total = split.tokens, int(s.sum())
    position = np.broadcast_to(np.arange(n), b.shape)
    counted = s > 0 if isinstance(model, Encoder) else np.ones_like(s, bool)

    def bucket(name: str, where: np.ndarray) -> Bucket:
        return Bucket(name, _ratio(b[where].sum(), s[where].sum()), float(s[where].sum()) / total)

    edges = [0, *(1 << p for p in range(6, 64) if 1 << p < n), n]
    positions = [bucket(f"{a}-{z - 1}", (position >= a) & (position < z)) for a, z in pairwise(edges)]
    distance = np.stack(repeats) if repeats else np.full_like(s, -1)
    by_repeat = [bucket(name, (distance >= low) & (distance <= high)) for name, low, high in REPEATS]
    return Evaluation(
        bits_per_byte=_ratio(b.sum(), total),
        bits_per_token=_ratio(b.sum(), counted.sum()),
        early=bucket("early", position < max(1, n // 16)).bits_per_byte,
        late=bucket("late", position >= n // 2).bits_per_byte,
        by_position=tuple(x for x in positions if x.share),
        by_repeat=tuple(x for x in by_repeat if x.share),
        windows=len(numbers),
        tokens=int(counted.sum()),
        bytes=total,
        length=n,
    )


def token_bits(model: Decoder, ids: Int[Tensor, "B S"], *, dtype: str = "float32") -> Float[Tensor, "B S-1"]:
    """Bits that each token after the first costs, given all before it; float64 on the CPU."""
    device = model.embed.weight.device
    ids = ids.to(device)
    with autocast(device, dtype):
        nats = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")
    return nats.cpu().double() / math.log(2)


def _hidden_bits(model: Encoder, ids: Tensor, numbers: Sequence[int], share: float, dtype: str):
    """Bits of the hidden tokens (0 elsewhere), and which they are. Drawn by the windows' numbers."""
    device = model.embed.weight.device
    drawn = [
        model.corrupt(row[None], share=share, generator=torch.Generator().manual_seed(number))
        for row, number in zip(ids, numbers, strict=True)
    ]
    inputs, targets = (torch.cat(x) for x in zip(*drawn, strict=True))
    with autocast(device, dtype):
        nats = model.loss(inputs.to(device), targets.to(device), reduction="none")
    return nats.cpu().double().numpy() / math.log(2), targets >= 0


def last_repeat(ids: Int[np.ndarray, " n"], context: int = CONTEXT) -> Int[np.ndarray, " n"]:
    """For each i, how far back the `context` tokens up to and including i stood last; 0 if they never did.

    The token after i is then one that a copying model can predict. Exact, by ranks of ever longer runs (prefix
    doubling): O(n log n log context), no hashing.
    """
    n = len(ids)
    distance = np.zeros(n, np.int64)
    if n <= context:
        return distance
    ranks = _run_ranks(ids, context)  # of the run that starts at s and ends at s + context - 1
    order = np.argsort(ranks, kind="stable")
    same = ranks[order[1:]] == ranks[order[:-1]]
    distance[order[1:][same] + context - 1] = (order[1:] - order[:-1])[same]
    return distance


def _run_ranks(ids: np.ndarray, length: int) -> np.ndarray:
    """Numbers that are equal exactly where the runs of `length` tokens starting there are equal."""
    power, size = _rank(ids), 1
    whole, covered = None, 0
    while True:
        if length & size:
            whole, covered = (power, size) if whole is None else (_pair(whole, power, covered), covered + size)
        if covered == length:
            return whole  # type: ignore[return-value]
        power, size = _pair(power, power, size), 2 * size


def _pair(left: np.ndarray, right: np.ndarray, gap: int) -> np.ndarray:
    """Ranks of the runs that are `left` at s and `right` at s + gap."""
    n = min(len(left), len(right) - gap)
    return _rank(left[:n] * (int(right.max()) + 1) + right[gap : gap + n])


def _rank(x: np.ndarray) -> np.ndarray:
    return np.unique(x, return_inverse=True)[1].astype(np.int64)


PROBES = (
    ("random", 32, 96),
    ("random", 256, 512),
    ("random", 256, 4096),
    ("text", 256, 512),
    ("text", 256, 4096),
)
"""What is copied, how many tokens of it, and how far the second copy starts after the first."""


@torch.no_grad()
def copy_probe(
    model: Decoder,
    split: Split,
    *,
    probes: Sequence[tuple[str, int, int]] = PROBES,
    count: int = 16,
    batch: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Does the model copy? A string is put twice into held-out text; a model that does needs few bits for the second.

    "random" strings are drawn from the ids that the held-out text uses, "text" ones are text from elsewhere in it.
    The first 16 tokens of each copy are left out (8 of a string of at most 32). Probes that do not fit into a window
    are left out.

    Args:
        count: windows per probe.

    Returns:
        a dict per probe: kind, length, distance, and the bits per token of the first and the second copy.
    """
    n, found = split.tokens, []
    batch = batch or max(1, 16_384 // n)
    alphabet = np.unique(split.ids[: 1 << 20])
    training = model.training
    model.eval()
    try:
        for kind, length, distance in probes:
            if kind not in ("random", "text"):
                raise ValueError(f'copy_probe: a probe is "random" or "text", got {kind!r}')
            if distance < length:
                raise ValueError(f"copy_probe: the copies overlap: length {length}, distance {distance}")
            if distance + length > n:
                continue
            draw = np.random.RandomState(seed)
            skip = 8 if length <= 32 else 16
            first, second = [], []
            for part in _batches(draw.randint(split.windows, size=count).tolist(), batch):
                ids = torch.stack([split.window(number)[0] for number in part])
                starts = draw.randint(1, n + 2 - distance - length, size=len(part))
                for row, start in zip(ids, starts, strict=True):
                    if kind == "random":
                        string = draw.choice(alphabet, length)
                    else:
                        at = draw.randint(len(split.ids) - length)
                        string = split.ids[at : at + length]
                    row[start : start + length] = torch.from_numpy(string.astype(np.int64))
                    row[start + distance : start + distance + length] = row[start : start + length].clone()
                bits = token_bits(model, ids, dtype=dtype)
                for row, start in zip(bits, starts - 1, strict=True):  # bits[t] is that of token t + 1
                    first.append(row[start + skip : start + length].mean())
                    second.append(row[start + distance + skip : start + distance + length].mean())
            means = (float(torch.stack(x).mean()) for x in (first, second))
            found.append(
                {"kind": kind, "length": length, "distance": distance}
                | dict(zip(("first", "second"), means, strict=True))
            )
    finally:
        model.train(training)
    return found


def spread(split: Split, windows: int | None) -> list[int]:
    """Numbers of `windows` windows, spread evenly over the split."""
    if windows is None or windows >= split.windows:
        return list(range(split.windows))
    return [i * split.windows // windows for i in range(windows)]


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def _ratio(a: Any, b: Any) -> float:
    return float(a) / float(b) if b else float("nan")
