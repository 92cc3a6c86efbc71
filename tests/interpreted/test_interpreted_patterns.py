"""The kernels of select.sharded, powers and scored.recent in the interpreter, against the same lists in PyTorch."""

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import patterns
from farfield.select.scored import recent
from farfield.select.static import Shards, power_lists, shard_lists

CPU = torch.device("cpu")


@pytest.mark.parametrize("split", [1, 2])
def test_shards(split):
    # the second list needs more than one program; the last starts late and has dropped blocks
    for start, stop, first, heads, repeat, dense, stride, step, offset, local in (
        (0, 1, 0, 1, 1, 0, 8, 0, 0, 4),
        (0, 41, 0, 4, 2, 0, 7, 1, 3, 2),
        (0, 23, 0, 3, 1, 1, 6, 2, 5, 1),
        (37, 44, 14, 5, 1, 0, 5, 1, 0, 3),
    ):
        plan = Shards(heads, stride, local, step, offset, dense)
        want = shard_lists(start, stop, plan, split=split, repeat=repeat, first=first)
        got = patterns.shards(
            start, stop - start, want[0].shape[-1], first, heads, repeat, heads - dense, stride, step, offset, local,
            split, CPU,
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("split", [1, 2])
def test_powers(split):
    for (start, stop), window, sinks in itertools.product(((0, 1), (0, 200), (77, 90)), (1, 5, 6), (0, 3)):
        want = power_lists(start, stop, window=window, sinks=sinks, split=split)
        got = patterns.powers(start, stop - start, want[0].shape[-1], window, sinks, split, CPU)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("width", "block"), [(1, 64), (64, 64), (65, 64), (200, 64), (512, 128), (300, 128)])
def test_recent(width, block):
    for tokens, rows in ((1, 1), (64, 64), (700, 700), (5, 700), (130, 1000), (2000, 2000)):
        want = recent(tokens=tokens, rows=rows, width=width)
        assert want.k_block == block
        got = patterns.recent(tokens, rows, width, block, want.index.shape[-1], CPU)
        for a, b in zip(got, (want.index, want.count), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
