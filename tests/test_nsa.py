"""Native sparse attention: the method's exact checks."""

import math

import pytest
import torch

import farfield as ff
from farfield.mechanisms.nsa import NSA, _means
from farfield.ops.choose import Scoring, choose
from farfield.testing import contract, oracles
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within

SMALL = {"block": 16, "picks": 4, "span": 8, "stride": 4, "window": 12}


def draw(tokens, *, heads=4, kv_heads=2, width=8, seed=0):
    return [normal(2, h, tokens, width, seed=3 * seed + i) for i, h in enumerate((heads, kv_heads, kv_heads))]


def same(a, b, terms=1000):
    assert_within(a, b, terms=terms)


def branch(n, q):
    """Gates that let one branch through."""
    gates = torch.zeros(*q.shape[:3], 3, dtype=q.dtype)
    gates[..., n] = 1
    return gates


def shares(q, k, stride, span):
    """The compressed branch's softmax, [B, H, T, C]; 0 where no block is complete."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    rows = (k.shape[2] - span) // stride + 1
    means = torch.stack([k[:, :, c * stride : c * stride + span].mean(2) for c in range(rows)], 2)
    ended = torch.arange(rows) * stride + span - 1 <= torch.arange(q.shape[2])[:, None]
    logits = (q @ means.mT / math.sqrt(q.shape[3])).masked_fill(~ended, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0)


def lists(q, k, **options):
    """Which blocks each query reads, [B, G, T, blocks], by the scores of means."""
    scoring = Scoring(**options)
    index, count = choose(q, _means(k, scoring.stride, scoring.span), scoring)
    used = torch.arange(scoring.picks) < count[..., None]
    blocks = -(-q.shape[2] // scoring.block)
    read = torch.zeros(*index.shape[:3], blocks + 1, dtype=torch.int64)
    read.scatter_add_(-1, index.long().masked_fill(~used, blocks), torch.ones_like(index, dtype=torch.int64))
    return read[..., :blocks]


@pytest.mark.parametrize(("block", "stride", "span"), [(16, 4, 8), (16, 4, 4), (8, 8, 8), (8, 2, 8), (8, 4, 16)])
def test_scores_are_overlaps(block, stride, span):
    """The paper's double sum against tokens shared / stride, counted one by one; and the choice that follows."""
    q, k, _ = draw(96)
    p = shares(q, k, stride, span)
    rows, blocks = p.shape[-1], 96 // block
    overlap = torch.zeros(rows, blocks, dtype=torch.float64)
    for c in range(rows):
        for token in range(c * stride, c * stride + span):
            overlap[c, token // block] += 1 / stride
    double = torch.zeros(rows, blocks, dtype=torch.float64)
    for j in range(1, blocks + 1):
        for m in range(block // stride):
            for n in range(span // stride):
                if 1 <= (c := block // stride * j - m - n) <= rows:
                    double[c - 1, j - 1] += 1
    assert torch.equal(overlap, double)
    score = (p @ overlap).unflatten(1, (2, 2)).sum(2)
    own = torch.arange(96)[:, None] // block
    score = score.masked_fill(torch.arange(blocks) >= own, -1.0)
    best = torch.zeros_like(score).scatter(-1, score.topk(2).indices, 1.0) * (score >= 0)
    want = best.long() + (torch.arange(blocks) == own)
    assert torch.equal(lists(q, k, block=block, picks=3, stride=stride, span=span), want)


def test_the_paper_sizes_weigh_1_2_2_2_1():
    weights = torch.zeros(40, dtype=torch.int64)
    for m in range(64 // 16):
        for n in range(32 // 16):
            weights[4 * 5 - m - n - 1] += 1
    assert weights[weights > 0].tolist() == [1, 2, 2, 2, 1]


def test_one_size_scores_by_its_shares():
    """l = l' = d: the score of a block is its own share."""
    q, k, _ = draw(64)
    p = shares(q, k, 8, 8).unflatten(1, (2, 2)).sum(2)
    own = torch.arange(64)[:, None] // 8
    p = p.masked_fill(torch.arange(8) >= own, -1.0)
    best = torch.zeros_like(p).scatter(-1, p.topk(3).indices, 1.0) * (p >= 0)
    assert torch.equal(lists(q, k, block=8, picks=4, stride=8, span=8), best.long() + (torch.arange(8) == own))


def test_forced_blocks_are_read_once_and_nothing_comes_later():
    q, k, _ = draw(150)
    read = lists(q, k, block=16, picks=5, stride=4, span=8, initial=1, local=2)
    own = (torch.arange(150) // 16)[:, None]
    blocks = torch.arange(10)
    forced = (blocks == 0) | ((blocks <= own) & (blocks > own - 2))
    assert (read <= 1).all()
    assert (read[..., forced] == 1).all()
    assert (read.masked_select(blocks > own) == 0).all()
    assert torch.equal(read.sum(-1), (own[:, 0] + 1).clamp(max=5).expand(2, 2, -1))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8, 16])
def test_any_number_of_query_heads_a_key_head(heads):
    q, k, v = draw(70, heads=heads, kv_heads=1)
    mech = NSA(**SMALL)
    same(mech(q, k, v), mech.reference(q, k, v))
    same(mech(q.float(), k.float(), v.float()), mech.reference(q, k, v))


def test_the_heads_of_a_key_head_choose_together():
    q, k, v = draw(96)
    mech, gates = NSA(**SMALL), branch(1, q)
    other = q.clone()
    other[:, 1] = 3 * normal(2, 96, 8, seed=9)
    before, after = mech(q, k, v, gates=gates), mech(other, k, v, gates=gates)
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-3, "head 1 has no say in what head 0 reads"
    assert torch.equal(before[:, 2:], after[:, 2:]), "heads of the other key head have one"


def test_the_branches_are_what_they_are_called():
    q, k, v = draw(90)
    mech = NSA(**SMALL)
    near = ff.mechanisms.make("window", width=12, sinks=0)(q, k, v)
    same(mech(q, k, v, gates=branch(2, q)), near)
    p, values = shares(q, k, 4, 8), v.repeat_interleave(2, 1)
    means = torch.stack([values[:, :, c * 4 : c * 4 + 8].mean(2) for c in range(p.shape[-1])], 2)
    same(mech(q, k, v, gates=branch(0, q)), p @ means)
    everything = NSA(**{**SMALL, "picks": 6})
    same(everything(q, k, v, gates=branch(1, q)), oracles.full(q, k, v, causal=True)[0])


def test_nothing_is_compressed_before_a_block_is_complete():
    q, k, v = draw(20)
    out = NSA(**SMALL)(q, k, v, gates=branch(0, q))
    assert (out[:, :, :7] == 0).all()
    # a single block: its value
    same(out[:, :, 7:11], v[:, :, :8].mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, 4, -1))


def test_the_compression_of_a_block_is_an_mlp_of_its_rows():
    mech = contract.build("nsa", next(c for _, c in contract.cases(("nsa",)) if "kv_heads" in c.options)).double()
    _, k, v = draw(31, width=16)
    found = mech._compressed(k, v)
    for x, got, mlp in ((k, found[0], mech.compress_k), (v, found[1], mech.compress_v)):
        blocks = x.unfold(2, 4, 2).mT  # [B, G, C, span, D]
        flat = (blocks + mlp.position[:, None]).flatten(3)
        same(got, blocks.mean(3) + torch.nn.functional.gelu(flat @ mlp.inner) @ mlp.outer)


def test_learning_starts_from_means_and_halves():
    q, k, v = draw(70)
    learned = NSA(**SMALL, kv_heads=2, width=8).double()
    same(learned(q, k, v), NSA(**SMALL)(q, k, v))


def test_the_choice_carries_no_gradient():
    """Keys that are not chosen get none through the selected branch; the compressed branch reaches all of the past."""
    q, k, v = (x.requires_grad_() for x in draw(96))
    mech = NSA(**{**SMALL, "picks": 3})
    (selected,) = torch.autograd.grad(mech(q, k, v, gates=branch(1, q))[:, :, -1].sum(), k)
    read = lists(q.detach(), k.detach(), block=16, picks=3, stride=4, span=8, initial=1, local=2)[:, :, -1]
    assert torch.equal(selected.unflatten(2, (6, 16)).abs().sum((3, 4)) > 0, read > 0)
    (compressed,) = torch.autograd.grad(mech(q, k, v, gates=branch(0, q))[:, :, -1].sum(), k)
    assert (compressed.abs().sum(-1) > 0).all()


def test_keys_and_values_of_each_branch():
    q, k, v = draw(75)
    _, k2, v2 = draw(75, seed=1)
    _, k3, v3 = draw(75, seed=2)
    mech, gates = NSA(**SMALL), normal(2, 4, 75, 3, seed=5).sigmoid()
    both = {"compression": (k2, v2), "window": (k3, v3)}
    out = mech(q, k, v, gates=gates, **both)
    near = mech(q, k3, v3, gates=branch(2, q)) * gates[..., 2:]
    far = mech(q, k2, v2, gates=branch(0, q)) * gates[..., :1]
    # the compressed keys choose what is read of k and v
    chosen = mech(q, k, v, gates=branch(1, q), compression=(k2, v2)) * gates[..., 1:2]
    same(out, near + far + chosen)
    state, outs = None, []
    for a, b in ((0, 40), (40, 41), (41, 75)):
        pieces = {name: tuple(x[:, :, a:b] for x in pair) for name, pair in both.items()}
        piece, state = mech.extend(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], state, gates=gates[:, :, a:b], **pieces
        )  # fmt: skip
        outs.append(piece)
    same(torch.cat(outs, 2), out)
    with pytest.raises(ValueError, match="begun with window="):
        mech.extend(q[:, :, :1], k[:, :, :1], v[:, :, :1], state, compression=(k2[:, :, :1], v2[:, :, :1]))


def test_rows_read_are_those_of_the_branches():
    mech = NSA(**SMALL)
    layouts = mech.layouts(91)
    compressed = sum(max(0, (t - 8) // 4 + 1) for t in range(1, 92)) / 91
    assert mech.rows_read(91) == pytest.approx(compressed + sum(layout.visible for layout in layouts.values()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"picks": 2}, "picks=2 must hold"),
        ({"stride": 5}, "stride=5 must divide"),
        ({"local": 0}, "at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"learned": True}, "needs kv_heads and width"),
    ],
)
def test_refuses_impossible_sizes(options, words):
    with pytest.raises(ValueError, match=words):
        NSA(**options)


def test_refuses_what_does_not_fit():
    q, k, v = draw(20)
    with pytest.raises(ValueError, match=r"gates must be \[B, H, T, 3\]"):
        NSA()(q, k, v, gates=torch.ones(2, 4, 20))
    with pytest.raises(ValueError, match="window must be keys and values"):
        NSA()(q, k, v, window=(k[:, :, :5], v[:, :, :5]))
    with pytest.raises(ValueError, match=r"built for G, D = \[2, 16\]"):
        NSA(kv_heads=2, width=16)(q, k, v)
