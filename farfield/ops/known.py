"""What is known of calls by their signatures: that they pass the checks, and what kernels keep for further ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class Known:
    """What is known of the calls of one signature.

    Args:
        calls: how many the kernels have taken before they kept anything.
        run: what kernels keep.
    """

    __slots__ = ("calls", "run")

    def __init__(self):
        self.calls = 0
        self.run: Callable[..., Any] | None = None


class Memory:
    """What is known of so many signatures; the oldest goes first."""

    def __init__(self, most: int):
        self.most = most
        self.known: dict[Hashable, Known] = {}
        self.lock = threading.Lock()

    def find(self, key: Hashable) -> Known | None:
        return self.known.get(key)

    def of(self, key: Hashable) -> Known:
        """What is known of a signature, of which there was nothing to know before if it is new."""
        found = self.known.get(key)
        if found is None:
            with self.lock:
                found = self.known.get(key)
                if found is None:
                    while len(self.known) >= self.most:
                        del self.known[next(iter(self.known))]
                    found = self.known[key] = Known()
        return found

    def forget(self) -> None:
        with self.lock:
            self.known.clear()


def form(x: Tensor | None) -> tuple[Any, ...] | None:
    """What launches follow from, beside numbers and addresses."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)
