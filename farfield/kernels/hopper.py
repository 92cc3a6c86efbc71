"""What kernels whose warps have roles share on Hopper GPUs: rings in shared memory and the barriers around them.

A ring has so many places, and two barriers a place. Warps that copy wait until a place is empty and fill it; groups of
computing warps wait until it is full, read it and report that they have. Step x of a ring is about place x % places.
Whether a barrier has been passed as often as that step asks, its parity tells: nobody is a whole round ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

LOG2E = gl.constexpr(1.4426950408889634)
EVERY = gl.constexpr(1 << 30)  # the position of a query that is not there

# Triton 3.7 has renamed it
sync = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def barriers(PLACES: gl.constexpr, FILLERS: gl.constexpr, READERS: gl.constexpr):
    """Barriers of a ring: a place is full after so many arrivals, and empty after so many."""
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], bars)
    for s in gl.static_range(PLACES):
        mbarrier.init(full.index(s), count=FILLERS)
        mbarrier.init(empty.index(s), count=READERS)
    return full, empty


@gluon.jit
def wait_full(full, step):
    """The place of a step, once it is full."""
    PLACES: gl.constexpr = full.shape[0]
    s, phase = step % PLACES, step // PLACES & 1
    mbarrier.wait(full.index(s), phase)
    return s


@gluon.jit
def wait_empty(empty, step):
    """The place of a step, once it is empty, as in a new ring it is."""
    PLACES: gl.constexpr = empty.shape[0]
    s, phase = step % PLACES, step // PLACES & 1
    mbarrier.wait(empty.index(s), phase ^ 1)
    return s


@gluon.jit
def fetch(x, at, full, ring, s):
    """Ask for the box of `x` at these coordinates; place s is full once it has come."""
    mbarrier.expect(full.index(s), x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, at, full.index(s), ring.index(s))


@gluon.jit
def report(bars, s):
    """Say, once for this group of warps, that all of it is done with place s."""
    sync()
    mbarrier.arrive(bars.index(s), count=1)
