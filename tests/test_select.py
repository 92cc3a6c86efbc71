"""Layouts against sets: the static patterns against their definitions, the algebra against Python's own sets."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from farfield import select
from farfield.select import static
from farfield.testing import oracles
from farfield.types import Layout

SIZES = st.integers(1, 70)
BLOCKS = st.sampled_from([1, 3, 8, 16])


def dense(layout, **where):
    return oracles.visible(layout, **where)[0, 0]


def pairs(layout, b=0, h=0):
    """The (query block, row block) pairs of one head, as a set; the lists ascend without repeats."""
    index, count = layout.index.expand(max(b + 1, layout.index.shape[0]), -1, -1, -1), layout.count
    b, h = min(b, index.shape[0] - 1), min(h, index.shape[1] - 1)
    found = set()
    for n in range(index.shape[2]):
        listed = index[b, h, n, : count[b if count.shape[0] > 1 else 0, h, n]].tolist()
        assert listed == sorted(set(listed)), f"list {n} must ascend without repeats: {listed}"
        assert all(0 <= m < layout.row_blocks for m in listed), f"list {n} names blocks that are not there: {listed}"
        found |= {(n, m) for m in listed}
    return found


def random_layout(seed, batch=1, heads=1, tokens=20, rows=23, q_block=3, k_block=4, fill=0.4, **rules):
    gen = torch.Generator().manual_seed(seed)
    blocks, row_blocks = -(-tokens // q_block), -(-rows // k_block)
    picked = torch.rand(batch, heads, blocks, row_blocks, generator=gen) < fill
    index = torch.arange(row_blocks).expand_as(picked).masked_fill(~picked, 10**6).sort(-1).values
    return Layout(index.int(), picked.sum(-1).int(), q_block, k_block, tokens, rows, **rules)


@given(SIZES, SIZES, BLOCKS, BLOCKS, st.booleans())
def test_full(tokens, rows, q_block, k_block, causal):
    layout = static.full(tokens=tokens, rows=rows, q_block=q_block, k_block=k_block, causal=causal)
    i, r = torch.arange(tokens)[:, None], torch.arange(rows)
    assert torch.equal(dense(layout), (r <= i) if causal else torch.ones(tokens, rows, dtype=torch.bool))
    if causal and rows == tokens:
        # and no list is longer than it must be
        assert all(m * k_block < (n + 1) * q_block for n, m in pairs(layout))


@given(SIZES, SIZES, st.integers(0, 9), BLOCKS, st.booleans(), st.integers(0, 20))
def test_window(tokens, width, sinks, block, causal, before):
    layout = static.window(tokens=tokens, rows=tokens + before, width=width, sinks=sinks, block=block, causal=causal)
    # the last query stands at the last row
    i, r = torch.arange(before, tokens + before)[:, None], torch.arange(tokens + before)
    want = ((i - r).abs() < width) | (r < sinks)
    got = dense(layout, position=torch.arange(before, tokens + before))
    assert torch.equal(got, want & (r <= i) if causal else want)
    for n, m in pairs(layout):
        inside = want[n * block : (n + 1) * block, m * block : (m + 1) * block]
        assert inside.any(), f"query block {n} names row block {m} for nothing"


@given(SIZES, st.integers(1, 5), st.integers(1, 4), BLOCKS, st.booleans())
def test_strided(tokens, stride, local, block, causal):
    layout = static.strided(tokens=tokens, stride=stride, local=local, block=block, causal=causal)
    blocks = -(-tokens // block)
    want = set()
    for n in range(blocks):
        for m in range(blocks):
            apart = n - m if causal else abs(n - m)
            if 0 <= apart < local or (apart >= local and (apart - local + 1) % stride == 0):
                want.add((n, m))
    assert pairs(layout) == want
    i = torch.arange(tokens)
    if causal:
        assert not (dense(layout) & (i > i[:, None])).any()


@given(SIZES, st.integers(1, 70), st.integers(0, 20), BLOCKS, st.booleans())
def test_visible_counts_the_dense_mask(tokens, width, sinks, block, causal):
    layouts = [
        static.window(tokens=tokens, width=width, sinks=sinks, block=block, causal=causal),
        static.strided(tokens=tokens, stride=3, local=2, block=block, causal=causal),
        static.full(tokens=tokens, causal=causal),
    ]
    for layout in layouts:
        assert layout.visible == select.to_dense(layout).sum().item() / tokens


def rows_of_groups(tokens, block, rank):
    """The tokens that each row of the pyramid stands for, level by level, by the definition of the groups."""
    blocks, width, found = -(-tokens // block), block, []
    while -(-blocks * block // width) >= 3:
        groups = -(-tokens // width)
        level = []
        for g in range(groups):
            for s in range(rank):
                start = g * width + s * (width // rank)
                level.append(set(range(start, min(start + width // rank, tokens))))
        found.append(level)
        width *= 2
    return found


@given(st.integers(1, 220), st.sampled_from([(4, 2), (8, 4), (8, 8), (3, 1)]), st.integers(1, 4), st.booleans())
def test_multipole_covers_every_pair_exactly_once(tokens, sizes, radius, causal):
    (block, rank), near = sizes, sizes[0] * radius
    plan = select.multipole(tokens=tokens, block=block, near=near, rank=rank, causal=causal)
    pyramid = [row for level in rows_of_groups(tokens, block, rank) for row in level]
    assert plan.far.rows == len(pyramid)
    assert plan.far.tokens == plan.near.tokens == tokens
    covered = torch.zeros(tokens, tokens, dtype=torch.long)
    covered += dense(plan.near)
    far = {n: [] for n in range(-(-tokens // block))}
    for n, m in pairs(plan.far):
        far[n] += range(m * rank, (m + 1) * rank)
    for n, rows in far.items():
        for r in rows:
            covered[n * block : (n + 1) * block, sorted(pyramid[r])] += 1
    want = torch.ones(tokens, tokens, dtype=torch.long)
    assert torch.equal(covered, want.tril() if causal else want)
    # what is not exact is on the level the oracle says
    level_of = [level for level, rows in enumerate(rows_of_groups(tokens, block, rank), 1) for _ in rows]
    met = oracles.levels(tokens, block=block, near=near)
    for n, rows in far.items():
        for r in rows:
            assert (met[n * block : (n + 1) * block][:, sorted(pyramid[r])] == level_of[r]).all()


def test_multipole_lists_are_short():
    """O(log n) groups a query block: the paper's 3 a level noncausal, 1.5 causal, for near = block."""
    for causal, most in ((False, 3), (True, 2)):
        plan = select.multipole(tokens=4096, block=16, near=16, rank=4, causal=causal)
        assert int(plan.far.count.max()) <= most * 7
        assert int(plan.near.count.max()) == (2 if causal else 3)
        assert plan.far.count.sum() + plan.near.count.sum() < 256 * (3 + 3 * 7)


