"""Opened FMA's kernels in the interpreter: the choice against the PyTorch one, the attention against float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import attend_opened, opened_search, opened_sketches
from farfield.kernels import opened as kernels
from farfield.mechanisms.fma import FMA
from farfield.ops.pool import Tree
from farfield.select import opened
from farfield.summarize import pyramid
from farfield.testing.units import assert_within

CASES = {
    "heads together": (
        {"near": 64, "rank": 4, "open": 2, "beam": 2, "detail": 2, "sinks": 3, "score": "peak"},
        4,
        1,
        523,
    ),
    "heads apart": ({"near": 128, "rank": 16, "open": 1, "detail": 1, "shared": False, "score": "peak"}, 2, 1, 650),
    "a horizon": ({"near": 64, "rank": 4, "open": 2, "beam": 2, "detail": 2, "sinks": 3, "horizon": 256}, 2, 1, 980),
    "no first block": ({"near": 64, "rank": 32, "open": 3, "beam": 3, "sinks": 64, "detail": 32}, 2, 2, 448),
}


@pytest.mark.parametrize("name", CASES)
def test_choice_and_attention(name, monkeypatch):
    options, heads, kv_heads, tokens = CASES[name]
    mech = FMA(block=64, **options)
    gen = torch.Generator().manual_seed(len(name))
    q, k, v, d_out = (torch.randn(1, n, tokens, 16, generator=gen).half() for n in (heads, kv_heads, kv_heads, heads))
    found, original = {}, opened.opened_lists

    def watch(*args, **more):
        found["near"], found["far"] = original(*args, **more)
        return found["near"], found["far"]

    monkeypatch.setattr(opened, "opened_lists", watch)
    # the interpreter takes as long for a small program as for a large one
    monkeypatch.setattr(opened_search, "KEPT", 128)
    # all groups of the upper levels are scored, and of level 1 those that are asked for
    monkeypatch.setattr(opened_search, "FEW", 3)
    monkeypatch.setattr(opened_search, "SCORED", 0)
    monkeypatch.setattr(opened_search, "PROGRAMS", 8)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact = mech(*wide)

    blocks = -(-tokens // 64)
    levels, radius = mech._levels(blocks)
    tree = mech._tree(tokens, blocks, levels, radius[0])
    leaves, count = opened_search.chosen(q, k, tree, mech.plan(), 0.25)
    index, listed = found["near"]
    local = (torch.arange(tokens) // 64).clamp(max=mech.near // 64) + 1
    assert torch.equal(count, listed - local)
    assert int(count.max()) == mech.open
    # what is opened stands before what is near
    used = torch.arange(mech.open) < count[..., None]
    assert torch.equal(leaves.masked_fill(~used, -1), index[..., : mech.open].masked_fill(~used, -1))

    near = mech.near
    pooled = [x.double().requires_grad_() for x in (k, v)]
    far = pyramid(mech.pool, *pooled, tree)
    about = q, k, v, far.far_k.detach().half(), far.far_v.detach().half(), far.bias.float(), leaves, count
    out, lse = attend_opened.forward(*about, tree, near, 0.25)
    assert_within(out, exact.detach(), terms=tokens)
    # queries of a chunk of the sequence
    q_, leaves_, count_ = (x[:, :, 320:] for x in (q, leaves, count))
    behind, _ = attend_opened.forward(q_, *about[1:6], leaves_, count_, tree, near, 0.25, 320)
    assert_within(behind, exact.detach()[:, :, 320:], terms=tokens)
    grads = attend_opened.backward(d_out, *about, out, lse, tree, near, 0.25, True)
    d_q, d_k, d_v, d_far_k, d_far_v, d_bias = (x.double() for x in grads)
    through = torch.autograd.grad([far.far_k, far.far_v], pooled, [d_far_k, d_far_v])
    wanted = torch.autograd.grad((exact * d_out).sum(), wide)
    for got, want in zip((d_q, d_k + through[0], d_v + through[1]), wanted, strict=True):
        assert_within(got.half(), want, terms=tokens)
    # one bias a level, as level_bias has: its gradient is the sum over the level's rows
    learned = FMA(block=64, **options, level_bias=True, kv_heads=kv_heads, levels=levels).double()
    (want,) = torch.autograd.grad((learned(*wide) * d_out).sum(), learned.level_bias)
    sizes = [tree.lead, *(n * tree.rank for n in tree.groups)]
    got = torch.stack([x.sum(-1)[0] for x in d_bias.split(sizes, -1)][1:], -1)
    assert_within(got.half(), want, terms=tokens)


RUNS = {
    "together": ({"rank": 4, "open": 3, "sinks": 3, "score": "mean"}, 2, 1),
    "sums": ({"rank": 4, "open": 2, "score": "mean", "detail": 4, "segments": "sum"}, 2, 2),
    "a horizon": ({"rank": 4, "open": 2, "beam": 3, "sinks": 3, "detail": 4, "score": "mean", "horizon": 512}, 2, 1),
    "apart": ({"rank": 16, "open": 2, "beam": 6, "detail": 1, "shared": False, "score": "peak"}, 2, 1),
    "few queries": ({"rank": 4, "open": 3, "hold": 16, "score": "mean"}, 4, 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_lists_of_runs(name, monkeypatch):
    """So many queries at a time, as the first of them chooses."""
    (options, heads, kv_heads), tokens = RUNS[name], 1300
    mech = FMA(**{"block": 64, "near": 128, "hold": 64, **options})
    hold = mech.hold
    gen = torch.Generator().manual_seed(len(name))
    q, k = (torch.randn(1, n, tokens, 16, generator=gen).half() for n in (heads, kv_heads))
    found, original = {}, opened.opened_lists

    def watch(*args, **more):
        found["near"], found["far"] = original(*args, **more)
        return found["near"], found["far"]

    monkeypatch.setattr(opened, "opened_lists", watch)
    monkeypatch.setattr(opened_search, "FEW", 3)
    monkeypatch.setattr(opened_search, "SCORED", 0)
    mech(q.double(), k.double(), k.double())
    blocks = -(-tokens // 64)
    levels, radius = mech._levels(blocks)
    tree = mech._tree(tokens, blocks, levels, radius[0])
    chosen = opened_search.chosen(q, k, tree, mech.plan(), 0.25)
    lists = kernels.lists_of_runs(*chosen, tree, mech.plan())
    for (index, count), name in zip((lists[:2], lists[2:]), ("near", "far"), strict=True):
        want, wanted = (x[:, :, ::hold] for x in found[name])
        assert torch.equal(count, wanted)
        used = torch.arange(want.shape[3]) < wanted[..., None]
        got = index[..., : want.shape[3]]
        assert torch.equal(got.masked_fill(~used, -1), want.masked_fill(~used, -1))
    # those of a chunk, by the sketches that there are already
    sketches = opened_search.sketches_of(k, tree, mech.detail, options["score"])
    monkeypatch.setattr(opened_search, "RUNS", 7 * 64 // hold)
    first = 9 * 64 // hold
    some, many = opened_search.choose(q[:, :, 9 * 64 :: hold], sketches, tree, mech.plan(), 0.25, first)
    assert torch.equal(many, chosen[1][:, :, first:])
    used = torch.arange(mech.open) < many[..., None]
    assert torch.equal(some[used], chosen[0][:, :, first:][used])
    if sketches.twice:
        # in float32 they become two numbers where they are read; levels may lie as those of more blocks would. Far from
        # 0 the first number alone does not tell groups apart
        asking, means = q[:, :, 9 * 64 :: hold], 8 + torch.randn(sketches.high.shape, generator=gen) / 256
        parted = opened_sketches.Sketches(means.half(), (means - means.half()).half(), True)
        wanted, filled = opened_search.choose(asking, parted, tree, mech.plan(), 0.25, first)
        laid = tree._replace(blocks=blocks + 9, hi=(blocks + 9) * 64)
        spread = torch.zeros(1, kv_heads, sum(laid.groups) * mech.detail, 16)
        at = to = 0
        for here, there in zip(tree.groups, laid.groups, strict=True):
            here, there = here * mech.detail, there * mech.detail
            spread[:, :, to : to + here] = means[:, :, at : at + here]
            at, to = at + here, to + there
        found = opened_search.sketched(spread, q.dtype, "mean")
        others, count = opened_search.choose(asking, found, laid, mech.plan(), 0.25, first)
        assert torch.equal(count, filled)
        used = torch.arange(mech.open) < filled[..., None]
        assert torch.equal(others[used], wanted[used])
    parts = kernels.lists_of_runs(some, many, tree, mech.plan(), first)
    for part, count, whole, all_ in (*parts[:2], *lists[:2]), (*parts[2:], *lists[2:]):
        assert torch.equal(count, all_[:, :, first:])
        used = torch.arange(part.shape[3]) < count[..., None]
        assert torch.equal(part[used], whole[:, :, first:][used])


@pytest.mark.parametrize(
    ("blocks", "levels", "rank", "detail", "sinks"),
    [(5, 3, 4, 16, 0), (37, 6, 4, 4, 70), (137, 8, 1, 8, 3), (137, 2, 2, 8, 3), (137, 5, 4, 16, 0)],
)
def test_far_rows_and_sketches_are_means(blocks, levels, rank, detail, sinks):
    tree = Tree(64, rank, blocks, levels, True, sinks, blocks * 64)
    gen = torch.Generator().manual_seed(blocks)
    # strides of their own
    k = torch.randn(1, blocks * 64 + 70, 2, 16, generator=gen).half().transpose(1, 2)
    v = torch.randn(1, 2, blocks * 64 + 70, 16, generator=gen).half()
    assert opened_sketches.takes(tree, detail) == (not sinks)
    far_k, far_v, bias, sketches = opened_sketches.pooled(k, v, tree, detail)

    def means(x, each):
        rows, count = [], []
        for height, groups in enumerate(tree.groups):
            size = (64 // each) << height
            there = (torch.arange(groups * each * size) >= sinks).view(-1, size)
            tokens = x[:, :, : there.numel()].double().unflatten(2, there.shape) * there[..., None]
            count.append(there.sum(1))
            rows.append(tokens.sum(3) / count[-1].clamp(min=1)[:, None])
        return torch.cat(rows, 2), torch.cat(count)

    for x, far in (k, far_k), (v, far_v):
        wanted, count = means(x, rank)
        assert_within(far[:, :, tree.lead :], wanted, terms=64 << levels)
        assert torch.equal(far[:, :, :sinks], x[:, :, :sinks])
        assert not far[:, :, sinks : tree.lead].any()
    assert_within(bias[0, 0, tree.lead :].exp(), count.double(), terms=1)
    assert not bias[0, 0, :sinks].any()
    assert (bias[0, 0, sinks : tree.lead] == -torch.inf).all()
    wanted, _ = means(k, detail)
    assert_within(sketches.high, wanted, terms=64 << levels)
    # the second number is what the first has lost
    assert_within(sketches.low, wanted - sketches.high.double(), terms=64 << levels)
    alone = opened_sketches.sketches_of(k, tree, detail, "mean")
    assert torch.equal(alone.high, sketches.high)
    assert torch.equal(alone.low, sketches.low)
