"""What makes a training step quick on a GPU: code compiled around the mechanisms, and the step as one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from farfield.nn import Decoder, Encoder

WARM = 3  # steps before a capture: kernels are compiled and optimizer states made in them


@contextmanager
def compiled(model: Decoder | Encoder, *, on: bool = True, backend: str = "inductor") -> Iterator[None]:
    """Within it the blocks are compiled, except their mechanisms: those have kernels of their own, and to trace them
    would take far longer than it could save."""
    if not on:
        yield
        return
    blocks: list[Any] = [*model.blocks]
    for block in blocks:
        block.attention.attended = torch.compiler.disable(block.attention.attended)
        # one block's code serves all of them
        block.compile(dynamic=False, backend=backend)
    try:
        yield
    finally:
        for block in blocks:
            del block.attention.attended
            block._compiled_call_impl = None


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected within: an older graph among it would be freed, which a capture does not survive."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Captured:
    """A step that is called a few times as it is written, then captured, and replayed from there on.

    Args:
        step: works on `inputs` in place, with nothing that waits for the device.
        inputs: what it reads of each call.
    """

    def __init__(self, step: Callable[[], Tensor], inputs: Sequence[Tensor]):
        self.step, self.inputs = step, inputs
        self.calls = 0
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the step returns with these inputs."""
        for mine, x in zip(self.inputs, inputs, strict=True):
            mine.copy_(x, non_blocking=True)
        self.calls += 1
        if self.calls <= WARM:
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                out = self.step()
            here.wait_stream(self.stream)
            return out
        if self.graph is None:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with _uncollected(), torch.cuda.graph(self.graph, stream=self.stream):
                self.out = self.step()
        self.graph.replay()
        assert self.out is not None
        return self.out.clone()
