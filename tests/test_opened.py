"""Opened FMA: what it must equal, that it covers each token once, that it finds what averages hide, and its state."""

import copy
import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from farfield.mechanisms.fma import FMA
from farfield.ops import opened as on_gpu
from farfield.select import opened
from farfield.state import State, appended
from farfield.summarize import pyramid
from farfield.testing import oracles
from farfield.testing.contract import packing, rotate
from farfield.testing.units import assert_within
from farfield.types import Rows

SMALL = {"block": 4, "near": 8, "rank": 2}


def scored_by(score, **options):
    """FMA with this score; what is learned is neither where it starts nor the same for all."""
    mech = FMA(**{**SMALL, "kv_heads": 2, "width": 8, **options}, score=score)
    if score == "learned":
        with torch.no_grad():
            mech.spread.copy_(torch.linspace(-0.3, 1.5, 16).view(2, 8))
    return mech.double()


def draw(tokens, *, batch=1, heads=4, kv_heads=2, width=8, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shape = [(batch, h, tokens, width) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=gen, dtype=torch.float64) for s in shape]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", opened.SCORES)
def test_all_opened_is_full_attention(causal, score):
    q, k, v = draw(91)
    got = scored_by(score, open=100, causal=causal, sinks=3)(q, k, v)
    assert_within(got, oracles.full(q, k, v, causal=causal)[0], terms=91)


def test_none_opened_is_plain_bit_for_bit():
    q, k, v = draw(91)
    plain, mech = FMA(**SMALL), FMA(**SMALL, open=2)
    assert not torch.equal(mech(q, k, v), plain(q, k, v))
    mech.open = 0
    assert torch.equal(mech(q, k, v), plain(q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", opened.SCORES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": False, "sinks": 4, "beam": 2},
        {"rank": 4, "detail": 1, "sinks": 3},
        {"hold": 4},
        {"segments": "sum", "detail": 4, "sinks": 3},
    ],
)
def test_the_choice_is_the_definition(causal, score, options):
    q, k, v = draw(93, seed=1)
    mech = scored_by(score, **{"open": 2, "causal": causal, **options})
    assert_within(mech(q, k, v), mech.reference(q, k, v), terms=93)


