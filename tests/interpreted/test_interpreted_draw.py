"""The kernel that draws a token in the interpreter, against a sort and its cumulated shares."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import draw as kernels
from farfield.train.generate import drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 37, 256, 300])
def test_draws_what_a_sort_draws(tokens, dtype):
    gen = torch.Generator().manual_seed(tokens)
    logits = 3 * torch.randn(12, tokens, generator=gen)
    # many equal ones, and some that cannot be drawn
    logits[::2] = (2 * logits[::2]).round() / 2
    logits[3, ::3] = logits[4, 1:] = -torch.inf
    logits = logits.to(dtype)
    number = torch.rand(12, dtype=torch.float64, generator=gen)
    number[:3] = torch.tensor([0.0, 1.0 - 2.0**-53, 0.5])
    for temperature, top_k, top_p in (
        (1.0, None, None), (0.7, 5, None), (1.3, None, 0.9), (0.8, 50, 0.6), (1.0, 1, 1.0), (0.1, None, 0.3),
    ):  # fmt: skip
        least = tokens if top_k is None else min(top_k, tokens)
        most = 2.0 if top_p is None else top_p
        for numbers in (number, number[5:6]):
            found = kernels.drawn(logits, numbers, temperature, least, most)
            assert torch.equal(found, drawn(logits, numbers, temperature, top_k, top_p))
