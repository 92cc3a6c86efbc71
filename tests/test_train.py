"""Training: exact resume, checkpoints that survive crashes, optimizers, schedules, evaluation."""

import copy
import errno
import json
import math
import os
import pickle
import signal
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from farfield import mechanisms
from farfield.nn import Decoder, Encoder, ModelConfig
from farfield.train import checkpoint, loop
from farfield.train.config import TrainConfig, pick_device
from farfield.train.data import Split, open_data
from farfield.train.evaluate import REPEATS, copy_probe, evaluate, last_repeat, token_bits
from farfield.train.fast import compiled
from farfield.train.loop import train
from farfield.train.optim import Optimizers, PlainMuon, StackedMuon, rate, split_parameters
from farfield.train.report import read_log


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(300)))
    return path


@pytest.fixture
def config(text, tmp_path):
    def make(**changes) -> TrainConfig:
        plain = {"text": str(text), "cache": str(tmp_path / "cache"), "out": str(tmp_path / "run"), "device": "cpu"}
        plain |= {"tokens": 32, "batch": 2, "steps": 12, "warmup": 3}
        plain |= {"save_every": 4, "eval_every": 5, "log_every": 2, "eval_windows": 2}
        return TrainConfig(**(plain | changes))

    return make


def model_config(**changes) -> ModelConfig:
    return ModelConfig(**({"width": 16, "layers": 1, "heads": 2, "attention": "full"} | changes))


def run(model, config, **options):
    return train(model, config, progress=False, **options)


def weights(result):
    return result.model.state_dict()


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


class Cut(Exception):
    pass


def cut_at(step):
    def on_step(now):
        if now == step:
            raise Cut

    return on_step


# Resume


@pytest.mark.parametrize("step", [5, 8, 11])
@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 3}, {"optimizer": "adamw", "schedule": "cosine"}, {"dtype": "bfloat16"}],
    ids=["muon", "accumulate", "adamw", "bfloat16"],
)
def test_a_run_cut_at_any_step_and_resumed_is_the_same_run(config, tmp_path, changes, step):
    model = model_config(dropout=0.1)
    whole = run(model, config(out=str(tmp_path / "whole"), **changes))
    with pytest.raises(Cut):
        run(model, config(**changes), on_step=cut_at(step))
    torch.manual_seed(123)  # another process has other random states
    resumed = run(model, config(**changes), resume=True)
    assert_same(weights(whole), weights(resumed))
    assert [e["step"] for e in resumed.history] == [e["step"] for e in whole.history]
    bits = [[e["bits_per_byte"] for e in r.history if "bits_per_byte" in e] for r in (whole, resumed)]
    assert bits[0] == bits[1]


@pytest.mark.parametrize("name", mechanisms.names())
def test_resume_is_exact_with_every_mechanism(config, tmp_path, name):
    if not mechanisms.get(name).supports.training:
        pytest.skip("does not train")
    model = model_config(attention=name)
    whole = run(model, config(steps=6, out=str(tmp_path / "whole")))
    with pytest.raises(Cut):
        run(model, config(steps=6), on_step=cut_at(5))
    assert_same(weights(whole), weights(run(model, config(steps=6), resume=True)))


