"""Generation on a GPU: a CUDA graph gives the tokens that steps give, and these the tokens of states that grow."""

import sys

import pytest
import torch

from farfield.mechanisms.full import Full
from farfield.mechanisms.moba import MoBA
from farfield.mechanisms.power_attention import PowerAttention
from farfield.mechanisms.s2_attention import S2Attention
from farfield.mechanisms.ssa import SSA
from farfield.mechanisms.window import SlidingWindow
from farfield.nn import Attention, Decoder, ModelConfig
from farfield.nn.models import DecoderRing
from farfield.ops import draw
from farfield.testing.units import assert_within
from farfield.train import generate
from farfield.train.generate import drawn

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

FMA = {"block": 64, "near": 128, "rank": 16}
OPENED = {"block": 64, "near": 128, "rank": 4, "open": 4}
WINDOW = {"width": 192, "sinks": 3}
CASES = {
    "fma": {"attention": "fma", "attention_options": FMA},
    "opened": {"attention": "fma", "attention_options": OPENED},
    "window": {"attention": "window", "attention_options": WINDOW, "conv": 0},
    "full": {"attention": "full", "log_scale": 1020, "qk_norm": False},
    "powers": {"attention": "power-attention", "attention_options": {"block": 64, "window": 2}},
    "shards": {"attention": "s2-attention", "attention_options": {"block": 96, "stride": 3, "local": 1}},
    "moba": {"attention": "moba", "attention_options": {"block": 64, "picks": 3}},
    "lightning": {"attention": "lightning-attention", "kv_heads": None},
    "aaren": {"attention": "aaren", "kv_heads": None},
    "mixed": {
        "attention": "window", "attention_options": WINDOW, "other": "fma", "other_options": OPENED, "every": 2,
        "other_rope_share": 0.0, "other_log_scale": 900,
    },
}  # fmt: skip


def model(name) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(**({"width": 256, "layers": 2, "heads": 4, "kv_heads": 2} | CASES[name]))
    found = Decoder(config).cuda()
    with torch.no_grad():
        for weight in found.parameters():
            weight.mul_(1.5)
    return found


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("name", CASES)
def test_a_graph_generates_what_steps_and_states_do(name, sampling, monkeypatch):
    found, prompt = model(name), torch.randint(256, (1000,))
    given = {"new_tokens": 80, "chunk": 600, **sampling}
    graph = list(generate(found, prompt, **given))
    with monkeypatch.context() as patch:
        patch.setattr(DecoderRing, "capturable", False)
        assert list(generate(found, prompt, way="ring", **given)) == graph
    assert list(generate(found, prompt, way="extend", **given)) == graph
    assert len(graph) == 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [256, 1000, 1500])
def test_one_launch_draws_what_the_cpu_draws(tokens, dtype):
    gen = torch.Generator().manual_seed(tokens)
    logits = (3 * torch.randn(50, tokens, generator=gen)).to(dtype)
    # many equal ones
    logits[::2] = (2 * logits[::2]).round() / 2
    numbers = torch.rand(50, dtype=torch.float64, generator=gen)
    assert (draw.refusal(logits.cuda(), numbers.cuda()) is None) == (tokens <= draw.MOST)
    for sampling in ((1.0, None, None), (0.7, 5, None), (1.3, None, 0.9), (0.8, 50, 0.6)):
        for number in (numbers, numbers[:1]):
            assert torch.equal(drawn(logits.cuda(), number.cuda(), *sampling).cpu(), drawn(logits, number, *sampling))


def test_numbers_beyond_those_held_are_drawn(monkeypatch):
    found, prompt = model("window"), torch.randint(256, (50,))
    want = list(generate(found, prompt, new_tokens=40, seed=1))
    monkeypatch.setattr(sys.modules[generate.__module__], "DRAWS", 7)
    assert list(generate(found, prompt, new_tokens=40, seed=1)) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "mech",
    [
        Full(), SlidingWindow(width=100, sinks=5), PowerAttention(block=32, window=2), MoBA(block=64),
        S2Attention(block=64, stride=3, local=1, dense_heads=1), SSA(block=16, picks=6), SSA(stream="full"),
    ],
    ids=["full", "window", "powers", "moba", "shards", "ssa", "ssa-full"],
)  # fmt: skip
def test_a_ring_of_tokens_steps_as_a_forward(mech, dtype):
    x = [torch.randn(2, h, 700, 64, device="cuda").to(dtype) for h in (8, 2, 2)]
    exact = mech.reference(*(y.double().cpu() for y in x)).cuda()
    for start in (1, 99, 512):
        with torch.no_grad():
            _, state = mech.extend(*(y[:, :, :start] for y in x))
        ring = mech.ring(state, capacity=700)
        outs = [mech.step(*(y[:, :, t : t + 1] for y in x), ring) for t in range(start, 700)]
        assert_within(torch.cat(outs, 2), exact[:, :, start:], terms=700, name=f"from {start}")
    if not isinstance(mech, SlidingWindow):
        assert mech.step(*(y[:, :, :1] for y in x), ring).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_steps_as_it_extends(dtype):
    layer = Attention(256, 4, kv_heads=2, mechanism="full", conv=0, log_scale=60, rope_share=0.5).cuda().to(dtype)
    x = torch.randn(3, 90, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        exact = layer.double()(x.double())
        layer.to(dtype)
        _, state = layer.extend(x[:, :50])
        ring = layer.ring(state, capacity=90)
        at = [torch.full((3, 1), t, device="cuda") for t in range(50, 90)]
        outs = [layer.step(x[:, t : t + 1], ring, at[t - 50]) for t in range(50, 90)]
    assert_within(torch.cat(outs, 1), exact[:, 50:], terms=256, units=12)
