"""Hash attention and QK-dropping: the paper's masks, literally, and what sorting and compaction must keep."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from farfield import mechanisms
from farfield.mechanisms.scfa import DropState, HashState, SparseCausalFlash
from farfield.ops import hashed as ops
from farfield.ops.attend import attend
from farfield.select import hashed
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within
from farfield.types import Rows


def inputs(tokens, heads=3, width=8, batch=2, seed=0):
    return [normal(batch, heads, tokens, width, seed=3 * seed + i).requires_grad_() for i in range(3)]


def dense(q, k, v, seen):
    """Masked softmax attention in float64; 0 where nothing is seen."""
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * seen
    mass = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(mass > 0, mass, 1.0)


def run(order, q, k, v):
    rows = Rows(order.keys(k), order.keys(v))
    return order.back(attend(order.queries(q), rows, order.layout, position=order.position).out)


def compare(f, want, x, *, dtype=torch.float32, tokens=64):
    """Outputs and gradients of f on x rounded to dtype, against those of the reference."""
    low = [t.detach().to(dtype).requires_grad_() for t in x]
    got, exact = f(*low), want(*x)
    d_out = normal(*exact.shape, seed=99)
    grads = torch.autograd.grad(got, low, d_out.to(dtype))
    right = torch.autograd.grad(exact, x, d_out)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (got, *grads), (exact, *right), strict=True):
        assert_within(a, b, terms=tokens, name=name)


def past(tokens, strict):
    i = torch.arange(tokens)
    return i[:, None] > i if strict else i[:, None] >= i


@pytest.mark.parametrize("tokens", [5, 16, 67])
def test_nothing_dropped_is_causal_attention(tokens):
    x = inputs(tokens)
    mech = SparseCausalFlash(choose="drop", drop=0.0, block=16)
    compare(mech, lambda q, k, v: dense(q, k, v, past(tokens, False)), x, tokens=tokens)


@pytest.mark.parametrize("tokens", [5, 16, 67])
def test_one_bucket_not_strict_is_causal_attention(tokens):
    x, bucket = inputs(tokens), torch.zeros(2, 3, tokens, dtype=torch.int32)
    order = hashed.sort(bucket, many=1, queries=bucket, block=16, strict=False)
    compare(lambda q, k, v: run(order, q, k, v), lambda q, k, v: dense(q, k, v, past(tokens, False)), x)


@pytest.mark.parametrize("tokens", [16, 61])
def test_dropping_is_dense_attention_under_its_masks(tokens):
    """Heads that keep all, some, one and none of the queries or of the keys; counts that no block divides."""
    made = torch.Generator().manual_seed(1)
    asking, there = (torch.rand(2, 6, tokens, generator=made) < 0.4 for _ in range(2))
    asking[0, 0], there[0, 1], asking[1, 2], there[1, 3] = True, True, False, False
    asking[0, 4], there[0, 4] = torch.arange(tokens) == tokens - 1, torch.arange(tokens) == 3
    order = hashed.sort(there.int() - 1, many=1, queries=asking.int() - 1, block=8, strict=False)
    seen = asking[..., None] & there[:, :, None] & past(tokens, False)
    x = inputs(tokens, heads=6)
    compare(lambda q, k, v: run(order, q, k, v), lambda q, k, v: dense(q, k, v, seen), x)
    out = run(order, *x)
    assert not out[~seen.any(-1)].any()
    assert out[seen.any(-1)].any(-1).all()


@pytest.mark.parametrize("shared", [True, False])
def test_hashing_is_dense_attention_within_buckets(shared):
    made = torch.Generator().manual_seed(2)
    bucket, asking = (torch.randint(0, 5, (2, 3, 61), generator=made) for _ in range(2))
    asking = bucket if shared else asking
    order = hashed.sort(bucket, many=5, queries=None if shared else asking, block=8)
    seen = (asking[..., None] == bucket[:, :, None]) & past(61, True)
    x = inputs(61)
    compare(lambda q, k, v: run(order, q, k, v), lambda q, k, v: dense(q, k, v, seen), x)
    assert not run(order, *x)[~seen.any(-1)].any()


@pytest.mark.parametrize("shared", [True, False])
def test_first_token_reads_nothing(shared):
    mech = SparseCausalFlash(buckets=4, shared=shared, block=16)
    assert not mech(*inputs(40))[:, :, 0].any()


def test_labels_of_buckets_do_not_matter():
    bucket = torch.randint(0, 6, (2, 3, 80), generator=torch.Generator().manual_seed(3))
    labels = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    x = [t.float() for t in inputs(80)]
    before, after = (run(hashed.sort(b, many=6, block=16), *x) for b in (bucket, labels[bucket]))
    assert torch.equal(before, after)


def test_order_within_a_bucket_matters_to_the_sorted_path_and_not_to_the_mask():
    """What is hidden follows from slots, so an unstable sort is a wrong one; positions that move along set it right."""
    tokens, (q, k, v) = 48, inputs(48, heads=1, batch=1)
    bucket = torch.zeros(1, 1, tokens, dtype=torch.int32)
    order = hashed.sort(bucket, many=1, queries=bucket, block=16)
    want = dense(q, k, v, past(tokens, True))
    assert_within(run(order, q, k, v), want, terms=tokens)
    mixed = torch.randperm(tokens, generator=torch.Generator().manual_seed(5))
    k, v = order.keys(k)[:, :, mixed], order.keys(v)[:, :, mixed]
    q, position = order.queries(q), order.slots.q_token.long()
    unstable = attend(q, Rows(k, v), order.layout, position=order.position).out
    assert (order.back(unstable) - want).abs().max() > 0.1
    # keys of a token end after it: strictly before is at most one position less
    end = order.slots.k_token[:, :, mixed].long() + 1
    every = replace(order.layout, count=torch.full_like(order.layout.count, order.layout.row_blocks))
    every = replace(every, index=torch.arange(every.row_blocks, dtype=torch.int32).expand_as(every.index))
    moved = attend(q, Rows(k, v, end=end), every, position=position).out
    assert_within(order.back(moved), want, terms=tokens)


def test_sort_is_stable():
    bucket = torch.randint(0, 4, (2, 2, 200), generator=torch.Generator().manual_seed(6), dtype=torch.int32)
    slots = hashed.sort(bucket, many=4, block=16).slots
    for b in range(2):
        for h in range(2):
            filled = [t for t in slots.k_token[b, h].tolist() if t >= 0]
            assert filled == sorted(range(200), key=lambda t: (int(bucket[b, h, t]), t))
            for t in range(200):
                assert slots.k_token[b, h, slots.k_slot[b, h, t]] == t


def test_lists_are_tight():
    """A block reads the blocks of its bucket up to the last that any of its queries sees, and no other."""
    made = torch.Generator().manual_seed(7)
    bucket, asking = (torch.randint(-1, 3, (2, 2, 150), generator=made, dtype=torch.int32) for _ in range(2))
    for queries in (None, asking):
        order = hashed.sort(bucket, many=3, queries=queries, block=16)
        slots, mine = order.slots, bucket if queries is None else asking
        seen = (mine[..., None] == bucket[:, :, None]) & (mine >= 0)[..., None] & past(150, True)
        for b, h, n in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(slots.count.shape[2])):
            tokens = [t for t in slots.q_token[b, h, n * 16 : n * 16 + 16].tolist() if t >= 0]
            assert len({int(mine[b, h, t]) for t in tokens}) <= 1
            rows = slots.k_slot[b, h][seen[b, h, tokens].any(0)]
            assert slots.index[b, h, n, : slots.count[b, h, n]].tolist() == (rows // 16).unique().tolist()


def test_degenerate_buckets():
    q, k, v = inputs(40)
    one = torch.full((2, 3, 40), 3, dtype=torch.int32)
    assert_within(run(hashed.sort(one, many=4, block=8), q, k, v), dense(q, k, v, past(40, True)), terms=40)
    own = torch.arange(40, dtype=torch.int32).expand(2, 3, -1)
    order = hashed.sort(own, many=40, block=8)
    out = run(order, q, k, v)
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert not order.layout.count.any()


def test_buckets_collide_less_the_wider_the_angle():
    """The share of equal buckets falls with the angle, from 1 at 0 to less than that of strangers at 180 degrees."""
    q, other = (normal(1, 1, 20000, 32, seed=s) for s in (0, 1))
    q = q / q.norm(dim=-1, keepdim=True)
    other = other - (other * q).sum(-1, keepdim=True) * q
    other = other / other.norm(dim=-1, keepdim=True)
    own, shares = hashed.buckets(q, many=16), []
    for degrees in (0, 15, 30, 50, 70, 90, 120):
        angle = torch.tensor(degrees).deg2rad()
        near = q * angle.cos() + other * angle.sin()
        shares.append(float((hashed.buckets(5 * near, many=16) == own).double().mean()))
    assert shares[0] > 0.999
    assert all(a > b + 0.01 for a, b in pairwise(shares)), shares
    assert abs(shares[5] - 1 / 16) < 0.01  # at a right angle nothing is known
    assert not (hashed.buckets(-q, many=16) == own).any()


def test_ties_go_to_the_first_direction():
    assert not hashed.buckets(torch.zeros(1, 2, 3, 4), many=6).any()


def test_buckets_differ_by_head_and_seed():
    q = normal(1, 1, 500, 16).expand(1, 2, -1, -1)
    first, second = hashed.buckets(q, many=16)[0]
    assert (first == second).double().mean() < 0.5
    assert (hashed.buckets(q, many=16, seed=1)[0, 0] == first).double().mean() < 0.5


def test_what_is_kept_is_random_and_does_not_change_as_the_text_grows():
    kept = hashed.kept(0.3, heads=8, start=0, stop=20000, seed=5)
    assert torch.equal(kept[..., 100:120], hashed.kept(0.3, heads=8, start=100, stop=120, seed=5))
    rows = kept.flatten(0, 1).double()
    # 160000 draws a side; five standard deviations
    assert (rows.mean(1) - 0.3).abs().max() < 5 * (0.21 / 20000) ** 0.5
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 5 / 20000**0.5
    after = torch.stack([torch.corrcoef(torch.stack([r[:-1], r[1:]]))[0, 1] for r in rows])
    assert after.abs().max() < 5 / 20000**0.5
    assert (hashed.kept(0.3, heads=8, start=0, stop=20000, seed=6) != kept).double().mean() > 0.3
    assert hashed.kept(1.0, heads=1, start=0, stop=99).all()


def test_a_dropped_query_gives_zero_and_a_dropped_key_is_never_read():
    mech = SparseCausalFlash(choose="drop", drop=0.7, seed=3)
    asking, there = hashed.kept(0.3, heads=3, start=0, stop=90, seed=3)
    q, k, v = inputs(90)
    out = mech(q, k, v)
    d_k, d_v = torch.autograd.grad(out.square().sum(), (k, v))
    assert not out[:, ~asking].any()
    assert not d_k[:, ~there].any()
    assert not d_v[:, ~there].any()
    assert d_v[:, there].any()


def test_the_state_of_dropping_holds_kept_rows_only():
    mech, (q, k, v) = SparseCausalFlash(choose="drop", drop=0.7), (t.detach() for t in inputs(200))
    there = hashed.kept(0.3, heads=3, start=0, stop=200)[1]
    _, state = mech.extend(q, k, v)
    assert isinstance(state, DropState)
    assert state.k.shape[2] == int(there.sum(1).max()) < 100


def test_a_token_reads_only_the_rows_of_its_bucket():
    """Rows of other buckets may hold anything."""
    mech, (q, k, v) = SparseCausalFlash(buckets=4), (t.detach().float() for t in inputs(50))
    _, state = mech.extend(q[:, :, :49], k[:, :, :49], v[:, :, :49])
    assert isinstance(state, HashState)
    q, k, v = (t[:, :, 49:] for t in (q, k, v))
    want, _ = mech.extend(q, k, v, state)
    others = (state.bucket != hashed.buckets(q, many=4))[..., None]
    poisoned = replace(state, k=state.k.masked_fill(others, 1e4), v=state.v.masked_fill(others, 1e4))
    assert torch.equal(mech.extend(q, k, v, poisoned)[0], want)
    with pytest.raises(TypeError, match="state"):
        SparseCausalFlash(choose="drop").extend(q, k, v, state)


def test_take_and_its_gradient():
    x = normal(2, 2, 5, 3).requires_grad_()
    index = torch.tensor([3, -1, 0, 4], dtype=torch.int32).expand(2, 2, -1)
    inverse = torch.tensor([2, -1, -1, 0, 3], dtype=torch.int32).expand(2, 2, -1)
    assert torch.equal(ops.take(x, index, inverse)[:, :, 1], torch.zeros(2, 2, 3, dtype=x.dtype))
    assert torch.autograd.gradcheck(lambda x: ops.take(x, index, inverse), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.take(x, index, inverse).square(), x)
    with pytest.raises(ValueError, match="take"):
        ops.take(x, index, index)


def test_refusals():
    for options in ({"choose": "learn"}, {"buckets": 5}, {"buckets": 0}, {"drop": 1.0}, {"drop": -0.1}, {"block": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            mechanisms.make("scfa", **options)
    with pytest.raises(ValueError, match="even"):
        hashed.buckets(normal(1, 1, 2, 4), many=3)
    with pytest.raises(ValueError, match="strictly"):
        hashed.sort(torch.zeros(1, 1, 4, dtype=torch.int32), many=1, strict=False)
    with pytest.raises(ValueError, match="last of the tokens"):
        hashed.sort(*[torch.zeros(1, 1, 4, dtype=torch.int32)], many=1, queries=torch.zeros(1, 1, 5, dtype=torch.int32))
