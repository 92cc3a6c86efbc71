"""prefix_softmax on a GPU: the kernels against float64 in PyTorch."""

from functools import partial

import drawn
import pytest
import torch

from farfield.ops.scan import Prefix, prefix_softmax
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


draw = partial(drawn.draw, dtype=torch.float64)


def problem(T=3001, H=4, G=2, E=64, size=1.0):
    scores, v = size * draw(2, H, T), draw(2, T, G, E, seed=1).transpose(1, 2)
    return [scores.float().double(), v, draw(2, H, seed=3), draw(2, H, seed=4).abs() + 0.5, draw(2, H, E, seed=5)]


def run(x):
    x = [t.detach().requires_grad_(i != 2) for i, t in enumerate(x)]
    out, end = prefix_softmax(x[0], x[1], Prefix(*x[2:]))
    leaves = [x[i] for i in (0, 1, 3, 4)]
    d = [draw(*t.shape, seed=i).to(t.dtype) for i, t in enumerate((out, end.mass, end.total))]
    return [out, end.mass, end.total, *torch.autograd.grad((out, end.mass, end.total), leaves, d)]


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (BF16, {}),
        (BF16, {"E": 128, "T": 100_001}),
        (BF16, {"E": 256, "G": 4}),
        (BF16, {"T": 1}),
        (BF16, {"T": 500, "E": 24, "size": 100.0}),
        (FP16, {"E": 80}),
        (FP32, {}),
        (FP32, {"E": 128, "size": 30.0}),
        (FP32, {"E": 200, "T": 700}),
    ],
    ids=str,
)
def test_against_float64(dtype, sizes):
    x = problem(**sizes)
    # float64 is PyTorch's
    exact = run(x)
    got = run([t.to(dtype) if i == 1 else t.float() for i, t in enumerate(x)])
    for name, a, b in zip(("out", "mass", "total", "ds", "dv", "d mass", "d total"), got, exact, strict=True):
        if dtype != FP32 and name in ("ds", "d mass", "d total"):
            # float32 out of products of the values' dtype
            a = a.to(dtype)
        assert_within(a, b, terms=2 * x[0].shape[2], name=name)


def test_hidden_tokens():
    x = problem(T=5000)
    x[0][..., :900] = float("-inf")
    x[0][..., 2000:4500] = float("-inf")
    leaves = [t.detach().requires_grad_() for t in x[:2]]
    small = [x[0].float().requires_grad_(), x[1].bfloat16().requires_grad_()]
    exact, got = (prefix_softmax(*t)[0] for t in (leaves, small))
    assert_within(got, exact, terms=5000)
    g = draw(*exact.shape, seed=9)
    right, mine = torch.autograd.grad(exact, leaves, g), torch.autograd.grad(got, small, g.bfloat16())
    assert_within(mine[0].bfloat16(), right[0], terms=5000)
    assert_within(mine[1], right[1], terms=5000)


def test_repeats_are_bitwise_equal():
    x = [t.bfloat16() if i == 1 else t.float() for i, t in enumerate(problem(T=9000))]
    first = run(x)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(x), first, strict=True))
