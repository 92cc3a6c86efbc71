"""Seeded inputs that bfloat16 holds exactly, so that every dtype and device sees the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from farfield.mechanism import Case

_DEVICE = ContextVar("device", default="cpu")


def device() -> torch.device:
    """Where inputs are put; the CPU outside of `on`."""
    return torch.device(_DEVICE.get())


@contextmanager
def on(where: torch.device | str) -> Iterator[None]:
    """Inputs drawn inside are put on this device. PyTorch's own default device stays as it is.

    Code under test that forgets to name a device must fail on the GPU.
    """
    before = _DEVICE.set(str(where))
    try:
        yield
    finally:
        _DEVICE.reset(before)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, each exactly representable in bfloat16 (and so in every wider dtype)."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, device="cpu").bfloat16().to(device(), dtype)


def draw(
    case: Case, dtype: torch.dtype = torch.float64, *, batch: int = 2, tokens: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the case's shapes, as leaves that require gradients."""
    T = case.tokens if tokens is None else tokens
    q = normal(batch, case.heads, T, case.width, seed=3 * seed, dtype=dtype)
    k = normal(batch, case.kv_heads, T, case.width, seed=3 * seed + 1, dtype=dtype)
    v = normal(batch, case.kv_heads, T, case.value_width, seed=3 * seed + 2, dtype=dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
