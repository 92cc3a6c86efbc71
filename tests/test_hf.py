"""farfield.hf: mechanisms in a model of Transformers, here a tiny one with random weights."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from farfield import mechanisms
from farfield.cli import app
from farfield.testing.units import assert_within, error_units

transformers = pytest.importorskip("transformers", reason="needs Transformers, the extra [hf]")

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
    with pytest.raises(ValueError, match="no layer '0'"):
        hf.use(model, layers={"0": "full"})
    with pytest.raises(ValueError, match="3 layers, and layers names 1"):
        hf.use(model, layers=["full"])
    for layers in ("full", 3):
        with pytest.raises(TypeError, match=f"one mechanism for each layer, got {layers!r}"):
            hf.use(model, layers=layers)
    for choice in (None, 3, mechanisms.get("fma"), ("fma",), ({}, "fma"), ("fma", ["open"])):
        with pytest.raises(TypeError, match=r"a mechanism is a name, \(name, .* such as FMA\(\), got "):
            hf.use(model, layers={0: choice})
    with pytest.raises(TypeError, match="a loaded PreTrainedModel, got 'llama'"):
        hf.use("llama")
    # 1 / sqrt(D) is not the same number however it is computed
    nearly = mechanisms.make("window", scale=math.nextafter(8**-0.5, 1.0))
    hidden(hf.use(model, nearly), ids)
    with pytest.raises(ValueError, match=r"but this window was built with causal=True, scale=0\.3"):
        hf.use(model, mechanisms.make("window", scale=0.3))
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
    with pytest.raises(ValueError, match=r"call farfield\.hf\.use first"):
        hf.in_use(model)


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
    for wrong in (ids[0].tolist(), ids[0].float(), ids[0] > 3):
        with pytest.raises(TypeError, match="ids must be a tensor of integers, got"):
            hf.perplexity(model, wrong)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        hf.perplexity(model, ids[0], chunk=0)
    for last in (0, -3):
        with pytest.raises(ValueError, match=f"last must be at least 1, .*got {last}"):
            found.over(last)
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


def diverged(p, q):
    """KL(p || q) of logits, mean over tokens, literally."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def test_losses_are_those_of_one_changed_layer(model, ids):
    candidates = ["full", ("window", {"width": 5, "sinks": 0}), ("near-field", {"block": 4, "near": 8})]
    found = list(hf.losses(model, ids[0], candidates, chunk=16))
    assert [(x.layer, x.candidate) for x in found] == [(layer, c) for layer in range(3) for c in range(3)]
    assert [x.name for x in hf.in_use(model)] == ["full"] * 3
    double = copy.deepcopy(model).double()
    exact = double(ids[:1, :], use_cache=False).logits[0, :-1]
    for each in found:
        hf.use(double, "full", layers={each.layer: candidates[each.candidate]})
        logits = double(ids[:1, :], use_cache=False).logits[0, :-1]
        rise = (exact.log_softmax(-1) - logits.log_softmax(-1)).gather(1, ids[0, 1:, None]).mean()
        assert each.divergence == pytest.approx(diverged(exact, logits), rel=1e-3, abs=1e-6)
        assert each.rise == pytest.approx(float(rise), rel=1e-3, abs=1e-6)
        assert each.rows == hf.in_use(double)[each.layer].rows_read(TOKENS)
    assert min(x.divergence for x in found if x.candidate) > 0.01
    (one,) = hf.losses(model, ids[0], candidates[1:2], layers=[2])
    assert one.divergence == pytest.approx(found[7].divergence)
    # what was skipped is computed again
    assert torch.equal(hidden(model, ids), hidden(hf.use(copy.deepcopy(model), "full"), ids))
    with pytest.raises(ValueError, match=r"no layers \[3, -1\]; the model has 0 \.\.\. 2"):
        list(hf.losses(model, ids[0], candidates, layers=[0, 3, -1]))


def test_plan_is_the_best_there_is():
    torch.manual_seed(3)
    convex = 1 / torch.arange(1.0, 5)
    found = []
    for layer, share in enumerate(torch.rand(4).tolist()):
        # a candidate that is worse than others for its rows is of no use
        found += [hf.Loss(layer, c, 10.0 * (c + 1), share * float(convex[c]), 0.0) for c in range(4)]
        found.append(hf.Loss(layer, 4, 25.0, share, 0.0))
    cost = {(x.layer, x.candidate): (x.rows, x.divergence) for x in found}

    def total(picks, what):
        return sum(cost[layer, pick][what] for layer, pick in enumerate(picks))

    for rows in (10, 12.5, 20, 27.5, 40):
        allowed = (picks for picks in itertools.product(range(5), repeat=4) if total(picks, 0) <= 4 * rows)
        assert hf.plan(found, rows) == list(min(allowed, key=lambda picks: total(picks, 1)))
    assert hf.plan(found, 1000.0) == [3] * 4
    # what several texts say is averaged
    other = [replace(x, divergence=0.0) for x in found]
    assert hf.plan([*found, *other], 27.5) == hf.plan(found, 27.5)
    with pytest.raises(ValueError, match=r"the cheapest candidates read 10\.0 rows, more than 9\.9"):
        hf.plan(found, 9.9)
    with pytest.raises(ValueError, match="more than nan"):
        hf.plan(found, float("nan"))
    with pytest.raises(ValueError, match=r"must all be measured, got \[0, 1, 3\]"):
        hf.plan([x for x in found if x.layer != 2], 20.0)


