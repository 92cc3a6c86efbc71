"""Every kernel that a launch can choose, compiled for sm_90 without a GPU: it builds, does not spill, and fits.

Tensors are on the device "meta", so what asks for a value on the host raises here.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)

from triton.compiler import CompilationError

from farfield.kernels import (
    append,
    attend_backward,
    attend_decode,
    attend_hopper,
    attend_listed,
    attend_listed_backward,
    attend_opened,
    attend_own,
    branches,
    choose,
    choose_backward,
    compress,
    draw,
    fan,
    growth,
    hashed,
    launch,
    lists,
    means,
    merge,
    mix,
    multipole_backward,
    multipole_hopper,
    opened,
    opened_search,
    patterns,
    plans,
    pool,
    prefix,
    scan,
    token_step,
)
from farfield.nn import Rope
from farfield.ops import hashed as ops_hashed
from farfield.ops import opened_step as opened_buffers
from farfield.ops.append import Append
from farfield.ops.attend import Call, Plan
from farfield.ops.choose import Scoring
from farfield.ops.lists import recent_sizes
from farfield.ops.multipole import LEVELS, Field, tree_of
from farfield.ops.opened import SCORES
from farfield.ops.opened import Plan as OpenedPlan
from farfield.ops.pool import Tree
from farfield.ring import FMARing
from farfield.select import static
from farfield.testing import compiled

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Bytes of local memory that a case may use, with the reason. None may without one.
_ONCE = 24  # numbers of the whole kernel that are kept once and read once a tile, outside its loops
SPILLS: dict[str, int] = {
    **dict.fromkeys(("forward-fma-64", "forward-fma-128", "forward-fma-fp16-64", "forward-fma-fp16-128"), _ONCE),
    **dict.fromkeys(("forward-fma-m128-64", "forward-fma-m128-128"), _ONCE),
    # two programs a multiprocessor instead of one
    "backward-fma-128": 16,
    "backward-fma-m128-128": 16,
    "backward-blocks64-64": 8,
    "backward-runs-64": 8,
    **dict.fromkeys(("backward-runs-128", "backward-runs-heads-128"), 24),  # Triton 3.6
    **dict.fromkeys(("backward-runs-heads-64", "backward-runs-heads-8-64"), 8),
    "forward-runs-heads-128": 8,  # of the warps that load
    "backward-fma-64": 8,  # sums of the bias's gradient, of Triton 3.7
    # positions of the queries, and numbers of the whole kernel
    "backward-sorted-128": _ONCE,
    # what the whole walk keeps of its lengths and places, read once a query block or more seldom
    **dict.fromkeys(("walk", "walk-fp16", "walk-128", "walk-128-long"), 64),
    "walk-long": 128,
    **dict.fromkeys(("walk-halves-64-5000", "walk-halves-64-100000"), 240),
    # and here once a pair of tiles: sums of dq are in registers beside the scores
    **dict.fromkeys(("walk-halves-128-5000", "walk-halves-128-100000"), 352),
    **dict.fromkeys(("listed-backward-512-128", "choose-fp32-128", "listed-64", "listed-16-64"), _ONCE),
    "listed-own-backward-64": _ONCE,
    # numbers of a block of queries, read once a block (Triton 3.7)
    **dict.fromkeys(("hashed-backward-64-128", "hashed-backward-128-128", "hashed-both-backward-128"), 16),
    # numbers of a run and of the whole kernel, kept once and read once a tile of queries
    "listed-128": 32,
    "listed-own-backward-128": 32,
    "listed-512-128": 104,
    **dict.fromkeys(("listed-own-128", "listed-own-heads-128", "listed-own-many-128"), _ONCE),
    # what belongs to a tile of queries, outside the loop over rows (those of Triton 3.6, which keeps more)
    **dict.fromkeys(("choose-64", "choose-128", "branches-64", "branches-128"), 96),
    "choose-ssa-64": 120,
    # two sums of 64 x 128 numbers take 128 registers a thread
    "choose-backward-128": 8,
    # a tile of rows is three operands, which Triton keeps in registers
    "choose-backward-few-128": 240,
    "choose-backward-few-64": 8,  # Triton 3.6
    # addresses of the weights
    **dict.fromkeys(("compress-128", "branches-learned-128"), 144),
    # numbers that are kept once and read once a chunk
    "scan-128": 40,
    "scan-back-128": 80,
    # four searches a multiprocessor: they wait most of the time
    # numbers of a tile of queries, and sums of a piece of the far rows
    **dict.fromkeys(("opened-2-64", "opened-16-64"), 24),
    "opened-shared-64": 32,  # Triton 3.6; 24 of 3.7
    # of the means of segments, Triton 3.7
    **dict.fromkeys(("opened-runs-long-128", "opened-runs-heads-128", "opened-runs-heads-long-128"), 8),
    **dict.fromkeys(("opened-2-128", "opened-16-128"), 80),
    # a third stage of loads, which was faster
    "scan-80": 64,
    "prefix-256": 272,
    # one warp, which was faster
    **dict.fromkeys(("prefix-80", "prefix-128"), 128),
    # no tile that fits is without; none is fast
    "scan-fp32-128": 512,
    "scan-fp32-256": 1664,
    "prefix-fp32-128": 64,
    "prefix-fp32-256": 2048,
    "backward-fma-256": 240,  # Triton 3.7; 136 of 3.6
    "backward-fma-fp32-64": 192,
    # numbers of the pieces, of Triton 3.7
    "backward-fma-m128-64": 8,
}


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def source(k_block, *, rows=None, causal=False, reach=-1, bias=False, end=False, group=False, picks=5, heads=1):
    return {"k_block": k_block, "rows": rows, "causal": causal, "reach": reach, "bias": bias, "end": end,
            "group": group, "picks": picks, "heads": heads}  # fmt: skip


def call(
    sources, *, tokens=5000, dtype="bf16", width=64, value_width=None, batch=1, heads=4, kv_heads=2, q_block=64,
    position=False, group=False,
):  # fmt: skip
    """A call of attend on meta tensors."""
    kind, value_width, none = DTYPES[dtype], value_width or width, empty(0)
    blocks = -(-tokens // q_block)
    rows = [s["rows"] or (tokens if s["causal"] else -(-tokens // 64) * 8) for s in sources]

    def per_row(name, dtype):
        return [empty(1, 1, n, dtype=dtype) if s[name] else none for s, n in zip(sources, rows, strict=True)]

    return Call(
        empty(batch, heads, tokens, width, dtype=kind),
        [empty(batch, kv_heads, n, width, dtype=kind) for n in rows],
        [empty(batch, kv_heads, n, value_width, dtype=kind) for n in rows],
        per_row("bias", torch.float32),
        per_row("end", torch.int64),
        per_row("group", torch.int64),
        empty(1, 1, tokens, dtype=torch.int64) if position else none,
        empty(1, 1, tokens, dtype=torch.int64) if group else none,
        [empty(1, s["heads"], blocks, s["picks"], dtype=torch.int32) for s in sources],
        [empty(1, s["heads"], blocks, dtype=torch.int32) for s in sources],
        [Plan(q_block, s["k_block"], s["causal"], s["reach"], 0) for s in sources],
        0.125,
    )


FMA = (source(64, causal=True), source(4, bias=True))
WIDE_FMA = (source(128, causal=True), source(16, bias=True))
BLOCKS = (source(128, rows=5000, heads=4),)
OPENED = (source(64, causal=True, heads=4, picks=18), source(4, bias=True, heads=4, picks=60))
TOGETHER = (source(64, causal=True, picks=18), source(4, bias=True, picks=60))
ALL = (source(16, causal=True, reach=100, bias=True, end=True, group=True), source(1, bias=True, end=True, group=True))

# name -> the call; what `attend` can meet, by width, dtype, blocks and what rides along
CALLS = {
    **{f"fma-{d}": (FMA, {"width": d}) for d in (16, 32, 64, 80, 96, 112, 128, 192, 256)},
    **{f"fma-m128-{d}": (WIDE_FMA, {"width": d, "q_block": 128}) for d in (64, 128)},
    **{f"blocks128-{d}": (BLOCKS, {"width": d, "q_block": 128, "kv_heads": 4}) for d in (64, 128)},
    **{
        f"blocks64-{d}": ((source(64, rows=5000, heads=4),), {"width": d, "q_block": 64, "kv_heads": 4})
        for d in (64, 128)
    },
    **{f"runs-{d}": (OPENED, {"width": d, "kv_heads": 4}) for d in (64, 128)},
    # as many tokens of one head as of others, in tiles of 64
    **{f"runs-heads-{d}": (TOGETHER, {"width": d, "q_block": 16, "kv_heads": 1}) for d in (64, 128)},
    "runs-heads-8-64": (TOGETHER, {"q_block": 8, "heads": 8, "kv_heads": 1}),
    **{
        f"sorted-{d}": (
            (source(128, causal=True, heads=4),),
            {"width": d, "q_block": 128, "kv_heads": 4, "position": True},
        )
        for d in (64, 128)
    },
    **{f"fma-fp32-{d}": (FMA, {"width": d, "dtype": "fp32"}) for d in (64, 128, 256)},
    **{f"fma-fp16-{d}": (FMA, {"width": d, "dtype": "fp16"}) for d in (64, 128)},
    "window": ((source(64, causal=True, reach=256),), {}),
    "noncausal": ((source(64, rows=5000),), {}),
    "values-wider": (FMA, {"width": 64, "value_width": 128}),
    "values-narrower": (FMA, {"width": 128, "value_width": 40}),
    "one-query": (FMA, {"tokens": 1, "q_block": 1, "heads": 32, "kv_heads": 8, "width": 128}),
    "everything": (ALL, {"position": True, "group": True, "q_block": 16}),
    "everything-fp32": (ALL, {"position": True, "group": True, "q_block": 16, "dtype": "fp32"}),
}


# the backward has two kernels a source more, and so fewer cases
BACKWARD = {name: CALLS[name] for name in (
    "fma-64", "fma-80", "fma-128", "fma-256", "fma-m128-64", "fma-m128-128", "blocks128-64", "blocks128-128",
    "blocks64-64", "blocks64-128", "fma-fp16-64", "fma-fp32-64", "values-wider", "everything", "sorted-64",
    "sorted-128", "runs-64", "runs-128", "runs-heads-64", "runs-heads-128", "runs-heads-8-64",
)}  # fmt: skip
ONE = {"tokens": 1, "q_block": 1, "heads": 32, "kv_heads": 8, "width": 128}


def held(rows):
    """The sources of one query that comes after so many tokens."""
    return (source(64, rows=rows, causal=True), source(4, rows=rows // 16, bias=True, picks=rows.bit_length()))


DECODE = {
    "1": (held(5000), ONE),
    "64": (held(5000), {**ONE, "batch": 64}),
    "64-whole": ((source(64, rows=5000, causal=True, picks=79),), {**ONE, "batch": 64}),
    "width64": (held(5000), {**ONE, "heads": 8, "width": 64}),
    "fp32": (held(5000), {**ONE, "dtype": "fp32"}),
    "everything": (ALL, {"tokens": 3, "q_block": 4, "position": True, "group": True}),
}
# dtype, width, value width, block, rank, learned
POOL = {
    "64-m64-p4": ("bf16", 64, 64, 64, 4, False),
    "128-m64-p4": ("bf16", 128, 128, 64, 4, False),
    "64-m64-p16": ("bf16", 64, 64, 64, 16, False),
    "128-m128-p16": ("bf16", 128, 128, 128, 16, False),
    "80-m64-p16": ("bf16", 80, 40, 64, 16, False),
    "256-m64-p16": ("bf16", 256, 256, 64, 16, False),
    "fp16": ("fp16", 64, 64, 64, 16, False),
    "fp32": ("fp32", 128, 128, 64, 16, False),
    "learned": ("bf16", 64, 64, 64, 16, True),
    "learned-fp32": ("fp32", 64, 64, 64, 4, True),
}

# dtype, width, value width, from the last token on
SCAN = {
    "64": ("bf16", 64, 64, False),
    "128": ("bf16", 128, 128, False),
    "16": ("bf16", 16, 16, False),
    "80": ("bf16", 80, 40, True),
    "256": ("bf16", 256, 256, False),
    "fp16-128": ("fp16", 128, 128, False),
    "fp32-64": ("fp32", 64, 64, False),
    "fp32-128": ("fp32", 128, 128, True),
    "fp32-256": ("fp32", 256, 256, False),
}
# widths of keys and values -> gradients of keys and values at once
GRADIENTS = {"64": (64, 64), "128": (128, 128), "64-128": (64, 128), "16": (16, 16)}
# dtype, value width
PREFIX = {"64": ("bf16", 64), "128": ("bf16", 128), "256": ("bf16", 256), "80": ("fp16", 80), "fp32-64": ("fp32", 64),
          "fp32-128": ("fp32", 128), "fp32-256": ("fp32", 256)}  # fmt: skip


def forward(case, **changes):
    sources, options = case
    launch.attend_forward(call(sources, **{**options, **changes}))


def backward(case, **changes):
    sources, options = case
    made = call(sources, **{**options, **changes})
    out = empty(*made.q.shape[:3], made.v[0].shape[-1], dtype=made.q.dtype)
    lse = empty(*made.q.shape[:3], dtype=torch.float32)
    attend_backward.attend_backward(made, out, lse, out, lse, True)


def decode(case):
    sources, options = case
    made = call(sources, **options)
    assert attend_decode.wants(made)
    attend_decode.attend_decode(made)


def pooling(case, tokens=5000):
    dtype, width, value_width, block, rank, learned = case
    blocks = -(-tokens // block)
    tree = Tree(block, rank, blocks, static.depth(blocks), False, 0, tokens)
    kind = DTYPES[dtype]
    k, v = empty(1, 2, tokens, width, dtype=kind), empty(1, 2, tokens, value_width, dtype=kind)
    none = empty(0, dtype=torch.float32)
    filters = empty(2, 2, rank, 2 * rank, dtype=torch.float32) if learned else none
    far_k, far_v, _, _ = pool.forward(k, v, filters, tree)
    pool.backward(k, v, far_k, far_v, far_k if learned else none, far_v if learned else none, filters, tokens, tree)


def reading(tokens=5000, dtype="bf16", width=64, block=64, near=64, rank=4, most=LEVELS):
    """FMA's forward where its kernel knows the tree."""
    tree = tree_of(tokens, Field(block, near, rank, 0, most))
    q, k = (empty(1, heads, tokens, width, dtype=DTYPES[dtype]) for heads in (4, 2))
    far = empty(1, 2, tree.rows, width, dtype=DTYPES[dtype])
    assert multipole_hopper.wants(q, near, tree)
    multipole_hopper.forward(q, k, k, far, far, empty(1, 4, tokens, dtype=torch.float32), near, tree, 0.125)


