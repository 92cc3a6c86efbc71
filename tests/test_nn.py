"""Layers and models: rotations, convolution, any chunking, packed documents, what is refused."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from farfield import mechanisms
from farfield.mechanisms.full import Full
from farfield.nn import Attention, Decoder, Encoder, ModelConfig, Rope, ShortConv, build
from farfield.nn import models as models_module
from farfield.state import State
from farfield.testing.inputs import normal
from farfield.testing.units import assert_within
from farfield.train import generate

# small enough that 70 tokens are several blocks
OPTIONS = {"fma": {"block": 8, "near": 8, "rank": 4, "rewind": 4}, "window": {"width": 12, "sinks": 2, "rewind": 4}}
DECODERS = [n for n in mechanisms.names() if mechanisms.get(n).supports.causal and mechanisms.get(n).supports.decode]
PACKED = [n for n in mechanisms.names() if mechanisms.get(n).supports.packed]
ENCODERS = [n for n in mechanisms.names() if mechanisms.get(n).supports.noncausal]


def config(attention="full", **changes) -> ModelConfig:
    shared = 2 if mechanisms.get(attention).supports.grouped else None
    options = {"attention_options": OPTIONS.get(attention, {}), **changes}
    return ModelConfig(**({"width": 32, "layers": 2, "heads": 4, "kv_heads": shared, "attention": attention} | options))


def decoder(attention="full", **changes) -> Decoder:
    return Decoder(config(attention, **changes)).double()


def tokens(batch=2, length=70) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


# Rope


def test_rope_rotates_pairs_by_position():
    rope, x = Rope(8, share=0.5, base=100.0), normal(1, 1, 3, 8)
    angle = torch.tensor([[0.0], [1.5], [7.0]]).double() * torch.tensor([1.0, 0.1], dtype=torch.float64)
    turned = torch.view_as_complex(torch.stack([x[..., :2], x[..., 2:4]], -1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    exact = torch.cat([turned.real, turned.imag, x[..., 4:]], -1)
    assert_within(rope(x, torch.tensor([0.0, 1.5, 7.0])), exact, terms=2)


def test_rope_logits_depend_on_distance_only():
    rope, q, k = Rope(16, share=1.0), normal(1, 2, 1, 16), normal(1, 2, 1, 16, seed=1)
    at = lambda i, j: (rope(q, torch.tensor([i])) * rope(k, torch.tensor([j]))).sum(-1)  # noqa: E731
    assert_within(at(1_000_107.5, 1_000_100), at(7.5, 0), terms=16, units=1e6)  # in float64: 1e-10


def test_rope_is_as_exact_at_a_million_tokens_as_at_none():
    rope, x = Rope(16, share=1.0), normal(1, 1, 64, 16)
    far = torch.arange(1_000_000, 1_000_064)
    assert_within(rope(x.float(), far), rope(x, far), terms=2, units=10)


def test_rope_takes_a_position_per_batch_row():
    rope, x = Rope(8), normal(2, 3, 5, 8)
    both = torch.stack([torch.arange(5), torch.arange(5) + 3])
    for b in range(2):
        assert torch.equal(rope(x, both)[b], rope(x[b : b + 1], both[b])[0])


def test_rope_keeps_dtype_and_leaves_the_rest_alone():
    x = normal(1, 1, 4, 8).bfloat16()
    out = Rope(8, share=0.5)(x, torch.arange(4))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(Rope(8, share=0.0)(x, torch.arange(4)), x)


@pytest.mark.parametrize("bad", [{"share": 1.5}, {"share": -0.1}, {"base": 1.0}, {"share": 0.1}])
def test_rope_refuses(bad):
    with pytest.raises(ValueError, match="Rope: "):
        Rope(8, **bad)


# ShortConv


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_conv_is_a_depthwise_convolution(size, causal):
    conv, x = ShortConv(6, size, causal=causal).double(), normal(2, 9, 6)
    padded = F.pad(x.mT, (conv.before, size - 1 - conv.before))
    exact = F.conv1d(padded, conv.weight.T[:, None], groups=6).mT
    assert_within(conv(x), exact, terms=size)


@pytest.mark.parametrize("causal", [True, False])
def test_conv_keeps_documents_apart(causal):
    conv, x = ShortConv(6, 4, causal=causal).double(), normal(1, 12, 6)
    # document 1 comes twice: the second run is another document
    group = torch.tensor([[1, 1, 1, 2, 1, 1, -1, -1, 3, 3, 3, 3]])
    out = conv(x, group)
    for a, z in ((0, 3), (3, 4), (4, 6), (8, 12)):
        assert torch.equal(out[:, a:z], conv(x[:, a:z]))


# Attention layer and decoder


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "chunks", [(70,), (1,) * 70, (1, 3, 30, 1, 1, 34), (33, 37)], ids=["one", "ones", "mixed", "two"]
)
def test_extend_is_forward_in_any_chunking(name, chunks):
    model, x = decoder(name), tokens()
    exact, state, out = model(x), None, []
    for piece in x.split(chunks, 1):
        logits, state = model.extend(piece, state)
        out.append(logits)
    assert state.tokens == 70
    assert_within(torch.cat(out, 1), exact, terms=70, units=100)


@pytest.mark.parametrize("changes", [{"conv": 0}, {"qk_norm": False}, {"rope_share": 0.0}, {"rotate": "layer"},
                                     {"tie": False}, {"kv_heads": None}, {"log_scale": 30},
                                     {"other": "fma", "other_options": OPTIONS["fma"] | {"open": 2},
                                      "other_rope_share": 0.0, "every": 2}])  # fmt: skip
@pytest.mark.parametrize("name", DECODERS)
def test_extend_is_forward_with_other_options(name, changes):
    model, x = decoder(name, **changes), tokens()
    first, state = model.extend(x[:, :41])
    second, _ = model.extend(x[:, 41:], state)
    assert_within(torch.cat([first, second], 1), model(x), terms=70, units=100)


def test_extend_with_last_makes_the_last_logits_only():
    model, x = decoder(), tokens()
    logits, _ = model.extend(x, last=True)
    assert logits.shape == (2, 1, 256)
    assert_within(logits, model(x)[:, -1:], terms=70, units=100)


def crops(state) -> bool:
    """Whether the layers' states can go back, as FMA's and windows' can and linear ones cannot."""
    return all(type(layer.inner).crop is not State.crop for layer in state.layers)


