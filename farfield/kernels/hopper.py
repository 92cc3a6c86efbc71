"""What kernels for Hopper GPUs share: rings in shared memory, a step of the running softmax, and what launches ask.

A ring has so many places, and two barriers a place. Warps that copy wait until a place is empty and fill it; groups of
computing warps wait until it is full, read it and report that they have. Step x of a ring is about place x % places.
Whether a barrier has been passed as often as that step asks, its parity tells: nobody is a whole round ahead.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LAZY = gl.constexpr(8.0)  # by how much, in units of log 2, the peak of a running softmax may lag behind
EVERY = gl.constexpr(1 << 30)  # the position of a query that is not there
ALIGNED = 8  # elements of 16 bits in the 16 bytes that tensor memory accelerators and vector copies ask for
LEAST = 8  # tokens of a head in a tile of several heads; rows of shared memory lie in groups of eight
UNIT = gl.constexpr(ALIGNED)  # of the strides that kernels are told, so that rows are known to be aligned

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
    s = step % PLACES
    mbarrier.wait(full.index(s), step // PLACES & 1)
    return s


@gluon.jit
def wait_empty(empty, step):
    """The place of a step, once it is empty, as in a new ring it is."""
    PLACES: gl.constexpr = empty.shape[0]
    s = step % PLACES
    mbarrier.wait(empty.index(s), step // PLACES & 1 ^ 1)
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


@gluon.jit
def token_of(SIZE: gl.constexpr, TOKENS: gl.constexpr, layout: gl.constexpr):
    """Which token of its head each row of a tile is: SIZE rows, TOKENS of a head and then those of the next one."""
    row = gl.arange(0, SIZE, layout)
    if TOKENS < SIZE:
        row = row % TOKENS
    return row


@gluon.jit
def heads_on(at, stride, SIZE: gl.constexpr, TOKENS: gl.constexpr, layout: gl.constexpr):
    """Pointers or offsets for the rows of such a tile: `at`, and `stride` more for each head behind the first."""
    if TOKENS < SIZE:
        at = at + (gl.arange(0, SIZE, layout) // TOKENS).to(gl.int64) * stride
    return at


@gluon.jit
def soften(scores, peak, mass):
    """One step of the running softmax, in units of log 2: weights, peak, mass, and what the sums so far fade by."""
    higher = gl.maximum(peak, gl.max(scores, 1))
    # a query that has read nothing keeps peak = -inf, and -inf - -inf is nan
    base = gl.where(higher == float("-inf"), 0.0, higher)
    weights = gl.exp2(scores - base[:, None])
    fade = gl.exp2(peak - base)
    return weights, higher, mass * fade + gl.sum(weights, 1), fade


@gluon.jit
def soften_scaled(scores, peak, mass, factor):
    """The same from raw products: the factor, which is positive, goes into the exponent's multiply-add."""
    higher = gl.maximum(peak, gl.max(scores, 1) * factor)
    base = gl.where(higher == float("-inf"), 0.0, higher)
    weights = gl.exp2(scores * factor - base[:, None])
    fade = gl.exp2(peak - base)
    return weights, higher, mass * fade + gl.sum(weights, 1), fade


