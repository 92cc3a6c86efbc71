"""Aaren: every prefix's softmax by one scan, its recurrence, and scores of any size."""

import pytest
import torch

import farfield as ff
from farfield.mechanisms.aaren import Aaren
from farfield.ops.scan import Prefix, prefix_softmax
from farfield.testing.inputs import normal
from farfield.testing.largest import Largest
from farfield.testing.units import assert_within
from farfield.types import Partial

T = 150


def dense(scores, v):
    """One softmax after the other."""
    outs = [scores[..., None, : t + 1].softmax(-1) @ v[:, :, : t + 1] for t in range(v.shape[2])]
    return torch.cat(outs, 2)


def sequential(scores, v):
    """The recurrence, token by token; the states after each."""
    peak, mass = torch.full(scores.shape[:2], float("-inf"), dtype=v.dtype), torch.zeros(scores.shape[:2]).to(v)
    total, outs, states = torch.zeros_like(v[:, :, 0]), [], []
    for t in range(v.shape[2]):
        higher = torch.maximum(peak, scores[..., t])
        fade, new = (peak - higher).exp(), (scores[..., t] - higher).exp()
        peak, mass = higher, mass * fade + new
        total = total * fade[..., None] + new[..., None] * v[:, :, t]
        outs.append(total / mass[..., None])
        states.append(Prefix(peak, mass, total))
    return torch.stack(outs, 2), states


def draw(heads=2, tokens=T, width=6):
    return normal(2, heads, tokens), normal(2, heads, tokens, width, seed=1)


@pytest.mark.parametrize("chunk", [2, 3, 16, 64, 200])
def test_every_prefix_is_a_softmax(chunk):
    scores, v = draw()
    exact = dense(scores, v)
    assert_within(prefix_softmax(scores.float(), v.float(), chunk=chunk)[0], exact, terms=T)
    assert_within(sequential(scores, v)[0].float(), exact, terms=T)


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_scores_of_any_size(offset):
    scores, v = draw()
    # up and down by a hundred, where a running sum of exponentials overflows or is 0
    scores = (100 * scores + offset).float().double()
    exact = dense(scores, v)
    got = prefix_softmax(scores.float(), v.float(), chunk=16)[0]
    assert (got - exact).abs().max() < 1e-5
    assert_within(got, exact, terms=T)
    plain = (scores.float().exp()[..., None] * v.float()).cumsum(2) / scores.float().exp().cumsum(2)[..., None]
    assert not plain.isfinite().all()


def test_equal_scores_are_running_means():
    _, v = draw()
    exact = v.cumsum(2) / torch.arange(1, T + 1)[:, None]
    assert_within(prefix_softmax(torch.full((2, 2, T), -777.0), v.float())[0], exact, terms=T)
    q = torch.zeros(2, 2, T, 6)
    assert_within(Aaren()(q, normal(2, 2, T, 6, seed=3).float(), v.float()), exact, terms=T)


def test_one_dominant_score_takes_over():
    scores, v = draw()
    scores[..., 70] = 1e3
    got = prefix_softmax(scores.float(), v.float())[0]
    assert_within(got[:, :, 70:], v[:, :, 70:71].expand(-1, -1, T - 70, -1), terms=T)
    assert_within(got[:, :, :70], dense(scores, v)[:, :, :70], terms=T)


def test_it_is_a_gated_average():
    scores, v = draw()
    gate = (scores - scores.logcumsumexp(-1)).exp()[..., None]
    out, outs = torch.zeros_like(v[:, :, 0]), []
    for t in range(T):
        out = (1 - gate[:, :, t]) * out + gate[:, :, t] * v[:, :, t]
        outs.append(out)
    assert_within(prefix_softmax(scores.float(), v.float())[0], torch.stack(outs, 2), terms=T)


def test_the_operator_is_merge():
    scores, v = draw()
    pieces = [slice(0, 40), slice(40, 41), slice(41, T)]
    states = [prefix_softmax(scores[..., p], v[:, :, p])[1] for p in pieces]
    partials = [Partial((s.total / s.mass[..., None])[:, :, None], (s.peak + s.mass.log())[:, :, None]) for s in states]
    exact = dense(scores, v)[:, :, -1:]
    for order in ((0, 1, 2), (2, 0, 1)):
        assert_within(ff.merge(*(partials[i] for i in order)).out.float(), exact, terms=T)
    left = ff.merge(ff.merge(partials[0], partials[1]), partials[2])
    right = ff.merge(partials[0], ff.merge(partials[1], partials[2]))
    assert_within(left.out.float(), right.out, terms=T)


@pytest.mark.parametrize("pieces", [[T], [1] * T, [64, 0, 1, 85], [3, 147]])
def test_pieces_are_one_call_and_the_recurrence(pieces):
    scores, v = draw()
    state, outs = None, []
    for s, x in zip(scores.float().split(pieces, 2), v.float().split(pieces, 2), strict=True):
        out, state = prefix_softmax(s, x, state, chunk=16)
        outs.append(out)
    exact, states = sequential(scores, v)
    assert_within(torch.cat(outs, 2), exact, terms=T)
    for got, want in zip(state, states[-1], strict=True):
        assert_within(got, want, terms=T)


def test_hidden_tokens():
    scores, v = draw()
    hidden = torch.zeros(T, dtype=torch.bool)
    hidden[[*range(5), 40, *range(64, 130)]] = True
    x = [scores.float().masked_fill(hidden, float("-inf")).requires_grad_(), v.float().requires_grad_()]
    got, state = prefix_softmax(*x, chunk=16)
    assert (got[:, :, :5] == 0).all()
    assert_within(got[:, :, ~hidden], dense(scores[..., ~hidden], v[:, :, ~hidden]), terms=T)
    grads = torch.autograd.grad((got.square().sum(), state.total.sum()), x)
    assert all(g.isfinite().all() and not g[:, :, hidden].any() for g in grads)
    nothing, state = prefix_softmax(torch.full((2, 2, T), float("-inf")), v.float())
    assert not nothing.any()
    # a prefix of nothing goes on as if it had not been
    after, _ = prefix_softmax(scores.float(), v.float(), state)
    assert_within(after, dense(scores, v), terms=T)