@pytest.mark.parametrize("name", DECODERS)
def test_state_crops_reorders_copies_and_saves(name):
    model, x = decoder(name), tokens(3)
    exact = model(x)
    _, state = model.extend(x[:, :50])
    last, longer = model.extend(x[:, 50:], state)

    if crops(longer):
        shorter = longer.crop(4)
        assert shorter.tokens == 66
        assert_within(model.extend(x[:, 66:], shorter)[0], exact[:, 66:], terms=70, units=100)
    else:
        with pytest.raises(NotImplementedError, match="keep the state from before the draft"):
            longer.crop(4)

    beams = torch.tensor([2, 0, 0])
    assert torch.equal(model.extend(x[beams, 50:], state.reorder(beams))[0], last[beams])

    tensors = {name: t.clone() for name, t in state.tensors().items()}
    assert state.nbytes == sum(t.nbytes for t in tensors.values()) > 0
    again = state.copy().replaced(tensors)
    assert torch.equal(model.extend(x[:, 50:], again)[0], last)
    # extend never changed the state it was given
    assert torch.equal(model.extend(x[:, 50:], state)[0], last)


def test_crop_of_more_than_is_kept_is_refused_in_words():
    model = decoder()
    _, state = model.extend(tokens())
    with pytest.raises(ValueError, match="keep the state from before the draft"):
        state.crop(40)
    with pytest.raises(ValueError, match="cannot drop 71 of 70"):
        state.crop(71)
    _, short = model.extend(tokens(length=20))
    assert short.crop(20).tokens == 0
    assert torch.equal(model.extend(tokens(), short.crop(20))[0], model.extend(tokens())[0])


