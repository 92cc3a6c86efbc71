"""The controls in examples/controls: what the tables of the documentation compare with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from farfield.mechanisms.fma import FMA
from farfield.select import opened
from farfield.testing import oracles
from farfield.testing.units import assert_within

FOLDER = Path(__file__).parents[1] / "examples" / "controls"


def load(name):
    spec = importlib.util.spec_from_file_location(f"_control_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "more",
    [
        {"score": "peak"},
        {"score": "box", "shared": False},
        {"score": "mean", "segments": "sum", "level_bias": -1.0},
        {
            "rank": 1,
            "open": 20,
            "score": "mean",
            "segments": "sum",
            "shared": False,
            "detail": 2,
            "beam": 2048,
            "level_bias": -1.0,
        },
    ],
    ids=str,
)
def test_dense_fma_is_fma(more, monkeypatch):
    kind = load("fma_dense").DenseFMA
    options = {"block": 4, "near": 8, "rank": 2, "open": 3, "sinks": 2, "kv_heads": 2, "levels": 8, **more}
    q, k, v = (torch.randn(1, heads, 333, 16, dtype=torch.float64) for heads in (6, 2, 2))
    dense, fma, rows = kind(**options), FMA(**options).double(), []
    if fma.biased:
        for each in (dense, fma):
            each.level_bias.data[1] = 0.5
    attend = opened.attend

    def watch(asking, sources, **others):
        rows.append(sum(layout.visible for _, layout in sources))
        return attend(asking, sources, **others)

    monkeypatch.setattr(opened, "attend", watch)
    wanted = fma(q, k, v)
    assert_within(dense(q.float(), k.float(), v.float()), wanted, terms=333)
    assert dense.rows_read(333) == pytest.approx(rows[0])
    assert dense.rows_read(333) < dense.rows_read(334)
    with pytest.raises(NotImplementedError, match="one whole sequence"):
        dense(*(x.expand(2, -1, -1, -1) for x in (q, k, v)))


def test_dense_fma_with_exact_weights():
    options = {"block": 4, "near": 8, "rank": 2, "open": 2, "sinks": 3, "score": "mean"}
    q, k = (3 * torch.randn(1, heads, 99, 8) for heads in (4, 2))
    v = torch.eye(99).expand(1, 2, -1, -1)
    wanted = oracles.full(q.double(), k.double(), v.double(), causal=True)[0]
    i = torch.arange(99)
    far = (i >= 3) & (i // 4 < i[:, None] // 4 - 2)
    # the values of a group are averaged, its weight is that of its tokens
    got = load("fma_dense").DenseFMA(**options, exact=True)(q, k, v)
    for part in (far, ~far):
        assert_within((got * part).sum(-1), (wanted * part).sum(-1), terms=99)
    assert (got - wanted).abs().max() > 0.01


GUESSES = {
    "mass": lambda x, y: x @ y[0],
    "mean": lambda x, y: x @ y.mean(0),
    "normal": lambda x, y: x @ y.mean(0) + (x * x) @ ((y - y.mean(0)) ** 2).mean(0) / 2,
    "box": lambda x, y: torch.maximum(x * y.amin(0), x * y.amax(0)).sum(),
    "peak": lambda x, y: x @ y[((y - y.mean(0)) ** 2).sum(1).argmax()],
}
"""What a key of a segment is worth, the same for each of its tokens."""


def literally_chosen(q, k, v, options):
    """`Chosen`, one query of one head at a time."""
    block, near, sinks, picks, score, detail = (
        options[name] for name in ("block", "near", "sinks", "picks", "score", "detail")
    )
    least = options.get("least", 0.0)
    out, read = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), []
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys, values = (y[b, h // (q.shape[1] // k.shape[1])] for y in (k, v))
        x = q[b, h, i] * q.shape[3] ** -0.5
        seen = {j for j in range(i + 1) if i - j < near or j < sinks}
        scores = {}
        for first in range(0, i - near + 1, block):
            tokens = list(range(first, first + block))
            if tokens[-1] > i - near:
                seen |= {j for j in tokens if j <= i}
                continue
            parts = []
            for segment in torch.tensor(tokens).chunk(block if score == "mass" else detail):
                parts.append(len(segment) * GUESSES[score](x, keys[segment]).exp())
            scores[first] = sum(parts)
        total = sum(scores.values()) + sum((x @ keys[j]).exp() for j in range(i + 1) if i - j < near or j < sinks)
        best = sorted((first for first in scores if scores[first] >= least * total), key=lambda n: -scores[n])[:picks]
        seen |= {j for first in best for j in range(first, first + block)}
        seen = torch.tensor(sorted(seen))
        out[b, h, i] = (keys[seen] @ x).softmax(0) @ values[seen]
        read.append(len(seen))
    return out, sum(read) / len(read)


@pytest.mark.parametrize("score", GUESSES)
@pytest.mark.parametrize("more", [{"detail": 1}, {"detail": 4, "least": 0.05}], ids=str)
def test_chosen_blocks(score, more):
    options = {"block": 8, "near": 12, "sinks": 3, "picks": 2, "score": score, **more}
    mech = load("chosen").Chosen(**options)
    q, k, v = (torch.randn(1, heads, 75, 8, dtype=torch.float64) for heads in (2, 1, 1))
    wanted, rows = literally_chosen(q, k, v, options)
    assert_within(mech(q, k, v), wanted, terms=75)
    assert mech.rows_read(75) == pytest.approx(rows)
    assert mech.rows_read(76) is None
    with pytest.raises(ValueError, match="detail must divide block"):
        load("chosen").Chosen(block=8, detail=3)
