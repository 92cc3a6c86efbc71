"""Mixture of block attention: the method's exact checks."""

import math

import pytest
import torch

import farfield as ff
from farfield.cpu import choose as on_cpu
from farfield.mechanisms.moba import MoBA
from farfield.ops.choose import Scoring, choose
from farfield.select.scored import block_means
from farfield.testing import oracles
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within


def draw(tokens, *, heads=4, kv_heads=2, width=8, seed=0):
    return [normal(2, h, tokens, width, seed=3 * seed + i) for i, h in enumerate((heads, kv_heads, kv_heads))]


def same(a, b, terms=1000):
    assert_within(a, b, terms=terms)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 50])
def test_one_pick_is_the_block_itself(tokens):
    q, k, v = draw(tokens)
    i = torch.arange(tokens)
    own = (i[:, None] // 8 == i // 8) & (i <= i[:, None])
    k_all, v_all = (x.repeat_interleave(2, 1) for x in (k, v))
    exact = (q @ k_all.mT / math.sqrt(8)).masked_fill(~own, float("-inf")).softmax(-1) @ v_all
    same(MoBA(block=8, picks=1)(q, k, v), exact)


@pytest.mark.parametrize("tokens", [1, 8, 50])
def test_all_blocks_are_full_attention(tokens):
    q, k, v = draw(tokens)
    exact = oracles.full(q, k, v, causal=True)[0]
    same(MoBA(block=8, picks=-(-tokens // 8))(q, k, v), exact)
    same(MoBA(block=8, picks=99)(q, k, v), exact)
    if tokens > 8:
        assert (MoBA(block=8, picks=3)(q, k, v) - exact).abs().max() > 1e-3


def test_two_passes_merged_by_lse():
    """The paper's way: the own block, and the past blocks, each with a softmax of its own."""
    q, k, v = draw(75)
    mech, block = MoBA(block=8, picks=4), 8
    i = torch.arange(75)
    own = i // block
    k_all, v_all = (x.repeat_interleave(2, 1) for x in (k, v))
    means = torch.stack([k_all[:, :, own == m].mean(2) for m in range(10)], 2)
    gate = (q @ means.mT).masked_fill(torch.arange(10) >= own[:, None], float("-inf"))
    top = gate.topk(3).indices
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, top, True) & gate.isfinite()
    scores = q @ k_all.mT / math.sqrt(8)
    parts = []
    for seen in ((own[:, None] == own) & (i <= i[:, None]), chosen[..., own]):
        hidden = scores.masked_fill(~seen, float("-inf"))
        lse = hidden.logsumexp(-1)
        out = (hidden - lse[..., None]).exp().nan_to_num(0.0) @ v_all
        parts.append(ff.types.Partial(out, lse))
    same(mech(q, k, v), ff.merge(*parts).out)


def test_early_queries_get_fewer_blocks():
    q, k, _ = draw(64)
    scoring = Scoring(8, 4, 8, 8, shared=False)
    index, count = choose(q, block_means(k, 8), scoring)
    own = torch.arange(64) // 8
    assert torch.equal(count, (own + 1).clamp(max=4).int().expand_as(count))
    last = index.gather(-1, count[..., None].long() - 1)[..., 0]
    assert torch.equal(last, own.int().expand_as(last)), "the own block is the last of the list"
    used = torch.arange(4) < count[..., None]
    assert (index.diff(dim=-1) > 0)[used[..., 1:]].all(), "ascending, no block twice"


def test_own_block_never_competes():
    """A query at the end of its block has a complete block of its own; its mean takes no place from a past one."""
    q, k, _ = draw(32)
    k = k.clone()
    # the own block of the last query would win by far, and is read once all the same
    k[:, :, 24:] = 50 * q[:, ::2, 31:32]
    index, count = choose(q, block_means(k, 8), Scoring(8, 2, 8, 8, shared=False))
    assert (count[:, :, 31] == 2).all()
    assert (index[:, :, 31, 1] == 3).all()
    past = (q[:, :, 31:32] @ block_means(k, 8).repeat_interleave(2, 1).mT)[..., 0, :3].argmax(-1)
    assert torch.equal(index[:, :, 31, 0].long(), past)


def test_ties_go_to_the_lower_block():
    q, k = normal(1, 1, 64, 8), normal(1, 1, 8, 8).repeat(1, 1, 8, 1)
    index, _ = choose(q, block_means(k, 8), Scoring(8, 3, 8, 8, shared=False))
    assert torch.equal(index[0, 0, 63], torch.tensor([0, 1, 7], dtype=torch.int32))


def test_steps_of_the_scores_change_nothing(monkeypatch):
    q, k, _ = draw(70)
    scoring = Scoring(8, 3, 8, 8, shared=False)
    whole = choose(q, block_means(k, 8), scoring)
    monkeypatch.setattr(on_cpu, "STEP", 1)
    for a, b in zip(choose(q, block_means(k, 8), scoring), whole, strict=True):
        assert torch.equal(a, b)


def test_the_choice_carries_no_gradient():
    q, k, v = (x.requires_grad_() for x in draw(64))
    out = MoBA(block=8, picks=2)(q, k, v)
    d_k, d_v = torch.autograd.grad(out[:, :, -1].sum(), (k, v))
    index, count = choose(q, block_means(k, 8), Scoring(8, 2, 8, 8, shared=False))
    read = torch.zeros(2, 2, 8, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            read[b, h // 2, index[b, h, 63, : int(count[b, h, 63])].long()] = True
    for d in (d_k, d_v):
        touched = d.unflatten(2, (8, 8)).abs().sum((3, 4)) > 0
        assert torch.equal(touched, read)


def test_scale_does_not_change_the_choice():
    q, k, v = draw(60)
    same(MoBA(block=8, picks=3, scale=0.1)(q, k, v), MoBA(block=8, picks=3, scale=0.1).reference(q, k, v))


def test_rows_read_are_those_of_the_lists():
    mech = MoBA(block=8, picks=3)
    assert mech.rows_read(60) == pytest.approx(mech.layouts(60)["one head"].visible)


@pytest.mark.parametrize("options", [{"picks": 0}, {"block": 0}])
def test_refuses_impossible_sizes(options):
    with pytest.raises(ValueError, match="moba: "):
        MoBA(**options)
