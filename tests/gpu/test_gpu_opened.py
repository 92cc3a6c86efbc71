"""Opened FMA on the GPU: choices, numbers, gradients and causality there, and CUDA graphs of it."""

from itertools import accumulate

import pytest
import torch

from farfield.kernels import opened_search, plans
from farfield.mechanisms.fma import FMA
from farfield.ops import opened as on_gpu
from farfield.select import opened
from farfield.summarize import pyramid
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

OPTIONS = {"block": 64, "near": 128, "rank": 16, "open": 2, "beam": 4, "detail": 4}


def draw(tokens, dtype, *, heads=8, kv_heads=2, width=64):
    gen = torch.Generator().manual_seed(0)
    # what bfloat16 holds, so that every dtype makes the same choices
    return [
        torch.randn(1, h, tokens, width, generator=gen).bfloat16().to("cuda", dtype)
        for h in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("score", ["mean", "peak", "box"])
def test_forward_and_backward(dtype, shared, score):
    mech = FMA(**OPTIONS, shared=shared, score=score)
    exact_in = [x.requires_grad_() for x in draw(1003, torch.float64)]
    exact = mech(*exact_in)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to("cuda")
    wanted = torch.autograd.grad((exact * weights).sum(), exact_in)
    x = [t.requires_grad_() for t in draw(1003, dtype)]
    out = mech(*x)
    assert_within(out, exact.detach(), terms=1003)
    for name, got, want in zip("qkv", torch.autograd.grad((out * weights).sum(), x), wanted, strict=True):
        assert_within(got, want, terms=1003, name=f"d{name}")


CASES = {
    "each head its own": ({"open": 2, "rank": 4}, 4, 4, 1003, 64),
    "many": ({"open": 16, "rank": 4, "sinks": 64, "shared": False}, 4, 2, 2600, 64),
    "few together": ({"open": 2, "rank": 4, "hold": 16}, 4, 2, 1003, 64),
    "runs": ({"open": 8, "rank": 4, "hold": 64, "sinks": 3}, 4, 4, 1700, 64),
    "peaks": ({"open": 4, "rank": 4, "hold": 64, "sinks": 3, "score": "peak", "detail": 1}, 4, 4, 1700, 64),
    "sums of segments": ({"open": 4, "rank": 4, "hold": 64, "segments": "sum"}, 4, 2, 1700, 64),
    "runs of 32 of two heads": ({"open": 8, "rank": 4, "hold": 32, "sinks": 3}, 4, 2, 1733, 128),
    "runs of 16 of four heads": ({"open": 8, "rank": 4, "hold": 16}, 8, 2, 1733, 64),
    "runs of 16 of eight heads": ({"open": 3, "rank": 8, "hold": 16, "segments": "sum"}, 8, 1, 1733, 64),
    "runs of 8 of eight heads": ({"open": 8, "rank": 2, "hold": 8, "detail": 8}, 16, 2, 1733, 128),
    "runs in wide blocks": ({"block": 128, "open": 4, "rank": 8, "hold": 16}, 8, 2, 2100, 64),
    "runs of shared heads": ({"open": 8, "rank": 8, "hold": 64, "detail": 2}, 8, 2, 1700, 128),
    "wide blocks": ({"block": 128, "open": 4, "rank": 8, "sinks": 5}, 8, 2, 2100, 128),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_of_its_own(case, monkeypatch):
    """With the learned bias of each level, and for sure by those kernels."""
    options, heads, kv_heads, tokens, width = CASES[case]
    shape = {"heads": heads, "kv_heads": kv_heads, "width": width}
    options = {"near": 128, "level_bias": True, "kv_heads": kv_heads, "levels": 8, **options}
    calls, original = [], on_gpu.choose
    monkeypatch.setattr(on_gpu, "choose", lambda *given: calls.append(given) or original(*given))
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        mech = FMA(**options).to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            mech.level_bias.copy_(torch.linspace(-1, 1, mech.level_bias.numel()).view_as(mech.level_bias))
        x = [t.requires_grad_() for t in draw(tokens, dtype, **shape)]
        out = mech(*x)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to("cuda")
        found = torch.autograd.grad((out * weights).sum(), [*x, mech.level_bias])
        grads.append((out.detach(), *found[:3], found[3].to(dtype)))
    assert len(calls) == 1
    for name, want, got in zip(("out", "dq", "dk", "dv", "dbias"), *grads, strict=True):
        assert_within(got, want, terms=tokens, name=name)


def read_by(i, leaves, tree, radius):
    """First and number of the tokens, and the groups (level, number) that query i reads; every token before it once."""
    n, opened = i // tree.block, set(leaves)
    far = [max((n >> h) - -(-radius // (1 << h)), 0) for h in range(tree.levels + 1)]
    start = max(n - radius, 0) * tree.block
    tokens, groups = [(start, i + 1 - start), *((leaf * tree.block, tree.block) for leaf in leaves)], []
    for h in range(tree.levels):
        above = {leaf >> (h + 1) for leaf in opened}
        for group in range(far[h]):
            listed = group >> 1 >= far[h + 1] or group >> 1 in above
            if listed and group not in {leaf >> h for leaf in opened}:
                groups.append((h, group))
    assert sum(many for _, many in tokens) + sum(tree.block << h for h, _ in groups) == i + 1
    return tokens, groups


@pytest.mark.parametrize(("tokens", "open"), [(70_001, 4), (150_000, 16)])
def test_some_queries_of_long_sequences(tokens, open):
    """By the kernels' own choice, in float64."""
    mech, (q, k, v) = FMA(near=128, rank=4, open=open), draw(tokens, torch.bfloat16, heads=2, kv_heads=2)
    blocks = -(-tokens // mech.block)
    levels, radius = mech._levels(blocks)
    tree = mech._tree(tokens, blocks, levels, radius[0])
    scale = q.shape[3] ** -0.5
    leaves, count = on_gpu.choose(q, k, tree, mech.plan(), scale)
    out, far = mech(q, k, v), pyramid(mech.pool, k, v, tree)
    starts = list(accumulate(tree.groups, initial=0))
    found, wanted = [], []
    for i in (0, 191, 192, 20_000, 65_535, 65_536, tokens - 65, tokens - 1):
        for h in range(2):
            which, groups = read_by(i, leaves[0, h, i, : count[0, h, i]].tolist(), tree, radius[0])
            rows = [torch.arange(first, first + many, device="cuda") for first, many in which]
            rows = torch.cat(rows)
            far_rows = torch.tensor([starts[level] + group for level, group in groups], device="cuda", dtype=torch.long)
            far_rows = (far_rows[:, None] * mech.rank + torch.arange(mech.rank, device="cuda")).flatten()
            keys, values = (
                torch.cat([x[0, h, rows], y[0, h, far_rows]]).double() for x, y in ((k, far.far_k), (v, far.far_v))
            )
            logits = keys @ q[0, h, i].double() * scale
            logits[len(rows) :] += far.bias.double().flatten()[far_rows]
            wanted.append(torch.softmax(logits, 0) @ values)
            found.append(out[0, h, i])
    assert_within(torch.stack(found), torch.stack(wanted), terms=1000)


CHOICES = {
    "means": {},
    "means, heads apart": {"shared": False, "sinks": 5},
    "peaks": {"score": "peak", "detail": 4},
    "sums": {"segments": "sum", "hold": 64},
    "few": {"hold": 64, "detail": 1, "beam": 4},
}


@pytest.mark.parametrize(
    ("case", "tokens", "few"), [*((case, 5000, few) for case in CHOICES for few in (4, 128)), ("means", 17_000, 16)]
)
def test_the_choice_is_that_in_float64(case, tokens, few, monkeypatch):
    """Level by level down the tree, of more queries than are searched for at once too.

    few: pairs of groups of a level that all are scored; on larger levels those that are asked for.
    """
    # a recorded search keeps what it was recorded with
    monkeypatch.setattr(plans, "run", lambda known, function, given, *options: function(*given, *options))
    monkeypatch.setattr(opened_search, "FEW", few)
    monkeypatch.setattr(opened_search, "SCORED", 0)
    mech, x = FMA(near=128, rank=4, open=4, **{"beam": 9, **CHOICES[case]}), draw(tokens, torch.bfloat16, heads=4)
    kept, made = {}, []
    original, lists = opened_search.choose, opened.opened_lists

    def keep(*given):
        kept["chosen"] = original(*given)
        return kept["chosen"]

    def watch(*given, **more):
        found = lists(*given, **more)
        made.append(found[0])
        return found

    monkeypatch.setattr(opened_search, "choose", keep)
    mech(*x)
    monkeypatch.setattr(opened, "opened_lists", watch)
    monkeypatch.setattr(opened, "_STEP", 1 << 26)
    mech(*(t.double() for t in x))
    leaves, count = kept["chosen"]
    index, listed = (torch.cat(parts, 2)[:, :, :: mech.hold] for parts in zip(*made, strict=True))
    near = (torch.arange(tokens, device="cuda")[:: mech.hold] // 64).clamp(max=2) + 1
    assert torch.equal(count, (listed - near).int())
    there = torch.arange(mech.open, device="cuda") < count[..., None]
    alike = (leaves == index[..., : mech.open]) | ~there
    # two scores nearer to each other than their rounding
    assert alike.all(-1).float().mean() > 0.999


@pytest.mark.parametrize(
    "options",
    [{"rank": 4}, {"rank": 2, "detail": 8}, {"rank": 1, "detail": 8, "near": 64}, {"rank": 4, "hold": 16}],
)
@pytest.mark.parametrize("tokens", [1003, 20011])
def test_one_pass_finds_what_two_find(tokens, options, monkeypatch):
    mech, x = FMA(**{**OPTIONS, "hold": 64, **options}), draw(tokens, torch.bfloat16)
    made, runs = [], on_gpu.runs

    def watch(*given):
        made.append(runs(*given))
        return made[-1]

    monkeypatch.setattr(on_gpu, "runs", watch)
    with torch.no_grad():
        outs = [mech(*x) for _ in range(4)]
    assert len(made) == 4
    two = mech(*(t.requires_grad_() for t in x))
    assert len(made) == 4
    assert all(torch.equal(out, two) for out in outs)


@pytest.mark.parametrize("open", [2, 16])
def test_it_compiles(open):
    mech, x = FMA(near=128, rank=4, open=open), [t.requires_grad_() for t in draw(1003, torch.bfloat16)]
    out = mech(*x)
    compiled = torch.compile(mech, fullgraph=True)(*x)
    assert torch.equal(compiled, out)
    for got, want in zip(*(torch.autograd.grad(y.sum(), x) for y in (compiled, out)), strict=True):
        assert torch.equal(got, want)


def test_float64_equals_the_definition():
    mech = FMA(**OPTIONS).double()
    x = draw(700, torch.float64)
    with torch.device("cuda"):
        exact = mech.reference(*x)
    assert_within(mech(*x), exact, terms=700)


@pytest.mark.parametrize("hold", [1, 16])
def test_the_future_reaches_no_output(hold):
    mech, x = FMA(**OPTIONS, hold=hold), draw(1003, torch.bfloat16)
    after = mech(*(torch.cat([t[:, :, :600], -3 * t[:, :, 600:] + 1], 2) for t in x))
    assert torch.equal(after[:, :, :600], mech(*x)[:, :, :600])


@pytest.mark.parametrize("width", [64, 128])
def test_runs_of_few_queries_repeat_bitwise(width):
    mech = FMA(**{**OPTIONS, "rank": 4, "open": 8, "beam": 16}, hold=16)
    x = [t.requires_grad_() for t in draw(5003, torch.bfloat16, width=width)]
    weights = torch.randn(1, 8, 5003, width, generator=torch.Generator().manual_seed(1)).bfloat16().to("cuda")

    def run():
        out = mech(*x)
        return out, *torch.autograd.grad(out, x, weights)

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("hold", [1, 16, 64])
def test_a_graph_replays_it(hold):
    mech, x = FMA(**{**OPTIONS, "rank": 4}, hold=hold), draw(1003, torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            mech(*x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mech(*x)
        for t in x:
            t.copy_(t.flip(1))
        graph.replay()
        assert torch.equal(out, mech(*x))


@pytest.mark.parametrize("hold", [1, 16, 64])
def test_a_graph_replays_a_training_step(hold):
    mech, x = FMA(**OPTIONS, hold=hold), [t.requires_grad_() for t in draw(3003, torch.bfloat16)]
    weights = torch.randn(1, 8, 3003, 64, generator=torch.Generator().manual_seed(1)).bfloat16().to("cuda")

    def step():
        out = mech(*x)
        return out.detach(), *torch.autograd.grad(out, x, weights)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for t in x:
            t.copy_(t.flip(1))
    graph.replay()
    for got, want in zip(found, step(), strict=True):
        assert torch.equal(got, want)
