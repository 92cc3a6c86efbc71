"""scfa on a GPU: the calls that are recorded, against its reference in float64."""

import pytest
import torch

from farfield import mechanisms
from farfield.ops import hashed as ops
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

VARIANTS = {"hash": {}, "two-hashes": {"shared": False}, "drop": {"choose": "drop"}}


def draw(tokens, width, seed=0):
    gen = torch.Generator(device="cuda").manual_seed(seed)
    return [torch.randn(2, tokens, 3, width, generator=gen, device="cuda").bfloat16().transpose(1, 2) for _ in range(4)]


def run(f, q, k, v, d_out):
    x = [t.detach().requires_grad_() for t in (q, k, v)]
    out = f(*x)
    return out.detach(), *torch.autograd.grad(out, x, d_out)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("tokens", "width"), [(1531, 64), (1024, 128), (1, 64)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_reference(variant, tokens, width, block):
    """Twice: recorded, and replayed on other numbers."""
    mech = mechanisms.make("scfa", block=block, **VARIANTS[variant])
    for seed in (0, 1):
        x = draw(tokens, width, seed)
        with torch.device("cuda"):
            exact = run(mech.reference, *(t.double() for t in x))
        for name, a, b in zip(("out", "dq", "dk", "dv"), run(mech, *x), exact, strict=True):
            if name in ("dq", "dk") and not b.any():
                continue  # what cancels to nothing has no size of its own
            assert_within(a, b, terms=tokens, name=f"{name}, seed {seed}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replay_repeats_and_a_graph_holds_the_same(variant):
    mech, x = mechanisms.make("scfa", **VARIANTS[variant]), draw(3000, 64)
    first = run(mech, *x)
    for name, a, b in zip(("out", "dq", "dk", "dv"), run(mech, *x), first, strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            mech(*x[:3])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mech(*x[:3])
        graph.replay()
    assert torch.equal(out, first[0])


@pytest.mark.parametrize("shared", [True, False])
def test_slots_are_those_of_the_cpu(shared):
    gen = torch.Generator().manual_seed(0)
    bucket, asking = (torch.randint(-1, 17, (2, 3, 5000), generator=gen, dtype=torch.int32) for _ in range(2))
    queries = None if shared else asking
    want = ops.slots(queries, bucket, 16, 128, strict=True)
    got = ops.slots(None if shared else asking.cuda(), bucket.cuda(), 16, 128, strict=True)
    for name in ("q_slot", "q_token", "k_slot", "k_token", "position", "count"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    used = torch.arange(want.index.shape[-1]) < want.count[..., None]
    assert torch.equal(got.index.cpu()[used], want.index[used])
