"""farfield.hf: mechanisms in a model of Transformers, here a tiny one with random weights."""

from __future__ import annotations

import copy

import pytest
import torch
from typer.testing import CliRunner

from farfield import mechanisms
from farfield.cli import app
from farfield.testing.units import assert_within, error_units

transformers = pytest.importorskip("transformers", reason="Transformers is an optional extra: farfield[hf]")

from farfield import hf  # noqa: E402

TOKENS = 70
SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def model():
    # weights large enough that attention is not the mean of everything
    config = transformers.LlamaConfig(**SIZES, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(SIZES["vocab_size"], (2, TOKENS))


def hidden(model, *args, **options):
    with torch.no_grad():
        return model.base_model(*args, use_cache=False, **options).last_hidden_state


def exact(model, *args, attention="eager", **options):
    """The same in float64, by Transformers' own attention."""
    other = copy.deepcopy(model).double()
    other.set_attn_implementation(attention)
    return hidden(other, *args, **options)


def units(model, ids):
    """Three times what Transformers' own attention is off by: rounding goes through all layers, not through one sum."""
    model.set_attn_implementation("eager")
    return max(3.0, 3 * error_units(hidden(model, ids), exact(model, ids), terms=TOKENS))


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_full_is_the_models_own_attention(model, ids, own):
    wanted, allowed = exact(model, ids, attention=own), units(model, ids)
    got = hidden(hf.use(model, "full"), ids)
    assert_within(got, wanted, terms=TOKENS, units=allowed)


def test_window_is_transformers_sliding_window(ids):
    config = transformers.MistralConfig(**SIZES, initializer_range=0.3, sliding_window=9, attn_implementation="eager")
    windowed = transformers.MistralForCausalLM(config).eval()
    wanted, allowed = exact(windowed, ids), units(windowed, ids)
    config = copy.deepcopy(config)
    config.sliding_window = None
    plain = transformers.MistralForCausalLM(config).eval()
    plain.load_state_dict(windowed.state_dict())
    with pytest.raises(AssertionError):
        assert_within(hidden(plain, ids), wanted, terms=TOKENS, units=allowed)
    got = hidden(hf.use(plain, "window", {"width": 9, "sinks": 0}), ids)
    assert_within(got, wanted, terms=TOKENS, units=allowed)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("full", {}), ("fma", {"block": 4, "near": 8, "rank": 2, "sinks": 2}), ("window", {"width": 9})],
)
def test_padding_is_seen_by_nobody(model, ids, name, options, side):
    allowed = units(model, ids)
    hf.use(model, name, options)
    real = slice(11, None) if side == "left" else slice(0, TOKENS - 11)
    mask = torch.zeros(2, TOKENS, dtype=torch.long)
    mask[0], mask[1, real] = 1, 1
    position = (mask.cumsum(1) - 1).clamp(min=0)
    got = hidden(model, ids, attention_mask=mask, position_ids=position)
    alone = hidden(copy.deepcopy(model).double(), ids[1:, real])
    assert_within(got[1:, real], alone, terms=TOKENS, units=allowed)
    if side == "left":
        # the test would notice a mask that is dropped
        seen = hidden(model, ids, attention_mask=torch.ones_like(mask), position_ids=position)[1:, real]
        with pytest.raises(AssertionError):
            assert_within(seen, alone, terms=TOKENS, units=allowed)


def test_what_cannot_be_honoured_is_refused(model, ids):
    hf.use(model, "moba", {"block": 16})
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with pytest.raises(NotImplementedError, match="moba: cannot pack documents or mask padding"):
        hidden(model, ids, attention_mask=mask)
    hf.use(model, "full")
    mask[:, 20] = 0
    with pytest.raises(NotImplementedError, match="holes between tokens"):
        hidden(model, ids, attention_mask=mask)
    with pytest.raises(NotImplementedError, match="mask of 4 dimensions"):
        hidden(model, ids, attention_mask=torch.zeros(2, 1, TOKENS, TOKENS))
    with pytest.raises(NotImplementedError, match="packed sequences"):
        hidden(model, ids, position_ids=torch.arange(TOKENS)[None] % 40)
    with pytest.raises(NotImplementedError, match="no cache yet"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    sliding = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=9))
    with pytest.raises(NotImplementedError, match="sliding window"):
        hidden(hf.use(sliding, "full"), ids)
    model.config.attention_dropout = 0.1
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="dropout"):
        model.train()(ids, use_cache=False)


def test_generates_without_a_cache(model, ids):
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    assert torch.equal(hf.use(model, "full").generate(ids, use_cache=False, **options), wanted)


