"""Decoding on a GPU: the ring's kernel, attend for few queries, and both as a CUDA graph."""

import os
from dataclasses import replace

import pytest
import torch

import farfield as ff
from farfield.nn import Rope
from farfield.ring import FMARing
from farfield.summarize import FilterPool, MeanPool
from farfield.testing import calls, contract, inputs
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

CASES = int(os.environ.get("FARFIELD_CASES", "200"))
FIRST = int(os.environ.get("FARFIELD_SEED", "0"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = replace(
    calls.GPU,
    batch=(1, 2, 3, 70),
    tokens=(1, 1, 2, 5, 12),
    q_block=(1, 5, 16, 64),
    rows=(1, 30, 200, 513, 3000),
    picks=300,
)


@pytest.fixture(autouse=True)
def filled_memory():
    """What no kernel has written is NaN."""
    with inputs.on("cuda"), contract.poisoned_memory():
        yield


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_random_calls(seed):
    problem = calls.draw(seed, SIZES, "cuda")
    exact = ff.attend(problem.q, problem.sources, **problem.options)
    small = problem.to(problem.dtype)
    got = ff.attend(small.q, small.sources, **small.options)
    assert_within(got.out, exact.out, terms=problem.terms, name=f"out, seed {seed}, {small.dtype}")
    assert_within(got.lse, exact.lse, terms=problem.terms, name=f"lse, seed {seed}, {small.dtype}")
    again = ff.attend(small.q, small.sources, **small.options)
    assert torch.equal(again.out, got.out)
    assert torch.equal(again.lse, got.lse)


def setting(options, dtype, tokens=700, batch=2, width=64):
    """A mechanism, its rotation, q, k, v, and one forward in float64."""
    options = dict(options)
    pool = FilterPool(2, options["rank"]) if options.pop("learned", False) else MeanPool()
    if isinstance(pool, FilterPool):
        torch.nn.init.constant_(pool.gate, 0.5)
    rotary = Rope(width) if options.pop("rope", False) else None
    mech = ff.FMA(pool=pool.cuda(), **options)
    x = [torch.randn(batch, h, tokens, width, device="cuda").bfloat16() for h in (8, 2, 2)]
    with torch.no_grad():
        exact = mech.double()(*(y.double() for y in x), rotary=rotary)
        mech.float()
    return mech, rotary, [y.to(dtype) for y in x], exact


def ring_at(mech, rotary, x, tokens, capacity=1 << 14):
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :tokens] for y in x), rotary=rotary)
    return FMARing.from_state(state, capacity=capacity, sinks=mech.sinks, pool=mech.pool, rotary=rotary)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"block": 64, "near": 64, "rank": 4},
        {"block": 16, "near": 48, "rank": 1, "sinks": 5},
        {"block": 32, "near": 64, "rank": 16, "sinks": 32, "learned": True},
        {"block": 64, "near": 128, "rank": 16, "learned": True, "rope": True},
        {"block": 24, "near": 24, "rank": 3, "rope": True},
    ],
    ids=str,
)
def test_steps_are_those_of_a_forward(options, dtype):
    mech, rotary, x, exact = setting(options, dtype)
    for start in (0, 99, 512):
        ring = ring_at(mech, rotary, x, start)
        outs = [ring.step(*(y[:, :, t : t + 1] for y in x)) for t in range(start, 700)]
        assert_within(torch.cat(outs, 2), exact[:, :, start:], terms=700, name=f"from {start}")


def test_one_graph_serves_every_token():
    mech, rotary, x, exact = setting({"block": 64, "near": 128, "rank": 16, "rope": True}, torch.bfloat16)
    ring = ring_at(mech, rotary, x, 100)
    start = ring.copy()
    token = [y[:, :, :1].clone() for y in x]
    # compiled before it is captured
    ring.copy().step(*token)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ring.step(*token)

    def replayed(first, last):
        outs = []
        for t in range(first, last):
            for into, y in zip(token, x, strict=True):
                into.copy_(y[:, :, t : t + 1])
            graph.replay()
            outs.append(out.clone())
        return torch.cat(outs, 2)

    got = replayed(100, 700)
    assert_within(got, exact[:, :, 100:], terms=700)
    # other values in the same buffers
    for name, y in ring.tensors().items():
        y.copy_(start.tensors()[name])
    assert torch.equal(replayed(100, 200), got[:, :, :100])


def test_repeats_are_bitwise_equal():
    mech, rotary, x, _ = setting({"block": 64, "near": 64, "rank": 4}, torch.bfloat16)
    ring = ring_at(mech, rotary, x, 640)
    here = [y[:, :, 640:641] for y in x]
    first = ring.copy()
    out = first.step(*here)
    for _ in range(250):
        again = ring.copy()
        assert torch.equal(again.step(*here), out)
        assert all(torch.equal(y, first.tensors()[name]) for name, y in again.tensors().items())


def test_past_the_capacity_outputs_are_nan():
    ring = FMARing.empty(2, 1, 16, capacity=64, block=16, near=16, rank=4, device="cuda")
    x = torch.randn(2, 1, 1, 16, device="cuda")
    ring.clock.fill_(ring.capacity - 16)
    for _ in range(16):
        assert ring.step(x, x, x).isfinite().all()
    assert ring.step(x, x, x).isnan().all()
    ring.reset_()
    assert ring.step(x, x, x).isfinite().all()


def test_compiles():
    mech, rotary, x, exact = setting({"block": 64, "near": 64, "rank": 4}, torch.float32)
    ring = ring_at(mech, rotary, x, 690)
    step = torch.compile(lambda *token: ring.step(*token), fullgraph=True)
    outs = [step(*(y[:, :, t : t + 1] for y in x)) for t in range(690, 700)]
    assert_within(torch.cat(outs, 2), exact[:, :, 690:], terms=700)
