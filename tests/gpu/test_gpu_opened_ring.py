"""Opened FMA piece by piece on the GPU: chunks of a prompt, and tokens from fixed buffers and as a CUDA graph."""

import pytest
import torch

from farfield.mechanisms.fma import FMA
from farfield.nn import Rope
from farfield.ops import opened as on_gpu
from farfield.select import opened_step
from farfield.testing.units import assert_within

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


def draw(tokens, dtype, *, batch=2, heads=8, kv_heads=2, width=64):
    gen = torch.Generator().manual_seed(0)
    shapes = [(batch, h, tokens, width) for h in (heads, kv_heads, kv_heads)]
    # what bfloat16 holds, so that every dtype makes the same choices
    return [torch.randn(s, generator=gen).bfloat16().to("cuda", dtype) for s in shapes]


@pytest.mark.parametrize("hold", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("sizes", [(2600,), (1500, 1, 1, 700, 398), (64, 1984, 552)], ids=str)
def test_chunks_are_one_forward(hold, sizes, monkeypatch):
    mech = FMA(block=128 if hold == 128 else 64, near=128, rank=4, open=4, hold=hold, sinks=3)
    exact = mech(*draw(2600, torch.float64))
    calls, original = [], on_gpu.choose_from
    monkeypatch.setattr(on_gpu, "choose_from", lambda *given: calls.append(given) or original(*given))
    x, state, outs, at = draw(2600, torch.bfloat16), None, [], 0
    with torch.no_grad():
        for n in sizes:
            out, state = mech.extend(*(y[:, :, at : at + n] for y in x), state)
            outs.append(out)
            at += n
    assert_within(torch.cat(outs, 2), exact, terms=2600)
    # by kernels, as soon as there is a far field
    assert len(calls) == len(sizes) - (sizes[0] == 64)


def test_a_prompt_with_gradients_has_those_of_forward():
    mech, x = FMA(near=128, rank=4, open=4), [t.requires_grad_() for t in draw(1003, torch.bfloat16)]
    exact_in = [t.requires_grad_() for t in draw(1003, torch.float64)]
    wanted = torch.autograd.grad(mech(*exact_in).square().sum(), exact_in)
    first, state = mech.extend(*(t[:, :, :700] for t in x))
    rest, _ = mech.extend(*(t[:, :, 700:] for t in x), state)
    got = torch.autograd.grad(torch.cat([first, rest], 2).square().sum(), x)
    for name, mine, want in zip("qkv", got, wanted, strict=True):
        assert_within(mine, want, terms=1003, name=f"d{name}")


CASES = {
    "a key head each": ({"open": 4}, 8, torch.bfloat16),
    "heads together": ({"open": 4, "sinks": 3}, 2, torch.bfloat16),
    "many": ({"open": 16, "sinks": 64}, 8, torch.float16),
    "apart": ({"open": 2, "shared": False, "segments": "sum"}, 2, torch.bfloat16),
    "held": ({"open": 4, "hold": 16}, 2, torch.bfloat16),
    "wide blocks": ({"block": 128, "open": 3, "detail": 4, "rank": 8}, 2, torch.float32),
    # rotated, bfloat16 is rounded, and of two scores as near to each other as that the other may win
    "rotated": ({"open": 4, "rope": True}, 8, torch.float32),
    "biased": ({"open": 4, "level_bias": -0.5, "kv_heads": 2, "levels": 8}, 2, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_one_forward(case):
    options, kv_heads, dtype = CASES[case]
    options = dict(options)
    rotary = Rope(64) if options.pop("rope", False) else None
    mech = FMA(**{"near": 128, "rank": 16, **options}).cuda()
    given = draw(2600, torch.float64, kv_heads=kv_heads)
    with torch.no_grad():
        exact = mech.double()(*given, rotary=rotary)
        mech.float()
        x = [y.to(dtype) for y in given]
        _, state = mech.extend(*(y[:, :, :2500] for y in x), rotary=rotary)
    outs = {}
    for store in ("device", "host") if mech.shared else ("device",):
        ring = mech.ring(state, capacity=3000, heads=8, store=store, rotary=rotary)
        here = (tuple(y[:, :, t : t + 1] for y in x) for t in range(2500, 2600))
        outs[store] = torch.cat([mech.step(*token, ring) for token in here], 2)
        assert ring.tokens.tolist() == [2600, 2600]
    assert_within(outs["device"], exact[:, :, 2500:], terms=2600)
    if mech.shared:
        assert ring.all_k.is_pinned()
        assert torch.equal(outs["host"], outs["device"])


@pytest.mark.parametrize("store", ["device", "host"])
def test_one_graph_serves_all_tokens(store, monkeypatch):
    mech, x = FMA(near=128, rank=16, open=4), draw(2600, torch.bfloat16)
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :2500] for y in x))
    ring, other = (mech.ring(state, capacity=3000, store=store) for _ in range(2))
    monkeypatch.setattr(opened_step, "_step", None)  # PyTorch, which would ask the device
    token = [y[:, :, 2500:2501].clone() for y in x]
    mech.step(*token, ring.copy())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mech.step(*token, ring)
    for t in range(2500, 2600):
        for into, y in zip(token, x, strict=True):
            into.copy_(y[:, :, t : t + 1])
        graph.replay()
        assert torch.equal(out, mech.step(*token, other))


def test_past_the_capacity_outputs_are_nan():
    mech, x = FMA(near=128, rank=16, open=4), draw(1300, torch.bfloat16)
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :1279] for y in x))
    for store in ("device", "host"):
        ring = mech.ring(state, capacity=1280, store=store)
        found = [mech.step(*(y[:, :, t : t + 1] for y in x), ring) for t in range(1279, 1282)]
        assert found[0].isfinite().all()
        assert found[1].isnan().all()
        assert found[2].isnan().all()


@pytest.mark.parametrize("hold", [1, 64])
def test_a_state_with_its_tokens_in_host_memory_goes_on(hold):
    mech, x = FMA(near=128, rank=4, open=4, hold=hold), draw(2600, torch.bfloat16)
    with torch.no_grad():
        _, state = mech.extend(*(y[:, :, :1500] for y in x))
        there = state.to_host()
        assert there.all_k.is_pinned()
        for at, n in ((1500, 1), (1501, 700)):
            here = [y[:, :, at : at + n] for y in x]
            (want, state), (got, there) = (mech.extend(*here, each) for each in (state, there))
            assert torch.equal(got, want)
        held = 2 * 2 * 2 * 2201 * 64 * 2
        assert (state.host_nbytes, there.host_nbytes) == (0, held)
        assert there.all_k.is_pinned()
        assert sum(t.nbytes for t in there.tensors().values() if t.is_cuda) == there.nbytes - held
