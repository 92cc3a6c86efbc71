"""The backward kernels of attend in the interpreter, float32 and float16 only: bfloat16 it computes wrongly."""

import os
import random

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

import farfield as ff
from farfield.cpu.attend import forward
from farfield.kernels import attend_backward as kernels
from farfield.kernels.transpose import transpose
from farfield.ops.attend import Call, Plan
from farfield.select import algebra
from farfield.testing.units import assert_within

K_BLOCKS = (1, 3, 4, 16, 32, 48, 64)


def arguments(q, sources, position=None, group=None):
    """The same call for an implementation."""
    none = q.new_empty(0)

    def per_head(x):
        return none if x is None else x[None, None] if x.dim() == 1 else x

    plans = [Plan(p.q_block, p.k_block, p.causal, -1 if p.reach is None else p.reach, p.sinks) for _, p in sources]
    rows = [r for r, _ in sources]
    bias, end, row_group = ([per_head(getattr(r, name)) for r in rows] for name in ("bias", "end", "group"))
    return Call(
        q, [r.k for r in rows], [r.v for r in rows], bias, end, row_group, per_head(position), per_head(group),
        [p.index for _, p in sources], [p.count for _, p in sources], plans, q.shape[-1] ** -0.5,
    )  # fmt: skip


def problem(seed):
    """A random call in float64, its inputs leaves."""
    pick, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, tokens = pick.choice([1, 1, 2]), pick.choice([1, 1, 2]), pick.choice([1, 7, 19])
    heads, width, value_width = kv_heads * pick.choice([1, 2]), pick.choice([16, 24]), pick.choice([16, 40])
    q_block = pick.choice([1, 5, 16] if tokens < 10 else [5, 16])

    def draw(*shape):
        return torch.randn(shape, generator=gen).half().double()

    grouped = pick.random() < 0.3
    sources = []
    for _ in range(pick.choice([1, 2])):
        k_block = pick.choice(K_BLOCKS)
        rows = pick.choice([1, 3 * k_block, 3 * k_block + 1])
        blocks, row_blocks = -(-tokens // q_block), -(-rows // k_block)
        picks = pick.choice([0, row_blocks, row_blocks, row_blocks])
        lead = pick.choice([1, batch]), pick.choice([1, heads])
        order = torch.rand(*lead, blocks, row_blocks, generator=gen).argsort(-1)
        index = order[..., :picks].sort(-1).values.to(torch.int32)
        count = torch.randint(0, picks + 1, (*lead, blocks), generator=gen, dtype=torch.int32)
        causal, reach = pick.random() < 0.5, pick.choice([None, None, 9])
        layout = ff.Layout(index, count, q_block, k_block, tokens, rows, causal, reach, pick.choice([0, 3]))
        extra = {}
        if pick.random() < 0.5:
            extra["bias"] = draw(pick.choice([1, batch]), pick.choice([1, kv_heads, heads]), rows).requires_grad_()
        if pick.random() < 0.5:
            extra["end"] = torch.randint(0, 40, (1, kv_heads, rows), generator=gen)
        if grouped:
            extra["group"] = torch.randint(0, 2, (1, 1, rows), generator=gen)
        k = draw(batch, rows, kv_heads, width).transpose(1, 2).requires_grad_()
        v = draw(batch, kv_heads, rows, value_width).requires_grad_()
        sources.append((ff.Rows(k, v, **extra), layout))
    options = {}
    if pick.random() < 0.5:
        options["position"] = torch.randint(0, 40, (tokens,), generator=gen)
    if grouped:
        options["group"] = torch.randint(0, 2, (batch, 1, tokens), generator=gen)
    grads = draw(batch, tokens, heads, value_width).transpose(1, 2), draw(batch, heads, tokens)
    return draw(batch, heads, tokens, width).requires_grad_(), sources, options, grads


def check(q, sources, options, grads, dtype):
    """The kernels' gradients of a call against those of PyTorch in float64."""
    leaves = [q, *(r.k for r, _ in sources), *(r.v for r, _ in sources)]
    leaves += [r.bias for r, _ in sources if r.bias is not None]
    partial = ff.attend(q, sources, **options)
    seen = partial.lse.isfinite()
    loss = (partial.out * grads[0]).sum() + (partial.lse.where(seen, 0.0) * grads[1]).sum()
    exact = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        small = [
            (ff.Rows(r.k.to(dtype), r.v.to(dtype), r.end, None if r.bias is None else r.bias.float(), r.group), p)
            for r, p in sources
        ]
        call = arguments(q.to(dtype), small, **options)
        out, lse = forward(call)
        got = kernels.attend_backward(call, grads[0].to(dtype), grads[1].float(), out, lse, True)
    got = [x for x in got if x.dim() > 1]
    terms = sum(len(r) for r, _ in sources) + q.shape[1] * q.shape[2]
    for n, (a, b) in enumerate(zip(got, exact, strict=True)):
        # a bias is float32, but its gradient no better than out
        assert_within(a.to(dtype), b, terms=terms, name=f"gradient {n}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seed", [0, 2, 4, 8, 9, 11])
def test_random_calls(seed, dtype):
    check(*problem(seed), dtype)


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
    k, v = (torch.randn(1, 2, layout.rows, 16, generator=gen).half().double().requires_grad_() for _ in range(2))
    bias = torch.randn(1, 2, layout.rows, generator=gen).double().requires_grad_()
    check(q.requires_grad_(), [(ff.Rows(k, v, bias=bias), layout)], {}, (d_out, d_out[..., 0]), torch.float32)


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
