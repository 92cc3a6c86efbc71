"""Several mechanisms on one text in miniature: equal tokens, failures, seeds, going on, and what is written."""

import json
import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from io import StringIO
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from farfield import mechanisms
from farfield.bench import compare as comparing
from farfield.bench import learning, report, worker
from farfield.bench.compare import Comparison, Entry, Settings, compare, merged
from farfield.cli import app
from farfield.cli.options import chosen, mixed
from farfield.train import checkpoint

FMA = {"block": 8, "near": 8, "rank": 4}
TINY = Settings(steps=4, length=64, width=16, layers=1, heads=2, scored=3)
CHOSEN = [("full", {}), ("fma", FMA), ("window", {"width": 16})]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"the number after {i} is {i + 1}\n" for i in range(400)))
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FARFIELD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def run(text, out, settings=TINY, entries=CHOSEN, **options):
    said = StringIO()
    page = compare(entries, [text], settings, out=out, console=Console(file=said, width=140), **options)
    return json.loads((page.parent / comparing.NAME).read_text()), said.getvalue()


@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """A finished comparison, with two seeds of one mechanism and one that fails: folder, findings, what it said."""
    folder = tmp_path_factory.mktemp("compare") / "run"
    entries = [*CHOSEN, ("fma", {"block": 8, "near": 8, "rank": 3})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FARFIELD_CACHE", str(folder.parent / "cache"))
        found, said = run(text, folder, replace(TINY, seeds=2, again=("full",)), entries)
    return folder, found, said


def test_every_run_has_equal_tokens_and_its_numbers(made):
    folder, found, said = made
    assert found["trained"] == {"steps": 4, "tokens": 4 * 64, "batch": 1, "length": 64}
    labels = ["full", "fma:block=8,near=8,rank=4", "window:width=16"]
    assert list(found["runs"]) == [*(f"{x} seed 0" for x in labels), "full seed 1"]
    for about in found["runs"].values():
        steps = [step for step, _ in about["curve"]]
        assert steps[-1] == 256
        assert 0 < about["overall"] < 9
        assert about["memory"] > 0
        assert about["speed"] > 0
        assert (folder / about["checkpoint"] / "model.safetensors").exists()
        rows = mechanisms.make(about["attention"], **about["options"]).rows_read(64)
        assert about["rows"] == rows
        for key in ("early", "late"):
            assert f"{about[key]:.3f}" in said or about["label"] == "full"
    assert found["held_out"]["early"] == [0, 4]
    assert found["held_out"]["late"] == [32, 64]
    curves = [found["runs"][f"full seed {seed}"]["curve"] for seed in (0, 1)]
    assert curves[0] != curves[1]


def test_a_mechanism_that_fails_is_shown_with_its_reason(made):
    folder, found, said = made
    (failed,) = found["failed"].values()
    assert failed["label"] == "fma:block=8,near=8,rank=3"
    assert "rank" in failed["reason"]
    line = f"{failed['label']}, seed 0, failed: {failed['reason']}"
    assert line in said
    assert line in (folder / "compare.md").read_text()
    assert "rank=3, seed 0, failed" in (folder / "report.html").read_text()


def test_seeds_are_averaged_and_their_spread_is_told(made):
    _, found, said = made
    one, two = (found["runs"][f"full seed {seed}"] for seed in (0, 1))
    mean = merged(found)["full"]
    assert mean["overall"] == pytest.approx((one["overall"] + two["overall"]) / 2)
    assert mean["by_position"][0][1] == pytest.approx((one["by_position"][0][1] + two["by_position"][0][1]) / 2)
    assert f"full {abs(one['overall'] - two['overall']):.4f}" in said


def test_the_report_has_table_figures_and_settings(made):
    folder, found, _ = made
    html, markdown = ((folder / name).read_text() for name in ("report.html", "compare.md"))
    for part in ("Loss curves", "Bits by position", "To repeat it", "words.txt", found["env"]["date"]):
        assert part in html
    assert "<script" not in html
    rows = [line for line in markdown.splitlines() if line.startswith(("| full", "| fma", "| window"))]
    # the results, and by repeat distance
    assert len(rows) == 6
    assert f"| {merged(found)['full']['overall']:.3f} |" in rows[0]
    assert all((folder / f"{name}.svg").read_text().startswith("<?xml") for name in ("loss", "position"))
    html_again = report.render_comparison(folder).read_text()
    assert html_again == html


def test_finished_runs_are_kept_and_mechanisms_can_be_added(made, text, tmp_path):
    folder, found, _ = made
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a comparison: go on with --resume"):
        run(text, tmp_path / "run")
    again, said = run(text, tmp_path / "run", entries=[*CHOSEN, ("window", {"width": 8})], resume=True)
    assert said.count("there already") == 3
    assert again["failed"] == {}
    for key, about in found["runs"].items():
        assert again["runs"][key] == about
    assert again["runs"]["window:width=8 seed 0"]["overall"] > 0
    assert again["env"] == found["env"]
    assert [sorted(x) for x in again["resumed"]] == [sorted(found["env"])]
    assert again["runs"]["window:width=8 seed 0"]["sitting"] == 1
    assert (tmp_path / "run" / "compare.md").read_text().count(", commit ") == 2
    with pytest.raises(ValueError, match=r"cannot go on with .*steps was 4 and is now 5"):
        run(text, tmp_path / "run", replace(TINY, steps=5), resume=True)


def test_a_cut_run_goes_on_from_its_checkpoint(text, tmp_path, monkeypatch):
    """Stopped in the second run, after its checkpoint: the comparison ends with the same numbers as an uncut one."""
    from farfield.train import checkpoint, loop

    whole, _ = run(text, tmp_path / "whole", entries=CHOSEN[:2])
    save = checkpoint.save

    def stop(folder, step, *args, **options):
        saved = save(folder, step, *args, **options)
        if "fma" in str(folder) and step == 2:
            raise KeyboardInterrupt
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(text, tmp_path / "cut", entries=CHOSEN[:2])
    there = json.loads((tmp_path / "cut" / comparing.NAME).read_text())
    assert list(there["runs"]) == ["full seed 0"]
    assert (tmp_path / "cut" / "report.html").exists()
    starts = []
    monkeypatch.setattr(loop, "_resume", lambda *a, own=loop._resume: starts.append(own(*a)) or starts[-1])
    found, _ = run(text, tmp_path / "cut", entries=CHOSEN[:2], resume=True)
    assert starts == [2]
    for key, about in whole["runs"].items():
        assert found["runs"][key]["overall"] == about["overall"]


def test_minutes_are_those_of_the_slowest(text, tmp_path, monkeypatch):
    took = {"full": 0.5, "fma": 3.0, "window": 1.0}

    def measured(model, config, trial):
        if model.attention == "window":
            raise NotImplementedError("no kernel")
        yield took[model.attention]

    def learned(model, config, *rest):
        raise RuntimeError(f"{config.steps} steps")
        yield

    monkeypatch.setattr(comparing, "measure_step", measured)
    monkeypatch.setattr(comparing, "learn", learned)
    found, _ = run(text, tmp_path / "run", replace(TINY, steps=None, minutes=2))
    assert found["trained"]["steps"] == 40
    reasons = {key.partition(" ")[0].partition(":")[0]: x["reason"] for key, x in found["failed"].items()}
    assert reasons == {
        "window": "NotImplementedError: no kernel", "full": "RuntimeError: 40 steps", "fma": "RuntimeError: 40 steps",
    }  # fmt: skip


def test_a_step_is_measured(text, tmp_path):
    run = comparing.Comparison(tmp_path, [Entry("full", {})], TINY, torch.device("cpu"), Console(quiet=True))
    run.text = (text,)
    model, config = run._configs(Entry("full", {}), 0, 1000)
    assert learning.step_seconds(model, config, tmp_path / "trial") > 0
    assert not list(tmp_path.iterdir())


def test_tokens_are_rounded_up_to_steps(text, tmp_path, monkeypatch):
    run = comparing.Comparison(
        tmp_path, [Entry("full", {})], replace(TINY, steps=None, tokens=130), torch.device("cpu"), Console(quiet=True)
    )
    run.open([text], None, resume=False)
    run.plan(worker.Worker(own=False))
    assert run.found["trained"]["steps"] == 3


def test_speed_leaves_out_what_a_session_sets_up():
    def log(*entries):
        return type("Result", (), {"history": [{"tokens_per_second": x, "seconds": s} for x, s in entries]})

    assert learning.steady_speed(log((1, 10), (100, 11), (102, 12), (3, 5), (98, 6))) == 100
    assert learning.steady_speed(log((7, 1))) == 7
    assert learning.steady_speed(log()) is None


# the command


def test_names_may_be_cut_short_and_take_options():
    assert chosen("fu,fma:block=32,rank=4,win", "-a") == [
        ("full", {}), ("fma", {"block": 32, "rank": 4}), ("window", {}),
    ]  # fmt: skip
    assert chosen("window:width=8,window:width=9", "-a") == [("window", {"width": 8}), ("window", {"width": 9})]


def test_a_model_may_have_two():
    assert mixed("fma:near=128,rank=16/full,fu,fma/fma:open=2,near=64", "-a") == [
        ("fma", {"near": 128, "rank": 16}, ("full", {})), ("full", {}), ("fma", {}, ("fma", {"open": 2, "near": 64})),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at most two mechanisms in a model, NAME/NAME; got 'fma/full/fma'"):
        mixed("fma/full/fma", "-a")
    with pytest.raises(ValueError, match="fma is given twice"):
        mixed("fma/full,fma/full", "-a")
    with pytest.raises(ValueError, match="'rank=3' follows no mechanism's options"):
        mixed("rank=3", "-a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f", r"mechanism 'f' is not unique: .*fma, full"),
        ("flash", "no mechanism 'flash'"),
        ("", "no mechanism ''"),
        ("rank=3", "'rank=3' follows no mechanism's options; write NAME:rank=3"),
        ("fma,rank=3", "follows no mechanism's options"),
        ("fma:rank", "-a fma takes NAME=VALUE"),
        ("fma,fma", "fma is given twice"),
    ],
)
def test_wrong_lists_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        chosen(text, "-a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of steps, tokens and minutes for each run; got none"),
        ({"steps": 1, "minutes": 1}, "got steps and minutes"),
        ({"tokens": 0}, "tokens must be positive, got 0"),
        ({"steps": 1, "batch": 0}, "batch must be positive, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_the_command(text, tmp_path):
    shape = [
        "--length",
        "64",
        "--width",
        "16",
        "--layers",
        "1",
        "--scored",
        "2",
        "--model",
        "conv=0",
        "--recipe",
        "lr=0.02",
    ]
    given = ["compare", "-a", "fu,win:width=8", "--text", text, "--steps", "2", *shape, "--out", str(tmp_path / "run")]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(
        app, [*given, "--device", "cpu", "--seeds", "2", "--seeds-of", "win"]
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"Held-out bits per byte after 128 tokens", result.output)
    found = json.loads((tmp_path / "run" / comparing.NAME).read_text())
    assert list(found["runs"]) == ["full seed 0", "window:width=8 seed 0", "window:width=8 seed 1"]
    assert (found["model"]["conv"], found["train"]["lr"]) == (0, 0.02)
    result = CliRunner().invoke(app, [*given, "--seeds-of", "fma", "--resume"])
    assert result.exit_code == 2


# several at a time, and a deadline


def several(text, out, entries, workers=2, **settings):
    said = StringIO()
    entries = [Entry(*each) for each in entries]
    compared = comparing.Comparison(
        out, entries, replace(TINY, **settings), torch.device("cpu"), Console(file=said, width=200)
    )
    compared.open([text], None, resume=False)
    with ExitStack() as stack:
        each = [stack.enter_context(worker.Worker(own=True)) for _ in range(workers)]
        compared.plan(each[0])
        compared.train(each)
    return json.loads((out / comparing.NAME).read_text()), said.getvalue()


def test_runs_in_processes_of_their_own_find_the_same(made, text, tmp_path):
    _, found, _ = made
    entries = [("fma", {"block": 8, "near": 8, "rank": 3}), *CHOSEN]
    again, said = several(text, tmp_path / "run", entries)
    (failed,) = again["failed"].values()
    assert "rank" in failed["reason"]
    assert set(again["runs"]) == {key for key in found["runs"] if key.endswith("seed 0")}
    for key, about in again["runs"].items():
        assert about["overall"] == found["runs"][key]["overall"]
        assert f"{about['label']}, seed 0: {about['overall']:.4f} bits per byte" in said


def test_at_the_deadline_runs_are_scored_with_what_they_had(text, tmp_path, monkeypatch):
    def tick():
        """A clock that every look at it moves on by a second."""
        seconds = count()
        clock = SimpleNamespace(time=lambda: next(seconds), monotonic=time.monotonic, perf_counter=time.perf_counter)
        monkeypatch.setattr(comparing, "time", clock)

    endless = replace(TINY, steps=10**6)
    entries = [("full", {}), ("window", {"width": 16})]
    tick()
    found, _ = run(text, tmp_path / "run", endless, entries, deadline=9)
    (about,) = found["runs"].values()
    # one look when it begins, one after each step
    assert about["cut"] == 8 * 64
    assert 0 < about["overall"] < 9
    (failed,) = found["failed"].values()
    assert failed == {"label": "window:width=16", "seed": 0, "reason": "not begun before the deadline"}
    assert f"full, cut at {about['cut']:,} tokens" in (tmp_path / "run" / "compare.md").read_text()
    # a further call goes on where it was cut
    tick()
    more, _ = run(text, tmp_path / "run", endless, entries[:1], deadline=9, resume=True)
    assert more["runs"]["full seed 0"]["cut"] == 16 * 64


def test_the_gap_is_that_between_near_field_and_full():
    def about(label, overall, **options):
        name = label.partition(":")[0]
        return {
            "attention": name, "options": options, "label": label, "seed": 0, "overall": overall, "early": 1.0,
            "late": 1.0, "speed": 1.0, "memory": 1, "by_position": [], "by_repeat": [],
        }  # fmt: skip

    runs = [
        about("full", 0.5), about("near-field:near=64", 1.5, near=64), about("near-field:near=128", 1.0, near=128),
        about("fma:near=64", 1.0, near=64), about("fma:near=128", 0.75, near=128), about("window", 1.25),
    ]  # fmt: skip
    # layers of two kinds are no near field alone
    runs.insert(0, about("near-field:near=128/full", 0.75, near=128) | {"other": ["full", {}]})
    models = merged({"runs": {x["label"]: x for x in runs}})
    assert models.pop("near-field:near=128/full")["gap"] == 0.5
    assert [m["gap"] for m in models.values()] == [1.0, 0.0, 0.0, 0.5, 0.5, 0.25]


def test_a_model_of_two_mechanisms(text, tmp_path):
    entries = [("window", {"width": 8}, ("full", {}))]
    found, _ = run(text, tmp_path / "run", replace(TINY, layers=4, lengths=(32, 128)), entries)
    (about,) = found["runs"].values()
    assert about["label"] == "window:width=8/full"
    made = mechanisms.make("window", width=8), mechanisms.make("full")
    assert about["rows"] == pytest.approx((3 * made[0].rows_read(64) + made[1].rows_read(64)) / 4)
    assert [x["length"] for x in about["lengths"]] == [32, 128]
    for x in about["lengths"]:
        assert 0 < x["overall"] < 9
        assert x["state"] > 0
    assert about["lengths"][0]["tokens"] >= about["lengths"][1]["tokens"] > 0
    assert "32 | 128" in (tmp_path / "run" / "compare.md").read_text()


def test_an_entry_says_which_of_its_layers_carry_positions(text, tmp_path):
    entries = mixed(
        "window:width=8/full:rope_share=0,every=2,window:width=8/full,window:rope_share=1,width=8/full", "-a"
    )
    settings = replace(TINY, layers=4, model={"other_rope_share": 0.25})
    # those of the others are not touched
    alone = Entry("window", {"rope_share": 0}, ("full", {}))
    for of_model, share in ((None, 0.5), ({"rope_share": 1.0}, 1.0), ({"other_rope_share": None}, 0.5)):
        made = Comparison(tmp_path, [alone], replace(TINY, layers=4, model=of_model), torch.device("cpu"), Console())
        model, _ = made._configs(alone, 0, 1)
        assert (model.rope_share, model.other_rope_share) == (0, share)
    found, _ = run(text, tmp_path / "run", settings, entries)
    labels = [about["label"] for about in found["runs"].values()]
    assert labels == [Entry(*each).label for each in entries]
    assert labels[0] == "window:width=8/full:rope_share=0,every=2"
    shares = [(0.5, 0, 2), (0.5, 0.25, 4), (1, 0.25, 4)]
    for about, wanted in zip(found["runs"].values(), shares, strict=True):
        model = checkpoint.read(tmp_path / "run" / about["checkpoint"]).model
        assert (model.rope_share, model.other_rope_share, model.every) == wanted


def seen():
    yield os.environ.get(worker.VISIBLE)


@pytest.mark.parametrize(("given", "sees"), [(None, "1"), ("4,7", "7")])
def test_a_process_sees_its_own_gpu_only(monkeypatch, given, sees):
    monkeypatch.setenv(worker.VISIBLE, "")
    monkeypatch.delenv(worker.VISIBLE) if given is None else monkeypatch.setenv(worker.VISIBLE, given)
    with worker.Worker(own=True, gpu=1) as one:
        assert list(one.run(seen)) == [sees]
    assert os.environ.get(worker.VISIBLE) == given


def test_a_second_mechanism_that_never_comes_is_refused(tmp_path):
    (each,) = mixed("window:width=8/full", "-a")
    run = Comparison(tmp_path, [Entry(*each)], replace(TINY, layers=3), torch.device("cpu"), Console(quiet=True))
    with pytest.raises(ValueError, match=r"no layer of 'window:width=8/full' .* every=3 or less"):
        run._configs(run.entries[0], 0, 1)


@pytest.mark.parametrize("entry", ["window:rope_share=half", "window/full:rope_share=half", "window/full:every=often"])
def test_fields_of_an_entry_that_are_no_numbers_are_refused(entry, tmp_path):
    (each,) = mixed(entry, "-a")
    name, value = entry.rpartition(":")[2].split("=")
    run = Comparison(tmp_path, [Entry(*each)], TINY, torch.device("cpu"), Console(quiet=True))
    with pytest.raises(ValueError, match=f"{name} must be a .*number.*, got '{value}'"):
        run._configs(run.entries[0], 0, 1)