def test_multipole_of_the_paper():
    """n = 8 m, near = m: block 6 reads blocks 5, 6, 7, level 1 of block 4 and level 2 of blocks 0-1 and 2-3."""
    plan = select.multipole(tokens=64, block=8, near=8, rank=2, causal=False)
    assert sorted(m for n, m in pairs(plan.near) if n == 6) == [5, 6, 7]
    # 8 groups on level 1, 4 on level 2
    assert sorted(m for n, m in pairs(plan.far) if n == 6) == [4, 8 + 0, 8 + 1]
    plan = select.multipole(tokens=64, block=8, near=8, rank=2)
    assert sorted(m for n, m in pairs(plan.near) if n == 7) == [6, 7]
    assert sorted(m for n, m in pairs(plan.far) if n == 7) == [4, 5, 8 + 0, 8 + 1]


@pytest.mark.parametrize(("near", "block"), [(7, 8), (12, 8), (0, 8), (-8, 8)])
def test_multipole_refuses_a_near_field_that_is_no_multiple_of_the_block(near, block):
    with pytest.raises(ValueError, match="near"):
        select.multipole(tokens=64, block=block, near=near, rank=4)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([(1, 1, 1, 1), (2, 3, 1, 3), (1, 3, 2, 1)]))
def test_union_and_minus(seed, other, shape):
    a, b = random_layout(seed, *shape[:2], reach=5), random_layout(other + 1, *shape[2:], fill=0.6, reach=5)
    joined, left = select.union(a, b), select.minus(a, b)
    for i in range(max(shape[0], shape[2])):
        for h in range(max(shape[1], shape[3])):
            one, two = pairs(_head(a, i, h)), pairs(_head(b, i, h))
            assert pairs(_head(joined, i, h)) == one | two
            assert pairs(_head(left, i, h)) == one - two
    assert (joined.q_block, joined.k_block, joined.reach, joined.tokens) == (3, 4, 5, 20)
    assert joined.index.dtype == joined.count.dtype == torch.int32
    assert pairs(_head(a.union(b), 0, 0)) == pairs(_head(joined, 0, 0))
    assert pairs(_head(a.minus(b), 0, 0)) == pairs(_head(left, 0, 0))


