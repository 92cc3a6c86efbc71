"""The backward kernels of attend on a GPU against the same call in float64."""

import os

import pytest
import torch

import farfield as ff
from farfield.testing.calls import Sizes, draw
from farfield.testing.units import assert_within, error_units

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from farfield.kernels import attend_backward as kernels
from farfield.kernels import attend_backward_hopper as hopper
from farfield.kernels import attend_backward_queries_hopper as hopper_queries
from farfield.kernels import attend_backward_runs_hopper as hopper_runs
from farfield.kernels import attend_backward_sums as sums
from farfield.kernels import multipole_backward, transpose

CASES = int(os.environ.get("FARFIELD_CASES", "200"))
FIRST = int(os.environ.get("FARFIELD_SEED", "0"))
SIZES = Sizes(k_block=(1, 2, 4, 7, 16, 32, 48, 64, 128), single=False)
DTYPES = SIZES.dtypes


@pytest.fixture(autouse=True)
def filled_memory(monkeypatch):
    """What no kernel has written is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(q, sources, options, grads, dtype):
    """Gradients of q, every k and v and every bias, by name, with inputs of `dtype`."""
    leaves = {"q": q.to(dtype)}
    cast = []
    for n, (rows, layout) in enumerate(sources):
        leaves |= {f"k{n}": rows.k.to(dtype), f"v{n}": rows.v.to(dtype)}
        if rows.bias is not None:
            leaves[f"bias{n}"] = rows.bias.to(torch.promote_types(dtype, torch.float32))
        cast.append((leaves[f"k{n}"], leaves[f"v{n}"], rows.end, leaves.get(f"bias{n}"), rows.group, layout))
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    given = [
        (ff.Rows(leaves[f"k{n}"], leaves[f"v{n}"], end, leaves.get(f"bias{n}"), group), layout)
        for n, (_, _, end, _, group, layout) in enumerate(cast)
    ]
    got = ff.attend(leaves["q"], given, **options)
    d_out, d_lse = grads[0].to(got.out.dtype), grads[1].to(got.lse.dtype)
    found = torch.autograd.grad([got.out, got.lse], list(leaves.values()), [d_out, d_lse])
    return dict(zip(leaves, found, strict=True))


def visible(layout, rows, heads, position=None, group=None):
    """Which rows each query sees, [1|B, H, T, S]."""
    device, row_blocks = layout.index.device, -(-len(rows) // layout.k_block)

    def of_heads(x, many):
        x = torch.arange(many, device=device) if x is None else x
        return x[None, None] if x.dim() == 1 else x.repeat_interleave(heads // x.shape[1], 1)

    used = torch.arange(layout.index.shape[-1], device=device) < layout.count[..., None]
    named = torch.zeros(*layout.index.shape[:3], row_blocks + 1, dtype=torch.bool, device=device)
    named.scatter_(-1, layout.index.long().masked_fill(~used, row_blocks), True)
    seen = named[..., :row_blocks].repeat_interleave(layout.k_block, 3)[..., : len(rows)]
    seen = seen.repeat_interleave(layout.q_block, 2)[:, :, : layout.tokens]
    at = of_heads(position, layout.tokens)[..., None]
    ends = of_heads(rows.end, len(rows))[:, :, None]
    if layout.causal:
        seen = seen & (ends <= at)
    if layout.reach is not None:
        sinks = torch.arange(len(rows), device=device) < layout.sinks
        seen = seen & (((at - ends).abs() < layout.reach) | sinks)
    if rows.group is not None:
        seen = seen & (of_heads(group, 0)[..., None] == of_heads(rows.group, 0)[:, :, None])
    return seen


def rounded_operands(q, sources, options, grads, dtype):
    """The same gradients in float64, but out, and P and dS as operands of products, have been rounded to `dtype`.

    Tensor cores take no other operands. Rounding one number of P or dS is off by one factor in a whole row of a
    product, and where a row sees a query or two, nothing averages it away.
    """
    heads, scale = q.shape[1], q.shape[3] ** -0.5
    logits, keys, values = [], [], []
    for rows, layout in sources:
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (rows.k, rows.v))
        mask = visible(layout, rows, heads, **options)
        score = scale * (q @ k.mT)
        if rows.bias is not None:
            score = score + rows.bias.repeat_interleave(heads // rows.bias.shape[1], 1)[:, :, None]
        logits.append(score.masked_fill(~mask, float("-inf")))
        keys.append(k)
        values.append(v)

    def low(x):
        return x.to(dtype).double()

    every, k, v = torch.cat(logits, -1), torch.cat(keys, 2), torch.cat(values, 2)
    peak = every.amax(-1, keepdim=True)
    weights = (every - peak.masked_fill(peak == float("-inf"), 0.0)).exp()
    mass = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    out = low(low(weights) @ v / mass)
    p, d_out = weights / mass, grads[0]
    d_s = p * (d_out @ v.mT - ((d_out * out).sum(-1) - grads[1])[..., None])
    found, at = {"q": scale * (low(d_s) @ k)}, 0
    d_k, d_v, d_bias = scale * (low(d_s).mT @ q), low(p).mT @ d_out, d_s.sum(2)
    for n, (rows, _) in enumerate(sources):
        part = slice(at, at + len(rows))
        for name, x, like in (("k", d_k, rows.k), ("v", d_v, rows.v), ("bias", d_bias, rows.bias)):
            if like is not None:
                x = x[:, :, part].unflatten(1, (like.shape[1], -1)).sum(2)
                found[f"{name}{n}"] = x.sum(0, keepdim=True) if len(like) < len(x) else x
        at = part.stop
    return found


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_random_calls(seed):
    drawn = draw(seed, SIZES, "cuda")
    q, sources, options, grads, dtype = drawn.q, drawn.sources, drawn.options, drawn.grads, drawn.dtype
    exact = gradients(q, sources, options, grads, torch.float64)
    got = gradients(q, sources, options, grads, dtype)
    rounded = rounded_operands(q, sources, options, grads, dtype)
    terms = sum(len(r) for r, _ in sources) + q.shape[1] * q.shape[2]
    for name, x in got.items():
        # a bias is float32, but its gradient no better than out
        units = max(3.0, 2.0 * error_units(rounded[name].to(dtype), exact[name], terms=terms))
        assert_within(x.to(dtype), exact[name], terms=terms, units=units, name=f"d{name}, seed {seed}, {dtype}")


def lists(tokens, heads, q_block, k_block, picks, causal=False):
    """Random lists, and row block 0 in all of them."""
    gen = torch.Generator(device="cuda").manual_seed(1)
    blocks, row_blocks = -(-tokens // q_block), -(-tokens // k_block)
    order = torch.rand(1, heads, blocks, row_blocks, generator=gen, device="cuda")
    order[..., 0] = -1
    index = order.argsort(-1)[..., :picks].sort(-1).values.to(torch.int32)
    count = torch.full((1, heads, blocks), picks, device="cuda", dtype=torch.int32)
    return ff.Layout(index, count, q_block, k_block, tokens, tokens, causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_block", [4, 64])
def test_rows_that_all_queries_read(k_block, dtype):
    q, k, v, d_out = (torch.randn(1, 2, 4096, 64, device="cuda").bfloat16().double() for _ in range(4))
    sources = [(ff.Rows(k, v), lists(4096, 1, 16, k_block, 6, causal=True))]
    grads = d_out, torch.zeros(1, 2, 4096, device="cuda").double()
    exact = gradients(q, sources, {}, grads, torch.float64)
    for name, x in gradients(q, sources, {}, grads, dtype).items():
        assert_within(x, exact[name], terms=4096, name=f"d{name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("width", [64, 128])
def test_whole_blocks(width, block, causal, shared, dtype, monkeypatch):
    # pieces too: everybody reads row block 0
    monkeypatch.setattr(kernels, "READS", 2)
    called = counted(monkeypatch)
    q, d_out = (torch.randn(2, 1900, 4, width, device="cuda").bfloat16().double().transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, 2, 1900, width, device="cuda").bfloat16().double() for _ in range(2))
    sources = [(ff.Rows(k, v), lists(1900, 1 if shared else 4, block, block, 5, causal))]
    grads = d_out, torch.randn(2, 4, 1900, device="cuda").double()
    exact = gradients(q, sources, {}, grads, torch.float64)
    for name, x in gradients(q, sources, {}, grads, dtype).items():
        assert_within(x, exact[name], terms=1900, name=f"d{name}")
    assert called == expected(width, block)


def expected(width, q_block):
    if torch.cuda.get_device_capability()[0] != 9:
        return set()
    queries = hopper_queries.key_of(width, q_block) in hopper_queries.TILES
    return {"rows", "queries"} if queries else {"rows"}


def counted(monkeypatch):
    """Which of the kernels with roles run from now on."""
    called = set()
    for module, name in ((hopper, "rows"), (hopper_queries, "queries"), (hopper_runs, "runs")):
        run = getattr(module, f"{name}_backward")
        monkeypatch.setattr(
            module, f"{name}_backward", lambda *x, run=run, name=name, **y: called.add(name) or run(*x, **y)
        )
    return called


# lists of every length from none on, tiles of 64 and of 128 queries, and a last block of rows that is short
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("tokens", [190, 1333, 1900])
@pytest.mark.parametrize(("q_block", "k_block"), [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("width", [64, 128])
def test_lists_of_all_lengths(width, q_block, k_block, tokens, positions, monkeypatch):
    called, rows = counted(monkeypatch), tokens + 33
    gen = torch.Generator(device="cuda").manual_seed(tokens)
    q, d_out = (torch.randn(2, 4, tokens, width, device="cuda").bfloat16().double() for _ in range(2))
    k, v = (torch.randn(2, 2, rows, width, device="cuda").bfloat16().double() for _ in range(2))
    blocks, row_blocks = -(-tokens // q_block), -(-rows // k_block)
    order = torch.rand(1, 4, blocks, row_blocks, generator=gen, device="cuda").argsort(-1)
    index = order[..., : min(row_blocks, 8)].sort(-1).values.to(torch.int32)
    count = torch.randint(0, index.shape[-1] + 1, index.shape[:3], generator=gen, device="cuda", dtype=torch.int32)
    layout = ff.Layout(index, count, q_block, k_block, tokens, rows, positions)
    options = {}
    if positions:
        options["position"] = torch.randint(0, rows, (1, 4, tokens), generator=gen, device="cuda")
    sources = [(ff.Rows(k, v), layout)]
    grads = d_out, torch.randn(2, 4, tokens, device="cuda").double()
    exact = gradients(q, sources, options, grads, torch.float64)
    rounded = rounded_operands(q, sources, options, grads, torch.bfloat16)
    for name, x in gradients(q, sources, options, grads, torch.bfloat16).items():
        units = max(3.0, 2.0 * error_units(rounded[name].bfloat16(), exact[name], terms=tokens))
        assert_within(x, exact[name], terms=tokens, units=units, name=f"d{name}")
    assert called == expected(width, q_block)


# lists of either kind of every length from none on, one for each head or for the heads of a key head
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("tokens", "far_block"), [(190, 1), (1333, 4), (1900, 16)])
@pytest.mark.parametrize(("q_block", "k_block"), [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("width", [64, 128])
def test_blocks_with_gathered_rows_behind_them(width, q_block, k_block, tokens, far_block, shared, monkeypatch):
    called, rows, far = counted(monkeypatch), tokens + 1100, 800 + 3 * (far_block == 16)
    gen = torch.Generator(device="cuda").manual_seed(tokens)
    q, d_out = (torch.randn(2, 4, tokens, width, device="cuda").bfloat16().double() for _ in range(2))
    k, v = (torch.randn(2, 2, rows, width, device="cuda").bfloat16().double() for _ in range(2))
    far_k, far_v = (torch.randn(2, 2, far, width, device="cuda").bfloat16().double() for _ in range(2))
    bias = torch.randn(1, 1 if shared else 2, far, device="cuda").double()
    sources = []
    for some, size, picks, causal in ((rows, k_block, 9, True), (far, far_block, 40, False)):
        blocks, row_blocks = -(-tokens // q_block), -(-some // size)
        order = torch.rand(1, 1 if shared else 4, blocks, row_blocks, generator=gen, device="cuda").argsort(-1)
        index = order[..., :picks].sort(-1).values.to(torch.int32)
        count = torch.randint(0, index.shape[-1] + 1, index.shape[:3], generator=gen, device="cuda", dtype=torch.int32)
        sources.append(ff.Layout(index, count, q_block, size, tokens, some, causal))
    sources = list(zip((ff.Rows(k, v), ff.Rows(far_k, far_v, bias=bias)), sources, strict=True))
    grads = d_out, torch.randn(2, 4, tokens, device="cuda").double()
    exact = gradients(q, sources, {}, grads, torch.float64)
    rounded = rounded_operands(q, sources, {}, grads, torch.bfloat16)
    found = gradients(q, sources, {}, grads, torch.bfloat16)
    for name, x in found.items():
        # a bias is float32, but its gradient no better than out
        units = max(3.0, 2.0 * error_units(rounded[name].bfloat16(), exact[name], terms=tokens))
        assert_within(x.bfloat16(), exact[name], terms=tokens, units=units, name=f"d{name}")
    for name, x in gradients(q, sources, {}, grads, torch.bfloat16).items():
        assert torch.equal(x, found[name])
    if torch.cuda.get_device_capability()[0] == 9:
        assert called == {"rows", "runs"}


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_repeats_of_whole_blocks_are_bitwise_equal(block, width):
    q, k, v, d_out = (torch.randn(1, 4, 4096, width, device="cuda").bfloat16().double() for _ in range(4))
    sources = [(ff.Rows(k, v), lists(4096, 4, block, block, 9, causal=True))]
    grads = d_out, torch.randn(1, 4, 4096, device="cuda").double()
    first = gradients(q, sources, {}, grads, torch.bfloat16)
    for _ in range(250):
        again = gradients(q, sources, {}, grads, torch.bfloat16)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_bitwise_equal(dtype):
    q, k, v, d_out = (torch.randn(1, 4, 2048, 64, device="cuda").bfloat16().double() for _ in range(4))
    bias = torch.randn(1, 4, 2048, device="cuda").double()
    sources = [
        (ff.Rows(k, v), lists(2048, 1, 16, 64, 5, causal=True)),
        (ff.Rows(v, k, bias=bias), lists(2048, 4, 16, 4, 9)),
    ]
    grads = d_out, torch.randn(1, 4, 2048, device="cuda").double()
    first = gradients(q, sources, {}, grads, dtype)
    for _ in range(250):
        again = gradients(q, sources, {}, grads, dtype)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"sinks": 3}, {"near": 64, "rank": 4}, {"block": 128, "near": 128, "rank": 16}, {"causal": False}],
    ids=str,
)
def test_fma(options, dtype):
    mech = ff.FMA(**options)
    x = [torch.randn(2, h, 1500, 64, device="cuda").bfloat16().double().requires_grad_() for h in (4, 2, 2)]
    y = [t.detach().to(dtype).requires_grad_() for t in x]
    grad = torch.randn(2, 4, 1500, 64, device="cuda").bfloat16()
    exact = torch.autograd.grad(mech(*x), x, grad.double())
    got = torch.autograd.grad(mech(*y), y, grad.to(dtype))
    for a, b, name in zip(got, exact, "qkv", strict=True):
        assert_within(a, b, terms=1500, name=f"d{name}")


# a run of query blocks has 16: within one, at its border, more runs than programs, and further tiles of far rows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads"), [(129, 2), (192, 1), (1024, 2), (1025, 3), (2047, 2), (5003, 2), (1025, 80), (36_001, 1)]
)
@pytest.mark.parametrize("width", [64, 128])
def test_near_and_far_field_in_one_walk(width, tokens, heads, dtype, monkeypatch):
    walked(monkeypatch, "backward", {"block": 64, "near": 64, "rank": 4}, width, tokens, heads, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads"), [(257, 2), (384, 1), (2048, 2), (2049, 3), (4095, 2), (10_003, 2), (2049, 40), (66_001, 1)]
)
@pytest.mark.parametrize("width", [64, 128])
def test_the_far_field_in_walks_of_its_own(width, tokens, heads, dtype, monkeypatch):
    walked(monkeypatch, "far_gradients", {"block": 128, "near": 128, "rank": 16}, width, tokens, heads, dtype)


def walked(monkeypatch, name, options, width, tokens, heads, dtype):
    """FMA's gradients by the named function of multipole_backward against float64, and 20 times the same."""
    calls, walk = [], getattr(multipole_backward, name)
    monkeypatch.setattr(multipole_backward, name, lambda *given: calls.append(given) or walk(*given))
    mech = ff.FMA(**options)
    x = [torch.randn(2, tokens, heads, width, device="cuda").transpose(1, 2).to(dtype) for _ in range(4)]
    *wide, grad = (t.double() for t in x)
    wide = [t.requires_grad_() for t in wide]
    exact = torch.autograd.grad(mech(*wide), wide, grad)
    own = [t.detach().requires_grad_() for t in x[:3]]

    def run():
        return torch.autograd.grad(mech(*own), own, x[3])

    got = run()
    assert calls, "other kernels have taken the call"
    for a, b, name in zip(got, exact, "qkv", strict=True):
        assert_within(a, b, terms=tokens, name=f"d{name}")
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(), got, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merged_sources_have_the_gradients_of_a_joint_call(dtype):
    near, far = lists(1024, 1, 64, 64, 3), lists(1024, 1, 64, 8, 20)
    x = [torch.randn(1, 2, 1024, 64, device="cuda").bfloat16().double().requires_grad_() for _ in range(5)]
    grad = torch.randn(1, 2, 1024, 64, device="cuda").bfloat16()
    joint = ff.attend(x[0], [(ff.Rows(x[1], x[2]), near), (ff.Rows(x[3], x[4]), far)])
    exact = torch.autograd.grad(joint.out, x, grad.double())
    y = [t.detach().to(dtype).requires_grad_() for t in x]
    parts = [ff.attend(y[0], ff.Rows(y[1], y[2]), near), ff.attend(y[0], ff.Rows(y[3], y[4]), far)]
    got = torch.autograd.grad(ff.merge(*parts).out, y, grad.to(dtype))
    for n, (a, b) in enumerate(zip(got, exact, strict=True)):
        # two roundings of out more than a joint call has
        assert_within(a, b, terms=1024, units=3.0 if dtype == torch.float32 else 4.0, name=f"gradient {n}")