def test_what_does_not_fit_a_model_is_refused_in_words():
    model, x = decoder(), tokens()
    _, state = model.extend(x)
    calls = (
        (lambda: model(x + 200), r"must lie below vocab=256 and not below 0, got \d+\.\.\d+"),
        (lambda: model(x, torch.zeros(len(x), 69).long()), r"group must be \[B, T\] = .*got \[2, 69\]"),
        (lambda: model.extend(x[:1], state), "the state holds 2 sequences, got 1"),
        (
            lambda: model.blocks[0].attention(torch.zeros(2, 5, 7)),
            r"x must be \[batch, tokens, width=.*got \[2, 5, 7\]",
        ),
        (lambda: generate(model, "text", new_tokens=1), "prompt must be token ids, got text; encode it first"),
    )
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_never_reads_the_future(name):
    model, x = decoder(name), tokens()
    changed = torch.cat([x[:, :33], (x[:, 33:] + 1) % 256], 1)
    assert torch.equal(model(changed)[:, :33], model(x)[:, :33])


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_packed_documents_equal_separate_sequences(name, kind):
    if kind is Encoder and name not in ENCODERS:
        pytest.skip("causal only")
    model, x = kind(config(name)).double(), tokens(1)
    group = torch.tensor([[5] * 31 + [2] * 1 + [5] * 20 + [-1] * 7 + [7] * 11])
    out = model(x, group)
    for a, z in ((0, 31), (31, 32), (32, 52), (59, 70)):
        assert_within(out[:, a:z], model(x[:, a:z]), terms=70, units=1e4)
    loss = model.loss(x, x, group, reduction="none")
    assert_within(loss[:, 32:52], model.loss(x[:, 32:52], x[:, 32:52], reduction="none"), terms=70, units=1e4)


def test_packing_is_refused_where_the_mechanism_cannot():
    class Unpacked(Full):
        supports = Full.supports.__class__(packed=False)

    layer = Attention(16, 2, mechanism=Unpacked())
    with pytest.raises(NotImplementedError, match="cannot pack documents"):
        layer(torch.randn(1, 4, 16), torch.zeros(1, 4, dtype=torch.long))


def test_rotating_before_and_inside_the_mechanism():
    """Full attention never pools, so both agree; a mechanism that places rotations gets unrotated keys."""
    seen = {}

    class Spy(Full):
        supports = Full.supports.__class__(rotary=True)

        def forward(self, q, k, v, *, group=None, rotary=None):
            seen["rotary"] = rotary
            if rotary is not None:
                at = torch.arange(q.shape[2])
                q, k = rotary(q, at), rotary(k, at)
            return super().forward(q, k, v, group=group)

    x = normal(2, 20, 16)
    inside, before = (Attention(16, 2, mechanism=Spy(), rotate=r).double() for r in ("mechanism", "layer"))
    before.load_state_dict(inside.state_dict())
    a = inside(x)
    assert seen["rotary"] is inside.rope
    b = before(x)
    assert seen["rotary"] is None
    assert torch.equal(a, b)


def test_queries_grow_with_the_log_of_their_position():
    """The literal factor, beyond n only; and the gradient passes."""
    seen = []

    class Spy(Full):
        def forward(self, q, k, v, *, group=None, rotary=None):
            seen.append((q, k))
            return super().forward(q, k, v, group=group)

    plain, grown = (Attention(16, 2, mechanism=Spy(), log_scale=n).double() for n in (0, 12))
    grown.load_state_dict(plain.state_dict())
    x = normal(2, 30, 16)
    a, b = plain(x), grown(x)
    (q, k), (q2, k2) = seen
    assert torch.equal(k, k2)
    assert torch.equal(a[:, :12], b[:, :12])
    factor = torch.tensor([max(1.0, math.log(t + 1) / math.log(12)) for t in range(30)], dtype=torch.float64)
    assert factor[29] > 1.3
    assert_within(q2, q * factor[:, None], terms=2)
    assert not torch.equal(a[:, 12:], b[:, 12:])


