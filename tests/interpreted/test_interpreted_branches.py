"""Three branches as one operation in the interpreter: the mechanism's reference, forward and backward."""

import copy
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import attend_hopper, attend_listed, choose_hopper, fan, join_branches, near_hopper
from farfield.kernels.attend_backward import attend_backward
from farfield.mechanisms.nsa import NSA
from farfield.ops import branches
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within

F16, F32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch):
    """The kernels for any GPU, and the backward of `attend` by them."""
    for module in (attend_hopper, choose_hopper, near_hopper):
        monkeypatch.setattr(module, "on_hopper", lambda device: False)
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


@pytest.mark.parametrize(("learned", "kept"), [(False, True), (True, False)])
def test_parts_are_joined_where_branches_are_summed_up(learned, kept):
    """Queries 5 .. 41 of 42, in parts of no order."""
    batch, kv_heads, stack, tokens, first, picks, width = 2, 2, 2, 42, 5, 3, 24
    heads, many, units = kv_heads * stack, tokens - first, batch * kv_heads
    gen = torch.Generator().manual_seed(0)
    place = torch.randperm(units * many * picks, generator=gen, dtype=torch.int32)
    count = torch.randint(0, picks + 1, (units, 1, many), generator=gen, dtype=torch.int32)
    parts = normal(1, 1, place.numel() * stack, width, seed=1, dtype=F16)[0, 0]
    masses = normal(1, 1, place.numel(), stack, seed=2, dtype=F32).flatten()
    begun, far, near, q = (normal(batch, heads, tokens, width, seed=n, dtype=F16) for n in (3, 4, 5, 6))
    begun_lse = normal(batch, heads, tokens, 1, seed=7, dtype=F32)[..., 0].contiguous()
    gate, bias = (normal(1, *shape, seed=8, dtype=F32)[0] for shape in ((kv_heads, width, 3), (1, kv_heads, 3)))
    out = torch.zeros_like(q)
    chosen, lse = torch.zeros(units, stack, tokens, width, dtype=F16), torch.zeros(units, stack, tokens, dtype=F32)
    join_branches.join(
        parts, masses, place, count, (begun, begun_lse), far, near, q, gate if learned else None,
        bias[0] if learned else None, out, (chosen, lse) if kept else (None, None), first,
    )  # fmt: skip
    used = torch.arange(picks) < count.flatten(0, 1)[..., None]
    at = place.view(units, many, picks).long()
    logs = (masses.double() * 0.6931471805599453).view(-1, stack)[at].masked_fill(~used[..., None], float("-inf"))
    rows = parts.double().view(-1, stack, width)[at]  # units, many, picks, stack, width

    def folded(x):
        return x.double().reshape(units, stack, tokens, -1)[:, :, first:].transpose(1, 2)

    logs = torch.cat([logs, folded(begun_lse).transpose(2, 3)], 2)
    rows = torch.cat([rows, folded(begun)[:, :, None]], 2)
    joined = (logs.softmax(2)[..., None] * rows).sum(2).transpose(1, 2)
    if kept:
        assert_within(chosen[:, :, first:], joined, terms=picks)
        assert_within(lse[:, :, first:], logs.logsumexp(2).transpose(1, 2), terms=picks, name="lse")
    joined = joined.reshape(batch, heads, many, width)
    gates = torch.full((3, 1, 1, 1, 1), 0.5, dtype=torch.float64)
    if learned:
        logits = torch.einsum("bgrtd,gdn->nbgrt", q.double().unflatten(1, (kv_heads, stack)), gate.double())
        gates = (logits + bias[0].double().T[:, None, :, None, None]).sigmoid().flatten(2, 3)[:, :, :, first:, None]
    exact = gates[0] * far.double()[:, :, first:] + gates[1] * joined + gates[2] * near.double()[:, :, first:]
    assert_within(out[:, :, first:], exact, terms=picks)
    assert not out[:, :, :first].any()


def test_gradients_of_means_are_spread():
    (a, b), means = ([normal(2, 3, 50, 24, seed=n + i, dtype=F16) for i in range(2)] for n in (0, 2)), None
    means = [normal(2, 3, 11, 24, seed=n, dtype=F32) for n in (5, 6)]
    token = torch.arange(50)
    row = torch.arange(11)[:, None]
    within = ((row * 4 <= token) & (token < row * 4 + 8)).double() / 8
    for x, y, m, got in zip(a, b, means, fan.spread(a, b, means, 4, 8, 0.5), strict=True):
        assert_within(got, (x.double() + y.double() + within.T @ m.double()) / 2, terms=4)
