"""Kernels compiled for a GPU that is not there: which ones a launch would run, and what each of them takes.

    with compiled.recording() as launches:
        attend_forward(call_with_meta_tensors)
    for launch in launches:
        assert launch.spills == 0 and launch.shared <= compiled.SHARED

Inside, a launch compiles its kernel exactly as it would for its arguments and runs nothing. Tensors on the device
"meta" take no memory, so any length will do, and whatever asks for a value on the host raises.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

SHARED = 227 * 1024  # bytes of shared memory that one program can have on sm_90
GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
PROCESSORS = 132  # of an H200


@dataclass(frozen=True)
class Launch:
    """One launch, and the kernel it needs.

    Args:
        name: of the kernel.
        grid: number of programs.
        options: warps, stages and constants, for messages.
        kernel: Triton's compiled kernel; launches that share one have the same `hash`.
    """

    name: str
    grid: tuple[int, ...]
    options: Mapping[str, Any]
    kernel: Any = field(repr=False)

    @property
    def hash(self) -> str:
        return self.kernel.hash

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a program."""
        return self.kernel.metadata.shared

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._usage["REG"]

    @property
    def spills(self) -> int:
        """Bytes of local memory of a thread: spilled registers, and arrays indexed at run time."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    def count(self, instruction: str) -> int:
        """How often an instruction, such as HGMMA, stands in the machine code."""
        return len(re.findall(rf"\b{instruction}\b", _tool("nvdisasm", self.kernel.asm["cubin"], "-c")))

    @cached_property
    def _usage(self) -> dict[str, int]:
        told = _tool("cuobjdump", self.kernel.asm["cubin"], "--dump-resource-usage")
        return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}


@contextmanager
def recording(capability: int = 90, processors: int = PROCESSORS) -> Iterator[list[Launch]]:
    """Compile the kernels of all launches inside, run none, and list them.

    Raises:
        ValueError: a grid is larger than a GPU takes.
        RuntimeError: the process interprets kernels (TRITON_INTERPRET=1).
    """
    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if knobs.runtime.interpret:
        raise RuntimeError("compiled: kernels are interpreted in this process; unset TRITON_INTERPRET")
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        grid = tuple(grid) if not callable(grid) else ()
        for size, most in zip(grid, GRID, strict=False):
            if not 0 < size <= most:
                raise ValueError(f"{kernel.__name__}: a grid of {grid}; sizes lie in 1 .. {', '.join(map(str, GRID))}")
        launches.append(Launch(kernel.__name__, grid, options, made))
        return made

    # kernels are cached by device: the name keeps them apart from those of a GPU that is there
    target = GPUTarget("cuda", capability, 32)
    absent = SimpleNamespace(
        get_current_device=lambda: f"sm_{capability}",
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    about = SimpleNamespace(multi_processor_count=processors, major=capability // 10, minor=capability % 10)
    # without a GPU there may be no driver to go back to
    before = driver._active
    driver.set_active(absent)  # pyright: ignore[reportArgumentType]
    try:
        with (
            mock.patch.object(JITFunction, "run", record),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=about),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(about.major, about.minor)),
        ):
            yield launches
    finally:
        driver._active = before


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the tools that come with Triton says of a cubin."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout
