"""Triton's launcher in C, called without the Python around it, which encodes tensor descriptors anew at every launch.

The launcher takes a grid, a stream, what is known of the kernel, and the kernel's arguments, in which a descriptor is
its encoding and its shape and strides. In which order, differs between Triton 3.6 and 3.7; of another version nothing
is assumed, and its kernels are launched by their `run`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import triton

KNOWN = ("3.6.", "3.7.")


class Entrance(NamedTuple):
    """launch(*grid, stream, *before, *arguments), with the arguments in one list where `packed`.

    Args:
        encode: (descriptor, what the kernel knows of it) -> the descriptor's encoding.
        known: of each descriptor, in the order of the arguments.
    """

    launch: Callable[..., None]
    before: tuple[Any, ...]
    packed: bool
    encode: Callable[[Any, Any], Any]
    known: list[Any]


def of(kernel: Any) -> Entrance | None:
    """The entrance of a kernel that has been launched, None where there is none that is known."""
    if not triton.__version__.startswith(KNOWN):
        return None
    from triton.backends.nvidia import driver

    run = kernel.run
    # memory that Triton would allocate at each launch
    if type(run) is not driver.CudaLauncher or run.global_scratch_size or run.profile_scratch_size:
        return None
    known = list(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    launch = run.launch
    if inspect.isfunction(launch):
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
    # two pieces of scratch memory and two hooks, none of each; the kernel's and the launch's metadata
    about, none = kernel.packed_metadata, None
    flags = kernel.function, run.launch_cooperative_grid, run.launch_pdl
    packed = not triton.__version__.startswith("3.6.")
    if packed:
        before = *flags, about, none, none, none, none, none, run.arg_annotations, run.kernel_signature
    else:
        before = *flags, none, none, about, none, none, none
    return Entrance(launch, before, packed, lambda made, meta: driver.make_tensordesc_arg(made, meta)[0], known)
