"""Opened FMA's decode state in fixed buffers: it steps as one forward does, wherever the tokens are."""

import math

import pytest
import torch

from farfield.mechanisms.fma import FMA
from farfield.nn import Rope
from farfield.opened_ring import OpenedRing
from farfield.select import opened
from farfield.testing.units import assert_within

SMALL = {"block": 8, "near": 8, "rank": 2}


def draw(tokens, *, batch=2, heads=4, kv_heads=2, width=8, value_width=6):
    gen = torch.Generator().manual_seed(0)
    shape = [(batch, h, tokens, n) for h, n in ((heads, width), (kv_heads, width), (kv_heads, value_width))]
    return [torch.randn(s, generator=gen, dtype=torch.float64) for s in shape]


def prefilled(mech, x, tokens, **options):
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :tokens] for y in x), rotary=options.get("rotary"))
    return mech.ring(state, capacity=200, **options)


def stepped(mech, x, ring, start, stop):
    return torch.cat([mech.step(*(y[:, :, t : t + 1] for y in x), ring) for t in range(start, stop)], 2)


CASES = {
    "means": {"open": 2},
    "near is two blocks": {"open": 2, "near": 16, "sinks": 8},
    "boxes": {"open": 2, "sinks": 3, "score": "box"},
    "balls": {"open": 1, "score": "ball"},
    "peaks": {"open": 1, "score": "peak", "sinks": 1},
    "learned": {"open": 1, "score": "learned", "kv_heads": 2, "width": 8},
    "apart": {"open": 2, "shared": False, "sinks": 4},
    "sums, biased": {"open": 3, "segments": "sum", "level_bias": -0.5, "kv_heads": 2, "levels": 7},
    "held": {"open": 2, "hold": 4},
    "rotated": {"open": 2, "sinks": 1, "rope": True},
    "learned filters": {"open": 2, "pool": "learned", "kv_heads": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_a_forward(name):
    options = dict(CASES[name])
    rotary = Rope(8, share=0.5) if options.pop("rope", False) else None
    mech, x = FMA(**{**SMALL, **options}).double(), draw(140)
    with torch.no_grad():
        for weight in mech.parameters():
            weight.add_(torch.linspace(0, 0.5, weight.numel()).view_as(weight))
        whole = mech(*x, rotary=rotary)
    for start, stop in ((0, 20), (70, 90), (121, 133)):
        ring = prefilled(mech, x, start, rotary=rotary, heads=4)
        assert isinstance(ring, OpenedRing)
        assert_within(stepped(mech, x, ring, start, stop), whole[:, :, start:stop], terms=140, name=f"from {start}")
        assert ring.tokens.tolist() == [stop, stop]


def test_a_rotated_step_in_bfloat16():
    """Rounded after it is rotated, so that of two scores as near to each other as that the other may win."""
    rotary, mech = Rope(8), FMA(**SMALL, open=2)
    given, outs, opens = [y.bfloat16() for y in draw(190)], [], []
    exact = mech(*(y.double() for y in given), rotary=rotary)[:, :, 100:]
    for dtype in (torch.bfloat16, torch.float64):
        x = [y.to(dtype) for y in given]
        ring, out, chosen = prefilled(mech, x, 100, rotary=rotary), [], []
        for t in range(100, 190):
            out.append(stepped(mech, x, ring, t, t + 1))
            chosen.append(ring.near[..., :2].clone())
        outs.append(torch.cat(out, 2))
        opens.append(torch.cat(chosen, 2))
    assert_within(outs[1], exact, terms=190)
    alike = (opens[0] == opens[1]).all(-1).repeat_interleave(2, 1)
    assert alike.float().mean() > 0.9
    assert_within(outs[0][alike], exact[alike], terms=190)


def test_the_host_gives_the_same_bits():
    mech, x = FMA(**SMALL, open=2, sinks=3), draw(140)
    here, there = (prefilled(mech, x, 100, store=store) for store in ("device", "host"))
    assert torch.equal(stepped(mech, x, there, 100, 130), stepped(mech, x, here, 100, 130))
    assert here.host_nbytes == 0
    # 200 tokens in host memory
    assert there.host_nbytes == 2 * 2 * 200 * (8 + 6) * 8
    assert there.nbytes == here.nbytes == sum(t.nbytes for t in here.tensors().values())


def test_a_host_step_takes_from_the_store_what_it_opens_alone():
    mech, x = FMA(**SMALL, open=2), draw(140)
    ring, other = (prefilled(mech, x, 130, store="host") for _ in range(2))
    want = stepped(mech, x, ring, 130, 131)
    blocks = ring.near[:, :, 0, :2]
    other.all_k.fill_(float("inf"))
    other.all_v.fill_(float("nan"))
    for b in range(2):
        for g in range(2):
            for n in blocks[b, g].tolist():
                rows = slice(8 * n, 8 * n + 8)
                other.all_k[b, g, rows], other.all_v[b, g, rows] = ring.all_k[b, g, rows], ring.all_v[b, g, rows]
    for near in (15, 16):
        rows = slice(8 * near, 8 * near + 8)
        other.all_k[:, :, rows], other.all_v[:, :, rows] = ring.all_k[:, :, rows], ring.all_v[:, :, rows]
    assert torch.equal(stepped(mech, x, other, 130, 131), want)


def test_sequences_stand_where_they_are():
    mech, x = FMA(**SMALL, open=2), draw(140)
    whole = mech(*x)
    rings = [prefilled(mech, [y[b : b + 1] for y in x], n) for b, n in enumerate((60, 101))]
    ring = OpenedRing.join(rings)
    at, outs = [60, 101], []
    for _ in range(9):
        here = [torch.stack([y[b, :, t : t + 1] for b, t in enumerate(at)]) for y in x]
        outs.append(mech.step(*here, ring))
        at = [t + 1 for t in at]
    outs = torch.cat(outs, 2)
    for b, (start, stop) in enumerate(((60, 69), (101, 110))):
        assert_within(outs[b], whole[b, :, start:stop], terms=140)
    copied = ring.copy()
    ring.reorder_(torch.tensor([1, 1]))
    assert ring.tokens.tolist() == [110, 110]
    here = [y[1:, :, 110:111].expand(2, -1, -1, -1) for y in x]
    out = mech.step(*here, ring)
    assert torch.equal(out[0], out[1])
    assert_within(out[0], whole[1, :, 110:111], terms=140)
    assert copied.tokens.tolist() == [69, 110]
    ring.reset_(torch.tensor([0]))
    assert ring.tokens.tolist() == [0, 111]


def test_a_full_ring_says_so():
    mech, x = FMA(**SMALL, open=2), draw(202)
    ring = prefilled(mech, x, 199)
    assert ring.capacity == 200
    stepped(mech, x, ring, 199, 200)
    with pytest.raises(ValueError, match="holds 200 tokens and is full"):
        stepped(mech, x, ring, 200, 201)


@pytest.mark.parametrize(("options", "capacity"), [({}, 128), ({"open": 2}, 120), ({"open": 2}, 128)])
def test_sequences_with_room_go_on_when_another_is_full(options, capacity):
    """Of either kind of ring; what lies under an opened one has room for 128 tokens."""
    mech, x = FMA(**SMALL, **options), draw(140)
    whole, each = mech(*x), [[y[b : b + 1] for y in x] for b in range(2)]
    states = [mech.extend(*(y[:, :, :n] for y in one))[1] for one, n in zip(each, (61, capacity), strict=True)]
    rings = [mech.ring(state, capacity=capacity) for state in states]
    assert [ring.capacity for ring in rings] == [capacity] * 2
    ring = type(rings[0]).join(rings)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"full for sequences \[1\]"):
            mech.step(*(y[:, :, 61:62] for y in x), ring)
    ring.reset_(torch.tensor([1]))
    outs = []
    for t in range(30):
        here = [torch.cat([y[:1, :, 61 + t : 62 + t], y[1:, :, t : t + 1]]) for y in x]
        outs.append(mech.step(*here, ring))
    outs = torch.cat(outs, 2)
    assert_within(outs[0], whole[0, :, 61:91], terms=140)
    assert_within(outs[1], whole[1, :, :30], terms=140)


def test_a_sequence_that_was_reset_has_nothing_of_the_one_before():
    mech, x = FMA(**SMALL, open=2), draw(140)
    whole = mech(*x)
    ring = prefilled(mech, [y.index_fill(2, torch.arange(5, 140), math.nan) for y in x], 60)
    ring.reset_(torch.tensor([0, 1]))
    assert_within(stepped(mech, x, ring, 0, 70), whole[:, :, :70], terms=140)


@pytest.mark.parametrize("options", [{"shared": False}, {"level_bias": True, "kv_heads": 2, "levels": 7}])
def test_a_ring_is_made_for_the_heads_of_its_state(options):
    mech, x = FMA(**SMALL, open=2, **options).double(), draw(140)
    with torch.no_grad():
        for weight in mech.parameters():
            weight.add_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
        whole = mech(*x)
    assert_within(stepped(mech, x, prefilled(mech, x, 100), 100, 110), whole[:, :, 100:110], terms=140)
    with pytest.raises(ValueError, match="other heads than the 4 of q; make it with heads=4"):
        stepped(mech, x, prefilled(mech, x, 100, heads=2), 100, 101)


def test_rings_of_another_kind_are_not_joined():
    def ring(x, bias=-1.0, **options):
        mech = FMA(**SMALL, open=2, level_bias=bias, kv_heads=2, levels=7, **options).double()
        return prefilled(mech, x, 50)

    x = draw(60)
    assert OpenedRing.join([ring(x), ring(x)]).tokens.tolist() == [50] * 4
    assert OpenedRing.join([ring([y[:1] for y in x]), ring(x)]).tokens.tolist() == [50] * 3
    with pytest.raises(ValueError, match="the same level_bias"):
        OpenedRing.join([ring(x), ring(x, bias=1.0)])
    few = [y[:, :2] for y in x]
    with pytest.raises(ValueError, match="weight and heads"):
        OpenedRing.join([ring(x, shared=False), ring(few, shared=False)])


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [({}, {"open": 2}, "made with open=0"), ({"open": 2}, {"hold": 4}, "made with hold=1")],
)
def test_a_state_that_cannot_go_on_makes_no_ring(before, after, match):
    mech, x = FMA(**SMALL, **before), draw(50)
    _, state = mech.extend(*x)
    for name, value in after.items():
        setattr(mech, name, value)
    with pytest.raises(ValueError, match=match):
        mech.ring(state, capacity=100)


