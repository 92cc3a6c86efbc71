"""The kernels of hashing, sorting and moving rows in the interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import hashed as kernels
from farfield.ops import hashed as ops
from farfield.testing.inputs import normal


@pytest.mark.parametrize(
    ("shared", "strict", "many", "keys", "queries", "block"),
    [
        (True, True, 4, 75, 75, 16),
        (True, True, 6, 5, 5, 16),
        (False, True, 4, 75, 30, 16),
        (False, False, 1, 61, 61, 8),
        (False, False, 3, 40, 1, 12),
        (True, True, 8, 300, 300, 4),
        (False, True, 8, 200, 200, 4),
    ],
)
def test_slots(shared, strict, many, keys, queries, block, monkeypatch):
    """Several tiles of tokens, a head of one bucket, dropped tokens, strides, more keys than queries."""
    monkeypatch.setattr(kernels, "TILE", 16)
    made = torch.Generator().manual_seed(keys)
    k_bucket = torch.randint(0 if shared else -1, many, (3, 4, keys), generator=made, dtype=torch.int32)[:, 1:3]
    k_bucket[1] = many - 1
    q_bucket = torch.randint(-1, many + 1, (3, 2, queries), generator=made, dtype=torch.int32)
    q_bucket = q_bucket[:, :, :0] if shared else q_bucket
    shapes = ops._shapes(q_bucket, k_bucket, many, block, shared)
    got = ops.Slots(*kernels.slots(q_bucket, k_bucket, many, block, strict, shared, shapes))
    want = ops.Slots(*ops._slots(q_bucket, k_bucket, many, block, strict, shared))
    for name in ("q_slot", "q_token", "k_slot", "k_token", "position", "count"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    used = torch.arange(want.index.shape[-1]) < want.count[..., None]
    assert torch.equal(got.index[used], want.index[used])

    first, many = kernels.readers(got.index, got.count)
    for b, h, m in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(first.shape[2])):
        names = (used[b, h] & (want.index[b, h] == m)).any(-1)
        begin = int(first[b, h, m])
        assert [*range(begin, begin + int(many[b, h, m]))] == names.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("many", "width"), [(4, 16), (40, 24)])
def test_buckets(dtype, many, width):
    x = normal(2, 37, 3, width).to(dtype).transpose(1, 2)
    got = kernels.buckets(x, kernels.directions(ops.planes(3, 3, width, many), dtype), many // 2)
    assert torch.equal(got, ops._buckets(x.double(), many, 3))
    ties = torch.zeros_like(x)
    assert not kernels.buckets(ties, kernels.directions(ops.planes(3, 3, width, many), dtype), many // 2).any()


def test_three_parts_hold_a_float32():
    wide = ops.planes(0, 4, 64, 16)
    for dtype in (torch.float16, torch.bfloat16):
        parts = kernels.directions(wide, dtype).double().sum(0)[..., :8]
        assert (parts - wide).abs().max() < 2**-23


@pytest.mark.parametrize("width", [1, 16, 20])
def test_take(width):
    x = normal(3, 2, 50, width + 3).float()[1:, :, :, 2 : width + 2]
    index = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(i))[:33] for i in range(4)])
    index = index.where(index < 50, -1).to(torch.int32).view(2, 2, 33)
    assert torch.equal(kernels.take(x, index), ops._take(x, index))


@pytest.mark.parametrize("several", [False, True])
def test_rows_without_a_slot_are_cleared(several):
    slot = torch.randint(-1, 2, (2, 3, 300), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x, y = (normal(2, 3, 300, 16, seed=i).float() for i in range(2))
    want = [t.where((slot >= 0)[..., None], 0.0) for t in (x, y)]
    queue = torch.full((2,), 7, dtype=torch.int32)
    kernels._clear(slot, queue, *((x, y) if several else (x,)))
    assert torch.equal(x, want[0])
    assert torch.equal(y, want[1]) == several
    assert queue.tolist() == [0, 0]