@pytest.mark.parametrize("sinks", [0, 3, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_every_token_is_covered_once(causal, sinks):
    # equal keys and one-hot values: the output says how much of each token was read
    tokens = 75
    q, k, _ = draw(tokens)
    v = torch.eye(tokens, dtype=torch.float64).expand(1, 2, -1, -1)
    # logits of 0 everywhere; of equal scores the lower groups are opened, the sinks' among them
    q = torch.zeros_like(q)
    seen = FMA(**SMALL, open=3, causal=causal, sinks=sinks, score="box")(q, k, v)
    past = torch.ones(tokens, tokens, dtype=torch.float64)
    past = past.tril() if causal else past
    assert_within(seen, (past / past.sum(-1, keepdim=True)).expand_as(seen), terms=tokens)


def test_the_lists_name_each_token_once():
    """The lists themselves, each query's near tokens and the segments of its summaries."""
    tokens, m = 90, 4
    mech = FMA(**SMALL, open=3, shared=False)
    q, k, _ = draw(tokens, seed=3)
    covered = torch.zeros(1, 4, tokens, tokens)
    original = opened.opened_lists

    def watch(*args, groups, starts, **kwargs):
        (near, near_count), (far, far_count) = original(*args, groups=groups, starts=starts, **kwargs)
        for h in range(4):
            for i in range(tokens):
                blocks = near[0, h, i, : near_count[0, h, i]].tolist()
                listed = far[0, h, i, : far_count[0, h, i]].tolist()
                assert blocks == sorted(set(blocks))
                assert listed == sorted(set(listed))
                for block in blocks:
                    covered[0, h, i, block * m : (block + 1) * m] += 1
                for group in listed:
                    height = max(n for n, start in enumerate(starts) if start <= group)
                    width = m << height
                    group -= starts[height]
                    covered[0, h, i, group * width : (group + 1) * width] += 1
        return (near, near_count), (far, far_count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened, "opened_lists", watch)
        mech(q, k, k)
    assert torch.equal(covered.tril(), torch.ones(tokens, tokens).tril().expand_as(covered))


@pytest.mark.parametrize("score", opened.SCORES)
def test_packed_documents_are_the_documents_alone(score):
    q, k, v = draw(90, batch=2)
    mech, group = scored_by(score, open=1, sinks=2), packing(90, 4)
    got = mech(q, k, v, group=group, rotary=rotate)
    for b in range(2):
        start = 0
        for stop in range(1, 91):
            if stop == 90 or group[b, stop] != group[b, start]:
                cut = [x[b : b + 1, :, start:stop] for x in (q, k, v)]
                alone = mech(*cut, rotary=rotate) if group[b, start] >= 0 else torch.zeros_like(cut[0])
                assert_within(got[b : b + 1, :, start:stop], alone, terms=90)
                start = stop


def test_few_lists_at_a_time_change_nothing(monkeypatch):
    x = [t.requires_grad_() for t in draw(90, batch=2)]
    mech = FMA(**SMALL, open=2)
    whole = mech(*x)
    want = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(opened, "LISTS", 7 * 2 * 2 * 4 * 20)
    parts = mech(*x)
    assert_within(parts, whole.detach(), terms=90)
    for got, exact in zip(torch.autograd.grad(parts.square().sum(), x), want, strict=True):
        assert_within(got, exact, terms=90)


def test_a_needle_comes_back():
    tokens = 256
    q, k, v = draw(tokens, heads=2, width=16)
    # logits of a unit normal, one token of 12
    k[:, :, 37] = 12 * 4 * q[:, :, -1] / q[:, :, -1].square().sum(-1, keepdim=True)
    v = torch.zeros_like(v)
    v[:, :, 37] = 1
    exact = oracles.full(q, k, v, causal=True)[0][:, :, -1]
    plain = FMA(block=16, near=16, rank=4)(q, k, v)[:, :, -1]
    found = FMA(block=16, near=16, rank=4, open=1, beam=4, score="peak")(q, k, v)[:, :, -1]
    assert (exact > 0.9).all()
    assert (plain < 0.3).all()
    assert (found > 0.9).all()


def literal_score_loss(mech, q, k, at):
    """By definition, query by query and group by group."""
    total, many = 0.0, 0
    for i in at:
        width, radius = mech.block, mech.near // mech.block
        while i // width - radius > 0 and width < mech.block << mech.most:
            groups = [range(g * width, (g + 1) * width) for g in range(i // width - radius)]
            # for a horizon of 32: two groups of 16
            groups = groups if mech.horizon is None else [x for x in groups if x[0] >= (i // 16 - 1) * 16]
            groups = [[j for j in group if j >= mech.sinks] for group in groups]
            groups = [group for group in groups if group]
            if len(groups) > 1:
                for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
                    head, x = h * k.shape[1] // q.shape[1], q[b, h, i] * q.shape[3] ** -0.5
                    exact, told = [], []
                    for group in groups:
                        exact.append((k[b, head, group] @ x).logsumexp(0))
                        segments = {}
                        for j in group:
                            segments.setdefault(j * mech.detail // width, []).append(j)
                        each = []
                        for own in segments.values():
                            y = k[b, head, own]
                            spread = mech.spread[head] * (y - y.mean(0)).square().mean(0)
                            each.append(x @ y.mean(0) + x.square() @ spread + math.log(len(own)))
                        each = torch.stack(each)
                        told.append(each.logsumexp(0) if mech.segments == "sum" else each.amax())
                    exact, told = torch.stack(exact).log_softmax(0), torch.stack(told).log_softmax(0)
                    total = total + (exact.exp() * (exact - told)).sum() / (q.shape[0] * q.shape[1])
                many += 1
            width, radius = 2 * width, -(-radius // 2)
    return total / many


@pytest.mark.parametrize(
    ("sinks", "segments", "horizon"), [(0, "best", None), (3, "sum", None), (4, "best", None), (3, "sum", 32)]
)
def test_the_loss_of_a_learned_score_is_the_definition(sinks, segments, horizon):
    q, k, _ = (x.requires_grad_() for x in draw(83, batch=2))
    mech = scored_by("learned", open=2, sinks=sinks, detail=2, segments=segments, horizon=horizon)
    got = mech.score_loss(q, k, queries=9)
    exact = literal_score_loss(mech, q.detach(), k.detach(), torch.linspace(12, 82, 9).long().tolist())
    assert_within(got, exact.detach(), terms=83)
    (mine,) = torch.autograd.grad(got, mech.spread)
    assert_within(mine, torch.autograd.grad(exact, mech.spread)[0], terms=83)
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(mech.score_loss(q, k), [q])
    with torch.autocast("cpu", torch.bfloat16):
        got = mech.float().score_loss(q.float(), k.float(), queries=9)
    assert got.dtype == torch.float32
    assert_within(got, exact.detach(), terms=83)


def test_a_learned_score_learns_which_channels_matter():
    """Half of the channels hold few large keys, which a variance overrates, the others many."""
    q, k, v = draw(320)
    gen = torch.Generator().manual_seed(1)
    rare = torch.rand(k[..., :4].shape, generator=gen, dtype=torch.float64) < 0.02
    k = torch.cat([6 * k[..., :4] * rare, 2 * k[..., 4:]], -1)
    mech = FMA(**SMALL, open=2, score="learned", kv_heads=2, width=8).double()
    before, out = mech.score_loss(q, k).item(), mech(q, k, v)
    optimizer = torch.optim.Adam(mech.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        mech.score_loss(q, k).backward()
        optimizer.step()
    assert mech.score_loss(q, k) < 0.9 * before
    assert not torch.equal(mech(q, k, v), out)


def test_what_cannot_be_taught_is_refused():
    q, k, _ = draw(60)
    with pytest.raises(NotImplementedError, match="learned"):
        FMA(**SMALL, open=2).score_loss(q, k)
    with pytest.raises(ValueError, match="kv_heads and width"):
        FMA(**SMALL, open=2, score="learned")
    near = FMA(**SMALL, open=2, score="learned", kv_heads=2, width=8)
    assert near.score_loss(q[:, :, :8].float(), k[:, :, :8].float()) == 0


def test_no_gradient_through_the_choice_but_through_all_that_is_read():
    x = [t.requires_grad_() for t in draw(60)]
    mech = FMA(**SMALL, open=2)
    grads = torch.autograd.grad(mech(*x).square().sum(), x)
    exact = torch.autograd.grad(mech.reference(*x).square().sum(), x)
    for got, want in zip(grads, exact, strict=True):
        assert_within(got, want, terms=60)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("score", "hold"), [*((score, 1) for score in opened.SCORES), ("peak", 4), ("box", 2)])
def test_extend_continues(score, hold, grad, tmp_path):
    q, k, v = draw(101)
    mech = scored_by(score, open=2, sinks=3, rewind=5, hold=hold)
    whole, state, outs, at = mech(q, k, v, rotary=rotate), None, [], 0
    with torch.set_grad_enabled(grad):
        for n in (33, 1, 1, 9, 30, 1, 1, 1, 24):
            out, state = mech.extend(*(x[:, :, at : at + n] for x in (q, k, v)), state, rotary=rotate)
            outs.append(out)
            at += n
            if at == 44:
                state.save(tmp_path / "state")
                state = State.load(tmp_path / "state")
            if at == 74:
                _, ahead = mech.extend(q[:, :, :5], k[:, :, :5], v[:, :, :5], state, rotary=rotate)
                state = ahead.crop(5)
    assert_within(torch.cat(outs, 2), whole, terms=101)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hold", [1, 2])
@pytest.mark.parametrize("chunks", [(70,), (61, 9), (13, 4, 20, 33), (12, 1, 1, 1, 40, 15)], ids=str)
def test_every_chunking_is_forward(chunks, hold, grad):
    q, k, v = draw(70)
    mech = FMA(**SMALL, open=2, hold=hold, sinks=1).double()
    state, outs, at = None, [], 0
    with torch.set_grad_enabled(grad):
        for n in chunks:
            out, state = mech.extend(*(x[:, :, at : at + n] for x in (q, k, v)), state)
            outs.append(out)
            at += n
    assert_within(torch.cat(outs, 2), mech(q, k, v), terms=70)


POOLS = {
    "mean": {},
    "biased": {"level_bias": -0.5, "kv_heads": 2, "levels": 9},
    "conv": {"pool": "conv", "width": 8, "levels": 6},
    "softmax-whole": {"pool": "softmax-whole", "kv_heads": 2, "width": 8},
    "strided": {"pool": "strided", "kv_heads": 2},
    "horizon": {"horizon": 24},
}


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("pool", POOLS)
def test_groups_in_the_room_behind_others_are_those_of_forward(pool, sinks):
    """Chunks and tokens, from states that were kept, cropped, copied and joined with others, in any order."""
    q, k, v = draw(150)
    mech = FMA(**SMALL, open=2, sinks=sinks, rewind=4, **POOLS[pool]).double()
    with torch.no_grad():
        whole, state, states, at = mech(q, k, v), None, {}, 0
        for n in (20, 1, 7, 30, 1, 1, 40, 3):
            out, state = mech.extend(*(x[:, :, at : at + n] for x in (q, k, v)), state)
            assert_within(out, whole[:, :, at : at + n], terms=150)
            at += n
            states[at] = state
        for state in [*states.values(), *reversed(states.values())]:
            before = {name: x.clone() for name, x in state.tensors().items()}
            beams = torch.tensor([0])
            for found in (state, state.copy(), state.reorder(beams), state.crop(2)):
                begin, there = found.tokens, found
                # other tokens behind the same ones
                other = [torch.randn_like(x[:, :, :40]) for x in (q, k, v)]
                _, aside = mech.extend(*other, found)
                copied = aside.copy()
                for n in (9, 5):
                    here = [x[:, :, begin : begin + n] for x in (q, k, v)]
                    out, there = mech.extend(*here, there)
                    assert_within(out, whole[:, :, begin : begin + n], terms=150)
                    begin += n
                assert torch.equal(mech.extend(*other, aside)[0], mech.extend(*other, copied)[0])
            # whoever went on has changed nothing
            assert all(torch.equal(x, before[name]) for name, x in state.tensors().items())


def test_a_chunk_costs_what_it_brings():
    """Summaries and sketches are written behind those that there are: most chunks copy none of them."""
    q, k, v = draw(400)
    mech, state, where = FMA(**SMALL, open=2), None, []
    with torch.no_grad():
        for at in range(0, 400, 8):
            _, state = mech.extend(*(x[:, :, at : at + 8] for x in (q, k, v)), state)
            if state.levels:
                where.append((state.levels[0].k.data_ptr(), state.sketches[0].rows.data_ptr()))
    assert len(set(where)) <= 10
    # nor are near tokens held apart from all
    assert state.k.untyped_storage().data_ptr() == state.all_k.untyped_storage().data_ptr()


def test_a_prompt_is_summarized_once(monkeypatch):
    q, k, v = draw(70)
    mech, many = FMA(**SMALL, open=2), []
    original = mech.pool.grow
    monkeypatch.setattr(
        mech.pool, "grow", lambda k, *more, **options: many.append(k.shape[2]) or original(k, *more, **options)
    )
    mech.extend(q, k, v)
    # 70 tokens begin 18 blocks, of which the last and two more are near
    assert many == [15]


def test_tokens_are_appended_in_place_and_states_stay_what_they_are():
    q, k, v = draw(90)
    mech = FMA(**SMALL, open=2, rewind=8)
    whole = mech(q, k, v)
    with torch.no_grad():
        _, state = mech.extend(q[:, :, :60], k[:, :, :60], v[:, :, :60])
        states = [state]
        for at in range(60, 90):
            _, state = mech.extend(*(x[:, :, at : at + 1] for x in (q, k, v)), state)
            states.append(state)
        # most steps copy nothing
        assert len({x.all_k.data_ptr() for x in states}) == 2
        held = states[10].all_k.clone()
        other = [torch.randn_like(x[:, :, :1]) for x in (q, k, v)]
        mech.extend(*other, states[10])
        mech.extend(*other, states[12].crop(2))
        assert torch.equal(states[10].all_k, held)
        for n, state in enumerate(states[:-1]):
            out, _ = mech.extend(*(x[:, :, 60 + n : 61 + n] for x in (q, k, v)), state)
            assert_within(out, whole[:, :, 60 + n : 61 + n], terms=90)


def test_room_behind_a_states_tokens_goes_into_no_copy_and_no_file(tmp_path):
    q, k, v = draw(70)
    mech = FMA(**SMALL, open=2)
    with torch.no_grad():
        _, state = mech.extend(q[:, :, :60], k[:, :, :60], v[:, :, :60])
        for at in (60, 61):
            _, state = mech.extend(*(x[:, :, at : at + 1] for x in (q, k, v)), state)
        here = [x[:, :, 62:] for x in (q, k, v)]
        want, _ = mech.extend(*here, state)
        torch.save(state.tensors(), tmp_path / "state.pt")
        for found in (copy.deepcopy(state), state.replaced(torch.load(tmp_path / "state.pt", weights_only=True))):
            assert torch.equal(mech.extend(*here, found)[0], want)


def test_further_tokens_compile_into_one_graph():
    q, k, v = draw(60)
    mech = FMA(**SMALL, open=2, hold=2)
    with torch.no_grad():
        _, state = mech.extend(q[:, :, :49], k[:, :, :49], v[:, :, :49])
        extend = torch.compile(mech.extend, fullgraph=True, backend="aot_eager")
        for at, n in ((49, 1), (50, 7)):
            here = [x[:, :, at : at + n] for x in (q, k, v)]
            (got, there), (want, state) = extend(*here, state), mech.extend(*here, state)
            assert torch.equal(got, want)
            assert torch.equal(there.all_k, state.all_k)


def test_tokens_that_are_elsewhere_stay_there():
    """As host memory is, with autograd on and off."""
    there, more = torch.empty(1, 2, 5, 4, device="meta"), torch.randn(1, 2, 3, 4)
    for on in (True, False):
        with torch.set_grad_enabled(on):
            found = appended(there, more)
        assert (found.device.type, found.shape) == ("meta", (1, 2, 8, 4))


@pytest.mark.parametrize("hold", [1, 2])
def test_a_state_cropped_to_where_nothing_is_far_goes_on(hold):
    q, k, v = draw(90)
    mech = FMA(**SMALL, open=2, rewind=90, sinks=3, hold=hold)
    whole = mech(q, k, v)
    with torch.no_grad():
        _, state = mech.extend(q[:, :, :80], k[:, :, :80], v[:, :, :80])
        for keep in (0, 1, 5, 13):
            for n in (1, 3, 40):
                here = [x[:, :, keep : keep + n] for x in (q, k, v)]
                out, _ = mech.extend(*here, state.crop(80 - keep))
                assert_within(out, whole[:, :, keep : keep + n], terms=90)


@pytest.mark.parametrize("hold", [1, 2])
def test_a_state_with_its_tokens_in_host_memory_goes_on(hold):
    """Without a GPU there is one memory; on one tests/gpu looks where things are."""
    q, k, v = draw(90)
    mech = FMA(**SMALL, open=2, hold=hold)
    with torch.no_grad():
        _, state = mech.extend(q[:, :, :61], k[:, :, :61], v[:, :, :61])
        there = state.to_host()
        assert there.all_k.data_ptr() != state.all_k.data_ptr()
        for at, n in ((61, 1), (62, 20), (82, 8)):
            here = [x[:, :, at : at + n] for x in (q, k, v)]
            (want, state), (got, there) = (mech.extend(*here, x) for x in (state, there))
            assert torch.equal(got, want)


def test_a_cropped_plain_state_goes_on():
    """It has forgotten more than a state that came here from below."""
    q, k, v = draw(100)
    mech = FMA(**SMALL, rewind=4)
    whole = mech(q, k, v)
    _, state = mech.extend(q[:, :, :86], k[:, :, :86], v[:, :, :86])
    state, outs = state.crop(4), []
    for at in range(82, 100):
        out, state = mech.extend(*(x[:, :, at : at + 1] for x in (q, k, v)), state)
        outs.append(out)
    assert_within(torch.cat(outs, 2), whole[:, :, 82:], terms=100)


def test_a_state_made_while_open_is_0():
    q, k, v = draw(60)
    mech = FMA(**SMALL, open=2)
    _, opening = mech.extend(q[:, :, :40], k[:, :, :40], v[:, :, :40])
    mech.open = 0
    _, plain = mech.extend(q[:, :, :40], k[:, :, :40], v[:, :, :40])
    rest = [x[:, :, 40:] for x in (q, k, v)]
    # run without what it was made with
    assert_within(mech.extend(*rest, opening)[0], mech(q, k, v)[:, :, 40:], terms=60)
    mech.open = 2
    assert_within(mech.extend(*rest, opening)[0], mech(q, k, v)[:, :, 40:], terms=60)
    with pytest.raises(ValueError, match="made with open=0"):
        mech.extend(*rest, plain)
    mech.hold = 2
    with pytest.raises(ValueError, match="made with hold=1"):
        mech.extend(*rest, opening)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"open": -1}, ValueError),
        ({"open": 4, "beam": 3}, ValueError),
        ({"open": 1, "score": "best"}, ValueError),
        ({"open": 1, "detail": 3}, ValueError),
        ({"open": 1, "hold": 3}, ValueError),
        ({"open": 1, "segments": "all"}, ValueError),
        ({"level_bias": True, "kv_heads": 2}, ValueError),
        ({"open": 1, "queries": "pooled", "causal": False}, NotImplementedError),
    ],
)
def test_refusals(options, error):
    with pytest.raises(error, match="fma: "):
        FMA(**SMALL, **options)


def test_options_changed_later_are_checked():
    mech = FMA(**SMALL, open=1)
    mech.score = "best"
    with pytest.raises(ValueError, match="score"):
        mech(*draw(60))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [5, 60, 90])
@pytest.mark.parametrize("horizon", [None, 40])
def test_rows_read_is_the_most(causal, tokens, horizon):
    q, k, _ = draw(tokens, heads=2)
    mech = FMA(**SMALL, open=2, causal=causal, horizon=horizon)
    rows = []
    original = opened.attend

    def watch(asking, sources, **options):
        rows.append(sum(layout.visible for _, layout in sources))
        return original(asking, sources, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened, "attend", watch)
        mech(q, k, k)
    plain = FMA(**SMALL, causal=causal, horizon=horizon).rows_read(tokens)
    if rows:
        assert plain < rows[0] <= mech.rows_read(tokens)
    else:
        assert mech.rows_read(tokens) == plain


@pytest.mark.parametrize("open", [0, 2])
def test_level_bias_starts_at_0_and_learns(open):
    q, k, v = draw(90)
    plain = FMA(**SMALL, open=open)
    mech = FMA(**SMALL, open=open, level_bias=True, kv_heads=2, levels=4).double()
    assert torch.equal(mech(q, k, v), plain(q, k, v))
    discounted = FMA(**SMALL, open=open, level_bias=-1.5, kv_heads=2, levels=4).double()
    assert_within(discounted(q, k, v), discounted.reference(q, k, v), terms=90)
    assert (discounted.level_bias == -1.5).all()
    (grad,) = torch.autograd.grad(mech(q, k, v).square().sum(), mech.level_bias)
    assert (grad != 0).all()
    with torch.no_grad():
        mech.level_bias[1] = -1e9
    only_near = mech(q, k, v)
    assert_within(only_near[:, :2], plain(q, k, v)[:, :2], terms=90)
    if not open:
        i = torch.arange(90)
        near = (i[:, None] // 4 - i // 4 <= 2) & (i <= i[:, None])
        scores = (q[:, 2:] @ k[:, 1:].mT / 8**0.5).masked_fill(~near, float("-inf"))
        assert_within(only_near[:, 2:], scores.softmax(-1) @ v[:, 1:], terms=90)
    with pytest.raises(ValueError, match="level_bias has 4 levels"):
        mech(*draw(300))


HARD = {
    "normal": lambda k, gen: k,
    "faint": lambda k, gen: 0.05 * k,
    "loud": lambda k, gen: 6 * k,
    "two values": lambda k, gen: 3 * k.sign(),
    "one axis": lambda k, gen: k * torch.tensor([8.0] + [0.1] * 7),
    "one token": lambda k, gen: torch.where(torch.rand(k.shape[:3], generator=gen)[..., None] < 0.03, 9 * k, 0.1 * k),
    "drifting": lambda k, gen: 0.3 * k.cumsum(2),
    "equal": lambda k, gen: k[:, :, :1].expand_as(k),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_is_never_below_the_error(dtype):
    """More than 10,000 queries, random and made to be hard; printed is how tight it is."""
    seen, ratios = 0, []
    gen = torch.Generator().manual_seed(0)
    for n, (name, hard) in enumerate(HARD.items()):
        for options in ({}, {"open": 2}, {"causal": False, "sinks": 3}, {"open": 1, "score": "box", "shared": False}):
            q, k, v = draw(65, batch=5, seed=n)
            # values that go with the keys are worse than values that do not
            q, k, v = (x.to(dtype) for x in (q, hard(k, gen), v + k.sign()))
            mech = FMA(**SMALL, **options)
            out, bound = mech.certify(q, k, v)
            exact = oracles.full(q.double(), k.double(), v.double(), causal=mech.causal)[0]
            error = (out - exact).abs().amax(-1)
            assert (error <= bound).all(), f"{name}, {options}: {(error - bound).max():.1e} above the bound"
            far = error > 1e-4
            ratios.append((bound / error)[far])
            seen += error.numel()
    ratios = torch.cat(ratios)
    assert seen > 10_000
    print(
        f"{seen} queries, {len(ratios)} with an error above 1e-4: bound / error {ratios.min():.2f} at least, ", end=""
    )
    print(f"{ratios.median():.1f} median")
    # a bound of infinity would pass above
    assert ratios.median() < 100


def test_equal_keys_cost_nothing():
    q, k, v = draw(80)
    _, bound = FMA(**SMALL).certify(q, k[:, :, :1].expand_as(k), v)
    assert (bound < 1e-9).all()


@pytest.mark.parametrize("tolerance", [0.3, 1e-3])
def test_tolerance_is_kept(tolerance):
    q, k, v = draw(90)
    k = 0.3 * k
    exact = oracles.full(q, k, v, causal=True)[0]
    plain, mech = FMA(**SMALL), FMA(**SMALL, tolerance=tolerance)
    assert (plain(q, k, v) - exact).abs().max() > tolerance / 2
    out, bound = mech.certify(q, k, v)
    assert (bound <= tolerance).all()
    assert ((out - exact).abs().amax(-1) <= bound).all()
    assert torch.equal(mech(q, k, v), out)


def test_the_future_reaches_no_certified_output():
    q, k, v = draw(90)
    mech = FMA(**SMALL, tolerance=0.3)
    after = mech(*(torch.cat([x[:, :, :50], 1 - 3 * x[:, :, 50:]], 2) for x in (q, k, v)))
    assert torch.equal(after[:, :, :50], mech(q, k, v)[:, :, :50])


def test_what_is_not_proven_is_refused():
    q, k, v = draw(60)
    mech = FMA(**SMALL, tolerance=0.1)
    for call in (
        lambda: mech(q, k, v, rotary=rotate),
        lambda: mech.extend(q, k, v),
        lambda: mech.certify(q.bfloat16(), k.bfloat16(), v.bfloat16()),
        lambda: FMA(**SMALL, level_bias=True, kv_heads=2, levels=4).certify(q, k, v),
        lambda: FMA(**SMALL, pool="learned", kv_heads=2).certify(q, k, v),
    ):
        with pytest.raises(NotImplementedError, match="fma: "):
            call()
    with pytest.raises(ValueError, match="tolerance"):
        FMA(**SMALL, tolerance=-1.0)


@pytest.mark.parametrize(("heads", "kv_heads", "shared"), [(4, 4, True), (4, 2, True), (4, 1, True), (4, 2, False)])
@pytest.mark.parametrize("hold", [1, 2, 4])
def test_runs_read_by_one_list_what_each_of_their_queries_reads(hold, heads, kv_heads, shared, monkeypatch):
    """As GPUs do with tiles of queries, heads that share a list side by side."""
    tokens, start = 93, 48
    mech, x = FMA(**SMALL, open=3, hold=hold, shared=shared), draw(tokens, heads=heads, kv_heads=kv_heads)
    found, original = {}, opened.opened_lists

    def watch(*args, **more):
        found["lists"] = original(*args, **more)
        return found["lists"]

    monkeypatch.setattr(opened, "opened_lists", watch)
    given = [t.requires_grad_() for t in x]
    exact = mech(*given)
    wanted = torch.autograd.grad(exact.square().sum(), given)
    near, listed = (tuple(y[:, :, ::hold] for y in pair) for pair in found["lists"])
    q, k, v = given
    blocks = -(-tokens // mech.block)
    levels, radius = mech._levels(blocks)
    tree = mech._tree(tokens, blocks, levels, radius[0])
    far = pyramid(mech.pool, k, v, tree)
    rows = Rows(far.far_k, far.far_v, bias=far.bias)
    about = hold, mech.block, mech.rank, q.shape[3] ** -0.5
    out = opened.attend_runs(q, Rows(k, v), rows, near, listed, *about).out
    assert_within(out, exact.detach(), terms=tokens)
    for got, want in zip(torch.autograd.grad(out.square().sum(), given, retain_graph=True), wanted, strict=True):
        assert_within(got, want, terms=tokens)
    # further queries, as after a state
    lists = (tuple(y[:, :, start // hold :] for y in pair) for pair in (near, listed))
    behind = opened.attend_runs(q[:, :, start:], Rows(k, v), rows, *lists, *about, start).out
    assert_within(behind, exact.detach()[:, :, start:], terms=tokens)


@pytest.mark.parametrize(
    ("hold", "heads", "shared", "whole"),
    [(64, 1, True, True), (128, 3, True, True), (64, 4, False, True), (16, 4, True, True), (16, 8, True, True),
     (32, 2, True, True), (8, 8, True, True), (16, 4, False, False), (16, 2, True, False), (16, 6, True, False),
     (4, 16, True, False), (1, 64, True, False)],
)  # fmt: skip
def test_runs_that_are_whole_tiles(hold, heads, shared, whole):
    plan = FMA(open=4, block=128, hold=hold, shared=shared).plan()
    q, k = (SimpleNamespace(shape=(1, n, 5000, 64)) for n in (2 * heads, 2))
    assert on_gpu.by_tiles(q, k, plan) is whole


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"open": 64, "beam": 128}, "64 groups"),
        ({"open": 4, "score": "box"}, "score='peak' or 'mean', not 'box'"),
        ({"open": 4, "scale": 0.0}, "any scale but 0"),
        ({"open": 4}, None),
    ],
    ids=["beam", "score", "scale", "taken"],
)
def test_a_gpu_is_told_why_opening_is_slow(options, why):
    mech = FMA(near=128, rank=4, **options)
    tree = mech._tree(8192, 128, *mech._levels(128)[:1], 2)
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 8, 8192, 64))
    told = pytest.warns(UserWarning, match=why) if why else nullcontext()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with told:
            assert mech._refused(on_a_gpu, on_a_gpu, on_a_gpu, tree, mech.plan()) is (why is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.randn(1, 1, 300, 64)
        mech(x, x, x)


def test_packed_documents_and_gradients_from_a_state_on_say_why_they_are_slow(monkeypatch):
    told = []
    monkeypatch.setattr(FMA, "_slowly", lambda self, q, why: told.append(why))
    mech = FMA(**SMALL, open=1)
    q, k, v = (x.requires_grad_() for x in draw(60))
    mech(q, k, v, group=torch.arange(60)[None] // 30)
    assert told == ["take one document, not packed ones"]
    _, state = mech.extend(*(x[:, :, :30] for x in (q, k, v)))
    told.clear()
    monkeypatch.setattr(on_gpu, "refusal", lambda *_: None)
    mech.extend(*(x[:, :, 30:] for x in (q, k, v)), state)
    assert told == ["take gradients from a state on only if a multiple of 64 choose together"]
