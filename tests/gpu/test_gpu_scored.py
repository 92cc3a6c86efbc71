"""Choices by score on a GPU: the choice, attention over lists of a query's own, and the mechanisms made of them."""

import copy

import pytest
import torch

import farfield as ff
from farfield.cpu.choose import choose as literal
from farfield.mechanisms.moba import MoBA
from farfield.mechanisms.nsa import NSA
from farfield.mechanisms.ssa import SSA
from farfield.ops import attend as ops_attend
from farfield.ops.choose import Scoring, attend_ended, choose
from farfield.ops.lists import recent_sizes
from farfield.select.scored import block_means
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from farfield.kernels import attend_listed, attend_own, attend_own_hopper, branches, near_hopper, plans
from farfield.kernels import attend_listed_backward as listed_backward
from farfield.kernels import attend_listed_backward_hopper as listed_hopper
from farfield.kernels.choose_backward import ended_backward


def draw(*shape, dtype=torch.bfloat16, seed=0):
    gen = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=gen, device="cuda").bfloat16().to(dtype)


def qkv(tokens, *, batch=1, heads=8, kv_heads=2, width=64, dtype=torch.bfloat16):
    shapes = ((batch, h, tokens, width) for h in (heads, kv_heads, kv_heads))
    return [draw(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


SCORINGS = {
    "nsa": Scoring(64, 8, 16, 32, 1, 2),
    "ssa": Scoring(16, 16, 16, 16),
    "moba": Scoring(128, 3, 128, 128, shared=False),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", SCORINGS)
def test_choose_is_the_choice_in_float64(name, width, dtype):
    scoring, tokens = SCORINGS[name], 2500
    q = draw(2, 8, tokens, width, dtype=dtype)
    rows = (tokens - scoring.span) // scoring.stride + 1
    gen = torch.Generator(device="cuda").manual_seed(3)
    keys = 0.3 * torch.randn(2, 2, rows, width, generator=gen, device="cuda")
    index, count = choose(q, keys, scoring)
    exact, exact_count = literal(q.double(), keys.double(), scoring, 0, width**-0.5)
    assert torch.equal(count, exact_count)
    # two scores may be nearer to each other than float32 can tell
    assert (index != exact).float().mean() < 1e-4


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("picks", "first"), [(2, 0), (3, 0), (4, 700), (6, 0)])
def test_heads_that_choose_for_themselves(picks, first, width):
    """Few picks and many, more rows than a tile, equal scores, and queries that come later."""
    scoring, tokens = Scoring(64, picks, 64, 64, shared=False), 5000
    q = draw(1, 4, tokens, width)
    rows = (tokens + first) // 64
    gen = torch.Generator(device="cuda").manual_seed(3)
    keys = 0.3 * torch.randn(1, 2, rows, width, generator=gen, device="cuda")
    # of each three blocks two are the same
    keys[:, :, 1::3] = keys[:, :, ::3][:, :, : len(range(1, rows, 3))]
    index, count = choose(q, keys, scoring, first=first)
    exact, exact_count = literal(q.double(), keys.double(), scoring, first, width**-0.5)
    assert torch.equal(count, exact_count)
    assert (index != exact).float().mean() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("block", "width"), [(64, 64), (512, 128), (96, 80)])
def test_means_of_blocks(block, width, dtype):
    k = draw(2, 3000, 3, width, dtype=dtype).transpose(1, 2)
    found = block_means(k, block)
    exact = k.double()[:, :, : 3000 // block * block].unflatten(2, (-1, block)).mean(3)
    assert found.dtype == torch.float32
    assert_within(found, exact, terms=block)


def test_ended_rows_are_not_rounded():
    q, tokens = draw(1, 8, 2000, 64), 2000
    gen = torch.Generator(device="cuda").manual_seed(3)
    keys, values = torch.randn(2, 1, 2, 124, 64, generator=gen, device="cuda")
    found = attend_ended(q, keys, values, stride=16, span=32)
    past = torch.arange(124, device="cuda") * 16 + 31 <= torch.arange(tokens, device="cuda")[:, None]
    k, v = (x.double().repeat_interleave(4, 1) for x in (keys, values))
    logits = (q.double() @ k.mT / 8).masked_fill(~past, float("-inf"))
    assert_within(found.lse, logits.logsumexp(-1), terms=124, name="lse")
    assert_within(found.out, logits.softmax(-1).nan_to_num(0.0) @ v, terms=124)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("block", "width", "lists"),
    [(64, 64, 1), (64, 128, 1), (64, 128, 4), (16, 64, 1), (32, 128, 1), (128, 64, 4), (256, 128, 4), (512, 64, 4)],
)
def test_lists_of_single_queries(block, width, lists, dtype):
    tokens, heads = 1500, 4
    blocks = -(-tokens // block)
    picks = min(blocks, 5)
    gen = torch.Generator(device="cuda").manual_seed(1)
    order = torch.rand(2, lists, tokens, blocks, generator=gen, device="cuda")
    # block 0 is in every list: it has more readers than one program takes
    order[..., 0] -= 1
    index = order.argsort(-1)[..., :picks].sort(-1).values.to(torch.int32)
    count = torch.randint(0, picks + 1, (2, lists, tokens), generator=gen, device="cuda", dtype=torch.int32)
    layout = ff.Layout(index, count, 1, block, tokens, tokens, True)
    x = [draw(2, h, tokens, width, dtype=dtype, seed=i).requires_grad_() for i, h in enumerate((heads, 1, 1))]
    wide = [t.detach().double().requires_grad_() for t in x]
    hidden = ~ff.select.to_dense(layout)
    logits = (wide[0] @ wide[1].mT / width**0.5).masked_fill(hidden, float("-inf"))
    read = ~hidden.all(-1).expand(-1, heads, -1)
    lse = torch.where(read, torch.where(read[..., None], logits, 0.0).logsumexp(-1), float("-inf"))
    exact = torch.where(read[..., None], logits, 0.0).softmax(-1).masked_fill(hidden, 0.0) @ wide[2], lse
    found = ff.attend(x[0], ff.Rows(*x[1:]), layout)
    assert_within(found.out, exact[0], terms=tokens)
    assert_within(found.lse, exact[1], terms=tokens, name="lse")
    d_out = draw(*found.out.shape, dtype=dtype, seed=9)
    got = torch.autograd.grad((found.out * d_out).sum() + found.lse[read].sum(), x)
    want = torch.autograd.grad((exact[0] * d_out).sum() + exact[1][read].sum(), wide)
    for name, a, b in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert_within(a, b, terms=tokens, name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("block", "heads", "lists"), [(64, 4, 1), (64, 3, 3), (128, 2, 1), (512, 2, 2)])
def test_backward_on_hopper(block, heads, lists, width, dtype, monkeypatch):
    """Shared lists and own ones, blocks of a program and of several; at once, in chunks, and in pieces."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    tokens, picks, called = 1500, 3, []
    tiles_of = listed_hopper.tiles_of
    monkeypatch.setattr(listed_hopper, "tiles_of", lambda *x: called.append(x) or tiles_of(*x))
    blocks = -(-tokens // block)
    gen = torch.Generator(device="cuda").manual_seed(2)
    index = torch.rand(1, lists, tokens, blocks, generator=gen, device="cuda").argsort(-1)[..., :picks].sort(-1).values
    count = torch.randint(0, min(picks, blocks) + 1, (1, lists, tokens), generator=gen, device="cuda")
    layout = ff.Layout(index.int(), count.int(), 1, block, tokens, tokens, True)
    q, k, v, d_out = (draw(1, h, tokens, width, dtype=dtype, seed=h + i) for i, h in enumerate((heads, 1, 1, heads)))
    d_lse = draw(1, heads, tokens, dtype=torch.float32)
    hidden = ~ff.select.to_dense(layout)
    read = ~hidden.all(-1).expand(-1, heads, -1)
    d_lse = d_lse.masked_fill(~read, 0.0)
    # the backward starts from the out that was kept, in its dtype: the exact gradients of that
    kept = ff.attend(q, ff.Rows(k, v), layout).out.double()
    wide_q, wide_k, wide_v, wide_d = (x.double() for x in (q, k, v, d_out))
    logits = (wide_q @ wide_k.mT / width**0.5).masked_fill(hidden, float("-inf"))
    weights = (logits - logits.logsumexp(-1, keepdim=True)).exp().masked_fill(hidden, 0.0)
    less = (kept * wide_d).sum(-1, keepdim=True) - d_lse[..., None]
    d_logits = weights * (wide_d @ wide_v.mT - less) / width**0.5
    exact = d_logits @ wide_k, (d_logits.mT @ wide_q).sum(1, True), (weights.mT @ wide_d).sum(1, True)
    own = [x.requires_grad_() for x in (q, k, v)]

    def gradients():
        found = ff.attend(q, ff.Rows(k, v), layout)
        return torch.autograd.grad([found.out, found.lse], own, [d_out, d_lse])

    for parts, readers in ((1 << 31, 2048), (1 << 18, 2048), (1 << 31, 64)):
        monkeypatch.setattr(listed_backward, "PARTS", parts)
        monkeypatch.setattr(listed_backward, "piece_size", lambda *_, readers=readers: readers)
        plans._memory.forget()
        got = gradients()
        assert called, "another kernel has taken the call"
        for name, a, b in zip(("dq", "dk", "dv"), got, exact, strict=True):
            assert_within(a, b, terms=tokens, name=name)
        assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(gradients(), got, strict=True))


@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "block", "picks", "tokens"),
    [
        (64, 1, 1, 512, 3, 2000), (64, 16, 1, 512, 2, 1024), (128, 8, 2, 512, 3, 1537), (128, 4, 2, 256, 4, 1300),
        (64, 4, 1, 256, 6, 1900), (128, 3, 3, 512, 3, 1100),
    ],
)  # fmt: skip
def test_own_blocks_apart(width, heads, kv_heads, block, picks, tokens, monkeypatch):
    """Blocks that all of their queries read are read in order; at once, in chunks, and in pieces."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    mech, called, wants = MoBA(block=block, picks=picks), [], attend_own.wants
    monkeypatch.setattr(attend_own, "wants", lambda call: called.append(wants(call)) or called[-1])
    joined, attend = [], attend_own_hopper.attend_own
    monkeypatch.setattr(attend_own_hopper, "attend_own", lambda *given: joined.append(1) or attend(*given))
    x = [t.detach().requires_grad_() for t in qkv(tokens, batch=2, heads=heads, kv_heads=kv_heads, width=width)]
    # as a model has them
    x[0] = x[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in x]
    with torch.device("cuda"):
        exact = mech.reference(*wide)
    d_out = draw(*exact.shape, seed=9)
    want = torch.autograd.grad(exact, wide, d_out.double())
    for parts, readers in ((1 << 31, 2048), (1 << 19, 2048), (1 << 31, 64)):
        for module in (attend_listed, listed_backward):
            monkeypatch.setattr(module, "PARTS", parts)
        monkeypatch.setattr(listed_backward, "piece_size", lambda *_, readers=readers: readers)
        plans._memory.forget()
        ops_attend._memory.forget()
        joined.clear()
        out = mech(*x)
        got = torch.autograd.grad(out, x, d_out)
        assert set(called) == {True}
        assert bool(joined) == (parts == 1 << 31 and picks <= 4)
        for name, a, b in zip(("out", "dq", "dk", "dv"), (out, *got), (exact, *want), strict=True):
            assert_within(a, b, terms=tokens, name=name)
        for _ in range(4):
            again = mech(*x)
            assert torch.equal(again, out)
            assert all(map(torch.equal, torch.autograd.grad(again, x, d_out), got))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 1300), (1, 2500)])
