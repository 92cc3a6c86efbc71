"""The attend kernel on a GPU against the same call in float64."""

import os

import pytest
import torch

import farfield as ff
from farfield.testing import calls, contract, inputs
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

CASES = int(os.environ.get("FARFIELD_CASES", "200"))
FIRST = int(os.environ.get("FARFIELD_SEED", "0"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_random_calls(seed):
    problem = calls.draw(seed, device="cuda")
    exact = ff.attend(problem.q, problem.sources, **problem.options)
    small = problem.to(problem.dtype)
    with inputs.on("cuda"), contract.poisoned_memory():
        got = ff.attend(small.q, small.sources, **small.options)
    assert_within(got.out, exact.out, terms=problem.terms, name=f"out, seed {seed}, {small.dtype}")
    assert_within(got.lse, exact.lse, terms=problem.terms, name=f"lse, seed {seed}, {small.dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bitwise_equal(dtype):
    problem = calls.draw(7, device="cuda").to(dtype)
    first = ff.attend(problem.q, problem.sources, **problem.options)
    for _ in range(250):
        again = ff.attend(problem.q, problem.sources, **problem.options)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"sinks": 3}, {"near": 64, "rank": 4}, {"causal": False}, {"causal": False, "queries": "pooled"}],
    ids=str,
)
def test_fma_forward_and_backward(options, dtype):
    mech = ff.FMA(**options)
    x = [torch.randn(2, h, 1000, 64, device="cuda").bfloat16().double().requires_grad_() for h in (4, 2, 2)]
    y = [t.detach().to(dtype).requires_grad_() for t in x]
    exact, got = mech(*x), mech(*y)
    assert_within(got, exact, terms=1000)
    grad = torch.randn(exact.shape, device="cuda").bfloat16()
    exact.backward(grad.double())
    got.backward(grad.to(dtype))
    for a, b, name in zip(y, x, "qkv", strict=True):
        assert_within(a.grad, b.grad, terms=1000, name=f"d{name}")


def test_decoding():
    mech = ff.FMA()
    q, k, v = (torch.randn(2, h, 700, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    exact = mech(*(x.double() for x in (q, k, v)))
    state, outs = None, []
    for start, stop in [(0, 500), *((t, t + 1) for t in range(500, 700))]:
        here = slice(start, stop)
        out, state = mech.extend(q[:, :, here], k[:, :, here], v[:, :, here], state)
        outs.append(out)
    assert_within(torch.cat(outs, 2), exact, terms=700)
