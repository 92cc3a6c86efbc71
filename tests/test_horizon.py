"""FMA with a horizon: which tokens a query reads, that nothing else matters, and that a state stays as small."""

from typing import Any

import pytest
import torch

from farfield.mechanisms.fma import FMA
from farfield.nn import Rope
from farfield.state import State
from farfield.summarize import ConvPool
from farfield.testing.units import assert_within

SMALL: dict[str, Any] = {"block": 4, "near": 4, "rank": 2}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks": {"sinks": 3},
    "near is three blocks": {"near": 12, "sinks": 1},
    "learned": {"pool": "learned", "kv_heads": 2},
    "opened": {"open": 2, "sinks": 3},
    "opened, near is two blocks": {"open": 1, "beam": 3, "near": 8, "hold": 2},
    "opened apart": {"open": 1, "shared": False, "score": "peak", "sinks": 4},
}


def draw(tokens, *, batch=1, heads=4, kv_heads=2, width=8, value_width=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shape = [(batch, h, tokens, n) for h, n in ((heads, width), (kv_heads, width), (kv_heads, value_width))]
    return [torch.randn(s, generator=gen, dtype=torch.float64) for s in shape]


def made(name, **options):
    return FMA(**SMALL | KINDS[name] | options).double()


def same(a, b):
    assert_within(a, b, terms=1000)


def first_read(mech, i):
    """By definition: the first token that query i reads, sinks aside, for a horizon of 64."""
    near, width = mech.near // mech.block, mech.block
    # the levels that 64 tokens have: up to where all groups are neighbours
    while 63 // width > near:
        near, width = -(-near // 2), 2 * width
    return max(i // width - near, 0) * width


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_query_reads_these_tokens(name, causal):
    tokens = 150
    q, k, _ = draw(tokens)
    mech = made(name, horizon=64, causal=causal)
    # values that are unit vectors: the output holds the weights
    weights = mech(q, k, torch.eye(tokens, dtype=torch.float64).expand(1, 2, -1, -1))
    same(weights.sum(-1), torch.ones_like(weights[..., 0]))
    i = torch.arange(tokens)
    first = torch.tensor([first_read(mech, n) for n in range(tokens)])[:, None]
    seen = (i >= first) | (i < mech.sinks)
    if causal:
        seen &= i <= i[:, None]
    else:
        last = torch.tensor([tokens - 1 - first_read(mech, n) for n in range(159, 159 - tokens, -1)])
        # 160 tokens are whole groups: what is read behind a query is what is read before it from the other end
        seen &= (i <= (last + 160 - tokens)[:, None]) | (i < mech.sinks)
    assert torch.equal(weights > 0, seen.expand_as(weights))


@pytest.mark.parametrize("name", KINDS)
def test_up_to_the_horizon_nothing_changes(name):
    x = draw(64)
    mech, without = made(name, horizon=64), made(name)
    without.load_state_dict(mech.state_dict())
    assert torch.equal(mech(*x), without(*x))
    assert mech.rows_read(64) == without.rows_read(64)
    longer = draw(65)
    assert not torch.equal(mech(*longer), without(*longer))


@pytest.mark.parametrize("name", KINDS)
def test_what_lies_beyond_changes_nothing(name):
    q, k, v = draw(150)
    mech = made(name, horizon=64)
    first = first_read(mech, 149)
    other = [x.clone() for x in (k, v)]
    for x in other:
        x[:, :, mech.sinks : first] = 100 * torch.randn(x[:, :, mech.sinks : first].shape, dtype=torch.float64)
    out, changed = mech(q, k, v)[:, :, -10:], mech(q, *other)[:, :, -10:]
    assert first_read(mech, 140) == first
    assert torch.equal(out, changed)
    assert not torch.equal(mech(q, k, v)[:, :, :first], mech(q, *other)[:, :, :first])


@pytest.mark.parametrize("chunks", [(300,), (130, 1, 1, 1, 60, 107), (7, *[1] * 293)], ids=["one", "some", "single"])
@pytest.mark.parametrize("name", KINDS)
def test_extend_is_forward_and_its_state_stays_as_small(name, chunks):
    x = draw(300)
    mech, rope = made(name, horizon=32), Rope(8)
    with torch.no_grad():
        whole, outs, state, at, sizes = mech(*x, rotary=rope), [], None, 0, []
        for many in chunks:
            out, state = mech.extend(*(y[:, :, at : at + many] for y in x), state, rotary=rope)
            outs.append(out)
            at += many
            sizes.append((at, state.rows, state.nbytes))
    same(torch.cat(outs, 2), whole)
    most = mech.near + mech.block + 4 * mech.rank * mech.most + mech.sinks
    if mech.open:
        # three groups of the coarsest level at most, and as many summaries and sketches of them
        span = 3 * mech.block << mech.most
        assert state.all_k.shape[2] <= span
        assert state.sketches[0].rows.shape[2] * mech.block <= span
        most += 2 * mech.rank * span // mech.block
    assert state.rows <= most
    if len(chunks) > 10:
        # from where groups are forgotten on, a state is as large again one such group later
        later = {at: (rows, nbytes) for at, rows, nbytes in sizes}
        width = mech.block << mech.most
        assert later[300 - 300 % width] == later[300 - 300 % width - width]


@pytest.mark.parametrize("name", KINDS)
def test_states_go_back_and_are_stored(name, tmp_path):
    x = draw(260)
    mech = made(name, horizon=32, rewind=9)
    with torch.no_grad():
        whole = mech(*x)
        _, state = mech.extend(*(y[:, :, :250] for y in x))
        state.crop(9).save(tmp_path / "state")
        out, _ = mech.extend(*(y[:, :, 241:] for y in x), State.load(tmp_path / "state"))
    same(out, whole[:, :, 241:])


def test_tokens_in_host_memory_are_forgotten_too():
    x = draw(200)
    mech = made("opened", horizon=32)
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :100] for y in x))
        out, state = mech.extend(*(y[:, :, 100:] for y in x), state.to_host())
    same(out, mech(*x)[:, :, 100:])
    assert state.all_k.shape[2] <= 3 * 16


