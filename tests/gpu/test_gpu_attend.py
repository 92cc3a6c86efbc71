"""The attend kernel on a GPU against the same call in float64."""

import os
import random

import pytest
import torch

import farfield as ff
from farfield.testing import contract, inputs
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

CASES = int(os.environ.get("FARFIELD_CASES", "200"))
FIRST = int(os.environ.get("FARFIELD_SEED", "0"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def problem(seed):
    """A random call of attend: q, sources and keywords, in float64."""
    pick = random.Random(seed)
    gen = torch.Generator(device="cuda").manual_seed(seed)
    batch, kv_heads = pick.choice([1, 2, 3]), pick.choice([1, 2, 3])
    heads = kv_heads * pick.choice([1, 1, 2, 4, 5])
    tokens = pick.choice([1, 2, 17, 63, 64, 65, 130, 257])
    width = pick.choice([16, 24, 64, 80, 96, 128, 192, 256])
    value_width = pick.choice([width, 16, 40, 128])
    q_block = pick.choice([1, 5, 16, 64, 128])
    blocks = -(-tokens // q_block)

    def draw(*shape):
        x = torch.randn(shape, generator=gen, device="cuda", dtype=torch.float64)
        return x.to(torch.bfloat16).double()

    def strided(heads, rows, width):
        """[B, H, S, D], half of the time as a view of [B, S, H, D]."""
        if pick.random() < 0.5:
            return draw(batch, rows, heads, width).transpose(1, 2)
        return draw(batch, heads, rows, width)

    grouped = pick.random() < 0.3
    sources = []
    for _ in range(pick.choice([1, 2])):
        rows, k_block = pick.choice([1, 30, 64, 200, 513]), pick.choice([1, 2, 4, 7, 16, 64, 128])
        row_blocks = -(-rows // k_block)
        picks = pick.randint(0, min(row_blocks, 70))
        lead = pick.choice([1, batch]), pick.choice([1, heads])
        order = torch.rand(*lead, blocks, row_blocks, generator=gen, device="cuda").argsort(-1)
        index = order[..., :picks].sort(-1).values.to(torch.int32)
        count = torch.randint(0, picks + 1, (*lead, blocks), generator=gen, device="cuda", dtype=torch.int32)
        causal = pick.random() < 0.5
        reach = pick.choice([None, None, 20])
        layout = ff.Layout(index, count, q_block, k_block, tokens, rows, causal, reach, pick.choice([0, 3]))
        extra = {}
        if pick.random() < 0.5:
            extra["bias"] = draw(pick.choice([1, batch]), pick.choice([1, kv_heads, heads]), rows)
            extra["bias"][..., : rows // 5] = float("-inf")
        if pick.random() < 0.5:
            shape = (pick.choice([1, batch]), pick.choice([1, kv_heads]), rows)
            extra["end"] = torch.randint(0, 300, shape, generator=gen, device="cuda")
        if grouped:
            extra["group"] = torch.randint(0, 3, (1, kv_heads, rows), generator=gen, device="cuda")
        sources.append((ff.Rows(strided(kv_heads, rows, width), strided(kv_heads, rows, value_width), **extra), layout))
    options = {}
    if pick.random() < 0.5:
        options["position"] = torch.randint(0, 300, (1, pick.choice([1, heads]), tokens), generator=gen, device="cuda")
    if grouped:
        options["group"] = torch.randint(0, 3, (batch, 1, tokens), generator=gen, device="cuda")
    return strided(heads, tokens, width), sources, options, pick.choice(DTYPES)


def cast(q, sources, dtype):
    rows = [
        ff.Rows(r.k.to(dtype), r.v.to(dtype), r.end, None if r.bias is None else r.bias.float(), r.group)
        for r, _ in sources
    ]
    return q.to(dtype), list(zip(rows, (layout for _, layout in sources), strict=True))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_random_calls(seed):
    q, sources, options, dtype = problem(seed)
    exact = ff.attend(q, sources, **options)
    small, rows = cast(q, sources, dtype)
    with inputs.on("cuda"), contract.poisoned_memory():
        got = ff.attend(small, rows, **options)
    terms = sum(len(r) for r, _ in sources)
    assert_within(got.out, exact.out, terms=terms, name=f"out, seed {seed}, {dtype}")
    assert_within(got.lse, exact.lse, terms=terms, name=f"lse, seed {seed}, {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bitwise_equal(dtype):
    q, sources, options, _ = problem(7)
    q, sources = cast(q, sources, dtype)
    first = ff.attend(q, sources, **options)
    for _ in range(250):
        again = ff.attend(q, sources, **options)
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
