"""merge == one softmax over everything, values and gradients."""

import pytest
import torch

from farfield.ops.attend import attend
from farfield.ops.merge import merge
from farfield.select import static
from farfield.testing import oracles
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within
from farfield.types import Layout, Partial, Rows

B, H, G, T, D, E = 2, 4, 2, 40, 8, 6
NAMES = ("out", "lse", "q", "k1", "v1", "k2", "v2", "k3", "v3")


def sources(dtype):
    """Three sources: a window, a few far rows, and lists that are empty for half of the queries."""
    near = Rows(normal(B, G, T, D, seed=1, dtype=dtype), normal(B, G, T, E, seed=2, dtype=dtype))
    far = Rows(normal(B, G, 12, D, seed=3, dtype=dtype), normal(B, G, 12, E, seed=4, dtype=dtype))
    some = Rows(normal(B, G, 8, D, seed=5, dtype=dtype), normal(B, G, 8, E, seed=6, dtype=dtype))
    lists = torch.tensor([[[[0], [0], [0], [0], [0]]]], dtype=torch.int32)
    count = torch.tensor([[[0, 1, 0, 1, 0]]], dtype=torch.int32)
    found = [
        (near, static.window(tokens=T, width=7, block=8)),
        (far, static.full(tokens=T, rows=12, q_block=8, k_block=4)),
        (some, Layout(lists, count, 8, 8, T, 8)),
    ]
    for rows, _ in found:
        rows.k.requires_grad_()
        rows.v.requires_grad_()
    return found


def run(f, dtype, d_lse=True):
    q, reads = normal(B, H, T, D, dtype=dtype).requires_grad_(), sources(dtype)
    out, lse = f(q, reads)
    leaves = [q, *(x for rows, _ in reads for x in (rows.k, rows.v))]
    d_out = normal(*out.shape, seed=8, dtype=out.dtype)
    d_lse = normal(*lse.shape, seed=9, dtype=lse.dtype)
    return [out, lse, *torch.autograd.grad((out, lse), leaves, (d_out, d_lse))]


def merged(q, reads):
    result = merge(*(attend(q, rows, layout) for rows, layout in reads))
    return result.out, result.lse


def joint(q, reads):
    result = attend(q, reads)
    return result.out, result.lse


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_merge_equals_one_softmax(dtype):
    exact = run(oracles.attend, torch.float64)
    for name, a, b, want in zip(NAMES, run(merged, dtype), run(joint, dtype), exact, strict=True):
        assert_within(a, want, terms=T * H, name=f"merged {name}")
        assert_within(b, want, terms=T * H, name=f"joint {name}")


def test_merge_in_bfloat16_rounds_each_partial_once():
    exact = run(oracles.attend, torch.float64)
    got = run(merged, torch.bfloat16)
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    assert_within(got[0], exact[0], terms=T)
    assert_within(got[1], exact[1], terms=T, name="lse")


def test_the_order_does_not_matter_and_one_partial_is_itself():
    q, reads = normal(B, H, T, D, dtype=torch.float32), sources(torch.float32)
    parts = [attend(q, rows, layout) for rows, layout in reads]
    exact, lse = oracles.attend(q.double(), sources(torch.float64))
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        got = merge(*(parts[i] for i in order))
        assert_within(got.out, exact, terms=T)
        assert_within(got.lse, lse, terms=T)
    nested = merge(merge(parts[0], parts[1]), parts[2])
    assert_within(nested.out, exact, terms=T)
    assert merge(parts[0]) is parts[0] or torch.equal(merge(parts[0]).out, parts[0].out)


def test_what_read_nothing_stays_zero_and_minus_infinity_without_gradient():
    lse = torch.tensor([[[0.5, float("-inf"), float("-inf")]]], dtype=torch.float64)
    a = Partial(torch.ones(1, 1, 3, 2, dtype=torch.float64), lse.clone().requires_grad_())
    b = Partial(torch.zeros(1, 1, 3, 2, dtype=torch.float64), torch.full_like(lse, float("-inf")).requires_grad_())
    a.out[0, 0, 1:] = 0
    got = merge(a, b)
    assert got.lse.tolist() == [[[0.5, float("-inf"), float("-inf")]]]
    assert got.out[0, 0].tolist() == [[1, 1], [0, 0], [0, 0]]
    grads = torch.autograd.grad((got.out.sum(), got.lse.masked_fill(got.lse.isinf(), 0).sum()), (a.lse, b.lse))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, 0, 1:] == 0).all()
    assert (grads[1] == 0).all()


def test_large_lse_neither_overflow_nor_vanish():
    out = normal(1, 1, 4, 3)
    high = Partial(out, torch.full((1, 1, 4), 1e4, dtype=torch.float64))
    low = Partial(-out, torch.full((1, 1, 4), -1e4, dtype=torch.float64))
    assert torch.equal(merge(high, low).out, out)
    assert torch.equal(merge(low, high).out, out)
    assert torch.equal(merge(low, low).out, -out)
    doubled = low.lse + torch.tensor(2.0, dtype=torch.float64).log()
    assert_within(merge(low, low).lse, doubled, terms=2)


def test_gradcheck():
    outs = [normal(1, 2, 3, 2, seed=s).requires_grad_() for s in range(3)]
    lses = [normal(1, 2, 3, seed=s + 5).requires_grad_() for s in range(3)]

    def call(*x):
        result = merge(*(Partial(o, s) for o, s in zip(x[:3], x[3:], strict=True)))
        return result.out, result.lse

    assert torch.autograd.gradcheck(call, [*outs, *lses])
