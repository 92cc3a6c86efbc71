"""FMA's near field alone."""

import pytest
import torch

from farfield.mechanisms.fma import FMA
from farfield.mechanisms.near_field import NearField
from farfield.testing.units import assert_within


def test_it_is_fma_without_far_field():
    near = NearField(block=8, near=16, sinks=3)
    for tokens in (1, 8, 24, 25, 101):
        q, k, v = (torch.randn(2, heads, tokens, 16) for heads in (4, 2, 2))
        assert_within(near(q, k, v), near.reference(q.double(), k.double(), v.double()), terms=tokens)
    # FMA reads the same as long as nothing is far
    q, k, v = (torch.randn(1, 2, 24, 16) for _ in range(3))
    fma = FMA(block=8, near=16, rank=4, sinks=3)
    assert_within(near(q, k, v), fma.reference(q.double(), k.double(), v.double()), terms=24)
    i = torch.arange(101)
    seen = ((i[:, None] // 8 - i // 8 <= 2) | (i < 3)) & (i <= i[:, None])
    assert near.rows_read(101) == pytest.approx(float(seen.sum()) / 101)


@pytest.mark.parametrize(
    "sizes", [(101,), (1,) * 101, (3, 5, 30, 1, 62), (24, 77)], ids=["one", "ones", "mixed", "two"]
)
def test_it_goes_on_piece_by_piece(sizes):
    near = NearField(block=8, near=16, sinks=3)
    x = [torch.randn(2, heads, 101, 16, dtype=torch.float64) for heads in (4, 2, 2)]
    state, outs, at = None, [], 0
    for n in sizes:
        out, state = near.extend(*(y[:, :, at : at + n] for y in x), state)
        outs.append(out)
        at += n
    assert_within(torch.cat(outs, 2), near.reference(*x), terms=101)
    # the last block's 5 tokens, the 16 before it, the sinks; of k and of v
    assert state.nbytes == 2 * 2 * 2 * (5 + 16 + 3) * 16 * 8
    assert state.tokens == 101


def test_it_goes_back_to_where_its_block_began():
    near = NearField(block=8, near=8, sinks=2)
    x = [torch.randn(1, 2, 40, 4, dtype=torch.float64) for _ in range(3)]
    _, state = near.extend(*(y[:, :, :30] for y in x))
    out, _ = near.extend(*(y[:, :, 24:] for y in x), state.crop(6))
    assert_within(out, near.reference(*x)[:, :, 24:], terms=40)
    with pytest.raises(ValueError, match="cannot drop 7 of 30 tokens, at most 6"):
        state.crop(7)
    _, short = near.extend(*(y[:, :, :14] for y in x))
    assert short.crop(13).tokens == 1
