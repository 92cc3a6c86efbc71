"""Kernels for lists of a query's own in the interpreter, float32 and float16: attention over them, and the choice."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

import farfield as ff
from farfield.cpu.choose import choose
from farfield.kernels import (
    attend_listed,
    attend_listed_backward,
    attend_listed_backward_hopper,
    attend_listed_hopper,
    attend_own,
    launch,
    transpose,
)
from farfield.kernels import choose as on_gpu
from farfield.ops.attend import Call, Plan
from farfield.ops.choose import Scoring
from farfield.testing import oracles
from farfield.testing.units import assert_within


def problem(*, heads, kv_heads, tokens, block, picks, lists, causal=True, width=16, value_width=16, shared=False):
    gen = torch.Generator().manual_seed(heads + tokens + block)

    def draw(*shape):
        return torch.randn(shape, generator=gen).half().double()

    batch, blocks = 2, -(-tokens // block)
    lead = (1, 1) if shared else (batch, lists)
    # block 0 is in every list: it has more readers than one program takes
    index = torch.rand(*lead, tokens, blocks, generator=gen)
    index[..., 0] -= 1
    index = index.argsort(-1)[..., :picks].sort(-1).values.to(torch.int32)
    count = torch.randint(0, min(picks, blocks) + 1, (*lead, tokens), generator=gen, dtype=torch.int32)
    layout = ff.Layout(index, count, 1, block, tokens, tokens, causal)
    q = draw(batch, tokens, heads, width).transpose(1, 2)
    return q, ff.Rows(draw(batch, kv_heads, tokens, width), draw(batch, kv_heads, tokens, value_width)), layout


CASES = {
    "one-head-a-unit": {"heads": 3, "kv_heads": 3, "tokens": 50, "block": 16, "picks": 2, "lists": 3},
    "lists-of-query-heads": {"heads": 4, "kv_heads": 2, "tokens": 37, "block": 16, "picks": 3, "lists": 4},
    "shared-lists": {"heads": 6, "kv_heads": 2, "tokens": 41, "block": 16, "picks": 2, "lists": 1, "value_width": 40},
    "all-share": {"heads": 4, "kv_heads": 1, "tokens": 70, "block": 32, "picks": 2, "lists": 1, "shared": True},
    "large-blocks": {"heads": 2, "kv_heads": 1, "tokens": 150, "block": 128, "picks": 2, "lists": 2, "causal": True},
    "noncausal": {"heads": 2, "kv_heads": 1, "tokens": 40, "block": 16, "picks": 3, "lists": 1, "causal": False},
}


@pytest.mark.parametrize("name", CASES)
def test_listed(name, monkeypatch):
    dtype = torch.float16 if len(name) % 2 else torch.float32
    monkeypatch.setattr(attend_listed, "FEWEST", 16)
    for module in (attend_listed, attend_listed_backward):
        monkeypatch.setattr(module, "piece_size", lambda *_: 16)
    q, rows, layout = problem(**CASES[name])
    x = [t.requires_grad_() for t in (q, rows.k, rows.v)]
    exact = oracles.attend(q, [(rows, layout)])
    gen = torch.Generator().manual_seed(5)
    d_out, d_lse = (torch.randn(t.shape, generator=gen).half().double() for t in exact)
    read = exact[1].isfinite()
    total = (exact[0] * d_out).sum() + (exact[1] * d_lse)[read].sum()
    wanted = torch.autograd.grad(total, x, retain_graph=True)
    none = q.new_empty(0)
    q, k, v = (t.detach().to(dtype) for t in x)
    call = Call(
        q, [k], [v], [none], [none], [none], none, none, [layout.index], [layout.count],
        [Plan(1, layout.k_block, layout.causal, -1, 0)], q.shape[-1] ** -0.5,
    )  # fmt: skip
    # all queries at once, their readers counted; and in chunks of 16, their readers sorted
    for parts, masks in ((1 << 30, 1 << 28), (1, 0)):
        monkeypatch.setattr(transpose, "MASKS", masks)
        for module in (attend_listed, attend_listed_backward):
            monkeypatch.setattr(module, "PARTS", parts)
            monkeypatch.setattr(module, "FEWEST", 16)
        out, lse = attend_listed.attend_listed(call)
        assert_within(out, exact[0], terms=layout.rows)
        assert_within(lse, exact[1], terms=layout.rows, name="lse")
        grads = attend_listed_backward.attend_listed_backward(call, d_out.to(dtype), d_lse.float(), out, lse)
        for which, got, right in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
            assert_within(got, right, terms=layout.rows, name=which)
    plain = attend_listed_backward.attend_listed_backward(call, d_out.to(dtype), None, out, lse)
    for which, got, right in zip(("dq", "dk", "dv"), plain, torch.autograd.grad(exact[0], x, d_out), strict=True):
        assert_within(got, right, terms=layout.rows, name=f"{which} without d_lse")


@pytest.mark.parametrize("picks", [2, 3])
def test_own_blocks_apart(picks, monkeypatch):
    """The block that a query stands in by tiles, the others by their readers, and both joined."""
    monkeypatch.setattr(attend_own, "DENSE", {16: 16})
    monkeypatch.setattr(attend_listed, "FEWEST", 16)
    batch, heads, kv_heads, tokens, block = 2, 4, 2, 75, 32
    gen = torch.Generator().manual_seed(picks)
    q, k, v = (torch.randn(batch, h, tokens, 16, generator=gen) for h in (heads, kv_heads, kv_heads))
    own = torch.arange(tokens) // block
    score = torch.rand(batch, heads, tokens, 3, generator=gen)
    score = score.masked_fill(torch.arange(3) == own[:, None], 2).masked_fill(torch.arange(3) > own[:, None], -1)
    count = (own + 1).clamp(max=picks).expand(batch, heads, -1)
    index = score.topk(picks).indices.masked_fill(torch.arange(picks) >= count[..., None], 9).sort(-1).values
    index = index.masked_fill(index == 9, 0)
    layout = ff.Layout(index.int(), count.int(), 1, block, tokens, tokens, True, own=True)
    exact = oracles.attend(q.double(), [(ff.Rows(k.double(), v.double()), layout)])
    none = q.new_empty(0)
    call = Call(
        q, [k], [v], [none], [none], [none], none, none, [layout.index], [layout.count],
        [Plan(1, block, True, -1, 0, True)], 0.25,
    )  # fmt: skip
    monkeypatch.setattr(attend_own, "wants", lambda call: bool(call.plans[0].own))
    out, lse = launch.attend_forward(call)
    assert_within(out, exact[0], terms=tokens)
    assert_within(lse, exact[1], terms=tokens, name="lse")


@pytest.mark.parametrize(("tokens", "rows"), [(96, 96), (75, 80), (40, 64), (32, 33), (7, 9)])
def test_readers_of_own_blocks(tokens, rows):
    tile, split = 8, 4
    block, tiles = tile * split, -(-rows // tile)
    per = tokens // block * tile * split * (split + 1) // 2
    per += sum(max(0, tokens % block - j * tile) for j in range(split))
    start, token = torch.full((tiles + 1,), -1, dtype=torch.int32), torch.full((per,), -1, dtype=torch.int32)
    kernel = attend_listed_backward_hopper.own_readers
    kernel[(-(-max(per, tiles + 1) // 64),)](start, token, tokens, tiles + 1, per, tile, split, 64)
    want = [[i for i in range(tokens) if i // block == m // split and i >= m * tile] for m in range(tiles)]
    assert start[-1] == per
    assert [token[start[m] : start[m + 1]].tolist() for m in range(tiles)] == want


def some_lists(batch, heads, tokens, picks, blocks):
    gen = torch.Generator().manual_seed(tokens)
    index = torch.rand(batch, heads, tokens, blocks, generator=gen).argsort(-1)[..., :picks].sort(-1).values
    return index.int(), torch.randint(0, picks + 1, (batch, heads, tokens), generator=gen, dtype=torch.int32)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "picks", "blocks"),
    [(3, 1, 70, 4, 9), (1, 5, 64, 3, 40), (1, 2, 40, 37, 50), (1, 1, 2300, 2, 7)],
)
@pytest.mark.parametrize("tile", [(128, 16), (4, 32)])
def test_counting_gives_what_sorting_gives(batch, heads, tokens, picks, blocks, tile, monkeypatch):
    index, count = some_lists(batch, heads, tokens, picks, blocks)
    # words are added up by many programs, or by one
    monkeypatch.setattr(transpose, "SPAN", tile)
    (want,) = transpose.transpose([index], [count], [blocks], [True], [16])
    want = transpose.placed(want, index.shape, blocks)
    found = transpose.counted(index, count, blocks, 16)
    lists = transpose.counted(index, count, blocks, 16, by_entry=False)
    apart = transpose.counted(index, count, blocks, 16, apart=True)
    assert found[3:7] == want[3:7] == lists[3:7] == apart[3:7]
    past = transpose.counted(index, count, blocks, 16, left=1)
    (some,) = transpose.transpose([index[..., :-1].contiguous()], [(count - 1).clamp(min=0)], [blocks], [True], [16])
    for k in range(batch * heads * (blocks + 1)):
        if k % (blocks + 1) < blocks:
            a, b = (x.reader[x.start[k] : x.start[k + 1]] for x in (past, some))
            assert torch.equal(a, b)
    used = (torch.arange(picks) < count[..., None]).flatten()
    number = (index.flatten(0, 1) + torch.arange(batch * heads)[:, None, None] * (blocks + 1)).flatten()
    for readers in (found, want):
        place = readers.place[used].long()
        assert torch.equal(readers.key[place].long(), number[used])
        assert torch.equal(readers.reader[place], torch.arange(tokens * picks).repeat(batch * heads)[used].int())
    for k in range(batch * heads * (blocks + 1)):
        if k % (blocks + 1) < blocks:
            a, b, c, d = (x.reader[x.start[k] : x.start[k + 1]] for x in (found, want, lists, apart))
            assert torch.equal(a, b)
            assert torch.equal(a // picks, c)
            assert torch.equal(a, d)
            assert (apart.key[apart.start[k] : apart.start[k + 1]] == k).all()
    # what a segment does not use lies behind it, as in the sort
    assert torch.equal(apart.start, want.start)


def test_runs_name_every_reader_once():
    picks, blocks, tokens, run, block = 4, 9, 70, 8, 8
    index, count = some_lists(3, 1, tokens, picks, blocks)
    found = transpose.counted(index, count, blocks, 1 << 20)
    bounds, entries = found.start.numel(), index.numel()
    numbers = bounds + entries // run
    runs = torch.empty(numbers, 4, dtype=torch.int32)
    attend_listed_hopper.deal[(-(-numbers // 128),)](
        found.start, found.reader, runs, bounds, numbers, bounds.bit_length(), picks, 0, blocks * block, blocks,
        RUN=run, K_BLOCK=block, CAUSAL=True, SIZE=128,
    )  # fmt: skip
    named = []
    for many, about, segment, begin in runs.tolist():
        entry = found.reader[begin : begin + many].tolist()
        assert 0 <= many <= run
        assert not many or about % 2 == (entry[0] // picks < (about // 2 + 1) * block - 1)
        named += [(segment, about // 2, e) for e in entry]
    used = torch.arange(picks) < count[..., None]
    at = used.nonzero()
    want = zip(at[:, 0].tolist(), index[used].tolist(), (at[:, 2] * picks + at[:, 3]).tolist(), strict=True)
    assert sorted(named) == sorted(want)


# scoring, heads, key heads, queries, position of the first
CHOICES = {
    "nsa": (Scoring(16, 4, 4, 8, 1, 2), 4, 2, 75, 0),
    "one-size": (Scoring(8, 3, 8, 8), 3, 1, 45, 0),
    "heads-apart": (Scoring(8, 4, 8, 8, shared=False), 4, 2, 50, 0),
    "later": (Scoring(8, 5, 2, 4, 2, 1), 2, 2, 20, 30),
    "all-forced": (Scoring(16, 3, 4, 8, 1, 2), 2, 1, 40, 0),
    "rows-wider-than-blocks": (Scoring(8, 3, 4, 16), 5, 1, 40, 0),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choose(name):
    scoring, heads, kv_heads, tokens, first = CHOICES[name]
    gen = torch.Generator().manual_seed(len(name))
    dtype = torch.float16 if len(name) % 2 else torch.float32
    rows, repeat, scale = max(0, (first + tokens - scoring.span) // scoring.stride + 1), heads // kv_heads, 0.3
    q = torch.randn(2, heads, tokens, 16, generator=gen).to(dtype)
    keys, values = (torch.randn(2, kv_heads, rows, n, generator=gen) for n in (16, 24))
    planes, low = on_gpu.split(keys, values, dtype, scoring.block // scoring.stride)
    out, lse = on_gpu.attend_ended(q, planes, rows, low, scoring.stride, scoring.span, first, scale)
    at = torch.arange(first, first + tokens)
    ended = torch.arange(rows) * scoring.stride + scoring.span - 1 <= at[:, None]
    logits = q.double() @ keys.double().repeat_interleave(repeat, 1).mT * scale
    logits = logits.masked_fill(~ended, float("-inf"))
    exact = logits.softmax(-1).nan_to_num(0.0) @ values.to(dtype).double().repeat_interleave(repeat, 1)
    assert_within(out, exact, terms=rows)
    assert_within(lse, logits.logsumexp(-1), terms=rows, name="lse")
    alone = on_gpu.attend_ended(q, planes, rows, None, scoring.stride, scoring.span, first, scale)[1]
    assert torch.equal(alone, lse)
    found = on_gpu.choose(q, planes, rows, lse if scoring.shared else None, scoring, first, scale)
    for a, b in zip(found, choose(q.double(), keys.double(), scoring, first, scale), strict=True):
        assert torch.equal(a, b)


def test_equal_scores_go_to_the_lower_block():
    q, keys = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 1, 16).expand(-1, -1, 5, -1)
    planes, _ = on_gpu.split(keys, None, q.dtype)
    index, count = on_gpu.choose(q, planes, 5, None, Scoring(8, 3, 8, 8, shared=False), 0, 1.0)
    assert index[0, 0, 39].tolist() == [0, 1, 4]
    assert count[0, 0, 39] == 3
