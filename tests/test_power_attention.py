"""PowerAttention: how far layers reach, how short the lists are, and when it is full attention."""

import pytest
import torch

from farfield import select
from farfield.mechanisms.power_attention import PowerAttention
from farfield.testing import oracles
from farfield.testing.units import assert_within


def draw(tokens, *, heads=4, kv_heads=2, width=8):
    gen = torch.Generator().manual_seed(0)
    shapes = [(1, h, tokens, width) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes]


def blocks_read(blocks, **options):
    return select.to_dense(select.powers(tokens=blocks, block=1, **options))[0, 0]


def composed(read, layers):
    """What so many layers carry from block to block, each a hop."""
    reached = torch.eye(len(read))
    for _ in range(layers):
        reached = (reached @ read.float() > 0).float()
    return reached.bool()


def test_layers_reach_the_distances_of_that_many_ones():
    blocks = 200
    read = blocks_read(blocks, window=1, sinks=0)
    apart = torch.arange(blocks)[:, None] - torch.arange(blocks)
    ones = torch.tensor([bin(d).count("1") for d in range(blocks)])[apart.clamp(min=0)]
    for layers in range(9):
        assert torch.equal(composed(read, layers), (apart >= 0) & (ones <= layers))


def test_blocks_that_the_last_one_reaches():
    """Of 1,024 blocks with powers alone, layer by layer; a window of five saves one layer of ten."""

    def reached(**options):
        read, last, found = blocks_read(1024, **options).float(), torch.eye(1024)[-1], []
        for _ in range(10):
            last = (last @ read > 0).float()
            found.append(int(last.sum()))
        return found

    assert reached(window=1, sinks=0) == [11, 56, 176, 386, 638, 848, 968, 1013, 1023, 1024]
    assert reached(window=5, sinks=0).index(1024) + 1 == 9


def test_a_sliding_window_of_as_many_blocks_reaches_less():
    window = select.to_dense(select.window(tokens=200, width=9, block=1))[0, 0]
    for layers in (1, 4):
        assert int(composed(window, layers)[-1].sum()) == 1 + layers * 8
    assert int(composed(blocks_read(200, window=1, sinks=0), 4)[-1].sum()) > 2 * (1 + 4 * 8)


def test_influence_through_layers_of_the_mechanism():
    """After L layers of uniform attention with residuals, block I feels block J iff popcount(I - J) <= L."""
    block, blocks = 2, 24
    mech = PowerAttention(block=block, window=1, sinks=0).double()
    x = torch.rand(1, 1, block * blocks, 1, dtype=torch.float64, requires_grad=True)
    y = x
    for layers in range(1, 5):
        y = y + mech(torch.zeros_like(y), torch.zeros_like(y), y)
        for i in (blocks - 1, 11):
            # its last token sees all of its own block
            (grad,) = torch.autograd.grad(y[0, 0, (i + 1) * block - 1, 0], x, retain_graph=True)
            felt = grad[0, 0, :, 0].view(blocks, block).abs().amax(1) > 0
            assert felt.tolist() == [j <= i and bin(i - j).count("1") <= layers for j in range(blocks)]


def test_lists_are_the_definition():
    for window, sinks in ((1, 0), (1, 3), (5, 1), (3, 0), (4, 2), (70, 1), (2, 70)):
        read = blocks_read(61, window=window, sinks=sinks)
        for i in range(61):
            want = {i - j for j in range(min(window, i + 1))} | set(range(min(sinks, i + 1)))
            want |= {i - 2**p for p in range(7) if 2**p <= i}
            assert set(read[i].nonzero().flatten().tolist()) == want


def test_degree():
    """2 + floor(log2 I) blocks of powers alone; the paper's 32k tokens read 10 blocks a row."""
    degree = select.powers(tokens=700, block=1, window=1, sinks=0).count[0, 0]
    assert degree[0] == 1
    assert degree[1:].tolist() == [2 + i.bit_length() - 1 for i in range(1, 700)]
    paper = PowerAttention()
    assert (paper.block, paper.window, paper.sinks) == (256, 5, 1)
    layout = paper.layouts(1 << 15)["powers"]
    # tiles of 128, two a block; of its own block the first tile of a block reads one
    assert (layout.q_block, layout.k_block) == (128, 128)
    assert layout.count[0, 0, -2:].tolist() == [19, 20]
    assert int(layout.count.max()) == layout.index.shape[-1] == 20


def test_nothing_is_read_twice():
    """Window, sinks and powers overlap: lists ascend without repeats."""
    for window, sinks in ((1, 0), (4, 9), (6, 3)):
        layout = select.powers(tokens=130, block=2, window=window, sinks=sinks)
        for n in range(65):
            listed = layout.index[0, 0, n, : layout.count[0, 0, n]].tolist()
            assert listed == sorted(set(listed))


@pytest.mark.parametrize(("tokens", "options"), [(12, {"window": 1, "sinks": 0}), (66, {"window": 17, "sinks": 0})])
def test_short_inputs_are_full_attention(tokens, options):
    q, k, v = draw(tokens)
    out = PowerAttention(block=4, **options)(q, k, v)
    assert_within(out, oracles.full(q, k, v, causal=True)[0], terms=tokens)


def test_state_keeps_everything():
    """Each block is at a power of two again: none can be dropped."""
    q, k, v = draw(90)
    mech = PowerAttention(block=4, window=2, sinks=1)
    _, state = mech.extend(q, k, v)
    assert state.nbytes == 2 * k.nbytes
    read = blocks_read(200, window=2, sinks=1)
    assert all(read[100:, j].any() for j in range(100))


def test_refuses_what_makes_no_pattern():
    with pytest.raises(ValueError, match="window=0"):
        PowerAttention(window=0)
    with pytest.raises(ValueError, match="sinks=-1"):
        PowerAttention(sinks=-1)
