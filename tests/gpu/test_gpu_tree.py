"""The tree search on a GPU against the same search in PyTorch."""

import pytest
import torch

from farfield.cpu.tree import search
from farfield.kernels import tree as kernel
from farfield.mechanisms.hip import Hip
from farfield.ops.tree import Search

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("width", "tokens", "held", "plan"),
    [
        (64, 20000, 20000, Search(0, 4, 4, 1, 256, 128, 128, 8, 64, 0)),
        (128, 9001, 9001, Search(0, 8, 1, 1, 256, 64, 64, 4, 16, 1)),
        (80, 5003, 300, Search(75, 6, 1, 0, 100, 64, 32, 1, 8, 2)),
        (64, 4097, 1, Search(4096, 64, 1, 4, 5, 1, 1, 1, 1, 0)),
    ],
    ids=str,
)
def test_search_writes_what_pytorch_writes(width, tokens, held, plan, dtype):
    gen = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 4, held, width, generator=gen, device="cuda")
    k = torch.randn(2, 2, tokens, width, generator=gen, device="cuda")
    # whole numbers are added up without error, and give many equal scores
    q, k = (2 * q).round().to(dtype), (2 * k).round().to(dtype)
    index, count = kernel.search(q, k, plan)
    exact, counted = search(q, k, plan)
    assert torch.equal(count, counted)
    assert torch.equal(index, exact)


def test_search_repeats_and_is_captured():
    q, k, v = (torch.randn(1, h, 4096, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    mech = Hip()
    want = mech(q, k, v)
    for _ in range(20):
        assert torch.equal(mech(q, k, v), want)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mech(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mech(q, k, v)
    graph.replay()
    assert torch.equal(got, want)
