"""FMA as one operation: the bits of the general path, whatever surrounds the call."""

import random
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import farfield as ff
from farfield.kernels import multipole_hopper
from farfield.ops import multipole as op
from farfield.testing import contract, inputs
from farfield.testing.units import assert_within

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

OPTIONS: dict[str, Any] = {"block": 64, "near": 64, "rank": 4}


def qkv(tokens, *, batch=1, heads=4, kv_heads=2, width=64, dtype=torch.bfloat16, seed=0):
    gen = torch.Generator(device="cuda").manual_seed(seed)
    shapes = ((batch, h, tokens, width) for h in (heads, kv_heads, kv_heads))
    return [torch.randn(s, generator=gen, device="cuda").to(dtype).requires_grad_() for s in shapes]


def run(f, x, seed=9):
    out = f(*x)
    gen = torch.Generator(device="cuda").manual_seed(seed)
    grad = torch.randn(out.shape, generator=gen, device="cuda").to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, x, grad)


@pytest.fixture
def general(monkeypatch):
    """Runs a call on the general path, whose forward the operation has here as well."""
    monkeypatch.setattr(multipole_hopper, "wants", lambda *given: False)
    op.forget()

    def call(f, x, **more):
        with monkeypatch.context() as patch:
            patch.setattr(op, "again", lambda *given: None)
            patch.setattr(op, "refusal", lambda *given: "not here")
            return run(f, x, **more)

    yield call
    op.forget()


def equal(got, want):
    """Gradients, or the result and its gradients."""
    names = ("out", "dq", "dk", "dv")[-len(got) :]
    for name, a, b in zip(names, got, want, strict=True):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} values differ"


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, {"tokens": 3000, "batch": 2}),
        (OPTIONS, {"tokens": 2048, "heads": 8, "kv_heads": 4, "width": 128}),
        ({**OPTIONS, "sinks": 3}, {"tokens": 1511, "width": 128, "dtype": torch.float16}),
        ({"block": 128, "near": 256, "rank": 32, "sinks": 100}, {"tokens": 5001, "scale": 0.3}),
        ({"block": 64, "near": 192, "rank": 1}, {"tokens": 257}),
        (OPTIONS, {"tokens": 129}),
    ],
    ids=str,
)
def test_the_general_path_has_the_same_bits(general, options, sizes):
    sizes = dict(sizes)
    mech = ff.FMA(**options, scale=sizes.pop("scale", None))
    for seed in range(3):
        x = qkv(**sizes, seed=seed)
        assert "Multipole" in type(mech(*x).grad_fn).__name__
        equal(run(mech, x), general(mech, x))


# the first block alone has a far field; a last block of one row; levels of one group and of two; more units than
# programs; heads that share keys; further tiles of far rows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads"),
    [(257, 2, 2), (320, 1, 1), (1500, 4, 2), (4095, 2, 2), (2049, 48, 24), (66_001, 1, 1)],
)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("block", "near", "rank"), [(64, 64, 4), (128, 128, 16), (64, 128, 16)])
def test_a_forward_that_follows_from_the_tree(block, near, rank, width, tokens, heads, kv_heads, dtype, monkeypatch):
    calls, forward = [], multipole_hopper.forward
    monkeypatch.setattr(multipole_hopper, "forward", lambda *given: calls.append(given) or forward(*given))
    op.forget()
    mech = ff.FMA(block=block, near=near, rank=rank)
    x = [torch.randn(2, tokens, h, width, device="cuda").transpose(1, 2).to(dtype) for h in (heads, kv_heads, kv_heads)]
    got = mech(*x)
    assert calls, "other kernels have taken the call"
    assert_within(got, mech(*(t.double() for t in x)), terms=tokens, name="out")
    for _ in range(20):
        assert torch.equal(mech(*x), got)


