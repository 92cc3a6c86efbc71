"""What surrounds the kernels on a GPU: compilers, graphs, checkpointing, long offsets, memory that holds NaN."""

import random
from contextlib import contextmanager

import pytest
import torch
from drawn import draw, qkv
from torch.utils.checkpoint import checkpoint

import farfield as ff
from farfield.bench.fma import literal
from farfield.nn import Attention
from farfield.testing import contract, inputs
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(f, x, grad=None):
    """The output and the gradients of x."""
    out = f(*x)
    grad = draw(*out.shape, dtype=out.dtype, seed=9) if grad is None else grad
    return out.detach(), *torch.autograd.grad(out, x, grad)


def equal(got, want):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=False):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} values differ"


@contextmanager
def compilations():
    """The names of the Triton kernels compiled inside, whoever launches them."""
    from triton import knobs

    found, before = [], knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda *args, **about: found.append(about["repr"].partition("[")[0])
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before


@contextmanager
def poisoned():
    """Uninitialised memory holds NaN."""
    with inputs.on("cuda"), contract.poisoned_memory():
        yield


def in_nan(x):
    """The same numbers as a view inside a buffer of NaN."""
    b, h, t, d = x.shape
    buffer = torch.full((b + 2, t + 5, h + 2, d + 16), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[1:-1, 2:-3, 1:-1, 8:-8].transpose(1, 2)
    view.copy_(x.detach())
    return view


# compilation


def test_one_graph_for_all_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    mech, counter = ff.FMA(), CompileCounterWithBackend("inductor")
    compiled = torch.compile(mech, fullgraph=True, dynamic=True, backend=counter)
    # as many levels each
    for tokens in (2100, 2500, 4000):
        x = qkv(tokens)
        exact = run(mech, [t.detach().double().requires_grad_() for t in x])
        for name, a, b in zip(("out", "dq", "dk", "dv"), run(compiled, x), exact, strict=True):
            assert_within(a, b, terms=tokens, name=f"compiled {name} at {tokens}")
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_kernel_is_compiled_for_a_length(dtype):
    """Forward, backward, pool and lists over 50 lengths: a short and a long one compile, the others find all there."""
    mech, pick = ff.FMA(), random.Random(1)
    for tokens in (700, 20_000):
        run(mech, qkv(tokens, dtype=dtype))
    with compilations() as found:
        for tokens in (pick.randint(700, 20_000) for _ in range(50)):
            run(mech, qkv(tokens, dtype=dtype))
    assert not found, f"compiled again: {sorted(set(found))}"


def test_no_kernel_is_compiled_for_a_layout():
    """Random lists of any length and number."""
    pick = random.Random(2)

    def call(blocks, picks):
        x = qkv(blocks * 128, heads=2)
        index = torch.rand(1, 2, blocks, blocks, device="cuda").argsort(-1)[..., :picks].sort(-1).values.to(torch.int32)
        count = torch.full((1, 2, blocks), picks, dtype=torch.int32, device="cuda")
        layout = ff.Layout(index, count, 128, 128, blocks * 128, blocks * 128)
        run(lambda q, k, v: ff.attend(q, ff.Rows(k, v), layout).out, x)

    # the longest first: row blocks of many readers need a kernel more
    call(40, 4)
    call(9, 4)
    with compilations() as found:
        for _ in range(20):
            blocks = pick.randint(3, 40)
            call(blocks, pick.randint(2, blocks))
    assert not found, f"compiled again: {sorted(set(found))}"


def test_the_hook_counts():
    import triton
    import triton.language as tl

    @triton.jit
    def fill(x, VALUE: tl.constexpr):
        tl.store(x + tl.arange(0, 16), VALUE)

    x = torch.empty(16, device="cuda")
    with compilations() as found:
        for value in (1.0, 2.0, 1.0):
            fill[(1,)](x, value)
    assert len(found) == 2


# checkpointing and graphs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpointing_gives_the_same_gradients(dtype):
    mech, x = ff.FMA(), qkv(1500, dtype=dtype)
    equal(run(lambda *x: checkpoint(mech, *x, use_reentrant=False), x), run(mech, x))


def side_stream(call, times=3):
    """What must come before a capture: the call on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("pool", ["mean", "learned"])
def test_a_training_step_is_captured(pool):
    """Forward, backward and SGD of an attention layer in one graph: replays train as eager steps do."""
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        options = {"block": 64, "near": 64, "rank": 4, "pool": pool}
        layers.append(Attention(256, 4, options=options).cuda().bfloat16())
    x, target = draw(1, 1500, 256), draw(1, 1500, 256, seed=1)

    def step(layer, optimizer):
        optimizer.zero_grad(set_to_none=False)
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    eager, captured = ((layer, torch.optim.SGD(layer.parameters(), lr=0.1)) for layer in layers)
    side_stream(lambda: step(*captured))
    for _ in range(3):
        step(*eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*captured)
    for n in range(5):
        # new inputs where the graph reads them
        x.copy_(draw(*x.shape, seed=10 + n))
        want = step(*eager)
        graph.replay()
        assert torch.equal(loss, want), f"step {n}: {loss} replayed, {want} in eager"
    for (name, a), b in zip(captured[0].named_parameters(), eager[0].parameters(), strict=True):
        assert torch.equal(a, b), f"{name} differs"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_step_is_captured(batch):
    """One graph for every token, across block borders; the numbers of the whole sequence's forward."""
    mech, start, steps = ff.FMA(block=16, near=32, rank=4), 331, 150
    q, k, v = (x.detach() for x in qkv(start + steps, batch=batch, heads=8))
    _, state = mech.extend(*(x[:, :, :start] for x in (q, k, v)))
    rings = [mech.ring(state, capacity=4096) for _ in range(2)]
    token = [x[:, :, :1].clone() for x in (q, k, v)]

    side_stream(lambda: mech.step(*token, rings[0].copy()))
    graph, graphed = torch.cuda.CUDAGraph(), rings[0]
    with torch.cuda.graph(graph):
        out = mech.step(*token, graphed)
    made = []
    for t in range(start, start + steps):
        for here, x in zip(token, (q, k, v), strict=True):
            here.copy_(x[:, :, t : t + 1])
        graph.replay()
        assert torch.equal(out, mech.step(*token, rings[1])), f"token {t}: replay and eager differ"
        made.append(out.clone())
    exact = mech(*(x.double() for x in (q, k, v)))
    assert_within(torch.cat(made, 2), exact[:, :, start:], terms=start + steps)


# where it is read and written


def test_offsets_beyond_two_to_the_31():
    """Two heads at the far end of [1, n, 17, 64] buffers: elements up to 2.3e9, among NaN."""
    tokens, heads, width = 1 << 21, 17, 64
    q, k, v = (torch.full((1, tokens, heads, width), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in "qkv")
    for i, x in enumerate((q, k, v)):
        x[:, :, -2:] = draw(1, tokens, 2, width, seed=i)
    x = [t.transpose(1, 2)[:, -2:].requires_grad_() for t in (q, k, v)]
    assert x[0].storage_offset() + (tokens - 1) * x[0].stride(2) > 2**31
    options = {"block": 64, "near": 64, "rank": 4}
    mech = ff.FMA(**options)
    out = mech(*x)
    pick = random.Random(0)
    sampled = sorted({0, tokens - 1, tokens // 2, *(pick.randrange(tokens) for _ in range(61))})
    wide = [t.detach().double() for t in x]
    exact = torch.cat([literal(*wide, i, **options) for i in sampled], 2)
    assert_within(out[:, :, sampled], exact, terms=tokens)

    few = sampled[::16]
    given = torch.zeros_like(out)
    given[:, :, few] = 1
    grads = torch.autograd.grad(out, x, given)
    wide = [t.requires_grad_() for t in wide]
    for i in few:
        literal(*wide, i, **options).sum().backward()
    for name, got, right in zip("qkv", grads, wide, strict=True):
        assert_within(got, right.grad, terms=tokens, name=f"d{name}")


def test_one_list_of_single_rows_beyond_two_to_the_31():
    rows, width = 1 << 21, 1088
    buffer = torch.zeros(1, 1, rows, width, dtype=torch.bfloat16, device="cuda")
    k = buffer[..., -64:]
    k.copy_(draw(1, 1, rows, 64))
    q = draw(1, 1, 64, 64, seed=1)
    index = (rows - 1 - 37 * torch.arange(500, device="cuda")).flip(0).to(torch.int32)[None, None, None]
    count = torch.full((1, 1, 1), 500, dtype=torch.int32, device="cuda")
    layout = ff.Layout(index, count, 64, 1, 64, rows)
    x = [t.requires_grad_() for t in (q, k)]
    out = ff.attend(q, ff.Rows(k, k), layout).out
    read = k[:, :, index[0, 0, 0].long()].detach().double().requires_grad_()
    ask = q.detach().double().requires_grad_()
    exact = (ask @ read.mT / 8).softmax(-1) @ read
    assert_within(out, exact, terms=500)
    d_q, d_k = torch.autograd.grad(out.sum(), x)
    right_q, right_k = torch.autograd.grad(exact.sum(), (ask, read))
    assert_within(d_q, right_q, terms=500, name="dq")
    at = index[0, 0, 0].long()
    assert_within(d_k[:, :, at], right_k, terms=500, name="dk")
    d_k[:, :, at] = 0
    assert not d_k.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"sinks": 3}, {"block": 16, "near": 32, "rank": 4}, {"causal": False}], ids=str
)
def test_nothing_unwritten_is_read_and_nothing_around_is_used(dtype, options):
    mech, x = ff.FMA(**options), qkv(777, batch=2, dtype=dtype)
    grad = draw(2, 4, 777, 64, dtype=dtype, seed=9)
    want = run(mech, x, grad)
    with poisoned():
        equal(run(mech, [in_nan(t).requires_grad_() for t in x], in_nan(grad)), want)


def test_decoding_reads_nothing_unwritten():
    mech = ff.FMA(block=16, near=32, rank=4, sinks=2)
    q, k, v = (x.detach() for x in qkv(200, batch=2, heads=8))

    def decode():
        _, state = mech.extend(*(x[:, :, :90] for x in (q, k, v)))
        ring = mech.ring(state, capacity=1024)
        return torch.cat([mech.step(*(x[:, :, t : t + 1] for x in (q, k, v)), ring) for t in range(90, 200)], 2)

    want = decode()
    with poisoned():
        equal([decode()], [want])


# nothing to read


def nothing(kind, tokens, rows):
    """Sources that no query can see anything of."""
    blocks = -(-tokens // 64)
    index = torch.zeros(1, 1, blocks, 0 if kind == "no entries" else 2, dtype=torch.int32, device="cuda")
    if index.shape[-1]:
        index[..., 1] = 1
    # what lies behind the count is never used
    junk = kind == "count 0"
    count = torch.full((1, 1, blocks), 0 if junk else index.shape[-1], dtype=torch.int32, device="cuda")
    if junk:
        index += 1 << 30
    layout = ff.Layout(index, count, 64, 64, tokens, rows, causal=kind == "future")
    extra = {}
    if kind == "hidden":
        extra["bias"] = torch.full((rows,), float("-inf"), device="cuda")
    if kind == "future":
        extra["end"] = torch.full((rows,), tokens, device="cuda")
    if kind == "other group":
        extra["group"] = torch.ones(rows, dtype=torch.int64, device="cuda")
    return layout, extra


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 100, 300])
@pytest.mark.parametrize("kind", ["no entries", "count 0", "hidden", "future", "other group"])
def test_queries_that_read_nothing(kind, tokens, dtype):
    layout, extra = nothing(kind, tokens, 128)
    q, k, v = draw(2, 4, tokens, 64, dtype=dtype), *(draw(2, 2, 128, 64, dtype=dtype, seed=i) for i in (1, 2))
    x = [t.requires_grad_() for t in (q, k, v)]
    group = torch.zeros(tokens, dtype=torch.int64, device="cuda") if kind == "other group" else None
    with poisoned():
        part = ff.attend(q, ff.Rows(k, v, **extra), layout, group=group)
        grads = torch.autograd.grad(part.out.sum(), x)
    assert (part.out == 0).all()
    assert (part.lse == float("-inf")).all()
    for name, grad in zip("qkv", grads, strict=True):
        assert (grad == 0).all(), f"d{name} is not 0"


@pytest.mark.parametrize("repeats", [250])
def test_repeats_are_bitwise_equal(repeats):
    mech, x = ff.FMA(), qkv(3000, batch=2)
    first = run(mech, x)
    for _ in range(repeats):
        equal(run(mech, x), first)