def walking(tokens=5000, dtype="bf16", width=64, field=(64, 64, 4, 0)):
    """FMA's backward where kernels take the near and the far field that know the tree."""
    field = Field(*field)
    x, tree = empty(1, 4, tokens, width, dtype=DTYPES[dtype]), tree_of(tokens, field)
    far, lse = empty(1, 4, tree.rows, width, dtype=DTYPES[dtype]), empty(1, 4, tokens, dtype=torch.float32)
    if field.block == 64:
        assert multipole_backward.wants(x, x, field.near, tree)
        multipole_backward.backward(x, x, x, x, x, lse, far, far, tree, 0.125)
    else:
        assert multipole_backward.wants_halves(x, x, field.near, tree)
        shift, delta = multipole_backward.statistics_of(x, x, lse, field.block)
        multipole_backward.near_gradients(x, x, x, x, shift, delta, 0.125)
        multipole_backward.far_gradients(x, x, shift, delta, far, far, x, tree, 0.125)


def listing(causal, tokens=5000):
    blocks = -(-tokens // 64)
    levels = static.depth(blocks)
    radius = static.radii(128, 64, levels)
    lists.build(0, blocks, radius, [0] * levels, causal, 0, 1, torch.device("meta"))


def patterned(tokens=5000):
    blocks, device = -(-tokens // 128), torch.device("meta")
    patterns.shards(0, blocks, 4 + blocks // 8, 0, 4, 4, 4, 8, 2, 0, 4, 1, device)
    patterns.powers(0, blocks, 12 + 2 * blocks.bit_length(), 5, 1, 2, device)


def appending(batch=1, width=128, dtype="bf16", sinks=0, rotary=None):
    ring = FMARing.empty(
        batch, 8, width, capacity=1 << 20, sinks=sinks, rotary=rotary, dtype=DTYPES[dtype], device="meta"
    )
    token = [empty(batch, h, 1, width, dtype=DTYPES[dtype]) for h in (32, 8, 8)]
    held = (getattr(ring, name) for name in Append._fields[3:-1])
    append.launch(Append(*token, *held, ring.plan))


def stepping(batch=2, width=128, dtype="bf16"):
    """What a step does between its products."""
    long, dtype = torch.long, DTYPES[dtype]
    turns, x = empty(width // 4, dtype=torch.float64), empty(batch, 1, 768, dtype=torch.float32)
    about = empty(768, dtype=torch.float32), 1e-6, empty(batch, 3, 768, dtype=torch.float32)
    token_step.launch_norm(x, x.to(dtype), *about, empty(4, 768, dtype=torch.float32), dtype)
    token_step.launch_square(x.to(dtype))
    q, k, v = (empty(batch, h, 1, width, dtype=dtype) for h in (32, 8, 8))
    token_step.launch_place(q, k, empty(32, dtype=dtype), empty(batch, 1, dtype=long), turns, 900, 0.147)
    rows = [empty(batch, 8, 9000, width, dtype=dtype) for _ in range(2)]
    about = empty(batch, 1, 9000, dtype=long), empty(batch, 1, 1, dtype=torch.int32), empty(batch, 1, 1, dtype=long)
    token_step.launch_append(k, v, *rows, *about, empty(batch, dtype=long), 64, 4, 1 << 62, 64)


def sorting(shared, tokens=5000, many=16, dtype="bf16", width=64):
    """What sorted attention launches besides attend."""
    bucket, x = empty(1, 4, tokens, dtype=torch.int32), empty(1, 4, tokens, width, dtype=DTYPES[dtype])
    parts = empty(1 if dtype == "fp32" else 3, 4, width, 16, dtype=DTYPES[dtype])
    hashed.buckets(x, parts, many // 2)
    queries = bucket[:, :, :0] if shared else bucket
    shapes = ops_hashed._shapes(queries, bucket, many, 128, shared)
    found = hashed.slots(queries, bucket, many, 128, True, shared, shapes)
    hashed.take(x, found[1])
    hashed.readers(found[5], found[6])


def sorted_attention(width, *, block=128, shared=True, backward=False, tokens=5000):
    """Attention that gathers rows by their slots."""
    bucket, x = empty(1, 4, tokens, dtype=torch.int32), empty(1, 4, tokens, width)
    shapes = ops_hashed._shapes(bucket[:, :, :0] if shared else bucket, bucket, 16, block, shared)
    slots = ops_hashed.Slots(*(empty(*shape, dtype=torch.int32) for shape in shapes))
    if backward:
        lse = empty(*slots.q_token.shape, dtype=torch.float32)
        hashed._backward(x, x, x, x, x, lse, *slots, block, 0.125)
    else:
        inputs = slots.q_slot, slots.q_token, slots.k_token, slots.position, slots.index, slots.count
        hashed._forward(x, x, x, *inputs, block, 0.125)


def listed(block, width, *, lists=1, heads=4, backward=False, tokens=5000):
    """Lists of a query's own; with one of them for the heads of a key head, that is a batch element."""
    sources = [source(block, causal=True, picks=16, heads=lists)]
    made = call(sources, tokens=tokens, width=width, heads=heads, kv_heads=heads // 4, q_block=1)
    assert attend_listed.wants(made)
    if backward:
        out, lse = empty(*made.q.shape), empty(*made.q.shape[:3], dtype=torch.float32)
        attend_listed_backward.attend_listed_backward(made, out, lse, out, lse)
    else:
        attend_listed.attend_listed(made)


def own_blocks(width, *, backward=False, tokens=5000, kv_heads=4, picks=3):
    """Lists that end with the block of their query."""
    made = call(
        [source(512, causal=True, picks=picks, heads=16)], tokens=tokens, width=width, heads=16, kv_heads=kv_heads,
        q_block=1,
    )  # fmt: skip
    made = made._replace(plans=[made.plans[0]._replace(own=1)])
    assert attend_own.wants(made)
    if backward:
        plans.backward(made, made.q, None, made.q, empty(*made.q.shape[:3], dtype=torch.float32), False)
    else:
        launch.attend_forward(made)


def choosing(scoring, width, dtype="bf16", tokens=5000, values=False, backward=False):
    q, rows = empty(1, 16, tokens, width, dtype=DTYPES[dtype]), (tokens - scoring.span) // scoring.stride + 1
    keys = empty(1, 4, rows, width, dtype=torch.float32)
    if backward:
        lse, ends = empty(1, 16, tokens, dtype=torch.float32), (scoring.stride, scoring.span)
        choose_backward.ended_backward(q, keys, keys, q, None, q, lse, *ends, 0, 0.125)
    elif values:
        choose.both(q, keys, keys, scoring, 0, 0.125)
    else:
        choose.alone(q, keys, scoring, 0, 0.125)


def branching(width, tokens=5000, learned=False, trained=False):
    """All three branches of `nsa`."""
    q, x = empty(1, 16, tokens, width), empty(1, 4, tokens, width)
    shapes = [shape for shape in ((32 * width, width), (4, 32, width), (width, width)) for _ in "kv"]
    weights = [empty(*shape, dtype=torch.float32) for shape in (*shapes, (4, width, 3), (4, 3))]
    about = branches.About(NSA, 512, *recent_sizes(tokens, 512), 0.125)
    assert branches.together(q, x, x, about)
    branches.forward(q, x, x, *(weights if learned else ()), about, trained)


def compressing(width, learned, tokens=5000):
    wide, x = torch.float32, empty(1, 4, tokens, width)
    mlp = [empty(*shape, dtype=wide) for shape in ((32 * width, width), (4, 32, width), (width, width)) for _ in "kv"]
    compress.compress(x, x, *(mlp if learned else ()), 16, 32, tokens // 16 - 1, True)


def mixing(width, tokens=5000):
    q, weights = empty(1, 16, tokens, width), [empty(4, *n, dtype=torch.float32) for n in ((width, 3), (3,))]
    mix.mix((q, q, q), q, *weights, None)
    with torch.device("meta"):
        mix.mix_gradients((q, q, q), q, *weights, None, q)
    rows = empty(1, 16, tokens // 16 - 1, width, dtype=torch.float32)
    fan.spread((q, q), (q, q), (rows, rows), 16, 32, 0.5)


NSA = Scoring(64, 16, 16, 32, 1, 2)
MOBA = Scoring(512, 3, 512, 512, shared=False)


def scanning(case, tokens=5000):
    dtype, width, value_width, back = case
    q, k = (empty(1, heads, tokens, width, dtype=DTYPES[dtype]) for heads in (4, 2))
    v = empty(1, 2, tokens, value_width, dtype=DTYPES[dtype])
    state = empty(1, 4, width, value_width, dtype=torch.float32)
    scan.forward(q, k, v, empty(4, dtype=torch.float32), state, back)


def differentiating(case, tokens=5000):
    width, value_width = case
    q, k, v = empty(1, 4, tokens, width), empty(1, 2, tokens, width), empty(1, 2, tokens, value_width)
    decay, kept = empty(4, dtype=torch.float32), []
    out, _ = scan.forward(q, k, v, decay, None, False, kept)
    scan.gradient_of_queries(out, k, v, decay, *kept or [None])
    scan.gradients(out, None, q, k, v, decay)


def scoring(case, tokens=5000):
    dtype, width = case
    query, k = empty(1, 4, width, dtype=torch.float32), empty(1, 2, tokens, width, dtype=DTYPES[dtype])
    prefix.scores_backward(prefix.scores(query, k), query, k)


def prefixes(case, given, tokens=5000):
    dtype, width = case
    scores, v = empty(1, 4, tokens, dtype=torch.float32), empty(1, 2, tokens, width, dtype=DTYPES[dtype])
    row, rows = empty(1, 4, dtype=torch.float32), empty(1, 4, width, dtype=torch.float32)
    out, rest, lse, _, mass, _ = prefix.forward(scores, v, (row, row, rows) if given else None, True)
    prefix.backward(out, row if given else None, rows if given else None, scores, v, out, rest, lse, mass)


def opening(
    picks, width, *, heads=4, kv_heads=4, block=64, rank=4, hold=1, tokens=5000, score="mean", detail=16, sinks=3
):
    field = Field(block, 128, rank, sinks)
    tree = tree_of(max(tokens, 3 * block + 1), field)
    q, k = (empty(1, n, tokens, width) for n in (heads, kv_heads))
    plan = OpenedPlan(field.near, detail, picks, 2 * picks, 1, hold, SCORES.index(score))
    if hold > 1 and score == "mean":
        opened.runs(q, k, k, tree, plan, 0.125)
        return
    leaves, count = opened_search.chosen(q, k, tree, plan, 0.125)
    if hold > 1:
        opened.lists_of_runs(leaves, count, tree, plan)
        return
    far, bias = empty(1, kv_heads, tree.rows, width), empty(1, 1, tree.rows, dtype=torch.float32)
    about = q, k, k, far, far, bias, leaves, count
    out, lse = attend_opened.forward(*about, tree, field.near, 0.125)
    attend_opened.backward(out, *about, out, lse, tree, field.near, 0.125, True)


def growing(width, *, block=64, rank=4, detail=16, dtype="bf16", tokens=5000):
    """A chunk of a prompt: what it adds to summaries and sketches, the choice by these, and two results joined."""
    done, stop, room = 1000, 1000 + -(-tokens // block), 3000 + tokens // block
    tree = Tree(block, rank, room, 8, True, 3, room * block)
    k, far = (empty(1, 4, n, width, dtype=DTYPES[dtype]) for n in (stop * block, tree.rows))
    sketches = empty(1, 4, sum(tree.groups) * detail, width, dtype=torch.float32)
    trees = growth.Trees(sketches, far, far, block, rank, detail, tree.lead, 3, room)
    waiting = empty(1, 4, 2, 8, rank, width, dtype=torch.float32)
    growth.grow(k, k, k, (0, 0, 0), trees, waiting, done, stop, 8)
    lse = empty(1, 4, tokens, dtype=torch.float32)
    merge.merge(k[:, :, :tokens].contiguous(), lse, k[:, :, :tokens].contiguous(), lse)
    if dtype != "fp32":
        for hold in (1, 64):
            plan = OpenedPlan(128, detail, 4, 8, 1, hold, SCORES.index("mean"))
            asking = k[:, :, : tokens // 64 * 64 : hold]
            found = opened_search.sketched(sketches, k.dtype, "mean")
            opened_search.choose(asking, found, tree, plan, 0.125, done * block // hold)


def drawing(tokens):
    number = empty(1, dtype=torch.float64)
    draw.drawn(empty(1, tokens, dtype=torch.float32), number, 0.8, tokens, 0.9)


def decoding_opened(picks, *, heads=8, kv_heads=8, width=64, capacity=1 << 20, **plan):
    """A step from fixed buffers, and the fetch of its blocks."""
    about = {"detail": 16, "picks": picks, "beam": 2 * picks, "shared": 1, "summed": 0, "score": 3, **plan}
    plan = opened_buffers.Plan(64, 128, 16, 3, 14, capacity, **about)
    lists, (near, far) = kv_heads if plan.shared else heads, plan.widths

    def rows(many):
        return [empty(1, kv_heads, many, width) for _ in range(2)]

    def whole(*shape, dtype=torch.int32):
        return empty(*shape, dtype=dtype)

    step = opened_buffers.Step(
        *rows(192), *rows(60 * 16), *rows(capacity), *rows(plan.far_rows),
        whole(1, kv_heads, sum(plan.groups) * plan.detail, width, dtype=torch.float32),
        whole(1, lists, 1, near), whole(1, lists, 1), whole(1, lists, 1, far), whole(1, lists, 1),
        whole(1, lists, 1, dtype=torch.long), whole(1, kv_heads + lists, dtype=torch.long),
        whole(0, dtype=torch.float32), plan,
    )  # fmt: skip
    opened_buffers.run(empty(1, heads, 1, width), step, 0.125)
    if plan.shared:
        about = step.all_k, step.all_v, step.near_k, step.near_v, step.near, step.near_count, step.position
        opened_buffers.fetch(*about, plan)


# kernel-case -> what launches it
LAUNCHES = {
    **{f"forward-{name}": (lambda case=case: forward(case)) for name, case in CALLS.items()},
    **{f"backward-{name}": (lambda case=case: backward(case)) for name, case in BACKWARD.items()},
    **{f"decode-{name}": (lambda case=case: decode(case)) for name, case in DECODE.items()},
    **{f"pool-{name}": (lambda case=case: pooling(case)) for name, case in POOL.items()},
    **{
        f"tree-{name}-{width}": (lambda field=field, width=width: reading(5000, "bf16", width, *field))
        for name, field in (("m64", (64, 64, 4)), ("m128", (128, 128, 16)), ("near-128", (64, 128, 16)))
        for width in (64, 128)
    },
    "tree-fp16": lambda: reading(dtype="fp16"),
    # with a horizon
    "tree-cut-64": lambda: reading(most=3),
    "tree-cut-m128-128": lambda: reading(5000, "bf16", 128, 128, 128, 16, 3),
    "tree-cut-near-128-64": lambda: reading(5000, "bf16", 64, 64, 128, 16, 3),
    "walk": walking,
    "walk-fp16": lambda: walking(dtype="fp16"),
    "walk-long": lambda: walking(100_000),
    "walk-128": lambda: walking(width=128),
    "walk-128-long": lambda: walking(100_000, width=128),
    **{
        f"walk-halves-{d}-{n}": (lambda d=d, n=n: walking(n, width=d, field=(128, 128, 16, 0)))
        for d in (64, 128)
        for n in (5000, 100_000)
    },
    **{f"scan-{name}": (lambda case=case: scanning(case)) for name, case in SCAN.items()},
    **{f"scan-back-{name}": (lambda case=case: differentiating(case)) for name, case in GRADIENTS.items()},
    **{f"scores-{name}": (lambda case=case: scoring(case)) for name, case in PREFIX.items()},
    **{f"prefix-{name}": (lambda case=case: prefixes(case, False)) for name, case in PREFIX.items()},
    "prefix-given": lambda: prefixes(PREFIX["64"], True),
    "lists-causal": lambda: listing(True),
    "lists-noncausal": lambda: listing(False),
    "lists-patterns": patterned,
    "sorting": lambda: sorting(True),
    "sorting-both": lambda: sorting(False),
    "sorting-fp32": lambda: sorting(False, dtype="fp32", width=128),
    **{
        f"hashed{'-backward' * back}-{block}-{d}": (
            lambda d=d, block=block, back=back: sorted_attention(d, block=block, backward=back)
        )
        for d in (64, 128)
        for block in (64, 128)
        for back in (False, True)
    },
    **{
        f"hashed-both{'-backward' * back}-{d}": (
            lambda d=d, back=back: sorted_attention(d, shared=False, backward=back)
        )
        for d in (64, 128)
        for back in (False, True)
    },
    **{f"listed-{d}": (lambda d=d: listed(64, d)) for d in (64, 128)},
    **{f"listed-backward-{d}": (lambda d=d: listed(64, d, backward=True)) for d in (64, 128)},
    "listed-16-64": lambda: listed(16, 64),
    **{f"listed-own-{d}": (lambda d=d: own_blocks(d)) for d in (64, 128)},
    **{f"listed-own-heads-{d}": (lambda d=d: own_blocks(d, kv_heads=16)) for d in (64, 128)},
    # more parts than are joined with the own block
    **{f"listed-own-many-{d}": (lambda d=d: own_blocks(d, picks=6)) for d in (64, 128)},
    **{f"listed-own-backward-{d}": (lambda d=d: own_blocks(d, backward=True)) for d in (64, 128)},
    # what the kernel for Hopper does not take
    "listed-40": lambda: listed(64, 40),
    "listed-512-40": lambda: listed(512, 40, lists=16, heads=16),
    # what the kernel for Hopper does not take
    "listed-backward-16-64": lambda: listed(16, 64, backward=True),
    "listed-backward-512-40": lambda: listed(512, 40, lists=16, heads=16, backward=True),
    **{f"listed-512-{d}": (lambda d=d: listed(512, d, lists=16, heads=16)) for d in (64, 128)},
    **{f"listed-backward-512-{d}": (lambda d=d: listed(512, d, lists=16, heads=16, backward=True)) for d in (64, 128)},
    **{f"choose-{d}": (lambda d=d: choosing(NSA, d, values=True)) for d in (64, 128)},
    # what the kernels for Hopper do not take
    "choose-80": lambda: choosing(NSA, 80, values=True),
    **{f"choose-fp32-{d}": (lambda d=d: choosing(NSA, d, "fp32", values=True)) for d in (64, 128)},
    **{f"choose-backward-{d}": (lambda d=d: choosing(NSA, d, backward=True)) for d in (64, 128)},
    # few queries
    **{f"choose-backward-few-{d}": (lambda d=d: choosing(NSA, d, tokens=900, backward=True)) for d in (64, 128)},
    **{f"branches-{d}": (lambda d=d: branching(d)) for d in (64, 128)},
    "branches-learned-128": lambda: branching(128, learned=True, trained=True),
    **{f"compress-{d}": (lambda d=d: compressing(d, True)) for d in (64, 128)},
    "compress-means": lambda: compressing(64, False),
    **{f"mix-{d}": (lambda d=d: mixing(d)) for d in (64, 128)},
    "choose-ssa-64": lambda: choosing(Scoring(16, 16, 16, 16), 64),
    **{f"choose-moba-{d}": (lambda d=d: choosing(MOBA, d)) for d in (64, 128)},
    "choose-moba-many-128": lambda: choosing(Scoring(512, 8, 512, 512, shared=False), 128),
    "means": lambda: means.means(empty(1, 4, 5000, 128), 512),
    **{f"opened-{n}-{d}": (lambda n=n, d=d: opening(n, d)) for n in (2, 16) for d in (64, 128)},
    "opened-runs-64": lambda: opening(16, 64, hold=64),
    "growth-64": lambda: growing(64),
    "growth-128": lambda: growing(128, block=128, rank=16),
    "growth-few-16": lambda: growing(16, rank=1, detail=1),
    "growth-fp32-64": lambda: growing(64, rank=32, dtype="fp32"),
    # few levels of which all groups are scored
    "opened-runs-long-64": lambda: opening(16, 64, hold=64, tokens=1 << 20),
    "opened-runs-long-128": lambda: opening(16, 128, hold=64, tokens=1 << 20),
    **{
        f"opened-runs-heads-{d}": (lambda d=d: opening(16, d, hold=16, heads=16, kv_heads=4, sinks=0))
        for d in (64, 128)
    },
    "opened-runs-heads-long-128": lambda: opening(16, 128, hold=16, heads=16, kv_heads=4, tokens=1 << 20),
    "opened-shared-64": lambda: opening(8, 64, heads=8, kv_heads=2, block=128, rank=16),
    "opened-step-4": lambda: decoding_opened(4),
    "opened-step-16": lambda: decoding_opened(16, width=128),
    "opened-step-stacked": lambda: decoding_opened(4, kv_heads=2, summed=1),
    "opened-step-apart": lambda: decoding_opened(4, kv_heads=2, shared=0, hold=4),
    "append": appending,
    "append-sinks-rotary": lambda: appending(sinks=4, rotary=Rope(128)),
    "append-fp32": lambda: appending(width=64, dtype="fp32"),
    "token": stepping,
    "draw-256": lambda: drawing(256),
    "draw-1000": lambda: drawing(1000),
    "token-fp32": lambda: stepping(width=64, dtype="fp32"),
}


# run by default: the shapes of the benchmarks, and a case of every kernel and dtype. Each takes seconds of a compiler;
# FARFIELD_TILES=all runs all of them
FEW = (
    "forward-fma-64", "forward-fma-128", "forward-fma-256", "forward-fma-m128-128",
    "forward-blocks64-128", "forward-blocks128-128", "forward-fma-fp32-64", "forward-fma-fp32-128",
    "forward-fma-fp32-256", "forward-everything-fp32",
    "backward-fma-64", "backward-fma-128", "backward-blocks64-128", "backward-blocks128-128",
    "decode-1", "decode-64", "decode-64-whole", "decode-fp32", "pool-64-m64-p4", "tree-m64-128", "tree-m128-64",
    "tree-m128-128", "tree-near-128-64", "tree-cut-64", "walk", "walk-long", "walk-128",
    "walk-halves-64-100000", "walk-halves-128-5000", "lists-causal", "lists-patterns",
    "append-sinks-rotary", "opened-step-4", "token", "draw-256",
    "forward-sorted-128", "sorting-both",
    "listed-64", "listed-512-128", "listed-backward-64", "choose-64", "choose-80", "choose-backward-64", "compress-64",
    "branches-64", "mix-64", "opened-2-64", "opened-runs-64", "opened-runs-heads-64", "growth-64",
    "forward-runs-128", "backward-runs-64", "backward-runs-128", "forward-runs-heads-64", "backward-runs-heads-8-64",
    "backward-runs-heads-128",
    "hashed-128-64", "hashed-backward-128-128", "scan-64", "scan-128", "scan-back-128", "scan-16", "prefix-64",
    "scores-64",
)  # fmt: skip
EVERY = os.environ.get("FARFIELD_TILES") == "all"


@pytest.mark.parametrize("name", LAUNCHES if EVERY else FEW)
def test_compiles_for_hopper(name):
    with compiled.recording() as launches:
        LAUNCHES[name]()
    assert launches, f"{name} launches nothing"
    for made in launches:
        assert made.shared <= compiled.SHARED, f"{made}: {made.shared} bytes of shared memory"
        assert made.spills <= SPILLS.get(name, 0), f"{made}: {made.spills} bytes of local memory a thread"


def test_two_programs_of_long_lists_share_a_multiprocessor():
    with compiled.recording() as launches:
        LAUNCHES["backward-runs-128"]()
    (made,) = {x.hash: x for x in launches if x.name == "attend_backward_runs_hopper"}.values()
    # in steps of 128 bytes, and 1 KiB of each program is the system's
    assert 2 * (-(-made.shared // 128) * 128 + 1024) <= 228 * 1024


def test_gathered_rows_with_one_place_are_refused(monkeypatch):
    """The kernel would wait for ever."""
    one = {shape: tiles._replace(far_stages=1) for shape, tiles in attend_hopper.TILES.items()}
    monkeypatch.setattr(attend_hopper, "TILES", one)
    with compiled.recording(), pytest.raises(CompilationError, match=r"static_assert\(FAR_STAGES > 1\)"):
        LAUNCHES["forward-fma-64"]()


def test_names_are_those_of_cases():
    assert {*SPILLS, *FEW} <= LAUNCHES.keys()


@pytest.mark.parametrize("name", ["forward-fma-64", "forward-blocks128-128", "tree-m64-64", "tree-m128-128"])
def test_matrix_products_run_on_the_tensor_cores(name):
    with compiled.recording() as launches:
        LAUNCHES[name]()
    assert launches[-1].count("HGMMA") >= 2


@pytest.mark.parametrize(
    "name", ["tree-m64-64", "tree-m64-128", "tree-m128-64", "tree-m128-128", "tree-cut-64", "tree-cut-m128-128"]
)
def test_products_do_not_wait_for_each_other(name):
    """The compiler puts a wait behind every product of a kernel where one of its parts does not suit it."""
    with compiled.recording() as launches:
        LAUNCHES[name]()
    assert launches[-1].count("WARPGROUP.DEPBAR") < launches[-1].count("HGMMA") / 2


# one for all lengths

# lengths of every kind: around powers of two, odd, prime, and short of a block
LENGTHS = [256 + 97 * i for i in range(20)] + [2**p + d for p in range(10, 20) for d in (-1, 0, 1)]


def hashes(launch_at):
    """The kernels that 50 lengths need, by name and constants."""
    with compiled.recording() as launches:
        for tokens in LENGTHS:
            launch_at(tokens)
    found = {}
    for made in launches:
        # one call may need a kernel for several sets of constants
        found.setdefault((made.name, str(sorted(made.options.items()))), set()).add(made.hash)
    return {name: len(kernels) for name, kernels in found.items()}


PLAIN = ((source(128, causal=True),), {"q_block": 128})
AT_LENGTH = {
    "forward-fma": lambda n: forward((FMA, {}), tokens=n),
    "forward-blocks": lambda n: forward(PLAIN, tokens=n),
    # widths whose strides are multiples of 16 or not by the length
    "forward-general": lambda n: forward((ALL, {"q_block": 16, "width": 24, "batch": 2}), tokens=n),
    "forward-sorted": lambda n: forward(CALLS["sorted-64"], tokens=n),
    "sorting": lambda n: sorting(False, n),
    "opened-step": lambda n: decoding_opened(4, capacity=-(-n // 64) * 64),
    "forward-runs": lambda n: forward(CALLS["runs-64"], tokens=n),
    "forward-runs-heads": lambda n: forward(CALLS["runs-heads-64"], tokens=n),
    "backward-runs-heads": lambda n: backward(CALLS["runs-heads-64"], tokens=n),
    "hashed": lambda n: sorted_attention(64, tokens=n),
    "hashed-backward": lambda n: sorted_attention(64, backward=True, tokens=n),
    "backward-fma": lambda n: backward((FMA, {}), tokens=n),
    "backward-runs": lambda n: backward(CALLS["runs-128"], tokens=n),
    "backward-blocks": lambda n: backward(PLAIN, tokens=n),
    "pool": lambda n: pooling(POOL["64-m64-p4"], n),
    "decode": lambda n: decode((held(n), ONE)),
    "tree": reading,
    "tree-m128": lambda n: reading(max(n, 257), block=128, near=128, rank=16),
    "tree-near-128": lambda n: reading(max(n, 193), near=128, rank=16),
    "tree-cut": lambda n: reading(max(n, 257), most=1),
    # one kernel for up to 64 far rows, and one for more
    "walk": walking,
    "walk-128": lambda n: walking(n, width=128),
    "walk-halves": lambda n: walking(max(n, 257), field=(128, 128, 16, 0)),
    "lists": lambda n: listing(True, n),
    "lists-patterns": patterned,
    "listed": lambda n: listed(64, 64, tokens=n),
    "listed-backward": lambda n: listed(64, 64, tokens=n, backward=True),
    "listed-own": lambda n: own_blocks(64, tokens=n),
    "means": lambda n: means.means(empty(1, 4, n, 64), 64),
    "choose-moba": lambda n: choosing(MOBA, 64, tokens=n + 512),
    "choose": lambda n: choosing(NSA, 64, tokens=n),
    "choose-and-attend": lambda n: choosing(NSA, 64, tokens=n, values=True),
    "choose-backward": lambda n: choosing(NSA, 64, tokens=n + 1024, backward=True),
    "choose-backward-few": lambda n: choosing(NSA, 64, tokens=200 + n % 800, backward=True),
    "branches": lambda n: branching(64, tokens=n),
    "mix": lambda n: mixing(64, tokens=n),
    "opened": lambda n: opening(4, 64, tokens=n),
    "opened-runs": lambda n: opening(4, 64, hold=64, tokens=n),
    "growth": lambda n: growing(64, tokens=n),
    "scan": lambda n: scanning(SCAN["64"], n),
    "prefix": lambda n: prefixes(PREFIX["64"], False, n),
}


@pytest.mark.parametrize("name", AT_LENGTH)
def test_one_kernel_for_all_lengths(name):
    assert len(LENGTHS) == 50
    assert set(hashes(AT_LENGTH[name]).values()) == {1}
