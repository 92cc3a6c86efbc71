"""The kernels of scan in the interpreter, float32 and float16 only: bfloat16 it computes wrongly."""

import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs with TRITON_INTERPRET=1, see tests/test_kernels.py", allow_module_level=True)

from farfield.kernels import scan as kernels
from farfield.testing import oracles
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within


@pytest.fixture(autouse=True)
def _processors(monkeypatch):
    """So many that short sequences are cut into segments."""
    about = SimpleNamespace(multi_processor_count=12)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)


def draw(B=1, H=2, G=2, T=150, D=16, E=16):
    x = normal(B, H, T, D), normal(B, T, G, D, seed=1).transpose(1, 2), normal(B, G, T, E, seed=2)
    return *x, normal(B, H, D, E, seed=4)


RATES = {"slow": [-0.01, -0.3], "strong": [-2.0, -40.0], "none": [0.0, 0.0], "all": [float("-inf"), -1e-4]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "rates"), [(1, "slow"), (16, "none"), (150, "slow"), (130, "strong"), (130, "all")])
def test_against_the_recurrence(rates, tokens, dtype):
    q, k, v, state = draw(T=tokens)
    decay = torch.tensor(RATES[rates], dtype=torch.float64)
    out, end = kernels.forward(*(x.to(dtype) for x in (q, k, v)), decay.float(), state.float(), False)
    exact, exact_end = oracles.recurrence(q, k, v, decay.float().double(), state)
    assert_within(out, exact, terms=tokens)
    assert_within(end, exact_end, terms=tokens)


@pytest.mark.parametrize(("tokens", "rates"), [(1, "slow"), (150, "strong"), (130, "none")])
def test_backwards(tokens, rates):
    q, k, v, state = draw(T=tokens)
    decay = torch.tensor(RATES[rates], dtype=torch.float64).float()
    out, end = kernels.forward(*(x.float() for x in (q, k, v)), decay, state.float(), True)
    lag = torch.arange(tokens) - torch.arange(tokens)[:, None]
    wide = decay.double()[:, None, None]
    fade = (wide * lag).exp().masked_fill(lag < 0, 0.0)
    left = (decay.double()[:, None] * torch.arange(tokens).flip(0)).exp()[..., None]
    assert_within(out, (q @ k.mT * fade) @ v + left * (q @ state), terms=tokens)
    since = (decay.double()[:, None] * torch.arange(1, tokens + 1)).exp()[..., None]
    assert_within(end, (k * since).mT @ v + (wide * tokens).exp() * state, terms=tokens)


def test_no_state_grouped_heads_and_odd_widths():
    q, k, v, _ = draw(B=2, H=4, G=2, T=100, D=24, E=40)
    decay = torch.tensor([-0.1, -0.01, 0.0, -1.0], dtype=torch.float64)
    out, end = kernels.forward(q.float(), k.float(), v.float(), decay.float(), None, False)
    exact, exact_end = oracles.recurrence(q, k, v, decay.float().double())
    assert_within(out, exact, terms=100)
    assert_within(end, exact_end, terms=100)


def test_segments_are_cut_and_what_has_faded_is_not_read():
    q, k, v, _ = draw(T=333)
    tile = kernels.tiles(16, 16, torch.float32)
    piece, each, segments = kernels.plan(2, 333, tile.chunk, tile.programs, q.device)
    assert segments > 2
    decay = torch.tensor([-10.0, -10.0])
    k, v = (x.float().clone() for x in (k, v))
    # nan, were it read: the first tokens of a piece that is 64 / (10 log2(e)) tokens from the next segment
    k[:, :, : piece - 16] = float("nan")
    out, _ = kernels.forward(q.float(), k, v, decay, None, False)
    assert out[:, :, each * piece :].isfinite().all()


@pytest.mark.parametrize(("tokens", "rates"), [(1, "none"), (300, "slow"), (150, "all")])
def test_gradients_of_keys_and_values_together(tokens, rates, monkeypatch):
    # float32 stands for bfloat16, which alone has room for both
    monkeypatch.setattr(kernels, "together", lambda *sizes: True)
    decay = torch.tensor(RATES[rates]).float()
    q, k, v, state = (x.requires_grad_() for x in draw(H=2, G=1, T=tokens, D=24, E=16))
    out, end = oracles.recurrence(q, k, v, decay.double(), state)
    d_out, d_end = normal(*out.shape, seed=8), normal(*end.shape, seed=9)
    exact = torch.autograd.grad((out, end), (k, v, state), (d_out, d_end))
    x = (t.detach().float() for t in (d_out, d_end, q, k, v))
    d_k, d_v, d_state = kernels.gradients(*x, decay)
    for got, right in zip((d_k.sum(1, keepdim=True), d_v.sum(1, keepdim=True), d_state), exact, strict=True):
        assert_within(got, right, terms=2 * tokens)


@pytest.mark.parametrize(("tokens", "rates", "back", "given"), [
    (1000, "slow", False, True), (1000, "none", True, True), (1000, "slow", True, True), (50, "all", True, True),
])  # fmt: skip
def test_states_before_segments(tokens, rates, back, given):
    # what the walk on Hopper GPUs starts from; float32 stands for bfloat16
    _, k, v, state = draw(T=tokens, G=1, D=64, E=64)
    decay = torch.tensor(RATES[rates], dtype=torch.float64).float()
    cut = kernels._whole(2, tokens, k.device)
    assert cut.segments > 2 or tokens < 128
    got = kernels._states(k.float(), v.float(), decay, 2, cut, state.mT.float() if given else None, True, back)
    k, v = (x.flip(2) if back else x for x in (k, v))
    exact = []
    for n in range(cut.segments):
        # from the end on, what is missing to whole chunks comes first
        many = max(n * cut.each * cut.piece - (-tokens % 64 if back else 0), 0)
        lag = (many - 1 - torch.arange(many)) + back
        fade = (decay.double()[:, None] * lag).masked_fill(lag == 0, 0.0).exp()[..., None]
        exact.append((k[:, :, :many] * fade).mT @ v[:, :, :many])
        if given:
            exact[-1] += (decay.double() * many).exp()[:, None, None] * state if many else state
    assert_within(got.view(2, cut.segments, 64, 64), torch.stack(exact, 2)[0], terms=tokens)