def test_layers_may_differ(model, ids):
    own = mechanisms.make("window", width=5)
    hf.use(model, "fma", {"block": 4, "near": 8, "rank": 2}, layers={0: "full", -1: own})
    assert [x.name for x in hf.in_use(model)] == ["full", "fma", "window"]
    assert hf.in_use(model)[2] is own
    hf.use(model, layers=["full", ("window", {"width": 4}), "full"])
    assert [x.name for x in hf.in_use(model)] == ["full", "window", "full"]
    assert hf.in_use(model)[1].width == 4
    # the layers are numbered as the model runs them
    wanted, allowed = exact(model, ids), units(copy.deepcopy(model), ids)
    changed = hidden(hf.use(model, "full", layers={1: ("window", {"width": 4, "sinks": 0})}), ids)
    assert_within(changed[:, :4], wanted[:, :4], terms=TOKENS, units=allowed)
    with pytest.raises(AssertionError):
        assert_within(changed[:, 4:], wanted[:, 4:], terms=TOKENS, units=allowed)
    with pytest.raises(ValueError, match="no layer 3"):
        hf.use(model, layers={3: "full"})
    with pytest.raises(ValueError, match="3 layers, and layers names 1"):
        hf.use(model, layers=["full"])
    with pytest.raises(ValueError, match="built with causal=False"):
        hf.use(model, mechanisms.make("window", causal=False))
    with pytest.raises(ValueError, match="come from the model"):
        hf.use(model, "fma", {"scale": 1.0})
    with pytest.raises(ValueError, match="goes through Transformers"):
        hf.use(torch.nn.Linear(2, 2))


def test_own_attention_comes_back(model, ids):
    wanted = hidden(model, ids)
    hf.use(model, "window", {"width": 3})
    assert not torch.equal(hidden(model, ids), wanted)
    model.set_attn_implementation("sdpa")
    assert torch.equal(hidden(model, ids), wanted)


def test_mechanisms_with_parameters_are_the_models(model, ids):
    hf.use(model, "fma", {"block": 4, "near": 8, "rank": 2, "pool": "conv", "levels": 4, "value_width": 8})
    assert any("farfield.pool" in name for name, _ in model.named_parameters())
    model(ids, use_cache=False, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "farfield.pool" in name]
    assert grads
    assert any(g is not None and g.any() for g in grads)


def test_perplexity_is_that_of_the_models_loss(model, ids):
    found = hf.perplexity(model, ids[0], chunk=16)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(ids[:1]).logits[0]
    wanted = -logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert_within(found.losses, wanted, terms=SIZES["vocab_size"], units=10)
    # as the model itself has it
    assert found.losses.mean().item() == pytest.approx(model(ids[:1], labels=ids[:1]).loss.item())
    assert found.over(5) == pytest.approx(found.losses[-5:].double().mean().exp().item())
    with pytest.raises(ValueError, match="n >= 2"):
        hf.perplexity(model, ids[0, :1])
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(NotImplementedError, match="final_logit_softcapping"):
        hf.perplexity(model, ids[0])


@pytest.fixture
def folder(model, tmp_path):
    """A model and its tokenizer of single bytes, as saved."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tiny")
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 256})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 20)
    return tmp_path


def test_command(folder, monkeypatch):
    monkeypatch.chdir(folder)
    args = ["perplexity", "--model", "tiny", "--text", "text.txt", "-n", "100", "--last", "20", "--start", "3"]
    done = CliRunner().invoke(app, [*args, "-a", "full,fma:block=8,near=8,rank=2,sinks=2", "--full-layers", "0,-1"])
    assert done.exit_code == 0, done.output
    _, first, second = done.stdout.strip().splitlines()
    assert first.split()[2:] == ["50", "50.5%", "full"]
    assert second.endswith("fma:block=8,near=8,rank=2,sinks=2")

    from farfield.bench import records

    full, fma = records.load(records.results_path("perplexity"))
    assert full.params["start"] == 3
    assert full.rates["rows"] == 50.5
    assert fma.params["full_layers"] == [0, -1]
    assert full.rates["perplexity"] != fma.rates["perplexity"]
    model = transformers.LlamaForCausalLM.from_pretrained("tiny")
    ids = torch.tensor(
        transformers.AutoTokenizer.from_pretrained("tiny")((folder / "text.txt").read_text()[3:])["input_ids"]
    )
    assert full.rates["perplexity"] == pytest.approx(hf.perplexity(model, ids[:100]).over())

    short = CliRunner().invoke(app, [*args[:-4], "--last", "20", "--start", "600"])
    assert short.exit_code == 2
    assert "text shorter than n" in short.output


def test_a_library_that_is_missing_is_named(folder, monkeypatch):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else there(name))
    done = CliRunner().invoke(app, ["perplexity", "--model", str(folder), "--gguf", "x.gguf", "--text", "text.txt"])
    assert done.exit_code == 2
    assert "perplexity needs gguf: pip install 'farfield[hf]'" in done.output
