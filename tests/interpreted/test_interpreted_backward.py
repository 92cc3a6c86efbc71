"""The backward kernels of attend in the interpreter, float32 and float16 only: bfloat16 it computes wrongly."""

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

import farfield as ff
from farfield.cpu.attend import forward
from farfield.kernels import attend_backward as kernels
from farfield.kernels.transpose import transpose
from farfield.select import algebra
from farfield.testing import calls
from farfield.testing.units import assert_within

SIZES = replace(
    calls.SMALL,
    batch=(1, 1, 2),
    kv_heads=(1, 1, 2),
    repeat=(1, 2),
    tokens=(1, 7, 19),
    q_block=(5, 16),
    rows=(1, 50, 130),
    k_block=(1, 3, 4, 16, 32, 48, 64),
    single=False,
)


def check(problem, dtype):
    """The kernels' gradients of a call against those of PyTorch in float64."""
    q, sources, (d_out, d_lse) = problem.q, problem.sources, problem.grads
    leaves = [q, *(r.k for r, _ in sources), *(r.v for r, _ in sources)]
    leaves += [r.bias for r, _ in sources if r.bias is not None]
    for x in leaves:
        x.requires_grad_()
    partial = ff.attend(q, sources, **problem.options)
    seen = partial.lse.isfinite()
    loss = (partial.out * d_out).sum() + (partial.lse.where(seen, 0.0) * d_lse).sum()
    exact = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        call = calls.arguments(problem.to(dtype))
        out, lse = forward(call)
        got = kernels.attend_backward(call, d_out.to(dtype), d_lse.float(), out, lse, True)
    got = [x for x in got if x.dim() > 1]
    terms = problem.terms + q.shape[1] * q.shape[2]
    for n, (a, b) in enumerate(zip(got, exact, strict=True)):
        # a bias is float32, but its gradient no better than out
        assert_within(a.to(dtype), b, terms=terms, name=f"gradient {n}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_random_calls(seed, dtype):
    check(calls.draw(seed, SIZES), dtype)


@pytest.mark.parametrize("k_block", [2, 32])
def test_row_blocks_with_many_readers_are_added_up_in_pieces(k_block, monkeypatch):
    monkeypatch.setattr(kernels, "PIECE", 2)
    monkeypatch.setattr(kernels, "READS", 2)
    gen = torch.Generator().manual_seed(0)
    # everybody reads row block 0, nobody the last
    index = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 0], [0, 3], [0, 0], [0, 2]], dtype=torch.int32)[None, None]
    count = torch.tensor([2, 2, 2, 1, 2, 1, 2], dtype=torch.int32)[None, None]
    layout = ff.Layout(index, count, 4, k_block, 27, 5 * k_block - 1)
    q, d_out = (torch.randn(1, 2, 27, 16, generator=gen).half().double() for _ in range(2))
    k, v = (torch.randn(1, 2, layout.rows, 16, generator=gen).half().double() for _ in range(2))
    bias = torch.randn(1, 2, layout.rows, generator=gen).double()
    problem = calls.Problem(q, [(ff.Rows(k, v, bias=bias), layout)], grads=(d_out, d_out[..., 0]))
    check(problem, torch.float32)


def test_transposed_lists():
    gen = torch.Generator().manual_seed(0)
    order = torch.rand(2, 3, 9, 7, generator=gen).argsort(-1)
    index = [order[..., :4].sort(-1).values.int(), order[:1, :1, :, 3:5].sort(-1).values.int()]
    count = [torch.randint(0, x.shape[-1] + 1, x.shape[:3], generator=gen, dtype=torch.int32) for x in index]
    found = transpose(index, count, [7, 7], [False, True], [64, 4])
    for x, c, whole, readers in zip(index, count, (False, True), found, strict=True):
        expected = algebra.transpose(ff.Layout(x, c, 1, 1, 9, 7))
        starts = readers.start.view_as(expected.start)
        assert torch.equal(starts - starts[..., :1], expected.start)
        for b in range(x.shape[0]):
            for h in range(x.shape[1]):
                got = readers.reader[starts[b, h, 0] : starts[b, h, -1]]
                picks = x.shape[-1] if whole else 1
                assert torch.equal(got // picks, expected.query[b, h, : len(got)])
    assert [x.pieces for x in found] == [0, 2 * 18 // 4 + 1]


def _near(q, d_out, out, k, v, d_q, delta, shift, lse, d_lse, index, count, lists, *, scale, **rest):
    """In place of the kernel for Hopper: what the blocks of 64 give dq, in PyTorch."""
    for h in range(q.shape[1]):
        for n in range(index.shape[2]):
            here = slice(64 * n, min(64 * n + 64, q.shape[2]))
            i = torch.arange(here.start, here.stop)[:, None]
            named = index[0, 0, n, : int(count[0, 0, n])]
            row = torch.cat([torch.arange(64 * m, min(64 * m + 64, k.shape[2])) for m in named.tolist()])
            x, d, keys, values = (y.float() for y in (q[0, h, here], d_out[0, h, here], k[0, 0, row], v[0, 0, row]))
            weights = (x @ keys.T * scale - lse[0, h, here, None]).exp().where(row <= i, 0.0)
            less = (out[0, h, here].float() * d).sum(-1) - d_lse[0, h, here]
            d_q[0, h, here] = (scale * (weights * (d @ values.T - less[:, None])) @ keys).to(d_q.dtype)


@pytest.mark.parametrize("apart", [False, True])
def test_many_blocks_beside_single_rows(apart, monkeypatch):
    """They are read in larger tiles, or by a kernel of their own, to whose dq the rest is added."""
    monkeypatch.setattr(kernels, "LONG", 3)
    if apart:
        monkeypatch.setattr(kernels.hopper_queries, "wants_queries", lambda *given: True)
        monkeypatch.setattr(kernels.hopper_queries, "queries_backward", _near)
    gen = torch.Generator().manual_seed(1)
    tokens = 200
    q, d_out = (torch.randn(1, 1, tokens, 16, generator=gen).half().double() for _ in range(2))
    k, v = (torch.randn(1, 1, tokens, 16, generator=gen).half().double() for _ in range(2))
    far_k, far_v = (torch.randn(1, 1, 24, 16, generator=gen).half().double() for _ in range(2))
    index = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 2], [0, 2, 3]], dtype=torch.int32)[None, None]
    count = torch.tensor([1, 2, 3, 3], dtype=torch.int32)[None, None]
    far_index = torch.rand(4, 6, generator=gen).argsort(-1)[:, :3].sort(-1).values.int()[None, None]
    far_count = torch.tensor([0, 3, 2, 3], dtype=torch.int32)[None, None]
    near = ff.Layout(index, count, 64, 64, tokens, tokens, True)
    far = ff.Layout(far_index, far_count, 64, 4, tokens, 24)
    bias = torch.randn(1, 1, 24, generator=gen).double()
    sources = [(ff.Rows(k, v), near), (ff.Rows(far_k, far_v, bias=bias), far)]
    check(calls.Problem(q, sources, grads=(d_out, d_out[..., 0])), torch.float16)