@gluon.jit
def by_lane(x):
    """A tile of scores [M, N] summed up as far as a thread has it: [M, 4], a sum for each of a row's four threads."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return gl.sum(gl.sum(x.reshape([M, N // 8, 4, 2]), 3), 1)


@gluon.jit
def soften_lazily(scores, peak, mass, factor):
    """`soften_scaled` with fewer instructions: `mass` is kept as `by_lane` has it, and the peak may lag behind.

    Up to 2^LAZY a weight does no harm: only if a row's highest logit goes beyond that does the peak move, and `fade`
    differ from 1.
    """
    higher = gl.maximum(peak, gl.max(scores, 1) * factor)
    # -inf - -inf is nan, of which every comparison fails: the peak of a query that has read nothing stays
    higher = gl.where(higher - peak > LAZY, higher, peak)
    base = gl.where(higher == float("-inf"), 0.0, higher)
    weights = gl.exp2(scores * factor - base[:, None])
    fade = gl.exp2(peak - base)
    lanes: gl.constexpr = mass.type.layout
    found = gl.convert_layout(by_lane(weights), lanes)
    return weights, higher, mass * gl.convert_layout(fade, gl.SliceLayout(1, lanes))[:, None] + found, fade


def _fading(n: int) -> str:
    """PTX: n numbers of two rows, in pairs, times what these rows fade by, unless that is 1 for all of the warp."""
    first, second = f"${2 * n}", f"${2 * n + 2}"
    lines = [
        ".reg .pred p;",
        f"setp.neu.f32 p, {first}, 0f3F800000;",
        f"setp.neu.or.f32 p, {second}, 0f3F800000, p;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra.uni SAME;",
        *(f"mul.f32 ${i}, ${i}, {second if i & 2 else first};" for i in range(n)),
    ]
    return f"{{ {' '.join(lines)} SAME: }}"


def _in_place(n: int) -> str:
    """The registers of `_fading`: what comes out is where it was, beside n factors."""
    return ",".join(["=r"] * n + [str(i) for i in range(n)] + ["r"] * n)


# of a warp's 16 rows a thread has two, and so half as many numbers as there are columns
FADE_64, REGISTERS_64 = gl.constexpr(_fading(32)), gl.constexpr(_in_place(32))
FADE_128, REGISTERS_128 = gl.constexpr(_fading(64)), gl.constexpr(_in_place(64))


@gluon.jit
def faded(acc, fade):
    """Sums [64, 64 or 128] times what their rows fade by [64], without a product where nothing does.

    It is a branch, which the assembler moves nothing across: `words` made before it are among the exponentials.
    """
    D: gl.constexpr = acc.shape[1]
    factor = gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout))[:, None]
    _, factor = gl.broadcast(acc, factor)
    if D == 64:
        acc = gl.inline_asm_elementwise(FADE_64, REGISTERS_64, [acc, factor], gl.float32, True, 32)
    else:
        acc = gl.inline_asm_elementwise(FADE_128, REGISTERS_128, [acc, factor], gl.float32, True, 64)
    return acc


@gluon.jit
def words(weights, dtype: gl.constexpr):
    """Weights [M, N] as numbers of 16 bits, two to a word: [M, N / 2].

    What a loop carries as numbers of 16 bits is taken apart and put together again in every turn.
    """
    M: gl.constexpr = weights.shape[0]
    N: gl.constexpr = weights.shape[1]
    asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    low, high = gl.split(weights.reshape([M, N // 2, 2]))
    return gl.inline_asm_elementwise(asm, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def from_words(x, dtype: gl.constexpr, layout: gl.constexpr):
    """The numbers of `words`, [M, N], as a product's left operand."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = 2 * x.shape[1]
    low, high = x.to(gl.int16).to(dtype, bitcast=True), (x >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([M, N]), layout)


def in_tiles(tokens: int, heads: int, size: int = 64) -> bool:
    """Whether so many tokens of so many heads are tiles of `size` rows; where tokens are few, of several heads."""
    if tokens >= size:
        return tokens % size == 0
    return tokens >= LEAST and size % tokens == 0 and heads % (size // tokens) == 0


def aligned(x: Tensor) -> bool:
    """Whether rows lie one behind the other and everything else at multiples of 16 bytes."""
    *outer, last = x.stride()
    if last != 1 or x.data_ptr() % 16:
        return False
    return all(n == 1 or (stride > 0 and stride % ALIGNED == 0) for n, stride in zip(x.shape, outer, strict=False))


def descriptor(x: Tensor, rows: int, columns: int | None = None, heads: int = 1) -> TensorDescriptor:
    """A descriptor of boxes of so many rows and columns of [B, H, S, D], all columns if it is not said how many.

    A box of several heads comes as their rows, one head behind the other.
    Made from a template: the checks of its constructor are `aligned`'s.
    """
    made = object.__new__(TensorDescriptor)
    # a dimension of one element may have any stride; the descriptor asks for an aligned one
    width = x.shape[-1]
    strides = [s if n > 1 else width for n, s in zip(x.shape[:-1], x.stride(), strict=False)]
    about = _template(heads, rows, columns or width, x.dtype)
    made.__dict__.update(about, base=x, shape=list(x.shape), strides=[*strides, 1])
    return made


@cache
def _template(heads: int, rows: int, width: int, dtype: torch.dtype) -> dict:
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    box = [1, heads, rows, width]
    like = torch.empty(box, dtype=dtype, device="meta")
    return vars(TensorDescriptor.from_tensor(like, box, gl.NVMMASharedLayout.get_default_for(box, kind)))


@cache
def on_hopper(device: torch.device) -> bool:
    """Whether a CUDA device is a Hopper GPU."""
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
