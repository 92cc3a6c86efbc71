"""The controls in examples/controls: what the tables of the documentation compare with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from farfield.mechanisms.fma import FMA
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


def test_near_field_is_fma_without_far_field():
    kind = load("near_field").NearField
    near = kind(block=8, near=16, sinks=3)
    for tokens in (1, 8, 24, 25, 101):
        q, k, v = (torch.randn(2, heads, tokens, 16) for heads in (4, 2, 2))
        assert_within(near(q, k, v), near.reference(q.double(), k.double(), v.double()), terms=tokens)
    # FMA reads the same as long as nothing is far
    q, k, v = (torch.randn(1, 2, 24, 16) for _ in range(3))
    fma = FMA(block=8, near=16, rank=4, sinks=3)
    assert_within(near(q, k, v), fma.reference(q.double(), k.double(), v.double()), terms=24)
    i = torch.arange(101)
    seen = ((i[:, None] // 8 - i // 8 <= 2) | (i < 3)) & (i <= i[:, None])
    assert near.rows_read(101) == pytest.approx(float(seen.sum()) / 101)


@pytest.mark.parametrize("score", ["peak", "box"])
def test_dense_fma_is_fma(score):
    kind = load("fma_dense").DenseFMA
    options = {"block": 4, "near": 8, "rank": 2, "open": 3, "sinks": 3, "score": score}
    q, k, v = (torch.randn(1, heads, 333, 16, dtype=torch.float64) for heads in (6, 2, 2))
    wanted = FMA(**options)(q, k, v)
    assert_within(kind(**options)(q.float(), k.float(), v.float()), wanted, terms=333)
    with pytest.raises(NotImplementedError, match="one whole sequence"):
        kind(**options, shared=False)(q, k, v)
