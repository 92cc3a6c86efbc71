"""The pyramid, every pool of it, against literal means, filters and softmaxes, group by group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from farfield.select import multipole
from farfield.summarize import ConvPool, DensePool, FilterPool, MeanPool, SoftmaxPool, StridedPool, summarize
from farfield.testing import oracles
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within
from farfield.types import Rows

B, G, D, E = 2, 2, 6, 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def tokens_of(groups, width, rank, tokens):
    """For each row of a level of so many groups, the tokens it stands for."""
    each = width // rank
    starts = [g * width + s * each for g in range(groups) for s in range(rank)]
    return [list(range(a, min(a + each, tokens))) for a in starts]


def levels_of(tokens, block, rank):
    """(width, rows) of every level: as long as there are three groups."""
    width, found = block, []
    while -(-tokens // width) >= 3:
        found.append((width, tokens_of(-(-tokens // width), width, rank, tokens)))
        width *= 2
    return found


def rows_of(tokens, dtype=torch.float64):
    return Rows(normal(B, G, tokens, D, dtype=dtype), normal(B, G, tokens, E, seed=1, dtype=dtype))


def randomized(pool, size=0.5):
    with torch.no_grad():
        for i, p in enumerate(pool.parameters()):
            p += size * normal(*p.shape, seed=50 + i, dtype=p.dtype)
    return pool.double()


@given(st.integers(1, 200), st.sampled_from([(4, 2), (8, 8), (6, 3), (5, 1)]), st.sampled_from(DTYPES))
def test_mean(tokens, sizes, dtype):
    block, rank = sizes
    exact, got = rows_of(tokens), summarize(rows_of(tokens, dtype), block=block, rank=rank)
    wanted = [tokens for _, rows in levels_of(tokens, block, rank) for tokens in rows]
    assert len(got) == len(wanted)
    assert got.k.dtype == got.v.dtype == dtype
    sizes = [len(rows) for _, rows in levels_of(tokens, block, rank)]
    assert got.offsets == tuple(sum(sizes[:i]) for i in range(len(sizes)))
    if not wanted:
        return
    for x, mine in ((exact.k, got.k), (exact.v, got.v)):
        means = [x[:, :, at].mean(2) if at else torch.zeros_like(x[:, :, 0]) for at in wanted]
        assert_within(mine, torch.stack(means, 2), terms=tokens)
    bias = torch.tensor([len(at) for at in wanted], dtype=torch.float64).log()
    assert_within(got.bias.expand(1, 1, -1).float(), bias[None, None], terms=1, name="bias")
    assert got.bias.dtype == torch.promote_types(dtype, torch.float32)
    # rows that stand for nothing are hidden by their bias
    ends = [at[-1] for at in wanted if at]
    assert [e for e, at in zip(got.end.tolist(), wanted, strict=True) if at] == ends
    assert int(got.end.max()) <= tokens - 1


@given(st.integers(1, 200), st.integers(1, 3), st.booleans())
def test_the_far_layout_fits_the_pyramid(tokens, radius, causal):
    plan = multipole(tokens=tokens, block=4, near=4 * radius, rank=2, causal=causal)
    assert plan.far.rows == len(summarize(rows_of(tokens), block=4, rank=2))


@pytest.mark.parametrize("tokens", [96, 101])
@pytest.mark.parametrize(
    "pool",
    [MeanPool(), FilterPool(G, 4), SoftmaxPool(G, 4, D), SoftmaxPool(G, 4, D, whole=True), StridedPool(G, 4, 8)],
    ids=lambda p: type(p).__name__,
)
def test_constants_pass(pool, tokens):
    """Weights sum to 1 on every level, with any parameters."""
    ones = Rows(normal(B, G, tokens, D), torch.ones(B, G, tokens, E, dtype=torch.float64))
    got = summarize(ones, block=8, rank=4, pool=randomized(pool))
    there = got.bias.expand(B, 1, -1)[:, :, :, None].isfinite().expand_as(got.v)
    assert_within(got.v[there], torch.ones_like(got.v[there]), terms=tokens)


@pytest.mark.parametrize("tokens", [96, 101])
@pytest.mark.parametrize(
    "pool",
    [FilterPool(G, 4), SoftmaxPool(G, 4, D), ConvPool(4, D, E, 8, 4), DensePool(G, 4, D, E, 8)],
    ids=lambda p: type(p).__name__,
)
def test_learned_pools_start_as_the_mean_where_groups_are_complete(pool, tokens):
    rows = rows_of(tokens)
    got, mean = (summarize(rows, block=8, rank=4, pool=p) for p in (pool.double(), MeanPool()))
    whole = [len(at) == width // 4 for width, level in levels_of(tokens, 8, 4) for at in level]
    for a, b in ((got.k, mean.k), (got.v, mean.v)):
        assert_within(a[:, :, whole], b[:, :, whole], terms=64)
    assert torch.equal(got.bias.expand_as(mean.bias), mean.bias)


def by_level(got, tokens, block, rank):
    """[(width, k [B, G, N, p, D], v)] of a pyramid."""
    found, start = [], 0
    for width, rows in levels_of(tokens, block, rank):
        part = slice(start, start + len(rows))
        found.append((width, *(x[:, :, part].unflatten(2, (-1, rank)) for x in (got.k, got.v))))
        start += len(rows)
    return found


def test_filters_make_parents_of_children():
    tokens, block, rank = 96, 8, 4
    pool, rows = randomized(FilterPool(G, rank)), rows_of(96)
    found = by_level(summarize(rows, block=block, rank=rank, pool=pool), tokens, block, rank)
    mean = torch.zeros(rank, 2 * rank, dtype=torch.float64)
    for s in range(rank):
        mean[s, 2 * s : 2 * s + 2] = 0.5
    filters = mean + pool.gate * (pool.logits.softmax(-1) - mean)  # [2, G, p, 2p]
    (_, k, v), *coarser = found
    for x, fine in ((rows.k, k), (rows.v, v)):
        assert_within(fine, x.unflatten(2, (-1, rank, 2)).mean(4), terms=2)
    for _, k_up, v_up in coarser:
        for which, below, above in ((0, k, k_up), (1, v, v_up)):
            for n in range(above.shape[2]):
                children = torch.cat([below[:, :, 2 * n], below[:, :, 2 * n + 1]], 2)
                assert_within(above[:, :, n], filters[which] @ children, terms=2 * rank)
        k, v = k_up, v_up


def test_whole_group_softmax_pools_from_the_tokens_on_every_level():
    tokens, block, rank = 101, 8, 4
    pool, rows = randomized(SoftmaxPool(G, rank, D, whole=True)), rows_of(101)
    for width, k, v in by_level(summarize(rows, block=block, rank=rank, pool=pool), tokens, block, rank):
        for n in range(k.shape[2]):
            part = slice(n * width, min((n + 1) * width, tokens))
            weights = (pool.query @ rows.k[:, :, part].mT / D**0.5).softmax(-1)
            assert_within(k[:, :, n], weights @ rows.k[:, :, part], terms=tokens)
            assert_within(v[:, :, n], weights @ rows.v[:, :, part], terms=tokens)


def test_segment_softmax_pools_each_segment():
    tokens, block, rank = 96, 8, 4
    pool, rows = randomized(SoftmaxPool(G, rank, D)), rows_of(96)
    below = rows.k.unflatten(2, (-1, rank, 2)), rows.v.unflatten(2, (-1, rank, 2))
    for _, k, v in by_level(summarize(rows, block=block, rank=rank, pool=pool), tokens, block, rank):
        n = k.shape[2]
        keys, values = (x[:, :, :n] for x in below)
        weights = (torch.einsum("gpd,bgnptd->bgnpt", pool.query, keys) / D**0.5).softmax(-1)[..., None]
        assert_within(k, (weights * keys).sum(4), terms=tokens)
        assert_within(v, (weights * values).sum(4), terms=tokens)
        below = tuple(x[:, :, : n // 2 * 2].flatten(2, 3).unflatten(2, (-1, rank, 2)) for x in (k, v))


@pytest.mark.parametrize("tokens", [96, 101])
def test_convolution_makes_every_level_from_the_tokens(tokens):
    block, rank = 8, 4
    pool, rows = randomized(ConvPool(rank, D, E, block, 4)), rows_of(tokens)
    for level, (width, k, v) in enumerate(
        by_level(summarize(rows, block=block, rank=rank, pool=pool), tokens, block, rank)
    ):
        for x, got, weight, bias in (
            (rows.k, k, pool.k_weight[level], pool.k_bias[level]),
            (rows.v, v, pool.v_weight[level], pool.v_bias[level]),
        ):
            # the last group of a level may be partial
            x = torch.nn.functional.pad(x, (0, 0, 0, got.shape[2] * width - tokens)).unflatten(2, (-1, width))
            assert weight.shape == (rank, width, x.shape[-1])
            want = torch.einsum("stc,bgntc->bgnsc", weight, x) + bias
            assert_within(got, want, terms=width)


@pytest.mark.parametrize("tokens", [96, 101])
@pytest.mark.parametrize(("block", "rank"), [(8, 4), (12, 4), (3, 3)])
def test_dense_rows_are_sums_of_matrices(tokens, block, rank):
    """From the definition: a matrix for each token of a row, then for each child; missing ones leave their weight."""
    tokens *= 3  # more levels than have matrices of their own
    each = block // rank
    pool, rows = randomized(DensePool(G, rank, D, E, block)), rows_of(tokens)
    assert pool.k_leaf.shape == (G, each, D, D)
    assert pool.v_pair.shape == (3, G, 2, E, E)

    def matrices(learned):
        many, width = learned.shape[-3:-1]
        return torch.eye(width).double() / many + learned / (many * width) ** 0.5

    got = summarize(rows, block=block, rank=rank, pool=pool)
    for x, mine, leaf, pair in (
        (rows.k, got.k, matrices(pool.k_leaf), matrices(pool.k_pair)),
        (rows.v, got.v, matrices(pool.v_leaf), matrices(pool.v_pair)),
    ):
        below, start = [(x[:, :, t], 1) for t in range(tokens)], 0
        for level, (width, held) in enumerate(levels_of(tokens, block, rank)):
            many, matrices = (each, leaf) if level == 0 else (2, pair[min(level - 1, 2)])
            made = []
            for s, held_tokens in enumerate(held):
                total, number = torch.zeros_like(x[:, :, 0]), len(held_tokens)
                for j, (child, counted) in enumerate(below[s * many : s * many + many]):
                    weight = many * counted / max(number, 1)
                    total += weight * torch.stack([child[:, g] @ matrices[g, j] for g in range(G)], 1)
                made.append((total, number))
            want = torch.stack([row for row, _ in made], 2)
            assert_within(mine[:, :, start : start + len(made)], want, terms=width * D, name=f"width {width}")
            below, start = made, start + len(made)


STRIDED = {
    "strided": StridedPool,
    "dense": lambda heads, rank, block: DensePool(heads, rank, D, D, block, strided=True),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("rank", [8, 4])
def test_strided_heads_hold_single_tokens(name, rank):
    """8 heads: rows of up to 8 tokens are there token by token, one in each head."""
    x, each = Rows(*(normal(1, 8, 200, D, seed=n) for n in (0, 1))), 8 // rank
    pool = STRIDED[name](8, rank, 8).double()
    got, start, many = summarize(x, block=8, rank=rank, pool=pool), 0, each
    while start < len(got) and many <= 8:
        rows = 200 // (8 * many // each) * rank
        for head in range(8):
            at = torch.arange(rows) * many + head % many
            assert torch.equal(got.k[0, head, start : start + rows], x.k[0, head, at])
            assert torch.equal(got.v[0, head, start : start + rows], x.v[0, head, at])
        start, many = start + -(-200 // (8 * many // each)) * rank, 2 * many
    assert many == 16


@pytest.mark.parametrize("name", STRIDED)
def test_strided_heads_draw_what_they_have_no_number_for(name):
    """Other tokens in each layer, without a change to what else is drawn, and kept in a checkpoint."""
    torch.manual_seed(0)
    want = torch.rand(5)
    torch.manual_seed(0)
    first = STRIDED[name](4, 2, 16)
    assert torch.equal(torch.rand(5), want)
    second = STRIDED[name](4, 2, 16)
    x = Rows(normal(1, 4, 640, D), normal(1, 4, 640, D, seed=1))

    def held(pool):
        """The tokens of level 1 by head: two rows of 8 a group; and the rows above."""
        got = summarize(x, block=16, rank=2, pool=pool)
        at = (got.k[0, :, :1] == x.k[0, :, :8]).all(-1).int()
        assert (at.sum(-1) == 1).all()
        return at.argmax(-1).tolist(), got.k[:, :, 80:]

    (own, above), (others, _) = held(first), held(second)
    assert len(set(own)) == len(set(others)) == 4
    assert own != others
    second.load_state_dict(first.state_dict())
    again, coarser = held(second)
    assert again == own
    assert torch.equal(coarser, above)


# heads that would broadcast, and others
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("make", [lambda heads: FilterPool(heads, 4), lambda heads: SoftmaxPool(heads, 4, D),
                                  lambda heads: SoftmaxPool(heads, 4, D, whole=True),
                                  lambda heads: StridedPool(heads, 4, 8),
                                  lambda heads: DensePool(heads, 4, D, E, 8)])  # fmt: skip
def test_pools_that_were_made_for_other_heads_say_so(make, heads):
    with pytest.raises(ValueError, match=f"Pool: was made for kv_heads={heads}, got 2; make it with kv_heads=2"):
        summarize(rows_of(40), block=8, rank=4, pool=make(heads))


@pytest.mark.parametrize(
    ("pool", "made", "came"),
    [
        (DensePool(G, 4, D, D, 8), "value_width=6", 5),
        (ConvPool(4, 1, E, 8, 4), "width=1", 6),
        (ConvPool(4, D, 1, 8, 4), "value_width=1", 5),
        (ConvPool(4, D, E, 16, 4), "block=16", 8),
        (ConvPool(2, D, E, 8, 4), "rank=2", 4),
        (FilterPool(G, 2), "rank=2", 4),
        (SoftmaxPool(G, 1, D), "rank=1", 4),
        (SoftmaxPool(G, 4, 1), "width=1", 6),
        (StridedPool(G, 4, 16), "block/rank=4", 2),
        (DensePool(G, 2, D, E, 8), "block/rank=4", 2),
    ],
)
def test_pools_that_were_made_for_other_sizes_say_so(pool, made, came):
    name = made.partition("=")[0]
    with pytest.raises(ValueError, match=f"Pool: was made for {made}, got {came}; make it with {name}={came}"):
        summarize(rows_of(40), block=8, rank=4, pool=pool)


def test_strided_rows_that_lack_their_token_are_means():
    """101 tokens: a row of 2 and a parent of 1, of which each head has the first or the second."""
    x = rows_of(101)
    got = summarize(x, block=8, rank=4, pool=StridedPool(2, 4, 8))
    for tokens, mine in ((x.k, got.k), (x.v, got.v)):
        # token 100 stands alone on level 1, in row 50; rows 51 and the next stand for nothing
        assert torch.equal(mine[:, :, 50], tokens[:, :, 100])
        assert torch.equal(mine[:, :, 49], torch.stack([tokens[:, 0, 98], tokens[:, 1, 99]], 1))
        # of level 2 it is the only child there is
        assert torch.equal(mine[:, :, 52 + 25], tokens[:, :, 100])


def test_the_convolution_is_pytorchs():
    """Conv1d(d -> p d, kernel w, stride w, groups d), the published code's layer, with the same weights."""
    pool, rows = randomized(ConvPool(4, D, E, 8, 4)), rows_of(96)
    for level, (width, k, _) in enumerate(by_level(summarize(rows, block=8, rank=4, pool=pool), 96, 8, 4)):
        conv = torch.nn.Conv1d(D, 4 * D, width, stride=width, groups=D, dtype=torch.float64)
        with torch.no_grad():
            conv.weight.copy_(pool.k_weight[level].permute(2, 0, 1).reshape(4 * D, 1, width))
            conv.bias.copy_(pool.k_bias[level].mT.reshape(-1))
            want = conv(rows.k.flatten(0, 1).mT).unflatten(1, (D, 4)).permute(0, 3, 2, 1)
        assert_within(k, want.unflatten(0, (B, G)), terms=width)


