"""The kernel of merge in the interpreter, against PyTorch."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import merge as kernels
from farfield.ops.merge import merge
from farfield.testing.units import assert_within
from farfield.types import Partial


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 37, 16), (1, 1, 5, 24)], ids=str)
def test_two_are_joined(shape, dtype):
    gen = torch.Generator().manual_seed(0)
    parts = [Partial(torch.randn(shape, generator=gen).to(dtype), torch.randn(shape[:3], generator=gen)) for _ in "ab"]
    # queries that have read nothing here, there, or anywhere
    for n, read in ((0, (0,)), (1, (1,)), (2, (0, 1))):
        for part in (parts[i] for i in read):
            part.out[:, :, n], part.lse[:, :, n] = 0.0, -torch.inf
    out, lse = kernels.merge(*(x for p in parts for x in (p.out, p.lse)))
    wide = merge(*(Partial(p.out.double(), p.lse.double()) for p in parts))
    assert_within(out, wide.out, terms=2)
    assert torch.equal(lse == -torch.inf, wide.lse == -torch.inf)
    finite = wide.lse > -torch.inf
    assert_within(lse[finite], wide.lse[finite], terms=2)
