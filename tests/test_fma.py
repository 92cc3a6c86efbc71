"""Fast Multipole Attention: when it must equal something known, what its far field may and may not do, its state.

The numbered checks are those of the method's analysis: each has a proof and needs no implementation to compare with.
"""

import json
import math

import pytest
import torch

import farfield as ff
from farfield.bench.memory import measure
from farfield.mechanisms.fma import FMA
from farfield.select.static import depth, far_lists, radii
from farfield.state import State
from farfield.testing import oracles
from farfield.testing.units import assert_within

FAR = {"block": 4, "near": 4, "rank": 2}
POOLS = ["mean", "learned", "conv", "softmax", "softmax-whole", "dense", "strided"]


def draw(tokens, *, batch=1, heads=2, kv_heads=2, width=8, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shape = [(batch, h, tokens, width) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=gen, dtype=torch.float64) for s in shape]


def full(q, k, v, causal):
    return oracles.full(q, k, v, causal=causal)[0]


def same(a, b, terms=1000):
    assert_within(a, b, terms=terms)


def perturbed(pool, **options):
    """An FMA whose pool has left its starting point."""
    options = FAR | {"kv_heads": 2, "width": 8, "levels": 6} | options
    mech = FMA(pool=pool, **options).double()
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in mech.parameters():
            p += 0.3 * torch.randn(p.shape, generator=gen, dtype=p.dtype)
    return mech


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_01_two_blocks_are_full_attention(tokens, causal):
    q, k, v = draw(tokens)
    same(FMA(**FAR, causal=causal)(q, k, v), full(q, k, v, causal))


