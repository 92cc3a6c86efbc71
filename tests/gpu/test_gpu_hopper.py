"""attend's Hopper kernel: whole blocks, with gathered rows beside them, against the same call in float64."""

import os
import random

import pytest
import torch

import farfield as ff
from farfield.testing.calls import Problem, arguments
from farfield.testing.units import assert_within

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

CASES = int(os.environ.get("FARFIELD_CASES", "200"))
FIRST = int(os.environ.get("FARFIELD_SEED", "0"))


def problem(seed, together=False):
    """A random call that the kernel takes: q, sources and dtype, in float64.

    together: tiles of several heads' queries.
    """
    pick = random.Random(seed)
    gen = torch.Generator(device="cuda").manual_seed(seed)
    batch, kv_heads = pick.choice([1, 2, 3]), pick.choice([1, 2, 3])
    heads = kv_heads * pick.choice([1, 2, 5])
    tokens = pick.choice([65, 130, 257, 640, 1999])
    width, q_block = pick.choice([64, 128]), pick.choice([64, 128, 192, 256])
    if together:
        q_block = pick.choice([8, 16, 32])
        heads = kv_heads * (64 // q_block) * pick.choice([1, 2])
    blocks = -(-tokens // q_block)

    def draw(*shape):
        x = torch.randn(shape, generator=gen, device="cuda", dtype=torch.float64)
        return x.to(torch.bfloat16).double()

    def strided(heads, rows):
        """[B, H, S, D]: itself, a view of [B, S, H, D], or inside a buffer full of NaN."""
        kind = pick.choice(["plain", "by token", "guarded"])
        if kind == "by token":
            return draw(batch, rows, heads, width).transpose(1, 2)
        if kind == "guarded":
            buffer = torch.full((batch + 2, heads + 2, rows + 8, width + 16), float("nan"), device="cuda").double()
            inside = buffer[1:-1, 1:-1, 4:-4, 8:-8]
            return inside.copy_(draw(batch, heads, rows, width))
        return draw(batch, heads, rows, width)

    def layout(rows, k_block, **options):
        row_blocks = -(-rows // k_block)
        picks = pick.randint(1, min(row_blocks, 90))
        lead = pick.choice([1, batch]), 1 if together else pick.choice([1, heads])
        order = torch.rand(*lead, blocks, row_blocks, generator=gen, device="cuda").argsort(-1)
        index = order[..., :picks].sort(-1).values.to(torch.int32)
        count = torch.randint(0, picks + 1, (*lead, blocks), generator=gen, device="cuda", dtype=torch.int32)
        # what stands behind the end of a list is never used
        index[torch.arange(picks, device="cuda") >= count[..., None]] = 10**9
        return ff.Layout(index, count, q_block, k_block, tokens, rows, **options)

    rows = pick.choice([tokens, 64, 1000])
    options = {"causal": pick.random() < 0.5, "reach": pick.choice([None, None, 100]), "sinks": pick.choice([0, 70])}
    if together:
        options["reach"] = None
    near = layout(rows, 64 if together else pick.choice([64, 128]), **options)
    sources = [(ff.Rows(strided(kv_heads, rows), strided(kv_heads, rows)), near)]
    if together or pick.random() < 0.6:
        rows, bias = pick.choice([30, 513, 2000]), None
        if pick.random() < 0.7:
            bias = draw(pick.choice([1, batch]), pick.choice([1, kv_heads]), rows)
            bias[..., : rows // 5] = float("-inf")
        far = layout(rows, pick.choice([1, 4, 8, 16, 32]))
        sources.append((ff.Rows(strided(kv_heads, rows), strided(kv_heads, rows), bias=bias), far))
    return strided(heads, tokens), sources, pick.choice([torch.bfloat16, torch.float16])


def cast(x, dtype):
    """`x` in another dtype, strides and surroundings included."""
    base = x if x._base is None else x._base
    return base.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def small(q, sources, dtype):
    rows = [
        ff.Rows(cast(r.k, dtype), cast(r.v, dtype), bias=None if r.bias is None else r.bias.float()) for r, _ in sources
    ]
    return cast(q, dtype), list(zip(rows, (layout for _, layout in sources), strict=True))


def taken(q, sources) -> bool:
    from farfield.kernels import attend_hopper, attend_hopper_runs

    call = arguments(Problem(q, sources))
    return attend_hopper.wants(call) or attend_hopper_runs.wants(call)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_random_calls(seed):
    q, sources, dtype = problem(seed)
    exact = ff.attend(q, sources)
    torch.utils.deterministic.fill_uninitialized_memory = True
    asked, rows = small(q, sources, dtype)
    assert taken(asked, rows)
    got = ff.attend(asked, rows)
    terms = sum(len(r) for r, _ in sources)
    assert_within(got.out, exact.out, terms=terms, name=f"out, seed {seed}, {dtype}")
    assert_within(got.lse, exact.lse, terms=terms, name=f"lse, seed {seed}, {dtype}")


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES // 4))
def test_tiles_of_several_heads(seed):
    """Forward and backward, through out and lse."""
    q, sources, dtype = problem(seed, together=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    asked, rows = small(q, sources, dtype)
    assert taken(asked, rows)
    found = []
    for x, given in ((q, sources), (asked, rows)):
        leaves = [x, *(r.k for r, _ in given), *(r.v for r, _ in given)]
        leaves += [r.bias for r, _ in given if r.bias is not None]
        for y in leaves:
            y.requires_grad_()
        got = ff.attend(x, given)
        gen = torch.Generator(device="cuda").manual_seed(seed)
        d_out, d_lse = (torch.randn(y.shape, generator=gen, device="cuda").bfloat16() for y in (got.out, got.lse))
        seen = got.lse.isfinite()
        loss = (got.out * d_out).sum() + (got.lse.where(seen, 0.0) * d_lse).sum()
        found.append([got.out, got.lse, *torch.autograd.grad(loss, leaves)])
    terms = sum(len(r) for r, _ in sources) + q.shape[1] * q.shape[2]
    for n, (exact, got) in enumerate(zip(*found, strict=True)):
        # a bias is float32, but its gradient no better than out
        got = got if n == 1 else got.to(dtype)
        assert_within(got, exact, terms=terms, name=f"result {n}, seed {seed}, {dtype}")


@pytest.mark.parametrize("sign", [1, -1], ids=["rise", "fall"])
@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES // 8))
def test_logits_that_rise_and_fall(seed, sign):
    """Peaks of the running softmax move from tile to tile, some by less than they may lag behind, some by more."""
    q, sources, dtype = problem(seed, together=seed % 2 == 1)
    q[..., 0] = 8
    for rows, _ in sources:
        # exact in every dtype
        rows.k[..., 0] = sign * (torch.arange(len(rows), device="cuda") // 16 * 0.25 % 32)
    exact, got = ff.attend(q, sources), ff.attend(*small(q, sources, dtype))
    terms = sum(len(r) for r, _ in sources)
    assert_within(got.out, exact.out, terms=terms, name=f"out, seed {seed}, {dtype}")
    assert_within(got.lse, exact.lse, terms=terms, name=f"lse, seed {seed}, {dtype}")


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("width", [64, 128])
def test_more_tiles_than_programs(width, block):
    q, k, v = (torch.randn(2, h, 9000, width, device="cuda").bfloat16() for h in (8, 2, 2))
    mech = ff.FMA(block=block, near=block, rank=4)
    assert_within(mech(q, k, v), mech(q.double(), k.double(), v.double()), terms=1000)


@pytest.mark.parametrize("seed", [1, 2])
def test_repeats_are_bitwise_equal(seed):
    q, sources, dtype = problem(seed)
    q, sources = small(q, sources, dtype)
    first = ff.attend(q, sources)
    for _ in range(250):
        again = ff.attend(q, sources)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("width", [64, 128])
def test_positions(width, block, shape, position_dtype):
    """Queries in any order, some before all rows, forward and backward; lists that differ from head to head."""
    gen = torch.Generator(device="cuda").manual_seed(width + block)
    q, k, v, d_out = (
        torch.randn(2, heads, tokens, width, generator=gen, device="cuda").bfloat16()
        for heads, tokens in ((4, 700), (2, 500), (2, 500), (4, 700))
    )
    position = torch.randint(-1, 600, (*shape, 700), generator=gen, device="cuda").to(position_dtype)
    full = ff.select.full(tokens=700, rows=500, q_block=block, k_block=block, device="cuda")
    count = torch.randint(0, full.row_blocks + 1, (*shape, full.index.shape[2]), generator=gen, device="cuda")
    layout = ff.Layout(full.index.expand(*shape, -1, -1), count.int(), block, block, 700, 500, causal=True)

    def run(dtype):
        x = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        got = ff.attend(x[0], ff.Rows(x[1], x[2]), layout, position=position)
        return got.out, got.lse, *torch.autograd.grad(got.out, x, d_out.to(dtype))

    for name, got, exact in zip(("out", "lse", "dq", "dk", "dv"), run(q.dtype), run(torch.float64), strict=True):
        assert_within(got, exact, terms=700, name=name)
