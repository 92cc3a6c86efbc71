"""The tree search's kernel in the interpreter against the same search in PyTorch."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.cpu.tree import search
from farfield.kernels import tree as kernel
from farfield.ops.tree import Search
from farfield.testing.inputs import normal

F32, F16 = torch.float32, torch.float16


@pytest.mark.parametrize(
    ("tokens", "held", "width", "dtype", "plan"),
    [
        (70, 70, 16, F32, Search(0, 2, 3, 1, 9, 24, 4, 9, 2, 0)),
        # the last queries only; counts of nodes and samples that are no powers of two
        (195, 30, 24, F16, Search(24, 3, 2, 1, 9, 8, 3, 3, 1, 1)),
        (150, 20, 16, F16, Search(37, 6, 1, 2, 5, 4, 1, 1, 1, 2)),
        (30, 1, 16, F32, Search(29, 1, 1, 2, 5, 1, 1, 1, 1, 0)),
        # several products a step
        (250, 40, 16, F16, Search(7, 32, 1, 0, 20, 32, 2, 2, 2, 0)),
    ],
    ids=str,
)
def test_search_writes_what_pytorch_writes(tokens, held, width, dtype, plan):
    q = normal(2, 2, width, held, seed=1, dtype=dtype).transpose(2, 3)
    k = normal(2, 1, tokens, width + 1, seed=2, dtype=dtype)[..., 1:]
    # whole numbers give many equal scores
    q[1], k[1] = q[1].round(), k[1].round()
    index, count = kernel.search(q, k, plan)
    exact, counted = search(q, k, plan)
    assert torch.equal(count, counted)
    assert torch.equal(index, exact)


def test_search_among_nan_and_infinite_keys():
    plan = Search(12, 4, 1, 1, 9, 8, 4, 3, 2, 0)
    q, k = (normal(1, 1, 100, 16, seed=n, dtype=F32) for n in (1, 2))
    for n, odd in enumerate((float("nan"), float("inf"), -0.0)):
        k[:, :, 20 + n : 70 : 4] = odd
    assert torch.equal(kernel.search(q, k, plan)[0], search(q, k, plan)[0])
