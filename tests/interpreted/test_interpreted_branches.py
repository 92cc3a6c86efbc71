"""Three branches as one operation in the interpreter: the mechanism's reference, forward and backward."""

import copy
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import attend_hopper, attend_listed, choose_hopper, fan
from farfield.kernels.attend_backward import attend_backward
from farfield.mechanisms.nsa import NSA
from farfield.ops import branches
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within

F16, F32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch):
    """The kernels for any GPU, and the backward of `attend` by them."""
    for module in (attend_hopper, choose_hopper):
        monkeypatch.setattr(module, "_hopper", lambda device: False)
    monkeypatch.setattr(attend_listed, "FEWEST", 64)
    monkeypatch.setattr(branches, "_gradients", attend_backward)


@pytest.mark.parametrize("learned", [False, True])
def test_branches_and_their_gradients(learned):
    tokens, width = 80, 16
    sizes = {"kv_heads": 2, "width": width} if learned else {}
    mech = NSA(block=16, picks=4, span=8, stride=4, window=20, **sizes)
    with torch.no_grad():
        for p in mech.parameters():
            p += normal(*p.shape, seed=p.numel(), dtype=F32) / 4
    exactly = copy.deepcopy(mech).double()
    x = [normal(2, h, tokens, width, seed=i, dtype=F16).requires_grad_() for i, h in enumerate((4, 2, 2))]
    d_out = normal(2, 4, tokens, width, seed=9, dtype=F16)
    wide = [t.detach().double().requires_grad_() for t in x]
    exact = exactly.reference(*wide)
    names = ["dq", "dk", "dv", *[f"{n}_{side}" for n in ("inner", "place", "outer") for side in "kv"], "gate", "bias"]
    weights, wide_weights = mech.weights(), exactly.weights()
    out = branches.branches(*x, weights, mech.scoring, mech.window, width**-0.5)
    assert_within(out, exact, terms=tokens)
    got = torch.autograd.grad(out, [*x, *weights], d_out)
    want = torch.autograd.grad(exact, [*wide, *wide_weights], d_out.double())
    for name, a, b in zip(names, got, want, strict=False):
        assert_within(a.half(), b, terms=tokens, name=name)


def test_gradients_of_means_are_spread():
    (a, b), means = ([normal(2, 3, 50, 24, seed=n + i, dtype=F16) for i in range(2)] for n in (0, 2)), None
    means = [normal(2, 3, 11, 24, seed=n, dtype=F32) for n in (5, 6)]
    token = torch.arange(50)
    row = torch.arange(11)[:, None]
    within = ((row * 4 <= token) & (token < row * 4 + 8)).double() / 8
    for x, y, m, got in zip(a, b, means, fan.spread(a, b, means, 4, 8, 0.5), strict=True):
        assert_within(got, (x.double() + y.double() + within.T @ m.double()) / 2, terms=4)