def test_an_encoder_resumes_exactly_too(config, tmp_path):
    model = model_config(kind="encoder", vocab=257)
    whole = run(model, config(out=str(tmp_path / "whole")))
    assert isinstance(whole.model, Encoder)
    with pytest.raises(Cut):
        run(model, config(), on_step=cut_at(6))
    assert_same(weights(whole), weights(run(model, config(), resume=True)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signals_save_and_say_how_to_resume(config, tmp_path, number, capsys):
    whole = run(model_config(), config(out=str(tmp_path / "whole")))
    before = signal.getsignal(number)
    stopped = train(model_config(), config(), on_step=lambda step: os.kill(os.getpid(), number) if step == 7 else None)
    assert signal.getsignal(number) is before
    assert stopped.interrupted
    assert (stopped.step, stopped.checkpoint.name) == (7, "step-000007")
    assert "Stopped at step 7 of 12" in (said := capsys.readouterr().err)
    assert "--resume" in said
    resumed = run(model_config(), config(), resume=True)
    assert not resumed.interrupted
    assert_same(weights(whole), weights(resumed))


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a process started in the background without a terminal does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_ctrl_c_stops_at_once(config):
    def on_step(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(model_config(), config(), on_step=on_step)


def test_accumulation_reads_the_same_samples(config, tmp_path):
    """Four sequences at once, or two and two: the same gradient but for rounding."""
    results = [
        run(model_config(), config(steps=2, clip=0, out=str(tmp_path / str(i)), batch=b, accumulate=a))
        for i, (b, a) in enumerate(((4, 1), (2, 2)))
    ]
    first = [next(e["loss"] for e in r.history if "loss" in e) for r in results]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def test_a_finished_run_resumes_to_itself(config):
    done = run(model_config(), config())
    again = run(model_config(), config(), resume=True)
    assert again.step == 12
    assert_same(weights(done), weights(again))
    longer = run(model_config(), config(steps=14), resume=True)
    assert longer.step == 14


def test_resume_refuses_another_run(config, text):
    run(model_config(), config())
    with pytest.raises(ValueError, match="width was 16 and is now 32"):
        run(model_config(width=32), config(), resume=True)
    with pytest.raises(ValueError, match=r"lr was None and is now 0\.5"):
        run(model_config(), config(lr=0.5), resume=True)
    with pytest.raises(ValueError, match="12 steps, steps=8"):
        run(model_config(), config(steps=8), resume=True)
    text.write_text(text.read_text() + "more")
    with pytest.raises(ValueError, match="the text has changed"):
        run(model_config(), config(), resume=True)


def test_a_run_is_never_overwritten(config):
    run(model_config(), config(steps=1))
    with pytest.raises(ValueError, match="already holds a run"):
        run(model_config(), config(steps=1))


def test_resume_needs_a_run(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint or run folder"):
        run(model_config(), config(), resume=True)
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="no checkpoint here"):
        run(model_config(), config(), resume=True)


def test_the_loss_falls_and_is_logged(config, tmp_path):
    result = run(model_config(width=32), config(steps=60, batch=4, warmup=5))
    losses = [e["loss"] for e in result.history if "loss" in e]
    assert losses[-1] < 0.6 * losses[0]
    assert read_log(tmp_path / "run" / "log.jsonl") == result.history
    last = [e for e in result.history if "bits_per_byte" in e][-1]
    assert last["step"] == 60
    again = evaluate(result.model, result.data.valid, windows=2)
    assert again.bits_per_byte == last["bits_per_byte"]


def test_a_log_cut_short_is_read(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": 2.0}]


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    model = Decoder(model_config())
    monkeypatch.setattr(loop, "build", lambda _: model)

    def poison(step):
        if step == 5:
            model.norm.weight.data.fill_(math.nan)

    with pytest.raises(ValueError, match=r"the loss is nan at step 6; the last checkpoint is .*step-000004\. Lower lr"):
        run(model_config(), config(), on_step=poison)


def test_vocab_must_fit_the_text(config):
    with pytest.raises(ValueError, match="vocab=100, but the text's tokens need vocab=256"):
        run(model_config(vocab=100), config())
    with pytest.raises(ValueError, match="and the mask token need vocab=257"):
        run(model_config(kind="encoder"), config())


def test_compile_gives_the_same_losses(config, tmp_path):
    pytest.importorskip("torch._inductor")
    if os.environ.get("FARFIELD_SLOW") != "1":
        pytest.skip("needs a C++ compiler and a minute; FARFIELD_SLOW=1 runs it")
    plain, fast = (run(model_config(), config(steps=3, compile=c, out=str(tmp_path / str(c)))) for c in (False, True))
    for a, b in zip(plain.history, fast.history, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-3)


# Checkpoints


@pytest.fixture
def trained(config):
    return run(model_config(), config(keep=2))


def save_again(trained, config, step=13):
    return checkpoint.save(
        trained.checkpoint.parent, step, trained.model, Optimizers(trained.model, config()), config(), digest="x"
    )


def test_the_last_ones_are_kept(trained):
    assert [p.name for p in checkpoint.steps(trained.checkpoint.parent)] == ["step-000008", "step-000012"]
    assert sorted(p.name for p in trained.checkpoint.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    state = json.loads((trained.checkpoint / "state.json").read_text())
    assert state["format"] == checkpoint.FORMAT
    assert state["model"]["attention"] == "full"
    assert state["version"]
    assert state["random"]["cpu"]


def test_a_model_loads_from_a_step_or_a_run(trained):
    for path in (trained.checkpoint, trained.checkpoint.parent):
        model, config = checkpoint.load_model(path)
        assert config == trained.model.config
        assert_same(model.state_dict(), weights(trained))
    other, _ = checkpoint.load_model(trained.checkpoint.parent / "step-000008")
    assert (other.embed.weight != trained.model.embed.weight).any()
    wider, config = checkpoint.load_model(trained.checkpoint, changes={"rope_base": 500.0, "log_scale": 8})
    assert config == replace(trained.model.config, rope_base=500.0, log_scale=8)
    assert wider.blocks[0].attention.rope.base == 500.0
    assert_same(wider.state_dict(), weights(trained))
    with pytest.raises(ValueError, match="did you mean rope_base"):
        checkpoint.load_model(trained.checkpoint, changes={"rop_base": 500.0})


@pytest.mark.parametrize("fails", ["model", "optimizer", "state", "rename"])
def test_a_crash_while_writing_loses_nothing(trained, config, monkeypatch, fails):
    written, real = [], checkpoint.save_file

    def crash(*args):
        written.append(args)
        if len(written) == {"model": 1, "optimizer": 2}.get(fails, 99):
            raise RuntimeError("power cut")
        real(*args)

    def refuse(*_, **__):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", crash)
        if fails == "state":
            patch.setattr(checkpoint.json, "dumps", refuse)
        if fails == "rename":
            patch.setattr(checkpoint.Path, "rename", refuse)
        with pytest.raises(RuntimeError, match="power cut"):
            save_again(trained, config)
    found = checkpoint.read(trained.checkpoint.parent)
    assert found.step == 12
    assert_same(checkpoint.load_model(found.path)[0].state_dict(), weights(trained))
    # what the crash left behind is gone after the next one
    save_again(trained, config)
    assert sorted(p.name for p in trained.checkpoint.parent.glob("*step*")) == ["step-000012", "step-000013"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        checkpoint.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_full_disk_is_said_and_loses_nothing(trained, config, monkeypatch, error):
    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match=r"the disk is full.*earlier checkpoints are intact") as caught:
            save_again(trained, config)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in trained.checkpoint.parent.glob("*step*")] != []
    assert not list(trained.checkpoint.parent.glob(".partial*"))
    assert checkpoint.read(trained.checkpoint.parent).step == 12


def test_another_shape_is_refused_by_name(trained):
    with pytest.raises(ValueError, match=r"embed.weight has shape \[256, 16\], the model \[256, 32\]"):
        checkpoint.load_weights(Decoder(model_config(width=32)), trained.checkpoint)
    with pytest.raises(ValueError, match=r"blocks.1.* is missing"):
        checkpoint.load_weights(Decoder(model_config(layers=2)), trained.checkpoint)
    with pytest.raises(ValueError, match="is not in the model"):
        checkpoint.load_weights(Decoder(model_config(conv=0)), trained.checkpoint)


def test_another_version_is_refused(trained):
    path = trained.checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99, "version": "9.0"}))
    with pytest.raises(ValueError, match=r"format 99, written by farfield 9.0; this farfield reads format 1"):
        checkpoint.load_model(trained.checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_missing_file_is_said(trained, name):
    (trained.checkpoint / name).unlink()
    with pytest.raises(ValueError, match=name):
        checkpoint.load_model(trained.checkpoint)


def test_without_optimizer_state_the_model_loads_but_the_run_cannot_go_on(trained, config):
    (trained.checkpoint / "optimizer.safetensors").unlink()
    checkpoint.load_model(trained.checkpoint)
    with pytest.raises(ValueError, match="the run cannot go on"):
        run(model_config(), config(keep=2), resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_damaged_file_is_said(trained, name):
    path = trained.checkpoint / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"damaged.*take another step"):
        checkpoint.load_model(trained.checkpoint)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.load_model(tmp_path / "none")
    with pytest.raises(ValueError, match="no checkpoint here"):
        checkpoint.load_model(tmp_path)


def test_the_tokenizer_travels_with_the_model(config, text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
    made.train([str(text)], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    result = run(model_config(vocab=400), config(tokenizer=tmp_path / "tokenizer.json", steps=2, tokens=8))
    (tmp_path / "tokenizer.json").unlink()
    codec = checkpoint.load_codec(result.checkpoint)
    assert codec.decode(codec.encode("return x")) == "return x"
    found = evaluate(result.model, result.data.valid)
    assert found.bytes > found.tokens
    assert found.bits_per_byte * found.bytes == pytest.approx(found.bits_per_token * found.tokens)


# Optimizers and schedules


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_plain_muon_is_muon_but_for_rounding(shape):
    start, grads = torch.randn(shape), torch.randn(5, *shape)
    ends = []
    for kind in (PlainMuon, torch.optim.Muon):
        p = torch.nn.Parameter(start.clone())
        muon = kind([p], lr=0.1, weight_decay=0.1)
        for grad in grads:
            p.grad = grad
            muon.step()
        ends.append(p.detach())
    plain, torchs = ends
    # the iteration is in bfloat16 there: its rounding is 1 in 256
    assert (plain - torchs).norm() < 0.02 * (torchs - start).norm()
    assert (torchs - start).norm() > 0.1


def test_stacked_muon_is_muon():
    starts = [torch.randn(shape) for shape in ((8, 20), (20, 8), (12, 12), (20, 8), (12, 12))]
    grads, ends = torch.randn(5, 20, 20), []
    for kind in (StackedMuon, torch.optim.Muon):
        parameters = [torch.nn.Parameter(x.clone()) for x in (*starts, torch.ones(3, 3))]
        muon = kind(parameters, lr=0.1, weight_decay=0.1)
        for grad in grads:
            for at, p in enumerate(parameters[:-1]):  # the last one has no part in the loss
                p.grad = (at + 1) * grad[: p.shape[0], : p.shape[1]]
            muon.step()
        ends.append([p.detach() for p in parameters])
    for start, stacked, single in zip(starts, *ends, strict=False):
        # products of a batch may be summed in another order, in bfloat16
        assert (stacked - single).norm() < 0.02 * (single - start).norm()
        assert (single - start).norm() > 0.1
    assert torch.equal(ends[0][-1], torch.ones(3, 3))


def test_compiled_blocks_leave_their_mechanisms_as_written(monkeypatch):
    model, seen = Decoder(model_config(layers=2)), []
    ids = torch.randint(256, (2, 9))
    own = model.loss(ids[:, :-1], ids[:, 1:])
    for block in model.blocks:
        mechanism = block.attention.mechanism

        def forward(*inputs, plain=mechanism.forward, **options):
            seen.append((torch.compiler.is_compiling(), type(inputs[0])))
            return plain(*inputs, **options)

        monkeypatch.setattr(mechanism, "forward", forward)
    with compiled(model, backend="aot_eager"):
        assert all(block._compiled_call_impl is not None for block in model.blocks)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        assert torch.allclose(loss, own)
        assert seen == [(False, torch.Tensor)] * 2
    assert all(block._compiled_call_impl is None for block in model.blocks)
    model.loss(ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("changes", [{}, {"checkpoint": True}, {"rotate": "layer"}], ids=str)
def test_a_learned_score_is_taught_by_its_own_loss(config, tmp_path, changes):
    """And nothing else is: one step later only its weights differ from those of a step without."""
    options = {"block": 8, "near": 8, "rank": 4, "open": 1, "score": "learned"}
    model = model_config(attention="fma", attention_options=options, layers=2, **changes)
    found = []
    for weight in (0.0, 0.5):
        made = config(tokens=64, steps=1, clip=0, optimizer="adamw", auxiliary=weight, out=str(tmp_path / str(weight)))
        found.append(run(model, made))
    without, some = (weights(result) for result in found)
    taught = {name for name in without if not torch.equal(without[name], some[name])}
    assert taught == {f"blocks.{n}.attention.mechanism.spread" for n in range(2)}
    assert all(torch.equal(without[name], torch.full_like(without[name], 0.5)) for name in taught)
    assert found[1].history[0]["loss"] == found[0].history[0]["loss"]


def test_what_mechanisms_minimize_is_there_once_a_forward_and_compiled_too():
    options = {"block": 8, "near": 8, "rank": 4, "open": 1, "score": "learned"}
    model, ids = (
        Decoder(model_config(attention="fma", attention_options=options, layers=2)),
        torch.randint(256, (2, 65)),
    )
    model.loss(ids[:, :-1], ids[:, 1:])
    assert model.auxiliary() is None
    model.teach()
    model.loss(ids[:, :-1], ids[:, 1:])
    own = model.auxiliary()
    assert own is not None
    assert own > 0
    assert model.auxiliary() is None
    with compiled(model, backend="aot_eager"):
        model.loss(ids[:, :-1], ids[:, 1:])
        assert torch.allclose(model.auxiliary(), own)
    with torch.no_grad():
        model.loss(ids[:, :-1], ids[:, 1:])
    assert model.auxiliary() is None
    with pytest.raises(NotImplementedError, match="packed documents"):
        model.loss(ids[:, :-1], ids[:, 1:], torch.zeros(2, 64, dtype=torch.long))


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_was_taught_can_be_copied(again):
    """With checkpoints the backward makes once more what a forward leaves behind."""
    options = {"block": 8, "near": 8, "rank": 4, "open": 1, "score": "learned"}
    model = Decoder(model_config(attention="fma", attention_options=options, layers=1, checkpoint=again))
    ids = torch.randint(256, (2, 65))
    model.teach()
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    if again:
        (loss + model.auxiliary()).backward()
    assert copy.deepcopy(model).auxiliary() is None
    assert pickle.loads(pickle.dumps(model)).auxiliary() is None
    assert model.auxiliary() is not None


@pytest.mark.parametrize("name", mechanisms.names())
def test_muon_gets_the_matrices_of_the_blocks_only(name):
    options = {"pool": "learned"} if name == "fma" else {}
    model = Decoder(model_config(attention=name, attention_options=options, tie=False, layers=2))
    matrices, rest = split_parameters(model)
    assert matrices.keys() | rest.keys() == {n for n, _ in model.named_parameters()}
    assert not matrices.keys() & rest.keys()
    parts = ("attention.q", "attention.k", "attention.v", "attention.out", "mlp.up", "mlp.down")
    assert sorted(matrices) == sorted(f"blocks.{i}.{p}.weight" for i in range(2) for p in parts)
    for part in (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "blocks.0.attention.gain",
        "blocks.1.attention.conv.weight",
    ):
        assert part in rest


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lr": "fast"}, "TrainConfig: lr must be a number or None, got 'fast'"),
        ({"steps": "many"}, "TrainConfig: steps must be a whole number, got 'many'"),
        ({"graph": "no"}, "TrainConfig: graph must be true or false, got 'no'"),
        ({"steps": 1.5}, "TrainConfig: steps must be a whole number, got 1.5"),
    ],
)
def test_a_config_refuses_values_of_another_kind(config, bad, message):
    with pytest.raises(ValueError, match=message):
        config(**bad)


def test_optimizers_hold_every_parameter_once(config):
    model = Decoder(model_config())
    for optimizer in ("muon", "adamw"):
        made = Optimizers(model, config(optimizer=optimizer))
        held = [p for group in made._groups() for p in group["params"]]
        assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
        assert {g["weight_decay"] for g in made._groups()} == {0.0, 0.1}
        made.scale(0.5)
        rates = {g["lr"] for g in made._groups()}
        assert rates == {r / 2 for r in config(optimizer=optimizer).rates}


def test_optimizer_state_of_another_model_is_refused(config):
    model = Decoder(model_config())
    model.loss(torch.zeros(1, 4).long(), torch.zeros(1, 4).long()).backward()
    made = Optimizers(model, config())
    made.step()
    state = made.tensors()
    with pytest.raises(ValueError, match=r"does not have: blocks\.0"):
        Optimizers(Decoder(model_config(conv=0)), config()).load(state)
    with pytest.raises(ValueError, match="of another optimizer"):
        Optimizers(model, config(optimizer="adamw")).load(state)
    with pytest.raises(ValueError, match="another shape"):
        Optimizers(Decoder(model_config(width=32)), config()).load(state)


def test_linear_schedule_warms_up_stays_and_decays(config):
    c = config(steps=100, warmup=10)
    factors = [rate(step, c) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:41] == pytest.approx([1.0] * 32)
    assert factors[70] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 60)


def test_cosine_and_constant_schedules(config):
    cosine = config(steps=100, warmup=10, schedule="cosine")
    assert rate(50, cosine) == pytest.approx(0.5)
    assert rate(99, cosine) < 0.01
    assert rate(0, cosine) == pytest.approx(0.1)
    assert rate(99, config(steps=100, warmup=10, schedule="constant")) == 1
    assert rate(0, config(warmup=0, schedule="constant")) == 1


def test_warm_up_may_be_longer_than_the_run(config):
    factors = [rate(step, config(steps=10, warmup=100)) for step in range(10)]
    assert max(factors) <= 0.1
    assert factors[-1] > 0


# Configs and devices


def test_train_config_round_trip(config):
    made = config(text=("a", "b"), valid="c")
    assert TrainConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.valid == ("c",)
    with pytest.raises(ValueError, match="did you mean accumulate"):
        TrainConfig.from_dict({"acumulate": 2})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"optimizer": "sgd"}, "one of muon, adamw; got 'sgd'"),
        ({"schedule": "step"}, "schedule"),
        ({"dtype": "float16"}, "dtype"),
        ({"tokens": 0}, "tokens"),
        ({"steps": 1.5}, "steps"),
        ({"held_out": 0}, "held_out"),
        ({"lr": -1}, "lr"),
        ({"lr": float("nan")}, "lr"),
    ],
)
def test_train_config_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**bad)


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device().type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=f"device '{name}': no such device here; there is cpu"):
            pick_device(name)