@pytest.mark.parametrize("rotate", ["mechanism", "layer"])
def test_other_layers_may_carry_no_positions(rotate):
    """There the order of earlier tokens makes no difference; the layers between stay as they are."""
    options = {"layers": 4, "every": 2, "conv": 0, "rotate": rotate}
    both = [decoder("window", other="full", other_rope_share=share, **options) for share in (None, 0.0)]
    both[1].load_state_dict(both[0].state_dict())
    x = normal(2, 30, 32)
    order = torch.cat([torch.randperm(25, generator=torch.Generator().manual_seed(0)), torch.arange(25, 30)])
    for number in range(4):
        rotated, without = (model.blocks[number].attention for model in both)
        if number % 2 == 0:
            assert torch.equal(without(x), rotated(x))
            continue
        exact = without(x)[:, 25:]
        assert_within(without(x[:, order])[:, 25:], exact, terms=30, units=100)
        with pytest.raises(AssertionError):
            assert_within(rotated(x[:, order])[:, 25:], rotated(x)[:, 25:], terms=30, units=1e6)


def test_log_scale_of_other_layers_alone():
    plain, all_of_them, others = (
        decoder("window", other="full", layers=4, every=2, **given)
        for given in ({}, {"log_scale": 12}, {"other_log_scale": 12})
    )
    for model in (all_of_them, others):
        model.load_state_dict(plain.state_dict())
    x = normal(2, 30, 32)
    for number in range(4):
        wanted = all_of_them if number % 2 else plain
        layers = (model.blocks[number].attention for model in (others, wanted))
        assert torch.equal(*(layer(x) for layer in layers))
    assert not torch.equal(plain.blocks[1].attention(x), others.blocks[1].attention(x))


def test_log_scale_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="log_scale=1 and causal=True"):
        Attention(16, 2, log_scale=1)
    with pytest.raises(ValueError, match="causal=False"):
        Attention(16, 2, mechanism="full", causal=False, log_scale=64)
    layer = Attention(16, 2, mechanism="full", log_scale=4)
    group = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="log_scale=4 counts from the sequence's beginning"):
        layer(torch.randn(1, 5, 16), group)
    layer(torch.randn(1, 4, 16), group[:, :4])


def test_norm_bounds_the_logits_by_the_gain():
    layer = Attention(32, 2, mechanism="full")
    with torch.no_grad():
        q, k, _, _ = layer._placed(*layer._heads(100 * torch.randn(1, 8, 32)), torch.arange(8), False)
    assert float(layer.gain[0].detach()) == pytest.approx(1.6)
    assert float((q @ k.mT).abs().max()) / 4 <= 1.6 * 4 * 1.001  # gain * sqrt(D)


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_autocast_and_gradients(name):
    model = Decoder(config(name))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens(), tokens())
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, state = model.extend(tokens())
        model.extend(tokens(length=1), state)


def test_loss_is_cross_entropy_however_it_is_chunked(monkeypatch):
    model, x, y = decoder(), tokens(), tokens().roll(-1, 1)
    y[0, :5] = -100
    exact = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    exact.backward()
    gradient = model.embed.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(models_module, "LOGITS", 256 * 13)
    loss = model.loss(x, y)
    loss.backward()
    assert_within(loss, exact, terms=140)
    assert_within(model.embed.weight.grad, gradient, terms=140, units=100)
    nats = model.loss(x, y, reduction="none")
    assert nats.shape == x.shape
    assert not nats[0, :5].any()


def test_start_is_near_uniform():
    with torch.no_grad():
        loss = float(Decoder(config(width=64)).loss(tokens(), tokens().roll(1)))
    assert abs(loss - 5.545) < 0.1  # log 256


def test_a_mechanism_with_parameters_is_told_the_shape():
    if "fma" not in mechanisms.names():
        pytest.skip("no mechanism with parameters")
    model = Decoder(config("fma", attention_options=OPTIONS["fma"] | {"pool": "learned"}))
    assert any("mechanism" in name for name, _ in model.named_parameters())
    model.loss(tokens(), tokens()).backward()


def test_own_mechanism_instance_is_taken_and_checked():
    own = Full(causal=True)
    assert Attention(16, 2, mechanism=own).mechanism is own
    with pytest.raises(ValueError, match="causal=False"):
        Attention(16, 2, mechanism=own, causal=False)
    with pytest.raises(ValueError, match="need a mechanism's name"):
        Attention(16, 2, mechanism=own, options={"scale": 1.0})
    with pytest.raises(ValueError, match="options say causal=False"):
        Attention(16, 2, mechanism="full", options={"causal": False})


