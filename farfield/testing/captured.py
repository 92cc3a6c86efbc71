"""A computation as a CUDA graph, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def replayed(step: Callable[[], Sequence[Tensor]]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """What `step` returns when it is called, and what its CUDA graph writes over zeros when it is replayed."""
    # detached: a graph of gradients that is kept would tie the inputs to this stream
    want = [t.detach() for t in step()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for t in got:
        t.detach().zero_()
    graph.replay()
    # before the graph goes out of scope
    torch.cuda.synchronize()
    return want, got