# Evaluation


def naive_repeat(ids, context):
    found = []
    for i in range(len(ids)):
        last = list(ids[i - context + 1 : i + 1]) if i >= context - 1 else None
        back = (d for d in range(1, i - context + 2) if list(ids[i - d - context + 1 : i - d + 1]) == last)
        found.append(next(back, 0) if last is not None else 0)
    return found


@pytest.mark.parametrize("context", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize("alphabet", [2, 3, 40])
def test_last_repeat_against_the_definition(context, alphabet):
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, alphabet, 90)
        ids[60:80] = ids[20:40]
        assert last_repeat(ids, context).tolist() == naive_repeat(ids, context)


@pytest.mark.parametrize("n", [0, 1, 11, 12, 13])
def test_last_repeat_of_short_texts(n):
    ids = np.zeros(n, np.int64)
    assert last_repeat(ids).tolist() == naive_repeat(ids, 12)


def test_repeat_buckets_leave_no_gap():
    for (_, _, high), (_, low, _) in pairwise(REPEATS):
        assert low == high + 1


def random_split(n=2048, windows=2, vocab=256):
    ids = np.random.default_rng(0).integers(0, vocab, n * windows + 1).astype(np.uint8)
    for at, back in ((100, 100), (500, 300), (1200, 700), (1700, 1400)):
        if at + 60 < n:
            ids[at : at + 60] = ids[at - back : at - back + 60]
    return Split(ids, None, n)