def test_01_three_blocks_are_not():
    q, k, v = draw(12)
    far = FMA(**FAR, causal=False)(q, k, v)
    assert (far - full(q, k, v, False)).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_02_rows_that_are_tokens_are_full_attention(causal):
    # p = m and n = 4m: the one level in use has a row for each token
    q, k, v = draw(16)
    same(FMA(block=4, near=4, rank=4, causal=causal)(q, k, v), full(q, k, v, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_03_keys_constant_on_segments_are_full_attention(causal):
    # the coarsest level's segments are 8 / 2 = 4 tokens wide; values are arbitrary
    q, k, v = draw(32)
    k = k[:, :, ::4].repeat_interleave(4, 2)
    same(FMA(**FAR, causal=causal)(q, k, v), full(q, k, v, causal))


def test_03_needs_the_multiplicity_bias():
    q, k, v = draw(32)
    k = k[:, :, ::4].repeat_interleave(4, 2)
    rows, plan = ff.Rows(k, v), ff.select.multipole(tokens=32, block=4, near=4, rank=2)
    far = ff.summarize(rows, block=4, rank=2)
    without = ff.Rows(far.k, far.v)
    exact = full(q, k, v, True)
    same(ff.attend(q, [(rows, plan.near), (far, plan.far)]).out, exact)
    assert (ff.attend(q, [(rows, plan.near), (without, plan.far)]).out - exact).abs().max() > 1e-2


@pytest.mark.parametrize("tokens", [3, 17, 40, 61])
@pytest.mark.parametrize("near", [4, 8])
def test_04_equal_logits_give_running_means(tokens, near):
    q, k, v = draw(tokens)
    running = v.cumsum(2) / torch.arange(1, tokens + 1)[:, None]
    mech = FMA(block=4, near=near, rank=2)
    same(mech(0 * q, k, v), running)
    same(mech(q, k[:, :, :1].expand_as(k), v), running)
    mean = v.mean(2, keepdim=True).expand_as(v)
    same(FMA(block=4, near=near, rank=2, causal=False)(0 * q, k, v), mean)


@pytest.mark.parametrize("pool", ["mean", "learned", "softmax", "softmax-whole", "strided"])
@pytest.mark.parametrize("causal", [True, False])
def test_05_constant_values_pass(pool, causal):
    q, k, v = draw(53)
    v = v[:, :, :1].expand_as(v)
    same(perturbed(pool, causal=causal)(q, k, v), v)


@pytest.mark.parametrize("pool", POOLS)
def test_06_the_first_two_blocks_are_full_attention(pool):
    q, k, v = draw(60)
    same(perturbed(pool)(q, k, v)[:, :, :8], full(q, k, v, True)[:, :, :8])


@pytest.mark.parametrize("pool", POOLS)
def test_07_prefixes_are_consistent(pool):
    q, k, v = draw(75)
    mech = perturbed(pool)
    whole = mech(q, k, v)
    for tokens in (1, 7, 8, 9, 31, 32, 33, 64, 74):
        same(mech(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens]), whole[:, :, :tokens])


def test_07_lists_do_not_depend_on_the_length():
    for blocks in range(1, 40):
        radius = radii(4, 4, depth(40))
        short, used = far_lists(torch.arange(blocks), radius, True, blocks)
        long, long_used = far_lists(torch.arange(40), radius, True, 40)
        for a, b, c, d in zip(short, used, long, long_used, strict=True):
            assert torch.equal(b, d[:blocks])
            assert torch.equal(a[b], c[:blocks][d[:blocks]])
        active = max((level + 1 for level, u in enumerate(used) if u[-1].any()), default=0)
        # the highest active level at token t is floor(log2(t / m))
        assert active == (math.floor(math.log2(blocks - 1)) if blocks > 1 else 0)


@pytest.mark.parametrize("tokens", [30, 64, 77])
@pytest.mark.parametrize("sinks", [0, 3])
def test_08_the_last_row_does_not_care_about_causality(tokens, sinks):
    q, k, v = draw(tokens)
    # complete groups only, or the noncausal tree has a partial group that the causal one still reads token by token
    causal, noncausal = (FMA(**FAR, sinks=sinks, causal=c)(q, k, v)[:, :, -1:] for c in (True, False))
    same(causal, noncausal)


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_09_reversal(tokens):
    q, k, v = draw(tokens)
    mech = FMA(**FAR, causal=False)
    same(mech(q.flip(2), k.flip(2), v.flip(2)), mech(q, k, v).flip(2))


def test_10_order_inside_a_segment_does_not_matter_from_afar():
    q, k, v = draw(64)
    mech = FMA(block=8, near=8, rank=2)
    swapped = torch.arange(64)
    swapped[0:4] = torch.tensor([2, 0, 3, 1])  # the first segment of the first group
    before, after = mech(q, k, v), mech(q, k[:, :, swapped], v[:, :, swapped])
    same(after[:, :, 16:], before[:, :, 16:])
    assert (after[:, :, :4] - before[:, :, :4]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("near", [4, 8, 12])
def test_11_without_the_far_field_it_is_block_local(causal, near):
    q, k, v = draw(50)
    plan = ff.select.multipole(tokens=50, block=4, near=near, rank=2, causal=causal)
    rows, far = ff.Rows(k, v), ff.summarize(ff.Rows(k, v), block=4, rank=2)
    silent = ff.Rows(far.k, far.v, bias=torch.full_like(far.bias, float("-inf")))
    out = ff.attend(q, [(rows, plan.near), (silent, plan.far)]).out
    i = torch.arange(50)
    seen = (i[:, None] // 4 - i // 4).abs() <= near // 4
    if causal:
        seen &= i <= i[:, None]
    scores = (q @ k.mT / 8**0.5).masked_fill(~seen, float("-inf"))
    same(out, scores.softmax(-1) @ v)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("near", [4, 12])
def test_12_decoding_is_the_forward(pool, sinks, near):
    q, k, v = draw(90, batch=2)
    mech = perturbed(pool, sinks=sinks, near=near)
    whole = mech(q, k, v)
    for chunks in ([1] * 90, [37, 1, 1, 30, 21], [8] * 11 + [2], [90]):
        state, outs, at = None, [], 0
        for chunk in chunks:
            here = slice(at, at + chunk)
            out, state = mech.extend(q[:, :, here], k[:, :, here], v[:, :, here], state)
            outs.append(out)
            at += chunk
        same(torch.cat(outs, 2), whole)


@pytest.mark.parametrize("pool", ["learned", "conv", "softmax", "dense"])
@pytest.mark.parametrize("causal", [True, False])
def test_13_pools_start_as_the_mean(pool, causal):
    # a convolution knows no partial groups, which only the noncausal tree has
    q, k, v = draw(64 if pool == "conv" else 70)
    mech = FMA(**FAR, pool=pool, kv_heads=2, width=8, levels=6, causal=causal).double()
    same(mech(q, k, v), FMA(**FAR, causal=causal)(q, k, v))


def test_14_pooled_queries_are_substituted_queries():
    q, k, v = draw(67)
    same(
        FMA(**FAR, queries="pooled", causal=False)(q, k, v),
        oracles.fma(q, k, v, **FAR, causal=False, queries="pooled")[0],
    )


def test_14_pooled_queries_that_are_equal_change_nothing():
    q, k, v = draw(64)
    q = q[:, :, ::8].repeat_interleave(8, 2)  # the coarsest level's sub-blocks
    kept, pooled = (FMA(**FAR, queries=x, causal=False)(q, k, v) for x in ("kept", "pooled"))
    same(pooled, kept)


def test_15_a_segment_is_never_overrated():
    q, k, v = draw(64)
    far = ff.summarize(ff.Rows(k, v), block=4, rank=2)
    scale = 8**-0.5
    mass = q @ far.k.mT * scale + far.bias
    for level, offset in enumerate(far.offsets):
        width = (4 << level) // 2
        logits = (q @ k.mT * scale).unflatten(-1, (-1, width))
        short = logits.logsumexp(-1) - mass[..., offset : offset + logits.shape[-2]]
        spread = logits.amax(-1) - logits.amin(-1)
        assert (short >= -1e-12).all()
        assert (short <= spread**2 / 8 + 1e-12).all()
    exact = ff.attend(q, ff.Rows(k, v), ff.select.full(tokens=64)).lse
    plan = ff.select.multipole(tokens=64, block=4, near=4, rank=2, causal=False)
    assert (ff.attend(q, [(ff.Rows(k, v), plan.near), (far, plan.far)]).lse <= exact + 1e-12).all()


def test_16_small_logits():
    q, k, v = draw(64)
    plan = ff.select.multipole(tokens=64, block=4, near=4, rank=2)

    def errors(eps):
        rows = ff.Rows(eps * k, v)
        far = ff.summarize(rows, block=4, rank=2)
        got = ff.attend(q, [(rows, plan.near), (far, plan.far)])
        exact = ff.attend(q, rows, ff.select.full(tokens=64, causal=True))
        return (got.lse - exact.lse).abs().max(), (got.out - exact.out).abs().max()

    (lse, out), (lse_10, out_10) = errors(1e-2), errors(1e-3)
    # the mass is right to first order, the covariance of key and value inside a segment is lost
    assert 80 < lse / lse_10 < 120
    assert 8 < out / out_10 < 12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("near", [1, 2, 3, 4, 5, 8])
def test_every_pair_is_covered_once(causal, near):
    for blocks in [*range(1, 40), 63, 64, 65, 127, 150]:
        plan = ff.select.multipole(tokens=blocks, block=1, near=near, rank=1, causal=causal)
        cover = ff.select.to_dense(plan.near)[0, 0].long()
        offset, level = 0, 0
        while -(-blocks // 2**level) >= 3:
            groups = -(-blocks // 2**level)
            for n in range(blocks):
                for m in plan.far.index[0, 0, n, : plan.far.count[0, 0, n]].tolist():
                    if offset <= m < offset + groups:
                        cover[n, (m - offset) << level : (m - offset + 1) << level] += 1
            offset, level = offset + groups, level + 1
        expected = torch.ones(blocks, blocks, dtype=torch.long)
        assert torch.equal(cover, expected.tril() if causal else expected)


@pytest.mark.parametrize("options", [{}, {"sinks": 3}, {"near": 8}, {"causal": False}, {"causal": False, "sinks": 4}])
def test_packed_documents_restart_the_tree(options):
    q, k, v = draw(140, batch=2, heads=4)
    lengths = [[61, 3, -5, 40, 31], [1, 139]]
    group = torch.stack([
        torch.cat([torch.full((abs(n),), i if n > 0 else -1) for i, n in enumerate(row)]) for row in lengths
    ])  # fmt: skip
    mech = FMA(**FAR | options)
    poisoned = [x.masked_fill((group < 0)[:, None, :, None], float("nan")) for x in (q, k, v)]
    out = mech(*poisoned, group=group)
    for b, row in enumerate(lengths):
        at = 0
        for n in row:
            here = slice(at, at + abs(n))
            got = out[b : b + 1, :, here]
            if n > 0:
                alone = (x[b : b + 1, :, here] for x in (q, k, v))
                same(got, oracles.fma(*alone, **FAR | {"causal": True} | options)[0])
            else:
                assert not got.any()
            at += abs(n)


@pytest.mark.parametrize("near", [4, 8, 16])
@pytest.mark.parametrize("pool", ["mean", "conv"])
def test_the_state_is_as_small_as_promised(near, pool):
    q, k, v = draw(600, kv_heads=1, heads=1, width=4)
    mech = FMA(block=4, near=near, rank=2, pool=pool, width=4, levels=8).double()
    state = None
    for t in range(600):
        here = slice(t, t + 1)
        _, state = mech.extend(q[:, :, here], k[:, :, here], v[:, :, here], state)
        levels = 8 if pool == "conv" else max(0, math.floor(math.log2((t + 1) / 4)))
        most = near + 4 + 4 * 2 * levels
        assert state.rows <= most, f"{state.rows} rows at {t + 1} tokens, {most} promised"
        # float64 rows of k and of v, and nothing else
        assert state.nbytes == state.rows * 2 * 4 * 8


def test_the_state_after_a_million_tokens():
    m, p, width, total = 16, 4, 2, 1_000_000
    mech = FMA(block=m, near=m, rank=p)
    state, gen = None, torch.Generator().manual_seed(0)
    while (seen := state.tokens if state else 0) < total:
        size = min(65_536 + 77, total - seen)
        q, k, v = (torch.randn(1, 1, size, width, generator=gen) for _ in range(3))
        with torch.no_grad():
            _, state = mech.extend(q, k, v, state)
    levels = math.floor(math.log2(total / m))
    most = 2 * m + 4 * p * levels
    assert state.tokens == total
    assert state.rows <= most
    # what the tensors' memory really is, not only what they show
    held = sum(x.untyped_storage().nbytes() for x in state.tensors().values())
    assert held == state.nbytes <= most * 2 * width * 4


def test_states_stay_valid_and_can_be_stored(tmp_path):
    q, k, v = draw(70, batch=3)
    mech = perturbed("softmax-whole", sinks=2)
    whole = mech(q, k, v)
    _, state = mech.extend(q[:, :, :50], k[:, :, :50], v[:, :, :50])
    kept = state.copy()
    mech.extend(q[:, :, 50:60], k[:, :, 50:60], v[:, :, 50:60], state)
    state.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state")
    assert type(loaded) is type(state)
    assert (loaded.tokens, loaded.first) == (state.tokens, state.first)
    assert [x.name for x in tmp_path.iterdir()] == ["state"]
    for start in (state, kept, loaded):
        out, _ = mech.extend(q[:, :, 50:], k[:, :, 50:], v[:, :, 50:], start)
        same(out, whole[:, :, 50:])
    beams = torch.tensor([2, 0, 0])
    out, _ = mech.extend(*(x[beams][:, :, 50:] for x in (q, k, v)), state.reorder(beams))
    same(out, whole[beams][:, :, 50:])


def test_loading_refuses_what_is_no_state(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no file"):
        State.load(tmp_path / "absent")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        State.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no state of format 1"):
        State.load(tmp_path / "other")
    foreign = json.dumps({"format": 1, "state": {"class": "subprocess:Popen", "fields": {}}})
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign", metadata={"farfield": foreign})
    with pytest.raises(ValueError, match="no state of farfield"):
        State.load(tmp_path / "foreign")


@pytest.mark.parametrize("pool", ["mean", "conv", "softmax-whole"])
@pytest.mark.parametrize("rewind", [0, 5, 11])
def test_crop(pool, rewind):
    q, k, v = draw(120)
    mech = perturbed(pool, rewind=rewind, sinks=2)
    whole = mech(q, k, v)
    for prefill in (9, 50, 64, 65, 97):
        state = None
        for here in (slice(0, prefill), slice(prefill, prefill + 4)):
            _, state = mech.extend(q[:, :, here], k[:, :, here], v[:, :, here], state)
        for drop in range(min(rewind, 9) + 1):
            here = slice(prefill + 4 - drop, prefill + 4 - drop + 6)
            out, _ = mech.extend(q[:, :, here], k[:, :, here], v[:, :, here], state.crop(drop))
            same(out, whole[:, :, here])


def test_crop_refuses_what_is_gone():
    q, k, v = draw(64)
    _, state = FMA(**FAR).extend(q, k, v)
    state.crop(3)
    with pytest.raises(ValueError, match=r"cannot drop 4 of 64 tokens, at most 3.*rewind=4"):
        state.crop(4)
    with pytest.raises(ValueError, match="cannot drop 65 of 64"):
        state.crop(65)


def test_rotation_happens_after_pooling():
    q, k, v = draw(40)

    def rotary(x, position):
        angle = position.to(x.dtype)[..., None] * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    at = torch.arange(40)
    rows = ff.Rows(rotary(k, at), v)
    far = ff.summarize(ff.Rows(k, v), block=4, rank=2)
    # groups of 4, 8 and 16 tokens, two rows each; the last one is not complete and nobody reads it
    centre = torch.cat([torch.arange(0, until, w) + (w - 1) / 2 for until, w in ((40, 2), (40, 4), (48, 8))])
    counted = ff.Rows(rotary(far.k, centre), far.v, bias=far.bias)
    plan = ff.select.multipole(tokens=40, block=4, near=4, rank=2)
    expected = ff.attend(rotary(q, at), [(rows, plan.near), (counted, plan.far)]).out
    mech = FMA(**FAR)
    same(mech(q, k, v, rotary=rotary), expected)
    first, state = mech.extend(q[:, :, :23], k[:, :, :23], v[:, :, :23], rotary=rotary)
    rest, _ = mech.extend(q[:, :, 23:], k[:, :, 23:], v[:, :, 23:], state, rotary=rotary)
    same(torch.cat([first, rest], 2), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"near": 6}, ValueError, "near must be a positive multiple of block=4, got 6"),
        ({"rank": 3}, ValueError, "rank must divide block"),
        ({"sinks": 5}, ValueError, "sinks must lie in 0 .. block=4, got 5"),
        ({"pool": "max"}, ValueError, "pool must be one of mean, learned"),
        ({"pool": "conv"}, ValueError, "needs width and levels"),
        ({"queries": "some"}, ValueError, "queries must be 'kept' or 'pooled'"),
        ({"queries": "pooled"}, NotImplementedError, "leak the future"),
        ({"rewind": -1}, ValueError, "rewind must not be negative"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        FMA(**FAR | options)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"causal": False, "queries": "pooled"}], ids=str)
def test_convolutions_say_when_they_have_too_few_levels(options):
    q, k, v = draw(100)
    mech = FMA(**FAR, pool="conv", width=8, levels=2, **options).double()
    with pytest.raises(ValueError, match="more than the pool's 2 levels"):
        mech(q, k, v)
    mech(q[:, :, :32], k[:, :, :32], v[:, :, :32])


def test_memory_is_linear():
    def peak(tokens):
        q, k, v = (torch.randn(1, 1, tokens, 16, requires_grad=True) for _ in range(3))
        return measure(lambda: FMA(block=64, near=64, rank=4)(q, k, v).sum().backward()).peak

    # from 64 to 256 steps: what a step needs is the same
    assert peak(65_536) <= 4.2 * peak(16_384)