POOLS = {
    "mean": MeanPool,
    "learned": lambda: FilterPool(G, 4),
    "softmax": lambda: SoftmaxPool(G, 4, D),
    "softmax-whole": lambda: SoftmaxPool(G, 4, D, whole=True),
    "conv": lambda: ConvPool(4, D, E, 8, 4),
    "dense": lambda: DensePool(G, 4, D, E, 8),
    "strided": lambda: StridedPool(G, 4, 8),
}


@pytest.mark.parametrize("name", POOLS)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_growing_in_pieces_gives_the_same_groups(name, pieces):
    """Blocks as they come, a few at a time, as decoding needs it: complete groups are the same."""
    blocks = sum(pieces)
    pool, rows = randomized(POOLS[name]()), rows_of(8 * sum(pieces))
    k, v = (x.unflatten(2, (blocks, 8)) for x in (rows.k, rows.v))
    once, _ = pool.grow(k, v, None, rank=4, first=0, pending=())
    grown, pending, first = [], (), 0
    for n in pieces:
        part = slice(first, first + n)
        new, pending = pool.grow(k[:, :, part], v[:, :, part], None, rank=4, first=first, pending=pending)
        for level, groups in enumerate(new):
            if level == len(grown):
                grown.append(groups)
            else:
                grown[level] = grown[level].join(groups)
        first += n
    for level, groups in enumerate(once):
        complete = blocks >> level
        if not complete:
            continue
        assert len(grown[level]) == complete
        assert_within(grown[level].k, groups.k[:, :, :complete], terms=8 * blocks, name=f"level {level} k")
        assert_within(grown[level].v, groups.v[:, :, :complete], terms=8 * blocks, name=f"level {level} v")


