"""Tasks that only recall can solve, drawn from a seed: associative recall with many queries, and a passkey in filler.

Every sequence has new contents, so there is nothing to learn by heart: what is asked for stands once in the sequence
before, and nowhere else. Samples depend on (stream, seed, number) only; training and test are streams of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from farfield.nn import Decoder
from farfield.nn.config import known
from farfield.nn.models import IGNORE
from farfield.train.config import autocast

TRAIN, TEST = 0, 1
"""Streams: samples of one are none of the other, whatever the seeds."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A sequence and what is asked of it.

    Args:
        ids: n + 1 tokens.
        answers: places in `ids` of the tokens asked for, each to be told from the tokens before it; ascending.
        sources: the place before it where each stands for the first time.
    """

    ids: Int[np.ndarray, " n+1"]
    answers: Int[np.ndarray, " A"]
    sources: Int[np.ndarray, " A"]


@dataclass(frozen=True)
class Mqar:
    """Multi-query associative recall: keys with their values, and later each key again, asking for its value.

    Zoology (Arora et al. 2023, arXiv:2312.04927), section 4. Tokens come in slots of two. A pair takes a slot (key,
    value), its query a later one (the same key, and the value as the answer); the number of slots between is g with
    probability proportional to g^-exponent. Everything else is filler: values, and keys that are not asked for.

    Departs from the paper: pairs lie anywhere, not all at the start, so that neither sinks nor a fixed place help, and
    distances follow the law exactly while slots are free; the answer stands in the text, as in language; exponent is
    1 - a of the paper's a = 0.01, and may be 0 for uniform distances.

    Args:
        vocab: ids; keys are the lower half, values the upper.
        pairs: key-value pairs, each asked for once.
        exponent: of the law of distances; 1: as many in each doubling.
        nearest: smallest distance from a key to its query, in tokens.
    """

    name: ClassVar = "mqar"
    by: ClassVar = "distance"

    vocab: int = 1024
    pairs: int = 64
    exponent: float = 1.0
    nearest: int = 2

    def __post_init__(self):
        if self.vocab < 4 or self.vocab % 2:
            raise ValueError(f"Mqar: vocab must be even and at least 4, half keys and half values; got {self.vocab}")
        if not 1 <= self.pairs <= self.vocab // 2:
            raise ValueError(f"Mqar: pairs must lie in 1..vocab / 2 = {self.vocab // 2}, got {self.pairs}")
        if self.exponent < 0:
            raise ValueError(f"Mqar: exponent must not be negative, got {self.exponent}")
        if self.nearest < 1:
            raise ValueError(f"Mqar: nearest must be at least 1, got {self.nearest}")

    @property
    def chance(self) -> float:
        """Share of the answers that a guess gets right."""
        return 2 / self.vocab

    @property
    def _least(self) -> int:
        return (self.nearest + 1) // 2

    def check(self, tokens: int) -> None:
        # a slot that is taken blocks two places of a pair at distance `nearest`: so many slots always leave one
        need = 2 * (4 * self.pairs + self._least) - 1
        if tokens < need:
            raise ValueError(
                f"Mqar: pairs={self.pairs} at least nearest={self.nearest} apart need {need} tokens, got {tokens}; "
                "use longer samples or fewer pairs"
            )

    def draw(self, random: np.random.RandomState, tokens: int, number: int) -> Sample:
        half = self.vocab // 2
        keys = random.permutation(half)
        own, rest = keys[: self.pairs], np.concatenate([keys[self.pairs :], np.arange(half, self.vocab)])
        values = random.randint(half, self.vocab, size=self.pairs)
        ids = rest[random.randint(len(rest), size=tokens + 1)]
        told, asked = self._places(random, (tokens + 1) // 2)
        for slots in (told, asked):
            ids[2 * slots], ids[2 * slots + 1] = own, values
        order = np.argsort(asked)
        return Sample(ids, 2 * asked[order] + 1, 2 * told[order] + 1)

    def parts(self, answers: Tensor, sources: Tensor, tokens: int) -> Iterator[tuple[str, Tensor]]:
        """Name and mask of each range of distances from a query back to its key."""
        distance = answers - sources
        for low, end in pairwise([1, *(1 << p for p in range(5, 64) if 1 << p < tokens), tokens + 1]):
            yield f"{low}-{end - 1}", (distance >= low) & (distance < end)

    def _places(self, random: np.random.RandomState, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots of the pairs and of their queries, all different: what falls on a taken one is drawn again."""
        law = _cumulative(self._least, slots - 1, self.exponent)
        found: list[tuple[int, int]] = []
        taken: set[int] = set()
        while len(found) < self.pairs:
            gaps = self._least + np.searchsorted(law, random.random_sample(self.pairs), side="right")
            starts = (random.random_sample(self.pairs) * (slots - gaps)).astype(np.int64)
            for place in zip(starts.tolist(), (starts + gaps).tolist(), strict=True):
                if len(found) < self.pairs and taken.isdisjoint(place):
                    found.append(place)
                    taken.update(place)
        told, asked = np.array(found).T
        return told, asked


