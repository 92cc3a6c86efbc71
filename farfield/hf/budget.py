"""losses and plan: what each layer of a model loses with each of several mechanisms, and which to give to each of them.

Layers differ: some look near only, some at many far tokens. One number of rows for all of them is too many for the
first kind and too few for the second. With r[l, c] the rows that a query of layer l reads with mechanism c, and d[l, c]
the divergence of the model's predictions where layer l alone has c and all others read everything,

    d[l, c]  = mean over tokens of KL(p || p[l, c]),    p the predictions of the model that reads everything
    plan     = c[l] with the least sum over l of d[l, c[l]] such that the mean over l of r[l, c[l]] is at most R

found on the lower convex hull of each layer's points, one step of steepest descent after the other. That losses of
layers add up is an assumption; `farfield perplexity` says what a plan comes to.

The divergence is taken, not the rise of the loss: this is its mean where the model's own predictions are true, without
the noise of which token came next. In one layer the rise is far below that noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from farfield.hf.attention import Choice, attentions, in_use, use
from farfield.hf.perplexity import hidden_states, logits


@dataclass(frozen=True)
class Loss:
    """What a model loses where one layer has another mechanism.

    Args:
        layer, candidate: their numbers.
        rows: that a query of this layer reads, on average.
        divergence: nats a token, see above.
        rise: of the loss, nats a token.
    """

    layer: int
    candidate: int
    rows: float
    divergence: float
    rise: float


def count_layers(model: nn.Module) -> int:
    """How many mechanisms `use` puts into this model."""
    return len(attentions(model))


def read_plan(path: Path | str) -> list[tuple[str, dict[str, Any]]]:
    """The mechanism of each layer and its options, of a file of `farfield budget`, for `use(model, layers=...)`.

    Raises:
        ValueError: it is no such file, or the plan is not finished.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["layers"]
        return [(str(name), dict(options)) for name, options in found]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} has no plan of farfield budget, or one that is not finished") from None


@torch.no_grad()
def losses(
    model: nn.Module,
    ids: Int[Tensor, " n"],
    candidates: Sequence[Choice],
    *,
    layers: Iterable[int] | None = None,
    chunk: int = 1024,
) -> Iterator[Loss]:
    """Each candidate in each layer, all other layers full; what lies before the layer is computed once.

    The model is left with full attention in all layers.

    Args:
        model: a PreTrainedModel for causal language modelling.
        ids: token ids of one window, n >= 2.
        candidates: mechanisms, as `use` takes them.
        layers: numbers of the layers, 0 and up; default all.
        chunk: tokens whose logits are held at a time.

    Raises:
        ValueError: fewer than two tokens, no such layer, no such mechanism, one that does not tell its rows.
    """
    use(model, "full")
    found = attentions(model)
    numbers = range(len(found)) if layers is None else list(layers)
    if wrong := [layer for layer in numbers if layer not in range(len(found))]:
        raise ValueError(f"losses: no layers {wrong}; the model has 0 ... {len(found) - 1}")
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name, _ in found]
    kept: dict[int, Any] = {}
    hooks = [
        block.register_forward_hook(lambda *call, at=at: kept.__setitem__(at, call[2]))
        for at, block in enumerate(blocks)
    ]
    try:
        exact = hidden_states(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in numbers:
        for number, candidate in enumerate(candidates):
            use(model, "full", layers={layer: candidate})
            with _given(blocks[:layer], kept):
                hidden = hidden_states(model, ids)
            rows = in_use(model)[layer].rows_read(len(ids))
            if rows is None:
                raise ValueError(f"losses: {in_use(model)[layer].name} does not tell how many rows it reads")
            divergence, rise = compared(model, ids, exact, hidden, chunk=chunk)
            yield Loss(layer, number, rows, divergence, rise)
    use(model, "full")


def compared(
    model: nn.Module, ids: Int[Tensor, " n"], exact: Tensor, hidden: Tensor, *, chunk: int = 1024
) -> tuple[float, float]:
    """The divergence of the predictions from `hidden` from those from `exact`, [n, width] each, and the loss's rise."""
    divergence = rise = 0.0
    parts = logits(model, exact[:-1], chunk), logits(model, hidden[:-1], chunk), ids[1:].split(chunk)
    for x, y, token in zip(*parts, strict=True):
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        more = p - q
        divergence += float((p.exp() * more).sum(-1).double().sum())
        rise += float(more.gather(1, token.to(more.device)[:, None]).double().sum())
    return divergence / (len(ids) - 1), rise / (len(ids) - 1)


@contextmanager
def _given(blocks: Sequence[nn.Module], outputs: dict[int, Any]) -> Iterator[None]:
    """These modules return what they returned before, and compute nothing."""
    try:
        for at, block in enumerate(blocks):
            block.forward = lambda *_, at=at, **__: outputs[at]
        yield
    finally:
        for block in blocks:
            # the class's own is seen again
            block.__dict__.pop("forward", None)


def plan(losses: Iterable[Loss], rows: float) -> list[int]:
    """The candidate of each layer, such that all layers together read `rows` on average and lose the least.

    Args:
        losses: of every layer; several of one layer and candidate, such as of several texts, are averaged.
        rows: mean over the layers.

    Raises:
        ValueError: a layer is missing, or the cheapest candidates read more already.
    """
    points: dict[int, dict[int, list[Loss]]] = {}
    for each in losses:
        points.setdefault(each.layer, {}).setdefault(each.candidate, []).append(each)
    if sorted(points) != list(range(len(points))):
        raise ValueError(f"plan: layers 0 ... {max(points, default=0)} must all be measured, got {sorted(points)}")
    hulls = [_hull(points[layer]) for layer in range(len(points))]
    at = [0] * len(hulls)
    left = rows * len(hulls) - sum(hull[0][0] for hull in hulls)
    if not left >= 0:
        raise ValueError(
            f"plan: the cheapest candidates read {rows - left / len(hulls):.1f} rows, more than {rows:.1f}"
        )
    while True:
        steps = []
        for layer, hull in enumerate(hulls):
            if at[layer] + 1 < len(hull):
                here, there = hull[at[layer]], hull[at[layer] + 1]
                if there[0] - here[0] <= left:
                    steps.append(((here[1] - there[1]) / (there[0] - here[0]), layer))
        if not steps:
            return [hull[n][2] for n, hull in zip(at, hulls, strict=True)]
        _, layer = max(steps)
        left -= hulls[layer][at[layer] + 1][0] - hulls[layer][at[layer]][0]
        at[layer] += 1


def _hull(points: dict[int, list[Loss]]) -> list[tuple[float, float, int]]:
    """(rows, divergence, candidate) of the lower convex hull, from the fewest rows to the least divergence."""
    averaged = sorted(
        (sum(x.rows for x in same) / len(same), sum(x.divergence for x in same) / len(same), candidate)
        for candidate, same in points.items()
    )
    hull: list[tuple[float, float, int]] = []
    for point in averaged:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: tuple[float, float, int], other: tuple[float, float, int]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
