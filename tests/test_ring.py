"""The decode state in fixed buffers against `extend` and against one forward in float64."""

import pytest
import torch

import farfield as ff
from farfield.nn import Rope
from farfield.ops.append import Plan, append
from farfield.ring import FMARing
from farfield.select.static import far_lists, radii
from farfield.state import State
from farfield.summarize import FilterPool, MeanPool, SoftmaxPool
from farfield.testing.units import assert_within

G, H, D, E = 2, 4, 8, 6


def mechanism(learned=False, rope=False, **options):
    pool = MeanPool()
    if learned:
        pool = FilterPool(G, options["rank"])
        torch.nn.init.constant_(pool.gate, 0.5)
    return ff.FMA(pool=pool, **options), Rope(D, share=0.5) if rope else None


def draw(tokens, batch=2, heads=H, kv_heads=G, width=D, value_width=E):
    shapes = (heads, width), (kv_heads, width), (kv_heads, value_width)
    return [torch.randn(batch, h, tokens, w).bfloat16().float() for h, w in shapes]


def ring_of(mech, state, rotary=None, capacity=256):
    return mech.ring(state, capacity=capacity, rotary=rotary)


def prefilled(mech, x, tokens, rotary=None, capacity=256):
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :tokens] for y in x), rotary=rotary)
    return ring_of(mech, state, rotary, capacity)


def exactly(mech, x, rotary=None):
    """One forward in float64."""
    with torch.no_grad():
        exact = mech.double()(*(y.double() for y in x), rotary=rotary)
        mech.float()
    return exact


def stepped(ring, x, start, stop):
    return torch.cat([ring.step(*(y[:, :, t : t + 1] for y in x)) for t in range(start, stop)], 2)


CASES = [
    {"block": 16, "near": near, "rank": rank, "sinks": sinks, "learned": learned}
    for near, rank, sinks, learned in [
        (16, 1, 0, False),
        (32, 4, 3, False),
        (64, 16, 0, False),
        (16, 4, 16, True),
        (32, 16, 5, True),
        (64, 1, 2, True),
    ]
] + [
    {"block": 8, "near": 16, "rank": 2, "sinks": 8, "learned": True, "rope": True},
    {"block": 6, "near": 18, "rank": 3, "rope": True},
]


@pytest.mark.parametrize("options", [CASES[1], CASES[3]], ids=str)
def test_autocast_rounds_nothing(options):
    mech, _ = mechanism(**options)
    x = draw(150)
    wanted = stepped(prefilled(mech, x, 90), x, 90, 150)
    with torch.autocast("cpu", torch.bfloat16):
        got = stepped(prefilled(mech, x, 90), x, 90, 150)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_steps_are_those_of_a_forward(options):
    mech, rotary = mechanism(**options)
    x = draw(211)
    exact = exactly(mech, x, rotary)
    for start, stop in [(0, 211), (1, 30), (77, 211), (128, 180), (144, 170)]:
        ring = prefilled(mech, x, start, rotary)
        assert_within(stepped(ring, x, start, stop), exact[:, :, start:stop], terms=211, name=f"from {start}")
        assert ring.tokens.tolist() == [stop, stop]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    mech, rotary = mechanism(block=8, near=8, rank=4, sinks=2, rope=True)
    x = draw(120)
    exact = exactly(mech, x, rotary)
    ring = prefilled(mech, [y.to(dtype) for y in x], 50, rotary)
    assert_within(stepped(ring, [y.to(dtype) for y in x], 50, 120), exact[:, :, 50:], terms=120)


def test_three_thousand_steps():
    mech, _ = mechanism(block=16, near=32, rank=4, sinks=3)
    x = draw(3000, batch=1)
    ring = FMARing.empty(1, G, D, E, capacity=3000, block=16, near=32, rank=4, sinks=3)
    assert_within(stepped(ring, x, 0, 3000), exactly(mech, x), terms=3000)


def test_a_state_that_was_cropped():
    mech = ff.FMA(block=8, near=8, rank=4, rewind=20, scale=0.7)
    x = draw(150)
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :140] for y in x))
    ring = ring_of(mech, state.crop(19))
    outs = [mech.step(*(y[:, :, t : t + 1] for y in x), ring) for t in range(121, 150)]
    assert_within(torch.cat(outs, 2), exactly(mech, x)[:, :, 121:], terms=150)