def test_a_graph_replays_the_same_gradients():
    q, k, v, d_out = (torch.randn(1, 2, 2048, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    plan = ff.select.multipole(tokens=2048, block=64, near=64, rank=4, device="cuda")
    far_k, far_v = (x.detach()[:, :, : plan.far.rows].clone().requires_grad_() for x in (k, v))

    def run():
        out = ff.attend(q, [(ff.Rows(k, v), plan.near), (ff.Rows(far_k, far_v), plan.far)]).out
        return torch.autograd.grad(out, (q, k, v, far_k, far_v), d_out)

    torch.use_deterministic_algorithms(False)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_another_length_compiles_nothing():
    launched = (
        kernels.attend_backward_queries, kernels.attend_backward_rows, sums.sum_shares, sums.sum_pieces,
        hopper.attend_backward_rows_hopper, hopper_queries.attend_backward_queries_hopper, transpose._keys,
        transpose._spans,
    )  # fmt: skip

    def variants():
        return sum(len(x[0]) for kernel in launched for x in kernel.device_caches.values())

    counts = []
    # the longest first: row blocks with so many readers that they are cut need a kernel more
    for tokens in (5003, 2048, 2111, 3000, 4097):
        plan = ff.select.multipole(tokens=tokens, block=64, near=64, rank=4, device="cuda")
        q, k, v = (torch.randn(1, 2, tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        far_k, far_v = (torch.randn(1, 2, plan.far.rows, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        leaves = [x.requires_grad_() for x in (q, k, v, far_k, far_v)]
        ff.attend(q, [(ff.Rows(k, v), plan.near), (ff.Rows(far_k, far_v), plan.far)]).out.sum().backward()
        assert all(x.grad is not None for x in leaves)
        counts.append(variants())
    assert counts == counts[:1] * len(counts), counts