def _head(layout, b, h):
    """One batch and head of a layout, as a layout."""
    index, count = layout.index, layout.count
    b, h = min(b, index.shape[0] - 1), min(h, index.shape[1] - 1)
    return dataclasses.replace(layout, index=index[b : b + 1, h : h + 1], count=count[b : b + 1, h : h + 1])


def test_empty_lists_in_the_algebra():
    nothing = random_layout(0, fill=0.0)
    narrow = dataclasses.replace(nothing, index=nothing.index[..., :0])
    some = random_layout(1)
    for empty in (nothing, narrow):
        assert pairs(select.union(empty, some)) == pairs(select.union(some, empty)) == pairs(some)
        assert pairs(select.minus(some, empty)) == pairs(some)
        assert pairs(select.minus(empty, some)) == set()
        assert empty.density == 0


@pytest.mark.parametrize("change", [{"q_block": 4, "tokens": 28}, {"causal": True}, {"reach": 3}, {"rows": 24}])
def test_the_algebra_refuses_layouts_that_mean_different_things(change):
    a = random_layout(1)
    b = dataclasses.replace(a, **change)
    for f in (select.union, select.minus):
        with pytest.raises(ValueError, match=f"{f.__name__}: the layouts differ in {next(iter(change))}"):
            f(a, b)


@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (2, 3)]), st.sampled_from([0.0, 0.4, 1.0]))
def test_transpose(seed, shape, fill):
    layout = random_layout(seed, *shape, fill=fill)
    start, query = select.transpose(layout)
    for b in range(shape[0]):
        for h in range(shape[1]):
            found = set()
            for m in range(layout.row_blocks):
                readers = query[b, h, start[b, h, m] : start[b, h, m + 1]].tolist()
                assert readers == sorted(readers)
                found |= {(n, m) for n in readers}
            assert found == pairs(_head(layout, b, h))
            assert start[b, h, -1] == len(found)
    assert torch.equal(layout.transpose().start, start)


