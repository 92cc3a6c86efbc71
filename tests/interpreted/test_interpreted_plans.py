"""Recorded calls of attend and pool, replayed in the interpreter: the bits of the ordinary way, whatever the lists."""

import ctypes
import os
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from farfield.kernels import attend_backward, launch, plans, pool, replay
from farfield.kernels.lists import build
from farfield.ops.attend import Call, Plan
from farfield.ops.known import Memory
from farfield.ops.pool import Tree
from farfield.testing.contract import poisoned_memory


class Made:
    """In place of a compiled kernel: launched by addresses."""

    function = packed_metadata = None

    def __init__(self, kernel, run, args, options):
        self.kernel, self.interpret, self.options = kernel, run, options
        self.dtypes = [x.dtype if isinstance(x, torch.Tensor) else None for x in args]

    def run(self, *given):
        grid, values = given[:3], given[9:]
        args = [x if d is None else at(x, d) for x, d in zip(values, self.dtypes, strict=False)]
        self.interpret(self.kernel, *args, grid=grid, warmup=False, **self.options)


def at(address, dtype):
    """A tensor of what lies there; the interpreter takes nothing but its address."""
    if not address:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """Recordings without a device; yields the functions that are recorded."""
    interpret = InterpretedFunction.run

    def run(kernel, *args, grid, warmup, **options):
        with _disable_current_modes():
            interpret(kernel, *args, grid=grid, warmup=warmup, **options)
        return Made(kernel, interpret, args, options)

    names = property(lambda kernel: [SimpleNamespace(name=name) for name in kernel.arg_names])
    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(InterpretedFunction, "params", names, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(replay, "_stream", lambda device: 0)
    monkeypatch.setattr(plans, "_on_gpu", lambda x: True)
    monkeypatch.setattr(plans, "_memory", Memory(plans.KEPT))
    with mock.patch.object(replay, "record", wraps=replay.record) as record:
        yield record


def problem(seed):
    """Calls of one signature, each with other numbers and other lists, and the gradients of out and lse."""
    pick, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, tokens, width = pick.choice([1, 2]), pick.choice([1, 2]), pick.choice([7, 17]), 16
    heads, q_block = kv_heads * pick.choice([1, 2]), pick.choice([5, 16])
    blocks, dtype = -(-tokens // q_block), pick.choice([torch.float32, torch.float16])
    about, grouped, positioned, lse = [], pick.random() < 0.3, pick.random() < 0.3, pick.random() < 0.5
    for _ in range(pick.choice([1, 2])):
        k_block = pick.choice([1, 4, 16, 32])
        rows = 2 * k_block + pick.choice([0, 1])
        plan = Plan(q_block, k_block, pick.randint(0, 1), pick.choice([-1, 9]), pick.choice([0, 3]))
        lead = pick.choice([1, batch]), pick.choice([1, heads])
        about.append((rows, plan, lead, pick.choice([None, 1, heads]), pick.random() < 0.4))

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=gen).to(dtype)

    def whole(high, *shape):
        return torch.randint(0, high, shape, generator=gen)

    def make():
        none, found = torch.empty(0, dtype=dtype), []
        for rows, plan, lead, biased, ended in about:
            row_blocks = -(-rows // plan.k_block)
            index = torch.rand(*lead, blocks, row_blocks, generator=gen).argsort(-1)
            count = torch.randint(0, row_blocks + 1, (*lead, blocks), generator=gen, dtype=torch.int32)
            found.append((
                draw(batch, rows, kv_heads, width).transpose(1, 2), draw(batch, kv_heads, rows, width),
                none if biased is None else draw(1, biased, rows, dtype=torch.float32),
                whole(40, 1, kv_heads, rows) if ended else none, whole(2, 1, 1, rows) if grouped else none,
                index.sort(-1).values.to(torch.int32), count,
            ))  # fmt: skip
        k, v, bias, end, row_group, index, count = (list(x) for x in zip(*found, strict=True))
        position = whole(40, 1, 1, tokens) if positioned else none
        group = whole(2, batch, 1, tokens) if grouped else none
        q, d_out = draw(batch, heads, tokens, width), draw(batch, tokens, heads, width).transpose(1, 2)
        d_lse = draw(batch, heads, tokens, dtype=torch.float32) if lse else None
        listed = [plan for _, plan, *_ in about]
        return Call(q, k, v, bias, end, row_group, position, group, index, count, listed, 0.25), d_out, d_lse

    return make


def equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_replayed_calls_of_attend_have_the_same_bits(seed, simulated):
    make = problem(seed)
    for turn in range(3):
        call, d_out, d_lse = make()
        out, lse = launch.attend_forward(call)
        want = attend_backward.attend_backward(call, d_out, d_lse, out, lse, True)
        with poisoned_memory():
            equal(plans.forward(call), (out, lse))
            equal(plans.backward(call, d_out, d_lse, out, lse, True), want)
        # what is sorted is a recording of its own; readers that are counted need no sort
        assert simulated.call_count == ((2 if attend_backward.counts(call) else 3) if turn else 0)
    assert all(isinstance(known.run, replay.Recorded) for known in plans._memory.known.values())


def test_bias_gradients_are_part_of_the_signature():
    call, d_out, d_lse = problem(1)()
    assert any(x.dim() > 1 for x in call.bias), "choose another seed"
    out, lse = launch.attend_forward(call)
    for asked in (True, False) * 3:
        want = attend_backward.attend_backward(call, d_out, d_lse, out, lse, asked)
        equal(plans.backward(call, d_out, d_lse, out, lse, asked), want)


def test_what_is_copied_on_the_way_is_not_recorded(simulated):
    call, d_out, d_lse = problem(4)()
    wide = call.q.new_empty(*call.q.shape[:3], 32)[..., ::2].copy_(call.q)
    call = call._replace(q=wide)
    want = launch.attend_forward(call)
    for _ in range(4):
        equal(plans.forward(call), want)
    assert simulated.call_count == 1
    # a gradient of one number for all, which no kernel reads, is copied before
    ones = torch.ones((), dtype=d_out.dtype).expand(d_out.shape)
    call, _, d_lse = problem(4)()
    for _ in range(3):
        want_grads = attend_backward.attend_backward(call, ones, d_lse, *want, True)
        equal(plans.backward(call, ones, d_lse, *want, True), want_grads)
    assert simulated.call_count == 2


@pytest.mark.parametrize("learned", [False, True])
def test_replayed_calls_of_pool_have_the_same_bits(learned, simulated):
    gen, tree = torch.Generator().manual_seed(0), Tree(8, 4, 11, 3, True, 3, 90)

    def draw(*shape):
        return torch.randn(shape, generator=gen)

    for turn in range(3):
        k, v, near = draw(1, 95, 2, 16).transpose(1, 2), draw(1, 2, 95, 24), draw(1, 2, 95, 16)
        filters = draw(2, 2, 4, 8) if learned else torch.empty(0)
        far_k, far_v, bias, span = pool.forward(k, v, filters, tree)
        none, kept = torch.empty(0), (far_k, far_v) if learned else (torch.empty(0),) * 2
        given = near, none, draw(*far_k.shape), draw(*far_v.shape), *kept, filters, 95, tree
        want = pool.backward(*given)
        with poisoned_memory():
            equal(plans.pooled(k, v, filters, tree), (far_k, far_v, bias, span))
            equal(plans.pool_backward(*given), want)
        assert simulated.call_count == (2 if turn else 0)


def test_replayed_lists_are_new_ones(simulated):
    device = torch.device("cpu")
    for blocks in (9, 12) * 4:
        about = 0, blocks, (1, 1, 1), (0, 4), True, 0, 0
        found = plans.lists(build, *about, device=device)
        equal(found, build(*about, device))
        # nobody else has them
        for x in found:
            x.fill_(-1)
    assert simulated.call_count == 2