def test_gradients_of_ended_rows(batch, tokens, width, dtype):
    """Many queries, as the kernels for Hopper take them."""
    q, d_out = (draw(batch, 8, tokens, width, dtype=dtype, seed=n) for n in (1, 2))
    gen = torch.Generator(device="cuda").manual_seed(3)
    rows = (tokens - 32) // 16 + 1
    keys, values = 0.3 * torch.randn(2, batch, 2, rows, width, generator=gen, device="cuda")
    wide = [x.double().requires_grad_() for x in (q, keys, values)]
    past = torch.arange(rows, device="cuda") * 16 + 31 <= torch.arange(tokens, device="cuda")[:, None]
    k, v = (x.repeat_interleave(4, 1) for x in wide[1:])
    logits = (wide[0] @ k.mT / width**0.5).masked_fill(~past, float("-inf"))
    want = torch.autograd.grad(logits.softmax(-1).nan_to_num(0.0) @ v, wide, d_out.double())
    found = attend_ended(q, keys, values, stride=16, span=32)
    call = q, keys, values, d_out, None, found.out, found.lse, 16, 32, 0, width**-0.5
    got = ended_backward(*call)
    for name, a, b in zip(("dq", "d keys", "d values"), got, want, strict=True):
        assert_within(a.to(dtype), b, terms=tokens, name=name)
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(ended_backward(*call), got, strict=True))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("mech", [NSA(picks=6), SSA(picks=8), MoBA(block=128, picks=4)], ids=lambda m: m.name)
def test_mechanisms_at_the_sizes_of_their_papers(mech, width):
    x = qkv(1300, width=width)
    wide = [t.detach().double().requires_grad_() for t in x]
    with torch.device("cuda"):
        exact = mech.reference(*wide)
    out = mech(*x)
    assert_within(out, exact, terms=1300)
    d_out = draw(*out.shape, seed=9)
    got, want = torch.autograd.grad(out, x, d_out), torch.autograd.grad(exact, wide, d_out.double())
    for name, a, b in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert_within(a, b, terms=1300, name=name)