def test_density():
    layout = static.full(tokens=64, q_block=8, k_block=8)
    assert layout.density == 1
    assert static.full(tokens=64, q_block=8, k_block=8, causal=True).density == pytest.approx(36 / 64)
    assert random_layout(3).density == pytest.approx(len(pairs(random_layout(3))) / (7 * 6))


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([None, 4]), st.integers(0, 3))
def test_to_dense_and_back(seed, causal, reach, sinks):
    layout = random_layout(seed, 2, 3, causal=causal, reach=reach, sinks=sinks if reach else 0)
    mask = select.to_dense(layout)
    assert torch.equal(mask, oracles.visible(layout, batch=2, heads=3))
    back = select.from_dense(mask, q_block=3, k_block=4)
    for b in range(2):
        for h in range(3):
            # whole blocks, as few as cover the mask
            blocks = {(i // 3, r // 4) for i, r in mask[b, h].nonzero().tolist()}
            assert pairs(_head(back, b, h)) == blocks


def test_from_dense_of_nothing():
    back = select.from_dense(torch.zeros(1, 2, 5, 7, dtype=torch.bool), q_block=2, k_block=3)
    assert back.index.shape[2] == 3
    assert int(back.count.sum()) == 0


def test_to_block_mask_and_back():
    from torch.nn.attention.flex_attention import create_mask

    for layout in (
        static.window(tokens=40, width=9, sinks=2, block=8),
        static.window(tokens=40, width=9, block=8, causal=False),
        static.full(tokens=40, q_block=8, k_block=8, causal=True),
        random_layout(4, 2, 2, tokens=40, rows=40, q_block=8, k_block=8),
    ):
        B, H = layout.index.shape[:2]
        mask = select.to_block_mask(layout)
        blocks = mask.to_dense()
        inside = create_mask(mask.mask_mod, B, H, 40, 40, device="cpu")
        want = oracles.visible(layout, batch=B, heads=H)
        named = blocks.bool().repeat_interleave(8, -1).repeat_interleave(8, -2)
        assert torch.equal(named.expand_as(inside) & inside, want)
        back = select.from_block_mask(mask, causal=layout.causal)
        for b in range(B):
            for h in range(H):
                assert pairs(_head(back, b, h)) == pairs(_head(layout, b, h))
        assert (back.tokens, back.rows, back.q_block, back.k_block) == (40, 40, 8, 8)


def test_from_block_mask_takes_full_and_partial_blocks():
    from torch.nn.attention.flex_attention import create_block_mask

    def near(b, h, i, j):
        return (i >= j) & (i - j < 40)

    mask = create_block_mask(near, 1, 1, 128, 128, device="cpu", BLOCK_SIZE=16)
    layout = select.from_block_mask(mask)
    i = torch.arange(128)
    want = (i[:, None] >= i) & (i[:, None] - i < 40)
    assert pairs(layout) == {(a // 16, b // 16) for a, b in want.nonzero().tolist()}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_reads_what_the_layout_says():
    """An independent implementation on the same plan."""
    from torch.nn.attention.flex_attention import flex_attention

    from farfield.ops.attend import attend
    from farfield.testing.inputs import normal
    from farfield.testing.units import assert_within
    from farfield.types import Rows

    layout = static.window(tokens=64, width=20, sinks=3, block=16)
    q, k, v = (normal(1, 2, 64, 16, seed=s) for s in range(3))
    with torch.no_grad():
        want = flex_attention(q, k, v, block_mask=select.to_block_mask(layout))
    assert_within(attend(q.float(), Rows(k.float(), v.float()), layout).out, want, terms=64)


def test_plot_draws_one_bar_for_each_pair():
    pytest.importorskip("matplotlib").use("Agg")
    layout = random_layout(5)
    ax = layout.plot()
    assert len(ax.patches) == len(pairs(layout))
    assert {(round(p.get_y()) // 3, round(p.get_x()) // 4) for p in ax.patches} == pairs(layout)


@given(SIZES, st.integers(1, 4))
def test_layouts_are_built_from_blocks(tokens, wider):
    """No list is as long as the sequence, unless everything is read."""
    assume(tokens > 40)
    layout = static.window(tokens=tokens, width=wider, block=8)
    assert layout.index.shape[-1] <= 4


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: static.full(tokens=0),
        lambda: static.full(tokens=4, q_block=0),
        lambda: static.window(tokens=4, width=0),
        lambda: static.window(tokens=4, rows=3, width=2),
        lambda: static.strided(tokens=4, stride=0),
        lambda: select.multipole(tokens=0),
        lambda: select.multipole(tokens=9, rank=0),
    ],
)
def test_sizes_must_be_positive(wrong):
    with pytest.raises(ValueError, match=r"at least 1|every query needs"):
        wrong()
