"""HiP: when it must equal something known, what its search finds and misses, who may choose, its state.

The numbered checks are those of the method's analysis.
"""

import os

import pytest
import torch

import farfield as ff
from farfield.mechanisms.hip import Hip
from farfield.ops.tree import Search
from farfield.select import static
from farfield.select.tree import tree
from farfield.state import State
from farfield.testing import oracles
from farfield.testing.inputs import normal
from farfield.testing.recall import captured, topical
from farfield.testing.units import assert_within

SCALAR = {"sinks": 0, "width": 1, "q_block": 1, "k_block": 1}
SMALL = {"keep": 16, "sinks": 4, "width": 8, "q_block": 8, "k_block": 4, "q_stride": 1, "k_stride": 1, "beam": 1}


def draw(tokens, *, heads=2, kv_heads=1, width=8, dtype=torch.float64):
    return [normal(1, h, tokens, width, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads))]


def found(values, keep):
    """What the scalar search over these scores ends at, for each row of values [B, S]: [B, keep]."""
    # a last token of its own asks, and sees itself through its window
    k = torch.cat([values, values[:, :1]], 1)[:, None, :, None]
    layout = tree(torch.ones_like(k[:, :, -1:]), k, keep=keep, start=values.shape[1], **SCALAR)
    assert (layout.count == keep + 1).all()
    return layout.index[:, 0, 0, :keep]


# 1


@pytest.mark.parametrize("tokens", [1, 8, 27, 28])
def test_01_what_is_kept_whole_is_full_attention(tokens):
    q, k, v = draw(tokens)
    full = oracles.full(q, k, v, causal=True)[0]
    assert_within(Hip(**SMALL)(q, k, v), full, terms=tokens)


def test_01_more_is_not():
    q, k, v = draw(64)
    assert (Hip(**SMALL)(q, k, v) - oracles.full(q, k, v, causal=True)[0]).abs().max() > 1e-3


def test_01_a_step_is_the_last_row_of_a_prefill():
    q, k, v = draw(77)
    mech = Hip(**SMALL)
    _, state = mech.extend(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1])
    last, _ = mech.extend(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], state)
    assert_within(last, mech(q, k, v)[:, :, -1:], terms=77)


# 2, 3


def test_02_monotone_scores_give_the_last_or_the_first_keys():
    scores = torch.arange(4096.0)[None]
    assert found(scores, 64)[0].tolist() == list(range(4096 - 64, 4096))
    assert found(-scores, 64)[0].tolist() == list(range(64))
    # of equal scores the earlier one wins
    assert found(torch.zeros(1, 4096), 64)[0].tolist() == list(range(64))
    # sizes that do not divide
    assert found(scores[:, :3001], 60)[0].tolist() == list(range(3001 - 60, 3001))


