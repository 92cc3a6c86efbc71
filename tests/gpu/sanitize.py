"""Every kernel once or twice on small shapes, for NVIDIA's memory checkers:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --kernel-regex-exclude kns=hopper python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py control

Without PyTorch's caching each tensor is an allocation of its own, so that a read past its end is seen. Racecheck does
not see the order that barriers in shared memory make: it reports a race in `control`, where one warp writes a number
and arrives at a barrier, and others wait there and read it. The Hopper kernels hand over everything in that way and
are left out.
"""

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

import farfield as ff

_sync = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _give(x, place, full, empty, many):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in range(many):
        mbarrier.wait(empty.index(0), i & 1 ^ 1)
        place.store(gl.full([1], gl.load(x + i), gl.int32, ONE))
        _sync()
        mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def _take(y, place, full, empty, many):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for i in range(many):
        mbarrier.wait(full.index(0), i & 1)
        got = gl.max(place.load(ONE), 0)
        _sync()
        mbarrier.arrive(empty.index(0), count=1)
        gl.store(y + i, got)


@gluon.jit
def hand_over(x, y, many):
    """y[i] = x[i], by way of one number in shared memory."""
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    place = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], bars)
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(empty.index(0), count=1)
    gl.warp_specialize([(_take, (y, place, full, empty, many)), (_give, (x, place, full, empty, many))], [1], [24])


def control():
    x = torch.arange(64, dtype=torch.int32, device="cuda")
    y = torch.zeros_like(x)
    hand_over[(1,)](x, y, 64, num_warps=4)
    assert torch.equal(x, y)


def qkv(tokens, *, batch=1, heads=4, kv_heads=2, width=64, value_width=None, dtype=torch.bfloat16):
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width or width))
    return [torch.randn(batch, h, tokens, w, device="cuda").to(dtype).requires_grad_() for h, w in shapes]


def both(f, x):
    """Forward and backward."""
    out = f(*x)
    grads = torch.autograd.grad(out, [*x], torch.randn_like(out))
    for t in (out, *grads):
        assert t.isfinite().all()


def fma(tokens=300, dtype=torch.bfloat16, width=64, value_width=None, **options):
    options = {"block": 16, "near": 32, "rank": 4} | options
    shape = {"kv_heads": 2, "width": width} if options.get("pool") == "learned" else {}
    mech = ff.FMA(**options, **shape).to("cuda")
    both(mech, qkv(tokens, width=width, value_width=value_width, dtype=dtype))


