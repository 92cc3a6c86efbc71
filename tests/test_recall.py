"""Recall tasks: every question has one answer, where the options say, and nothing else tells it; and their command."""

import json
import math
import re
import shutil
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from farfield.bench import recall as recalling
from farfield.bench.recall import RecallSettings, merged
from farfield.cli import app
from farfield.nn import ModelConfig, build
from farfield.nn.models import IGNORE
from farfield.train import Examples, Mqar, Passkey, TrainConfig, fit, recall
from farfield.train.synthetic import TEST, TRAIN, Drawn, make_task, score

SMALL = Mqar(vocab=32, pairs=6)


def look_up(row, at):
    """What followed the token at `at` the last time it stood, or -1."""
    before = np.flatnonzero(row[:at] == row[at])
    return row[before[-1] + 1] if len(before) else -1


def read_back(row, at):
    """The digits that follow the first prompt in a passkey sample, up to the one after `at`."""
    text = bytes(row[: at + 1].astype(np.uint8))
    prompt = b" Pass key: "
    first, last = text.index(prompt), text.rindex(prompt)
    return text[first + len(prompt) + len(text) - last - len(prompt)]


def oracle(find):
    def guess(inputs, at):
        return torch.tensor([[find(row, a) for a in places] for row, places in zip(inputs.numpy(), at, strict=True)])

    return guess


# associative recall


@pytest.mark.parametrize("task", [SMALL, Mqar(), Mqar(vocab=8, pairs=4, exponent=0.0, nearest=9)])
@pytest.mark.parametrize("tokens", [544, 545])
def test_every_query_has_one_earlier_key_with_its_value(task, tokens):
    half = task.vocab // 2
    for number in range(20):
        ids, answers, sources = vars(Examples(task, tokens).sample(0, number)).values()
        assert len(ids) == tokens + 1
        assert len(set(answers)) == len(answers) == task.pairs
        assert (answers[1:] > answers[:-1]).all()
        assert ids.min() >= 0
        assert ids.max() < task.vocab
        for answer, source in zip(answers, sources, strict=True):
            key = ids[answer - 1]
            assert key < half <= ids[answer]
            assert np.flatnonzero(ids == key).tolist() == [source - 1, answer - 1]
            assert ids[source] == ids[answer]
            assert answer - source >= task.nearest


def test_looking_up_scores_one_and_not_looking_back_scores_chance():
    examples = Examples(SMALL, 128, TEST)
    found = score(oracle(look_up), examples, samples=50)
    assert (found.accuracy, found.whole, found.answers) == (1.0, 1.0, 50 * 6)
    assert all(b.accuracy == 1 for b in found.buckets)
    # the best that can be said of a query without what stands before it: a table by key, learned from other samples
    seen = np.zeros((32, 32))
    for number in range(2000):
        ids, answers, _ = vars(Examples(SMALL, 128).sample(0, number)).values()
        np.add.at(seen, (ids[answers - 1], ids[answers]), 1)
    table = seen.argmax(1)
    found = score(oracle(lambda row, at: table[row[at]]), examples, samples=500)
    spread = math.sqrt(SMALL.chance * (1 - SMALL.chance) / found.answers)
    assert abs(found.accuracy - SMALL.chance) < 4 * spread