@pytest.mark.parametrize("length", [64, 128, 512])
def test_03_the_best_chunk_of_constant_scores_is_found(length):
    gen = torch.Generator().manual_seed(length)
    chunks = torch.stack([torch.randperm(4096 // length, generator=gen) for _ in range(5)])
    picked = found(chunks.float().repeat_interleave(length, 1), 64)
    assert (picked // length == chunks.argmax(1, keepdim=True)).all()


# 4


def test_04_one_key_alone_is_missed():
    at = torch.arange(0, 4096, 5)
    scores = torch.zeros(len(at), 4096).scatter_(1, at[:, None], 1.0)
    share = (found(scores, 64) == at[:, None]).any(1).double().mean().item()
    # 64 of 4096 are found by chance; a top-k that is exact finds all
    assert 0.01 < share < 0.15


@pytest.mark.parametrize("keep", [16, 64])
def test_04_a_bump_is_found(keep):
    at = torch.arange(0, 4096, 13)
    distance = torch.arange(4096) - at[:, None]
    # as wide as its nodes at the first step
    picked = found((-((distance / (256 / keep)) ** 2) / 2).exp(), keep)
    assert (picked == at[:, None]).any(1).all()


# 6


def test_06_heads_choose_for_themselves():
    q, k, v = draw(101, heads=4)
    mech, order = Hip(**SMALL), [2, 0, 3, 1]
    assert torch.equal(mech(q[:, order], k, v), mech(q, k, v)[:, order])
    index = mech.choose(q, k).index
    assert (index[:, 0] != index[:, 1]).any()


def test_06_places_within_a_node_matter():
    q, k, _ = draw(101)
    mech = Hip(**SMALL)
    shuffled = k.clone()
    # the same keys in every node of the last block's first step
    shuffled[:, :, 4:24] = k[:, :, 4:24].flip(2)
    assert (mech.choose(q, shuffled).index[..., -1, :] != mech.choose(q, k).index[..., -1, :]).any()
    chosen = [Hip(**SMALL, place=place).choose(q, k).index for place in ("centre", "first", "last")]
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[1], chosen[2])


# 7


def test_07_recall_is_that_of_the_keys_listed():
    q, k, _ = draw(100, dtype=torch.float32)
    everything = captured(q, k, static.full(tokens=100, causal=True), keep=20)
    assert everything.recall == 1.0
    assert everything.mass == pytest.approx(1.0)
    window = captured(q, k, static.window(tokens=100, width=10, sinks=2), keep=50, queries=1)  # query 50
    best = (k[0, 0, :51] @ q[0, :, 50].T).topk(50, 0).indices
    seen = ((best > 40) | (best < 2)).double().mean().item()
    assert window.recall == pytest.approx(seen)


@pytest.mark.parametrize(
    "options", [{}, {"q_block": 64, "k_block": 2, "q_stride": 2, "k_stride": 1, "beam": 1}], ids=str
)
def test_07_more_is_found_than_by_chance_or_nearby(options):
    q, k = topical(1, 2, 1, 8192, 32, topics=16)
    mech = Hip(keep=256, **options)
    hip = captured(q, k, mech.choose(q, k), keep=256)
    # as many keys: blocks chosen by the keys of another text, and a window
    other = mech.choose(*topical(1, 2, 1, 8192, 32, topics=16, seed=1))
    rows = round(mech.rows_read(8192))
    for rival in (other, static.window(tokens=8192, width=rows - 16, sinks=16)):
        theirs = captured(q, k, rival, keep=256)
        assert hip.recall > 1.2 * theirs.recall
        assert hip.mass > 1.2 * theirs.mass


# 8


def test_08_nothing_behind_its_first_query_chooses_for_a_block():
    q, k, _ = draw(96)
    mech = Hip(**SMALL)
    before = mech.choose(q, k)
    for cut in range(1, 96, 3):
        late = [torch.cat([x[:, :, :cut], 1 - 3 * x[:, :, cut:]], 2) for x in (q, k)]
        known = -(-cut // 8)  # blocks whose first query is there
        assert torch.equal(mech.choose(*late).index[:, :, :known], before.index[:, :, :known])
    # what comes before does
    early = torch.cat([q[:, :, :-16], -q[:, :, -16:-8], q[:, :, -8:]], 2)
    assert not torch.equal(mech.choose(early, k).index[:, :, -1], before.index[:, :, -1])


# lists


def test_lists_ascend_without_repeats_and_count_as_told():
    for tokens in (5, 40, 131):
        q, k, _ = draw(tokens)
        for options in (SMALL, SMALL | {"q_block": 5, "k_block": 3, "keep": 12, "sinks": 7, "width": 1}):
            mech = Hip(**options)
            layout = mech.choose(q, k)
            assert layout.visible == pytest.approx(mech.rows_read(tokens))
            for h in range(2):
                for n in range(layout.index.shape[2]):
                    listed = layout.index[0, h, n, : layout.count[0, h, n]].tolist()
                    assert listed == sorted(set(listed))
                    assert listed[-1] == (min((n + 1) * layout.q_block, tokens) - 1) // layout.k_block


def test_hidden_and_nan_keys_do_not_break_the_search():
    q, k, _ = draw(101, dtype=torch.float32)
    layout = Hip(**SMALL).choose(q, k)
    for odd in (float("nan"), float("-inf"), float("inf")):
        broken = k.clone()
        broken[:, :, 20:60] = odd
        lists = Hip(**SMALL).choose(q, broken)
        assert torch.equal(lists.count, layout.count)
        assert (lists.index[lists.used()].diff() != 0).all()
        assert int(lists.index[lists.used()].max()) < lists.row_blocks


def test_the_list_of_an_open_block_is_kept():
    q, k, v = draw(64)
    mech = Hip(**SMALL)
    _, state = mech.extend(q[:, :, :41], k[:, :, :41], v[:, :, :41])
    first = state.index
    for t in range(41, 47):
        _, state = mech.extend(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        assert torch.equal(state.index, first)
    assert state.q.shape[2] <= 16
    _, state = mech.extend(*(x[:, :, 47:48] for x in (q, k, v)), state)
    assert state.index is None


def test_states_go_to_files_and_back(tmp_path):
    q, k, v = draw(43)
    mech = Hip(**SMALL)
    for cut in (40, 42):
        _, state = mech.extend(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut])
        state.save(tmp_path / "state")
        rest = [x[:, :, cut:] for x in (q, k, v)]
        assert torch.equal(mech.extend(*rest, State.load(tmp_path / "state"))[0], mech.extend(*rest, state)[0])


def test_a_wider_beam_finds_no_less_of_what_is_alike():
    q, k = topical(1, 2, 1, 4096, 32, topics=16)
    recalls = [captured(q, k, Hip(keep=256, beam=beam).choose(q, k), keep=256).recall for beam in (1, 4)]
    assert recalls[1] > recalls[0]
    # all nodes are followed: the best blocks by their samples
    exact = Hip(keep=256, beam=16, q_stride=1, k_stride=1).choose(q, k)
    assert captured(q, k, exact, keep=256).recall >= recalls[1]


def test_steps_are_halvings():
    plan = Search(0, 8, 1, 1, 256, 128, 64, 8, 16, 0)
    # nodes that are single blocks take a step as well where there is a choice
    assert [plan._replace(beam=4).steps(t) for t in (896, 897, 1 << 15)] == [0, 1, 4]
    # 7, 9 and 17 blocks lie between sinks and window of the last list, then about T / 64
    assert [plan.steps(t) for t in (1, 896, 897, 1409, 1 << 15, 1 << 18)] == [0, 0, 1, 2, 6, 9]


@pytest.mark.parametrize(
    "options",
    [{"keep": 100}, {"keep": 0}, {"k_stride": 0}, {"beam": 0}, {"width": 0}, {"sinks": -1}, {"place": "middle"},
     {"scale": -1.0}, {"rewind": -1}],
    ids=str,
)  # fmt: skip
def test_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Hip(**options)


def test_refuses_blocks_that_are_not_there():
    q, k, _ = draw(20)
    with pytest.raises(ValueError, match="no query block 3 of 8 among 20"):
        tree(q, k, **SMALL, start=3)


def test_postcard():
    q, k, v = draw(300, dtype=torch.float32)
    got = ff.attention(q, k, v, "hip", is_causal=True, enable_gqa=True)
    assert_within(got, oracles.full(q.double(), k.double(), v.double(), causal=True)[0], terms=300)


# the kernel without a GPU


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")
@pytest.mark.parametrize("width", [64, 128])
def test_one_kernel_for_all_lengths_and_no_spills(width):
    pytest.importorskip("triton")
    from farfield.kernels import tree as kernel
    from farfield.testing import compiled

    plan = Search(0, 4, 4, 1, 256, 128, 128, 8, 64, 0)
    with compiled.recording() as launches:
        for tokens in [1, 127, 128, 129, *range(1000, 5000, 97), (1 << 18) - 1, 1 << 18]:
            q, k = (torch.empty(1, h, tokens, width, dtype=torch.bfloat16, device="meta") for h in (4, 2))
            kernel.search(q, k, plan)
    assert len({made.hash for made in launches}) == 1
    assert launches[0].spills == 0
    assert launches[0].shared <= compiled.SHARED
    assert launches[0].count("HGMMA") + launches[0].count("HMMA") > 0
