"""Lightning attention: its three sets of decays, what it equals, its blocks and its states."""

import math

import pytest
import torch

from farfield.mechanisms.lightning_attention import LightningAttention
from farfield.ops.scan import scan
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within

T = 130


def draw(*, heads=4, kv_heads=4, width=8, value_width=8, tokens=T):
    return (
        normal(1, heads, tokens, width),
        normal(1, kv_heads, tokens, width, seed=1),
        normal(1, kv_heads, tokens, value_width, seed=2),
    )


def step_by_step(q, k, v, rates):
    state, out = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=q.dtype), []
    factor = torch.tensor([math.exp(-r) for r in rates], dtype=q.dtype)[:, None, None]
    for t in range(q.shape[2]):
        state = factor * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(q[:, :, t, None] @ state)
    return torch.cat(out, 2), state


def test_without_decay_it_is_the_lower_triangle():
    q, k, v = draw()
    got = LightningAttention(decay=(1.0,) * 4)(q.float(), k.float(), v.float())
    assert_within(got, (q @ k.mT).tril() @ v, terms=T)


def test_constant_unit_vectors_sum_the_values_up():
    _, _, v = draw()
    q = torch.full((1, 4, T, 8), 8**-0.5, dtype=torch.float64)
    got = LightningAttention(decay=(1.0,) * 4)(q.float(), q.float(), v.float())
    assert_within(got, v.cumsum(2), terms=T)


def test_fast_decay_leaves_the_token_itself():
    q, k, v = draw()
    got = LightningAttention(decay=(1e-30,) * 4)(q, k, v)
    assert_within(got, (q * k).sum(-1, keepdim=True) * v, terms=T)


def test_one_hot_keys_are_moving_sums_of_slots():
    _, _, v = draw()
    slot = torch.arange(T) * 5 % 3
    q = torch.nn.functional.one_hot(slot, 8).double().expand(1, 4, T, 8)
    rates = [0.1, 0.3, 0.01, 0.0]
    got = LightningAttention(decay=tuple(math.exp(-r) for r in rates))(q.float(), q.float(), v.float())
    exact = torch.zeros_like(v)
    for h, rate in enumerate(rates):
        sums = torch.zeros(3, 8, dtype=torch.float64)
        for t in range(T):
            sums *= math.exp(-rate)
            sums[slot[t]] += v[0, h, t]
            exact[0, h, t] = sums[slot[t]]
    assert_within(got, exact, terms=T)


@pytest.mark.parametrize("chunk", [1, 7, 64, T])
def test_any_block_is_the_recurrence(chunk):
    q, k, v = draw()
    mech = LightningAttention(layer=1, layers=4)
    exact, end = step_by_step(q, k, v, mech.rates(4))
    decay = -torch.tensor(mech.rates(4))
    out, state = scan(q.float(), k.float(), v.float(), decay, chunk=chunk)
    assert_within(out, exact, terms=T)
    assert_within(state, end, terms=T)
    assert_within(mech(q.float(), k.float(), v.float()), exact, terms=T)


@pytest.mark.parametrize("decay", ["released", "paper", "fla"])
def test_gradients(decay):
    x = [t.requires_grad_() for t in draw(heads=2, kv_heads=1, tokens=7, width=3, value_width=2)]
    mech = LightningAttention(decay=decay, layer=1, layers=3)
    assert torch.autograd.gradcheck(mech, x)


def test_states_compose():
    q, k, v = draw()
    mech = LightningAttention()
    cut = 47
    first, whole = (mech.extend(*(t[:, :, part] for t in (q, k, v)))[1] for part in (slice(cut), slice(None)))
    second = mech.extend(*(t[:, :, cut:] for t in (q, k, v)))[1]
    fade = torch.tensor([math.exp(-r * (T - cut)) for r in mech.rates(4)], dtype=torch.float64)[:, None, None]
    assert_within(whole.memory, fade * first.memory + second.memory, terms=T)


def test_state_has_one_size():
    mech, state, sizes = LightningAttention(), None, set()
    for t in (1, 1, 5, 100):
        _, state = mech.extend(*(x.float() for x in draw(tokens=t, value_width=6)), state)
        sizes.add(state.nbytes)
    assert sizes == {4 * 8 * 6 * 4}
    assert state.tokens == 107


# decays


def test_decays_at_the_ends():
    # exp(-slope), exp(-8 h / H): the figures by which the conventions are told apart
    for decay, low, high in (("released", 0.6065, 0.9961), ("paper", 3.355e-4, 0.3679), ("fla", 9.119e-4, 1.0)):
        factors = [math.exp(-r) for r in LightningAttention(decay=decay).rates(8)]
        assert min(factors) == pytest.approx(low, rel=1e-3)
        assert max(factors) == pytest.approx(high, rel=1e-4)


def test_released_decays_fade_out_with_the_layers():
    first, last = (LightningAttention(layer=layer, layers=12).rates(8) for layer in (0, 11))
    assert first == pytest.approx([2.0**-h * (1 + 1e-5) for h in range(1, 9)])
    assert last == pytest.approx([2.0**-h * 1e-5 for h in range(1, 9)])


def test_paper_decays_by_layer():
    assert LightningAttention(decay="paper", layer=3, layers=12).rates(4) == pytest.approx([1.5, 3.0, 4.5, 6.0])
    assert LightningAttention(decay="fla", layer=3, layers=12).rates(4) == pytest.approx([0.0, 1.5, 3.0, 4.5])


def test_slopes_between_powers_of_two():
    # ALiBi: 4 slopes of four heads, then the first and third of eight
    want = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert LightningAttention().rates(6) == pytest.approx([(1 + 1e-5) * x for x in want])


@pytest.mark.parametrize("heads", [1, 3, 6, 8, 12])
@pytest.mark.parametrize("decay", ["released", "paper", "fla"])
def test_any_number_of_heads(decay, heads):
    q, k, v = draw(heads=heads, kv_heads=1, tokens=40)
    mech = LightningAttention(decay=decay, layer=1, layers=5)
    assert_within(mech(q.float(), k.float(), v.float()), mech.reference(q, k, v), terms=40)


def test_scale():
    q, k, v = draw()
    plain, fla = (LightningAttention(decay="fla", scale=s)(q, k, v) for s in (1.0, None))
    assert_within(fla, plain * 8**-0.5, terms=T)
    assert_within(LightningAttention(scale=0.5)(q, k, v), LightningAttention()(q, k, v) / 2, terms=T)


def test_given_decays_keep_their_precision_in_a_narrow_model():
    q, k, v = draw()
    mech = LightningAttention(decay=(0.999, 0.99, 0.9, 0.5)).bfloat16()
    assert_within(mech(q.bfloat16(), k.bfloat16(), v.bfloat16()), mech.reference(q, k, v), terms=T)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": "alibi"}, "released, paper, fla"),
        ({"decay": (0.5, 1.5)}, "above 0 and at most 1"),
        ({"decay": ()}, "above 0 and at most 1"),
        ({"layer": 3, "layers": 3}, "0 to layers - 1"),
    ],
)
def test_refuses_options(options, words):
    with pytest.raises(ValueError, match=words):
        LightningAttention(**options)


def test_refuses_decays_of_other_heads():
    with pytest.raises(ValueError, match="2 decays were given, but q has 4 heads"):
        LightningAttention(decay=(0.5, 0.9))(*draw())