def blocks(block, width, dtype=torch.bfloat16, tokens=530, heads=2):
    count = -(-tokens // block)
    index = torch.rand(1, heads, count, count, device="cuda").argsort(-1)[..., : max(1, count // 2)]
    index = index.sort(-1).values.to(torch.int32)
    used = torch.full(index.shape[:3], index.shape[3], dtype=torch.int32, device="cuda")
    layout = ff.Layout(index, used, block, block, tokens, tokens)
    x = qkv(tokens, heads=heads, kv_heads=heads, width=width, dtype=dtype)
    both(lambda q, k, v: ff.attend(q, ff.Rows(k, v), layout).out, x)


def everything():
    """Bias, ends, groups, positions, reach, lists a head, single rows."""
    tokens, rows = 130, 200
    q, k, v = *qkv(tokens)[:1], *qkv(rows)[1:]
    gen = {"device": "cuda"}
    sources = []
    for k_block in (1, 16):
        count = -(-rows // k_block)
        index = torch.rand(1, 4, 9, count, **gen).argsort(-1)[..., :9].sort(-1).values.to(torch.int32)
        used = torch.randint(0, 10, (1, 4, 9), dtype=torch.int32, **gen)
        layout = ff.Layout(index, used, 16, k_block, tokens, rows, True, 60, 2)
        bias = torch.randn(1, 4, rows, **gen).requires_grad_()
        end, group = torch.randint(0, 150, (1, 2, rows), **gen), torch.randint(0, 2, (1, 2, rows), **gen)
        sources.append((ff.Rows(k, v, end, bias, group), layout))
    position = torch.randint(0, 150, (tokens,), **gen)
    group = torch.randint(0, 2, (1, 1, tokens), **gen)
    part = ff.attend(q, sources, position=position, group=group)
    torch.autograd.grad(part.out.sum(), [q, k, v, *(rows.bias for rows, _ in sources)])


def decode(dtype=torch.bfloat16, batch=2, **options):
    mech = ff.FMA(**{"block": 16, "near": 32, "rank": 4} | options)
    q, k, v = (x.detach() for x in qkv(130, batch=batch, heads=8, dtype=dtype))
    _, state = mech.extend(*(x[:, :, :90] for x in (q, k, v)))
    ring = mech.ring(state, capacity=1024)
    for t in range(90, 130):
        assert mech.step(*(x[:, :, t : t + 1] for x in (q, k, v)), ring).isfinite().all()


def other(name, dtype=torch.bfloat16, tokens=530, heads=4, kv_heads=2, width=64, **options):
    """Forward and backward of any mechanism."""
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width}
    mech = ff.mechanisms.make_for(name, options, **sizes).to("cuda")
    both(mech, qkv(tokens, dtype=dtype, **sizes))


def opened(few=None, tokens=1531, width=64, **options):
    """Opened FMA; few: pairs of groups of a level that all are scored, whoever asks for them."""
    from farfield.kernels import opened_search

    before = opened_search.FEW, opened_search.SCORED
    if few is not None:
        opened_search.FEW, opened_search.SCORED = few, 0
    try:
        both(ff.FMA(**{"near": 64, "rank": 4, "open": 3, "sinks": 3} | options).to("cuda"), qkv(tokens, width=width))
    finally:
        opened_search.FEW, opened_search.SCORED = before


def further(tokens=1531, **options):
    """A prompt in chunks, with groups opened."""
    mech, state = ff.FMA(**{"near": 64, "rank": 4, "open": 3, "sinks": 3} | options), None
    x, at = [y.detach() for y in qkv(tokens, dtype=torch.bfloat16, width=64)], 0
    with torch.no_grad():
        for n in (700, 1, 500, tokens - 1201):
            out, state = mech.extend(*(y[:, :, at : at + n] for y in x), state)
            assert out.isfinite().all()
            at += n


def hip(dtype=torch.bfloat16, **options):
    both(ff.mechanisms.make("hip", keep=32, sinks=3, width=20, **options), qkv(530, dtype=dtype))


SUITE = {
    "control": control,
    "fma": fma,
    "fma, block 64": lambda: fma(400, block=64, near=64),
    "fma, block 128, width 128": lambda: fma(700, block=128, near=128, rank=16, width=128),
    "fma, a walk": lambda: other("fma", kv_heads=4, tokens=2100, near=64, rank=4),
    "fma, a walk of two tiles": lambda: other("fma", heads=1, kv_heads=1, tokens=66_000, near=64, rank=4),
    "fma, near and far": lambda: other("fma", kv_heads=4, tokens=2100, block=128, near=128, rank=16),
    "fma, far, width 128": lambda: other("fma", kv_heads=4, tokens=2100, width=128, block=128, near=128, rank=16),
    "fma, opened": opened,
    "fma, opened, by parents": lambda: opened(few=2, beam=3),
    "fma, opened, peaks, heads apart, width 128": lambda: opened(width=128, score="peak", detail=4, shared=False),
    "fma, opened, runs": lambda: opened(few=2, hold=64, tokens=2100, open=8),
    "fma, opened, runs, width 128": lambda: opened(hold=64, tokens=2100, open=8, width=128, segments="sum"),
    "fma, opened, few in runs": lambda: opened(hold=64),
    "fma, opened, runs of two heads": lambda: opened(hold=32, tokens=2100, open=8),
    "fma, opened, runs of two heads, width 128": lambda: opened(hold=32, tokens=2100, open=8, width=128),
    "fma, opened, in chunks": further,
    "fma, opened, in chunks, runs": lambda: further(hold=64, tokens=2100),
    "fma, float32": lambda: fma(dtype=torch.float32),
    "fma, float16, sinks": lambda: fma(dtype=torch.float16, sinks=3),
    "fma, widths 80 and 40": lambda: fma(width=80, value_width=40),
    "fma, noncausal": lambda: fma(causal=False),
    "fma, learned": lambda: fma(pool="learned"),
    "blocks of 128, width 64": lambda: blocks(128, 64),
    "blocks of 128, width 128": lambda: blocks(128, 128),
    "blocks of 64, width 64": lambda: blocks(64, 64),
    "blocks of 64, width 128": lambda: blocks(64, 128),
    "blocks of 32, float32": lambda: blocks(32, 64, torch.float32),
    "everything": everything,
    "hip": lambda: hip(q_block=16, k_block=8, q_stride=2, k_stride=4),
    "hip, single rows, float32": lambda: hip(torch.float32, q_block=3, k_block=1, q_stride=1, k_stride=1, beam=1),
    "s2-attention": lambda: other("s2-attention", tokens=3000),
    "power-attention": lambda: other("power-attention", tokens=3000),
    "scfa, hash": lambda: other("scfa", tokens=1531, kv_heads=4),
    "scfa, two hashes": lambda: other("scfa", tokens=1531, kv_heads=4, shared=False),
    "scfa, drop": lambda: other("scfa", tokens=1531, kv_heads=4, choose="drop"),
    "nsa": lambda: other("nsa", tokens=1531, width=64, kv_heads=1),
    "moba": lambda: other("moba", tokens=1531, block=64),
    "moba-own": lambda: other("moba", tokens=1531, block=256),
    "ssa": lambda: other("ssa", tokens=1531),
    "lightning-attention": lambda: other("lightning-attention", tokens=1531, kv_heads=4),
    "lightning-attention, float32": lambda: other("lightning-attention", torch.float32, kv_heads=4, width=128),
    "aaren": lambda: other("aaren", tokens=1531, kv_heads=4),
    "decode": decode,
    "decode, one sequence, sinks": lambda: decode(batch=1, sinks=3),
    "decode, float32": lambda: decode(dtype=torch.float32),
}


def main() -> int:
    chosen = sys.argv[1:] or [name for name in SUITE if name != "control"]
    failed = 0
    for name in chosen:
        torch.manual_seed(0)
        try:
            SUITE[name]()
            torch.cuda.synchronize()
            print(f"ran     {name}", flush=True)
        except Exception:
            failed += 1
            print(f"failed  {name}: {traceback.format_exc().splitlines()[-1]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
