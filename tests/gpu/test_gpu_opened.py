"""Opened FMA on the GPU: numbers, gradients and causality there, and a CUDA graph of the forward."""

import pytest
import torch

from farfield.mechanisms.fma import FMA
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

OPTIONS = {"block": 64, "near": 128, "rank": 16, "open": 2, "beam": 4, "detail": 4}


def draw(tokens, dtype, *, heads=8, kv_heads=2, width=64):
    gen = torch.Generator().manual_seed(0)
    # what bfloat16 holds, so that every dtype makes the same choices
    return [
        torch.randn(1, h, tokens, width, generator=gen).bfloat16().to("cuda", dtype)
        for h in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("score", ["peak", "box"])
def test_forward_and_backward(dtype, shared, score):
    mech = FMA(**OPTIONS, shared=shared, score=score)
    exact_in = [x.requires_grad_() for x in draw(1003, torch.float64)]
    exact = mech(*exact_in)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to("cuda")
    wanted = torch.autograd.grad((exact * weights).sum(), exact_in)
    x = [t.requires_grad_() for t in draw(1003, dtype)]
    out = mech(*x)
    assert_within(out, exact.detach(), terms=1003)
    for name, got, want in zip("qkv", torch.autograd.grad((out * weights).sum(), x), wanted, strict=True):
        assert_within(got, want, terms=1003, name=f"d{name}")


def test_float64_equals_the_definition():
    mech = FMA(**OPTIONS).double()
    x = draw(700, torch.float64)
    with torch.device("cuda"):
        exact = mech.reference(*x)
    assert_within(mech(*x), exact, terms=700)


def test_the_future_reaches_no_output():
    mech, x = FMA(**OPTIONS), draw(1003, torch.bfloat16)
    after = mech(*(torch.cat([t[:, :, :600], -3 * t[:, :, 600:] + 1], 2) for t in x))
    assert torch.equal(after[:, :, :600], mech(*x)[:, :, :600])


def test_a_graph_replays_it():
    mech, x = FMA(**OPTIONS), draw(1003, torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            mech(*x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mech(*x)
        for t in x:
            t.copy_(t.flip(1))
        graph.replay()
        assert torch.equal(out, mech(*x))
