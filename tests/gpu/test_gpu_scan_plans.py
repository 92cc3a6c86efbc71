"""scan and averages as recorded launches on the GPU: the bits of the ordinary way, whatever surrounds the call."""

import random
from unittest import mock

import pytest
import torch

import farfield as ff
from farfield.mechanisms.aaren import Aaren
from farfield.mechanisms.lightning_attention import LightningAttention
from farfield.testing import contract, inputs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import farfield.ops.scan as op
from farfield.kernels import plans, replay
from farfield.ops import averages
from farfield.ops.known import Memory

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEEPING = op, averages, plans
LAYERS = [LightningAttention(), Aaren()]
NAMES = ["lightning-attention", "aaren"]


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Nothing known yet."""
    for ops in (op, averages):
        monkeypatch.setattr(ops, "_memory", Memory(ops._memory.most))
    monkeypatch.setattr(plans, "_memory", Memory(plans.KEPT))


@pytest.fixture
def ordinary(monkeypatch):
    """Runs a call without recordings."""

    def call(f, *given):
        with monkeypatch.context() as patch:
            patch.setattr(plans, "run", lambda known, function, tensors, *options: function(*tensors, *options))
            return f(*given)

    return call


def recordings():
    found = [x.run for memory in (x._memory for x in KEEPING) for x in memory.known.values() if x.run is not None]
    return [type(x) for x in found]


def draw(seed=0, tokens=1000, heads=4, groups=2, width=64, value_width=None, dtype=BF16, by_token=True):
    gen = torch.Generator(device="cuda").manual_seed(seed)
    found = []
    for h, w in ((heads, width), (groups, width), (groups, value_width or width), (heads, value_width or width)):
        shape = (2, tokens, h, w) if by_token else (2, h, tokens, w)
        x = torch.randn(shape, generator=gen, device="cuda").to(dtype)
        found.append(x.transpose(1, 2) if by_token else x)
    *leaves, grad = found
    return [x.requires_grad_() for x in leaves], grad


def both(f, leaves, grad):
    """out and all gradients."""
    out = f(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad)


def equal(got, want, what=""):
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a, b), f"{what} result {n}: {int((a != b).sum())} of {a.numel()} values differ"


def problem(seed):
    """A random signature: makes calls of it, each with other numbers."""
    pick = random.Random(seed)
    groups, width = pick.choice([1, 2]), pick.choice([64, 64, 128, 24])
    sizes = {
        "tokens": pick.choice([1, 65, 256, 5001]), "groups": groups, "heads": groups * pick.choice([1, 2, 3]),
        "width": width, "value_width": pick.choice([width, width, 128, 40]),
        "dtype": pick.choice([BF16, BF16, BF16, FP16, FP32]), "by_token": pick.random() < 0.5,
    }  # fmt: skip
    return lambda turn: draw(turn, **sizes)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mech", LAYERS, ids=NAMES)
def test_the_ordinary_way_has_the_same_bits(mech, seed, ordinary):
    make = problem(seed)
    for turn in range(4):
        leaves, grad = make(turn)
        equal(both(mech, leaves, grad), ordinary(both, mech, leaves, grad), f"turn {turn},")
        with torch.no_grad():
            equal([mech(*leaves)], [ordinary(mech, *leaves)], f"turn {turn}, no gradients,")


@pytest.mark.parametrize("seed", range(6))
def test_states_and_decays_that_are_given(seed, ordinary):
    make = problem(seed)

    def run(leaves, grad, decay, state, d_end):
        q, k, v = leaves
        out, end = ff.scan(q, k, v, decay, state)
        return out, end, *torch.autograd.grad((out, end), [*leaves, state], (grad, d_end))

    for turn in range(4):
        leaves, grad = make(turn)
        q, _, v = leaves
        gen = torch.Generator(device="cuda").manual_seed(turn)
        shape = *q.shape[:2], q.shape[3], v.shape[3]
        state, d_end = (torch.randn(shape, generator=gen, device="cuda") for _ in range(2))
        decay = -torch.rand(q.shape[1], generator=gen, device="cuda") / 10
        given = leaves, grad, decay, state.requires_grad_(), d_end
        equal(run(*given), ordinary(run, *given), f"turn {turn},")


@pytest.mark.parametrize("mech", LAYERS, ids=NAMES)
def test_both_passes_are_recorded(mech):
    with mock.patch.object(op.Decays, "of", autospec=True, side_effect=op.Decays.of) as makes:
        for seed in range(5):
            both(mech, *draw(seed, groups=4))
    assert recordings() == [replay.Recorded] * 2
    # at the first two calls of each pass
    assert makes.call_count == (4 if mech is LAYERS[0] else 0)
    with torch.no_grad():
        for seed in range(3):
            mech(*draw(seed, groups=4)[0])
    assert recordings() == [replay.Recorded] * 3


@pytest.mark.parametrize("mech", LAYERS, ids=NAMES)
def test_addresses_that_kernels_cannot_read(mech, ordinary):
    for turn in range(4):
        leaves, grad = draw(turn)
        if turn % 2:
            buffer = torch.empty(leaves[1].numel() + 1, dtype=BF16, device="cuda")
            leaves[1] = buffer[1:].view(leaves[1].shape).copy_(leaves[1].detach()).requires_grad_()
            assert leaves[1].data_ptr() % 16 == 2
        equal(both(mech, leaves, grad), ordinary(both, mech, leaves, grad), f"turn {turn},")


@pytest.mark.parametrize("mech", LAYERS, ids=NAMES)
def test_one_tensor_for_all_and_one_number_for_all(mech, ordinary):
    ones = torch.ones((), device="cuda", dtype=BF16).expand(2, 4, 1000, 64)
    for turn in range(4):
        leaves, _ = draw(turn)
        equal(both(mech, leaves, ones), ordinary(both, mech, leaves, ones), f"turn {turn},")
        one = [leaves[0].detach()] * 3
        equal([mech(*one)], [ordinary(mech, *one)], f"turn {turn}, one tensor,")


@pytest.mark.parametrize("mech", LAYERS, ids=NAMES)
def test_a_graph_of_a_training_step(mech, ordinary):
    leaves, grad = given = draw()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both(mech, *given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(mech, *given)
    # the graph reads nothing that is kept
    for ops in KEEPING:
        ops._memory.forget()
    with inputs.on("cuda"), contract.poisoned_memory():
        for seed in (1, 2):
            new, new_grad = draw(seed)
            with torch.no_grad():
                for a, b in zip((*leaves, grad), (*new, new_grad), strict=True):
                    a.copy_(b)
            graph.replay()
            equal(found, ordinary(both, mech, *given), f"seed {seed},")


@pytest.mark.parametrize("mech", LAYERS, ids=NAMES)
def test_streams_and_poisoned_memory(mech, ordinary):
    given = draw(tokens=5000)
    want = ordinary(both, mech, *given)
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [both(mech, *given) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        for got in found:
            equal(got, want)
    with inputs.on("cuda"), contract.poisoned_memory():
        for _ in range(3):
            equal(both(mech, *given), want)


@pytest.mark.parametrize("mech", LAYERS, ids=NAMES)
def test_the_compiled_call_agrees(mech, ordinary):
    leaves, grad = draw()
    want = ordinary(both, mech, leaves, grad)
    torch._dynamo.reset()
    traced = torch.compile(mech, fullgraph=True)
    for _ in range(4):
        got = both(traced, leaves, grad)
        # decays and queries are made by other kernels there
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 2**-6 * b.abs().max()
