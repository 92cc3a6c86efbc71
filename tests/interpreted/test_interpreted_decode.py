"""append and attend for few queries in the interpreter, float32 and float16 only: bfloat16 it computes wrongly."""

import os
from dataclasses import replace
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

import farfield as ff
from farfield.kernels import attend_decode as decode
from farfield.kernels.append import launch, refusal
from farfield.kernels.attend import Tiles
from farfield.nn import Rope
from farfield.ops import append as op
from farfield.ring import FMARing
from farfield.summarize import FilterPool, MeanPool
from farfield.testing import calls, oracles
from farfield.testing.units import assert_within


def appended(ring, q, k, v, implementation):
    call = op.Append(q, k, v, **{name: x for name, x in ring.tensors().items() if name != "near_index"}, plan=ring.plan)
    return implementation(call)


CASES = (
    {"block": 8, "near": 16, "rank": 1, "sinks": 3},
    {"block": 16, "near": 48, "rank": 16, "sinks": 5, "learned": True},
    {"block": 8, "near": 16, "rank": 2, "sinks": 8, "learned": True, "rope": True},
    {"block": 6, "near": 12, "rank": 3, "rope": True},
)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_append_writes_what_pytorch_writes(options):
    options = dict(options)
    learned, heads = options.pop("learned", False), 1
    pool = MeanPool()
    if learned:
        heads, pool = 2, FilterPool(2, options["rank"])
        torch.nn.init.constant_(pool.gate, 0.6)
    rotary = Rope(20, share=0.5) if options.pop("rope", False) else None
    ring = FMARing.empty(1, heads, 20, 8, capacity=200, pool=pool, rotary=rotary, **options)
    # sequences at two positions, the second just before a block opens that moves up three levels
    tokens = 8 * options["block"] - 1
    with torch.no_grad():
        x = (torch.randn(1, heads, tokens, n) for n in (20, 20, 8))
        _, state = ff.FMA(pool=pool, **options).extend(*x, rotary=rotary)
    there = FMARing.from_state(state, capacity=200, sinks=options.get("sinks", 0), pool=pool, rotary=rotary)
    ring = FMARing.join([ring, there])
    other = ring.copy()
    for t in range(options["block"] + 4):
        q, k = torch.randn(2, 2 * heads, 1, 20), torch.randn(2, heads, 1, 20)
        v = torch.randn(2, 1, heads, 8).transpose(1, 2)
        a = appended(ring, q, k, v, launch)
        b = appended(other, q, k, v, op._append)
        if rotary is not None:
            assert_within(a, b.double(), terms=20, name=f"q at {t}")
        for name, x in other.tensors().items():
            y = getattr(ring, name)
            if not x.is_floating_point():
                assert torch.equal(x, y), f"{name} at {t}"
            elif x.numel():
                assert_within(y, x.double(), terms=20, name=f"{name} at {t}")


def test_past_the_capacity_rows_are_nan():
    ring = FMARing.empty(1, 1, 16, capacity=10, block=4, near=4, rank=2)
    assert ring.capacity == 16
    x = torch.randn(1, 1, 1, 16)
    for _ in range(ring.capacity):
        appended(ring, x, x, x, launch)
    assert ring.near_k.isfinite().all()
    appended(ring, x, x, x, launch)
    assert ring.near_k[:, :, 0].isnan().all()
    with pytest.raises(ValueError, match=r"reaches back over 16 tokens and is full"):
        appended(ring, x, x, x, op._append)
    ring.reset_()
    appended(ring, x, x, x, launch)
    assert ring.near_k.isfinite().all()


def test_append_refuses_in_words():
    def why(dtype, width):
        ring = FMARing.empty(1, 1, width, capacity=10, block=4, near=4, rank=2, dtype=dtype)
        x = torch.zeros(1, 1, 1, width, dtype=dtype)
        return appended(ring, x, x, x, refusal)

    assert why(torch.float16, 16) is None
    assert why(torch.float64, 16) == "takes bfloat16, float16 and float32, not torch.float64"
    assert why(torch.float32, 300) == "takes widths up to 256, got D=300 and E=300"


@pytest.mark.parametrize("splits", [1, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_random_calls(seed, splits):
    dtype = (torch.float32, torch.float16)[(seed + splits) % 2]
    problem = calls.draw(seed, replace(calls.SMALL, tokens=(1, 2, 7), rows=(1, 20, 130)))
    out, lse = oracles.attend(problem.q, problem.sources, **problem.options)
    call = calls.arguments(problem.to(dtype))
    assert decode.wants(call)
    with mock.patch.object(decode, "_tiles", return_value=Tiles(16, 16, 4, 2, splits, 8)):
        got, got_lse = decode.attend_decode(call)
    assert_within(got, out, terms=problem.terms)
    assert_within(got_lse, lse, terms=problem.terms, name="lse")


def test_wants_few_queries():
    def call(heads, tokens, dtype=torch.float32):
        q, k = torch.zeros(1, heads, tokens, 16, dtype=dtype), torch.zeros(1, 1, tokens, 16, dtype=dtype)
        return calls.arguments(calls.Problem(q, [(ff.Rows(k, k), ff.select.full(tokens=tokens))]))

    assert decode.wants(call(4, 16))
    assert not decode.wants(call(4, 17))
    assert not decode.wants(call(4, 16, torch.float64))
