"""Recorded calls on the GPU: the bits of the ordinary way, whatever surrounds the call."""

import os
import random

import pytest
import torch

import farfield as ff
from farfield.nn import Rope
from farfield.testing import contract, inputs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from farfield.kernels import plans, replay
from farfield.kernels.attend_backward import attend_backward
from farfield.kernels.launch import attend_forward
from farfield.ops import attend as op
from farfield.ops import pool as pooling
from farfield.ops.known import Memory

CASES = int(os.environ.get("FARFIELD_CASES", "20"))


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Nothing known yet."""
    monkeypatch.setattr(op, "_memory", Memory(op._memory.most))
    monkeypatch.setattr(plans, "_memory", Memory(plans.KEPT))


@pytest.fixture
def ordinary(monkeypatch):
    """Runs a call without recordings."""

    def call(f, *given):
        with monkeypatch.context() as patch:
            patch.setattr(plans, "run", lambda known, function, tensors, *options: function(*tensors, *options))
            return f(*given)

    return call


def problem(seed):
    """A random signature: makes calls of it, each with other numbers and other lists."""
    pick, gen = random.Random(seed), torch.Generator(device="cuda").manual_seed(seed)
    batch, kv_heads = pick.choice([1, 2]), pick.choice([1, 2])
    heads, tokens = kv_heads * pick.choice([1, 2, 5]), pick.choice([3, 65, 256, 1000])
    dtype = pick.choice([*[torch.bfloat16] * 6, torch.float16, torch.float32])
    width, q_block = pick.choice([64, 64, 64, 128]), pick.choice([16, 64, 64, 64])
    blocks, by_token = -(-tokens // q_block), pick.random() < 0.5
    grouped, positioned = pick.random() < 0.2, pick.random() < 0.3
    about = []
    for s in range(pick.choice([1, 2])):
        k_block = 64 if not s else pick.choice([1, 4, 4, 64])
        rows = tokens if not s else pick.choice([30, 513])
        options = {"causal": not s, "reach": pick.choice([None, None, 100]) if not s else None, "sinks": 3}
        lead = pick.choice([1, batch]), pick.choice([1, heads])
        about.append((rows, k_block, options, lead, pick.choice([None, 1, kv_heads]) if s else None))

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=gen, device="cuda").to(dtype)

    def rows_of(heads, rows):
        return draw(batch, rows, heads, width).transpose(1, 2) if by_token else draw(batch, heads, rows, width)

    def whole(high, *shape):
        return torch.randint(0, high, shape, generator=gen, device="cuda", dtype=torch.int32)

    def make():
        leaves, sources = [rows_of(heads, tokens).requires_grad_()], []
        for rows, k_block, options, lead, biased in about:
            row_blocks = -(-rows // k_block)
            picks = min(row_blocks, 40)
            index = torch.rand(*lead, blocks, row_blocks, generator=gen, device="cuda").argsort(-1)[..., :picks]
            layout = ff.Layout(
                index.sort(-1).values.int(), whole(picks + 1, *lead, blocks), q_block, k_block, tokens, rows, **options
            )
            own = [rows_of(kv_heads, rows).requires_grad_() for _ in range(2)]
            bias = None if biased is None else draw(1, biased, rows, dtype=torch.float32).requires_grad_()
            group = whole(2, 1, 1, rows) if grouped else None
            leaves += own if bias is None else [*own, bias]
            sources.append((ff.Rows(*own, bias=bias, group=group), layout))
        more = {"position": whole(tokens, tokens)} if positioned else {}
        if grouped:
            more["group"] = whole(2, batch, 1, tokens)
        grads = draw(batch, tokens, heads, width).transpose(1, 2), draw(batch, heads, tokens, dtype=torch.float32)
        return leaves, sources, more, grads

    return make


def both(leaves, sources, more, grads):
    """out, lse and all gradients."""
    found = ff.attend(leaves[0], sources, **more)
    return found.out, found.lse, *torch.autograd.grad([found.out, found.lse], leaves, grads)


def out_alone(leaves, sources, more, grads):
    out = ff.attend(leaves[0], sources, **more).out
    return out, *torch.autograd.grad(out, leaves, grads[0])


def equal(got, want, what=""):
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a, b), f"{what} result {n}: {int((a != b).sum())} of {a.numel()} values differ"


@pytest.mark.parametrize("seed", range(CASES))
def test_the_ordinary_way_has_the_same_bits(seed, ordinary):
    make = problem(seed)
    for f in (both, out_alone):
        for turn in range(4):
            given = make()
            equal(f(*given), ordinary(f, *given), f"turn {turn},")


def block_call(tokens, seed=0, kv_heads=2, width=64, picks=5):
    """Causal lists of whole blocks, bfloat16."""
    gen = torch.Generator(device="cuda").manual_seed(seed)
    leaves = [
        torch.randn(1, h, tokens, width, generator=gen, device="cuda").bfloat16().requires_grad_()
        for h in (4, kv_heads, kv_heads)
    ]
    blocks = -(-tokens // 64)
    index = torch.rand(1, 1, blocks, blocks, generator=gen, device="cuda").argsort(-1)[..., :picks].sort(-1).values
    count = torch.full((1, 1, blocks), min(picks, blocks), dtype=torch.int32, device="cuda")
    layout = ff.Layout(index.int(), count, 64, 64, tokens, tokens, True)
    grads = torch.randn(1, 4, tokens, width, generator=gen, device="cuda").bfloat16(), None
    return leaves, [(ff.Rows(*leaves[1:]), layout)], {}, grads


def test_calls_are_recorded():
    for seed in range(3):
        out_alone(*block_call(1000, seed))
    kept = [known.run for memory in (op._memory, plans._memory) for known in memory.known.values()]
    assert [type(x) for x in kept] == [replay.Recorded] * 2  # forward and backward
    assert all(len(x.recordings) == 1 for x in kept)


def test_many_lengths_keep_little(ordinary, monkeypatch):
    monkeypatch.setattr(op, "_memory", Memory(16))
    monkeypatch.setattr(plans, "_memory", Memory(16))
    for _ in range(2):
        for tokens in range(200, 250):
            for _ in range(3):
                given = block_call(tokens, seed=tokens)
                equal(out_alone(*given), ordinary(out_alone, *given), f"{tokens} tokens,")
            assert len(op._memory.known) <= 16
            assert len(plans._memory.known) <= 16


def test_addresses_that_kernels_cannot_read(ordinary):
    for turn in range(4):
        leaves, sources, more, grads = block_call(1000, turn)
        if turn % 2:
            buffer = torch.empty(leaves[0].numel() + 1, dtype=torch.bfloat16, device="cuda")
            leaves[0] = buffer[1:].view(leaves[0].shape).copy_(leaves[0].detach()).requires_grad_()
            assert leaves[0].data_ptr() % 16 == 2
        equal(out_alone(leaves, sources, more, grads), ordinary(out_alone, leaves, sources, more, grads))


def test_one_buffer_for_all_and_one_number_for_all(ordinary):
    layout = block_call(1000)[1][0][1]
    for turn in range(4):
        together = torch.randn(1, 1000, 3, 4, 64, device="cuda").bfloat16()
        leaves = [x.transpose(1, 2).requires_grad_() for x in together.unbind(2)]
        given = leaves, [(ff.Rows(*leaves[1:]), layout)], {}
        ones = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(1, 4, 1000, 64)
        equal(out_alone(*given, (ones, None)), ordinary(out_alone, *given, (ones, None)), f"turn {turn},")
        same = [leaves[0], [(ff.Rows(leaves[0], leaves[0]), layout)]]
        equal([ff.attend(*same).out], [ordinary(ff.attend, *same).out], f"turn {turn}, one tensor,")


def test_lists_that_are_shared_by_expanding(ordinary):
    for turn in range(4):
        leaves, [(rows, layout)], more, grads = block_call(1000, turn)
        wide = ff.Layout(
            layout.index.expand(1, 4, -1, -1), layout.count.expand(1, 4, -1), 64, 64, 1000, 1000, True
        )  # fmt: skip
        given = leaves, [(rows, wide)], more, grads
        equal(out_alone(*given), ordinary(out_alone, *given), f"turn {turn},")


def test_a_graph_takes_new_lists(ordinary):
    leaves, sources, _, grads = given = block_call(1000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            out_alone(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = out_alone(*given)
    for seed in (1, 2):
        new, [(_, layout)], _, new_grads = block_call(1000, seed)
        with torch.no_grad():
            for a, b in zip(leaves, new, strict=True):
                a.copy_(b)
        sources[0][1].index.copy_(layout.index)
        grads[0].copy_(new_grads[0])
        graph.replay()
        equal(found, ordinary(out_alone, *given), f"seed {seed},")


def test_streams_and_poisoned_memory(ordinary):
    given = block_call(3000)
    want = ordinary(out_alone, *given)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [out_alone(*given) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        for got in found:
            equal(got, want)
    with inputs.on("cuda"), contract.poisoned_memory():
        for _ in range(3):
            equal(out_alone(*given), want)


@pytest.mark.parametrize(
    "options", [{}, {"block": 128, "near": 128, "rank": 16, "sinks": 5}, {"causal": False}], ids=str
)
def test_fma_with_rotary_is_recorded(options, ordinary):
    rotary = Rope(64).cuda()
    mech = ff.FMA(**options)

    def run(*x):
        out = mech(*x, rotary=rotary)
        return out, *torch.autograd.grad(
            out, x, torch.cos(torch.arange(out.numel(), device="cuda")).view_as(out).to(out)
        )

    for seed in range(4):
        x = block_call(2500, seed)[0]
        equal(run(*x), ordinary(run, *x), f"seed {seed},")
    assert any(isinstance(known.run, replay.Recorded) for known in plans._memory.known.values())


@pytest.mark.parametrize("learned", [False, True])
def test_pool_has_the_same_bits(learned, ordinary):
    tree = pooling.Tree(64, 4, 30, 4, True, 3, 1920)

    def run(k, v, filters, grads):
        found = pooling.pool(k, v, filters, tree)
        x = [k, v, filters] if learned else [k, v]
        return *found[2:], *torch.autograd.grad([found.far_k, found.far_v, found.k], x, grads)

    for seed in range(4):
        gen = torch.Generator(device="cuda").manual_seed(seed)
        k, v = (torch.randn(2, 2, 2000, 64, generator=gen, device="cuda").bfloat16().requires_grad_() for _ in "kv")
        filters = torch.randn(2, 2, 4, 8, generator=gen, device="cuda").requires_grad_() if learned else None
        far = [torch.randn(2, 2, tree.rows, 64, generator=gen, device="cuda").bfloat16() for _ in "kv"]
        given = k, v, filters, [*far, torch.randn(2, 2, 2000, 64, generator=gen, device="cuda").bfloat16()]
        equal(run(*given), ordinary(run, *given), f"seed {seed},")


def test_lists_of_patterns_are_new_tensors():
    first = [ff.select.multipole(tokens=5000, block=64, near=64, rank=4, device="cuda") for _ in range(4)]
    for plan in first[1:]:
        for a, b in ((plan.near, first[0].near), (plan.far, first[0].far)):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.count, b.count)
            assert a.index.data_ptr() != b.index.data_ptr()


def test_the_compiled_call_has_the_same_bits(ordinary):
    given = block_call(1000)
    want = ordinary(out_alone, *given)
    torch._dynamo.reset()
    (q, k, v), [(_, layout)], _, grads = given
    traced = torch.compile(lambda q, k, v: ff.attend(q, ff.Rows(k, v), layout).out, fullgraph=True)
    for _ in range(4):
        out = traced(q, k, v)
        equal([out, *torch.autograd.grad(out, (q, k, v), grads[0])], want)


def test_direct_calls_agree():
    """The implementations themselves, without the operation around them."""
    leaves, [(rows, layout)], _, grads = block_call(777)
    none = leaves[0].new_empty(0)
    with torch.no_grad():
        call = op.Call(
            leaves[0], [rows.k], [rows.v], [none], [none], [none], none, none, [layout.index], [layout.count],
            [op.Plan(64, 64, 1, -1, 0)], 0.125,
        )  # fmt: skip
        out, lse = attend_forward(call)
        want = attend_backward(call, grads[0], None, out, lse, False)
        for _ in range(3):
            equal(plans.forward(call), (out, lse))
            equal(plans.backward(call, grads[0], None, out, lse, False), want)
