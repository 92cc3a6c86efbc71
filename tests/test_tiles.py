"""Every kernel that a launch can choose, compiled for sm_90 without a GPU: it builds, does not spill, and fits.

Tensors are on the device "meta", so what asks for a value on the host raises here.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)

from farfield.kernels import launch
from farfield.ops.attend import Call, Plan
from farfield.testing import compiled

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Bytes of local memory that a case may use, with the reason. None may without one.
SPILLS: dict[str, int] = {}


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


def forward(case):
    sources, options = case
    launch.attend_forward(call(sources, **options))


# (kernel, case) -> what launches it
LAUNCHES = {f"forward-{name}": (lambda case=case: forward(case)) for name, case in CALLS.items()}


@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles_for_hopper(name):
    with compiled.recording() as launches:
        LAUNCHES[name]()
    assert launches, f"{name} launches nothing"
    for made in launches:
        assert made.shared <= compiled.SHARED, f"{made}: {made.shared} bytes of shared memory"
        assert made.spills <= SPILLS.get(name, 0), f"{made}: {made.spills} bytes of local memory a thread"


def test_an_allowance_that_is_not_needed_goes():
    assert SPILLS.keys() <= LAUNCHES.keys()


@pytest.mark.parametrize("name", ["fma-64", "blocks128-64"])
def test_matrix_products_run_on_the_tensor_cores(name):
    with compiled.recording() as launches:
        forward(CALLS[name])
    assert launches[-1].count("HGMMA") >= 2


# one for all lengths

# lengths of every kind: around powers of two, odd, prime, and short of a block
LENGTHS = [256 + 97 * i for i in range(20)] + [2**p + d for p in range(10, 20) for d in (-1, 0, 1)]


def hashes(launch_at):
    """The kernels that 50 lengths need, by name."""
    with compiled.recording() as launches:
        for tokens in LENGTHS:
            launch_at(tokens)
    found = {}
    for made in launches:
        found.setdefault(made.name, set()).add(made.hash)
    return {name: len(kernels) for name, kernels in found.items()}


AT_LENGTH = {
    "forward-fma": lambda n: launch.attend_forward(call(FMA, tokens=n)),
    "forward-blocks": lambda n: launch.attend_forward(call((source(128, causal=True),), tokens=n, q_block=128)),
}


@pytest.mark.parametrize("name", AT_LENGTH)
def test_one_kernel_for_all_lengths(name):
    assert len(LENGTHS) == 50
    assert set(hashes(AT_LENGTH[name]).values()) == {1}
