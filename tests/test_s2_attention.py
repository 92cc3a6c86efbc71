"""S2-Attention: what the heads cover together, what each may forget, and what its state holds for it."""

import pytest
import torch

from farfield import select
from farfield.mechanisms.s2_attention import S2Attention
from farfield.ops.attend import attend
from farfield.ops.merge import merge
from farfield.select.static import pack_lists
from farfield.testing import compiled, oracles
from farfield.testing.units import assert_within
from farfield.types import Layout, Rows


def draw(tokens, *, heads=4, kv_heads=4, width=8, dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    shapes = [(2, h, tokens, width) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]


def blocks_read(blocks, **options):
    """Which row blocks each head's query blocks list, [H, N, N]."""
    layout = select.sharded(tokens=blocks, block=1, **options)
    return select.to_dense(layout)[0]


@pytest.mark.parametrize(
    "options",
    [{"stride": 1, "local": 1}, {"stride": 7, "local": 9}, {"stride": 7, "local": 1, "dense_heads": 2}],
    ids=["stride 1", "all local", "all dense"],
)
def test_equals_full_attention(options):
    q, k, v = draw(66, heads=6, kv_heads=2)
    exact = oracles.full(q, k, v, causal=True)[0]
    assert_within(S2Attention(block=8, **options)(q, k, v), exact, terms=66)


@pytest.mark.parametrize("offset", [0, 3, -5])
@pytest.mark.parametrize("heads", [8, 16])
def test_heads_cover_every_far_block_equally_often(heads, offset):
    local, stride, blocks = 3, 8, 40
    times = blocks_read(blocks, heads=heads, stride=stride, local=local, offset=offset).sum(0)
    apart = torch.arange(blocks)[:, None] - torch.arange(blocks)
    assert (times[(apart >= 0) & (apart < local)] == heads).all()
    assert (times[apart >= local] == heads // stride).all()
    assert (times[apart < 0] == 0).all()


@pytest.mark.parametrize(("heads", "stride"), [(2, 7), (3, 6), (8, 8), (5, 2)])
def test_lists_are_the_definition(heads, stride):
    """Fewer heads than residues spread over them; query heads of one key head share; tiles of blocks are trimmed."""
    for local, offset, dense, repeat in ((1, 0, 0, 1), (3, 2, 1, 2)):
        got = blocks_read(29, heads=heads, stride=stride, local=local, offset=offset, dense=dense, repeat=repeat)
        for h in range(heads * repeat):
            g = h // repeat
            for i in range(29):
                far = {j for j in range(i + 1) if (j + g * max(1, stride // heads) + offset) % stride == 0}
                want = far | set(range(max(0, i - local + 1), i + 1))
                want = set(range(i + 1)) if g >= heads - dense else want
                assert set(got[h, i].nonzero().flatten().tolist()) == want


def test_blocks_are_listed_as_tiles():
    """Blocks of 256 tokens as pairs of tiles of 128: the same pairs, and nothing listed that causality hides whole."""
    tokens, options = 1700, {"heads": 3, "stride": 3, "local": 2}
    layout = select.sharded(tokens=tokens, block=256, **options)
    assert (layout.q_block, layout.k_block) == (128, 128)
    want = blocks_read(7, **options).repeat_interleave(256, 1).repeat_interleave(256, 2)[:, :tokens, :tokens].tril()
    assert torch.equal(select.to_dense(layout)[0], want)
    last = layout.index.gather(-1, layout.count[..., None].long() - 1)[..., 0]
    assert torch.equal(last, torch.arange(14).expand_as(last).int())
    assert int(layout.count.max()) == layout.index.shape[-1]


def test_lists_are_ragged():
    """Heads list different numbers of blocks; none is as long as a dense head's."""
    count = select.sharded(tokens=40, heads=8, stride=8, local=2, block=1, dense=1).count[0]
    assert count[:7, -1].unique().tolist() == [6, 7]
    assert count[7, -1] == 40


@pytest.mark.parametrize("options", [{}, {"offset": 5}, {"dense": 2}, {"step": 0}])
def test_what_is_not_read_is_never_read_again(options):
    read = blocks_read(50, heads=6, stride=8, local=4, **options)
    for h in range(6):
        for j in range(50):
            later = read[h, j + 4 :, j]
            assert later.all() or not later.any()


@pytest.mark.parametrize("pieces", [(150,), (61, 61, 28), (1,) * 150])
@pytest.mark.parametrize(("heads", "dense_heads"), [(2, 0), (4, 1), (16, 0)])
def test_state_holds_what_is_read_and_no_more(pieces, heads, dense_heads):
    block, local, stride, width, value_width = 4, 3, 8, 8, 5
    mech = S2Attention(block=block, local=local, stride=stride, dense_heads=dense_heads)
    q, k, v = draw(150, heads=2 * heads, kv_heads=heads, dtype=torch.float32)
    state = None
    for x, y, z in zip(*(t.split(pieces, 2) for t in (q, k, v[..., :value_width])), strict=True):
        _, state = mech.extend(x, y, z, state)
        # what some later query reads, by the rule
        own = state.tokens // block
        tokens = 0
        for g in range(heads):
            for j in range(state.tokens):
                remote = (j // block + g * max(1, stride // heads)) % stride == 0 or g >= heads - dense_heads
                tokens += own - j // block < local or remote
        assert state.nbytes == 2 * tokens * (width + value_width) * 4
    assert tokens < 0.6 * heads * 150


def test_state_is_about_a_stride_th():
    """local blocks and one in `stride` of the others, to a block a head."""
    mech = S2Attention(block=4, local=3, stride=8)
    q, k, v = draw(4 * 80, heads=8, kv_heads=8, dtype=torch.float32)
    _, state = mech.extend(q, k, v)
    blocks = state.nbytes / (2 * (8 + 8) * 4) / 4 / 8
    # the query to come stands in a block of its own: two of the three close by are there
    assert abs(blocks - (2 + 78 / 8)) < 1e-9


def test_parts_at_a_block_boundary_merge():
    q, k, v = draw(64)
    rows = Rows(k, v)
    layout = select.sharded(tokens=64, heads=4, stride=4, local=2, block=8)
    whole = attend(q, rows, layout)
    parts = []
    for side in (layout.index < 3, layout.index >= 3):
        lists = pack_lists(layout.index, layout.used() & side)
        parts.append(attend(q, rows, Layout(*lists, 8, 8, 64, 64, causal=True)))
    joined = merge(*parts)
    assert parts[1].out[:, :, :24].abs().max() == 0
    assert_within(joined.out, whole.out, terms=64)
    assert_within(joined.lse, whole.lse, terms=64)


def test_a_shift_moves_the_pattern_to_the_next_head():
    """With offset = step every head reads what its successor read: permuted heads permute the outputs, no more."""
    q, k, v = draw(70)
    options = {"stride": 8, "local": 2, "block": 4}
    moved = S2Attention(offset=2, **options)(*(x.roll(-1, 1) for x in (q, k, v)))
    assert_within(moved, S2Attention(**options)(q, k, v).roll(-1, 1), terms=70)
    other = S2Attention(**options)(*(x.roll(-1, 1) for x in (q, k, v)))
    assert not torch.allclose(moved, other)


def test_homogeneous_heads_read_the_same():
    q, k, v = draw(70)
    q, k, v = (x[:, :1].expand(-1, 4, -1, -1) for x in (q, k, v))
    options = {"stride": 4, "local": 2, "block": 4}
    for homogeneous in (True, False):
        out = S2Attention(homogeneous=homogeneous, **options)(q, k, v)
        assert torch.equal(out, out[:, :1].expand_as(out)) == homogeneous


def test_refusals():
    with pytest.raises(ValueError, match="dense_heads=3 of only 2"):
        S2Attention(dense_heads=3)(*draw(20, kv_heads=2))
    with pytest.raises(ValueError, match="stride=0"):
        S2Attention(stride=0)
    with pytest.raises(NotImplementedError, match="noncausal"):
        S2Attention(causal=False, homogeneous=True)


@pytest.mark.parametrize("block", [64, 128, 256])
def test_blocks_suit_the_fast_kernels(block):
    """16-bit numbers of the usual widths run in the kernels for whole blocks, forward and backward."""
    pytest.importorskip("triton")
    from farfield.kernels import attend_backward_hopper, attend_hopper
    from farfield.ops.attend import Call, Plan

    layout = select.sharded(tokens=1000, heads=4, stride=8, local=4, block=block, repeat=2, device="meta")
    q, k = (torch.empty(1, h, 1000, 128, dtype=torch.bfloat16, device="meta") for h in (8, 4))
    none = torch.empty(0, device="meta")
    plan = Plan(layout.q_block, layout.k_block, 1, -1, 0)
    call = Call(q, [k], [k], [none], [none], [none], none, none, [layout.index], [layout.count], [plan], 0.1)
    attend_hopper.on_hopper.cache_clear()
    with compiled.recording():
        assert attend_hopper.wants(call)
        assert attend_backward_hopper.wants_rows(q, q, k, k, layout.k_block, layout.q_block, 2)
    attend_hopper.on_hopper.cache_clear()