@pytest.mark.parametrize(("exponent", "nearest"), [(1.0, 2), (0.0, 2), (1.0, 32), (2.0, 5)])
def test_distances_follow_the_law(exponent, nearest):
    tokens, pairs, count = 1023, 4, 1000
    examples = Examples(Mqar(vocab=64, pairs=pairs, exponent=exponent, nearest=nearest), tokens)
    gaps = np.concatenate([(s.answers - s.sources) // 2 for s in (examples.sample(0, i) for i in range(count))])
    g = np.arange(1, 512)
    law = np.where(2 * g >= nearest, g**-exponent, 0)
    law = law.cumsum() / law.sum()
    drawn = np.bincount(gaps, minlength=512)[1:].cumsum() / len(gaps)
    # Kolmogorov's distance of so many draws is above this once in 20,000
    assert np.abs(drawn - law).max() < 2.3 / math.sqrt(len(gaps))


def test_crowded_samples_end():
    task = Mqar(vocab=64, pairs=32, nearest=100)
    tokens = 2 * (4 * 32 + 50) - 1
    assert len(Examples(task, tokens).sample(0, 0).answers) == 32
    with pytest.raises(ValueError, match=rf"nearest=100 apart need {tokens} tokens, got {tokens - 1}"):
        Examples(task, tokens - 1)


# passkey


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_key_stands_at_the_depth_asked(depth):
    for number in range(12):
        ids, answers, sources = vars(Examples(Passkey(digits=4, depth=depth), 400).sample(0, number)).values()
        text = bytes(ids.astype(np.uint8))
        told = re.fullmatch(rb"(.*) Pass key: (\d{4})\. (.*) Pass key: (\d{4})", text)
        before, key, after, asked = told.groups()
        assert key == asked
        assert abs(len(before) - depth * len(before + after)) <= 0.5
        assert answers.tolist() == list(range(397, 401))
        assert sources.tolist() == list(range(len(before) + 11, len(before) + 15))
        assert not re.search(rb"[\d:]", before + after)


def test_depths_cover_the_text_and_are_told_apart():
    found = score(oracle(read_back), Examples(Passkey(), 300, TEST), samples=50)
    assert (found.accuracy, found.whole) == (1.0, 1.0)
    assert [(b.name, b.answers) for b in found.buckets] == [(f"{i}-{i + 10} %", 25) for i in range(0, 100, 10)]

    def far_only(row, at):
        return read_back(row, at) if bytes(row.astype(np.uint8)).index(b"Pass") < 130 else 0

    assert {b.name for b in score(oracle(far_only), Examples(Passkey(), 300, TEST)).buckets if b.accuracy == 1} == {
        "0-10 %", "10-20 %", "20-30 %", "30-40 %",
    }  # fmt: skip


# streams


@pytest.mark.parametrize("task", [SMALL, Passkey()])
def test_samples_depend_on_stream_seed_and_number_only(task):
    train, test = Examples(task, 128), Examples(task, 128, TEST)
    inputs, targets = train.batch(3, 5, 4)
    again = train.batch(3, 7, 1)
    assert torch.equal(inputs[2:3], again[0])
    assert torch.equal(targets[2:3], again[1])
    known = {train.sample(seed, number).ids.tobytes() for seed in range(10) for number in range(50)}
    assert len(known) == 500
    assert not known & {test.sample(seed, number).ids.tobytes() for seed in range(10) for number in range(50)}
    assert (train.stream, test.stream) == (TRAIN, TEST)


@pytest.mark.parametrize("task", [SMALL, Passkey()])
def test_targets_count_at_the_answers_only(task):
    examples = Examples(task, 128)
    inputs, targets = examples.batch(0, 0, 8)
    assert inputs.shape == targets.shape == (8, 128)
    for number in range(8):
        ids, answers, _ = vars(examples.sample(0, number)).values()
        assert inputs[number].tolist() == ids[:-1].tolist()
        expected = np.full(128, IGNORE)
        expected[answers - 1] = ids[answers]
        assert targets[number].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_task("copy"), "no task 'copy'; there are mqar, passkey"),
        (lambda: make_task("mqar", pair=3), "did you mean pairs"),
        (lambda: Mqar(vocab=7), "vocab must be even"),
        (lambda: Mqar(vocab=8, pairs=5), r"pairs must lie in 1..vocab / 2 = 4, got 5"),
        (lambda: Mqar(exponent=-1), "exponent must not be negative"),
        (lambda: Mqar(nearest=0), "nearest must be at least 1"),
        (lambda: Passkey(digits=0), "digits must be at least 1"),
        (lambda: Passkey(depth=1.5), r"depth must lie in 0..1, got 1.5"),
        (lambda: Examples(Passkey(), 33), "need 34 tokens, got 33"),
        (lambda: RecallSettings(steps=1, length=2048, lengths=(64,)), "got 64"),
    ],
)
def test_wrong_tasks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_shortest_passkey_sample_is_drawn():
    assert len(Examples(Passkey(), 34).sample(0, 0).ids) == 35


# models


