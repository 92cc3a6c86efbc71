"""FMA with a horizon on the GPU: numbers, gradients, decoding, and what lies beyond."""

import warnings
from typing import Any

import pytest
import torch

from farfield.mechanisms.fma import FMA
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "plain": ({"near": 64, "rank": 4}, 4, 64),
    "plain, shared heads": ({"rank": 16}, 2, 64),
    "plain, wide blocks": ({"block": 128, "near": 128, "rank": 16}, 4, 128),
    "sinks": ({"rank": 4, "sinks": 5}, 2, 64),
    "opened": ({"near": 64, "rank": 4, "sinks": 3, "open": 2}, 2, 64),
    "opened by runs": ({"rank": 4, "sinks": 3, "open": 4, "hold": 64}, 2, 64),
}


def draw(tokens, dtype, kv_heads, width):
    gen = torch.Generator().manual_seed(0)
    # what bfloat16 holds, so that every dtype makes the same choices
    return [
        torch.randn(1, h, tokens, width, generator=gen).bfloat16().to("cuda", dtype) for h in (4, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("case", CASES)
def test_forward_backward_and_decoding(case):
    options, kv_heads, width = CASES[case]
    mech, tokens = FMA(**options, horizon=1024), 3003
    exact_in = [x.requires_grad_() for x in draw(tokens, torch.float64, kv_heads, width)]
    exact = mech(*exact_in)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to("cuda")
    wanted = torch.autograd.grad((exact * weights).sum(), exact_in)
    exact = exact.detach()
    x = [t.requires_grad_() for t in draw(tokens, torch.bfloat16, kv_heads, width)]
    with warnings.catch_warnings():
        # kernels take it
        warnings.simplefilter("error")
        out = mech(*x)
        assert_within(out, exact, terms=tokens)
        for name, got, want in zip("qkv", torch.autograd.grad((out * weights).sum(), x), wanted, strict=True):
            assert_within(got, want, terms=tokens, name=f"d{name}")
        with torch.no_grad():
            other = [t.clone() for t in x[1:]]
            for t in other:
                t[:, :, mech.sinks : 1500] = 3.0
            assert torch.equal(mech(x[0], *other)[:, :, -100:], out[:, :, -100:])
            outs, state, at = [], None, 0
            for many in (1000, 777, 1, 500):
                part, state = mech.extend(*(t[:, :, at : at + many] for t in x), state)
                outs.append(part)
                at += many
            assert_within(torch.cat(outs, 2), exact[:, :, :at], terms=tokens)
            ring = mech.ring(state, capacity=4096, heads=4)
            steps = [mech.step(*(y[:, :, t : t + 1] for y in x), ring) for t in range(at, at + 130)]
            assert_within(torch.cat(steps, 2), exact[:, :, at : at + 130], terms=tokens)
            if not mech.open:
                assert_within(mech(*draw(tokens, torch.float32, kv_heads, width)), exact, terms=tokens)
