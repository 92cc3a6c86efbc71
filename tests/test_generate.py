"""Generation: what may be drawn, that seeds decide, that chunks do not matter."""

import sys

import pytest
import torch

from farfield.nn import Decoder, Encoder, ModelConfig
from farfield.testing.units import assert_within
from farfield.train.generate import drawn, generate, probabilities

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).double().log()


def model(**changes) -> Decoder:
    return Decoder(ModelConfig(**({"width": 32, "layers": 2, "heads": 2, "attention": "full"} | changes)))


def ids(n=20):
    return [(7 * i) % 256 for i in range(n)]


def check(got, expected):
    assert got.tolist() == pytest.approx(expected)


def test_plain_softmax_and_temperature():
    check(probabilities(LOGITS), [0.5, 0.2, 0.15, 0.1, 0.05])
    squares = [0.25, 0.04, 0.0225, 0.01, 0.0025]
    check(probabilities(LOGITS, 0.5), [s / sum(squares) for s in squares])
    check(probabilities(LOGITS, 0), [1, 0, 0, 0, 0])


def test_top_k_keeps_the_k_likeliest():
    check(probabilities(LOGITS, top_k=2), [5 / 7, 2 / 7, 0, 0, 0])
    check(probabilities(LOGITS.flip(0), top_k=1), [0, 0, 0, 0, 1])
    check(probabilities(LOGITS, top_k=99), [0.5, 0.2, 0.15, 0.1, 0.05])


def test_top_p_keeps_the_fewest_that_reach_p():
    check(probabilities(LOGITS, top_p=0.4), [1, 0, 0, 0, 0])
    check(probabilities(LOGITS, top_p=0.6), [5 / 7, 2 / 7, 0, 0, 0])
    check(probabilities(LOGITS, top_p=0.71), [50 / 85, 20 / 85, 15 / 85, 0, 0])
    check(probabilities(LOGITS, top_p=1.0), [0.5, 0.2, 0.15, 0.1, 0.05])


def test_top_p_counts_what_top_k_left():
    check(probabilities(LOGITS, top_k=2, top_p=0.7), [1, 0, 0, 0, 0])


def test_ties_go_to_the_lower_id():
    check(probabilities(torch.zeros(4), 0), [1, 0, 0, 0])
    check(probabilities(torch.zeros(4), top_k=2), [0.5, 0.5, 0, 0])


def test_batches_of_logits():
    both = probabilities(torch.stack([LOGITS, LOGITS.flip(0)]), top_k=2)
    check(both[1], both[0].flip(0).tolist())


def test_the_seed_decides():
    m = model()
    one, again, other = (list(generate(m, ids(), new_tokens=30, seed=s)) for s in (1, 1, 2))
    assert one == again != other
    assert len(one) == 30
    assert list(generate(m, ids(), new_tokens=30, seed=1, top_k=5)) != one


def test_greedy_is_the_argmax_of_forward():
    m, text = model().double(), ids()
    for token in generate(m, ids(), new_tokens=10, temperature=0):
        assert token == int(m(torch.tensor([text]))[0, -1].argmax())
        text.append(token)


@pytest.mark.parametrize("chunk", [1, 7, 20, 2048])
def test_chunks_of_the_prompt_do_not_matter(chunk):
    m = model().double()
    assert list(generate(m, ids(), new_tokens=12, seed=3, chunk=chunk)) == list(
        generate(m, ids(), new_tokens=12, seed=3)
    )


def test_prompt_may_be_a_tensor_and_tokens_come_one_by_one():
    m = model()
    m.train()
    stream = generate(m, torch.tensor(ids()), new_tokens=5, seed=0)
    first = next(stream)
    assert m.training
    assert torch.is_grad_enabled()
    assert [first, *stream] == list(generate(m, ids(), new_tokens=5, seed=0))


def test_stop_ends_the_text():
    m = model()
    tokens = list(generate(m, ids(), new_tokens=10, seed=0))
    assert list(generate(m, ids(), new_tokens=10, seed=0, stop=tokens[4])) == tokens[: tokens.index(tokens[4])]


def test_dropout_is_off():
    m = model(dropout=0.5)
    assert list(generate(m, ids(), new_tokens=10, temperature=0)) == list(
        generate(m, ids(), new_tokens=10, temperature=0)
    )


