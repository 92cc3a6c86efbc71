"""Rings of tokens and of states: they step as one forward does, wherever they begin, and say when they are full."""

import pytest
import torch

from farfield import mechanisms
from farfield.mechanisms.aaren import Aaren
from farfield.mechanisms.full import Full
from farfield.mechanisms.lightning_attention import LightningAttention
from farfield.mechanisms.moba import MoBA
from farfield.mechanisms.near_field import NearField
from farfield.mechanisms.power_attention import PowerAttention
from farfield.mechanisms.s2_attention import S2Attention
from farfield.mechanisms.ssa import SSA
from farfield.mechanisms.window import SlidingWindow
from farfield.testing.units import assert_within
from farfield.token_ring import StateRing, TokenRing

T = 90


def draw(heads=4, kv_heads=2, width=8, value_width=6, batch=2, tokens=T):
    gen = torch.Generator().manual_seed(0)
    shapes = [(batch, h, tokens, n) for h, n in ((heads, width), (kv_heads, width), (kv_heads, value_width))]
    return [torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes]


MECHANISMS = {
    "full": Full,
    "a window": lambda: SlidingWindow(width=20, sinks=3),
    "a window of one": lambda: SlidingWindow(width=1, sinks=0),
    "a window with room to go back": lambda: SlidingWindow(width=9, sinks=2, rewind=5),
    "near": lambda: NearField(block=8, near=16),
    "near, sinks": lambda: NearField(block=8, near=8, sinks=5),
    "near, large blocks": lambda: NearField(block=32, near=32, sinks=32),
    "powers": lambda: PowerAttention(block=4, window=1, sinks=0),
    "powers, sinks": lambda: PowerAttention(block=5, window=3, sinks=2),
    "shards": lambda: S2Attention(stride=4, local=2, block=8),
    "shards, one dense": lambda: S2Attention(stride=3, local=1, block=5, offset=1, dense_heads=1),
    "shards, all alike": lambda: S2Attention(stride=3, local=2, block=4, homogeneous=True),
    "moba": lambda: MoBA(block=8, picks=3),
    "moba, one pick": lambda: MoBA(block=16, picks=1),
    "ssa": lambda: SSA(block=4, picks=5),
    "ssa, few tokens": lambda: SSA(block=16, picks=40),
    "ssa, full": lambda: SSA(block=8, picks=3, stream="full"),
    "aaren": Aaren,
    "lightning": LightningAttention,
}


def prefilled(mech, x, tokens, **options):
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :tokens] for y in x))
    return mech.ring(state, capacity=options.pop("capacity", T))


def stepped(mech, x, ring, start, stop):
    return torch.cat([mech.step(*(y[:, :, t : t + 1] for y in x), ring) for t in range(start, stop)], 2)


@pytest.mark.parametrize("name", MECHANISMS)
def test_steps_are_those_of_the_reference(name):
    mech, x = MECHANISMS[name](), draw(value_width=8)
    exact = mech.reference(*x)
    for start, stop in ((1, 40), (3, 9), (24, 50), (61, T)):
        ring = prefilled(mech, x, start)
        size = ring.nbytes
        assert_within(stepped(mech, x, ring, start, stop), exact[:, :, start:stop], terms=T, name=f"from {start}")
        assert ring.tokens.tolist() == [stop, stop]
        assert ring.nbytes == size


@pytest.mark.parametrize(
    "mech",
    [PowerAttention(block=192, window=1, sinks=1), S2Attention(stride=3, local=1, block=192, dense_heads=1)],
    ids=["powers", "shards"],
)
def test_blocks_are_read_as_tiles(mech):
    """Of 64 tokens, the last one up to the query's own."""
    x = draw(tokens=1000)
    exact = mech.reference(*x)
    for start, stop in ((190, 200), (900, 1000)):
        found = stepped(mech, x, prefilled(mech, x, start, capacity=1000), start, stop)
        assert_within(found, exact[:, :, start:stop], terms=1000, name=f"from {start}")


def test_without_tokens_a_ring_begins_with_the_first():
    for name in ("a window", "near, sinks", "powers", "shards, one dense", "moba", "ssa"):
        mech, x = MECHANISMS[name](), draw()
        ring = prefilled(mech, x, 0)
        assert_within(stepped(mech, x, ring, 0, 40), mech.reference(*x)[:, :, :40], terms=40, name=name)


