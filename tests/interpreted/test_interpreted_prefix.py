"""The kernels of prefix_softmax in the interpreter, float32 and float16 only: bfloat16 it computes wrongly."""

import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import prefix as kernels
from farfield.ops import scan as ops
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within


@pytest.fixture(autouse=True)
def _processors(monkeypatch):
    """So many that short sequences are cut into segments."""
    about = SimpleNamespace(multi_processor_count=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)


def problem(T, H=2, G=1, E=24, size=1.0):
    scores = (size * normal(1, T, H)).float().double().transpose(1, 2)
    state = normal(1, H, seed=3), normal(1, H, seed=4).abs() + 0.5, normal(1, H, E, seed=5)
    return scores, normal(1, T, G, E, seed=1).transpose(1, 2), state


def literal(scores, v, state=None):
    """One prefix after the other; the state is one more token of that score, mass and total."""
    mass, v = torch.ones_like(scores), v.repeat_interleave(scores.shape[1] // v.shape[1], 1)
    if state is not None:
        scores, mass = torch.cat([state[0][..., None], scores], -1), torch.cat([state[1][..., None], mass], -1)
        v = torch.cat([state[2][:, :, None], v], 2)
    outs, lses = [], []
    for t in range(int(state is not None), scores.shape[2]):
        s = scores[..., : t + 1]
        peak = s.detach().amax(-1, keepdim=True).clamp(min=-1e30)
        weights = (s - peak).exp()
        total = (weights * mass[..., : t + 1]).sum(-1)
        outs.append((weights[..., None, :] @ v[:, :, : t + 1])[..., 0, :] / total.clamp(min=1e-300)[..., None])
        lses.append(total.log() + peak[..., 0])
    return torch.stack(outs, 2), torch.stack(lses, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "size", "given"), [(1, 1.0, False), (150, 1.0, True), (200, 100.0, False)])
def test_every_prefix(tokens, size, given, dtype):
    scores, v, state = problem(tokens, size=size)
    before = [x.float() for x in state] if given else None
    out, _, lse, peak, mass, total = kernels.forward(scores.float(), v.to(dtype), before, False)
    exact, exact_lse = literal(scores, v, state if given else None)
    assert_within(out, exact, terms=tokens)
    assert_within(lse, exact_lse, terms=tokens)
    assert_within(peak + mass.log(), exact_lse[..., -1], terms=tokens)
    assert_within(total / mass[..., None], exact[:, :, -1], terms=tokens)


@pytest.mark.parametrize(("tokens", "size", "given"), [(1, 1.0, True), (150, 1.0, True), (160, 30.0, False)])
def test_gradients(tokens, size, given):
    scores, v, state = problem(tokens, size=size)
    leaves = [scores, v, *state[1:]]
    for x in leaves:
        x.requires_grad_()
    exact, exact_lse = literal(scores, v, state if given else None)
    d_out, d_mass, d_total = normal(*exact.shape, seed=7), normal(1, 2, seed=8), normal(1, 2, 24, seed=9)
    before = [x.detach().float() for x in state] if given else None
    out, rest, lse, peak, mass, _ = kernels.forward(scores.detach().float(), v.detach().float(), before, True)
    # the sums at the end, measured from the peak there
    end_mass = (exact_lse[..., -1] - peak.double()).exp()
    total = (exact[:, :, -1] * end_mass[..., None] * d_total).sum() + (end_mass * d_mass).sum()
    leaves = leaves if given else leaves[:2]
    right = torch.autograd.grad((exact * d_out).sum() + total, leaves)
    assert rest is None, "nothing was rounded"
    x = (scores.detach().float(), v.detach().float(), out, None, lse, mass)
    got = kernels.backward(d_out.float(), d_mass.float(), d_total.float(), *x)
    assert_within(got[0], right[0], terms=2 * tokens, name="d scores")
    assert_within(got[1].sum(1, keepdim=True), right[1], terms=2 * tokens, name="dv")
    if given:
        share = (state[0] - exact_lse[..., 0]).exp().detach().float()
        assert_within(share * got[2], right[2], terms=2 * tokens, name="d mass")
        assert_within(share[..., None] * got[3], right[3], terms=2 * tokens, name="d total")


def test_hidden_tokens():
    scores, v, _ = problem(200, G=2)
    hidden = torch.zeros(200, dtype=torch.bool)
    hidden[[*range(70), 100, *range(120, 190)]] = True
    scores = scores.masked_fill(hidden, float("-inf")).requires_grad_()
    v.requires_grad_()
    exact, _ = literal(scores, v)
    x = scores.detach().float(), v.detach().float()
    out, _, lse, _, mass, _ = kernels.forward(*x, None, True)
    assert (out[:, :, :70] == 0).all()
    assert (lse[:, :, :70] == float("-inf")).all()
    assert_within(out[:, :, 70:], exact[:, :, 70:].detach(), terms=200)
    g = normal(*exact.shape, seed=7)
    right = torch.autograd.grad((exact[:, :, 70:] * g[:, :, 70:]).sum(), (scores, v))
    d_scores, d_v, _, _ = kernels.backward(g.float(), None, None, *x, out, None, lse, mass)
    assert_within(d_scores[..., ~hidden], right[0][..., ~hidden], terms=400)
    assert_within(d_v, right[1], terms=400)
    assert not d_scores[..., hidden].any()