@pytest.mark.parametrize(
    ("options", "asked", "error", "match"),
    [
        ({"open": 2}, {"store": "disk"}, ValueError, "store must be one of"),
        ({"open": 2}, {"capacity": 90}, ValueError, "100 tokens"),
        ({"open": 2, "shared": False}, {"store": "host", "heads": 4}, NotImplementedError, "choose apart"),
        (
            {"open": 2, "level_bias": True, "kv_heads": 2, "levels": 4},
            {"capacity": 500},
            ValueError,
            "level_bias has 4",
        ),
        ({}, {"store": "host"}, NotImplementedError, "no tokens to keep"),
    ],
)
def test_refusals(options, asked, error, match):
    mech, x = FMA(**SMALL, **options), draw(100)
    _, state = mech.double().extend(*x)
    with pytest.raises(error, match=match):
        mech.ring(state, **asked)


def test_the_future_is_not_looked_at():
    """What lies behind the newest token in the buffers reaches nothing."""
    mech, x = FMA(**SMALL, open=2), draw(140)
    ring, other = (prefilled(mech, x, 101) for _ in range(2))
    for name in ("all_k", "all_v"):
        getattr(other, name)[:, :, 102:] = 1e9
    assert torch.equal(stepped(mech, x, ring, 101, 102), stepped(mech, x, other, 101, 102))


def test_few_scores_are_made(monkeypatch):
    """O(k log n): no level's groups are all scored."""
    mech, x = FMA(block=8, near=8, rank=1, detail=1, open=1, beam=1), draw(1100, batch=1)
    many, original = [], opened._scores
    monkeypatch.setattr(
        opened,
        "_scores",
        lambda x, rows, bias, at, *more: many.append(at.shape[-1]) or original(x, rows, bias, at, *more),
    )
    with torch.no_grad():
        _, state = mech.double().extend(*(y[:, :, :1090] for y in x))
    ring = mech.ring(state, capacity=1200)
    many.clear()
    stepped(mech, x, ring, 1090, 1091)
    assert len(many) == ring.plan.levels
    assert max(many) <= 4
