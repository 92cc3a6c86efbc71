"""The kernels of choices by score in the interpreter: rows and their attention, blocks, compression, gates."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.cpu.choose import choose as literal
from farfield.kernels import choose as kernel
from farfield.kernels import compress, fan, means, mix
from farfield.kernels.choose_backward import ended_backward
from farfield.ops.choose import Scoring
from farfield.ops.compress import gradients
from farfield.ops.mix import mix as exact_mix
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within

F16, F32, F64 = torch.float16, torch.float32, torch.float64


def attended(q, keys, values, stride, span, first, scale):
    """out and lse in float64."""
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
    last = first + torch.arange(q.shape[2])[:, None]
    past = torch.arange(keys.shape[2]) * stride + span - 1 <= last
    logits = (q @ keys.mT * scale).masked_fill(~past, float("-inf"))
    some = past.any(-1)
    lse = torch.where(some[:, None], logits, 0.0).logsumexp(-1)
    weights = torch.where(some[:, None], logits, 0.0).softmax(-1) * some[:, None]
    return weights @ values, torch.where(some, lse, float("-inf"))


@pytest.mark.parametrize(("stride", "span", "first"), [(4, 8, 0), (2, 2, 3), (16, 32, 70)])
def test_rows_that_end_and_their_gradients(stride, span, first):
    tokens, width, value_width = 150, 16, 24
    rows = (tokens + first - span) // stride + 1
    q, d_out = (normal(1, 4, tokens, n, seed=n, dtype=F16) for n in (width, value_width))
    keys, values = (normal(1, 2, rows, n, seed=n + 1, dtype=F32) for n in (width, value_width))
    planes, low = kernel.split(keys, values, F16, 4)
    assert planes.shape[3] % 4 == 0
    assert torch.equal(low, values.half())
    assert_within(planes[:, :, :, :rows].double().sum(0).float(), keys.double(), terms=1)
    out, lse = kernel.attend_ended(q, planes, rows, low, stride, span, first, 0.3)
    wide = [x.double().requires_grad_() for x in (q, keys, values)]
    exact = attended(*wide, stride, span, first, 0.3)
    assert_within(out, exact[0], terms=rows)
    assert_within(lse, exact[1], terms=rows, name="lse")
    d_lse = normal(*lse.shape, seed=5, dtype=F32)
    given = [d_out.double(), d_lse.double().where(exact[1].isfinite(), 0.0)]
    want = torch.autograd.grad(exact, wide, given)
    got = ended_backward(q, keys, values, d_out, d_lse, out, lse, stride, span, first, 0.3)
    for name, a, b in zip(("dq", "d keys", "d values"), got, want, strict=True):
        assert_within(a.half(), b, terms=tokens, name=name)


def test_gradients_cancel_over_the_rows():
    """Where every query reads all rows, a shift of all keys changes no weight: only rounding is left."""
    q, d_out = (normal(1, 2, 600, 16, seed=n, dtype=F16) for n in (1, 2))
    keys, values = (normal(1, 1, 20, 16, seed=n, dtype=F32) for n in (3, 4))
    planes, low = kernel.split(keys, values, F16)
    out, lse = kernel.attend_ended(q, planes, 20, low, 4, 8, 200, 0.25)
    _, d_keys, _ = ended_backward(q, keys, values, d_out, None, out, lse, 4, 8, 200, 0.25)
    unit = (d_keys - d_keys.half()).square().mean().sqrt()
    # delta of the out in 16 bits would leave twice as much
    assert d_keys.sum(2).square().mean().sqrt() <= 1.6 * 20**0.5 * unit


def test_gradients_of_rows_at_huge_logits_are_finite():
    q, keys = 100 * normal(1, 2, 90, 16, dtype=F16), 100 * normal(1, 1, 20, 16, seed=1, dtype=F32)
    values = normal(1, 1, 20, 16, seed=2, dtype=F32)
    planes, low = kernel.split(keys, values, F16)
    out, lse = kernel.attend_ended(q, planes, 20, low, 4, 8, 0, 0.25)
    for x in ended_backward(q, keys, values, q / 100, None, out, lse, 4, 8, 0, 0.25):
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("scoring", "first"),
    [
        (Scoring(16, 6, 4, 8, 1, 2), 0),
        (Scoring(16, 6, 4, 8, 1, 2), 37),
        (Scoring(8, 4, 8, 8), 0),
        (Scoring(8, 4, 4, 24, 0, 1), 5),
        (Scoring(8, 3, 8, 8, shared=False), 0),
    ],
    ids=str,
)
def test_best_blocks(scoring, first):
    tokens, rows = 130, (130 + first - scoring.span) // scoring.stride + 1
    q, keys = normal(2, 4, tokens, 16, dtype=F16), normal(2, 2, rows, 16, seed=1, dtype=F32)
    planes, _ = kernel.split(keys, None, F16, scoring.block // scoring.stride)
    lse = None
    if scoring.shared:
        lse = kernel.attend_ended(q, planes, rows, None, scoring.stride, scoring.span, first, 0.25)[1]
    index, count = kernel.choose(q, planes, rows, lse, scoring, first, 0.25)
    exact, counted = literal(q.to(F64), keys.to(F64), scoring, first, 0.25)
    assert torch.equal(count, counted)
    assert torch.equal(index, exact)


@pytest.mark.parametrize("block", [64, 96, 250])
def test_means_of_blocks(block):
    k = normal(2, 700, 3, 24, dtype=F16).transpose(1, 2)
    found = means.means(k, block)
    assert found.dtype == F32
    assert_within(found, k.double()[:, :, : 700 // block * block].unflatten(2, (-1, block)).mean(3), terms=block)
    assert means.means(k[:, :, : block - 1], block).shape == (2, 3, 0, 24)


@pytest.mark.parametrize(
    ("stride", "span", "width", "learned"), [(4, 8, 16, True), (2, 2, 24, True), (16, 32, 16, False)]
)
def test_compressions(stride, span, width, learned):
    k, v = normal(2, 150, 2, width, dtype=F16).transpose(1, 2), normal(2, 2, 150, width, seed=1, dtype=F16)
    rows = (150 - span) // stride + 1
    mlp = [normal(span * width, width, seed=2 + n, dtype=F32) / (span * width) ** 0.5 for n in range(2)]
    mlp += [normal(2, span, width, seed=4 + n, dtype=F32) for n in range(2)]
    mlp += [normal(width, width, seed=6 + n, dtype=F32) / width**0.5 for n in range(2)]
    found = compress.compress(k, v, *(mlp if learned else ()), stride, span, rows, True)
    for n, (x, got) in enumerate(zip((k, v), found[:2], strict=True)):
        wide = x.double().requires_grad_()
        blocks = wide.unfold(2, span, stride).mT
        exact, leaves, own = blocks.mean(3), [wide], None
        if learned:
            leaves += [y.double().requires_grad_() for y in mlp[n::2]]
            inside = (blocks + leaves[2][:, None]).flatten(3) @ leaves[1]
            exact = exact + torch.nn.functional.gelu(inside) @ leaves[3]
            assert_within(found[2][n], inside, terms=span * width, name="hidden")
            own = [*mlp[n::2], found[2][n]]
        assert_within(got, exact, terms=span * width)
        d = normal(*got.shape, seed=9, dtype=F32)
        for a, b in zip(
            gradients(x, d, own, stride, span), torch.autograd.grad(exact, leaves, d.double()), strict=True
        ):
            # products of 16 bits: of the weights' gradients these are two numbers
            assert_within(a.half(), b, terms=span * width)


@pytest.mark.parametrize("gates", ["learned", "given", "none"])
def test_gated_sums(gates):
    q, shares = normal(2, 4, 70, 16, dtype=F16), normal(2, 4, 70, 3, seed=1, dtype=F32)
    gate, bias = normal(2, 16, 3, seed=2, dtype=F32), normal(2, 3, seed=3, dtype=F32)
    parts = [normal(2, 4, 70, 24, seed=4 + n, dtype=F16) for n in range(3)]
    d_out = normal(2, 4, 70, 24, seed=9, dtype=F16)
    wide = [x.double().requires_grad_() for x in (q, gate, bias, shares, *parts)]
    options = {"learned": {"gate": wide[1], "bias": wide[2]}, "given": {"shares": wide[3]}, "none": {}}[gates]
    exact = exact_mix(tuple(wide[4:]), wide[0], **options)
    weights = [x if name in options else None for name, x in (("gate", gate), ("bias", bias), ("shares", shares))]
    assert_within(mix.mix(parts, q, *weights), exact, terms=16)
    d_parts, *rest = mix.mix_gradients(parts, q, *weights, d_out)
    want = torch.autograd.grad(exact, wide, d_out.double(), allow_unused=True)
    for n, (got, right) in enumerate(zip((*rest, *d_parts), want, strict=True)):
        assert (got is None) == (right is None)
        if got is not None:
            assert_within(got, right, terms=24 if n in (0, 3) else 70 * 24)


@pytest.mark.parametrize("many", [2, 3, 4])
def test_gradients_are_rounded_once(many):
    parts = [normal(3, 1111, seed=n, dtype=F16) for n in range(many)]
    exact = sum(x.double() for x in parts)
    assert torch.equal(fan.add(parts), exact.half())
