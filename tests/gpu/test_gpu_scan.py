"""scan on a GPU: the kernels against float64, and the calls around them."""

from functools import partial

import drawn
import pytest
import torch

from farfield.mechanisms.lightning_attention import LightningAttention
from farfield.ops.scan import scan
from farfield.testing.captured import replayed
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


draw = partial(drawn.draw, dtype=torch.float64)


def problem(B=1, H=4, G=2, T=3001, D=64, E=64):
    """Views of [B, T, H, D]; every kind of decay."""
    q, k, v = (draw(B, T, h, w, seed=i).transpose(1, 2) for i, (h, w) in enumerate(((H, D), (G, D), (G, E))))
    rates = torch.tensor([-0.5, -0.004, 0.0, -1e-4], dtype=torch.float64, device="cuda").float().double()
    return [q, k, v, rates.repeat(H // 4), 0.1 * draw(B, H, D, E, seed=4).bfloat16().double()]


def run(f, x):
    x = [t.detach().requires_grad_(i != 3) for i, t in enumerate(x)]
    out, _ = f(*x)
    d_out = draw(*out.shape, seed=8).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x[i] for i in (0, 1, 2, 4)], d_out)]


def literal(q, k, v, decay, state, step=250):
    """Chunks of another size, in float64, differentiable."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    outs = []
    for a in range(0, q.shape[2], step):
        x, y, z = (t[:, :, a : a + step] for t in (q, k, v))
        t = torch.arange(x.shape[2], device=q.device, dtype=q.dtype)
        lag = t[:, None] - t
        fade = (decay[:, None, None] * lag).exp().masked_fill(lag < 0, 0.0)
        outs.append((x @ y.mT * fade) @ z + (decay[:, None] * (t + 1)).exp()[..., None] * (x @ state))
        left = (decay[:, None] * (x.shape[2] - 1 - t)).exp()[..., None]
        state = (decay * x.shape[2]).exp()[:, None, None] * state + (y * left).mT @ z
    return torch.cat(outs, 2), state


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (BF16, {}),
        (BF16, {"D": 128, "E": 128}),
        (BF16, {"D": 64, "E": 128, "T": 130}),
        (BF16, {"D": 128, "E": 64, "T": 20_001}),
        (BF16, {"D": 256, "E": 128, "G": 4}),
        (BF16, {"D": 80, "E": 40, "T": 257}),
        (BF16, {"B": 64, "H": 8, "T": 130}),
        (BF16, {"T": 1}),
        (BF16, {"D": 16, "E": 16, "T": 40_000, "G": 1}),
        (FP16, {"D": 128, "E": 64}),
        (FP16, {}),
        (FP32, {}),
        (FP32, {"D": 128, "E": 96, "T": 1000}),
        (FP32, {"D": 256, "E": 256, "T": 500}),
    ],
    ids=str,
)
def test_against_float64(dtype, sizes):
    x = problem(**sizes)
    T = x[0].shape[2]
    exact = run(literal, x)
    got = run(scan, [t.to(dtype) if i < 3 else t.float() for i, t in enumerate(x)])
    for name, a, b in zip(("out", "dq", "dk", "dv", "d state"), got, exact, strict=True):
        if name == "d state":
            # float32 out of products of the inputs' dtype
            a = a.to(dtype)
        assert_within(a, b, terms=T, name=name)


def test_the_state_goes_on():
    x = problem(T=5000)
    exact, end = literal(*x)
    q, k, v, decay, state = (t.bfloat16() if i < 3 else t.float() for i, t in enumerate(x))
    outs, start = [], 0
    for n in (3000, 1, 1, 64, 1934):
        part = slice(start, start + n)
        out, state = scan(q[:, :, part], k[:, :, part], v[:, :, part], decay, state)
        outs.append(out)
        start += n
    assert_within(torch.cat(outs, 2), exact, terms=5000)
    assert_within(state.bfloat16(), end, terms=5000)


def test_offsets_beyond_32_bits():
    T = 2**21 + 77
    base = torch.empty(T, 1100, device="cuda", dtype=BF16)
    q, k, v = (base[None, None, :, i * 64 : (i + 1) * 64] for i in range(3))
    for t in (q, k, v):
        t.copy_(torch.randn(T, 64, device="cuda"))
    decay = torch.tensor([-0.01], device="cuda")
    out, _ = scan(q, k, v, decay)
    # 64 outputs, each from the tokens that still count
    for t in [*torch.randint(5000, T, (62,), generator=torch.Generator().manual_seed(0)).tolist(), 5000, T - 1]:
        part = slice(t - 5000, t + 1)
        fade = (-0.01 * torch.arange(5000, -1, -1, device="cuda", dtype=torch.float64)).exp()
        weights = (k[0, 0, part].double() @ q[0, 0, t].double()) * fade
        assert_within(out[0, 0, t], weights @ v[0, 0, part].double(), terms=5000, name=f"token {t}")


def test_repeats_are_bitwise_equal():
    x = [t.bfloat16() if i < 3 else t.float() for i, t in enumerate(problem(T=9000))]
    first = run(scan, x)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(scan, x), first, strict=True))


def test_a_training_step_is_captured():
    mech = LightningAttention()
    x = [t.bfloat16().requires_grad_() for t in problem(T=4096)[:3]]

    def step():
        out = mech(*x)
        return out, *torch.autograd.grad(out, x, torch.ones_like(out))

    want, got = replayed(step)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_large_sums_in_float16():
    T = 70_000
    q, k = (torch.full((1, 1, T, 16), x, device="cuda", dtype=FP16) for x in (2**-10, 4))
    out, end = scan(q, k, k, torch.zeros(1, device="cuda"))
    # the state passes 65504, the largest float16
    exact = torch.arange(1, T + 1, device="cuda", dtype=torch.float64)[:, None].expand(-1, 16) / 4
    assert_within(out[0, 0], exact, terms=T)
    assert_within(end[0, 0], torch.full((16, 16), 16.0 * T, dtype=torch.float64, device="cuda"), terms=T)