FMA = {"block": 8, "near": 16, "rank": 4}
RINGS = {
    "fma": {"attention": "fma", "attention_options": FMA},
    "fma, rotated by the layer": {"attention": "fma", "attention_options": FMA, "rotate": "layer", "log_scale": 30},
    "opened": {"attention": "fma", "attention_options": FMA | {"open": 2}},
    "window": {"attention": "window", "attention_options": {"width": 20, "sinks": 3}, "conv": 0},
    "near-field": {"attention": "near-field", "attention_options": {"block": 8, "near": 16, "sinks": 3}},
    "full": {"attention": "full", "log_scale": 70, "qk_norm": False, "tie": False},
    "lightning": {"attention": "lightning-attention", "kv_heads": None},
    "aaren": {"attention": "aaren", "kv_heads": None},
    "mixed": {
        "attention": "near-field", "attention_options": {"block": 8, "near": 16}, "layers": 4, "every": 2,
        "other": "fma", "other_options": FMA | {"open": 2}, "other_rope_share": 0.0, "other_log_scale": 50,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RINGS)
def test_rings_generate_what_states_do(name):
    """The prompt is longer than what is near, and ends within a block."""
    torch.manual_seed(1)
    m = model(**({"heads": 4, "kv_heads": 2} | RINGS[name]))
    with torch.no_grad():
        for weight in m.parameters():
            weight.mul_(1.5)
    for more in ({"temperature": 0}, {"top_k": 20, "top_p": 0.9, "seed": 2}):
        given = {"prompt": ids(75), "new_tokens": 60, "chunk": 30, **more}
        tokens = list(generate(m, way="ring", **given))
        assert tokens == list(generate(m, way="extend", **given))
        assert len(tokens) == 60
    assert m.training


@pytest.mark.parametrize("name", ["fma", "full", "mixed"])
def test_a_model_steps_a_batch_as_it_extends(name):
    m = model(**({"heads": 4, "kv_heads": 2} | RINGS[name])).double().eval()
    x = torch.randint(256, (3, 90))
    with torch.no_grad():
        _, state = m.extend(x[:, :70])
        ring = m.ring(state, capacity=90)
        assert ring.tokens.tolist() == [70] * 3
        assert ring.nbytes == sum(t.nbytes for t in ring.tensors().values())
        got = torch.cat([m.step(x[:, t : t + 1], ring) for t in range(70, 80)], 1)
        beams = torch.tensor([2, 2, 0])
        ring.reorder_(beams)
        after = torch.cat([m.step(x[beams, t : t + 1], ring) for t in range(80, 90)], 1)
        exact = m(x)
    assert_within(got, exact[:, 70:80], terms=90, units=100)
    assert_within(after, exact[beams, 80:], terms=90, units=100)
    if name == "full":
        with pytest.raises(ValueError, match=r"holds 90 tokens and is full for sequences \[0, 1, 2\]"):
            m.step(x[:, :1], ring)
    with pytest.raises(ValueError, match=r"step takes tokens \[3, 1\], got \[3, 2\]"):
        m.step(x[:, :2], ring)


def test_without_rings_states_decode():
    m = model(attention="hip")
    assert len(list(generate(m, ids(), new_tokens=3, seed=0))) == 3
    with pytest.raises(NotImplementedError, match="hip: no buffers of fixed size"):
        list(generate(m, ids(), new_tokens=3, way="ring"))


def test_more_numbers_than_are_held_at_a_time(monkeypatch):
    m = model()
    want = list(generate(m, ids(), new_tokens=30, seed=1))
    monkeypatch.setattr(sys.modules[generate.__module__], "DRAWS", 7)
    assert list(generate(m, ids(), new_tokens=30, seed=1)) == want
    assert list(generate(m, ids(), new_tokens=30, seed=1, way="ring")) == want


def test_numbers_draw_tokens_in_proportion():
    numbers = (torch.arange(1000).double() + 0.5) / 1000
    for sampling in ((1.0, None, None), (0.5, None, None), (1.0, 2, None), (1.0, None, 0.6), (0, None, None)):
        tokens = drawn(LOGITS.expand(1000, -1), numbers, *sampling)
        share = torch.bincount(tokens, minlength=5) / 1000
        assert share.tolist() == pytest.approx(probabilities(LOGITS, *sampling).tolist(), abs=1e-3)
    # of what has no share nothing is drawn, whatever is lost to rounding
    assert drawn(LOGITS, torch.tensor(1.0).double(), 1.0, 2).item() == 1
    assert drawn(torch.zeros(4), torch.tensor(0.9), 0).item() == 0


@pytest.mark.parametrize("way", ["extend", "ring"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_nan_are_no_tokens(temperature, way):
    diverged = model(attention="window", attention_options={"width": 8})
    with torch.no_grad():
        diverged.embed.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        next(generate(diverged, [1, 2, 3], new_tokens=2, temperature=temperature, way=way))


def test_no_new_tokens():
    assert list(generate(model(), ids(), new_tokens=0)) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": []}, "at least one token"),
        ({"prompt": [256]}, r"0\.\.255"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"chunk": 0}, "chunk"),
        ({"dtype": "int8"}, "dtype"),
        ({"way": "graph"}, "way must be one of auto, ring, extend"),
    ],
)
def test_refuses_at_once(bad, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), **({"prompt": ids(), "new_tokens": 3} | bad))


def test_an_encoder_cannot_generate():
    with pytest.raises(ValueError, match="only a Decoder"):
        generate(Encoder(ModelConfig(vocab=257, attention="full")), ids(), new_tokens=1)
