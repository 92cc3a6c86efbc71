"""What a decoding step does between its products, in the interpreter, against PyTorch."""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import token_step as kernels
from farfield.nn import Attention
from farfield.ops import append_token, token_step
from farfield.ring import turns_of
from farfield.testing.units import assert_within


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 4])
@pytest.mark.parametrize("added", [True, False])
def test_a_token_is_added_normed_and_convolved(added, size, dtype):
    """The stream in float32, as under autocast."""
    x, gain = torch.randn(3, 1, 300), torch.rand(300) + 0.5
    more = torch.randn(3, 1, 300).to(dtype) if added else None
    recent, taps = (torch.randn(3, size - 1, 300), torch.randn(size, 300)) if size else (None, None)
    wide = [None if y is None else y.double() for y in (x, more, gain, recent, taps)]
    stream, exact = token_step.normed(*wide[:3], 1e-6, torch.float64, *wide[3:])
    got_stream, got = kernels.launch_norm(x, more, gain, 1e-6, recent, taps, dtype)
    assert got.dtype == dtype
    assert_within(got_stream, stream, terms=2)
    # of numbers that were rounded where PyTorch's were not
    assert_within(got, exact, terms=300 + size)
    if recent is not None:
        assert_within(recent, wide[3], terms=300)


def test_squares():
    x = torch.randn(2, 1, 300)
    assert torch.equal(kernels.launch_square(x), token_step.squared(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("norm", "grown", "share"), [(True, 0, 0.5), (True, 50, 1.0), (False, 50, 0.0), (False, 0, 0.4)]
)
def test_heads_are_placed(norm, grown, share, dtype):
    layer = Attention(120, 6, kv_heads=2, mechanism="full", qk_norm=norm, log_scale=grown, rope_share=share)
    if layer.gain is not None:
        torch.nn.init.uniform_(layer.gain, 0.5, 2)
    position = torch.tensor([[3], [49], [100_000]])
    q, k, v = (y.to(dtype) for y in layer._heads(torch.randn(3, 1, 120)))
    turns = turns_of(layer.rope, 20, "cpu")
    got = kernels.launch_place(q, k, layer.gain, position, turns, grown, 1 / math.log(grown) if grown else 0.0)
    exact = layer.double()._placed(q.double(), k.double(), v.double(), position, grown > 0)
    for mine, wanted in zip(got, exact[:2], strict=True):
        # rounded after each step, as the layer does
        assert_within(mine, wanted, terms=20, units=6)


@pytest.mark.parametrize(
    ("block", "span", "sinks", "capacity"),
    [(1, 7, 0, 1 << 60), (1, 7, 3, 1 << 60), (8, 24, 3, 1 << 60), (1, 70, 0, 50)],
)
def test_a_token_goes_to_its_row(block, span, sinks, capacity):
    rows = span + sinks

    def buffers():
        return [
            torch.zeros(2, 3, rows, 20), torch.zeros(2, 3, rows, 12), torch.full((2, 1, rows), append_token.HIDDEN),
            torch.zeros(2, 1, 1, dtype=torch.int32), torch.zeros(2, 1, 1, dtype=torch.long), torch.tensor([0, 5]),
        ]  # fmt: skip

    mine, wanted = buffers(), buffers()
    for _ in range(60):
        k, v = torch.randn(2, 1, 3, 20).transpose(1, 2), torch.randn(2, 3, 1, 12)
        append_token._append(k, v, *wanted, [block, sinks, capacity, 4])
        kernels.launch_append(k, v, *mine, block, sinks, capacity, 4)
        assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(mine, wanted, strict=True))
    assert mine[0].isnan().any() == (capacity == 50)