@pytest.mark.parametrize("rotary", [None, Rope(8)], ids=["plain", "rotated"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "opened, near is two blocks"])
def test_rings_step_as_a_forward_does(name, rotary):
    x = draw(220, batch=2)
    mech = made(name, horizon=32)
    with torch.no_grad():
        whole = mech(*x, rotary=rotary)
        for start in (0, 45, 150):
            _, state = mech.extend(*(y[:, :, :start] for y in x), rotary=rotary)
            ring = mech.ring(state, capacity=220, rotary=rotary, heads=4)
            steps = [mech.step(*(y[:, :, t : t + 1] for y in x), ring) for t in range(start, start + 70)]
            same(torch.cat(steps, 2), whole[:, :, start : start + 70])


def test_a_plain_ring_with_a_horizon_is_never_full():
    mech = made("sinks", horizon=32)
    small, large = (mech.ring(mech.extend(*draw(0))[1], capacity=n) for n in (1000, 1 << 40))
    assert small.nbytes == large.nbytes
    assert small.capacity > 1 << 40
    held = mech.ring(mech.extend(*draw(0))[1], capacity=32)
    assert held.capacity == 32


def test_a_horizon_is_part_of_states_and_rings():
    mech, other = made("opened", horizon=32), made("opened", horizon=64)
    x = draw(80)
    with torch.no_grad():
        _, state = mech.extend(*x)
        with pytest.raises(ValueError, match=r"another horizon.*2 levels.*horizon=64"):
            other.extend(*x, state)
        with pytest.raises(ValueError, match="another horizon"):
            made("opened").ring(state)
        ring = mech.ring(state, capacity=200)
        for wrong in (made("opened", horizon=16), other):
            with pytest.raises(ValueError, match="ring was made with another horizon"):
                wrong.step(*(y[:, :, :1] for y in x), ring)