@pytest.mark.parametrize("sign", [1, -1], ids=["rise", "fall"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("block", "near", "rank"), [(64, 64, 4), (128, 128, 16), (64, 128, 16)])
def test_logits_that_rise_and_fall(block, near, rank, width, sign):
    """Peaks of the running softmax move from tile to tile, some by less than they may lag behind, some by more."""
    x = [torch.randn(2, 2, 3001, width, device="cuda").bfloat16() for _ in range(3)]
    x[0][..., 0] = 16
    # exact in 16 bits, and so are the means of its groups
    x[1][..., 0] = sign * (torch.arange(3001, device="cuda") // 128)
    mech = ff.FMA(block=block, near=near, rank=rank)
    assert_within(mech(*x), mech(*(t.double() for t in x)), terms=3001, name="out")


def test_any_lengths_in_any_order(general):
    """Plans come and go; none is mistaken for another."""
    pick, mech = random.Random(0), ff.FMA(**OPTIONS)
    op.forget()
    lengths = [pick.randint(129, 6000) for _ in range(20)]
    wanted = {n: mech(*qkv(n)).detach() for n in lengths}
    for n in (pick.choice(lengths) for _ in range(100)):
        assert torch.equal(mech(*qkv(n)), wanted[n])
    for n in range(200, 200 + 2 * op.KEPT):
        mech(*qkv(n))
        assert len(op._plans) <= op.KEPT
    assert torch.equal(general(mech, qkv(lengths[0]))[0], wanted[lengths[0]])


def test_inputs_in_one_buffer_and_one_input_thrice(general):
    mech = ff.FMA(**OPTIONS)
    op.forget()
    same = qkv(1000, kv_heads=4)[0]
    together = torch.randn(1, 1000, 3, 4, 64, device="cuda").bfloat16()
    apart = [x.transpose(1, 2) for x in together.unbind(2)]
    # recorded with one tensor for all, and used with three
    first = mech(same, same, same)
    x = qkv(1000, kv_heads=4, seed=1)
    for given in (x, apart, (same, same, same)):
        assert torch.equal(mech(*given), general(mech, [t.detach().clone().requires_grad_() for t in given])[0])
    assert torch.equal(first, mech(same, same, same))


def test_addresses_that_kernels_cannot_read():
    mech, (q, k, v) = ff.FMA(**OPTIONS), qkv(1000)
    want = run(mech, (q, k, v))
    buffer = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")
    shifted = buffer[1:].view(q.shape)
    shifted.copy_(q.detach())
    assert shifted.data_ptr() % 16 == 2
    equal(run(mech, (shifted.requires_grad_(), k, v)), want)
    out = mech(q, k, v)
    grad = torch.ones((), device="cuda", dtype=out.dtype).expand(out.shape)
    equal(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(mech(q, k, v), (q, k, v), grad.contiguous()))


def test_streams_do_not_share_what_they_make():
    mech, x = ff.FMA(**OPTIONS), qkv(20_000)
    want = run(mech, x)
    for _ in range(5):
        op.forget()
        streams = [torch.cuda.Stream() for _ in range(3)]
        found = []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(run(mech, x))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        for got in found:
            equal(got, want)


def test_a_graph_holds_no_memory_that_is_given_back():
    """Captured with plans at hand; replayed when they are gone and their memory is full of other things."""
    mech, x = ff.FMA(**OPTIONS), qkv(3000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(mech, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mech(*x)
        grads = torch.autograd.grad(out, x, torch.ones_like(out))
    op.forget()
    junk = [torch.full((1 << 14,), 7, dtype=torch.int32, device="cuda") for _ in range(200)]
    for t, new in zip(x, qkv(3000, seed=5), strict=True):
        t.data.copy_(new.detach())
    graph.replay()
    want = mech(*x)
    equal([out, *grads], [want.detach(), *torch.autograd.grad(want, x, torch.ones_like(want))])
    del junk


def test_scratch_memory_is_written_before_it_is_read():
    mech, x = ff.FMA(**OPTIONS), qkv(1500)
    want = run(mech, x)
    with inputs.on("cuda"), contract.poisoned_memory():
        for _ in range(2):
            equal(run(mech, x), want)


def test_checkpointing_and_autocast():
    mech, x = ff.FMA(), qkv(1500)
    want = run(mech, x)
    equal(run(lambda *x: checkpoint(mech, *x, use_reentrant=False), x), want)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        equal(run(mech, x), want)


def test_second_derivatives_are_refused():
    q, k, v = qkv(500)
    (grad,) = torch.autograd.grad(ff.FMA(**OPTIONS)(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), q)


def test_the_operation_passes_pytorchs_checks():
    q, k, v = qkv(300)
    # not what compares numbers: of the buffer that is kept some bytes are never written
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.farfield.multipole, (q, k, v, *op.Field(64, 64, 4, 0), 0.125), test_utils=checks)