def test_gradients_by_the_closed_form():
    scores, v = (x.float().requires_grad_() for x in draw(tokens=40))
    out, _ = prefix_softmax(scores, v, chunk=8)
    g = normal(*out.shape, seed=5)
    d_scores, d_v = torch.autograd.grad(out, (scores, v), g.float())
    s, x = scores.detach().double(), v.detach().double()
    p = (s[..., None, :] - s.logcumsumexp(-1)[..., None]).exp().tril()
    assert_within(d_v, p.mT @ g, terms=40)
    spread = x[:, :, None] - dense(s, x)[:, :, :, None]
    assert_within(d_scores, torch.einsum("bhti,bhte,bhtie->bhi", p, g, spread), terms=40)


def test_gradients_through_the_state():
    def pieces(scores, v):
        _, state = prefix_softmax(scores[..., :5], v[:, :, :5], chunk=2)
        out, state = prefix_softmax(scores[..., 5:], v[:, :, 5:], state, chunk=3)
        return out, state.total / state.mass[..., None]

    scores, v = (x.requires_grad_() for x in draw(tokens=11, width=2))
    assert torch.autograd.gradcheck(pieces, (scores, v))


def test_gradients_at_large_scores():
    scores, v = draw()
    x = [(1e4 * scores).float().requires_grad_(), v.float().requires_grad_()]
    grads = torch.autograd.grad(prefix_softmax(*x)[0].square().sum(), x)
    assert all(g.isfinite().all() for g in grads)


def test_never_reads_the_future():
    scores, v = (x.float() for x in draw())
    before = prefix_softmax(scores, v)[0]
    for cut in (1, 63, 64, 65, 149):
        changed = (
            torch.cat([scores[..., :cut], scores[..., cut:] + 1e3], -1),
            torch.cat([v[:, :, :cut], -v[:, :, cut:]], 2),
        )
        assert torch.equal(prefix_softmax(*changed)[0][:, :, :cut], before[:, :, :cut])


def test_the_order_inside_a_prefix_does_not_matter():
    scores, v = draw()
    order = torch.cat([torch.randperm(100), torch.arange(100, T)])
    got = prefix_softmax(scores[..., order].float(), v[:, :, order].float())[0]
    assert_within(got[:, :, 99:], dense(scores, v)[:, :, 99:], terms=T)


def test_memory_grows_with_the_length_not_its_square():
    def elements(tokens):
        with Largest() as watch:
            prefix_softmax(*(x.float() for x in draw(tokens=tokens)), chunk=16)
        return watch.elements

    assert elements(4096) < 1.2 * 4 * elements(1024)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"v": torch.zeros(2, 2, T + 1, 6)}, ValueError, "does not fit scores"),
        ({"v": torch.zeros(2, 2, T, 6, dtype=torch.long)}, TypeError, "v must be floating point"),
        ({"scores": torch.zeros(2, T)}, ValueError, "scores must have 3 dimensions"),
        ({"chunk": 1}, ValueError, "chunk must be at least 2, got 1"),
        ({"state": Prefix(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2, 5))}, ValueError, "state must hold"),
        # one of them alone
        ({"state": Prefix(torch.zeros(2, 1), torch.zeros(2, 2), torch.zeros(2, 2, 6))}, ValueError, "state must hold"),
    ],
)
def test_refuses(change, error, words):
    given = {"scores": torch.zeros(2, 2, T), "v": torch.zeros(2, 2, T, 6)} | change
    with pytest.raises(error, match=words):
        prefix_softmax(**given)


# the mechanism


def test_the_first_token_sees_itself():
    q, k, v = (normal(1, 2, 1, 8, seed=i).float() for i in range(3))
    assert torch.equal(Aaren()(q, k, v), v)
    assert torch.equal(Aaren()(9 * q, k, v), v)


def test_the_query_is_that_of_the_first_token():
    q, k, v = (normal(1, 2, 50, 8, seed=i).float() for i in range(3))
    other = torch.cat([q[:, :, :1], -q[:, :, 1:]], 2)
    assert torch.equal(Aaren()(q, k, v), Aaren()(other, k, v))
    assert not torch.equal(Aaren()(q, k, v), Aaren()(q.flip(2), k, v))


def test_a_learned_query_reads_nothing_of_q():
    q, k, v = (normal(2, 2, 50, 8, seed=i).float() for i in range(3))
    mech = Aaren(width=8, queries=2)
    assert torch.equal(mech(q, k, v), mech(torch.full_like(q, float("nan")), k, v))
    assert sum(p.numel() for p in mech.parameters()) == 16
    with pytest.raises(ValueError, match="build the mechanism with width=8, queries=1 or 2"):
        Aaren(width=8, queries=3)(q, k, v)
    with pytest.raises(ValueError, match="queries needs width"):
        Aaren(queries=3)


def test_the_state_has_one_size():
    mech, state, sizes = Aaren(width=8), None, set()
    for tokens in (0, 1, 1, 100):
        _, state = mech.extend(*(normal(1, 2, tokens, 8, seed=i).float() for i in range(3)), state)
        sizes.add(state.nbytes)
    # nothing yet, then peak, mass and total of 8, and the query, which does not change
    assert sizes == {0, 2 * (8 + 2 + 8) * 4}
    assert state.tokens == 102
