"""What FMA as one operation keeps of a length, in the interpreter: its lists, and who reads whom."""

import os
from itertools import pairwise

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

import farfield as ff
from farfield.kernels import multipole
from farfield.ops.multipole import Field, tree_of
from farfield.select import static

FIELDS = (Field(64, 64, 4, 0), Field(64, 128, 16, 5), Field(128, 384, 32, 128), Field(64, 64, 1, 3))


def lists_of(field, blocks):
    """By the mechanism's own way to them."""
    mech = ff.FMA(block=field.block, near=field.near, rank=field.rank, sinks=field.sinks)
    levels, _ = mech._levels(blocks)
    done = blocks - 1 - field.near // field.block
    groups, starts = done, [-(-field.sinks // field.rank)]
    for _ in range(levels - 1):
        starts.append(starts[-1] + groups)
        groups //= 2
    rows = (starts[-1] + groups) * field.rank
    near, far = static.tree_lists(
        blocks, static.radii(field.near, field.block, levels), starts, True, sink_groups=starts[0], device="cpu"
    )
    return [*near, *far], rows


@pytest.mark.parametrize("field", FIELDS, ids=str)
@pytest.mark.parametrize("extra", [1, 2, 5, 34])
def test_kept_lists_are_the_mechanisms(field, extra):
    blocks = field.near // field.block + 1 + extra
    want, rows = lists_of(field, blocks)
    assert tree_of(blocks * field.block, field).rows == tree_of((blocks - 1) * field.block + 1, field).rows == rows
    lists, (near, far) = multipole._transposed(blocks, field, torch.device("cpu"))
    for got, right in zip(lists, want, strict=True):
        assert torch.equal(got, right)
    # near blocks are never cut into pieces; groups are, where many blocks may read one
    assert near.pieces == 0
    assert (far.pieces > 0) == (blocks > 32)
    groups, picks = rows // field.rank, lists[2].shape[3]
    readers = [[] for _ in range(groups)]
    near_readers = [[] for _ in range(blocks)]
    for n in range(blocks):
        for p in range(int(lists[3][0, 0, n])):
            # large groups have their gradients from a kernel that asks for query blocks
            readers[lists[2][0, 0, n, p]].append(n if field.rank == 32 else n * picks + p)
        for m in lists[0][0, 0, n, : lists[1][0, 0, n]]:
            near_readers[m].append(n)
    for found, expected in ((far, readers), (near, near_readers)):
        start = found.start.tolist()
        assert [found.reader[a:b].tolist() for a, b in pairwise(start)] == expected