def test_evaluation_buckets_are_the_definition():
    model, split = Decoder(model_config()).double(), random_split()
    model.train()
    found = evaluate(model, split)
    assert model.training
    bits, distance = [], []
    for w in range(split.windows):
        ids = split.window(w)[0]
        logp = model(ids[None, :-1]).log_softmax(-1)[0]
        bits.append(-logp.gather(1, ids[1:, None])[:, 0].detach() / math.log(2))
        distance += naive_repeat(ids.tolist(), 12)[:-1]
    flat, distance = torch.cat(bits), torch.tensor(distance)
    assert found.bits_per_byte == pytest.approx(float(flat.mean()))
    assert found.bits_per_byte == found.bits_per_token
    assert found.early == pytest.approx(float(torch.stack(bits)[:, :128].mean()))
    assert found.late == pytest.approx(float(torch.stack(bits)[:, 1024:].mean()))
    named = {b.name: b for b in found.by_repeat}
    for name, low, high in REPEATS:
        where = (distance >= low) & (distance <= high)
        assert named[name].share == pytest.approx(float(where.double().mean()))
        assert named[name].bits_per_byte == pytest.approx(float(flat[where].mean()))
    assert sum(b.share for b in found.by_repeat) == pytest.approx(1)
    assert [b.name for b in found.by_position] == ["0-63", "64-127", "128-255", "256-511", "512-1023", "1024-2047"]
    assert sum(b.share * b.bits_per_byte for b in found.by_position) == pytest.approx(found.bits_per_byte)
    assert (found.windows, found.tokens, found.bytes, found.length) == (2, 4096, 4096, 2048)
    json.dumps(found.to_dict(), allow_nan=False)


