"""Peak memory of one call beyond what was alive before it: its outputs, gradients and temporaries.

On the GPU the allocator keeps the peak. On the CPU PyTorch keeps none, so the call runs under the profiler, which
reports every allocation and release of PyTorch's CPU allocator, those inside fused operators included; the running
sum's highest value is the peak: exact to the byte, repeatable, and untouched by other load. What an operator takes
elsewhere (oneDNN's packing buffers) does not show there, so the growth of the process' resident memory is read in
the same call as a witness. For SDPA and dense attention the two agree within a few per cent, or one MB. A call with
many temporaries of changing size keeps more resident than it holds, up to twice as much was seen, since the C
library's heap does not give freed pieces back at once; with MALLOC_MMAP_THRESHOLD_=65536 in the environment it does,
and the two agree there as well.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Usage:
    """Memory and time of one call.

    Args:
        peak: bytes allocated at the highest moment, beyond those alive before the call.
        rss: growth of the process at its highest moment, None where the system does not tell.
        seconds: duration of the call, under the profiler on the CPU.
    """

    peak: int
    rss: int | None
    seconds: float


def measure(call: Callable[[], object], device: torch.device | str = "cpu") -> Usage:
    """Run `call` once and watch its memory. Its result is dropped after the peak has been read."""
    device = torch.device(device)
    return _cuda(call, device) if device.type == "cuda" else _cpu(call)


def _cuda(call: Callable[[], object], device: torch.device) -> Usage:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_allocated(device), time.perf_counter()
    result = call()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return Usage(peak, None, seconds)


def _cpu(call: Callable[[], object]) -> Usage:
    # the profiler's library writes two lines a session otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        before = _reset_rss()
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        highest = _status("VmHWM")
        del result
    # nothing public lists the allocations in order
    events: Any = watch.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    sizes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda x: x[0])
    held = peak = 0
    for _, size in sizes:
        held += size
        peak = max(peak, held)
    return Usage(peak, None if before is None or highest is None else max(0, highest - before), seconds)


def _reset_rss() -> int | None:
    """Resident bytes now, with the high-water mark put back to them; None where that is not possible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free pages that the heap still holds would hide growth
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