def test_budget(folder, monkeypatch):
    monkeypatch.chdir(folder)
    args = ["budget", "--model", "tiny", "--text", "text.txt", "-n", "100", "--start", "0,40", "--out", "p.json"]
    args += ["-a", "near-field:block=8,near=8,fma:block=8,near=8,rank=2,score=mean", "--vary", "open=1,4"]
    measured = []
    monkeypatch.setattr(hf, "losses", lambda *a, each=hf.losses, **o: measured.append([*o["layers"]]) or each(*a, **o))

    def run(*more, code=0):
        done = CliRunner().invoke(app, [*args, *more])
        assert done.exit_code == code, done.output
        return done

    done = run("--rows", "30%")
    assert measured == [[0, 1, 2]] * 2
    assert len(done.stdout.strip().splitlines()) == 5
    held = json.loads((folder / "p.json").read_text())
    assert [x[:3] for x in held["measured"][:4]] == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]]
    assert len(held["measured"]) == 2 * 3 * 3
    losses = [hf.Loss(*x[1:]) for x in held["measured"]]
    wanted = [held["candidates"][pick] for pick in hf.plan(losses, 30.0)]
    assert held["layers"] == wanted == [list(x) for x in hf.read_plan("p.json")]
    # other rows take no measuring, nor the model; a run that was cut goes on with the layer it was in
    (folder / "tiny").rename(folder / "away")
    run("--rows", "12")
    (folder / "away").rename(folder / "tiny")
    # where it was measured is kept
    assert json.loads((folder / "p.json").read_text())["env"] == held["env"]
    assert held["env"]["command"]
    assert json.loads((folder / "p.json").read_text())["layers"] == [["near-field", {"block": 8, "near": 8}]] * 3
    cut = held | {"measured": held["measured"][:13]}
    del cut["layers"]
    (folder / "p.json").write_text(json.dumps(cut))
    with pytest.raises(ValueError, match="no plan of farfield budget, or one that is not finished"):
        hf.read_plan("p.json")
    measured.clear()
    run("--rows", "30%")
    assert measured == [[1, 2]]
    again = json.loads((folder / "p.json").read_text())
    assert again["layers"] == held["layers"]
    assert torch.tensor(again["measured"]).allclose(torch.tensor(held["measured"]))

    # and a plan is what perplexity takes
    given = ["--model", "tiny", "--text", "text.txt", "-n", "100", "--last", "20", "-a", "full"]
    done = CliRunner().invoke(app, ["perplexity", *given, "--plan", "p.json"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip().splitlines()[-1].endswith("p.json")
    from farfield.bench import records

    *_, last = records.load(records.results_path("perplexity"))
    assert last.params["layers"] == held["layers"]
    model = transformers.LlamaForCausalLM.from_pretrained("tiny")
    hf.use(model, layers=hf.read_plan("p.json"))
    ids = torch.tensor(
        transformers.AutoTokenizer.from_pretrained("tiny")((folder / "text.txt").read_text())["input_ids"]
    )
    assert last.rates["perplexity"] == pytest.approx(hf.perplexity(model, ids[:100]).over())
    rows = [x.rows_read(100) or 0.0 for x in hf.in_use(model)]
    assert (last.rates["rows"], last.rates["rows_most"]) == (pytest.approx(sum(rows) / 3), max(rows))

    for more, why in (
        (["--rows", "5%"], "more than 5.0"),
        (["--rows", "120%"], "at most the window's 100 tokens"),
        (["--rows", "few"], "--rows takes a number"),
        (["--rows", "30%", "--start", "0,-4"], "--start takes different whole numbers"),
        (["--rows", "30%", "--vary", "open=few"], "--vary takes numbers"),
        (["--rows", "30%", "--vary", "hold=1", "-a", "full"], "none of full has that option"),
        (["--rows", "30%", "-n", "90"], "measured with another tokens; give another --out"),
        (["--rows", "30%", "--out", "text.txt"], "not a plan of farfield budget"),
    ):
        assert why in " ".join(run(*more, code=2).output.split())


def test_a_library_that_is_missing_is_named(folder, monkeypatch):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else there(name))
    done = CliRunner().invoke(app, ["perplexity", "--model", str(folder), "--gguf", "x.gguf", "--text", "text.txt"])
    assert done.exit_code == 2
    assert "perplexity needs gguf: pip install gguf" in done.output
