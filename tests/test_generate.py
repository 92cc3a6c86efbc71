"""Generation: what may be drawn, that seeds decide, that chunks do not matter."""

import pytest
import torch

from farfield.nn import Decoder, Encoder, ModelConfig
from farfield.train.generate import generate, probabilities

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
    ],
)
def test_refuses_at_once(bad, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), **({"prompt": ids(), "new_tokens": 3} | bad))


def test_an_encoder_cannot_generate():
    with pytest.raises(ValueError, match="only a Decoder"):
        generate(Encoder(ModelConfig(vocab=257, attention="full")), ids(), new_tokens=1)