@pytest.mark.parametrize(
    "pool",
    [
        MeanPool(),
        FilterPool(1, 2),
        SoftmaxPool(1, 2, 2),
        SoftmaxPool(1, 2, 2, whole=True),
        ConvPool(2, 2, 1, 4, 1),
        DensePool(1, 2, 2, 1, 4),
        StridedPool(1, 2, 4),
    ],
    ids=["mean", "learned", "softmax", "softmax-whole", "conv", "dense", "strided"],
)
def test_gradcheck(pool):
    tokens = 11 if isinstance(pool, ConvPool) else 19  # one level or three, the last group partial
    k, v = normal(1, 1, tokens, 2).requires_grad_(), normal(1, 1, tokens, 1, seed=1).requires_grad_()

    def call(k, v, *_):
        got = summarize(Rows(k, v), block=4, rank=2, pool=pool)
        return got.k, got.v

    assert torch.autograd.gradcheck(call, (k, v, *randomized(pool, 0.2).parameters()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_precision_and_autocast(name, dtype):
    """One rounding to the rows' dtype; sums in float32 under autocast as well."""
    pool = POOLS[name]()
    rows, exact = rows_of(101, dtype), rows_of(101)
    want = summarize(exact, block=8, rank=4, pool=POOLS[name]().double() if name == "mean" else _double(pool))
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            got = summarize(rows, block=8, rank=4, pool=pool)
        assert_within(got.k, want.k, terms=101, name=f"k, autocast {cast}")
        assert_within(got.v, want.v, terms=101, name=f"v, autocast {cast}")


def _double(pool):
    import copy

    return copy.deepcopy(pool).double()


def test_views():
    rows = rows_of(101, torch.float32)
    want = summarize(rows_of(101), block=8, rank=4)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (rows.k, rows.v))
    got = summarize(Rows(k, v), block=8, rank=4)
    assert_within(got.k, want.k, terms=101)
    assert_within(got.v, want.v, terms=101)


class Elements(TorchDispatchMode):
    """How many elements all results have together: the work of elementwise code, products apart."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.total += out.numel()
        return out


@pytest.mark.parametrize("name", ["mean", "learned", "softmax", "dense", "strided"])
def test_work_is_linear(name):
    def work(tokens):
        with Elements() as count:
            summarize(rows_of(tokens), block=8, rank=4, pool=POOLS[name]())
        return count.total

    assert work(8192) < 4.1 * work(2048)


@pytest.mark.parametrize(("block", "rank"), [(8, 3), (8, 0), (0, 4), (4, 8)])
def test_rank_must_divide_block(block, rank):
    with pytest.raises(ValueError, match="rank"):
        summarize(rows_of(40), block=block, rank=rank)


def test_too_few_filters_are_refused_in_words():
    with pytest.raises(ValueError, match=r"200 tokens make 4 levels.*2"):
        summarize(rows_of(200), block=8, rank=4, pool=ConvPool(4, D, E, 8, 2).double())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("near", "tokens"), [(8, 150), (16, 131), (24, 90)])
def test_the_postcard(near, tokens, causal):
    """summarize, select and attend by hand are Fast Multipole Attention by its definition."""
    import farfield as ff

    q, k, v = normal(B, 4, tokens, D), normal(B, G, tokens, D, seed=1), normal(B, G, tokens, E, seed=2)
    want, lse = oracles.fma(q, k, v, block=8, near=near, rank=4, causal=causal)
    rows = ff.Rows(k.float(), v.float())
    far = ff.summarize(rows, block=8, rank=4)
    plan = ff.select.multipole(tokens=tokens, block=8, near=near, rank=4, causal=causal)
    got = ff.attend(q.float(), [(rows, plan.near), (far, plan.far)])
    assert_within(got.out, want, terms=tokens)
    assert_within(got.lse, lse, terms=tokens, name="lse")
    module = ff.FMA(block=8, near=near, rank=4, causal=causal)
    assert_within(module(q.float(), k.float(), v.float()), want, terms=tokens)
