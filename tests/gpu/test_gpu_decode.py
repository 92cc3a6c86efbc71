"""Decoding on a GPU: the ring's kernel, attend for few queries, and both as a CUDA graph."""

import os
import random

import pytest
import torch

import farfield as ff
from farfield.nn import Rope
from farfield.ring import FMARing
from farfield.summarize import FilterPool, MeanPool
from farfield.testing import contract, inputs
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

CASES = int(os.environ.get("FARFIELD_CASES", "200"))
FIRST = int(os.environ.get("FARFIELD_SEED", "0"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def filled_memory():
    """What no kernel has written is NaN."""
    with inputs.on("cuda"), contract.poisoned_memory():
        yield


def problem(seed):
    """A random call of attend with few queries, in float64; and a dtype."""
    pick = random.Random(seed)
    gen = torch.Generator(device="cuda").manual_seed(seed)
    batch, kv_heads, tokens = pick.choice([1, 2, 3, 70]), pick.choice([1, 2, 3]), pick.choice([1, 1, 2, 5, 12])
    heads = kv_heads * pick.choice([1, 1, 2, 4, 5])
    width = pick.choice([16, 24, 64, 80, 96, 128, 192, 256])
    value_width, q_block = pick.choice([width, 16, 40, 128]), pick.choice([1, 5, 16, 64])
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
        rows, k_block = pick.choice([1, 30, 200, 513, 3000]), pick.choice([1, 2, 4, 7, 16, 64, 128])
        row_blocks = -(-rows // k_block)
        picks = pick.randint(0, min(row_blocks, 300))
        lead = pick.choice([1, batch]), pick.choice([1, heads])
        order = torch.rand(*lead, blocks, row_blocks, generator=gen, device="cuda").argsort(-1)
        index = order[..., :picks].sort(-1).values.to(torch.int32)
        count = torch.randint(0, picks + 1, (*lead, blocks), generator=gen, device="cuda", dtype=torch.int32)
        reach = pick.choice([None, None, 20])
        layout = ff.Layout(
            index, count, q_block, k_block, tokens, rows, pick.random() < 0.5, reach, pick.choice([0, 3])
        )
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
    got = ff.attend(small, rows, **options)
    terms = sum(len(r) for r, _ in sources)
    assert_within(got.out, exact.out, terms=terms, name=f"out, seed {seed}, {dtype}")
    assert_within(got.lse, exact.lse, terms=terms, name=f"lse, seed {seed}, {dtype}")
    again = ff.attend(small, rows, **options)
    assert torch.equal(again.out, got.out)
    assert torch.equal(again.lse, got.lse)


def setting(options, dtype, tokens=700, batch=2, width=64):
    """A mechanism, its rotation, q, k, v, and one forward in float64."""
    options = dict(options)
    pool = FilterPool(2, options["rank"]) if options.pop("learned", False) else MeanPool()
    if isinstance(pool, FilterPool):
        torch.nn.init.constant_(pool.gate, 0.5)
    rotary = Rope(width) if options.pop("rope", False) else None
    mech = ff.FMA(pool=pool.cuda(), **options)
    x = [torch.randn(batch, h, tokens, width, device="cuda").bfloat16() for h in (8, 2, 2)]
    with torch.no_grad():
        exact = mech.double()(*(y.double() for y in x), rotary=rotary)
        mech.float()
    return mech, rotary, [y.to(dtype) for y in x], exact


def ring_at(mech, rotary, x, tokens, capacity=1 << 14):
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :tokens] for y in x), rotary=rotary)
    return FMARing.from_state(state, capacity=capacity, sinks=mech.sinks, pool=mech.pool, rotary=rotary)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"block": 64, "near": 64, "rank": 4},
        {"block": 16, "near": 48, "rank": 1, "sinks": 5},
        {"block": 32, "near": 64, "rank": 16, "sinks": 32, "learned": True},
        {"block": 64, "near": 128, "rank": 16, "learned": True, "rope": True},
        {"block": 24, "near": 24, "rank": 3, "rope": True},
    ],
    ids=str,
)
def test_steps_are_those_of_a_forward(options, dtype):
    mech, rotary, x, exact = setting(options, dtype)
    for start in (0, 99, 512):
        ring = ring_at(mech, rotary, x, start)
        outs = [ring.step(*(y[:, :, t : t + 1] for y in x)) for t in range(start, 700)]
        assert_within(torch.cat(outs, 2), exact[:, :, start:], terms=700, name=f"from {start}")


def test_one_graph_serves_every_token():
    mech, rotary, x, exact = setting({"block": 64, "near": 128, "rank": 16, "rope": True}, torch.bfloat16)
    ring = ring_at(mech, rotary, x, 100)
    start = ring.copy()
    token = [y[:, :, :1].clone() for y in x]
    # compiled before it is captured
    ring.copy().step(*token)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ring.step(*token)

    def replayed(first, last):
        outs = []
        for t in range(first, last):
            for into, y in zip(token, x, strict=True):
                into.copy_(y[:, :, t : t + 1])
            graph.replay()
            outs.append(out.clone())
        return torch.cat(outs, 2)

    got = replayed(100, 700)
    assert_within(got, exact[:, :, 100:], terms=700)
    # other values in the same buffers
    for name, y in ring.tensors().items():
        y.copy_(start.tensors()[name])
    assert torch.equal(replayed(100, 200), got[:, :, :100])


def test_repeats_are_bitwise_equal():
    mech, rotary, x, _ = setting({"block": 64, "near": 64, "rank": 4}, torch.bfloat16)
    ring = ring_at(mech, rotary, x, 640)
    here = [y[:, :, 640:641] for y in x]
    first = ring.copy()
    out = first.step(*here)
    for _ in range(250):
        again = ring.copy()
        assert torch.equal(again.step(*here), out)
        assert all(torch.equal(y, first.tensors()[name]) for name, y in again.tensors().items())


def test_past_the_capacity_outputs_are_nan():
    ring = FMARing.empty(2, 1, 16, capacity=64, block=16, near=16, rank=4, device="cuda")
    x = torch.randn(2, 1, 1, 16, device="cuda")
    ring.clock.fill_(ring.capacity - 16)
    for _ in range(16):
        assert ring.step(x, x, x).isfinite().all()
    assert ring.step(x, x, x).isnan().all()
    ring.reset_()
    assert ring.step(x, x, x).isfinite().all()


def test_compiles():
    mech, rotary, x, exact = setting({"block": 64, "near": 64, "rank": 4}, torch.float32)
    ring = ring_at(mech, rotary, x, 690)
    step = torch.compile(lambda *token: ring.step(*token), fullgraph=True)
    outs = [step(*(y[:, :, t : t + 1] for y in x)) for t in range(690, 700)]
    assert_within(torch.cat(outs, 2), exact[:, :, 690:], terms=700)
