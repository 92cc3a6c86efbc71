"""scan against the recurrence, token by token, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farfield.ops.scan import scan
from farfield.testing import oracles
from farfield.testing.inputs import normal
from farfield.testing.largest import Largest
from farfield.testing.units import assert_within

NAMES = ("q", "k", "v", "decay", "state")


def inputs(B=2, H=4, G=2, T=150, D=8, E=12, decay="token", strength=1.0, dtype=torch.float64):
    q, k, v = normal(B, H, T, D), normal(B, G, T, D, seed=1), normal(B, G, T, E, seed=2)
    shape = {"token": (B, H, T), "shared": (1, H, T), "head": (H,)}.get(decay)
    log = None if shape is None else (-strength * normal(*shape, seed=3).abs()).bfloat16()
    state = normal(B, H, D, E, seed=4)
    return [None if x is None else x.to(dtype).requires_grad_() for x in (q, k, v, log, state)]


def run(f, x, **options):
    out, state = f(*x, **options)
    leaves = [t for t in x if t is not None]
    d_out, d_state = normal(*out.shape, seed=8, dtype=out.dtype), normal(*state.shape, seed=9, dtype=state.dtype)
    grads = iter(torch.autograd.grad((out, state), leaves, (d_out, d_state)))
    return {"out": out, "end": state} | {f"d {n}": next(grads) for n, t in zip(NAMES, x, strict=True) if t is not None}


def oracle(*x):
    q, k, v, decay, state = x
    decay = decay if decay is None or decay.dim() == 1 else decay.expand(q.shape[0], -1, -1)
    return oracles.recurrence(q, k, v, decay, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 64, 500])
@pytest.mark.parametrize("decay", ["token", "shared", "head", None])
def test_forward_and_gradients(decay, chunk, dtype):
    exact = run(oracle, inputs(decay=decay))
    got = run(scan, inputs(decay=decay, dtype=dtype), chunk=chunk)
    assert got["end"].dtype == dtype
    for name in exact:
        assert_within(got[name], exact[name], terms=150, name=name)


def test_bfloat16():
    exact = run(oracle, inputs())
    got = run(scan, inputs(dtype=torch.bfloat16))
    assert got["out"].dtype == torch.bfloat16
    assert got["end"].dtype == torch.float32
    for name in exact:
        assert_within(got[name], exact[name], terms=150, name=name)


@pytest.mark.parametrize("strength", [1e-3, 30.0, 3000.0])
def test_weak_and_strong_decays(strength):
    exact = run(oracle, inputs(strength=strength))
    got = run(scan, inputs(strength=strength, dtype=torch.float32))
    for name in exact:
        assert_within(got[name], exact[name], terms=150, name=name)


def test_a_strong_decay_does_not_spoil_the_tokens_after_it():
    x = inputs(T=200, strength=2**-6)
    with torch.no_grad():
        # a difference of cumulative sums around 1e5 would be good to 0.01 in float32
        x[3][:, :, 67::16] = -1e5
    exact = oracle(*x)
    got = scan(*(t.detach().float() for t in x))
    assert_within(got[0], exact[0], terms=200)
    assert_within(got[1], exact[1], terms=200)


def test_minus_infinity_forgets_everything_before():
    x = [t.detach() for t in inputs(dtype=torch.float32)]
    x[3][:, :, 77] = float("-inf")
    exact, _ = oracle(*(t.double() for t in x))
    leaves = [t.requires_grad_() for t in x]
    got = run(scan, leaves)
    assert all(g.isfinite().all() for g in got.values())
    assert_within(got["out"], exact, terms=150)
    _, end = scan(*leaves)
    assert (torch.autograd.grad(end.sum(), x[4])[0] == 0).all()
    alone, _ = scan(*(t[:, :, 77:] for t in x[:4]))
    assert_within(alone, exact[:, :, 77:], terms=150)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from([1, 3, 16]))
def test_any_pieces_give_one_call(pieces, chunk):
    T = sum(pieces)
    x = inputs(T=T, strength=0.1)
    exact, end = oracle(*x)
    q, k, v, decay, state = (t.detach().float() for t in x)
    outs, start = [], 0
    for n in pieces:
        part = slice(start, start + n)
        out, state = scan(q[:, :, part], k[:, :, part], v[:, :, part], decay[:, :, part], state, chunk=chunk)
        outs.append(out)
        start += n
    assert_within(torch.cat(outs, 2), exact, terms=max(T, 1))
    assert_within(state, end, terms=max(T, 1))


def test_token_by_token_without_a_first_state():
    q, k, v, decay, _ = (t.detach().float() for t in inputs(T=70))
    exact, end = oracle(*(x.double() for x in (q, k, v, decay)), None)
    outs, state = [], None
    for t in range(70):
        at = slice(t, t + 1)
        out, state = scan(q[:, :, at], k[:, :, at], v[:, :, at], decay[:, :, at], state)
        outs.append(out)
    assert_within(torch.cat(outs, 2), exact, terms=70)
    assert_within(state, end, terms=70)


def test_many_chunks_recur_in_levels():
    x = inputs(B=1, H=1, G=1, T=2500, D=3, E=2, strength=0.01)
    exact = run(oracle, x)
    got = run(scan, inputs(B=1, H=1, G=1, T=2500, D=3, E=2, strength=0.01, dtype=torch.float32), chunk=2)
    for name in exact:
        assert_within(got[name], exact[name], terms=2500, name=name)


def test_gradcheck():
    x = inputs(B=1, H=2, G=1, T=7, D=2, E=3, strength=0.5)
    assert torch.autograd.gradcheck(lambda *x: scan(*x, chunk=3), x)


def test_never_reads_the_future():
    x = [t.detach() for t in inputs(dtype=torch.float32)]
    before, _ = scan(*x)
    for cut in (1, 63, 64, 65, 149):
        after, _ = scan(*(torch.cat([t[:, :, :cut], 5 * t[:, :, cut:]], 2) for t in x[:4]), x[4])
        assert torch.equal(after[:, :, :cut], before[:, :, :cut])


def test_strided_views_and_empty_sizes():
    x = inputs()
    exact, _ = oracle(*x)
    q, k, v = (t.detach().float().transpose(1, 2).contiguous().transpose(1, 2) for t in x[:3])
    assert_within(scan(q, k, v, x[3].detach().float().mT.contiguous().mT, x[4].detach().float())[0], exact, terms=150)
    out, state = scan(q[:0], k[:0], v[:0])
    assert out.shape == (0, 4, 150, 12)
    assert state.shape == (0, 4, 8, 12)
    out, state = scan(q[:, :, :0], k[:, :, :0], v[:, :, :0], state=x[4])
    assert out.shape == (2, 4, 0, 12)
    assert torch.equal(state, x[4])


def test_autocast_does_not_lower_the_precision():
    x = inputs()
    exact, end = oracle(*x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = scan(*(t.detach().float() for t in x))
    assert_within(out, exact, terms=150)
    assert_within(state, end, terms=150)


def test_compiles_whole():
    torch._dynamo.reset()
    exact = run(oracle, inputs(T=70))
    got = run(torch.compile(scan, fullgraph=True, backend="aot_eager"), inputs(T=70, dtype=torch.float32), chunk=16)
    for name in exact:
        assert_within(got[name], exact[name], terms=70, name=name)


def test_memory_grows_with_the_length_not_its_square():
    def elements(T):
        with Largest() as watch:
            scan(*(t.detach() for t in inputs(B=1, T=T)[:4]), chunk=16)
        return watch.elements

    assert elements(4096) < 1.2 * 4 * elements(1024)


# decays per head that get no gradient: an operation with a backward of its own


def plain(decay=(-0.3, 0.0, -2.0, -0.01), dtype=torch.float64, **sizes):
    q, k, v, _, state = inputs(decay=None, dtype=dtype, **sizes)
    return [q, k, v, torch.tensor(decay, dtype=dtype), state]


def run_plain(f, x, **options):
    out, state = f(*x, **options)
    leaves = [t for t in x if t is not None and t.requires_grad]
    d_out, d_state = normal(*out.shape, seed=8, dtype=out.dtype), normal(*state.shape, seed=9, dtype=state.dtype)
    return [out, state, *torch.autograd.grad((out, state), leaves, (d_out, d_state))]


@pytest.mark.parametrize("T", [1, 63, 150])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_own_backward(T, dtype):
    exact = run_plain(oracles.recurrence, plain(T=T))
    got = run_plain(scan, [*plain(T=T, dtype=dtype)[:3], plain()[3].to(torch.promote_types(dtype, torch.float32)),
                           plain(T=T, dtype=dtype)[4]], chunk=16)  # fmt: skip
    for name, a, b in zip(("out", "end", "dq", "dk", "dv", "d state"), got, exact, strict=True):
        assert_within(a, b, terms=T, name=name)


def test_own_backward_of_a_head_that_forgets_everything():
    decay = (float("-inf"), -0.1, 0.0, float("-inf"))
    x = plain(decay)
    got = run_plain(scan, x)
    assert all(g.isfinite().all() for g in got)
    assert_within(got[0][:, ::3].float(), (x[0] * x[1][:, [0, 0, 1, 1]]).sum(-1, keepdim=True)[:, ::3]
                  * x[2][:, [0, 1]], terms=8)  # fmt: skip
    assert not got[5][:, ::3].any()


def test_own_backward_with_one_output_used():
    for used in (0, 1):
        x, y = plain(T=40), plain(T=40)
        got = torch.autograd.grad(scan(*x)[used].sum(), [x[1], x[2], x[4]])
        exact = torch.autograd.grad(oracles.recurrence(*y)[used].sum(), [y[1], y[2], y[4]])
        for a, b in zip(got, exact, strict=True):
            assert_within(a, b, terms=40)


def test_own_backward_gradcheck():
    x = plain(B=1, T=7, D=2, E=3)
    assert torch.autograd.gradcheck(lambda *x: scan(*x, chunk=3), x)


def test_own_backward_is_an_operation():
    q, k, v, decay, state = plain(B=1, T=9, D=2, E=3)
    for x in (state, state.new_empty(0)):
        torch.library.opcheck(torch.ops.farfield.scan.default, (q, k, v, decay, x, 4))
    torch._dynamo.reset()
    exact = run_plain(oracles.recurrence, plain(T=40))
    got = run_plain(torch.compile(scan, fullgraph=True, backend="aot_eager"), plain(T=40))
    for a, b in zip(got, exact, strict=True):
        assert_within(a, b, terms=40)


def test_own_backward_has_no_gradient():
    x = plain(T=9)
    (d_q,) = torch.autograd.grad(scan(*x)[0].square().sum(), x[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="give decays per token"):
        torch.autograd.grad(d_q.sum(), x[1])


def test_own_backward_saves_only_what_came_in():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = plain(T=100)
        scan(*x)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in x}