def test_evaluation_does_not_depend_on_the_batch():
    model, split = Decoder(model_config()).double(), random_split(64, 8)
    assert evaluate(model, split, batch=1).bits_per_byte == pytest.approx(evaluate(model, split, batch=5).bits_per_byte)
    assert evaluate(model, split, windows=3).windows == 3


def test_evaluation_of_an_encoder():
    model, split = Encoder(model_config(vocab=257)), random_split(64, 8)
    found = evaluate(model, split)
    assert found.bits_per_byte == pytest.approx(evaluate(model, split, batch=3).bits_per_byte)
    assert 0 < found.tokens < 0.3 * 64 * 8
    assert 7 < found.bits_per_byte < 9
    assert found.by_repeat == ()


def test_copy_probe_of_a_model_that_copies(monkeypatch):
    """A model that knows what stood 96 tokens before needs no bits for the second copy."""

    def bits(model, ids, dtype):
        out = torch.full((len(ids), ids.shape[1] - 1), 7.0)
        out[:, 95:] = torch.where(ids[:, 96:] == ids[:, :-96], 0.0, 7.0)
        return out

    monkeypatch.setattr(sys.modules["farfield.train.evaluate"], "token_bits", bits)
    split = random_split(512, 4)
    probes = (("random", 32, 96), ("text", 64, 96), ("random", 32, 128), ("text", 64, 4096))
    found = copy_probe(Decoder(model_config()), split, probes=probes, count=5)
    assert [f["distance"] for f in found] == [96, 96, 128]  # the last does not fit
    for f in found[:2]:
        assert f["second"] == 0
        assert f["first"] > 6
    assert found[2]["second"] > 6