@lru_cache(maxsize=16)
def _cumulative(least: int, most: int, exponent: float) -> np.ndarray:
    """P(gap <= g) for g = least .. most."""
    weights = np.arange(least, most + 1, dtype=np.float64) ** -exponent
    law = weights.cumsum() / weights.sum()
    law[-1] = 1.0  # rounding must not leave a gap beyond the last
    return law


# no digit and no colon: those are the key's
FILLER = tuple(
    sentence.encode()
    for sentence in (
        "A cart went down to the harbour before the rain. ",
        "Nobody had mended the fence since spring. ",
        "They drank their tea and spoke of the weather. ",
        "The miller counted sacks until it grew dark. ",
        "Two dogs slept under the bench by the door. ",
        "Some letters came late, others never at all. ",
        "Snow lay on the hills well into April. ",
        "Her brother kept bees behind the old school. ",
        "The road bends twice and then follows the river. ",
        "Every lamp in the street went out at once. ",
        "He painted the boat green, as his father had. ",
        "From the tower one could see three villages. ",
        "The cook burned the bread and laughed about it. ",
        "Leaves gathered where the wind could not reach. ",
        "We waited for the ferry and watched the gulls. ",
        "An old clock stood in the hall, always slow. ",
    )
)
PROMPT = b" Pass key: "