def test_a_model_is_scored_by_its_likeliest_token():
    torch.manual_seed(0)
    examples = Examples(SMALL, 128, TEST)
    model = build(ModelConfig(vocab=32, width=16, layers=1, heads=2, attention="full"))
    found = recall(model, examples, samples=20)
    right = []
    for number in range(20):
        ids, answers, _ = vars(examples.sample(0, number)).values()
        with torch.no_grad():
            best = model(torch.from_numpy(ids)[None, :-1])[0].argmax(-1).numpy()
        right.append(best[answers - 1] == ids[answers])
    assert found.accuracy == pytest.approx(np.mean(right))
    assert found.whole == np.mean([r.all() for r in right])
    assert sum(b.accuracy * b.answers for b in found.buckets) == pytest.approx(np.sum(right))
    assert model.training


def test_full_attention_learns_to_recall_and_a_narrow_window_does_not(tmp_path):
    """Distances of 16 and more: a window of 8 and a convolution of 4 in one layer reach 11 tokens back."""
    task = Mqar(vocab=16, pairs=3, nearest=16)
    config = TrainConfig(
        tokens=40, batch=16, steps=200, warmup=10, lr=0.03, rest_lr=0.01, log_every=0, save_every=0, device="cpu"
    )
    shape = ModelConfig(vocab=16, width=32, layers=1, heads=2)
    found = {}
    for name, options in (("full", {}), ("window", {"width": 8, "sinks": 0})):
        result = fit(
            replace(shape, attention=name, attention_options=options),
            replace(config, out=str(tmp_path / name)), Drawn(Examples(task, 40)), progress=False,
        )  # fmt: skip
        found[name] = recall(result.model, Examples(task, 40, TEST), samples=100).accuracy
    assert found["full"] > 0.95
    # the answers given before in the sample are no help either: values repeat by chance only
    assert found["window"] < 0.25


# the command

TINY = RecallSettings(
    steps=4, length=64, lengths=(64, 100), batch=2, width=16, layers=1, heads=2, scored=20,
    options={"vocab": 32, "pairs": 6},
)  # fmt: skip
CHOSEN = [("full", {}), ("window", {"width": 16})]


def run(out, settings=TINY, entries=CHOSEN, **options):
    said = StringIO()
    page = recalling.recall(entries, settings, out=out, console=Console(file=said, width=140), **options)
    return json.loads((page.parent / recalling.NAME).read_text()), said.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall") / "run"
    entries = [*CHOSEN, ("fma", {"block": 8, "near": 8, "rank": 3})]
    found, said = run(folder, replace(TINY, seeds=2, again=("full",)), entries)
    return folder, found, said


def test_every_run_is_scored_at_every_length(made):
    folder, found, said = made
    assert found["trained"] == {"steps": 4, "tokens": 4 * 2 * 64, "batch": 2, "length": 64}
    assert list(found["runs"]) == ["full seed 0", "window:width=16 seed 0", "full seed 1"]
    for about in found["runs"].values():
        assert [x["length"] for x in about["lengths"]] == [64, 100]
        assert all(0 <= x["accuracy"] <= 1 and x["answers"] == 20 * 6 for x in about["lengths"])
        assert about["memory"] > 0
        assert about["speed"] > 0
        assert (folder / about["checkpoint"] / "model.safetensors").exists()
    assert [x["rows"] for x in found["runs"]["full seed 0"]["lengths"]] == [32.5, 50.5]
    assert found["model"]["vocab"] == 32
    mean = merged(found)["full"]["lengths"][100]
    one, two = (found["runs"][f"full seed {seed}"]["lengths"][1] for seed in (0, 1))
    assert mean["accuracy"] == pytest.approx((one["accuracy"] + two["accuracy"]) / 2)
    assert mean["buckets"]["64-100"] == pytest.approx(
        (one["buckets"][-1]["accuracy"] + two["buckets"][-1]["accuracy"]) / 2
    )
    assert f"{mean['accuracy']:.1%}" in said


def test_a_failure_is_shown_with_its_reason(made):
    folder, found, said = made
    reasons = [x["reason"] for x in found["failed"].values()]
    assert reasons
    assert all("rank" in reason for reason in reasons)
    page = (folder / recalling.PAGE).read_text()
    for text in (page, said):
        assert f"fma:block=8,near=8,rank=3, seed 0, failed: {reasons[0]}" in text


