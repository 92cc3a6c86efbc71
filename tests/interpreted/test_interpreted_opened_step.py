"""A decoding step of opened FMA in the interpreter: what is kept, what is listed and what is fetched, as in PyTorch."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import opened_step as kernels
from farfield.mechanisms.fma import FMA
from farfield.ops import opened_step as on_gpu
from farfield.select import opened_step as op
from farfield.testing.units import assert_within

CASES = {
    "together": {"open": 2, "detail": 4},
    "apart": {"open": 2, "sinks": 3, "detail": 2, "shared": False},
    "sums": {"open": 3, "beam": 3, "segments": "sum", "detail": 8, "sinks": 16},
    "held": {"open": 2, "hold": 4, "detail": 1},
    "a horizon": {"open": 2, "sinks": 3, "detail": 4, "horizon": 128},
    "a horizon of many groups": {"open": 1, "beam": 2, "detail": 4, "horizon": 256},
}


# programs a list from how many on, and bytes of sketches that are scored at once
FORMS = {"one program": (99, 0), "a launch a level": (1, 0), "all at once": (1, 1e9)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_pytorch(name, form, monkeypatch):
    # several rounds on a level
    monkeypatch.setattr(kernels, "ROWS", 16)
    monkeypatch.setattr(kernels, "SHARED_ROWS", 16)
    for constant, value in zip(("FEWEST", "AT_ONCE"), FORMS[form], strict=True):
        monkeypatch.setattr(kernels, constant, value)
    options = CASES[name]
    mech = FMA(block=16, near=16, rank=4, **options)
    gen = torch.Generator().manual_seed(0)
    x = [torch.randn(1, n, 420, 16, generator=gen).half().float() for n in (4, 2, 2)]
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :383] for y in x))
    ring = mech.ring(state, capacity=440, heads=4)
    other = ring.copy()
    # token 384 opens a block with which groups of eight blocks are complete
    for t in range(383, 391):
        q, k, v = (y[:, :, t : t + 1] for y in x)
        for each, run in ((ring, on_gpu.run), (other, op._step)):
            each.ring.append(q, k, v)
            run(q, each.buffers(), 0.25)
        for kind, listed in other.tensors().items():
            got = ring.tensors()[kind]
            if kind in ("near", "far"):
                used = torch.arange(listed.shape[-1]) < other.tensors()[f"{kind}_count"][..., None]
                # far lists in whatever order
                assert torch.equal(*(y.masked_fill(~used, 1 << 20).sort().values for y in (got, listed))), (
                    f"{kind} at {t}"
                )
            elif not listed.is_floating_point():
                assert torch.equal(got, listed), f"{kind} at {t}"
            elif listed.numel():
                assert_within(got, listed.double(), terms=16, name=f"{kind} at {t}")
    if name != "apart":
        about = ring.all_k, ring.all_v, ring.ring.near_k, ring.ring.near_v, ring.near, ring.near_count, ring.position
        *got, end = on_gpu.fetch(*about, ring.plan)
        *wanted, stands = op._fetch(*about, ring.plan)
        seen = stands <= ring.position
        assert torch.equal(end[seen], stands[seen])
        for y, want in zip(got, wanted, strict=True):
            assert torch.equal(y[seen], want[seen])


def test_past_the_capacity_a_token_is_nan():
    mech = FMA(block=16, near=16, rank=4, open=1)
    x = torch.randn(1, 1, 41, 16)
    with torch.no_grad():
        _, state = mech.extend(x[:, :, :40], x[:, :, :40], x[:, :, :40])
    ring = mech.ring(state, capacity=48)
    for t in range(9):
        assert ring.all_k.isfinite().all(), t
        ring.ring.append(*[x[:, :, 40:]] * 3)
        on_gpu.run(x[:, :, 40:], ring.buffers(), 0.25)
    assert ring.all_k[:, :, 47].isnan().all()
    # and the newest query reads it
    assert ring.near[0, 0, 0, ring.near_count[0, 0, 0] - 1] == 2