@dataclass(frozen=True)
class Passkey:
    """A key of a few digits hidden in filler text, asked for at the end.

    The task of Mohtashami and Jaggi 2023 (arXiv:2305.16300), section 4.2, with filler that varies, as bytes:

        filler ... " Pass key: 48213. " ... filler " Pass key: " and then the answer, 48213

    Args:
        digits: of the key; the answer's bytes count one by one.
        depth: where the key stands, from 0 (the start) to 1 (right before the question); None: anywhere, every tenth of
            the text once in ten samples.
    """

    name: ClassVar = "passkey"
    by: ClassVar = "depth"
    vocab: ClassVar = 256
    chance: ClassVar = 0.1

    digits: int = 5
    depth: float | None = None

    def __post_init__(self):
        if self.digits < 1:
            raise ValueError(f"Passkey: digits must be at least 1, got {self.digits}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"Passkey: depth must lie in 0..1, got {self.depth}")

    def check(self, tokens: int) -> None:
        need = 2 * len(PROMPT) + 2 * self.digits + len(b". ")
        if tokens < need:
            raise ValueError(f"Passkey: digits={self.digits} need {need} tokens, got {tokens}; use longer samples")

    def draw(self, random: np.random.RandomState, tokens: int, number: int) -> Sample:
        depth = (number % 10 + random.random_sample()) / 10 if self.depth is None else self.depth
        key = bytes(random.randint(ord("0"), ord("9") + 1, size=self.digits).tolist())
        told, asked = PROMPT + key + b". ", PROMPT + key
        room = self._room(tokens)
        picks = random.randint(len(FILLER), size=room // min(map(len, FILLER)) + 1)
        text = b"".join(FILLER[i] for i in picks)[:room]
        cut = round(depth * room)
        ids = np.frombuffer(text[:cut] + told + text[cut:] + asked, np.uint8).astype(np.int64)
        digits = np.arange(self.digits)
        return Sample(ids, tokens + 1 - self.digits + digits, cut + len(PROMPT) + digits)

    def parts(self, answers: Tensor, sources: Tensor, tokens: int) -> Iterator[tuple[str, Tensor]]:
        """Name and mask of each tenth of the depth; the key's bytes stand together."""
        cut = sources[:, :1] - len(PROMPT)
        tenth = (10 * cut // max(1, self._room(tokens))).clamp(max=9).expand_as(sources)
        for low in range(10):
            yield f"{10 * low}-{10 * low + 10} %", tenth == low

    def _room(self, tokens: int) -> int:
        """Bytes of filler."""
        return tokens + 1 - 2 * len(PROMPT) - 2 * self.digits - len(b". ")


Task = Mqar | Passkey
TASKS: dict[str, type[Task]] = {task.name: task for task in (Mqar, Passkey)}


def make_task(name: str, **options: Any) -> Task:
    """The task of this name.

    Raises:
        ValueError: no such task or option, or a value out of range.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name](**known(TASKS[name], options))


@dataclass(frozen=True)
class Examples:
    """An endless stream of samples of a task, as Split is one of windows of a text.

    Args:
        tokens: n.
        stream: TRAIN or TEST.

    Raises:
        ValueError: n is too small for the task.
    """

    task: Task
    tokens: int
    stream: int = TRAIN

    def __post_init__(self):
        self.task.check(self.tokens)

    def sample(self, seed: int, number: int) -> Sample:
        """Sample `number` of the stream that `seed` starts."""
        # RandomState: NumPy promises that its streams never change
        random = np.random.RandomState([self.stream, seed % 2**32, number])
        return self.task.draw(random, self.tokens, number)

    def batch(self, seed: int, first: int, count: int) -> tuple[Int[Tensor, "count n"], Int[Tensor, "count n"]]:
        """Inputs and targets of the samples first .. first + count - 1; targets count at the answers only."""
        samples = [self.sample(seed, number) for number in range(first, first + count)]
        inputs, answers, _ = stacked(samples)
        targets = torch.full((count, self.tokens), IGNORE)
        # the token before an answer is the one that it is the target of
        targets.scatter_(1, answers - 1, inputs.gather(1, answers))
        return inputs[:, :-1], targets


def stacked(
    samples: list[Sample],
) -> tuple[Int[Tensor, "count n+1"], Int[Tensor, "count A"], Int[Tensor, "count A"]]:
    """ids, answers and sources of several samples."""
    ids, answers, sources = (
        torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))
        for name in ("ids", "answers", "sources")
    )
    return ids, answers, sources


@dataclass(frozen=True)
class Drawn:
    """A task as a source of training samples, for `fit`."""

    train: Examples
    codec: None = None

    @property
    def vocab(self) -> int:
        return self.train.task.vocab

    @property
    def digest(self) -> str:
        """SHA-256 of the task and its options."""
        task = self.train.task
        return hashlib.sha256(json.dumps([task.name, asdict(task), self.train.tokens]).encode()).hexdigest()


@dataclass(frozen=True)
class Share:
    """Some of the answers: how many, and the share that is right."""

    name: str
    accuracy: float
    answers: int


@dataclass(frozen=True)
class Recalled:
    """How much a model recalls.

    Args:
        accuracy: share of the answers that are right.
        whole: share of the samples all of whose answers are right.
        buckets: by distance from an answer back to its source, in ends that double, or by the depth of the source, in
            tenths. Those without answers are left out.
        samples, answers: how many.
        length: n.
    """

    accuracy: float
    whole: float
    buckets: tuple[Share, ...]
    samples: int
    answers: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Guess = Callable[[Tensor, Tensor], Tensor]
"""From inputs [B, n] and places of them [B, A], the token that follows each place: [B, A], given all up to there."""


def recall(model: Decoder, examples: Examples, *, samples: int = 64, dtype: str = "float32", seed: int = 0) -> Recalled:
    """The share of answers that the model's likeliest token gets right.

    Args:
        model: on the device to run on.
        samples: of `examples`, the first ones of `seed`.
        dtype: "float32" or "bfloat16" (autocast).
    """
    training = model.training
    model.eval()
    try:
        return score(guesser(model, dtype=dtype), examples, samples=samples, seed=seed)
    finally:
        model.train(training)


def guesser(model: Decoder, *, dtype: str = "float32") -> Guess:
    """The likeliest token by `model`; logits are made where they are asked for only."""
    device = model.embed.weight.device

    @torch.no_grad()
    def guess(inputs: Tensor, at: Tensor) -> Tensor:
        with autocast(device, dtype):
            x = model.features(inputs.to(device))
            x = x.gather(1, at.to(device)[..., None].expand(-1, -1, x.shape[-1]))
            return F.linear(x, model.output_weight).argmax(-1).cpu()

    return guess


def score(guess: Guess, examples: Examples, *, samples: int = 64, batch: int | None = None, seed: int = 0) -> Recalled:
    """`recall` of anything that guesses.

    Args:
        batch: samples a call; default about 16k tokens.
    """
    n = examples.tokens
    batch = batch or max(1, 16_384 // n)
    rights, places, sources = [], [], []
    for first in range(0, samples, batch):
        drawn = [examples.sample(seed, number) for number in range(first, min(first + batch, samples))]
        ids, answers, source = stacked(drawn)
        rights.append(guess(ids[:, :-1], answers - 1) == ids.gather(1, answers))
        places.append(answers)
        sources.append(source)
    right, place, source = torch.cat(rights), torch.cat(places), torch.cat(sources)
    return Recalled(
        accuracy=_mean(right),
        whole=_mean(right.all(1)),
        buckets=tuple(
            Share(name, _mean(right[where]), int(where.sum()))
            for name, where in examples.task.parts(place, source, n)
            if where.any()
        ),
        samples=samples,
        answers=right.numel(),
        length=n,
    )


def _mean(right: Tensor) -> float:
    return float(right.double().mean())