# Encoder


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_trains_and_its_loss_drops(name):
    model = Encoder(config(name, vocab=257, layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    text = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 8), dtype=torch.uint8).long()
    draw, losses = torch.Generator().manual_seed(0), []
    for _ in range(30):
        loss = model.loss(*model.corrupt(text[None, :320].view(4, 80), generator=draw))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_encoder_sees_both_sides():
    model, x = Encoder(config(vocab=257)).double(), tokens()
    changed = x.clone()
    changed[:, -1] = (x[:, -1] + 1) % 256
    assert (model(changed)[:, 0] != model(x)[:, 0]).any()


def test_corruption_hides_the_share_asked_for():
    model, x = Encoder(config(vocab=257)), torch.randint(256, (8, 4000))
    hidden, targets = model.corrupt(x, share=0.2, generator=torch.Generator().manual_seed(0))
    chosen = targets >= 0
    assert 0.19 < float(chosen.double().mean()) < 0.21
    assert torch.equal(hidden[~chosen], x[~chosen])
    assert torch.equal(targets[chosen], x[chosen])
    assert 0.78 < float((hidden[chosen] == model.mask_token).double().mean()) < 0.82
    again = model.corrupt(x, share=0.2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hidden, again[0])
    with pytest.raises(ValueError, match="share"):
        model.corrupt(x, share=0)


# ModelConfig


def test_a_config_from_before_a_field_takes_its_default():
    values = config("full", other="window").to_dict()
    del values["other_rope_share"]
    model = build(ModelConfig.from_dict(values | {"every": 2}))
    assert [block.attention.rope.pairs for block in model.blocks] == [2, 2]


def test_config_round_trip():
    made = config("full", attention_options={"scale": 0.5}, kind="encoder", vocab=257)
    again = ModelConfig.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert isinstance(build(again), Encoder)
    assert isinstance(build(config()), Decoder)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"width": 30}, "multiple of heads.*width=32 would do"),
        ({"kv_heads": 3}, "kv_heads must divide"),
        ({"layers": 0}, "layers must be a whole number of at least 1"),
        ({"rope_share": 2}, "rope_share"),
        ({"other_rope_share": -0.5}, "other_rope_share must lie in 0..1, got -0.5"),
        ({"other_log_scale": -8}, "other_log_scale must be None or a whole number of at least 0, got -8"),
        ({"dropout": 1.0}, "dropout"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"rotate": "never"}, "rotate"),
        ({"kind": "both"}, "kind"),
        ({"attention": "ful"}, "did you mean full"),
        ({"vocab": 1}, "vocab"),
        ({"rope_share": "half"}, "rope_share must be a number, got 'half'"),
        ({"other_rope_share": "none"}, "other_rope_share must be a number or None, got 'none'"),
        ({"every": "often"}, "every must be a whole number, got 'often'"),
        ({"kv_heads": [2]}, r"kv_heads must be a whole number or None, got \[2\]"),
        ({"every": float("inf")}, "every must be a whole number, got inf"),
        ({"attention_options": 3}, r"attention_options must be \{option: value\}, got 3"),
        ({"tie": "no"}, "tie must be true or false, got 'no'"),
    ],
)
def test_config_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        config(**bad)


def test_config_suggests_the_nearest_field():
    with pytest.raises(ValueError, match="no field 'layer'; did you mean layers"):
        ModelConfig.from_dict({"layer": 3})


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.long), torch.zeros(1, 3)])
def test_tokens_must_be_a_batch_of_integers(bad):
    with pytest.raises(ValueError, match="tokens must be integers"):
        Decoder(config())(bad)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_memory_only(dropout):
    tokens = torch.randint(256, (2, 40))
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        options = {"block": 8, "near": 8, "rank": 2}
        config = ModelConfig(
            width=32, layers=2, heads=2, attention_options=options, dropout=dropout, checkpoint=checkpoint
        )
        model = Decoder(config).train()
        torch.manual_seed(1)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again)
