"""Sparse sparse attention: the method's exact checks."""

import math

import pytest
import torch
from torch.nn.functional import smooth_l1_loss

from farfield.mechanisms.ssa import SSA
from farfield.ops.choose import Scoring, choose
from farfield.select.scored import block_means
from farfield.testing import oracles
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within

SMALL = {"block": 8, "picks": 3}


def draw(tokens, *, heads=4, kv_heads=2, width=8, dtype=torch.float64):
    return [normal(2, h, tokens, width, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads))]


def same(a, b, terms=1000):
    assert_within(a, b, terms=terms)


def read(q, k, scoring):
    """[B, H, T, T]: which tokens the sparse stream reads, from its lists."""
    index, count = choose(q, block_means(k, scoring.block), scoring)
    tokens = q.shape[2]
    blocks = torch.zeros(*index.shape[:3], -(-tokens // scoring.block) + 1, dtype=torch.bool)
    used = torch.arange(scoring.picks) < count[..., None]
    blocks.scatter_(-1, index.long().masked_fill(~used, blocks.shape[-1] - 1), True)
    i = torch.arange(tokens)
    mask = blocks[..., i // scoring.block] & (i <= i[:, None])
    return mask.repeat_interleave(q.shape[1] // k.shape[1], 1)


@pytest.mark.parametrize("tokens", [1, 8, 24])
def test_a_budget_of_everything_is_full_attention(tokens):
    q, k, v = draw(tokens)
    exact = oracles.full(q, k, v, causal=True)[0]
    same(SSA(**SMALL)(q, k, v), exact)
    same(SSA(**SMALL, stream="full")(q, k, v), exact)
    for stream in ("sparse", "full"):
        out, loss = SSA(**SMALL).aligned(q, k, v, stream=stream)
        same(out, exact)
        assert loss < 1e-28


def test_the_difference_is_the_mass_dropped():
    """full - sparse = delta (dropped - sparse) for every row, and |full - sparse| <= 2 delta max |v|."""
    q, k, v = draw(75)
    mech = SSA(**SMALL)
    sparse, full = mech(q, k, v), SSA(**SMALL, stream="full")(q, k, v)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    seen = read(q, k[:, ::2], mech.scoring)
    i = torch.arange(75)
    weights = (q @ k.mT / math.sqrt(8)).masked_fill(i > i[:, None], float("-inf")).softmax(-1)
    kept = weights.masked_fill(~seen, 0.0)
    delta = 1 - kept.sum(-1, keepdim=True)
    lost = weights.masked_fill(seen, 0.0)
    mass = lost.sum(-1, keepdim=True)
    dropped = lost @ v / torch.where(mass > 0, mass, 1.0)
    same(sparse, kept @ v / kept.sum(-1, keepdim=True))
    same(full - sparse, delta * (dropped - sparse))
    assert (delta.amax() > 0.2).item()
    largest = torch.stack([v[:, :, : t + 1].norm(dim=-1).amax(-1) for t in range(75)], -1)
    assert ((full - sparse).norm(dim=-1) <= 2 * delta[..., 0] * largest + 1e-12).all()


def test_gradients_of_keys_that_are_not_chosen():
    """Nothing in the sparse stream alone; something in the full one, and through the loss."""
    q, k, v = (x.requires_grad_() for x in draw(64))
    mech = SSA(**SMALL)
    chosen = read(q.detach(), k.detach(), mech.scoring)[:, :, -1].unflatten(1, (2, 2))
    assert torch.equal(chosen[:, :, 0], chosen[:, :, 1]), "the group chooses together"
    chosen = chosen[:, :, 0]
    last = lambda x: x[:, :, -1].sum()  # noqa: E731
    (d_k,) = torch.autograd.grad(last(mech(q, k, v)), k)
    assert torch.equal(d_k.abs().sum(-1) > 0, chosen)
    (d_k,) = torch.autograd.grad(last(SSA(**SMALL, stream="full")(q, k, v)), k)
    assert (d_k.abs().sum(-1) > 0).all()
    (d_k,) = torch.autograd.grad(mech.aligned(q, k, v)[1], k)
    assert (d_k[:, :, :-1].abs().sum(-1) > 0).all()
    assert not chosen.all()


def test_each_term_moves_one_stream():
    """The loss's gradient is that of full towards a constant, plus that of sparse towards a constant."""
    q, k, v = (x.requires_grad_() for x in draw(50))
    mech, full = SSA(**SMALL, alpha=10.0), SSA(**SMALL, stream="full")
    loss = mech.aligned(q, k, v)[1]
    grads = torch.autograd.grad(loss, (q, k, v))
    still_sparse, still_full = mech(q, k, v).detach(), full(q, k, v).detach()
    sparsity = torch.autograd.grad(10 * smooth_l1_loss(full(q, k, v), still_sparse), (q, k, v))
    commitment = torch.autograd.grad(10 * smooth_l1_loss(mech(q, k, v), still_full), (q, k, v))
    for got, a, b in zip(grads, sparsity, commitment, strict=True):
        same(got, a + b)
        assert a.abs().max() > 1e-6
        assert b.abs().max() > 1e-6
    same(loss, 20 * smooth_l1_loss(still_full, still_sparse))


def test_the_gate_scales_both_outputs():
    q, k, v = draw(50)
    gate = normal(2, 4, 50, seed=7).sigmoid()
    mech, full = SSA(**SMALL, alpha=1.0), SSA(**SMALL, stream="full")
    for stream, plain in (("sparse", mech), ("full", full)):
        out, loss = mech.aligned(q, k, v, stream=stream, gate=gate)
        same(out, plain(q, k, v) * gate[..., None])
        exact = smooth_l1_loss(full(q, k, v) * gate[..., None], mech(q, k, v) * gate[..., None])
        same(loss, 2 * exact)


def test_the_loss_of_bfloat16_is_a_float32_number():
    x = draw(50, dtype=torch.bfloat16)
    out, loss = SSA(**SMALL).aligned(*x)
    exact = SSA(**SMALL).aligned(*(t.double() for t in x))
    assert (out.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert_within(out, exact[0], terms=50)
    # both outputs are rounded before they are compared, and the loss is quadratic in their difference
    assert abs(loss - exact[1]) < 2**-6 * exact[1]


def test_the_own_block_does_not_leak_through_its_mean():
    """A query inside a block, its last one included, does not know the block's later tokens."""
    q, k, v = draw(64)
    mech = SSA(**SMALL)
    before = mech(q, k, v)
    for cut in (8, 15, 16, 17, 63):
        later = [torch.cat([x[:, :, :cut], 9 - 5 * x[:, :, cut:]], 2) for x in (q, k, v)]
        assert torch.equal(mech(*later)[:, :, :cut], before[:, :, :cut])


def test_the_last_query_of_a_block_counts_its_own_block():
    """Its complete block takes part in the softmax, so that the shares of the others shrink, each head's by its own."""
    q, k, _ = draw(64)
    index, count = choose(q, block_means(k, 8), Scoring(8, 3, 8, 8))
    k = k.repeat_interleave(2, 1)
    means = k.unflatten(2, (8, 8)).mean(3)
    for t in range(23, 64, 8):
        own = t // 8
        p = (q[:, :, t : t + 1] @ means[:, :, : own + 1].mT / math.sqrt(8)).softmax(-1)[..., 0, :own]
        best = p.unflatten(1, (2, 2)).sum(2).topk(2).indices.sort(-1).values
        assert torch.equal(index[:, :, t, :2].long(), best)
        assert (index[:, :, t, 2] == own).all()
        assert (count[:, :, t] == 3).all()


@pytest.mark.parametrize("heads", [1, 3, 5, 16])
def test_any_number_of_query_heads_a_key_head(heads):
    q, k, v = draw(60, heads=heads, kv_heads=1)
    same(SSA(**SMALL)(q, k, v), SSA(**SMALL).reference(q, k, v))


def test_one_state_serves_both_streams():
    q, k, v = draw(60)
    sparse, full = SSA(**SMALL), SSA(**SMALL, stream="full")
    _, state = sparse.extend(q[:, :, :50], k[:, :, :50], v[:, :, :50])
    rest = q[:, :, 50:], k[:, :, 50:], v[:, :, 50:]
    same(full.extend(*rest, state)[0], full(q, k, v)[:, :, 50:])
    same(sparse.extend(*rest, state)[0], sparse(q, k, v)[:, :, 50:])


def test_refuses_in_words():
    q, k, v = draw(20)
    with pytest.raises(ValueError, match="stream must be 'sparse' or 'full'"):
        SSA(stream="both")
    with pytest.raises(ValueError, match="stream must be"):
        SSA().aligned(q, k, v, stream="both")
    with pytest.raises(ValueError, match=r"gate must be \[B, H, T\]"):
        SSA().aligned(q, k, v, gate=q)
    with pytest.raises(ValueError, match="picks=0 must hold"):
        SSA(picks=0)