def test_what_has_parameters_for_each_level_needs_those_of_the_horizon_alone():
    x = draw(200, width=6)
    sizes: dict[str, Any] = {"kv_heads": 2, "width": 6, "value_width": 6, "levels": 3}
    with pytest.raises(ValueError, match="more than the pool's 3 levels"):
        FMA(**SMALL, pool="conv", **sizes).double()(*x)
    with pytest.raises(ValueError, match="level_bias has 3 levels"):
        FMA(**SMALL, level_bias=True, **sizes).double()(*x)
    kinds: list[dict[str, Any]] = [{"pool": "conv"}, {"level_bias": -0.5}, {"pool": "conv", "open": 1}]
    for options in kinds:
        mech = FMA(**SMALL, horizon=64, **options, **sizes).double()
        with torch.no_grad():
            whole, outs, state = mech(*x), [], None
            for at in range(0, 200, 50):
                out, state = mech.extend(*(y[:, :, at : at + 50] for y in x), state)
                outs.append(out)
        same(torch.cat(outs, 2), whole)
    # conv starts as the mean
    same(FMA(**SMALL, horizon=64, pool="conv", **sizes).double()(*x), FMA(**SMALL, horizon=64)(*x))


def test_a_pool_with_fewer_levels_than_the_horizon_is_refused():
    pool = ConvPool(2, 8, 6, 4, 2)
    with pytest.raises(ValueError, match="more than the pool's 2 levels"):
        FMA(**SMALL, pool=pool, horizon=64)(*(x.float() for x in draw(200)))


@pytest.mark.parametrize("name", ["sinks", "opened"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_have_their_own(name, causal):
    lengths = [90, 13, 150]
    x = draw(sum(lengths))
    mech = made(name, horizon=32, causal=causal)
    out = mech(*x, group=torch.tensor([[n for n, many in enumerate(lengths) for _ in range(many)]]))
    at = 0
    for many in lengths:
        same(out[:, :, at : at + many], mech(*(y[:, :, at : at + many] for y in x)))
        at += many


def test_rows_stop_growing():
    mech, without = FMA(horizon=1 << 13), FMA()
    assert mech.rows_read(1 << 20) < without.rows_read(1 << 13) + 64
    assert without.rows_read(1 << 20) > without.rows_read(1 << 13) + 64


def test_gradients_are_those_of_what_is_read():
    q, k, v = (x.requires_grad_() for x in draw(150))
    mech = made("opened", horizon=64)
    mech(q, k, v)[:, :, -1].sum().backward()
    first = first_read(mech, 149)
    for x in (k, v):
        assert x.grad is not None
        assert (x.grad[:, :, mech.sinks : first] == 0).all()
        assert (x.grad[:, :, first:] != 0).any(-1).all()


def test_the_bound_is_refused_where_the_horizon_cuts():
    mech = FMA(**SMALL, horizon=32)
    mech.certify(*draw(32))
    with pytest.raises(NotImplementedError, match="horizon=32 cuts 33 tokens short"):
        mech.certify(*draw(33))
    with pytest.raises(NotImplementedError, match="horizon=32 cuts 33 tokens short"):
        FMA(**SMALL, horizon=32, tolerance=0.1)(*draw(33))


@pytest.mark.parametrize("horizon", [-5, 0, 8])
def test_a_horizon_within_the_near_field_is_refused(horizon):
    with pytest.raises(ValueError, match=r"must be more than near \+ block = 8"):
        FMA(**SMALL, horizon=horizon)
    with pytest.raises(AttributeError, match="horizon"):
        FMA(**SMALL, horizon=32).horizon = 64  # pyright: ignore[reportAttributeAccessIssue]