def test_copy_probe_reads_real_models_and_refuses():
    model, split = Decoder(model_config()), random_split(256, 4)
    found = copy_probe(model, split, probes=(("random", 32, 96),), count=3)
    assert found == copy_probe(model, split, probes=(("random", 32, 96),), count=3)
    assert found[0]["first"] == pytest.approx(8, abs=1)
    with pytest.raises(ValueError, match="overlap"):
        copy_probe(model, split, probes=(("random", 32, 16),))
    with pytest.raises(ValueError, match="random"):
        copy_probe(model, split, probes=(("noise", 32, 96),))


def test_token_bits_in_bfloat16_are_close():
    model, ids = Decoder(model_config()), torch.randint(256, (1, 65))
    with torch.no_grad():
        plain, mixed = token_bits(model, ids), token_bits(model, ids, dtype="bfloat16")
    assert mixed.dtype == torch.float64
    assert float((plain - mixed).abs().mean()) < 0.05


def test_everything_is_exported():
    import farfield.train as package

    assert all(hasattr(package, name) for name in package.__all__)
    assert open_data is package.open_data
    assert loop.train is package.train


def test_things_in_each_others_place_are_refused_in_words(tmp_path):
    model, recipe = ModelConfig(width=16, layers=1, heads=2), TrainConfig(text="x", out=tmp_path, device="cpu")
    with pytest.raises(TypeError, match="train: model_config must be a ModelConfig, got TrainConfig"):
        train(recipe, model)
    with pytest.raises(TypeError, match=r"evaluate: split must be a Split, such as open_data\(...\).valid, got str"):
        evaluate(Decoder(model), "text.txt")