def test_the_page_has_tables_and_a_figure(made):
    folder, found, _ = made
    page = (folder / recalling.PAGE).read_text()
    lines = page.splitlines()
    full = merged(found)["full"]["lengths"]
    (row,) = (x for x in lines if x.startswith(f"| full | {full[64]['accuracy']:.1%} | {full[100]['accuracy']:.1%} |"))
    assert re.search(r"\| 32 \| 50 \| [\d,]+ \| [\d.]+ [KM]iB \|$", row)
    assert "At 100 tokens, by the tokens from a query back to its key:" in lines
    assert "| attention | 1-31 | 32-63 | 64-100 |" in lines
    assert f"![Accuracy by length and distance]({recalling.FIGURE})" in lines
    drawn = (folder / recalling.FIGURE).read_text()
    assert "n = 100, by distance" in drawn
    assert "window:width=16" in drawn
    assert recalling.render(folder).read_text() == page


def test_finished_runs_are_kept_and_lengths_can_be_added(made, tmp_path):
    folder, found, _ = made
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a comparison"):
        run(tmp_path / "run")
    again, said = run(tmp_path / "run", resume=True)
    assert said.count("there already") == 2
    assert again["runs"] == found["runs"]
    longer, said = run(tmp_path / "run", replace(TINY, lengths=(64, 200)), resume=True, entries=CHOSEN[:1])
    assert "there already" not in said
    assert longer["runs"]["full seed 0"]["curve"] == found["runs"]["full seed 0"]["curve"]
    lengths = longer["runs"]["full seed 0"]["lengths"]
    assert [x["length"] for x in lengths] == [64, 200]
    assert lengths[0] == found["runs"]["full seed 0"]["lengths"][0]
    other = replace(TINY, options={"vocab": 32, "pairs": 5})
    with pytest.raises(ValueError, match=r"cannot go on .*options was .* the task is another one"):
        run(tmp_path / "run", other, resume=True)


def test_a_cut_run_goes_on_from_its_checkpoint(made, tmp_path, monkeypatch):
    from farfield.train import loop

    _, found, _ = made
    save = loop.checkpoint.save

    def stop(where, step, *args, **options):
        saved = save(where, step, *args, **options)
        if "window" in str(where) and step == 2:
            raise KeyboardInterrupt
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    assert (tmp_path / "cut" / recalling.PAGE).exists()
    starts = []
    monkeypatch.setattr(loop, "_resume", lambda *a, own=loop._resume: starts.append(own(*a)) or starts[-1])
    resumed, _ = run(tmp_path / "cut", resume=True)
    assert starts == [2]
    for key in ("full seed 0", "window:width=16 seed 0"):
        assert resumed["runs"][key]["lengths"] == found["runs"][key]["lengths"]


def test_a_length_that_fails_leaves_the_others(tmp_path, monkeypatch):
    from farfield import train

    def measure(model, examples, own=train.recall, **options):
        if examples.tokens == 64:
            raise NotImplementedError("no kernel")
        return own(model, examples, **options)

    monkeypatch.setattr(train, "recall", measure)
    found, said = run(tmp_path / "run", entries=CHOSEN[:1])
    assert list(merged(found)["full"]["lengths"]) == [100]
    line = "full, seed 0, at 64 tokens, failed: NotImplementedError: no kernel"
    assert line in said
    assert line in (tmp_path / "run" / recalling.PAGE).read_text()


def test_the_command_line(tmp_path):
    given = [
        "recall", "--task", "passkey", "-o", "digits=3", "-a", "fu,win:width=8,sinks=0", "--train-length", "256",
        "--steps", "2", "--width", "16", "--layers", "1", "--batch", "2", "--scored", "10", "--device", "cpu",
        "--recipe", "lr=0.02", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "passkey: answers right after 2 steps of 2 x 256 tokens; guessing gets 10.0%" in result.output
    found = json.loads((tmp_path / "run" / recalling.NAME).read_text())
    assert list(found["runs"]) == ["full seed 0", "window:width=8,sinks=0 seed 0"]
    assert [x["name"] for x in found["runs"]["full seed 0"]["lengths"][0]["buckets"]] == [
        f"{i}-{i + 10} %" for i in range(0, 100, 10)
    ]
    assert found["task"]["options"] == {"digits": 3, "depth": None}
    assert found["train"]["lr"] == 0.02
    # minutes are turned into steps
    given[given.index("--steps") : given.index("--steps") + 2] = ["--minutes", "0.002"]
    given[-1] = str(tmp_path / "other")
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, given)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "other" / recalling.NAME).read_text())["trained"]["steps"] >= 1