@pytest.mark.parametrize("name", ["near, sinks", "powers, sinks", "shards", "moba", "ssa"])
def test_sequences_stand_where_they_are(name):
    """Each has a clock of its own."""
    mech, x = MECHANISMS[name](), draw()
    exact = mech.reference(*x)
    one, other = (prefilled(mech, [y[b : b + 1] for y in x], n) for b, n in enumerate((13, 40)))
    ring = one.replaced({name: torch.cat([y, other.tensors()[name]]) for name, y in one.by_sequence().items()})
    outs = []
    for t in range(30):
        here = [torch.cat([y[:1, :, 13 + t : 14 + t], y[1:, :, 40 + t : 41 + t]]) for y in x]
        outs.append(mech.step(*here, ring))
    outs = torch.cat(outs, 2)
    assert_within(outs[0], exact[0, :, 13:43], terms=T)
    assert_within(outs[1], exact[1, :, 40:70], terms=T)


@pytest.mark.parametrize("name", ["full", "a window", "near, sinks", "moba", "lightning", "aaren"])
def test_beams_are_reordered_in_place(name):
    mech, x = MECHANISMS[name](), draw(value_width=8)
    ring = prefilled(mech, x, 30)
    untouched = ring.copy()
    ring.reorder_(torch.tensor([1, 1]))
    out = stepped(mech, [y[[1, 1]] for y in x], ring, 30, 33)
    assert torch.equal(out[0], out[1])
    assert_within(out, mech.reference(*x)[[1, 1], :, 30:33], terms=T)
    assert untouched.tokens.tolist() == [30, 30]
    with pytest.raises(ValueError, match="needs 2 beams"):
        ring.reorder_(torch.tensor([1]))


@pytest.mark.parametrize("name", ["full", "powers", "shards", "ssa"])
def test_a_full_ring_says_so_before_anything_is_written(name):
    mech, x = MECHANISMS[name](), draw()
    ring = prefilled(mech, x, 40, capacity=41)
    assert ring.capacity == 41
    stepped(mech, x, ring, 40, 41)
    before = {name: y.clone() for name, y in ring.tensors().items()}
    with pytest.raises(ValueError, match=r"holds 41 tokens and is full for sequences \[0, 1\]"):
        stepped(mech, x, ring, 41, 42)
    assert all(torch.equal(y, before[name]) for name, y in ring.tensors().items())
    with pytest.raises(ValueError, match=r"the state has 40 tokens, capacity=39 is too small"):
        prefilled(mech, x, 40, capacity=39)


def test_bytes_are_those_of_the_formula():
    mech, x = SlidingWindow(width=100, sinks=3), draw()
    ring = prefilled(mech, x, 70)
    assert isinstance(ring, TokenRing)
    assert ring.nbytes == 2 * (2 * (8 + 6) * 103 * 8 + 8 * 103 + 20) + 4 * 2


def test_refusals():
    mech, x = Full(), draw()
    ring = prefilled(mech, x, 10)
    q, k, v = (y[:, :, 10:11] for y in x)
    with pytest.raises(ValueError, match=r"takes q \[2, H, 1, 8\], k \[2, 2, 1, 8\] and v \[2, 2, 1, 6\], got"):
        mech.step(q, v, v, ring)
    with pytest.raises(TypeError, match=r"holds torch.float64, got torch.float32"):
        mech.step(q.float(), k.float(), v.float(), ring)
    for name in ("full", "a window", "near", "powers", "shards", "moba", "ssa", "lightning", "aaren"):
        with pytest.raises(NotImplementedError, match="does not place rotations itself"):
            MECHANISMS[name]().ring(None, capacity=9, rotary=lambda x, position: x)
    for name in ("full", "moba", "shards"):
        with pytest.raises(TypeError, match=r"goes on from a state of its own, .*, got WindowState"):
            MECHANISMS[name]().ring(SlidingWindow().extend(*x)[1], capacity=99)
    with pytest.raises(ValueError, match="the state has no tokens"):
        StateRing.of(LightningAttention().extend(*(y[:, :, :0] for y in draw(value_width=8)))[1])


def test_those_without_rings_say_so():
    for name in ("hip", "nsa", "scfa"):
        with pytest.raises(NotImplementedError, match="no buffers of fixed size"):
            mechanisms.make(name).ring(None, capacity=9)