def test_the_backward_knows_what_rounding_took():
    # one token outweighs the others, so that v[i] - out[t] is as small as the rounding of out
    scores, v, _ = problem(150, size=100.0, G=2)
    scores, v = scores.flip(2).requires_grad_(), v.half().double()
    exact, _ = literal(scores, v)
    x = scores.detach().float(), v.half()
    out, rest, lse, _, mass, _ = kernels.forward(*x, None, True)
    g = normal(*exact.shape, seed=7).half()
    right = torch.autograd.grad((exact * g).sum(), scores)[0]
    d_scores = kernels.backward(g, None, None, *x, out, rest, lse, mass)[0]
    assert_within(d_scores.half(), right, terms=300, name="d scores")


def test_the_operation_around_the_kernels():
    # what the dispatcher takes CUDA tensors to, for those of the CPU
    ops._launch.register_kernel("cpu")(ops._launch._init_fn)
    ops._launch_backward.register_kernel("cpu")(ops._launch_backward._init_fn)
    scores, v, state = problem(80)
    for given in (False, True):
        x = [t.detach().requires_grad_() for t in (scores, v, *(state[1:] if given else ()))]
        y = [t.detach().float().requires_grad_() for t in x]
        none = y[0].new_empty(0)
        exact, _ = literal(x[0], x[1], (state[0], *x[2:]) if given else None)
        before = (state[0].float(), *y[2:]) if given else (none, none, none)
        out, _, _, _, _, total = ops._launch(y[0], y[1], *before, True)
        g = normal(*exact.shape, seed=7)
        for mine, right in zip(
            torch.autograd.grad(out, y, g.float(), retain_graph=True), torch.autograd.grad(exact, x, g), strict=True
        ):
            assert_within(mine, right, terms=160)
        assert all(t.isfinite().all() for t in torch.autograd.grad(total.sum(), y))


@pytest.mark.parametrize(("tokens", "heads", "groups"), [(1, 2, 2), (150, 4, 2), (333, 3, 1)])
def test_scores(tokens, heads, groups):
    query, k = normal(2, heads, 24), normal(2, tokens, groups, 24, seed=1).transpose(1, 2)
    k = k.half().double()
    exact = torch.einsum("bhd,bhtd->bht", query, k.repeat_interleave(heads // groups, 1))
    assert_within(kernels.scores(query.float(), k.half()), exact, terms=24)
    d_s = normal(*exact.shape, seed=2)
    d_q, d_k = kernels.scores_backward(d_s.float(), query.float(), k.float(), 1.0, 70)
    assert d_q.shape == (2, heads, 70, 24)
    assert not d_q[:, :, 1:].any()
    wide = k.repeat_interleave(heads // groups, 1)
    assert_within(d_q[:, :, 0], torch.einsum("bht,bhtd->bhd", d_s, wide), terms=tokens, name="d query")
    right = (d_s[..., None] * query[:, :, None]).unflatten(1, (groups, -1)).sum(2)
    assert_within(d_k, right, terms=heads // groups, name="d k")


@pytest.mark.parametrize(("tokens", "heads", "groups"), [(1, 2, 2), (150, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_averages_under_one_query(tokens, heads, groups, dtype):
    k, v = (normal(1, tokens, groups, 24, seed=i).to(dtype).double().transpose(1, 2) for i in (1, 2))
    q = normal(1, heads, tokens, 24).to(dtype).double()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bhd,bhtd->bht", q[:, :, 0], k.repeat_interleave(heads // groups, 1)) * 0.5
    exact, _ = literal(scores, v)
    x = [t.detach().to(dtype) for t in (q, k, v)]
    out, *kept = kernels.averages(*x, 0.5, True)
    assert_within(out, exact, terms=tokens + 24)
    assert torch.equal(kernels.averages(*x, 0.5, False), out)
    g = normal(*exact.shape, seed=7).to(dtype)
    right = torch.autograd.grad((exact * g).sum(), leaves)
    d_q, d_k, d_v = kernels.averages_backward(g, *x, out, *kept, 0.5)
    for name, got, want in zip(
        ("dq", "dk", "dv"), (d_q, d_k, d_v.unflatten(1, (groups, -1)).sum(2)), right, strict=True
    ):
        assert got.dtype == dtype
        assert_within(got, want, terms=2 * tokens + 24, name=name)