def test_bytes_follow_the_formula():
    for options in CASES:
        mech, rotary = mechanism(**options)
        ring = prefilled(mech, draw(40), 40, rotary, capacity=3000 if mech.block > 6 else 700)
        levels = ring.sum_k.shape[2]
        radius, p, near_rows = radii(mech.near, mech.block, levels), mech.rank, mech.near + mech.block
        sink_groups = -(-mech.sinks // p)
        far_rows = p * (sink_groups + sum(2 * r + 1 for r in radius[1:]))
        picks = sink_groups + 2 * levels
        each = G * (D + E) * ((near_rows + far_rows) * 4 + levels * p * 4)
        each += far_rows * 4 + 8 * near_rows + 4 * picks + 16 * G + 24
        shared = 4 * (mech.near // mech.block + 1)
        shared += 4 * G * p * 2 * p * 2 if options.get("learned") else 0
        shared += 8 * rotary.pairs if rotary else 0
        assert ring.nbytes == 2 * each + shared


def test_a_million_tokens_take_the_bytes_of_a_thousand():
    mech = ff.FMA(block=64, near=64, rank=1)
    q, k, v = draw(1_000_003, batch=1, heads=1, kv_heads=1, width=2, value_width=2)
    state = None
    with torch.no_grad():
        for start in [0, 1000, *range(1 << 18, 1_000_000, 1 << 18)]:
            stop = 1000 if not start else min((start // (1 << 18) + 1) << 18, 1_000_000)
            _, state = mech.extend(*(x[:, :, start:stop] for x in (q, k, v)), state)
            if stop == 1000:
                few = ring_of(mech, state, capacity=1 << 20)
        many = ring_of(mech, state, capacity=1 << 20)
        assert many.nbytes == few.nbytes
        for t in range(1_000_000, 1_000_003):
            here = [x[:, :, t : t + 1] for x in (q, k, v)]
            exact, state = mech.extend(*here, state)
            assert_within(many.step(*here), exact.double(), terms=1000)
    assert many.nbytes == few.nbytes
    assert {n: x.shape for n, x in many.tensors().items()} == {n: x.shape for n, x in few.tensors().items()}


def test_lists_name_what_the_tree_reads():
    for near in (8, 16, 24, 64):
        plan = Plan(8, near, 4, 6, 6)
        radius = radii(near, 8, plan.levels)
        for n in range(plan.capacity // 8):
            listed, used = far_lists(torch.tensor([n]), radius, True, n + 1)
            wanted = [0, 1] if n > radius[0] else []
            for level, (groups, there) in enumerate(zip(listed, used, strict=True)):
                wanted += [plan.slot(level, g) for g in groups[there].tolist()]
            assert plan.listed(n) == sorted(wanted)
            assert len(wanted) <= plan.picks
        # all earlier blocks lie within reach of the last
        assert (plan.capacity // 8 - 1) >> plan.levels == radius[-1]


def test_sequences_at_different_positions():
    mech, rotary = mechanism(block=8, near=16, rank=4, sinks=3, rope=True)
    x = draw(200, batch=1)
    exact = exactly(mech, x, rotary)
    starts = (5, 0, 130)
    ring = FMARing.join([prefilled(mech, x, start, rotary) for start in starts])
    for step in range(40):
        here = [torch.cat([y[:, :, start + step : start + step + 1] for start in starts]) for y in x]
        out = ring.step(*here)
        wanted = torch.cat([exact[:, :, start + step : start + step + 1] for start in starts])
        assert_within(out, wanted, terms=200, name=f"step {step}")
    assert ring.tokens.tolist() == [45, 40, 170]


def test_beams_and_resets():
    mech, _ = mechanism(block=8, near=8, rank=4)
    x = draw(90)
    exact = exactly(mech, x)
    ring = prefilled(mech, x, 60)
    swapped, before = ring.reorder(torch.tensor([1, 0, 1])), ring.near_k.clone()
    out = stepped(swapped, [y[[1, 0, 1]] for y in x], 60, 70)
    assert_within(out, exact[[1, 0, 1], :, 60:70], terms=90)
    assert torch.equal(ring.near_k, before)
    where = {name: y.data_ptr() for name, y in ring.tensors().items()}
    ring.reorder_(torch.tensor([1, 1]))
    assert_within(stepped(ring, [y[[1, 1]] for y in x], 60, 90), exact[[1, 1], :, 60:90], terms=90)
    # one sequence starts anew, the other goes on from 60
    ring = prefilled(mech, x, 60)
    ring.reset_(torch.tensor([0]))
    for t in range(30):
        here = [torch.stack([y[0, :, t : t + 1], y[1, :, 60 + t : 61 + t]]) for y in x]
        assert_within(ring.step(*here), torch.stack([exact[0, :, t : t + 1], exact[1, :, 60 + t : 61 + t]]), terms=90)
    ring.reset_()
    assert_within(stepped(ring, x, 0, 30), exact[:, :, :30], terms=90)
    assert where.keys() == ring.tensors().keys()
    with pytest.raises(ValueError, match=r"needs 2 beams, one a sequence, got 3"):
        ring.reorder_(torch.tensor([0, 0, 1]))


def test_steps_stay_in_their_buffers():
    mech, rotary = mechanism(block=8, near=8, rank=4, rope=True)
    x = draw(60)
    ring = prefilled(mech, x, 10, rotary)
    where = {name: y.data_ptr() for name, y in ring.tensors().items()}
    stepped(ring, x, 10, 60)
    assert where == {name: y.data_ptr() for name, y in ring.tensors().items()}


def test_saved_and_loaded(tmp_path):
    mech, rotary = mechanism(block=8, near=8, rank=4, learned=True, rope=True)
    x = draw(60)
    ring = prefilled(mech, x, 33, rotary)
    ring.save(tmp_path / "ring.safetensors")
    loaded = State.load(tmp_path / "ring.safetensors")
    assert isinstance(loaded, FMARing)
    copied = ring.copy().to("cpu")
    out = stepped(ring, x, 33, 60)
    assert torch.equal(stepped(loaded, x, 33, 60), out)
    assert torch.equal(stepped(copied, x, 33, 60), out)


def test_opcheck():
    mech, rotary = mechanism(block=8, near=8, rank=4, learned=True, rope=True)
    x = draw(20)
    ring = prefilled(mech, x, 17, rotary)
    buffers = [y for name, y in ring.tensors().items() if name != "near_index"]
    arguments = (*(y[:, :, 17:18] for y in x), *buffers, list(ring.plan))
    torch.library.opcheck(append, arguments, test_utils=("test_schema", "test_faketensor"))


def test_refusals():
    mech, _ = mechanism(block=8, near=8, rank=4)
    with torch.no_grad():
        _, state = mech.extend(*draw(200))
    with pytest.raises(ValueError, match=r"the state has 200 tokens, capacity=20 is too small"):
        ring_of(mech, state, capacity=20)
    with pytest.raises(ValueError, match=r"capacity=1000000 needs 16 levels, but blocks of 8 tokens have time for 8"):
        ring_of(mech, state, capacity=1_000_000)
    with pytest.raises(ValueError, match=r"capacity must be at least 1, got 0"):
        ring_of(mech, state, capacity=0)
    with pytest.raises(ValueError, match=r"sinks must lie in 0 .. block=8, got 9"):
        FMARing.empty(1, 1, 4, capacity=10, block=8, near=8, rank=4, sinks=9)
    with pytest.raises(NotImplementedError, match=r"takes MeanPool and FilterPool, got SoftmaxPool"):
        FMARing.from_state(state, capacity=300, pool=SoftmaxPool(G, 4, D))
    with pytest.raises(ValueError, match=r"FilterPool: was made for kv_heads=1, got 2; make it with kv_heads=2"):
        FMARing.from_state(state, capacity=300, pool=FilterPool(1, 4))
    with pytest.raises(NotImplementedError, match=r"as farfield.nn.Rope does; got function"):
        FMARing.from_state(state, capacity=300, rotary=lambda x, position: x)
    with pytest.raises(ValueError, match=r"4 rotated pairs do not fit a width of 6"):
        FMARing.empty(1, 1, 6, capacity=10, rotary=Rope(8, share=1.0))
    ring = ring_of(mech, state, capacity=256)
    q, k, v = draw(1)
    with pytest.raises(ValueError, match=r"the ring was made for \{.*'rank': 4, .*\}, not for \{.*'rank': 2, "):
        ff.FMA(block=8, near=8, rank=2).step(q, k, v, ring)
    with pytest.raises(ValueError, match=r"takes q \[2, H, 1, 8\], k \[2, 2, 1, 8\] and v \[2, 2, 1, 6\], got"):
        ring.step(q, v, v)
    with pytest.raises(TypeError, match=r"holds torch.float32, got torch.float64"):
        ring.step(q.double(), k, v)
    with pytest.raises(ValueError, match=r"rings must be of one kind"):
        FMARing.join([ring, ring_of(mech, state, capacity=3000)])
    ring.clock.fill_(ring.capacity)
    with pytest.raises(ValueError, match=r"reaches back over 256 tokens and is full for sequences \[0, 1\]"):
        ring.step(q, k, v)
