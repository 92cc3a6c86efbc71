"""The attend kernel in the interpreter, float32 and float16 only: bfloat16 it computes wrongly."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

import farfield as ff
from farfield.kernels import attend_hopper
from farfield.kernels.attend import refusal
from farfield.kernels.launch import attend_forward
from farfield.testing import calls, oracles
from farfield.testing.units import assert_within


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_random_calls(seed, dtype, monkeypatch):
    monkeypatch.setattr(attend_hopper, "on_hopper", lambda device: False)
    problem = calls.draw(seed, calls.SMALL)
    out, lse = oracles.attend(problem.q, problem.sources, **problem.options)
    got, got_lse = attend_forward(calls.arguments(problem.to(dtype)))
    assert_within(got, out, terms=problem.terms)
    assert_within(got_lse, lse, terms=problem.terms, name="lse")


def test_refusals_say_why():
    def call(q, v, sources=1):
        layout = ff.select.full(tokens=4, rows=4)
        return calls.arguments(calls.Problem(q, [(ff.Rows(q, v), layout)] * sources))

    q, wide = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 4, 300)
    assert refusal(call(q, q)) is None
    assert refusal(call(q.double(), q)) == "takes bfloat16, float16 and float32, not torch.float64"
    assert refusal(call(q, wide)) == "takes widths up to 256, got D=16 and E=300"
    assert refusal(call(q, q, 3)) == "takes 2 sources, got 3"