SEED = 340


@pytest.mark.parametrize("width", [64, 128])
def test_learned_compressions_and_gates(width):
    # drawn on the CPU, where the seed was chosen: no two scores of the last pick and the first that is none are nearer
    # to each other than the kernels tell them apart
    mech = NSA(picks=6, kv_heads=2, width=width)
    gen = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for p in mech.parameters():
            p += torch.randn(p.shape, generator=gen) / max(4, 2 * p.shape[0] ** 0.5)
        for part in (mech.compress_k, mech.compress_v):
            part.inner.copy_(torch.randn(part.inner.shape, generator=gen) / part.inner.shape[0] ** 0.5)
    mech = mech.cuda()
    x = [normal(1, h, 1300, width, seed=SEED + i).bfloat16().cuda().requires_grad_() for i, h in enumerate((8, 2, 2))]
    exactly = copy.deepcopy(mech).double()
    wide = [t.detach().double().requires_grad_() for t in x]
    with torch.device("cuda"):
        exact = exactly.reference(*wide)
    out = mech(*x)
    assert_within(out, exact, terms=1300)
    with torch.no_grad():
        for _ in range(3):  # the third call is a replay
            assert torch.equal(mech(*x), out)
    d_out = draw(*out.shape, seed=9)
    got = torch.autograd.grad(out, [*x, *mech.parameters()], d_out)
    want = torch.autograd.grad(exact, [*wide, *exactly.parameters()], d_out.double())
    names = ["dq", "dk", "dv", *(name for name, _ in mech.named_parameters())]
    # The bias of the gates is a further row of their matrix, for an input of 1. Alone it is six numbers, whose rounding
    # is a matter of luck: gradients of branches that are exact but for the rounding of their outs to bfloat16 were off
    # by 1.0 to 4.7 units of these six in twelve draws, and by 1.1 to 1.3 of the whole matrix.
    found, exact = ({n: y.flatten() for n, y in zip(names, grads, strict=True)} for grads in (got, want))
    for named in (found, exact):
        named["gate"] = torch.cat([named["gate"], named.pop("gate_bias")])
    for name, a in found.items():
        # weights are float32, what they are multiplied with is not
        assert_within(a.bfloat16(), exact[name], terms=1300, name=name)
    # recorded at the second call, replayed at the third
    for _ in range(3):
        again = torch.autograd.grad(mech(*x), [*x, *mech.parameters()], d_out)
        assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "picks", "window", "early", "parts"),
    # early queries of all, of some and of the least; parts of one chunk and of several; two heads a list and four
    [(2, 8, 1300, 6, 512, 40, 1 << 30), (1, 4, 2500, 16, 130, 5, 1 << 19), (1, 8, 700, 4, 1000, 1, 1 << 17)],
)
def test_branches_whose_parts_meet_in_the_sum(
    batch, heads, tokens, picks, window, early, parts, width, dtype, monkeypatch
):  # fmt: skip
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(near_hopper, "EARLY", early)
    monkeypatch.setattr(attend_listed, "PARTS", parts)
    q, k, v = (x.detach() for x in qkv(tokens, batch=batch, heads=heads, kv_heads=2, width=width, dtype=dtype))
    scoring = Scoring(64, picks, 16, 32, 1, 2)
    about = branches.About(scoring, window, *recent_sizes(tokens, window), width**-0.5)
    assert branches.together(q, k, v, about)
    out, far, _, chosen, chosen_lse, near, near_lse, index, count, *_ = branches.forward(q, k, v, about, True)
    layout = ff.Layout(index, count, 1, 64, tokens, tokens, True)
    hidden = ~ff.select.to_dense(layout).repeat_interleave(heads // 2, 1)
    i = torch.arange(tokens, device="cuda")
    outside = (i > i[:, None]) | (i <= i[:, None] - window)
    wide_k, wide_v = (x.double().repeat_interleave(heads // 2, 1) for x in (k, v))
    logits = q.double() @ wide_k.mT / width**0.5
    exact = []
    for name, got, lse, mask in (("chosen", chosen, chosen_lse, hidden), ("near", near, near_lse, outside)):
        masked = logits.masked_fill(mask, float("-inf"))
        exact.append(masked.softmax(-1) @ wide_v)
        assert_within(got.view(q.shape), exact[-1], terms=tokens, name=name)
        assert_within(lse.view(q.shape[:3]), masked.logsumexp(-1), terms=tokens, name=f"lse of {name}")
    assert_within(out, (far.double() + exact[0] + exact[1]) / 2, terms=tokens)
    assert all(torch.equal(branches.forward(q, k, v, about, False), out) for _ in range(10))


@pytest.mark.parametrize("name", SCORINGS)
def test_scores_are_never_in_memory(name):
    """Choosing takes no memory that grows with T times the rows."""
    scoring, taken = SCORINGS[name], []
    for tokens in (16384, 32768):
        q = draw(1, 8, tokens, 64)
        keys = torch.zeros(1, 2, (tokens - scoring.span) // scoring.stride + 1, 64, device="cuda")
        choose(q, keys, scoring)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        choose(q, keys, scoring)
        taken.append(torch.cuda.max_memory_allocated() - before)
    assert taken[1] < 2.2 * taken[0]


def test_nsa_in_a_graph():
    x = [t.detach() for t in qkv(2048)]
    mech = NSA()
    with torch.no_grad():
        want = mech(*x)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            mech(*x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            got = mech(*x)
        graph.replay()
    assert torch.equal(got, want)
